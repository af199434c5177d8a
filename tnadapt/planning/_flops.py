"""The cost of a training step: multiply-adds for all updates and the gradients of their parameters."""

from __future__ import annotations

from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA

from ._shape_backend import CountingBackend

__all__ = ["step_cost"]


def step_cost(plan: SuperLoRA) -> int:
    """Return the multiply-adds of one training step in the adapter alone, if every group is computed once.

    Parameters
    ----------
    plan : SuperLoRA

    Returns
    -------
    int

    Notes
    -----
    The products are counted as they are computed, including padding: forward, and twice that backward, where each
    product of two arrays has a gradient for both. A map declares its own cost (fastfood: ``L log2 L`` additions per
    transform, the first one of F's input only, and three products per element), and its adjoint costs the same. A start
    that is subtracted is computed as well, forward. Not
    counted: the model itself, the scale, and recomputation that saves memory.

    Examples
    --------
    A product of rank r with N elements costs r N, three times:

    >>> import tnadapt as tna
    >>> step_cost(tna.SuperLoRA(tna.presets.lora(4), [(768, 768)])) == 3 * 4 * 768 * 768
    True
    """
    known: dict[tuple[int, int], int] = {}
    total = 0
    for group in plan.groups:
        key = id(group.network), group.size
        if key not in known:
            start = 1 if group.start.subtracts else 0
            known[key] = (3 + start) * forward_cost(group.network) + (2 + start) * _projected(group.projection)
        total += known[key]
    return total


def forward_cost(network: Network) -> int:
    """Return the multiply-adds of one group before F, by running its operations on shapes."""
    backend = CountingBackend()
    network.whole(backend, {name: backend.array(shape) for name, shape in network.shapes.items()})
    return backend.products


def _projected(projection: Projection) -> int:
    """Return the multiply-adds of one call of F: as declared, or by running its operations on shapes."""
    own = projection.map.cost()
    if own is not None:
        return own
    backend = CountingBackend()
    projection.map.forward(backend, backend.array((projection.n_in,)))
    return backend.products

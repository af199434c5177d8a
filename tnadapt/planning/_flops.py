"""What a step costs: the multiply-adds of forming all updates and the gradients of their parameters."""

from __future__ import annotations

from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA

from ._shape_backend import CountingBackend

__all__ = ["step_cost"]


def step_cost(plan: SuperLoRA) -> int:
    """Multiply-adds of one training step in the adapter alone, where every group is formed once.

    Parameters
    ----------
    plan : SuperLoRA

    Returns
    -------
    int

    Notes
    -----
    Counted are the products as they are computed, padding included: forward, and twice that backward, where each
    product of two arrays has a gradient for either. A map counts its own (fastfood: ``L log2 L`` additions a transform,
    the first one of the vector before F alone, and three products an element), and as much again for its adjoint. Not
    counted: the model itself, the scale, and what is computed twice where memory is saved.

    Examples
    --------
    A low-rank product of N elements takes r N, three times:

    >>> import tnadapt as tna
    >>> step_cost(tna.SuperLoRA(tna.presets.lora(4), [(768, 768)])) == 3 * 4 * 768 * 768
    True
    """
    known: dict[tuple[int, int], int] = {}
    total = 0
    for group in plan.groups:
        key = id(group.network), group.size
        if key not in known:
            known[key] = 3 * forward_cost(group.network) + 2 * _projected(group.projection)
        total += known[key]
    return total


def forward_cost(network: Network) -> int:
    """Multiply-adds of one group before F: those of the operations that make it, on shapes alone."""
    backend = CountingBackend()
    network.whole(backend, {name: backend.array(shape) for name, shape in network.shapes.items()})
    return backend.products


def _projected(projection: Projection) -> int:
    """Multiply-adds of one call of F: those it declares, or those of its operations on shapes alone."""
    own = projection.map.cost()
    if own is not None:
        return own
    backend = CountingBackend()
    projection.map.forward(backend, backend.array((projection.n_in,)))
    return backend.products

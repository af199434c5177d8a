"""What a step costs: the multiply-adds of forming all updates and the gradients of their parameters."""

from __future__ import annotations

from tnadapt.algebra.maps.projection import SQUARE, Projection
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
    Counted are the products as they are computed, padding included: forward, and twice
    that backward, where each product of two arrays has a gradient for either. F is counted as
    ``L log2 L`` additions a transform (the first one of the vector before F alone) and three products an element,
    and as much again for its adjoint. Not counted: the model itself, the scale, and what is computed twice where
    memory is saved.

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
    if projection.kind in SQUARE:
        return 0
    small, length = (1 << (max(1, n) - 1).bit_length() for n in (projection.n_in, projection.padded))
    return small * (small.bit_length() - 1) + length * (length.bit_length() - 1) + 3 * length

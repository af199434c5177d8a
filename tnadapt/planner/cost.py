"""What a step costs: the multiply-adds of forming all updates and the gradients of their parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..formats import CP, Format, TensorTrain, Tucker
from ..network import Network
from ..projection import SQUARE, Projection
from ..superlora import SuperLoRA

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
    Counted are the products of :mod:`tnadapt.products` as they are computed, padding included: forward, and twice
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
    """Multiply-adds of one group before F."""
    one = sum(_of(split) for split in network.splits)
    if len(network.splits) > 1:
        # One product an element of each tensor on the way, the last split first.
        sizes = [math.prod(split.sizes) for split in reversed(network.splits)]
        ways = itertools.accumulate(sizes, int.__mul__) if network.kronecker else iter(sizes)
        one += sum(itertools.islice(ways, 1, None))
    return network.terms * one


def _of(split: Format) -> int:
    if isinstance(split, CP):
        left, right = _halves(split.sizes)
        made = _on_the_way(left) + _on_the_way(right) + math.prod(split.sizes) * (len(split.sizes) > 1)
        weighted = split.sizes[0] * ("weights" in split.shapes)
        return split.rank * (made + weighted)
    if isinstance(split, Tucker):
        shape, total = list(split.core), 0
        for mode, size in enumerate(split.sizes):
            shape[mode] = size
            if mode in split.modes:
                total += math.prod(shape) * split.core[mode]
        return total
    if isinstance(split, TensorTrain):
        return _of_train(split)
    return 0


def _of_train(split: TensorTrain) -> int:
    sizes, ranks = split.sizes, split.ranks
    if len(sizes) == 1:
        return 0
    cut = len(_halves(sizes)[0])
    total = math.prod(sizes) * ranks[cut]
    for mode in range(1, cut):
        total += math.prod(sizes[: mode + 1]) * ranks[mode] * ranks[mode + 1]
    for mode in range(len(sizes) - 2, cut - 1, -1):
        total += math.prod(sizes[mode:]) * ranks[mode + 1] * ranks[mode]
    return total


def _halves(sizes: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Where the products cut a tensor in two: where the halves are smallest together."""
    cuts = range(1, len(sizes))
    cut = min(cuts, key=lambda m: math.prod(sizes[:m]) + math.prod(sizes[m:])) if len(sizes) > 1 else 1
    return sizes[:cut], sizes[cut:]


def _on_the_way(sizes: Sequence[int]) -> int:
    """Elements of the products of two, three, … leading modes."""
    return sum(itertools.islice(itertools.accumulate(sizes, int.__mul__), 1, None))


def _projected(projection: Projection) -> int:
    if projection.kind in SQUARE:
        return 0
    small, length = (1 << (max(1, n) - 1).bit_length() for n in (projection.n_in, projection.padded))
    return small * (small.bit_length() - 1) + length * (length.bit_length() - 1) + 3 * length

"""Degrees of freedom: the dimension of the set of all ΔW that a plan can make, by formula.

Parameters are more than degrees of freedom: two settings of them make one ΔW wherever a change of basis between two
arrays cancels (the gauge), and those that only make padding make nothing at all. Here the first are subtracted and
the second are not counted.

What is returned is never too small: each formula is the dimension of a set that holds every ΔW. Where all of each
tensor is used, that set is no larger than it must be, but for the few known defective shapes
(CP of rank 3 on 2 × 2 × 2 × 2, of rank 4 on 3 × 3 × 3, and their series). Where a tensor is longer than what is used of
it, matrices without splits still come out exactly; of the others the last slice, of which a part is seen, may be
counted with some freedom too many. The tests hold all of this against the rank of the Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tnadapt.algebra.formats import Dense, Format, of_cp, of_tucker
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA

__all__ = ["degrees_of_freedom"]

Sizes = tuple[int, ...]


def degrees_of_freedom(plan: SuperLoRA) -> int:
    """The dimension of the set of all updates that a plan can make; never less than it.

    Parameters
    ----------
    plan : SuperLoRA

    Returns
    -------
    int
        From 1 to N, the elements of all weights.

    Notes
    -----
    The rank of the Jacobian of the long vector at random parameters, in exact arithmetic. Groups add up, and F,
    which maps different vectors to different ones, takes nothing away. Of one group, with sizes d_m:

    - CP: ``r (Σ d_m - M + 1)``; of order 2, ``r (d_1 + d_2 - r)``.
    - Tucker: ``Π r_m + Σ r_m (d_m - r_m)``.
    - tensor train: ``Σ r_{m-1} d_m r_m - Σ r_m²``.
    - a Kronecker product of K: ``Σ_k dof_k - (K - 1)``.
    - a Hadamard product of K: ``Σ_k dof_k - (K - 1) (Σ d_m - M + 1)``.
    - T terms: T times as many, and no more than a sum of T such tensors of the smallest kind that has a formula.

    Each is cut to the elements that there are. Costs microseconds a group of its own size.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.lora(4), [(768, 768)])
    >>> plan.num_parameters, degrees_of_freedom(plan)
    (6144, 6128)
    """
    known: dict[int, int] = {}
    total = 0
    for group in plan.groups:  # groups of one length share their network
        key = id(group.network)
        if key not in known:
            known[key] = of_network(group.network)
        total += known[key]
    return total


def of_network(network: Network) -> int:
    """The same of one group before F: of the first ``network.size`` elements of its tensor."""
    bound = _kronecker if network.kronecker else _hadamard
    return _seen(lambda sizes: bound(network, sizes), network.sizes, network.size)


def _seen(whole: Callable[[Sizes], int], sizes: Sizes, length: int) -> int:
    """Of the first ``length`` elements of a tensor, given what a whole tensor of any sizes has."""
    seen = list(sizes)
    for mode in range(len(sizes)):
        slices, rest = divmod(length, math.prod(sizes[mode + 1 :]))
        if slices:
            break
        seen[mode] = 1
    full, touched = tuple(seen), tuple(seen)
    full = (*full[:mode], slices, *full[mode + 1 :])
    if not rest:
        return whole(full)
    touched = (*touched[:mode], slices + 1, *touched[mode + 1 :])
    # The last slice has no more freedom than elements that are seen, and no more than if all of it were.
    return min(whole(full) + rest, whole(touched), length)


def _kronecker(network: Network, sizes: Sizes) -> int:
    """Of a sum of T Kronecker products of which ``sizes`` are seen."""
    terms, splits = network.terms, network.splits
    if len(splits) == 1:
        (split,) = splits
        return min(terms * split.freedom(sizes), split.freedom(sizes, times=terms))
    seen = _digits([split.sizes for split in splits], sizes)
    own = sum(split.freedom(part) for split, part in zip(splits, seen, strict=True)) - (len(splits) - 1)
    # A Kronecker product is a rank-one tensor of its splits: T of them are a CP tensor of rank T. And in each mode
    # ranks multiply, and add up over terms.
    each = zip(*(_mode_ranks(split, part) for split, part in zip(splits, seen, strict=True)), strict=True)
    whole = of_tucker(sizes, [terms * math.prod(ranks) for ranks in each])
    return min(terms * own, of_cp([math.prod(part) for part in seen], terms), whole)


def _digits(splits: Sequence[Sizes], sizes: Sizes) -> list[Sizes]:
    """The part of each split that elements of a product cut to ``sizes`` are made of."""
    columns = []
    for mode, size in enumerate(sizes):
        column, alone = [], True
        for k, split in enumerate(splits):
            below = math.prod(later[mode] for later in splits[k + 1 :])
            # The slow digits grow only when all faster ones have been through.
            column.append(min(split[mode], -(-size // below)) if alone else split[mode])
            alone = alone and column[-1] == 1
        columns.append(column)
    return list(zip(*columns, strict=True))


def _hadamard(network: Network, sizes: Sizes) -> int:
    """Of a sum of T elementwise products."""
    terms, splits = network.terms, network.splits
    if any(isinstance(split, Dense) for split in splits):
        return math.prod(sizes)
    # Whatever a rank-one tensor is multiplied with stays in its format, so that one split can give it to another.
    shared = sum(sizes) - len(sizes) + 1
    own = sum(split.freedom(sizes) for split in splits) - (len(splits) - 1) * shared
    # Ranks multiply: the product is itself a tensor of the format.
    return min(math.prod(sizes), terms * own, splits[0].freedom(sizes, times=terms, power=len(splits)))


def _mode_ranks(split: Format, sizes: Sequence[int]) -> list[int]:
    """What the rank of each unfolding with one mode as rows is at most, of a part of a split."""
    return [min(split.unfolding_rank([mode]), size) for mode, size in enumerate(sizes)]

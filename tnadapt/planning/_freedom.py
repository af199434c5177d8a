"""Degrees of freedom: the dimension of the set of all ΔW that a plan can represent, by formula.

There are more parameters than degrees of freedom: different parameters give the same ΔW if they differ by a change of
basis between two arrays (the gauge), and parameters that affect only padding do not change ΔW at all. The formulas
subtract the former and do not count the latter.

The result is an upper bound: each formula is the dimension of a set that contains every ΔW. If all elements of each
tensor are used, the bound is exact, except for the few known defective shapes (CP of rank 3 on 2 × 2 × 2 × 2, of rank 4
on 3 × 3 × 3, and their series). If a tensor has padding, the result is still exact for matrices without splits. For
others, the last slice, which is used in part, may be counted with too many degrees of freedom. The tests compare all of
this with the rank of the Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tnadapt.algebra.formats import Dense, Format, of_cp, of_tucker
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import checks_arguments

__all__ = ["degrees_of_freedom"]

Sizes = tuple[int, ...]


@checks_arguments
def degrees_of_freedom(plan: SuperLoRA) -> int:
    """Return the dimension of the set of all updates that a plan can represent, or an upper bound on it.

    Parameters
    ----------
    plan : SuperLoRA

    Returns
    -------
    int
        From 1 to N, the elements of all weights.

    Notes
    -----
    It is the rank of the Jacobian of the long vector at random parameters, in exact arithmetic. Groups add up. F limits
    it to its own rank (:meth:`Map.freedom <tnadapt.algebra.maps.Map.freedom>`); the paper's maps are injective. For one
    group, with sizes d_m:

    - CP: ``r (Σ d_m - M + 1)``; of order 2, ``r (d_1 + d_2 - r)``.
    - Tucker: ``Π r_m + Σ r_m (d_m - r_m)``.
    - tensor train: ``Σ r_{m-1} d_m r_m - Σ r_m²``.
    - a Kronecker product of K: ``Σ_k dof_k - (K - 1)``.
    - a Hadamard product of K: ``Σ_k dof_k - (K - 1) (Σ d_m - M + 1)``.
    - T terms: T times as many, and at most that of the smallest set with a formula that contains such sums.

    Each is limited to the number of elements. Takes microseconds per group of a different size.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.lora(4), [(768, 768)])
    >>> plan.num_parameters, degrees_of_freedom(plan)
    (6144, 6128)
    """
    known: dict[int, int] = {}
    total = 0
    for group, count in plan.alike:
        key = id(group.network)
        if key not in known:
            # Frozen arrays leave fewer degrees of freedom than the formulas, which are then an upper bound.
            known[key] = min(of_network(group.network), group.num_parameters, group.projection.map.freedom())
        total += count * known[key]
    # Arrays that are tied, or made from θ, are counted once. The magnitudes of weights are no part of an update.
    return min(total, plan.num_parameters - sum(map(math.prod, plan.weight_param_shapes.values())))


def of_network(network: Network) -> int:
    """Return the degrees of freedom of one group before F: of the first ``network.size`` elements of its tensor."""
    bound = _kronecker if network.kronecker else _hadamard
    return _seen(lambda sizes: bound(network, sizes), network.sizes, network.size)


def _seen(whole: Callable[[Sizes], int], sizes: Sizes, length: int) -> int:
    """Bound the degrees of freedom of the first ``length`` elements of a tensor, given a bound for whole tensors."""
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
    # The last, incomplete slice adds at most one degree per element, and at most as much as a complete slice.
    return min(whole(full) + rest, whole(touched), length)


def _kronecker(network: Network, sizes: Sizes) -> int:
    """Bound the degrees of freedom of a sum of T Kronecker products, cropped to ``sizes``."""
    terms, splits = network.terms, network.splits
    if len(splits) == 1:
        (split,) = splits
        return min(terms * split.freedom(sizes), split.freedom(sizes, times=terms))
    seen = _digits([split.sizes for split in splits], sizes)
    own = sum(split.freedom(part) for split, part in zip(splits, seen, strict=True)) - (len(splits) - 1)
    # Rearranged, a Kronecker product is a rank-one tensor of its splits, so T of them are a CP tensor of rank T. And
    # the sum is a Tucker tensor: in each mode, ranks multiply over splits and add up over terms.
    each = zip(*(_mode_ranks(split, part) for split, part in zip(splits, seen, strict=True)), strict=True)
    whole = of_tucker(sizes, [terms * math.prod(ranks) for ranks in each])
    return min(terms * own, of_cp([math.prod(part) for part in seen], terms), whole)


def _digits(splits: Sequence[Sizes], sizes: Sizes) -> list[Sizes]:
    """Return the sizes of the part of each split that a product cropped to ``sizes`` depends on."""
    columns = []
    for mode, size in enumerate(sizes):
        column, alone = [], True
        for k, split in enumerate(splits):
            below = math.prod(later[mode] for later in splits[k + 1 :])
            # Split k is the digit k of the position. It is used only up to the last position, as long as all slower
            # digits have a single value; otherwise it runs through all of its values.
            column.append(min(split[mode], -(-size // below)) if alone else split[mode])
            alone = alone and column[-1] == 1
        columns.append(column)
    return list(zip(*columns, strict=True))


def _hadamard(network: Network, sizes: Sizes) -> int:
    """Bound the degrees of freedom of a sum of T elementwise products."""
    terms, splits = network.terms, network.splits
    if any(isinstance(split, Dense) for split in splits):
        return math.prod(sizes)
    # A format is closed under multiplication by a rank-one tensor, so that such a factor can be moved from one split to
    # another without changing the product.
    shared = sum(sizes) - len(sizes) + 1
    own = sum(split.freedom(sizes) for split in splits) - (len(splits) - 1) * shared
    # The product is itself a tensor of the format, with the product of the ranks.
    return min(math.prod(sizes), terms * own, splits[0].freedom(sizes, times=terms, power=len(splits)))


def _mode_ranks(split: Format, sizes: Sequence[int]) -> list[int]:
    """Bound the rank of each unfolding with one mode as rows, for a part of a split."""
    return [min(split.unfolding_rank([mode]), size) for mode, size in enumerate(sizes)]

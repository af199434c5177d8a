"""Capacity of a setting: the largest matrix rank that its updates can have, and their degrees of freedom."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.formats import Dense, Format, of_cp, of_tucker
from tnadapt.algebra.network import Network
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ShapeError

# -- The largest matrix rank, which random parameters attain with probability one --------------------------------------


Blocks = Iterator[np.ndarray]

# Distinguishing a rank of k from a larger one takes the singular values of a k × k matrix.
LIMIT = 1024
_FIRST = 64
# A config with a larger rank is first tested with one of these: ΔW nearly always has the largest possible rank already.
_FEW = (16, 256)
# Elements of ΔW that are computed at once.
BLOCK = 1 << 22
# Singular values below this fraction of the largest one are rounding errors.
_ROUNDING = 1e-11


class Rank(NamedTuple):
    """A rank, or a lower bound on it.

    Attributes
    ----------
    value : int
    exact : bool
        If False, the rank is ``value`` or more.

    Examples
    --------
    >>> str(Rank(4, True)), str(Rank(1024, False))
    ('4', '≥ 1024')
    """

    value: int
    exact: bool

    def __str__(self) -> str:
        return str(self.value) if self.exact else f"≥ {self.value}"


@checks_arguments
def largest_rank(plan: UpdatePlan, weight: int | None = None, limit: int = LIMIT, seed: int = 0) -> Rank:
    """Return the largest matrix rank that the update of a weight can have.

    Parameters
    ----------
    plan : UpdatePlan
    weight : int, optional
        Index of the weight; by default, the first of those whose smaller side is largest.
    limit : int
        Ranks above it are not distinguished.
    seed : int
        Seed of the random parameters.

    Returns
    -------
    Rank

    Raises
    ------
    ShapeError
        If there is no such weight.

    Notes
    -----
    This rank is generic: all parameters except for a set of measure zero give it. It is known by formula for a matrix
    of rank r per weight; for Kronecker products of such matrices (ranks multiply) and Hadamard products (ranks
    multiply, up to full rank); for a vector whose elements are free; and for F with its transforms (of one group),
    which, over its random draws, maps every vector to one with a density and so with full rank.

    Otherwise ΔW of random parameters is computed in float64, a few rows at a time, by :meth:`UpdatePlan.vector
    <tnadapt.UpdatePlan.vector>`, and sketched from both sides by k random vectors, k doubling: if the rank of the k × k
    sketch is below k, it is that of ΔW. Random numbers stand in for frozen arrays that the plan lacks. A square part of
    ΔW with full rank also decides it. Memory is a few times 2**22 elements, plus what the format needs to compute them.

    Examples
    --------
    >>> import tnadapt as tna
    >>> vit = [(768, 768)] * 24
    >>> for config in (tna.presets.lora(4), tna.presets.lokr(4), tna.presets.superlora(1)):
    ...     print(largest_rank(tna.UpdatePlan(config, vit)))
    4
    96
    768
    """
    shapes = plan.shapes
    if weight is None:
        weight = max(range(len(shapes)), key=lambda i: (min(shapes[i]), -i))
    plan, weight = plan.part_of(integer("weight", weight, 0, len(shapes) - 1, ShapeError))
    shapes = plan.shapes
    limit = integer("limit", limit, 1, 1 << 16, ShapeError)
    known = by_formula(plan, weight)
    if known is not None:
        return Rank(known, True)
    most = min(limit, *shapes[weight])
    smaller = [few for few in _FEW if isinstance(plan.config.rank, int) and plan.config.rank > 2 * few]
    if smaller and _free(plan):  # with another rank, frozen arrays would be different ones
        # A larger rank can represent all that a smaller one can, and takes longer to compute.
        fewer = UpdatePlan(plan.config.replace(rank=smaller[-1]), shapes, plan._layers, plan._roles)
        smaller_rank = largest_rank(fewer, weight, limit, seed)
        if smaller_rank.value >= most:
            return Rank(most, most == min(shapes[weight]))
    rng = np.random.default_rng(seed)
    # Numbers of similar magnitude: with products of many normal numbers, a few elements would dominate ΔW, and the rest
    # would be lost in rounding.
    params = {
        name: rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape) for name, shape in plan.param_shapes.items()
    }
    plan = _with_stand_ins(plan, rng)
    start = sum(math.prod(shape) for shape in shapes[:weight])
    rows, cols = shapes[weight]
    step = max(1, BLOCK // cols)
    if plan.point.brought:  # the start may be anything
        plan = plan.with_start({name: rng.standard_normal(shape) for name, shape in plan.array_shapes.items()})

    def blocks() -> Blocks:
        for lo in range(0, rows, step):
            hi = min(lo + step, rows)
            yield plan.vector(params, start + lo * cols, start + hi * cols).reshape(hi - lo, cols)

    return sketched(blocks, (rows, cols), limit, rng)


def _free(plan: UpdatePlan) -> bool:
    """Return whether every array is a parameter of its own: none is frozen, tied, scaled, or made from θ."""
    return not plan.config.sources and plan.theta is None


def _with_stand_ins(plan: UpdatePlan, rng: np.random.Generator) -> UpdatePlan:
    """Return the plan with random numbers in place of frozen arrays that it lacks: given, or from the base."""
    shapes = {**plan.given_shapes, **plan.base_shapes}
    missing = {name: rng.standard_normal(shape) for name, shape in shapes.items() if name not in plan.given}
    if plan.theta is not None:
        missing |= plan.theta.stand_ins(rng)
    if not missing:
        return plan
    return plan.with_given({**plan.given, **missing})


def sketched(blocks: Callable[[], Blocks], shape: tuple[int, int], limit: int, rng: np.random.Generator) -> Rank:
    """Return the rank of a matrix given as blocks of rows, which ``blocks()`` yields in order, again in each call."""
    side = min(limit, *shape)
    full = side == min(shape)
    k = min(_FIRST, side)
    while True:
        rank = _count(_sketch(blocks(), shape, k, rng))
        if rank < k or k == side:
            return Rank(rank, full or rank < k)
        if k == _FIRST and _count(_part(blocks(), shape, side, rng)) == side:
            return Rank(side, full)
        k = min(2 * k, side)


def _sketch(blocks: Blocks, shape: tuple[int, int], k: int, rng: np.random.Generator) -> np.ndarray:
    """Compute ``left @ matrix @ right``, k × k, with normal matrices on the sides that are longer than k."""
    rows, cols = shape
    right = None if cols == k else rng.standard_normal((cols, k))
    narrow = (block if right is None else block @ right for block in blocks)
    if rows == k:
        return np.concatenate(list(narrow))
    return functools.reduce(operator.iadd, (rng.standard_normal((k, len(block))) @ block for block in narrow))


def _part(blocks: Blocks, shape: tuple[int, int], side: int, rng: np.random.Generator) -> np.ndarray:
    """Return the submatrix of ``side`` random rows and columns."""
    rows, cols = (np.sort(rng.permutation(size)[:side]) for size in shape)
    parts, first = [], 0
    for block in blocks:
        inside = rows[(first <= rows) & (rows < first + len(block))]
        parts.append(block[np.ix_(inside - first, cols)])
        first += len(block)
    return np.concatenate(parts)


def _count(matrix: np.ndarray) -> int:
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > _ROUNDING * values[0]))


def by_formula(plan: UpdatePlan, weight: int) -> int | None:
    """Return the rank if a formula gives it, otherwise None."""
    config, shape = plan.config, plan.shapes[weight]
    if not _free(plan):
        return None  # the formulas assume arrays in general position, which frozen ones need not be
    pieces = plan.layout.of_weight(weight)
    free = config.order == 1 and (config.splits == 1 or config.combine == "hadamard")
    # Groups that share F can have linearly dependent parts within a weight.
    group = plan.groups[pieces[0].group]
    drawn = group.projection.map.full_rank and (len(pieces) == 1 or not config.shared)
    if drawn or (free and group.projection.map.isometry):
        return min(shape)
    alone = len(pieces) == 1 and group.size == math.prod(shape)
    if not group.projection.map.identity or not alone or group.network.sizes != shape:
        return None
    rank = _of_matrix(group.network)
    # The update of the start, which is subtracted, has a rank of its own.
    return min(2 * rank, *shape) if rank is not None and group.subtracts else rank


def _of_matrix(network: Network) -> int | None:
    split_ranks = [split.matrix_rank() for split in network.splits]
    ranks = [rank for rank in split_ranks if rank is not None]
    if len(ranks) < len(split_ranks):
        return None
    full = min(network.sizes)
    if not network.kronecker or len(ranks) == 1:
        return min(full, network.terms * math.prod(ranks))
    exact = all(math.prod(split.sizes[mode] for split in network.splits) == network.sizes[mode] for mode in (0, 1))
    return math.prod(ranks) if exact and network.terms == 1 else None


# -- Degrees of freedom: the dimension of the set of all ΔW, by formula ------------------------------------------------

# There are more parameters than degrees of freedom: different parameters give the same ΔW if they differ by a change of
# basis between two arrays (the gauge), and parameters that affect only padding do not change ΔW at all. The formulas
# subtract the former and do not count the latter.
#
# The result is an upper bound: each formula is the dimension of a set that contains every ΔW. If all elements of each
# tensor are used, the bound is exact, except for the few known defective shapes (CP of rank 3 on 2 × 2 × 2 × 2, of rank
# 4 on 3 × 3 × 3, and their series). If a tensor has padding, the result is still exact for matrices without splits. For
# others, the last slice, which is used in part, may be counted with too many degrees of freedom. The tests compare all
# of this with the rank of the Jacobian.


Sizes = tuple[int, ...]


@checks_arguments
def degrees_of_freedom(plan: UpdatePlan) -> int:
    """Return the dimension of the set of all updates that a plan can represent, or an upper bound on it.

    Parameters
    ----------
    plan : UpdatePlan

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
    >>> plan = tna.UpdatePlan(tna.presets.lora(4), [(768, 768)])
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
    # Arrays that are tied, or made from θ, are counted once. The magnitudes of weights are not part of an update.
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
    freedom = sum(split.freedom(part) for split, part in zip(splits, seen, strict=True)) - (len(splits) - 1)
    # Rearranged, a Kronecker product is a rank-one tensor of its splits, so T of them are a CP tensor of rank T. And
    # the sum is a Tucker tensor: in each mode, ranks multiply over splits and add up over terms.
    each = zip(*(_mode_ranks(split, part) for split, part in zip(splits, seen, strict=True)), strict=True)
    whole = of_tucker(sizes, [terms * math.prod(ranks) for ranks in each])
    return min(terms * freedom, of_cp([math.prod(part) for part in seen], terms), whole)


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
    freedom = sum(split.freedom(sizes) for split in splits) - (len(splits) - 1) * shared
    # The product is itself a tensor of the format, with the product of the ranks.
    return min(math.prod(sizes), terms * freedom, splits[0].freedom(sizes, times=terms, power=len(splits)))


def _mode_ranks(split: Format, sizes: Sequence[int]) -> list[int]:
    """Bound the rank of each unfolding with one mode as rows, for a part of a split."""
    return [min(split.unfolding_rank([mode]), size) for mode, size in enumerate(sizes)]

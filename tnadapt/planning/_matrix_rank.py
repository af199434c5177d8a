"""The largest matrix rank that an update can have: what random parameters give, with probability one."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ShapeError, integer

__all__ = ["LIMIT", "Rank", "largest_rank"]

Blocks = Iterator[np.ndarray]

# Telling a rank of k from a larger one takes singular values of a k × k matrix.
LIMIT = 1024
_FIRST = 64
# Ranks of a config that are tried before a larger one: nearly always ΔW has the largest rank there is with these.
_FEW = (16, 256)
# Elements of ΔW that are formed at once.
BLOCK = 1 << 22
# Below this share of the largest singular value, one is rounding.
_ROUNDING = 1e-11


class Rank(NamedTuple):
    """A rank, or what it is at least.

    Attributes
    ----------
    value : int
    exact : bool
        Otherwise the rank is ``value`` or more.

    Examples
    --------
    >>> str(Rank(4, True)), str(Rank(1024, False))
    ('4', '≥ 1024')
    """

    value: int
    exact: bool

    def __str__(self) -> str:
        return str(self.value) if self.exact else f"≥ {self.value}"


def largest_rank(plan: SuperLoRA, weight: int | None = None, limit: int = LIMIT, seed: int = 0) -> Rank:
    """The largest matrix rank that the update of a weight can have.

    Parameters
    ----------
    plan : SuperLoRA
    weight : int, optional
        Which; if None, the first of those whose smaller side is largest.
    limit : int
        Ranks above it are not told apart.
    seed : int
        Of the random parameters.

    Returns
    -------
    Rank

    Raises
    ------
    ShapeError
        If there is no such weight.

    Notes
    -----
    Ranks cannot fall at a random point: all parameters but a set of measure zero give this rank (it is generic). By
    formula where one holds: a matrix of its own, rank r, and their Kronecker products (ranks multiply) and Hadamard
    products (ranks multiply, up to full); a vector whose elements are free; and F with its transforms (of
    one group), which makes of every vector, over its own random draws, a vector with a density: full rank.

    Otherwise ΔW of random parameters is formed in float64, some rows at a time, by :meth:`SuperLoRA.vector
    <tnadapt.SuperLoRA.vector>`, and sketched from both sides by k random vectors, k doubling: the rank of the k × k
    sketch is that of ΔW where it is below k. A square part of ΔW of full rank says the same at once. Memory: some
    times 2**22 elements, and what the format needs to form them.

    Examples
    --------
    >>> import tnadapt as tna
    >>> vit = [(768, 768)] * 24
    >>> for config in (tna.presets.lora(4), tna.presets.lokr(4), tna.presets.superlora(1)):
    ...     print(largest_rank(tna.SuperLoRA(config, vit)))
    4
    96
    768
    """
    shapes = plan.shapes
    if weight is None:
        weight = max(range(len(shapes)), key=lambda i: (min(shapes[i]), -i))
    weight = integer("weight", weight, 0, len(shapes) - 1, ShapeError)
    limit = integer("limit", limit, 1, 1 << 16, ShapeError)
    known = by_formula(plan, weight)
    if known is not None:
        return Rank(known, True)
    most = min(limit, *shapes[weight])
    smaller = [few for few in _FEW if isinstance(plan.config.rank, int) and plan.config.rank > 2 * few]
    if smaller:
        # A larger rank makes all that a smaller one does, and takes long to form.
        fewer = SuperLoRA(plan.config.replace(rank=smaller[-1]), shapes, plan._layers)
        found = largest_rank(fewer, weight, limit, seed)
        if found.value >= most:
            return Rank(most, most == min(shapes[weight]))
    rng = np.random.default_rng(seed)
    # Numbers of about one size: products of many normal ones would leave most of ΔW in the last digits.
    params = {
        name: rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape) for name, shape in plan.param_shapes.items()
    }
    start = sum(math.prod(shape) for shape in shapes[:weight])
    rows, cols = shapes[weight]
    step = max(1, BLOCK // cols)

    def blocks() -> Blocks:
        for lo in range(0, rows, step):
            hi = min(lo + step, rows)
            yield plan.vector(params, start + lo * cols, start + hi * cols).reshape(hi - lo, cols)

    return sketched(blocks, (rows, cols), limit, rng)


def sketched(blocks: Callable[[], Blocks], shape: tuple[int, int], limit: int, rng: np.random.Generator) -> Rank:
    """The rank of a matrix that comes in blocks of rows, one after another, as often as is asked."""
    side = min(limit, *shape)
    full = side == min(shape)
    k = min(_FIRST, side)
    while True:
        found = _count(_sketch(blocks(), shape, k, rng))
        if found < k or k == side:
            return Rank(found, full or found < k)
        if k == _FIRST and _count(_part(blocks(), shape, side, rng)) == side:
            return Rank(side, full)
        k = min(2 * k, side)


def _sketch(blocks: Blocks, shape: tuple[int, int], k: int, rng: np.random.Generator) -> np.ndarray:
    """``left @ matrix @ right``, k × k, with a normal left and right where the side is longer than k."""
    rows, cols = shape
    right = None if cols == k else rng.standard_normal((cols, k))
    narrow = (block if right is None else block @ right for block in blocks)
    if rows == k:
        return np.concatenate(list(narrow))
    return functools.reduce(operator.iadd, (rng.standard_normal((k, len(block))) @ block for block in narrow))


def _part(blocks: Blocks, shape: tuple[int, int], side: int, rng: np.random.Generator) -> np.ndarray:
    """Some of the rows and columns, as many of each."""
    rows, cols = (np.sort(rng.permutation(size)[:side]) for size in shape)
    found, first = [], 0
    for block in blocks:
        inside = rows[(first <= rows) & (rows < first + len(block))]
        found.append(block[np.ix_(inside - first, cols)])
        first += len(block)
    return np.concatenate(found)


def _count(matrix: np.ndarray) -> int:
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > _ROUNDING * values[0]))


def by_formula(plan: SuperLoRA, weight: int) -> int | None:
    """The rank where a formula has it, else None."""
    config, shape = plan.config, plan.shapes[weight]
    pieces = plan.layout.of_weight(weight)
    free = config.order == 1 and (config.splits == 1 or config.combine == "hadamard")
    # Groups that share F may repeat each other within a weight.
    group = plan.groups[pieces[0].group]
    drawn = group.projection.map.full_rank and (len(pieces) == 1 or not config.shared)
    if drawn or (free and group.projection.map.isometry):
        return min(shape)
    alone = len(pieces) == 1 and group.size == math.prod(shape)
    if config.projection != "identity" or not alone or group.network.sizes != shape:
        return None
    return _of_matrix(group.network)


def _of_matrix(network: Network) -> int | None:
    found = [split.matrix_rank() for split in network.splits]
    ranks = [rank for rank in found if rank is not None]
    if len(ranks) < len(found):
        return None
    full = min(network.sizes)
    if not network.kronecker or len(ranks) == 1:
        return min(full, network.terms * math.prod(ranks))
    exact = all(math.prod(split.sizes[mode] for split in network.splits) == network.sizes[mode] for mode in (0, 1))
    return math.prod(ranks) if exact and network.terms == 1 else None

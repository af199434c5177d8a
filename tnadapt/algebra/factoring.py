"""Row and column factors of one weight's update, where its rows and columns stay separate.

``ΔW_i = scale * sum_t M_1 ⊗ … ⊗ M_K``, each M_k a small matrix or a product ``left @ right.T`` of two narrow ones: a
layer that multiplies by these never needs ΔW. LoRA is one term, one product. A weight that is a run of rows of a folded
tensor whose last modes together are its columns is one product, too: LoTR, CP across layers, a hypercube that lines up
with the weights digit for digit. Kronecker products of matrices stay what they are (LoKr, KronA, Compacter), and a
Hadamard product of low-rank matrices is one of the product of the ranks (LoHa).

What is separate is read off the integers of the plan, and is exact. Where a fold cuts through rows, F mixes elements,
or a Kronecker product is cut to size, there are no such factors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._boxes import boxes
from .formats import Format, Ranges
from .group import Group
from .network import Network
from .products import kronecker_tensor
from .superlora import SuperLoRA
from .unfolding import Cut

__all__ = ["Factored", "Factoring", "Matrix", "factoring"]


class Matrix(NamedTuple):
    """A matrix, whole or as a product of two narrow ones.

    Attributes
    ----------
    left : array, shape (rows, width), or (rows, cols) where ``right`` is None
    right : array, shape (cols, width), or None
        The matrix is ``left @ right.T``.
    """

    left: Array
    right: Array | None


class Factored(NamedTuple):
    """An update as a sum of Kronecker products of small matrices.

    Attributes
    ----------
    terms : list of list of Matrix
        Of each term the matrices, the first the slow one in rows and columns.
    scale : float
        What their sum is multiplied with.
    """

    terms: list[list[Matrix]]
    scale: float

    def dense(self, backend: Backend) -> Array:
        """The update itself, ``(rows, cols)``."""
        found = []
        for term in self.terms:
            made = [
                m.left if m.right is None else backend.matmul(m.left, backend.matrix_transpose(m.right)) for m in term
            ]
            found.append(kronecker_tensor(backend, made))
        total = functools.reduce(lambda a, b: a + b, found)
        return total if self.scale == 1.0 else total * self.scale


class Size(NamedTuple):
    """Of one :class:`Matrix`: its rows and columns, and the width of its factors (None: it is whole)."""

    rows: int
    cols: int
    width: int | None


@dataclasses.dataclass(frozen=True)
class Factoring:
    """How one weight's update factors: integers alone; a call with arrays gives the factors.

    Attributes
    ----------
    terms : int
        How many products are summed.
    sizes : tuple of Size
        Of the matrices of each.
    shared : bool
        Whether other weights are made of them, too.
    """

    group: Group
    #: Of each matrix of a term: which part of the unfolding of its split, or of the whole network, it is.
    cuts: tuple[Cut, ...]
    terms: int
    sizes: tuple[Size, ...]
    shared: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The plan's arrays that the factors are made of."""
        return tuple(self.group.names.values())

    @property
    def network(self) -> Network:
        """The network of the weight's group."""
        return self.group.network

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it is one low-rank matrix."""
        return self.terms == 1 and len(self.sizes) == 1

    def __call__(self, backend: Backend, params: Mapping[str, Array]) -> Factored:
        """The factors made of these parameters (of the names in ``names``); differentiable."""
        network = self.network
        arrays = self.group.arrays(backend, params)
        if len(self.sizes) == 1:
            left, right = network.unfolded(backend, arrays, self.cuts[0])
            return Factored([[Matrix(left, backend.matrix_transpose(right))]], network.scale)
        found = []
        for prefixes in network.prefixes:
            own = zip(network.splits, network.of_term(prefixes, arrays), self.cuts, self.sizes, strict=True)
            found.append([_matrix(backend, split, mine, cut, size) for split, mine, cut, size in own])
        return Factored(found, network.scale)


def _matrix(backend: Backend, split: Format, arrays: Mapping[str, Array], cut: Cut, size: Size) -> Matrix:
    """A part of the unfolding of one split, in two factors where that is less."""
    if size.width is not None:
        left, right = split.unfolded(backend, arrays, cut)
        return Matrix(left, backend.matrix_transpose(right))
    whole = backend.reshape(split.tensor(backend, arrays, [(0, d) for d in split.sizes]), (-1, size.cols))
    return Matrix(whole[cut.rows[0] : cut.rows[1]], None)


def factoring(plan: SuperLoRA, i: int) -> Factoring | None:
    """How the update of weight ``i`` factors; None where its rows and columns are not separate.

    Parameters
    ----------
    plan : SuperLoRA
    i : int
        Which weight.

    Returns
    -------
    Factoring or None

    Examples
    --------
    >>> import tnadapt as tna
    >>> factoring(SuperLoRA(tna.presets.lora(4), [(768, 512)]), 0).sizes
    (Size(rows=768, cols=512, width=4),)
    >>> factoring(SuperLoRA(tna.presets.lokr(4), [(768, 768)]), 0).sizes
    (Size(rows=24, cols=24, width=None), Size(rows=32, cols=32, width=4))
    >>> factoring(SuperLoRA(tna.presets.superlora(4), [(768, 768)] * 24), 0) is None
    True
    """
    pieces = plan.layout.of_weight(i)
    if plan.config.projection != "identity" or len(pieces) != 1:
        return None
    (piece,) = pieces
    group, cols = plan.groups[piece.group], plan.shapes[i][1]
    network = group.network
    cut = _cut(network.sizes, cols)
    if cut is None or piece.group_start % cols:
        return None
    first, rows = piece.group_start // cols, plan.shapes[i][0]
    shared = len(group.pieces) > 1
    if network.kronecker and len(network.splits) > 1:
        return _of_kronecker(group, cut, (first, first + rows), shared)
    width = network.inner(cut)
    if width is None:
        return None
    part = Cut(cut, (first, first + rows), (0, cols), piece.group_start)
    return Factoring(group, (part,), 1, (Size(rows, cols, width),), shared)


def _of_kronecker(group: Group, cut: int, rows: tuple[int, int], shared: bool) -> Factoring | None:
    """Where the rows are one index and the columns another, the product of matrices is one of their unfoldings."""
    network = group.network
    found = boxes(network.sizes[:cut], *rows)
    if len(found) > 1 or _extent(found[0].ranges) != rows[1] - rows[0]:
        return None
    ranges = [*found[0].ranges, *((0, size) for size in network.sizes[cut:])]
    if any(sum(hi - lo > 1 for lo, hi in side) > 1 for side in (ranges[:cut], ranges[cut:])):
        return None
    digits = []
    for mode, (lo, hi) in enumerate(ranges):
        inner = boxes([split.sizes[mode] for split in network.splits], lo, hi)
        if len(inner) > 1 or _extent(inner[0].ranges) != hi - lo:
            return None
        digits.append(inner[0].ranges)
    cuts, sizes = [], []
    for k, split in enumerate(network.splits):
        own = [digit[k] for digit in digits]
        run = _run(split.sizes[:cut], own[:cut])
        if run is None or any(bounds != (0, size) for bounds, size in zip(own[cut:], split.sizes[cut:], strict=True)):
            return None
        r, c, width = run[1] - run[0], math.prod(split.sizes[cut:]), split.inner(cut)
        cuts.append(Cut(cut, run, (0, c), run[0] * c))
        sizes.append(Size(r, c, width if width is not None and width * (r + c) < r * c else None))
    return Factoring(group, tuple(cuts), network.terms, tuple(sizes), shared)


def _run(sizes: Sequence[int], ranges: Ranges) -> tuple[int, int] | None:
    """Start and stop, in ``vec``, of a box whose elements lie one after another; None where they do not."""
    start = 0
    for size, (lo, _) in zip(sizes, ranges, strict=True):
        start = start * size + lo
    length = _extent(ranges)
    found = boxes(sizes, start, start + length)
    return (start, start + length) if [list(box.ranges) for box in found] == [list(ranges)] else None


def _extent(ranges: Ranges) -> int:
    return math.prod(stop - start for start, stop in ranges)


def _cut(sizes: Sequence[int], cols: int) -> int | None:
    """Before which mode a tensor is cut for its last modes to be the columns; at least one mode is rows."""
    return next((m for m in range(len(sizes) - 1, 0, -1) if math.prod(sizes[m:]) == cols), None)

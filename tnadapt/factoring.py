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
from typing import Any, NamedTuple

from .backends import Backend
from .backends.base import Array
from .boxes import Box, boxes
from .formats import Format, Ranges
from .network import Network
from .products import kronecker_tensor
from .superlora import Group, SuperLoRA

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

    network: Network
    keys: Mapping[str, str]
    cut: int
    #: Of each run of rows, of each split: the ranges of its tensor. Several runs only where there is one matrix a term.
    runs: tuple[tuple[Ranges, ...], ...]
    #: Of each run, which of its rows are the weight's.
    kept: tuple[tuple[int, int], ...]
    terms: int
    sizes: tuple[Size, ...]
    shared: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Factoring:
        return self  # nothing in it changes

    @property
    def names(self) -> tuple[str, ...]:
        """The plan's arrays that the factors are made of."""
        return tuple(self.keys.values())

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it is one low-rank matrix."""
        return self.terms == 1 and len(self.sizes) == 1

    def __call__(self, backend: Backend, params: Mapping[str, Array]) -> Factored:
        """The factors made of these parameters (of the names in ``names``); differentiable."""
        network = self.network
        arrays = {name: params[full] for name, full in self.keys.items()}
        found = []
        for prefixes in network.prefixes:
            own = network.of_term(prefixes, arrays)
            if network.kronecker and len(network.splits) > 1:
                found.append(
                    [
                        self._matrix(backend, split, mine, ranges, size.width)
                        for split, mine, ranges, size in zip(network.splits, own, self.runs[0], self.sizes, strict=True)
                    ]
                )
            else:
                found.append([self._low_rank(backend, own)])
        if len(found) > 1 and len(self.sizes) == 1:
            # Low-rank matrices side by side are one.
            pairs = [matrix for (matrix,) in found]
            found = [[Matrix(*(backend.concat([pair[side] for pair in pairs], axis=1) for side in (0, 1)))]]
        return Factored(found, network.scale)

    def _matrix(
        self, backend: Backend, split: Format, arrays: Mapping[str, Array], ranges: Ranges, width: int | None
    ) -> Matrix:
        if width is not None:
            return Matrix(*split.halves(backend, arrays, ranges, self.cut))
        rows, cols = _extent(ranges[: self.cut]), _extent(ranges[self.cut :])
        return Matrix(backend.reshape(split.tensor(backend, arrays, ranges), (rows, cols)), None)

    def _low_rank(self, backend: Backend, own: Sequence[Mapping[str, Array]]) -> Matrix:
        """One product: of one split, or of several that are multiplied element by element."""
        lefts, right = [], None
        for run, (lo, hi) in zip(self.runs, self.kept, strict=True):
            pairs = [
                split.halves(backend, arrays, ranges, self.cut)
                for split, arrays, ranges in zip(self.network.splits, own, run, strict=True)
            ]
            left = functools.reduce(lambda a, b: _beside(backend, a, b), [pair[0] for pair in pairs])
            lefts.append(left if (lo, hi) == (0, left.shape[0]) else left[lo:hi])
            if right is None:
                right = functools.reduce(lambda a, b: _beside(backend, a, b), [pair[1] for pair in pairs])
        return Matrix(backend.concat(lefts), right)


def _beside(backend: Backend, a: Array, b: Array) -> Array:
    """Each row's products: ``(a bᵀ)`` of two matrices multiplied element by element has these for factors."""
    shape = (a.shape[0], a.shape[1], b.shape[1])
    product = backend.reshape(a, (*shape[:2], 1)) * backend.reshape(b, (shape[0], 1, shape[2]))
    return backend.reshape(product, (shape[0], shape[1] * shape[2]))


def _extent(ranges: Ranges) -> int:
    return math.prod([stop - start for start, stop in ranges])


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
    found = boxes(network.sizes[:cut], first, first + rows)
    many = len(network.splits)
    if network.kronecker and many > 1:
        return _of_kronecker(group, cut, found, rows)
    widths = [split.width(cut) for split in network.splits]
    if any(width is None for width in widths):
        return None
    width = network.terms * math.prod(width or 1 for width in widths)
    ends = [box.start + _extent(box.ranges) for box in found]
    kept = [
        (max(first - box.start, 0), min(first + rows, end) - box.start) for box, end in zip(found, ends, strict=True)
    ]
    whole = [(0, size) for size in network.sizes[cut:]]
    runs = [tuple([[*box.ranges, *whole]] * many) for box in found]
    shared, size = len(group.pieces) > 1, Size(rows, cols, width)
    return Factoring(network, group.names, cut, tuple(runs), tuple(kept), 1, (size,), shared)


def _of_kronecker(group: Group, cut: int, found: Sequence[Box], rows: int) -> Factoring | None:
    """Where the rows are one index and the columns another, the product of matrices is one of their unfoldings."""
    network, ranges = group.network, found[0].ranges
    if len(found) > 1 or _extent(ranges) != rows:
        return None
    if sum(hi - lo > 1 for lo, hi in ranges) > 1 or sum(size > 1 for size in network.sizes[cut:]) > 1:
        return None
    digits = []
    for mode, (lo, hi) in enumerate([*ranges, *((0, size) for size in network.sizes[cut:])]):
        sizes = [split.sizes[mode] for split in network.splits]
        inner = boxes(sizes, lo, hi)
        if len(inner) > 1 or _extent(inner[0].ranges) != hi - lo:
            return None
        digits.append(inner[0].ranges)
    run = tuple([digit[k] for digit in digits] for k in range(len(network.splits)))
    sizes_of = []
    for split, own in zip(network.splits, run, strict=True):
        r, c, width = _extent(own[:cut]), _extent(own[cut:]), split.width(cut)
        sizes_of.append(Size(r, c, width if width is not None and width * (r + c) < r * c else None))
    shared = len(group.pieces) > 1
    return Factoring(network, group.names, cut, (run,), ((0, rows),), network.terms, tuple(sizes_of), shared)


def _cut(sizes: Sequence[int], cols: int) -> int | None:
    """Before which mode a tensor is cut for its last modes to be the columns; at least one mode is rows."""
    return next((m for m in range(len(sizes) - 1, 0, -1) if math.prod(sizes[m:]) == cols), None)

"""Row and column factors of one weight's update, with which layers multiply without ΔW, and which exports write.

``ΔW_i = scale * sum_t M_1 ⊗ … ⊗ M_K``, where each M_k is a small matrix or a product ``left @ right.T`` of two narrow
ones. A layer that multiplies by these never needs ΔW. LoRA is one term with one product. A weight that is a run of rows
of a folded tensor whose last modes together are its columns is one product, too: LoTR, CP across layers, or a hypercube
that lines up with the weights digit for digit. Kronecker products of matrices are kept as they are (LoKr, KronA,
Compacter), and a Hadamard product of low-rank matrices is a matrix whose rank is the product of the ranks (LoHa).

With a start that is subtracted, ``L R - L_0 R_0`` is ``(L - L_0) R + L_0 (R - R_0)``: one product of twice the width,
which is exactly zero at the start, and near it does not subtract large numbers. A difference of Kronecker products of K
matrices is a sum of K products, ``A ⊗ B - A_0 ⊗ B_0 = (A - A_0) ⊗ B_0 + A ⊗ (B - B_0)``, with the same properties.

If no unfolding of the network is the weight (blocks as in GraLoRA, an index that holds parts of rows, a cropped
Kronecker product), the network is cut where that costs least: one product, whose width is the bound on the rank, if
that is below both sides.

If F keeps rows and columns separate, ``F(X) = A X Bᵀ``, as repetitions and permutations of rows do, it maps the factors
of X. If X has no narrow factors and is smaller than the weight (MiSS), A and Bᵀ are applied to the layer's vectors:
``A (X (Bᵀ x))``.

Only updates whose rows and columns are separable have factors. The integers of the plan decide this, exactly: there are
no factors if a weight is in several groups or F mixes rows with columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Array, Backend, FixedArrays

from .folding import Cut, boxes
from .formats import Format, Ranges
from .group import Group, Separation, separation_of
from .layout import place_of
from .maps import Map
from .network import Network, NetworkHalves, is_kronecker, width_at
from .products import LONG, kronecker_tensor, row_wise_khatri_rao
from .update_plan import UpdatePlan

# -- A sum of Kronecker products of small matrices, and the maps around it ---------------------------------------------


class Matrix(NamedTuple):
    """A matrix, dense or as a product of two narrow ones.

    Attributes
    ----------
    left : array, shape (rows, width), or (rows, cols) if ``right`` is None
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
        The matrices of each term; the first one varies slowest in rows and columns.
    scale : float
        Factor of the sum.
    sides : (Map, Map), optional
        (A, B): the update is A times the sum times Bᵀ.
    """

    terms: list[list[Matrix]]
    scale: float
    sides: tuple[Map, Map] | None = None

    def dense(self, backend: Backend) -> Array:
        """Compute the update itself, ``(rows, cols)``."""
        products = []
        for term in self.terms:
            matrices = [
                m.left if m.right is None else backend.matmul(m.left, backend.matrix_transpose(m.right)) for m in term
            ]
            products.append(kronecker_tensor(backend, matrices))
        total = functools.reduce(lambda a, b: a + b, products)
        if self.sides is not None:
            rows, cols = self.sides
            total = mapped(backend, rows, cols.forward(backend, total))
        return total if self.scale == 1.0 else total * self.scale

    def pair(self, backend: Backend) -> Matrix:
        """Return the update of a single matrix, without the scale, as two factors as narrow as its shape allows."""
        ((matrix,),) = self.terms
        if self.sides is None or matrix.right is not None:
            return matrix
        x, (rows, cols) = matrix.left, self.sides
        narrow = min(x.shape)
        unit = backend.asarray(np.eye(narrow), backend.dtype_name(x), backend.device(x))
        left, right = (unit, backend.matrix_transpose(x)) if x.shape[0] == narrow else (x, unit)
        return Matrix(mapped(backend, rows, left), mapped(backend, cols, right))


def difference(backend: Backend, now: Matrix, then: Matrix) -> Matrix:
    """Return a matrix minus another one; of two products, as a product that is exactly zero if they are equal."""
    if now.right is None or then.right is None:
        return Matrix(now.left - then.left, None)
    left = backend.concat([now.left - then.left, then.left], axis=1)
    return Matrix(left, backend.concat([now.right, now.right - then.right], axis=1))


def mapped(backend: Backend, map_: Map, matrix: Array) -> Array:
    """Apply a map to each column of a matrix."""
    if map_.identity:
        return matrix
    return backend.matrix_transpose(map_.forward(backend, backend.matrix_transpose(matrix)))


# -- Row and column factors of one weight's update ---------------------------------------------------------------------


class Size(NamedTuple):
    """Size of a :class:`Matrix`: rows, columns, and the width of its factors (None if it is dense)."""

    rows: int
    cols: int
    width: int | None


@dataclasses.dataclass(frozen=True)
class Factoring:
    """The factorization of one weight's update, as integers; a call with arrays returns the factors.

    Attributes
    ----------
    terms : int
        Number of terms in the sum.
    sizes : tuple of Size
        Sizes of the matrices of each term.
    shared : bool
        Whether other weights use the same arrays.
    """

    group: Group
    #: For each matrix of a term, the part of the unfolding of its split (or of the whole network) that it is.
    cuts: tuple[Cut, ...]
    terms: int
    sizes: tuple[Size, ...]
    shared: bool = False
    #: Computes the two factors at the cheapest cut of the network, where no unfolding is the weight.
    halves: NetworkHalves | None = None
    #: The matrices are those of X, from which the map F after the network computes the update.
    separation: Separation | None = None
    #: Names of the plan's arrays that are the two factors as they are, without computation; None if there are none.
    stored: tuple[str, str] | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # Computed here rather than on first access: a compiler cannot trace the lock of a cached property.
        object.__setattr__(self, "stored", self._stored())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the plan's arrays that the factors are computed from."""
        return tuple(dict.fromkeys(self.group.names.values()))  # arrays may be tied

    @property
    def network(self) -> Network:
        """The network of the weight's group."""
        return self.group.network

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether the update is a single low-rank matrix."""
        return self.terms == 1 and len(self.sizes) == 1 and self.sides is None

    @property
    def sides(self) -> tuple[Map, Map] | None:
        """The maps between which the matrices are; None if the factors themselves are mapped."""
        if self.separation is None or self._is_pair:
            return None
        (pair,) = self.separation.sides
        return pair

    @property
    def _is_pair(self) -> bool:
        return len(self.sizes) == 1 and self.sizes[0].width is not None

    @property
    def width(self) -> int | None:
        """Width of :meth:`Factored.pair`; None if the update is no single matrix."""
        if len(self.sizes) > 1:
            return None
        return self.sizes[0].width if self._is_pair else min(self.sizes[0][:2])

    def __call__(self, backend: Backend, params: Mapping[str, Array], trained: str | None = None) -> Factored:
        """Compute the factors from parameters, which must include those in ``names``; differentiable.

        ``trained`` is the dtype of training, if the parameters have been cast since: frozen arrays are rounded to it.
        """
        if self.stored is not None:
            left, right = self.stored
            return Factored([[Matrix(params[left], params[right])]], self.network.scale)
        return self.computed(backend, params, trained)

    def computed(self, backend: Backend, params: Mapping[str, Array], trained: str | None = None) -> Factored:
        """Compute the factors by the network, also where they are stored: what a call returns."""
        terms = self._terms(backend, self.group.arrays(backend, params, trained))
        if self.group.subtracts:
            begun = self._terms(backend, self.group.begun(backend, params, trained))
            terms = [
                [*now[:k], difference(backend, now[k], then[k]), *then[k + 1 :]]
                for now, then in zip(terms, begun, strict=True)
                for k in range(len(now))
            ]
        if self._is_pair:
            return Factored([[self._through(backend, terms[0][0])]], self.network.scale)
        return Factored(terms, 1.0 if len(self.sizes) == 1 else self.network.scale, self.sides)

    def _terms(self, backend: Backend, arrays: Mapping[str, Array]) -> list[list[Matrix]]:
        """Compute the matrices, before a start is subtracted, with the scale in a single dense one."""
        if self._is_pair:
            return [[self._two(backend, arrays)]]
        return [[self._one(backend, arrays)]] if len(self.sizes) == 1 else self._kronecker(backend, arrays)

    def _kronecker(self, backend: Backend, arrays: Mapping[str, Array]) -> list[list[Matrix]]:
        terms = []
        for prefixes in self.network.prefixes:
            factors = self.network.of_term(prefixes, arrays)
            splits = zip(self.network.splits, factors, self.cuts, self.sizes, strict=True)
            terms.append([_matrix(backend, split, mine, cut, size) for split, mine, cut, size in splits])
        return terms

    @functools.cached_property
    def whole_arrays(self) -> tuple[str, str] | None:
        """The two arrays of the network, frozen ones included, that are the two factors; None if they are computed."""
        if not self.is_plain or len(self.network.splits) > 1 or self.network.terms > 1:
            return None
        if self.group.subtracts or self.halves is not None or self.separation is not None:
            return None
        halves = self.network.splits[0].stored_halves(self.cuts[0])
        (prefix,) = self.network.prefixes[0]
        return None if halves is None else (prefix + halves[0], prefix + halves[1])

    def _stored(self) -> tuple[str, str] | None:
        if self.group.frozen_names or self.group.multiplied or self.whole_arrays is None:
            return None
        left, right = self.whole_arrays
        return self.group.names[left], self.group.names[right]

    def times(self, backend: Backend, x: Array, params: Mapping[str, Array]) -> Array:
        """Return ``x ΔWᵀ`` for :attr:`whole_arrays`, where no frozen array is multiplied by its multipliers.

        With many sets of parameters, as of the members of a population, the frozen arrays are shared by all of them.
        """
        assert self.whole_arrays is not None
        left, right = self.whole_arrays
        y = self._array_times(backend, self._array_times(backend, x, right, params, False), left, params, True)
        return y if self.network.scale == 1.0 else y * self.network.scale

    def _array_times(
        self, backend: Backend, x: Array, name: str, params: Mapping[str, Array], transposed: bool
    ) -> Array:
        group = self.group
        if name in group.names:
            array = params[group.names[name]]
        else:
            like = params[next(iter(group.names.values()))]
            dtype = backend.dtype_name(like)
            array = group.frozen.on(backend, (name, dtype), like, dtype)
        if name in group.multiplied:
            multipliers = {part: params[group.names[f"{name}.{part}"]] for part in group.multiplied[name].multipliers}
            return group.multiplied[name].times(backend, x, array, multipliers, transposed)
        return backend.matmul(x, backend.matrix_transpose(array) if transposed else array)

    def _through(self, backend: Backend, pair: Matrix) -> Matrix:
        """Return the factors of the update, given those of X."""
        if self.separation is None:
            return pair
        dtype = backend.dtype_name(pair.left)
        # Like the output of a map: computed in single precision at least, and rounded once.
        wide = dtype if dtype == "float64" else "float32"
        halves = []
        for side, half in enumerate(pair):
            half = backend.astype(half, wide)
            several = [mapped(backend, maps[side], half) for maps in self.separation.sides]
            halves.append(backend.astype(backend.concat(several, axis=1), dtype))
        return Matrix(*halves)

    def _one(self, backend: Backend, arrays: Mapping[str, Array]) -> Matrix:
        """Compute the scaled X as one dense matrix."""
        assert self.separation is not None
        start, shape, _ = self.separation
        x = self.network.slice(backend, arrays, start, start + math.prod(shape))
        return Matrix(backend.reshape(x, shape), None)

    def _two(self, backend: Backend, arrays: Mapping[str, Array]) -> Matrix:
        if self.halves is not None:
            left, right = self.halves(backend, arrays)
        else:
            left, right = self.network.unfolded(backend, arrays, self.cuts[0])
        return Matrix(left, backend.matrix_transpose(right))


def _matrix(backend: Backend, split: Format, arrays: Mapping[str, Array], cut: Cut, size: Size) -> Matrix:
    """Compute a part of the unfolding of one split, as two factors if these are smaller."""
    if size.width is not None:
        left, right = split.unfolded(backend, arrays, cut)
        return Matrix(left, backend.matrix_transpose(right))
    whole = backend.reshape(split.tensor(backend, arrays, [(0, d) for d in split.sizes]), (-1, size.cols))
    return Matrix(whole[cut.rows[0] : cut.rows[1]], None)


def factoring(plan: UpdatePlan, i: int, single: bool = False) -> Factoring | None:
    """Return the factorization of the update of weight ``i``; None if its rows and columns are not separable.

    Parameters
    ----------
    plan : UpdatePlan
    i : int
        Index of the weight.
    single : bool
        Whether it must be a single matrix, although the update may be a sum of Kronecker products.

    Returns
    -------
    Factoring or None

    Examples
    --------
    >>> import tnadapt as tna
    >>> factoring(UpdatePlan(tna.presets.lora(4), [(768, 512)]), 0).sizes
    (Size(rows=768, cols=512, width=4),)
    >>> factoring(UpdatePlan(tna.presets.lokr(4), [(768, 768)]), 0).sizes
    (Size(rows=24, cols=24, width=None), Size(rows=32, cols=32, width=4))
    >>> factoring(UpdatePlan(tna.presets.gralora(4, blocks=2), [(768, 768)]), 0).sizes
    (Size(rows=768, cols=768, width=8),)
    >>> factoring(UpdatePlan(tna.presets.superlora(4), [(768, 768)] * 24), 0) is None
    True
    """
    pieces = plan.layout.of_weight(i)
    if len(pieces) != 1:
        return None
    (piece,) = pieces
    group = plan.groups[piece.group]
    separation = separation_of(group, piece, plan.shapes[i][1])
    if separation is None:
        return None
    shared = len(group.pieces) > 1
    start, shape, sides = separation
    factored = _of_modes(group, start, shape, shared)
    if factored is None or (single and len(factored.sizes) > 1):
        factored = _of_cut(group, start, shape, shared)
    return _behind(group, factored, separation, plan.shapes[i], shared) if sides else factored


def _behind(
    group: Group, factoring: Factoring | None, separation: Separation, whole: tuple[int, int], shared: bool
) -> Factoring | None:
    """Return the factorization of ``sum_t A_t X B_tᵀ``, given that of X."""
    number, shape = len(separation.sides), separation.shape
    if factoring is not None and len(factoring.sizes) == 1:
        (size,) = factoring.sizes
        if size.width is not None and size.width < min(shape) and size.width * number < min(whole):
            sizes = (Size(*whole, size.width * number),)
            return dataclasses.replace(factoring, sizes=sizes, separation=separation)
    if number > 1 or shape == whole:
        return None
    if factoring is not None and len(factoring.sizes) > 1:
        return dataclasses.replace(factoring, separation=separation)
    return Factoring(group, (), 1, (Size(*shape, None),), shared, separation=separation)


def _of_modes(group: Group, start: int, shape: tuple[int, int], shared: bool) -> Factoring | None:
    """Factor a weight whose columns are the last modes of the network, by the formats' own unfoldings."""
    network, (rows, cols) = group.network, shape
    cut = _cut(network.sizes, cols)
    if cut is None or start % cols:
        return None
    first = start // cols
    if is_kronecker(network):
        return _of_kronecker(group, cut, (first, first + rows), shared)
    width = network.inner(cut)
    if width is None:
        return None
    width *= 2 if group.subtracts else 1
    part = Cut(cut, (first, first + rows), (0, cols), start)
    return Factoring(group, (part,), 1, (Size(rows, cols, width),), shared)


def _of_cut(group: Group, start: int, shape: tuple[int, int], shared: bool) -> Factoring | None:
    """Factor a weight at the cheapest cut of the network between its rows and its columns, if its rank is limited."""
    rows, cols = shape
    place = place_of(group.network.sizes, start, rows * cols, cols)
    width = None if place is None else width_at(group.network, place)
    if place is None or width is None:
        return None
    width *= 2 if group.subtracts else 1
    if width >= min(rows, cols):
        return None
    return Factoring(group, (), 1, (Size(rows, cols, width),), shared, NetworkHalves(group.network, place))


def _of_kronecker(group: Group, cut: int, rows: tuple[int, int], shared: bool) -> Factoring | None:
    """Factor a weight that is a Kronecker product of unfoldings of the splits, or return None if it is not one."""
    # It is one if at most one row mode and at most one column mode has more than one index, and the range of each
    # mode is a box of the splits' digits.
    network = group.network
    row_boxes = boxes(network.sizes[:cut], *rows)
    if len(row_boxes) > 1 or _extent(row_boxes[0].ranges) != rows[1] - rows[0]:
        return None
    ranges = [*row_boxes[0].ranges, *((0, size) for size in network.sizes[cut:])]
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
        box = [digit[k] for digit in digits]
        run = _run(split.sizes[:cut], box[:cut])
        if run is None or any(bounds != (0, size) for bounds, size in zip(box[cut:], split.sizes[cut:], strict=True)):
            return None
        r, c, width = run[1] - run[0], math.prod(split.sizes[cut:]), split.inner(cut)
        cuts.append(Cut(cut, run, (0, c), run[0] * c))
        sizes.append(Size(r, c, width if width is not None and width * (r + c) < r * c else None))
    # A difference of two products is as many products as there are matrices.
    terms = network.terms * (len(sizes) if group.subtracts else 1)
    return Factoring(group, tuple(cuts), terms, tuple(sizes), shared)


def _run(sizes: Sequence[int], ranges: Ranges) -> tuple[int, int] | None:
    """Return start and stop in ``vec`` of a box, or None if its elements are not contiguous there."""
    start = 0
    for size, (lo, _) in zip(sizes, ranges, strict=True):
        start = start * size + lo
    length = _extent(ranges)
    covering = boxes(sizes, start, start + length)
    return (start, start + length) if [list(box.ranges) for box in covering] == [list(ranges)] else None


def _extent(ranges: Ranges) -> int:
    return math.prod(stop - start for start, stop in ranges)


def _cut(sizes: Sequence[int], cols: int) -> int | None:
    """Return the number of leading modes that are rows if the remaining ones make up ``cols`` columns, or None."""
    return next((m for m in range(len(sizes) - 1, 0, -1) if math.prod(sizes[m:]) == cols), None)


# -- Rows of a matrix that is a Kronecker product ----------------------------------------------------------------------

# Row i of ``A ⊗ B ⊗ C`` is the Kronecker product of a row of each, those of the digits of i. So a run of rows needs no
# cutting into boxes of digits, and its gradient is two sums. The products are those of
# :func:`tnadapt.algebra.products.kronecker_tensor`, in the same order, with the same bits.


class KroneckerRows(FixedArrays):
    """The rows of a network of order 2 that contain a slice; see :meth:`of`.

    Parameters
    ----------
    network : Network
    start, stop : int
        The slice of its ``vec``.

    Attributes
    ----------
    cols : int
        Length of a row. The outer products may be longer: the rest is cut off.
    first : int
        Position of the first element of the slice in the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt import Config
    >>> from tnadapt.backends import load_backend
    >>> network = Network(Config(format="dense", fold=(4, 6), splits=2, split_size=2), 24)
    >>> arrays = {"split0.dense": np.ones((2, 2)), "split1.dense": np.arange(6.0).reshape(2, 3)}
    >>> left, right = KroneckerRows.of(network, 6, 18)(load_backend("numpy"), arrays)
    >>> (left[:, :, None] * right[:, None, :]).reshape(2, 6)
    array([[3., 4., 5., 3., 4., 5.],
           [0., 1., 2., 0., 1., 2.]])
    """

    def __init__(self, network: Network, start: int, stop: int) -> None:
        super().__init__()
        self.network, self.cols = network, network.sizes[1]
        rows = start // self.cols, -(-stop // self.cols)
        self.first = start - rows[0] * self.cols
        self._digits = np.unravel_index(np.arange(*rows), [split.sizes[0] for split in network.splits])

    @classmethod
    def of(cls, network: Network, start: int, stop: int) -> KroneckerRows | None:
        """Return the rows of a slice; None if the network is not one Kronecker product of matrices."""
        several = is_kronecker(network) and network.terms == 1 and len(network.sizes) == 2
        return cls(network, start, stop) if several else None

    def make(self, key: Hashable) -> np.ndarray:
        """Return the digits of the rows in the split with that number."""
        assert isinstance(key, int)
        return np.asarray(self._digits[key], np.int64)

    def __call__(self, backend: Backend, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Compute the two vectors of each row, without the scale, shapes (rows, p) and (rows, q); differentiable."""
        (prefixes,) = self.network.prefixes
        rows = []
        for k, (split, factors) in enumerate(
            zip(self.network.splits, self.network.of_term(prefixes, arrays), strict=True)
        ):
            matrix = split.tensor(backend, factors, [(0, size) for size in split.sizes])
            rows.append(backend.take(matrix, self.on(backend, k, matrix), axis=0))
        *others, right = rows
        while len(others) > 1 and right.shape[-1] < LONG:
            right = row_wise_khatri_rao(backend, [others.pop(), right])
        return _row_wise(backend, others), right


def _row_wise(backend: Backend, rows: Sequence[Array]) -> Array:
    """Multiply as many vectors a row, in the order of ``kronecker_tensor``."""
    if len(rows) < 3:
        return row_wise_khatri_rao(backend, rows)
    *others, right = rows
    while others and right.shape[-1] < LONG:
        right = row_wise_khatri_rao(backend, [others.pop(), right])
    return row_wise_khatri_rao(backend, [_row_wise(backend, others), right]) if others else right

"""Base class of formats: arrays and an einsum give a tensor, its boxes, adjoint, ranks, factors and degrees of freedom.

A format must define two things: its arrays (:meth:`Format.array_shapes`), and the einsum that computes the tensor from
them (:attr:`Format.formula`). The first sections derive everything else from these; a class overrides a method where it
has a faster algorithm or a sharper formula.
"""

from __future__ import annotations

import functools
import itertools
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from tnadapt.algebra.folding import Cut
from tnadapt.argument_checks import integer
from tnadapt.backends import Array, Backend, FixedArrays, load_backend
from tnadapt.errors import ConfigError, safe_repr

# -- Contraction of a small tensor network given as an einsum string ---------------------------------------------------


# This is the reference implementation for every format, and the default for formats that do not override it. Arrays are
# contracted pairwise from left to right, each pair as one batched matrix product. An index may occur on any number of
# arrays; it stays open if the output names it.


def letters(modes: int, bonds: int) -> tuple[str, str]:
    """Return distinct index letters for the modes and for the bonds of a formula.

    Greek letters continue after the 52 ASCII letters.

    Examples
    --------
    >>> letters(3, 2)
    ('abc', 'de')
    """
    every = string.ascii_letters + "".join(map(chr, range(0x3B1, 0x3B1 + max(0, modes + bonds - 52))))
    return every[:modes], every[modes : modes + bonds]


class Formula(NamedTuple):
    """A parsed einsum string.

    Attributes
    ----------
    inputs : tuple of str
        The indices of each array, in order.
    output : str
        The open indices, one per mode.

    Examples
    --------
    >>> Formula.parsed("ar,br->ab", 2, 2)
    Formula(inputs=('ar', 'br'), output='ab')
    """

    inputs: tuple[str, ...]
    output: str

    @classmethod
    def parsed(cls, text: str, arrays: int, order: int) -> Formula:
        """Parse a string and check it against the number of arrays and of modes.

        Raises
        ------
        ConfigError
            If it is not an einsum string with explicit output for that many arrays and modes.
        """
        if not isinstance(text, str):
            raise ConfigError(
                f"the formula of a format must be a string; got {safe_repr(text)}. If it is a method, write @property "
                "above its definition"
            )
        left, arrow, output = text.replace(" ", "").partition("->")
        inputs = tuple(left.split(","))
        known = set(left)
        if not arrow or len(inputs) != arrays or len(output) != order or len(set(output)) != order:
            raise ConfigError(
                f"formula {text!r} must be an einsum string for {arrays} arrays and {order} modes, such as 'ar,br->ab'"
            )
        if any(len(set(indices)) != len(indices) for indices in inputs) or not set(output) <= known:
            raise ConfigError(f"formula {text!r} repeats an index on one array, or its output names an unknown index")
        return cls(inputs, output)

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Return the size of every index.

        Raises
        ------
        ConfigError
            If the shapes do not fit the indices.
        """
        sizes: dict[str, int] = {}
        for indices, shape in zip(self.inputs, shapes, strict=True):
            fits = len(indices) == len(shape) and all(
                sizes.setdefault(i, d) == d for i, d in zip(indices, shape, strict=True)
            )
            if not fits:
                raise ConfigError(
                    f"an array of shape {tuple(shape)} does not fit its indices {indices!r} in the formula"
                )
        return sizes


class _Pair(NamedTuple):
    """The plan of one pairwise contraction.

    ``left_sums`` and ``right_sums`` are axes to sum first. The orders then sort the remaining axes: those of the left
    array into batch, rows, inner, and those of the right array into batch, inner, columns. The last three fields count
    the axes of each kind.
    """

    left_sums: tuple[int, ...]
    right_sums: tuple[int, ...]
    left_order: tuple[int, ...]
    right_order: tuple[int, ...]
    batch: int
    rows: int
    inner: int


class Contraction:
    """An einsum, planned once and run on any backend.

    All decisions about indices are made in the constructor. A call runs only sums, permutations, reshapes and matrix
    products, which a compiler can trace.

    Parameters
    ----------
    inputs : sequence of str
        The indices of each array, without repeats on one array.
    output : str
        Indices that are not summed, in order; each occurs on at least one array.

    Notes
    -----
    Pairs are contracted from left to right; no optimal order is searched.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import load_backend
    >>> a, b = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    >>> Contraction(["ij", "jk"], "ki")(load_backend("numpy"), [a, b])
    array([[ 3., 12.],
           [ 3., 12.]])
    """

    def __init__(self, inputs: Sequence[str], output: str) -> None:
        self.pairs: list[_Pair] = []
        now = inputs[0]
        for place in range(1, len(inputs)):
            later = set(output).union(*inputs[place + 1 :])
            now = self._planned(now, inputs[place], later)
        self.sums, now = _summed(now, set(output))
        order = tuple(now.index(index) for index in output)
        self.order = order if order != tuple(range(len(order))) else ()

    def _planned(self, left: str, right: str, later: set[str]) -> str:
        left_sums, left = _summed(left, later | set(right))
        right_sums, right = _summed(right, later | set(left))
        both = [index for index in left if index in right]
        batch = [index for index in both if index in later]
        inner = [index for index in both if index not in later]
        rows = [index for index in left if index not in both]
        cols = [index for index in right if index not in both]
        left_order = tuple(left.index(index) for index in [*batch, *rows, *inner])
        right_order = tuple(right.index(index) for index in [*batch, *inner, *cols])
        self.pairs.append(_Pair(left_sums, right_sums, left_order, right_order, len(batch), len(rows), len(inner)))
        return "".join([*batch, *rows, *cols])

    def __call__(self, backend: Backend, arrays: Sequence[Array]) -> Array:
        """Compute the contracted array."""
        now = arrays[0]
        for pair, right in zip(self.pairs, arrays[1:], strict=True):
            now = _contracted(backend, pair, now, right)
        now = _without(backend, now, self.sums)
        return backend.permute_dims(now, self.order) if self.order else now


def _summed(indices: str, kept: set[str]) -> tuple[tuple[int, ...], str]:
    """Return the axes of the indices that are not kept, last axis first, and the remaining indices."""
    axes = tuple(axis for axis in reversed(range(len(indices))) if indices[axis] not in kept)
    return axes, "".join(index for index in indices if index in kept)


def _without(backend: Backend, array: Array, axes: tuple[int, ...]) -> Array:
    for axis in axes:
        array = backend.sum(array, axis=axis)
    return array


def _contracted(backend: Backend, pair: _Pair, left: Array, right: Array) -> Array:
    left = _turned(backend, _without(backend, left, pair.left_sums), pair.left_order)
    right = _turned(backend, _without(backend, right, pair.right_sums), pair.right_order)
    end = pair.batch + pair.rows
    batch, rows, inner = left.shape[: pair.batch], left.shape[pair.batch : end], left.shape[end:]
    cols = right.shape[pair.batch + pair.inner :]
    sizes = math.prod(batch), math.prod(rows), math.prod(inner), math.prod(cols)
    product = backend.matmul(
        backend.reshape(left, (sizes[0], sizes[1], sizes[2])), backend.reshape(right, (sizes[0], sizes[2], sizes[3]))
    )
    return backend.reshape(product, (*batch, *rows, *cols))


def _turned(backend: Backend, array: Array, order: tuple[int, ...]) -> Array:
    return array if order == tuple(range(len(order))) else backend.permute_dims(array, order)


# -- The cheapest cut of a network between row indices and column indices ----------------------------------------------


# The network is then a product of two matrices, one for each side of the cut, and the cut is their inner dimension: an
# upper bound on the rank that holds for any arrays, trained or not.


# Up to this many arrays, all partitions are searched.
_ALL = 12


def minimal_cut(
    formula: Formula, size: Mapping[str, int], legs: Sequence[tuple[int, int]]
) -> tuple[int, tuple[bool, ...]]:
    """Return the least product of bonds and legs over the cuts, and for each array whether it is on the rows' side.

    Each mode, or a range of it, is a pair of a row index and a column index, of the lengths in ``legs``. A mode that
    is all rows has one column; a mode at a fixed index is ``(1, 1)``.

    Up to 12 arrays, all partitions are searched. With more, arrays are moved to the other side one at a time as long as
    this makes the product smaller.

    Examples
    --------
    A CP tensor whose second mode is one row index and two column indices of length 2:

    >>> minimal_cut(Formula(("ar", "br", "cr"), "abc"), {"a": 5, "b": 6, "c": 7, "r": 2}, [(5, 1), (3, 2), (1, 7)])
    (4, (True, True, False))
    """
    lengths = dict(zip(formula.output, legs, strict=True))
    holders = {index: [k for k, indices in enumerate(formula.inputs) if index in indices] for index in size}
    count = len(formula.inputs)

    def cost(side: Sequence[bool]) -> int:
        total = 1
        for index, length in size.items():
            sides = {side[k] for k in holders[index]}
            rows, cols = lengths.get(index, (1, 1))
            if len(sides) == 2:
                total *= rows * cols if index in lengths else length
            else:
                # A leg on the other side than its array is cut.
                total *= cols if True in sides else rows
        return total

    if count <= _ALL:
        return min((cost(side), side) for side in itertools.product((False, True), repeat=count))
    # True is the side of the rows. Arrays without a leg are tried on both sides.
    held = [[lengths[index] for index in indices if index in lengths] for indices in formula.inputs]
    starts = [any(rows > 1 for rows, _ in ends) for ends in held], [all(cols == 1 for _, cols in ends) for ends in held]
    return min(_descended(cost, list(side)) for side in starts)


def _descended(cost: Callable[[Sequence[bool]], int], side: list[bool]) -> tuple[int, tuple[bool, ...]]:
    """Move one array at a time to the other side as long as the cost falls; return the cost and the sides."""
    best, improved = cost(side), True
    while improved:
        improved = False
        for k in range(len(side)):
            side[k] = not side[k]
            now = cost(side)
            if now < best:
                best, improved = now, True
            else:
                side[k] = not side[k]
    return best, tuple(side)


# -- Indices of several digits: the range of the index that contains a box of its digits -------------------------------


class Cover(NamedTuple):
    """The contiguous range of a mode that contains a box of its digits.

    Attributes
    ----------
    bounds : (int, int)
        Start and stop.
    lengths : list of int
        How many indices of each digit the range covers.
    crop : list of slice
        Which of them are in the box.
    """

    bounds: tuple[int, int]
    lengths: list[int]
    crop: list[slice]


def covered(sizes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Cover:
    """Return the range of an index that contains a box of its digits, which have these sizes.

    Examples
    --------
    >>> covered((4, 10), [(2, 3), (5, 7)])
    Cover(bounds=(25, 27), lengths=[1, 2], crop=[slice(None, None, None), slice(None, None, None)])
    >>> covered((4, 10), [(2, 4), (5, 7)])
    Cover(bounds=(20, 40), lengths=[2, 10], crop=[slice(None, None, None), slice(5, 7, None)])
    """
    start, open_ = 0, False
    lengths: list[int] = []  # a compiler cannot trace list[int]()
    crop: list[slice] = []
    for size, (lo, hi) in zip(sizes, ranges, strict=True):
        if open_:
            # Of the digits after the first one with a range, all values are covered, and the box is cropped from them.
            start *= size
            lengths.append(size)
            crop.append(slice(lo, hi))
            continue
        start = start * size + lo
        open_ = hi - lo > 1
        lengths.append(hi - lo)
        crop.append(slice(None))
    return Cover((start, start + math.prod(lengths)), lengths, crop)


# -- A box of a network as a product of two matrices, by the cheapest cut ----------------------------------------------


# This works for any network and any division of its indices into rows and columns: an index may be several digits,
# some of the rows and some of the columns, as in the blocks of a matrix. Formats with a faster algorithm for whole
# modes define ``inner`` and ``unfolded``.
#
# A row index on an array of the other side is cut, too: it becomes an index of the inner dimension, and the rows' side
# has an identity matrix there, so that its half is sparse.


#: For each mode of a tensor, how many rows and how many columns its range stands for, rows slow.
Legs = tuple[tuple[int, int], ...]


class _Identities(FixedArrays):
    def make(self, key: object) -> np.ndarray:
        assert isinstance(key, int)
        return np.eye(key)


_IDENTITIES = _Identities()


class Halves:
    """The two halves of a network at a minimal cut, planned once.

    Parameters
    ----------
    formula : Formula
        The network.
    size : mapping of str to int
        Length of every index.
    axes : sequence of sequence of int
        For each index of the output, the modes of the tensor that are its digits, the first one slow.
    sizes : sequence of int
        Of the tensor.
    legs : Legs

    Attributes
    ----------
    width : int
        The inner dimension.
    """

    def __init__(
        self, formula: Formula, size: Mapping[str, int], axes: Sequence[Sequence[int]], sizes: Sequence[int], legs: Legs
    ) -> None:
        self.axes, self.sizes, self.legs = axes, sizes, legs
        fresh = map(chr, range(0xE000, 0xF8FF))
        # Each digit of more than one index is a letter of its own.
        length: dict[str, int] = {}
        rows, cols = ({mode: next(fresh) for mode, leg in enumerate(legs) if leg[side] > 1} for side in (0, 1))
        for side, letters in enumerate((rows, cols)):
            length |= {letter: legs[mode][side] for mode, letter in letters.items()}
        digits = {
            index: "".join(letters[mode] for mode in modes for letters in (rows, cols) if mode in letters)
            for index, modes in zip(formula.output, axes, strict=True)
        }
        self._legs = [
            [(axis, axes[formula.output.index(index)]) for axis, index in enumerate(indices) if index in digits]
            for indices in formula.inputs
        ]
        inputs = ["".join(digits.get(index, index) for index in indices) for indices in formula.inputs]
        self._shapes = [[length.get(index) or size[index] for index in indices] for indices in inputs]
        bonds = {index: size[index] for index in dict.fromkeys("".join(formula.inputs)) if index not in formula.output}
        length |= bonds
        outer = "".join([*rows.values(), *cols.values()])
        open_legs = [(length[letter], 1) if letter in rows.values() else (1, length[letter]) for letter in outer]
        self.width, self.sides = minimal_cut(Formula(tuple(inputs), outer), length, open_legs)
        held = [
            "".join(indices for indices, mine in zip(inputs, self.sides, strict=True) if mine is side)
            for side in (True, False)
        ]
        shared = [bond for bond in bonds if bond in held[0] and bond in held[1]]
        crossed = [[c for c in mine.values() if c in other] for mine, other in ((rows, held[1]), (cols, held[0]))]
        renamed = {letter: next(fresh) for letter in "".join(map("".join, crossed))}
        inner = "".join([*shared, *renamed.values()])
        self._identities = [[length[letter] for letter in crossed[side]] for side in (0, 1)]
        self._halves: list[Contraction | None] = []
        for side, letters, foreign in ((0, rows, crossed[1]), (1, cols, crossed[0])):
            operands = [
                "".join(renamed[index] if index in foreign else index for index in each)
                for each, mine in zip(inputs, self.sides, strict=True)
                if mine is (side == 0)
            ]
            operands += [letter + renamed[letter] for letter in crossed[side]]
            # One side has no arrays if the box is a single row or a single column.
            self._halves.append(Contraction(operands, "".join(letters.values()) + inner) if operands else None)

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(
        cls, formula: Formula, size: tuple[tuple[str, int], ...], axes: tuple[tuple[int, ...], ...],
        sizes: tuple[int, ...], legs: Legs,
    ) -> Halves:  # fmt: skip
        """Return the halves; the same object for all weights with the same place in a tensor."""
        return cls(formula, dict(size), axes, sizes, legs)

    def __call__(self, backend: Backend, arrays: Sequence[Array], ranges: Ranges) -> tuple[Array, Array]:
        """Compute the halves of a box from the network's arrays, in order.

        Returns
        -------
        (array, array)
            One axis per mode, of its rows in the first and its columns in the second, and the inner one.
        """
        parts = [
            backend.reshape(self._restricted(backend, array, legs, ranges), tuple(shape))
            for array, legs, shape in zip(arrays, self._legs, self._shapes, strict=True)
        ]
        dtype = backend.dtype_name(arrays[0])
        halves = []
        for side, half in enumerate(self._halves):
            mine = [part for part, on_rows in zip(parts, self.sides, strict=True) if on_rows is (side == 0)]
            mine += [_IDENTITIES.on(backend, size, arrays[0], dtype) for size in self._identities[side]]
            result = _IDENTITIES.on(backend, 1, arrays[0], dtype) if half is None else half(backend, mine)
            halves.append(backend.reshape(result, (*(leg[side] for leg in self.legs), self.width)))
        return halves[0], halves[1]

    def _restricted(
        self, backend: Backend, array: Array, legs: Sequence[tuple[int, Sequence[int]]], ranges: Ranges
    ) -> Array:
        """Return the part of an array that belongs to a box."""
        for axis, modes in reversed(legs):
            cover = covered([self.sizes[mode] for mode in modes], [ranges[mode] for mode in modes])
            array = rows_of(array, cover.bounds, axis)
            if any(part != slice(None) for part in cover.crop):
                lengths = [*array.shape[:axis], *cover.lengths, *array.shape[axis + 1 :]]
                array = backend.reshape(array, lengths)[(*(slice(None),) * axis, *cover.crop, ...)]
                array = backend.reshape(array, (*lengths[:axis], -1, *lengths[axis + len(modes) :]))
        return array


# -- Degrees of freedom: the rank of the Jacobian at random arrays -----------------------------------------------------


# The Jacobian is formed up to this number of elements.
_FORMED = 1 << 20
# Singular values below this fraction of the largest one are rounding errors.
_ROUNDING = 1e-10


_Network = Any  # a format, or an object with sizes, shapes, num_parameters and tensor


def jacobian_rank(network: _Network, times: int) -> int | None:
    """Return the rank of the Jacobian of a sum of ``times`` tensors of a network; None if it is too large to form.

    The rank is maximal at almost every point, so at a random point it is the dimension of the set of all such sums with
    probability one.
    """
    elements = math.prod(network.sizes)
    if times * network.num_parameters * elements > _FORMED:
        return None
    backend, rng = load_backend("numpy"), np.random.default_rng(0)
    whole = [(0, size) for size in network.sizes]
    rows = []
    for _ in range(times):
        arrays = {name: rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape) for name, shape in
                  network.shapes.items()}  # fmt: skip
        for name, shape in network.shapes.items():
            for place in np.ndindex(*shape):
                unit = np.zeros(shape)
                unit[place] = 1.0
                rows.append(np.ravel(network.tensor(backend, {**arrays, name: unit}, whole)))
    values = np.linalg.svd(np.array(rows), compute_uv=False)
    return int(np.sum(values > _ROUNDING * values[0]))


# -- Degrees of freedom of CP, Tucker and tensor trains, by formula ----------------------------------------------------


# The formulas are upper bounds. They are exact except for the few known defective shapes (CP of rank 3 on
# 2 × 2 × 2 × 2, of rank 4 on 3 × 3 × 3, and their series).


def of_cp(sizes: Sequence[int], rank: int) -> int:
    ranks = multilinear(sizes, [rank] * len(sizes))
    bases = sum(r * (d - r) for r, d in zip(ranks, sizes, strict=True))
    # Restricted to the spans of its factors, the tensor is a smaller CP tensor, which may fill these spaces.
    inner = min(math.prod(ranks), rank * (sum(ranks) - len(ranks) + 1))
    return min(math.prod(sizes), bases + inner, rank * (sum(sizes) - len(sizes) + 1))


def of_tucker(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    ranks = multilinear(sizes, ranks)
    return math.prod(ranks) + sum(r * (d - r) for r, d in zip(ranks, sizes, strict=True))


def multilinear(sizes: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Return the ranks of the unfoldings: each at most its mode's size and the product of the other ranks."""
    bounded = [min(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    largest = max(range(len(bounded)), key=lambda mode: bounded[mode])
    rest = math.prod(bounded[:largest] + bounded[largest + 1 :])
    # Only the largest rank can exceed the product of the others, since every other product contains the largest one.
    bounded[largest] = min(bounded[largest], rest)
    return bounded


def of_train(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    bonds = [1, *ranks, 1]
    for mode in range(1, len(sizes)):
        bonds[mode] = min(bonds[mode], bonds[mode - 1] * sizes[mode - 1])
    for mode in range(len(sizes) - 1, 0, -1):
        bonds[mode] = min(bonds[mode], bonds[mode + 1] * sizes[mode])
    cores = sum(left * size * right for left, size, right in zip(bonds, sizes, bonds[1:], strict=False))
    return cores - sum(bond * bond for bond in bonds[1:-1])


# -- The base class of formats -----------------------------------------------------------------------------------------


Rank = int | tuple[int | None, ...]
Ranges = Sequence[tuple[int, int]]

# A larger rank is a typo or hostile.
MAX_RANK = 1 << 40
# Number of unfoldings considered for a lower bound, for each number of row modes.
_UNFOLDINGS = 16


class Format:
    """A parametrization of tensors of given sizes by a few arrays.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M``.
    rank : int or tuple
        As in :class:`~tnadapt.Config`.

    Attributes
    ----------
    sizes : tuple of int
    rank_given : int or tuple
    shapes : dict of str to tuple of int
        The arrays, in order.
    title : str
        Display name of the format; the class's name by default.
    ones : frozenset of str
        Arrays that are initialized to one.
    unfolds : bool
        Whether :meth:`inner` returns a number for every cut of a tensor of integer rank. False for a format that does
        not define ``inner``.

    Notes
    -----
    A subclass defines :meth:`array_shapes` and :attr:`formula`. The tensor must be linear in each array, as any einsum
    is. The default methods are correct for every network; a subclass overrides a method where it has a faster algorithm
    or a sharper formula.

    Examples
    --------
    A product of three matrices, in full:

    >>> from tnadapt.algebra.formats import Format
    >>> class Three(Format):
    ...     formula = "ar,rs,sb->ab"
    ...     def array_shapes(self, rank):
    ...         return {"left": (self.sizes[0], rank), "middle": (rank, rank), "right": (rank, self.sizes[1])}
    >>> Three((5, 7), 2).num_parameters, Three((5, 7), 2).unfolding_rank([0])
    (28, 2)
    """

    title: str = ""
    ones: frozenset[str] = frozenset()
    unfolds: bool = False

    def __init__(self, sizes: Sequence[int], rank: Rank) -> None:
        self.sizes = tuple(sizes)
        self.rank_given = rank
        self.shapes: dict[str, tuple[int, ...]] = self.array_shapes(rank)
        if type(self).tensor is Format.tensor or type(self).adjoint is Format.adjoint:
            # Planned here, so that a compiler that traces a call does not have to trace the planning.
            self._contractions, self._legs = self._planned(), self._planned_legs()

    # -- Definition of a format ----------------------------------------------------------------

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        """Return the rank of a config, or raise an error that says which ranks the format takes. Default: one integer.

        Parameters
        ----------
        name : str
            Name of the format, for the message.
        rank : object
            As given by the user.
        order : int
            M.
        """
        if isinstance(rank, (tuple, list)):
            raise ConfigError(f"format={name!r} has one rank; got rank={safe_repr(rank)}: give an integer")
        return integer("rank", rank, 1, MAX_RANK, ConfigError, "or a tuple with one rank per mode")

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of each array for these sizes, in order; see also :attr:`zero`."""
        raise ConfigError(f"{type(self).__name__} does not define its arrays: define array_shapes(rank)")

    @property
    def formula(self) -> str:
        """Einsum string of the arrays, in the order of ``shapes``, that gives the tensor: one open index per mode."""
        raise ConfigError(
            f"{type(self).__name__} does not define its tensor: define formula, an einsum string such as 'ar,br->ab'"
        )

    @functools.cached_property
    def _parsed(self) -> tuple[Formula, dict[str, int]]:
        formula = Formula.parsed(self.formula, len(self.shapes), len(self.sizes))
        sizes = formula.sizes(list(self.shapes.values()))
        output = tuple(sizes[index] for index in formula.output)
        if output != self.sizes:
            raise ConfigError(
                f"the formula of {type(self).__name__} gives a tensor of sizes {output}; expected {self.sizes}"
            )
        return formula, sizes

    @property
    def zero(self) -> str:
        """Name of the array that starts at zero in a linear adapter; by default the first one with the leading mode."""
        formula, _ = self._parsed
        pairs = zip(self.shapes, formula.inputs, strict=True)
        return next(name for name, indices in pairs if formula.output[0] in indices)

    def mode_of(self, name: str) -> int | None:
        """Return the mode whose factor an array is: a matrix of its size and a bond. None for any other array."""
        formula, _ = self._parsed
        indices = formula.inputs[list(self.shapes).index(name)]
        if len(indices) != 2 or indices[0] not in formula.output or indices[1] in formula.output:
            return None
        return formula.output.index(indices[0])

    @property
    def num_parameters(self) -> int:
        """Total number of elements of all arrays."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    # -- The tensor ----------------------------------------------------------------------------

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        """Compute the tensor on a box. Default: the einsum of the formula, restricted to the rows of the box.

        Parameters
        ----------
        backend : Backend
            Backend of the arrays.
        arrays : mapping of str to array
            Arrays with the shapes in ``shapes``.
        ranges : sequence of (int, int)
            Start and stop in every mode.

        Returns
        -------
        array
            With the sizes of the box.
        """
        whole, _ = self._contractions
        return whole(backend, list(self._restricted(arrays, ranges).values()))

    def _restricted(self, arrays: Mapping[str, Array], ranges: Ranges) -> dict[str, Array]:
        """Return the rows of the arrays that belong to a box."""
        restricted = {}
        for name, axes in zip(self.shapes, self._legs, strict=True):
            restricted[name] = arrays[name]
            for axis, mode in axes:
                restricted[name] = rows_of(restricted[name], ranges[mode], axis)
        return restricted

    def _planned_legs(self) -> list[list[tuple[int, int]]]:
        """Return the axes of each array that belong to modes, as pairs ``(axis, mode)``."""
        formula, _ = self._parsed
        modes = {index: mode for mode, index in enumerate(formula.output)}
        return [[(axis, modes[i]) for axis, i in enumerate(indices) if i in modes] for indices in formula.inputs]

    def _planned(self) -> tuple[Contraction, list[tuple[Contraction, list[int], bool]]]:
        """Plan the contraction that gives the tensor, and the adjoint of each array."""
        formula, _ = self._parsed
        # A contraction, the shape of its result, and whether the array has an index that occurs nowhere else.
        adjoints = []
        for k, (indices, shape) in enumerate(zip(formula.inputs, self.shapes.values(), strict=True)):
            inputs = [formula.output, *formula.inputs[:k], *formula.inputs[k + 1 :]]
            reached = "".join(i for i in indices if any(i in each for each in inputs))
            # An index on this array alone is summed over, so the gradient is constant along that axis: length 1 here,
            # broadcast in :meth:`adjoint`.
            kept = [d if i in reached else 1 for i, d in zip(indices, shape, strict=True)]
            adjoints.append((Contraction(inputs, reached), kept, len(reached) < len(indices)))
        return Contraction(formula.inputs, formula.output), adjoints

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        """Compute the gradient of ``<tensor, T>`` with respect to each array, where T is the tensor of the arrays.

        T is linear in each array, so the gradient is the adjoint of that linear map with the other arrays fixed.
        Default: the einsum of the tensor with the other arrays.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        tensor : array, shape (d_1, …, d_M)

        Returns
        -------
        dict of str to array
            With the shapes in ``shapes``.
        """
        _, adjoints = self._contractions
        names, gradients = list(self.shapes), dict[str, Array]()
        for k, (name, (contraction, kept, shared)) in enumerate(zip(names, adjoints, strict=True)):
            others = [arrays[other] for other in names[:k] + names[k + 1 :]]
            gradient = backend.reshape(contraction(backend, [tensor, *others]), kept)
            gradients[name] = gradient + arrays[name] * 0.0 if shared else gradient
        return gradients

    def stored_halves(self, cut: Cut) -> tuple[str, str] | None:
        """Return the names of two arrays that are L and Rᵀ of a part of the unfolding; None if they are computed."""
        return None

    def inner(self, modes: int) -> int | None:
        """Return the number of columns of L in the unfolding ``L R`` with the first ``modes`` modes as rows, or None.

        ``1 <= modes < M``. None if there is no such product; the tensor is then computed box by box, which takes a few
        times as long for thin slices.
        """
        return None

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        """Compute L and R of a part of an unfolding for which :meth:`inner` returns a number.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        cut : Cut
            Number of modes that are rows, and the range of rows and columns.

        Returns
        -------
        (array, array)
            Shapes (rows, inner) and (inner, columns); their product is that part of the unfolding.
        """
        raise ConfigError(f"{type(self).__name__} defines inner() but not unfolded(): define both, or neither")

    def factors(self, backend: Backend, arrays: Mapping[str, Array]) -> tuple[Array, Array] | None:
        """Return L and R whose product is the tensor of two modes; None if no bond limits its rank.

        Default: :meth:`unfolded`, or else the halves of the network at a minimal cut if that is below both sides.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array

        Returns
        -------
        (array, array) or None
            Shapes (d_1, inner) and (inner, d_2).
        """
        rows, cols = self.sizes
        if self.inner(1) is not None:
            return self.unfolded(backend, arrays, Cut(1, (0, rows), (0, cols), 0))
        halves = self.halves(((rows, 1), (1, cols)))
        if halves.width >= min(rows, cols):
            return None
        left, right = halves(backend, [arrays[name] for name in self.shapes], [(0, rows), (0, cols)])
        return backend.reshape(left, (rows, -1)), backend.matrix_transpose(backend.reshape(right, (cols, -1)))

    def boxed(self, lengths: Sequence[int]) -> Self | None:
        """Return the format of a box with these lengths, whose arrays are those of this one cut to the box.

        Default: None, if :meth:`unfolded` needs more than ``sizes`` to be changed.
        """
        return None

    def summed(self, terms: int) -> Self | None:
        """Return the format of a sum of terms, their arrays concatenated along the last axis; None if there is none."""
        return None

    # -- Used by the initialization ------------------------------------------------------------

    def num_terms_per_array(self, name: str) -> int:
        """Return how many elements of one array each element of the tensor sums over. Default: from the formula."""
        formula, size = self._parsed
        indices = formula.inputs[list(self.shapes).index(name)]
        return math.prod(size[index] for index in indices if index not in formula.output)

    @property
    def num_terms(self) -> int:
        """Number of products, of one element of each array, that an element of the tensor is a sum of."""
        formula, size = self._parsed
        return math.prod(length for index, length in size.items() if index not in formula.output)

    # -- Used by the planner, the solvers and the cost estimates -------------------------------

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        """Return an upper bound on the rank of the unfolding with these modes as rows.

        Default: the least product of bonds between them and the other modes, a minimal cut of the network.
        """
        legs = [(size, 1) if mode in modes else (1, size) for mode, size in enumerate(self.sizes)]
        return min(self._shorter_side(modes), self.rank_of_legs(legs))

    def _shorter_side(self, modes: Sequence[int]) -> int:
        rows = math.prod(self.sizes[mode] for mode in modes)
        return min(rows, math.prod(self.sizes) // rows)

    def rank_of_legs(self, legs: Sequence[tuple[int, int]]) -> int:
        """Return an upper bound on the rank of a box of the tensor as a matrix.

        Default: a minimal cut of the network. It holds for any arrays, trained or not.

        Parameters
        ----------
        legs : sequence of (int, int)
            For each mode, the numbers of rows and of columns that its index in the box stands for, rows slow.
        """
        formula, size = self._parsed
        return minimal_cut(formula, size, legs)[0]

    def halves(self, legs: Legs) -> Halves:
        """Return a way to compute a box as a product of two matrices, whose inner dimension is :meth:`rank_of_legs`."""
        formula, size = self._parsed
        return Halves.of(formula, tuple(size.items()), tuple((m,) for m in range(len(self.sizes))), self.sizes, legs)

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        """Yield unfoldings of limited rank, each with its limit, for lower bounds on the error of a fit.

        Default: unfoldings with up to half of the modes as rows, at most 16 for each number of modes.
        """
        order = len(self.sizes)
        for size in range(1, order // 2 + 1):
            for modes in itertools.islice(itertools.combinations(range(order), size), _UNFOLDINGS):
                rank = self.unfolding_rank(modes)
                if rank < self._shorter_side(modes):
                    yield list(modes), rank

    def matrix_rank(self) -> int | None:
        """Return the rank of a matrix (M = 2) of this format with random arrays; None to compute it numerically."""
        return None

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        """Return the dimension of the set of tensors that the format can represent, or an upper bound on it.

        Parameters
        ----------
        sizes : sequence of int
            Sizes to use instead of the format's; none larger.
        times : int
            For sums of this many tensors.
        power : int
            For elementwise products of this many tensors.

        Notes
        -----
        Default: for small networks the rank of the Jacobian at random arrays; otherwise the number of parameters or of
        elements, whichever is smaller.
        """
        elements = math.prod(sizes)
        if power > 1:
            return elements
        smaller = type(self)(sizes, self.rank_given)
        return min(elements, jacobian_rank(smaller, times) or times * smaller.num_parameters)

    def useful_rank(self) -> int | None:
        """Return the rank beyond which the format gains no expressiveness; None if the format has no rank.

        Default: the number of elements, which is an upper bound.
        """
        return math.prod(self.sizes)

    @property
    def products(self) -> int:
        """Number of products per element in the last step that computes the tensor; by default :attr:`num_terms`."""
        return self.num_terms

    def fit(self, algebra: Any, tensor: Array, start: Mapping[str, Array] | None, limits: Any) -> Any:
        """Fit the arrays to a tensor; return a :class:`tnadapt.decomposition.Fit`, or None to use the general solver.

        The general solver is alternating least squares with :meth:`tensor` and :meth:`adjoint`, from several starts.
        See :func:`tnadapt.decomposition.fit_format` for the parameters.
        """
        return None


def rank_a_mode(name: str, rank: Any, order: int, expected: int, optional: bool = False) -> Rank:
    """:meth:`Format.checked_rank` for one integer or ``expected`` integers; with ``optional``, each may be None."""
    if not isinstance(rank, (tuple, list)):
        return integer("rank", rank, 1, MAX_RANK, ConfigError, "or a tuple with one rank per mode")
    if len(rank) != expected:
        raise ConfigError(
            f"format={name!r} of order {order} needs {expected} ranks; got {len(rank)}: {safe_repr(rank)}"
        )
    other = "or None" if optional else ""
    return tuple(
        None if optional and each is None else integer(f"rank[{mode}]", each, 1, MAX_RANK, ConfigError, other)
        for mode, each in enumerate(rank)
    )


def rows_of(array: Array, bounds: tuple[int, int], axis: int = 0) -> Array:
    """Slice one axis; return the array itself if the range covers the whole axis."""
    start, stop = bounds
    if (start, stop) == (0, array.shape[axis]):
        return array
    return array[(*(slice(None),) * axis, slice(start, stop), ...)]

"""Tensor completion: fit the observed elements of a tensor, with or without weights; others are missing or padding.

A few sweeps of alternating least squares on the observed elements, then damped Gauss-Newton on all arrays at once if
the problem is small enough for its equations; otherwise sweeps to the end. In double precision, on the host.
"""

from __future__ import annotations

import functools
import itertools
import math
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import Format, Permuted
from tnadapt.algebra.network import Network
from tnadapt.algebra.products import cp_to_tensor

from ._least_squares import Descent, damped_gauss_newton
from .block_passes import khatri_rao_product
from .fits import Callback, Fit, Iteration, Limits

Arrays = dict[str, np.ndarray]

_SWEPT = "alternating least squares"


# -- Some elements of the tensor of one format, and their derivatives --------------------------------------------------

# An element of the tensor is an einsum of the rows of the arrays that its indices select, so any set of elements is one
# einsum over gathered rows, whatever the format. The tensor is linear in each array: the derivative of an element by an
# array is the einsum of the other arrays' rows, and it is zero outside of the array's own rows.


# The index of the elements in an einsum; no format has it in its formula.
_ELEMENT = "*"


class SplitElements:
    """Elements of the tensor of a format, at given places.

    Parameters
    ----------
    split : Format
        With a formula.
    places : sequence of ndarray of int, shape (n,)
        For each mode, the index of each element.

    Attributes
    ----------
    count : int
        n.
    """

    def __init__(self, split: Format, places: Sequence[np.ndarray]) -> None:
        self.shapes, self.count = split.shapes, len(places[0])
        inputs, _, output = split.formula.partition("->")
        self._indices = dict(zip(split.shapes, inputs.split(","), strict=True))
        modes = {index: mode for mode, index in enumerate(output)}
        # The axes of an array that are modes come first: they select its row.
        self._legs = {n: [a for a, i in enumerate(letters) if i in modes] for n, letters in self._indices.items()}
        self._bonds = {n: [a for a, i in enumerate(letters) if i not in modes] for n, letters in self._indices.items()}
        self._places = {n: [places[modes[self._indices[n][a]]] for a in legs] for n, legs in self._legs.items()}
        self._gathered = {
            name: (_ELEMENT if self._legs[name] else "") + "".join(letters[axis] for axis in self._bonds[name])
            for name, letters in self._indices.items()
        }
        self._whole = _Chain(list(self._gathered.values()), _ELEMENT)
        self._others = {name: self._other_arrays(name) for name in self.shapes}

    def _other_arrays(self, name: str) -> tuple[_Chain, list[int]]:
        """Return the einsum of the other arrays' rows, and which bonds of this array it leaves with length 1."""
        others = [letters for other, letters in self._gathered.items() if other != name]
        bonds = [self._indices[name][axis] for axis in self._bonds[name]]
        reached = [index for index in bonds if any(index in letters for letters in others)]
        output = (_ELEMENT if any(_ELEMENT in letters for letters in others) else "") + "".join(reached)
        # A bond that no other array has is summed over this array alone.
        return _Chain(others, output), [place for place, index in enumerate(bonds) if index not in reached]

    def rows(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return for each array the row of each element; an array without a mode as it is."""
        rows = {}
        for name, places in self._places.items():
            turned = arrays[name].transpose(*self._legs[name], *self._bonds[name])
            rows[name] = turned[tuple(places)] if places else turned
        return rows

    def values(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Compute the elements whose rows are given."""
        return self._whole([rows[name] for name in self.shapes])

    def derivative(self, rows: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
        """Compute the derivative of ``count`` elements by the row of an array that each selects, shape (count, width).

        The columns are the array's bonds in order.
        """
        chain, lone = self._others[name]
        bonds = [self.shapes[name][axis] for axis in self._bonds[name]]
        derivative = chain([rows[other] for other in self.shapes if other != name])
        if not chain.output.startswith(_ELEMENT):
            derivative = derivative[None]
        for place in lone:
            derivative = np.expand_dims(derivative, place + 1)
        return np.ascontiguousarray(np.broadcast_to(derivative, (count, *bonds))).reshape(count, -1)

    def width(self, name: str) -> int:
        """Return the number of elements of an array that an element of the tensor depends on."""
        return math.prod(self.shapes[name][axis] for axis in self._bonds[name])

    def selected(self, name: str) -> np.ndarray:
        """Return the number of each element's row among all rows of an array, shape (n,)."""
        sizes = [self.shapes[name][axis] for axis in self._legs[name]]
        if not sizes:
            return np.zeros(self.count, np.intp)
        return np.ravel_multi_index(tuple(self._places[name]), sizes)

    def positions(self, name: str) -> np.ndarray:
        """Return where in the flat array each of its rows lies, shape (rows, width)."""
        shape = self.shapes[name]
        flat = np.arange(math.prod(shape)).reshape(shape).transpose(*self._legs[name], *self._bonds[name])
        return flat.reshape(-1, self.width(name))


class _Chain:
    """An einsum of arrays from left to right, pair by pair, with any total number of indices."""

    def __init__(self, inputs: Sequence[str], output: str) -> None:
        self.output, self.steps = output, list[str]()
        now = inputs[0] if inputs else ""
        for place in range(1, len(inputs)):
            later = set(output).union(*inputs[place + 1 :])
            kept = "".join(index for index in dict.fromkeys(now + inputs[place]) if index in later)
            self.steps.append(_ascii([now, inputs[place]], kept))
            now = kept
        self.last = _ascii([now], output)

    def __call__(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        if not arrays:
            return np.ones(())
        now = arrays[0]
        for step, right in zip(self.steps, arrays[1:], strict=True):
            now = np.einsum(step, now, right)
        product: np.ndarray = np.einsum(self.last, now)
        return product


def _ascii(inputs: Sequence[str], output: str) -> str:
    """Return an einsum string with the indices named by ASCII letters."""
    named = dict(zip(dict.fromkeys("".join(inputs)), string.ascii_letters, strict=False))
    return ",".join("".join(named[i] for i in indices) for indices in inputs) + "->" + "".join(named[i] for i in output)


# -- Some elements of a sum of products, as a function of all arrays, with its sparse Jacobian -------------------------

# A row of the Jacobian has entries only at the rows of the arrays that its element selects. Their positions do not
# change, so they are computed once, and each Jacobian costs a few products per entry.


class ObservedElements:
    """The observed elements of a scaled sum of Kronecker or Hadamard products of splits, in NumPy on the host.

    Parameters
    ----------
    splits : sequence of Format
        The K splits of each term.
    prefixes : sequence of sequence of str
        For each term and split, the prefix of the names of its arrays.
    places : sequence of sequence of ndarray of int, shape (n,)
        For each split, the index in each of its modes of each observed element.
    scale : float

    Attributes
    ----------
    shapes : dict of str to tuple of int
        The arrays.
    size, count : int
        The numbers of parameters and of observed elements.
    """

    def __init__(
        self,
        splits: Sequence[Format],
        prefixes: Sequence[Sequence[str]],
        places: Sequence[Sequence[np.ndarray]],
        scale: float = 1.0,
    ) -> None:
        pairs = [_unpermuted(split, indices) for split, indices in zip(splits, places, strict=True)]
        self.elements = [SplitElements(split, indices) for split, indices in pairs]
        self.prefixes, self.scale = prefixes, scale
        self.shapes = {
            prefix + name: shape
            for term in prefixes
            for prefix, split in zip(term, self.elements, strict=True)
            for name, shape in split.shapes.items()
        }
        self.count = self.elements[0].count
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    @classmethod
    def of_network(cls, network: Network, flat: np.ndarray | None = None) -> ObservedElements:
        """Return elements of a network's vector; by default all of it."""
        flat = np.arange(network.size) if flat is None else flat
        modes, splits = np.unravel_index(flat, network.sizes), network.splits
        places: list[Sequence[np.ndarray]] = [modes] * len(splits)
        if network.kronecker and len(splits) > 1:
            # In each mode the index is a K-digit number with one digit per split, most significant first.
            digits = [np.unravel_index(at, [split.sizes[mode] for split in splits]) for mode, at in enumerate(modes)]
            places = [[each[k] for each in digits] for k in range(len(splits))]
        return cls(network.splits, network.prefixes, places, network.scale)

    # -- Parameters as one vector ----------------------------------------------------------------

    def flat(self, arrays: Mapping[str, Any]) -> np.ndarray:
        """Return all arrays as one vector."""
        return np.concatenate([np.asarray(arrays[name]).reshape(-1) for name in self.shapes])

    def arrays(self, vec: np.ndarray) -> Arrays:
        """Return one vector as all arrays."""
        parts = np.split(vec, np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    # -- Values and derivatives ------------------------------------------------------------------

    def values(self, vec: np.ndarray) -> np.ndarray:
        """Compute the elements, shape (n,)."""
        terms = [math.prod(parts[1:], start=parts[0]) for _, parts in self._terms(self.arrays(vec))]
        return sum(terms[1:], start=terms[0]) * self.scale

    def _terms(
        self, arrays: Mapping[str, np.ndarray], terms: Sequence[Sequence[str]] | None = None
    ) -> list[tuple[list[dict[str, np.ndarray]], list[np.ndarray]]]:
        """Return for each term (by default all) the gathered rows and the elements of each split."""
        parts = []
        for prefixes in self.prefixes if terms is None else terms:
            rows = [
                split.rows({name: arrays[prefix + name] for name in split.shapes})
                for prefix, split in zip(prefixes, self.elements, strict=True)
            ]
            parts.append((rows, [split.values(row) for split, row in zip(self.elements, rows, strict=True)]))
        return parts

    def jacobian(self, vec: np.ndarray) -> Any:
        """Compute the derivative of :meth:`values` as a SciPy CSR array, shape (n, size)."""
        from scipy.sparse import csr_array

        arrays, blocks = self.arrays(vec), []
        for rows, values in self._terms(arrays):
            for k, split in enumerate(self.elements):
                factor = self._factor(values, k)
                blocks += [split.derivative(rows[k], name, self.count) * factor for name in split.shapes]
        data = np.concatenate(blocks, axis=1)
        indices, indptr = self._pattern
        return csr_array((data.reshape(-1), indices, indptr), shape=(self.count, self.size))

    # -- One array at a time ---------------------------------------------------------------------

    @functools.cached_property
    def _owners(self) -> dict[str, tuple[int, int, str]]:
        """Return the term, the split, and the name in the split's format, of each array."""
        return {
            prefix + name: (term, k, name)
            for term, prefixes in enumerate(self.prefixes)
            for k, (prefix, split) in enumerate(zip(prefixes, self.elements, strict=True))
            for name in split.shapes
        }

    def derivative(self, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """Compute the derivative of each element by the row of one array that it selects, shape (n, width)."""
        term, k, array_name = self._owners[name]
        rows, values = self._terms(arrays, [self.prefixes[term]])[0]
        derivative: np.ndarray = self.elements[k].derivative(rows[k], array_name, self.count) * self._factor(values, k)
        return derivative

    def rows_of_arrays(self) -> dict[str, np.ndarray]:
        """Return for each array the number of the row that each element selects, shape (n,)."""
        return {name: self.elements[k].selected(array_name) for name, (_, k, array_name) in self._owners.items()}

    def positions(self, name: str) -> np.ndarray:
        """Return where in one flat array each of its rows lies, shape (rows, width)."""
        _, k, array_name = self._owners[name]
        return self.elements[k].positions(array_name)

    def _factor(self, values: Sequence[np.ndarray], k: int) -> Any:
        """Return what one split of a term is multiplied by in each element, shape (n, 1), or a number."""
        others = [value for j, value in enumerate(values) if j != k]
        return math.prod(others[1:], start=others[0])[:, None] * self.scale if others else self.scale

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of the entries of each row, and where each row begins."""
        blocks, first = [], 0
        for _ in self.prefixes:
            for split in self.elements:
                for name, shape in split.shapes.items():
                    blocks.append(split.positions(name)[split.selected(name)] + first)
                    first += math.prod(shape)
        columns = np.concatenate(blocks, axis=1)
        dtype = np.int32 if columns.size < 1 << 31 else np.int64
        return columns.reshape(-1).astype(dtype), np.arange(self.count + 1, dtype=dtype) * columns.shape[1]

    @functools.cached_property
    def entries(self) -> int:
        """Number of entries of a row of the Jacobian."""
        return len(self.prefixes) * sum(split.width(name) for split in self.elements for name in split.shapes)


def _unpermuted(split: Format, places: Sequence[np.ndarray]) -> tuple[Format, Sequence[np.ndarray]]:
    """Return the format inside a permuted one, and the elements' indices in its modes."""
    if not isinstance(split, Permuted):
        return split, places
    indices = [
        np.ravel_multi_index([places[digit] for digit in axis], [split.sizes[digit] for digit in axis])
        for axis in split.axes
    ]
    return split.own, indices


def unobserved(mask: np.ndarray) -> tuple[int, int] | None:
    """Return a mode and an index in it of which no element is observed; None if there is none.

    Parameters
    ----------
    mask : ndarray of bool
        True where an element is observed.

    Examples
    --------
    >>> unobserved(np.array([[True, False], [True, False]])), unobserved(np.eye(2, dtype=bool))
    ((1, 1), None)
    """
    for mode in range(mask.ndim):
        seen = mask.any(axis=tuple(axis for axis in range(mask.ndim) if axis != mode))
        if not seen.all():
            return mode, int(np.argmin(seen))
    return None


# -- Sweeps: one array after another, row by row -----------------------------------------------------------------------

# An element depends on one row of each array, and linearly. With the other arrays fixed, the rows of an array are small
# independent least-squares problems. A sweep costs as much as a few gathered rows of all arrays
# for each observed element, so that it suits large problems.


# Ridge relative to the mean diagonal of a row's equations, which may be singular.
_RIDGE = 1e-12
# Passes over the elements of a row that may not be negative. How far to extrapolate such sweeps at first, and the
# factor after each success.
_PASSES, _AHEAD, _FURTHER = 5, 0.5, 1.05
# Matrix products with all of a block take less time than gathered rows if more than this part of it is observed.
_DENSE = 0.02


def sweeps_on_observed(
    elements: ObservedElements,
    wanted: np.ndarray,
    start: Mapping[str, np.ndarray],
    steps: Iteration,
    roots: np.ndarray,
    nonnegative: Collection[str] = (),
) -> Fit:
    """Run sweeps until the iteration stops.

    Parameters
    ----------
    elements : ObservedElements
    wanted : ndarray, shape (n,)
        Not all zero.
    start : mapping of str to ndarray
    steps : Iteration
    roots : ndarray, shape (n,)
        Square roots of the weights.
    nonnegative : collection of str
        Arrays without negative elements, in the start either. A sweep then goes on from arrays that are extrapolated
        along the last one, unless that fails: these sweeps are slower than those without bounds.

    Returns
    -------
    Fit
        With the error of the weighted elements.
    """
    dtype = np.result_type(wanted.dtype, np.float64)
    arrays = {name: np.array(start[name], dtype) for name in elements.shapes}
    # Those of any sign come first: they give a component the sign that the others cannot.
    rows_of = sorted(elements.rows_of_arrays().items(), key=lambda item: item[0] in nonnegative)
    groups = {name: _by_row(rows) for name, rows in rows_of}
    norm = float(np.linalg.norm(wanted * roots))

    def residual(arrays: Arrays) -> np.ndarray:
        return np.asarray((wanted - elements.values(elements.flat(arrays))) * roots)

    def sweep(arrays: Arrays, left: np.ndarray) -> np.ndarray:
        """Change the arrays; return what they leave."""
        for name, (order, edges, chosen) in groups.items():
            rows = (elements.derivative(arrays, name) * roots[:, None])[order]
            flat, places = arrays[name].reshape(-1), elements.positions(name)[chosen]
            equations = _equations(rows, left[order], edges)
            changes = _bounded_changes(*equations, flat[places]) if name in nonnegative else _changes(*equations)
            flat[places] += changes
            left[order] -= np.einsum("nw,nw->n", rows, np.repeat(changes, np.diff(edges), axis=0))
        return residual(arrays)

    left, before, ahead = residual(arrays), arrays, _AHEAD
    steps.begin(float(np.linalg.norm(left)) / norm)
    while not steps.stopped:
        if not nonnegative:
            left = sweep(arrays, left)
        else:
            further = {name: array + ahead * (array - before[name]) for name, array in arrays.items()}
            for name in nonnegative:
                np.maximum(further[name], 0.0, out=further[name])
            rest = sweep(further, residual(further))
            if np.linalg.norm(rest) < np.linalg.norm(left):
                ahead = min(1.0, _FURTHER * ahead)
            else:
                further, ahead = {name: array.copy() for name, array in arrays.items()}, ahead * 0.5
                rest = sweep(further, left)
            before, arrays, left = arrays, further, rest
        steps.step(float(np.linalg.norm(left)) / norm)
    error = steps.before if math.isfinite(steps.before) else math.inf
    return steps.fit(arrays, _SWEPT, error)


def sweeps_in_blocks(
    blocks: Callable[[], Iterable[tuple[Sequence[slice], np.ndarray, np.ndarray]]],
    start: Mapping[str, np.ndarray],
    steps: Iteration,
    norm: float,
    elements: int,
    nonnegative: Collection[str] = (),
) -> Fit:
    """Run sweeps of CP over a tensor that is read block by block, once for each factor of a sweep.

    Parameters
    ----------
    blocks : callable
        Yields for each block its position, its elements and their weights, both zero where it is not observed.
    start : mapping of str to ndarray, shape (d_m, r)
        The factors, in the order of the modes.
    steps : Iteration
    norm : float
        Of the weighted elements.
    elements : int
        The most numbers of an array that a block needs.
    nonnegative : collection of str
        Factors without negative elements, in the start either.
    """
    arrays = {name: np.array(array) for name, array in start.items()}
    modes = sorted(enumerate(arrays), key=lambda item: item[1] in nonnegative)
    steps.begin()
    while not steps.stopped:
        for mode, name in modes:
            factor, square = arrays[name], 0.0
            count, rank = factor.shape
            grams, rights = np.zeros((count, rank, rank), factor.dtype), np.zeros((count, rank), factor.dtype)
            for place, wanted, weights in blocks():
                rows = [array[at] for array, at in zip(arrays.values(), place, strict=True)]
                dense = np.count_nonzero(weights) > _DENSE * weights.size
                of_block = _dense_equations if dense else _gathered_equations
                parts = of_block(wanted, weights, rows, mode, elements)
                grams[place[mode]] += parts[0]
                rights[place[mode]] += parts[1]
                square += parts[2]
            bounded = name in nonnegative
            changes = _bounded_changes(grams, rights, factor) if bounded else _changes(grams, rights)
            factor += changes
            # What the change removes from the sum of squares, by its equations.
            square -= 2.0 * float(np.vdot(rights, changes).real)
            square += float(np.einsum("nv,nvw,nw->", changes.conj(), grams, changes).real)
        steps.step(math.sqrt(max(0.0, square)) / norm)
    return steps.fit(arrays, _SWEPT, steps.before)


def _dense_equations(
    wanted: np.ndarray, weights: np.ndarray, rows: Sequence[np.ndarray], mode: int, elements: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the normal equations of each row of a factor for its change, and the squared distance, of a block."""
    count, rank = rows[mode].shape
    left = wanted - cp_to_tensor((None, rows))
    weighted = left * weights
    square = float(np.vdot(left, weighted).real)
    rights = khatri_rao_product(weighted, mode, [row.conj() for row in rows])
    grams = np.empty((count, rank, rank), rights.dtype)
    firsts, seconds = np.triu_indices(rank)
    # As many columns at once as keep the products no larger than a block.
    step = max(1, elements * weights.shape[-1 if mode < weights.ndim - 1 else -2] // weights.size)
    for begin in range(0, len(firsts), step):
        first, second = firsts[begin : begin + step], seconds[begin : begin + step]
        sums = khatri_rao_product(weights, mode, [row[:, first].conj() * row[:, second] for row in rows])
        grams[:, second, first], grams[:, first, second] = sums.conj(), sums
    return grams, rights, square


def _gathered_equations(
    wanted: np.ndarray, weights: np.ndarray, rows: Sequence[np.ndarray], mode: int, elements: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the same from the rows of each observed element."""
    count, rank = rows[mode].shape
    grams, rights = np.zeros((count, rank, rank), rows[mode].dtype), np.zeros((count, rank), rows[mode].dtype)
    known, square, length = np.flatnonzero(weights), 0.0, max(1, elements // (rank * (weights.ndim + 2)))
    for begin in range(0, len(known), length):
        some = known[begin : begin + length]
        places, roots = np.unravel_index(some, weights.shape), np.sqrt(weights.reshape(-1)[some])
        gathered = [row[at] for row, at in zip(rows, places, strict=True)]
        derivative = math.prod(gathered[:mode] + gathered[mode + 1 :], start=roots[:, None])
        left = wanted.reshape(-1)[some] * roots - np.einsum("nr,nr->n", derivative, gathered[mode])
        order, edges, chosen = _by_row(places[mode])
        for sums, parts in zip((grams, rights), _equations(derivative[order], left[order], edges), strict=True):
            sums[chosen] += parts
        square += float(np.vdot(left, left).real)
    return grams, rights, square


def _by_row(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the order that sorts the elements by row of an array, where each row begins, and which rows occur."""
    order = np.argsort(rows, kind="stable")
    chosen, first = np.unique(rows[order], return_index=True)
    return order, np.append(first, len(rows)), chosen


def _equations(rows: np.ndarray, left: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the normal equations of each row of an array for its change."""
    parts = list(itertools.pairwise(edges))
    grams = np.stack([rows[a:b].conj().T @ rows[a:b] for a, b in parts])
    return grams, np.stack([rows[a:b].conj().T @ left[a:b] for a, b in parts])


def _changes(grams: np.ndarray, rights: np.ndarray) -> np.ndarray:
    """Solve the equations of each row."""
    width = rights.shape[1]
    size = np.trace(grams, axis1=1, axis2=2).real / width
    shift = np.where(size > 0.0, _RIDGE * size, 1.0)
    changes: np.ndarray = np.linalg.solve(grams + shift[:, None, None] * np.eye(width), rights[:, :, None])[:, :, 0]
    return changes


def _bounded_changes(grams: np.ndarray, rights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Change the elements of each row in turn, each to the best that is not negative."""
    now, left = values.copy(), rights.copy()
    for _ in range(_PASSES):
        for k in range(values.shape[1]):
            size = grams[:, k, k]
            step = np.where(size > 0.0, left[:, k] / np.where(size > 0.0, size, 1.0), 0.0)
            step = np.maximum(step, -now[:, k])
            now[:, k] = np.maximum(now[:, k] + step, 0.0)
            left -= grams[:, :, k] * step[:, None]
    return np.asarray(now - values)


# -- Damped Gauss-Newton from several starts ---------------------------------------------------------------------------


# Maximum entries of a Jacobian, maximum multiply-adds of all steps of one fit, and minimum multiply-adds counted for a
# step.
_ENTRIES, _WORK, _STEP = 1 << 24, 1 << 33, 1 << 20
# At least this many steps must be possible for a fit to be tried.
_FEW = 8
# A descent that has come this close to zero is continued.
_NEAR = 1e-2
# All descents together take at most as many steps as this number of full ones.
_DESCENTS = 8
# An error of this many times epsilon is rounding. Descents that end this close to each other found the same optimum;
# once this many have, no more are tried.
_ROUNDING, _SAME, _AGREE = 64.0, 1e-4, 3


def affordable(elements: ObservedElements, count: int | None = None) -> int:
    """Return the number of steps that a fit may take; 0 if too few to be worth a try.

    Parameters
    ----------
    elements : ObservedElements
    count : int, optional
        Number of elements to assume; by default those that there are.
    """
    size, count = elements.size, elements.count if count is None else count
    dense, sparse = count * size**2, 16 * count * elements.entries**2
    steps = int(_WORK // (min(dense, sparse) + size**3 + _STEP))
    return steps if steps >= _FEW and count * elements.entries <= _ENTRIES else 0


def fit_observed(
    elements: ObservedElements,
    wanted: np.ndarray,
    starts: Iterable[Mapping[str, np.ndarray]],
    limits: Limits,
    *,
    roots: np.ndarray | None = None,
    watch: Callback = lambda *_: None,
) -> Fit:
    """Fit arrays to observed elements from each of several starts, until one reaches zero or three reach one optimum.

    Parameters
    ----------
    elements : ObservedElements
    wanted : ndarray, shape (n,)
        The observed elements; not all zero.
    starts : iterable of mapping of str to ndarray
        Each is made when it is needed; at least one.
    limits : Limits
        Of each descent. All descents together take a bounded number of steps, fewer for larger problems.
    roots : ndarray, shape (n,), optional
        Square roots of the weights of the squared errors.
    watch : callable
        Called with the number of each step and the least relative error so far; stops all descents if it returns True.

    Returns
    -------
    Fit
        The best descent's.
    """
    dtype = np.result_type(wanted.dtype, np.float64)
    target = wanted if roots is None else wanted * roots
    norm = float(np.linalg.norm(target))
    best: Descent | None = None
    agreeing, steps = 0, Iteration(limits, watch)
    left = min(max(affordable(elements), _FEW), _DESCENTS * limits.iterations)

    def residual(vec: np.ndarray) -> np.ndarray:
        values = elements.values(vec)
        return np.asarray((values if roots is None else values * roots) - target)

    def jacobian(vec: np.ndarray) -> Any:
        matrix = elements.jacobian(vec)
        if roots is not None:
            matrix.data *= np.repeat(roots, elements.entries)
        return matrix

    def descent(begun: np.ndarray, most: int) -> Descent:
        few = limits._replace(iterations=most)
        return damped_gauss_newton(residual, jacobian, begun, norm, few, lambda _, error: steps.note(error))

    for start in starts:
        begun = elements.flat(balanced(elements, start)).astype(dtype)
        latest = descent(begun, min(limits.iterations, left - len(steps.history)))
        taken = len(steps.history)
        if not latest.converged and taken < left and latest.error <= _NEAR * norm and not steps.stopped:
            # It may be converging to an exact answer, slowly.
            further = descent(latest.x, left - taken)
            latest = further._replace(history=latest.history + further.history)
        same = best is not None and abs(latest.error - best.error) <= _SAME * best.error
        better = best is None or latest.error < best.error
        agreeing = agreeing + 1 if same else 1 if better else agreeing
        best = latest if better or best is None else best
        exact = best.error <= _ROUNDING * float(np.finfo(dtype).eps) * norm
        if agreeing == _AGREE or len(steps.history) >= left or exact or steps.stopped:
            break
    assert best is not None
    error, stopped = best.error / norm, steps.stopped or ("converged" if best.converged else "max_iterations")
    history = best.history or (error,)
    return Fit(elements.arrays(best.x), False, len(steps.history), "Gauss-Newton", stopped, error, history)


# -- Starts ------------------------------------------------------------------------------------------------------------


def balanced(elements: ObservedElements, arrays: Mapping[str, Any]) -> Arrays:
    """Return arrays whose norms are equal within each term, without changing any element.

    Damping treats all parameters alike, so they should be of similar size.
    """
    scaled = {name: np.asarray(arrays[name]) for name in elements.shapes}
    for prefixes in elements.prefixes:
        names = [name for name in elements.shapes if name.startswith(tuple(prefixes))]
        norms = np.array([np.linalg.norm(scaled[name]) for name in names])
        if not (np.isfinite(norms).all() and norms.all()):
            continue
        mean = math.exp(float(np.mean(np.log(norms))))
        scaled |= {name: scaled[name] * (mean / norm) for name, norm in zip(names, norms, strict=True)}
    return scaled


def random_start(
    elements: ObservedElements,
    rng: np.random.RandomState,
    norm: float,
    dtype: Any = np.float64,
    nonnegative: Collection[str] = (),
) -> Arrays:
    """Return normal arrays, or their magnitudes, scaled so that their elements have a given norm."""
    arrays: Arrays = {}
    for name, shape in elements.shapes.items():
        arrays[name] = rng.normal(size=shape).astype(dtype)
        if np.dtype(dtype).kind == "c":
            arrays[name] += 1j * rng.normal(size=shape)
        if name in nonnegative:
            arrays[name] = abs(arrays[name])
    size = float(np.linalg.norm(elements.values(elements.flat(arrays))))
    # Every array of a term takes an equal part of the factor.
    each = max(len(elements.shapes) // len(elements.prefixes), 1)
    factor = (norm / size) ** (1.0 / each) if size else 1.0
    return {name: array * factor for name, array in arrays.items()}


def moved(starts: Iterable[Mapping[str, np.ndarray]], rng: np.random.RandomState, size: float) -> Iterator[Arrays]:
    """Yield starts with noise of a size relative to the root mean square of each array."""
    for start in starts:
        yield {
            name: array + size * (float(np.sqrt(np.mean(np.abs(array) ** 2))) or 1.0) * rng.normal(size=array.shape)
            for name, array in start.items()
        }

"""Observed elements of a sum of products of splits, as a function of all arrays, with its sparse Jacobian.

A row of the Jacobian has entries only at the rows of the arrays that its element selects. Their positions do not
change, so they are computed once, and each Jacobian costs a few products per entry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import Format, Permuted
from tnadapt.algebra.network import Network

from ._split_elements import SplitElements

__all__ = ["ObservedElements", "unobserved"]

Arrays = dict[str, np.ndarray]


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
        pairs = [_unpermuted(split, own) for split, own in zip(splits, places, strict=True)]
        self.elements = [SplitElements(split, own) for split, own in pairs]
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
        modes = np.unravel_index(flat, network.sizes)
        if not network.kronecker or len(network.splits) == 1:
            return cls(network.splits, network.prefixes, [modes] * len(network.splits), network.scale)
        # In each mode the index is a K-digit number with one digit per split, most significant first.
        digits = [
            np.unravel_index(place, [split.sizes[mode] for split in network.splits]) for mode, place in enumerate(modes)
        ]
        places = [[each[k] for each in digits] for k in range(len(network.splits))]
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
        found = []
        for prefixes in self.prefixes if terms is None else terms:
            rows = [
                split.rows({name: arrays[prefix + name] for name in split.shapes})
                for prefix, split in zip(prefixes, self.elements, strict=True)
            ]
            found.append((rows, [split.values(own) for split, own in zip(self.elements, rows, strict=True)]))
        return found

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
        """Return the term, the split, and the name in the split's format of each array."""
        return {
            prefix + name: (term, k, name)
            for term, prefixes in enumerate(self.prefixes)
            for k, (prefix, split) in enumerate(zip(prefixes, self.elements, strict=True))
            for name in split.shapes
        }

    def derivative(self, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """Compute the derivative of each element by the row of one array that it selects, shape (n, width)."""
        term, k, own = self._owners[name]
        rows, values = self._terms(arrays, [self.prefixes[term]])[0]
        found: np.ndarray = self.elements[k].derivative(rows[k], own, self.count) * self._factor(values, k)
        return found

    def rows_of_arrays(self) -> dict[str, np.ndarray]:
        """Return for each array the number of the row that each element selects, shape (n,)."""
        return {name: self.elements[k].selected(own) for name, (_, k, own) in self._owners.items()}

    def positions(self, name: str) -> np.ndarray:
        """Return where in one flat array each of its rows lies, shape (rows, width)."""
        _, k, own = self._owners[name]
        return self.elements[k].positions(own)

    def _factor(self, values: Sequence[np.ndarray], k: int) -> Any:
        """Return what one split of a term is multiplied by in each element, shape (n, 1), or a number."""
        others = [one for j, one in enumerate(values) if j != k]
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
        kind = np.int32 if columns.size < 1 << 31 else np.int64
        return columns.reshape(-1).astype(kind), np.arange(self.count + 1, dtype=kind) * columns.shape[1]

    @functools.cached_property
    def entries(self) -> int:
        """Number of entries of a row of the Jacobian."""
        return len(self.prefixes) * sum(split.width(name) for split in self.elements for name in split.shapes)


def _unpermuted(split: Format, places: Sequence[np.ndarray]) -> tuple[Format, Sequence[np.ndarray]]:
    """Return the format that makes a permuted one, and the places in its modes."""
    if not isinstance(split, Permuted):
        return split, places
    own = [
        np.ravel_multi_index([places[digit] for digit in axis], [split.sizes[digit] for digit in axis])
        for axis in split.axes
    ]
    return split.own, own


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

"""A box of a tensor network as a product of two matrices, by the cheapest cut between its rows and its columns.

This is the way for any network and any split of its indices into rows and columns: an index may be several digits, some
of the rows and some of the columns, as the blocks of a matrix are. Formats that have a faster way for whole modes
define ``inner`` and ``unfolded``.

A row index on an array of the other side is cut, too: it becomes an index of the inner dimension, and the rows' side
has an identity matrix there, so that its half is sparse.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.backends.backend import Array, Backend
from tnadapt.backends.fixed_arrays import FixedArrays

from ._contraction import Contraction, Formula
from ._minimal_cut import minimal_cut
from ._mode_digits import covered

__all__ = ["Halves", "Legs"]

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
            index: "".join(letters[mode] for mode in own for letters in (rows, cols) if mode in letters)
            for index, own in zip(formula.output, axes, strict=True)
        }
        self._legs = [
            [(axis, axes[formula.output.index(index)]) for axis, index in enumerate(own) if index in digits]
            for own in formula.inputs
        ]
        inputs = ["".join(digits.get(index, index) for index in own) for own in formula.inputs]
        self._shapes = [[length.get(index) or size[index] for index in own] for own in inputs]
        bonds = {index: size[index] for index in dict.fromkeys("".join(formula.inputs)) if index not in formula.output}
        length |= bonds
        outer = "".join([*rows.values(), *cols.values()])
        open_legs = [(length[letter], 1) if letter in rows.values() else (1, length[letter]) for letter in outer]
        self.width, self.sides = minimal_cut(Formula(tuple(inputs), outer), length, open_legs)
        held = [
            "".join(own for own, mine in zip(inputs, self.sides, strict=True) if mine is side) for side in (True, False)
        ]
        shared = [bond for bond in bonds if bond in held[0] and bond in held[1]]
        crossed = [[c for c in mine.values() if c in other] for mine, other in ((rows, held[1]), (cols, held[0]))]
        renamed = {letter: next(fresh) for letter in "".join(map("".join, crossed))}
        inner = "".join([*shared, *renamed.values()])
        self._identities = [[length[letter] for letter in crossed[side]] for side in (0, 1)]
        self._halves: list[Contraction | None] = []
        for side, letters, foreign in ((0, rows, crossed[1]), (1, cols, crossed[0])):
            own = [
                "".join(renamed[index] if index in foreign else index for index in each)
                for each, mine in zip(inputs, self.sides, strict=True)
                if mine is (side == 0)
            ]
            own += [letter + renamed[letter] for letter in crossed[side]]
            # One side has no arrays if the box has a single row, or a single column.
            self._halves.append(Contraction(own, "".join(letters.values()) + inner) if own else None)

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(
        cls, formula: Formula, size: tuple[tuple[str, int], ...], axes: tuple[tuple[int, ...], ...],
        sizes: tuple[int, ...], legs: Legs,
    ) -> Halves:  # fmt: skip
        """Return the halves; the same object for all weights with the same place in a tensor."""
        return cls(formula, dict(size), axes, sizes, legs)

    def __call__(
        self, backend: Backend, arrays: Sequence[Array], ranges: Sequence[tuple[int, int]]
    ) -> tuple[Array, Array]:
        """Compute the halves of a box from the network's arrays, in order.

        Returns
        -------
        (array, array)
            One axis per mode, of its rows in the first and its columns in the second, and the inner one.
        """
        parts = [
            self._restricted(backend, array, own, shape, ranges)
            for array, own, shape in zip(arrays, self._legs, self._shapes, strict=True)
        ]
        kind = backend.dtype_name(arrays[0])
        found = []
        for side, half in enumerate(self._halves):
            mine = [part for part, on_rows in zip(parts, self.sides, strict=True) if on_rows is (side == 0)]
            mine += [_IDENTITIES.on(backend, size, arrays[0], kind) for size in self._identities[side]]
            made = _IDENTITIES.on(backend, 1, arrays[0], kind) if half is None else half(backend, mine)
            found.append(backend.reshape(made, (*(leg[side] for leg in self.legs), self.width)))
        return found[0], found[1]

    def _restricted(
        self,
        backend: Backend,
        array: Array,
        legs: Sequence[tuple[int, Sequence[int]]],
        shape: Sequence[int],
        ranges: Sequence[tuple[int, int]],
    ) -> Array:
        """Return the part of an array that belongs to a box, with an axis for each digit."""
        for axis, modes in reversed(legs):
            cover = covered([self.sizes[mode] for mode in modes], [ranges[mode] for mode in modes])
            lo, hi = cover.bounds
            before = (slice(None),) * axis
            array = array if (lo, hi) == (0, array.shape[axis]) else array[(*before, slice(lo, hi), ...)]
            if any(part != slice(None) for part in cover.crop):
                lengths = [*array.shape[:axis], *cover.lengths, *array.shape[axis + 1 :]]
                array = backend.reshape(array, lengths)[(*before, *cover.crop, ...)]
                array = backend.reshape(array, (*lengths[:axis], -1, *lengths[axis + len(modes) :]))
        return backend.reshape(array, tuple(shape))

"""A format whose modes are indexed in another order than the vector: permuted axes, and several digits in a mode.

The tensor has the sizes of the fold, whose ``vec`` is the group's vector. Another format makes it, with its modes in
the order of ``axes``. A mode of several digits, such as one of the row's and one of the column's, has the product of
their sizes, the first digit slow. All other modules see a format like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError

from ..unfolding import Cut, along
from ._format import Format, Ranges, rows_of
from ._halves import Halves, Legs
from ._mode_digits import Cover, covered

__all__ = ["Axes", "Permuted"]

#: For each mode of the network, the positions in the fold of its digits.
Axes = tuple[tuple[int, ...], ...]


class Permuted(Format):
    """A tensor made by another format, with its modes in another order.

    Parameters
    ----------
    own : Format
        Of the sizes that the axes have.
    sizes : sequence of int
        Of the fold.
    axes : tuple of tuple of int

    Examples
    --------
    A tensor train over (rows, weights, columns), for a fold of (weights, rows, columns):

    >>> from tnadapt.algebra.formats import TensorTrain
    >>> Permuted(TensorTrain((6, 2, 5), 3), (2, 6, 5), ((1,), (0,), (2,))).shapes
    {'core0': (1, 6, 3), 'core1': (3, 2, 3), 'core2': (3, 5, 1)}
    """

    def __init__(self, own: Format, sizes: Sequence[int], axes: Axes) -> None:
        self.own, self.axes = own, axes
        self.sizes, self.rank_given, self.shapes = tuple(sizes), own.rank_given, own.shapes
        self.title, self.ones, self.unfolds, self.diagram = own.title, own.ones, own.unfolds, own.diagram
        self._order = [digit for axis in axes for digit in axis]
        self._back = tuple(self._order.index(digit) for digit in range(len(self._order)))
        # Planned here, so that a compiler that traces a call does not have to trace the planning.
        formula, _ = own._parsed
        modes = {index: mode for mode, index in enumerate(formula.output)}
        self._legs = [[(axis, modes[i]) for axis, i in enumerate(held) if i in modes] for held in formula.inputs]

    @property
    def formula(self) -> str:
        if any(len(axis) > 1 for axis in self.axes):
            raise ConfigError(f"axes={self.axes} put several digits into a mode, which no einsum of its arrays can say")
        inputs, _, output = self.own.formula.partition("->")
        return f"{inputs}->{''.join(output[place] for place in self._back)}"

    @property
    def zero(self) -> str:
        return self.own.zero

    # -- The tensor ----------------------------------------------------------------------------

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        covers = [self._cover(axis, [ranges[digit] for digit in axis]) for axis in self.axes]
        found = self.own.tensor(backend, arrays, [cover.bounds for cover in covers])
        return backend.permute_dims(self._cropped(backend, found, covers), self._back)

    def turned(self, backend: Backend, tensor: Array) -> Array:
        """Return a tensor of the fold's sizes as one of the sizes of the format that makes it."""
        return backend.reshape(backend.permute_dims(tensor, tuple(self._order)), self.own.sizes)

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        return self.own.adjoint(backend, arrays, self.turned(backend, tensor))

    def _cover(self, axis: Sequence[int], ranges: Ranges) -> Cover:
        return covered([self.sizes[digit] for digit in axis], ranges)

    def _cropped(self, backend: Backend, array: Array, covers: Sequence[Cover], more: Sequence[int] = ()) -> Array:
        """Return an array over the ranges of some modes, and axes of other lengths, as one over the box's digits."""
        shape = [length for cover in covers for length in cover.lengths]
        cut = tuple(part for cover in covers for part in cover.crop)
        found = backend.reshape(array, (*shape, *more))
        return found if all(part == slice(None) for part in cut) else found[cut]

    # -- Unfoldings ----------------------------------------------------------------------------

    def _sides(self, modes: int) -> tuple[int, bool] | None:
        """Return where the network's modes part into rows and columns, and whether rows come first; None if nowhere."""
        rows = [all(digit < modes for digit in axis) for axis in self.axes]
        if any(not is_row and min(axis) < modes for is_row, axis in zip(rows, self.axes, strict=True)):
            return None  # a mode with digits on both sides
        count = sum(rows)
        if all(rows[:count]):
            return count, True
        return (len(rows) - count, False) if all(rows[len(rows) - count :]) else None

    def inner(self, modes: int) -> int | None:
        sides = self._sides(modes)
        if sides is None or self.own.boxed([1] * len(self.axes)) is None:
            return None
        return self.own.inner(sides[0])

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        sides = self._sides(cut.modes)
        assert sides is not None
        place, rows_first = sides
        rows, cols = range(cut.modes), range(cut.modes, len(self.sizes))
        left = self._half(backend, arrays, place, rows_first, rows, cut.rows)
        right = self._half(backend, arrays, place, not rows_first, cols, cut.cols)
        return left, backend.matrix_transpose(right)

    def _half(
        self,
        backend: Backend,
        arrays: Mapping[str, Array],
        place: int,
        first: bool,
        digits: range,
        bounds: tuple[int, int],
    ) -> Array:
        """Compute a run of rows of L, or of columns of R: the half of the modes before ``place``, or of the others."""
        axes = self.axes[:place] if first else self.axes[place:]
        others = [(0, 1)] * (len(self.axes) - len(axes))
        order = [digit for axis in axes for digit in axis]
        back = [order.index(digit) for digit in digits]

        def on_box(box: Ranges) -> Array:
            known = dict(zip(digits, box, strict=True))
            covers = [self._cover(axis, [known[digit] for digit in axis]) for axis in axes]
            own = [cover.bounds for cover in covers]
            ranges = [*own, *others] if first else [*others, *own]
            lengths = [hi - lo for lo, hi in ranges]
            boxed = self.own.boxed(lengths)
            assert boxed is not None
            parts = self._restricted(arrays, ranges)
            cut = Cut(place, (0, math.prod(lengths[:place])), (0, math.prod(lengths[place:])), 0)
            left, right = boxed.unfolded(backend, parts, cut)
            half = left if first else backend.matrix_transpose(right)
            width = half.shape[1]
            half = self._cropped(backend, half, covers, [width])
            return backend.reshape(backend.permute_dims(half, (*back, len(back))), (-1, width))

        return along(backend, [self.sizes[digit] for digit in digits], *bounds, on_box)

    def _restricted(self, arrays: Mapping[str, Array], ranges: Ranges) -> dict[str, Array]:
        found = {}
        for name, legs in zip(self.shapes, self._legs, strict=True):
            array = arrays[name]
            for axis, mode in legs:
                array = rows_of(array, ranges[mode], axis)
            found[name] = array
        return found

    # -- Used by the start, the planner and the solvers ----------------------------------------

    def num_terms_per_array(self, name: str) -> int:
        return self.own.num_terms_per_array(name)

    @property
    def num_terms(self) -> int:
        return self.own.num_terms

    @property
    def products(self) -> int:
        return self.own.products

    def summed(self, terms: int) -> Self | None:
        own = self.own.summed(terms)
        return None if own is None else type(self)(own, self.sizes, self.axes)

    def _merged(self, sizes: Sequence[int]) -> list[int]:
        return [math.prod(sizes[digit] for digit in axis) for axis in self.axes]

    def rank_of_legs(self, legs: Sequence[tuple[int, int]]) -> int:
        rows, cols = (self._merged([leg[side] for leg in legs]) for side in (0, 1))
        return self.own.rank_of_legs(list(zip(rows, cols, strict=True)))

    def halves(self, legs: Legs) -> Halves:
        formula, size = self.own._parsed
        return Halves.of(formula, tuple(size.items()), self.axes, self.sizes, legs)

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        legs = [(size, 1) if mode in modes else (1, size) for mode, size in enumerate(self.sizes)]
        rows = math.prod(rows for rows, _ in legs)
        return min(rows, math.prod(self.sizes) // rows, self.rank_of_legs(legs))

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        for modes, rank in self.own.bounded_unfoldings():
            yield [digit for mode in modes for digit in self.axes[mode]], rank

    def matrix_rank(self) -> int | None:
        return self.own.matrix_rank() if len(self.axes) == len(self.sizes) else None

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return self.own.freedom(self._merged(sizes), times, power)

    def useful_rank(self) -> int | None:
        return self.own.useful_rank()

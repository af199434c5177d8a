"""Tensor formats of a split: dense, CP, Tucker, tensor train, or a registered network.

Each format is one class. It defines its arrays and the einsum that computes the tensor from them; all that the planner,
the solvers, the diagrams and the cost estimates need is derived from these in ``_format``, or overridden
(:class:`Format`). A new built-in format needs one more class, and one more line in :data:`FORMATS`; another package
calls ``tnadapt.register_format``. :class:`tnadapt.testing.FormatContract` tests both kinds. Paper symbols: C the core
(``core``), A_m the plane factors (``factor0`` …), r the rank, d_m the sizes.
"""

from __future__ import annotations

import collections
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from tnadapt.algebra.folding import Cut, along
from tnadapt.algebra.products import (
    cp_tensor,
    khatri_rao,
    kronecker_tensor,
    tt_left,
    tt_right,
    tt_tensor,
    tucker_tensor,
    unfolded,
)
from tnadapt.backends import Array, Backend
from tnadapt.errors import ConfigError
from tnadapt.plugins import Registry

from ._format import (
    Contraction,
    Cover,
    Format,
    Formula,
    Halves,
    Legs,
    Ranges,
    Rank,
    covered,
    jacobian_rank,
    letters,
    of_cp,
    of_train,
    of_tucker,
    rank_a_mode,
    rows_of,
)

__all__ = [
    "CP",
    "FORMATS",
    "Axes",
    "BatchedCP",
    "Circuit",
    "Contraction",
    "Dense",
    "Format",
    "Formula",
    "Legs",
    "Permuted",
    "Ranges",
    "TensorTrain",
    "Tucker",
    "WeightedCP",
    "jacobian_rank",
    "letters",
    "make_format",
    "of_cp",
    "of_tucker",
    "rank_a_mode",
    "register_format",
    "unfolded",
]


# -- The dense format: the tensor itself -------------------------------------------------------------------------------


class Dense(Format):
    """The tensor itself. With M = 1, dense fine-tuning (the paper's table 1, first row)."""

    title = "dense"
    zero = "dense"

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"dense": self.sizes}

    @property
    def formula(self) -> str:
        modes, _ = letters(len(self.sizes), 0)
        return f"{modes}->{modes}"

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        block = arrays["dense"]
        for axis, bounds in enumerate(ranges):
            block = rows_of(block, bounds, axis)
        return block

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        return {"dense": tensor}

    def summed(self, terms: int) -> Self:
        return self

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        return self._shorter_side(modes)

    def matrix_rank(self) -> int:
        return min(self.sizes)

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return math.prod(sizes)

    def useful_rank(self) -> None:
        return None

    @property
    def products(self) -> int:
        return 0


# -- CP: sums of outer products ----------------------------------------------------------------------------------------


class CP(Format):
    """``sum_r outer(A_1[:, r], …, A_M[:, r])``: identity core; M = 2 is LoRA."""

    title = "CP"
    zero = "factor0"
    unfolds = True

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        assert isinstance(rank, int)  # Config accepts no other rank
        self.rank = rank
        return {f"factor{mode}": (size, rank) for mode, size in enumerate(self.sizes)}

    @property
    def formula(self) -> str:
        modes, bond = letters(len(self.sizes), 1)
        return ",".join(mode + bond for mode in modes) + "->" + modes

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        factors = [rows_of(arrays[f"factor{mode}"], bounds) for mode, bounds in enumerate(ranges)]
        return cp_tensor(backend, arrays.get("weights"), factors)

    def inner(self, modes: int) -> int | None:
        return self.rank

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        factors = [arrays[f"factor{mode}"] for mode in range(len(self.sizes))]
        if "weights" in arrays:
            factors[0] = factors[0] * arrays["weights"]

        def half(first: int, stop: int, bounds: tuple[int, int]) -> Array:
            def on_box(box: Ranges) -> Array:
                return khatri_rao(backend, [rows_of(*pair) for pair in zip(factors[first:stop], box, strict=True)])

            return along(backend, self.sizes[first:stop], *bounds, on_box)

        left, right = half(0, cut.modes, cut.rows), half(cut.modes, len(factors), cut.cols)
        return left, backend.matrix_transpose(right)

    def stored_halves(self, cut: Cut) -> tuple[str, str] | None:
        if len(self.sizes) != 2 or "weights" in self.shapes:
            return None
        whole = (cut.rows, cut.cols) == ((0, self.sizes[0]), (0, self.sizes[1]))
        return ("factor0", "factor1") if whole else None

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        factors = [arrays[f"factor{mode}"] for mode in range(len(self.sizes))]
        weights = arrays.get("weights")
        gradients: dict[str, Array] = {}
        for mode, factor in enumerate(factors):
            others = factors[:mode] + factors[mode + 1 :]
            rows = unfolded(backend, tensor, mode)
            # With a single mode, each component is a column itself: the tensor is the gradient of all r columns.
            product = backend.matmul(rows, khatri_rao(backend, others)) if others else rows + 0.0 * factor
            if mode == 0 and weights is not None:
                gradients["weights"] = backend.sum(factor * product, axis=0)
            gradients[f"factor{mode}"] = product if weights is None else product * weights
        return gradients

    def boxed(self, lengths: Sequence[int]) -> Self:
        boxed = copy.copy(self)
        boxed.sizes = tuple(lengths)
        return boxed

    def summed(self, terms: int) -> Self:
        return type(self)(self.sizes, terms * self.rank)

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        return min(self.rank, self._shorter_side(modes))

    def matrix_rank(self) -> int:
        return min(self.rank, *self.sizes)

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return of_cp(sizes, times * self.rank**power)

    def useful_rank(self) -> int:
        return math.prod(self.sizes) // max(self.sizes)


class WeightedCP(CP):
    """CP with a weight per component: a diagonal core."""

    title = "weighted CP"
    ones = frozenset({"weights"})

    @property
    def formula(self) -> str:
        modes, bond = letters(len(self.sizes), 1)
        return ",".join([bond, *(mode + bond for mode in modes)]) + "->" + modes

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"weights": (rank,), **super().array_shapes(rank)}  # type: ignore[dict-item]


# -- Batched CP: one CP tensor for each index of the leading mode ------------------------------------------------------


class BatchedCP(Format):
    """``T[b] = sum_r outer(A_2[b, :, r], …, A_M[b, :, r])``: of order 3, a low-rank matrix for each b."""

    title = "batched CP"

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        assert isinstance(rank, int)  # checked_rank allows nothing else
        self.rank = rank
        batch, *others = self.sizes
        if len(others) < 2:
            # A batch of numbers or vectors needs no sum of components: it is stored as it is.
            return {f"factor{len(others)}": self.sizes}
        return {f"factor{mode}": (batch, size, rank) for mode, size in enumerate(others, 1)}

    @property
    def formula(self) -> str:
        modes, bond = letters(len(self.sizes), 1)
        if len(modes) < 3:
            return f"{modes}->{modes}"
        return ",".join(modes[0] + mode + bond for mode in modes[1:]) + "->" + modes

    def matrix_rank(self) -> int:
        return min(self.sizes)  # of order 2, each row is a free vector

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        batch, *others = sizes
        return batch * of_cp(others, times * self.rank**power) if others else batch

    def useful_rank(self) -> int:
        return math.prod(self.sizes[1:]) // max(self.sizes[1:], default=1)


# -- Tucker: a core, and a factor for each mode or for some of the modes -----------------------------------------------


class Tucker(Format):
    """``core x_1 A_1 … x_M A_M`` with ``r_m = min(r, d_m)``: the paper's equation 3, LoRTA."""

    title = "Tucker"
    unfolds = True

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        return rank_a_mode(name, rank, order, order, optional=True)

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        wanted = (rank,) * len(self.sizes) if isinstance(rank, int) else rank
        self.core = tuple(d if r is None else min(r, d) for r, d in zip(wanted, self.sizes, strict=True))
        self.modes = [mode for mode, r in enumerate(wanted) if r is not None]
        return {"core": self.core} | {f"factor{mode}": (self.sizes[mode], self.core[mode]) for mode in self.modes}

    @property
    def zero(self) -> str:
        return f"factor{self.modes[0]}" if self.modes else "core"

    @property
    def formula(self) -> str:
        modes, bonds = letters(len(self.sizes), len(self.sizes))
        core = "".join(bonds[mode] if mode in self.modes else modes[mode] for mode in range(len(self.sizes)))
        return ",".join([core, *(modes[mode] + bonds[mode] for mode in self.modes)]) + "->" + modes

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        return self._expanded(backend, arrays, arrays["core"], range(len(self.sizes)), ranges)

    def _expanded(
        self, backend: Backend, arrays: Mapping[str, Array], core: Array, modes: Sequence[int | None], ranges: Ranges
    ) -> Array:
        """Multiply a core by the rows of its modes' factors, where None in ``modes`` marks an axis without a mode."""
        factors: list[Array | None] = []
        bounds = iter(ranges)
        for axis, mode in enumerate(modes):
            factors.append(None)
            if mode in self.modes:
                factors[-1] = rows_of(arrays[f"factor{mode}"], next(bounds))
            elif mode is not None:
                core = rows_of(core, next(bounds), axis)
        return tucker_tensor(backend, core, factors)

    def _inner(self, modes: int) -> tuple[int, bool] | None:
        """Return the number of columns of L and whether the core belongs to L (True) or R (False), or None."""
        core, order = self.core, len(self.sizes)
        choices: list[tuple[int, bool]] = []
        # The half without the core is the Kronecker product of its factors, so each of its modes needs a factor.
        if all(mode in self.modes for mode in range(modes, order)):
            choices.append((math.prod(core[modes:]), True))
        if all(mode in self.modes for mode in range(modes)):
            choices.append((math.prod(core[:modes]), False))
        # The core goes to the side that leaves the smaller inner dimension.
        return min(choices, default=None)

    def inner(self, modes: int) -> int | None:
        choice = self._inner(modes)
        return None if choice is None else choice[0]

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        choice = self._inner(cut.modes)
        assert choice is not None
        inner, core_left = choice
        before, after = range(cut.modes), range(cut.modes, len(self.sizes))

        def bare(modes: range, bounds: tuple[int, int]) -> Array:
            def on_box(box: Ranges) -> Array:
                factors = [rows_of(arrays[f"factor{m}"], where) for m, where in zip(modes, box, strict=True)]
                return kronecker_tensor(backend, factors)

            return along(backend, [self.sizes[m] for m in modes], *bounds, on_box)

        def cored(modes: range, bounds: tuple[int, int]) -> Array:
            sizes, ranks = ([every[m] for m in modes] for every in (self.sizes, self.core))
            # The inner axis, over which the halves are contracted, is the last of L and the first of R.
            shape, axes = ([*ranks, inner], [*modes, None]) if core_left else ([inner, *ranks], [None, *modes])
            core = backend.reshape(arrays["core"], shape)

            def on_box(box: Ranges) -> Array:
                half = self._expanded(backend, arrays, core, axes, box)
                return backend.reshape(half, (-1, inner) if core_left else (inner, -1))

            return along(backend, sizes, *bounds, on_box, axis=0 if core_left else 1)

        if core_left:
            return cored(before, cut.rows), backend.matrix_transpose(bare(after, cut.cols))
        return bare(before, cut.rows), cored(after, cut.cols)

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        turned = {mode: backend.matrix_transpose(arrays[f"factor{mode}"]) for mode in self.modes}

        def projected(skipped: int | None) -> Array:
            factors = [None if mode == skipped else turned.get(mode) for mode in range(len(self.sizes))]
            return tucker_tensor(backend, tensor, factors)

        gradients = {"core": projected(None)}
        for mode in self.modes:
            rows, core = unfolded(backend, projected(mode), mode), unfolded(backend, arrays["core"], mode)
            gradients[f"factor{mode}"] = backend.matmul(rows, backend.matrix_transpose(core))
        return gradients

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        core = math.prod(self.core[mode] for mode in modes)
        return min(core, math.prod(self.core) // core, self._shorter_side(modes))

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        for mode in self.modes:
            yield [mode], self.core[mode]

    def matrix_rank(self) -> int:
        return min(self.core)

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return of_tucker(sizes, [times * rank**power for rank in self.core])

    def useful_rank(self) -> int:
        return max((self.sizes[mode] for mode in self.modes), default=1)

    @property
    def products(self) -> int:
        return self.core[-1] if self.modes else 0


# -- Tensor trains: products of slices of three-way cores --------------------------------------------------------------


class TensorTrain(Format):
    """``G_1[i_1] G_2[i_2] … G_M[i_M]``: products of slices of three-way cores; ranks are capped by the sizes."""

    title = "TT"
    zero = "core0"
    unfolds = True

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        return rank_a_mode(name, rank, order, order - 1)

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        inner = len(self.sizes) - 1
        wanted = (rank,) * inner if isinstance(rank, int) else rank
        left = itertools.accumulate(self.sizes[:-1], lambda a, b: a * b)
        right = reversed(list(itertools.accumulate(reversed(self.sizes[1:]), lambda a, b: a * b)))
        # A rank is never None here: a train has a bond between any two neighboring modes, and Config checks this.
        cut = [min(r or 1, before, after) for r, before, after in zip(wanted, left, right, strict=True)]
        self.ranks: tuple[int, ...] = (1, *cut, 1)
        return {f"core{mode}": (self.ranks[mode], size, self.ranks[mode + 1]) for mode, size in enumerate(self.sizes)}

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        modes, bonds = letters(order, order + 1)
        return ",".join(bonds[mode] + modes[mode] + bonds[mode + 1] for mode in range(order)) + "->" + modes

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        return tt_tensor(backend, [rows_of(arrays[f"core{mode}"], bounds, 1) for mode, bounds in enumerate(ranges)])

    def inner(self, modes: int) -> int | None:
        return self.ranks[modes]

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        cores = [arrays[f"core{mode}"] for mode in range(len(self.sizes))]

        def part(first: int, box: Ranges) -> list[Array]:
            return [rows_of(core, where, 1) for core, where in zip(cores[first:], box, strict=False)]

        def left(box: Ranges) -> Array:
            return tt_left(backend, part(0, box))

        def right(box: Ranges) -> Array:
            return tt_right(backend, part(cut.modes, box))

        return (
            along(backend, self.sizes[: cut.modes], *cut.rows, left),
            along(backend, self.sizes[cut.modes :], *cut.cols, right, axis=1),
        )

    def boxed(self, lengths: Sequence[int]) -> Self:
        boxed = copy.copy(self)
        boxed.sizes = tuple(lengths)
        return boxed

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        cores = [arrays[f"core{mode}"] for mode in range(len(self.sizes))]
        gradients = {}
        # The tensor contracted with all cores before this one: (r, d_m, …, d_M).
        rest = backend.reshape(tensor, (1, math.prod(self.sizes)))
        for mode, core in enumerate(cores):
            left, size, right = core.shape
            rows = backend.reshape(rest, (left * size, math.prod(self.sizes[mode + 1 :])))
            after = None
            for later in reversed(cores[mode + 1 :]):
                flat = backend.reshape(later, (-1, later.shape[2]))
                after = flat if after is None else backend.matmul(flat, after)
                after = backend.reshape(after, (later.shape[0], -1))
            gradients[f"core{mode}"] = (
                backend.reshape(rows, core.shape)
                if after is None
                else backend.reshape(backend.matmul(rows, backend.matrix_transpose(after)), core.shape)
            )
            rest = backend.matmul(backend.matrix_transpose(backend.reshape(core, (left * size, right))), rows)
        return gradients

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        # A cut crosses every bond whose two modes are on different sides.
        chosen = set(modes)
        bonds = [rank for mode, rank in enumerate(self.ranks[1:-1]) if (mode in chosen) != (mode + 1 in chosen)]
        return min(math.prod(bonds), self._shorter_side(modes))

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        for mode in range(len(self.sizes) - 1):
            yield list(range(mode + 1)), self.ranks[mode + 1]

    def matrix_rank(self) -> int:
        return self.ranks[1]

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return of_train(sizes, [times * rank**power for rank in self.ranks[1:-1]])

    def useful_rank(self) -> int:
        left, most, total = 1, 1, math.prod(self.sizes)
        for size in self.sizes:
            left *= size
            most = max(most, min(left, total // left))
        return most

    @property
    def products(self) -> int:
        return max(self.ranks)


# -- Circuits: products of gates, each of which acts on two axes of a matrix's columns (QuanTA) ------------------------


# Modes, of 8 axes: 28 gates.
_MOST = 16


class Circuit(Format):
    """A matrix as a product of gates: one for every two axes, in the order (0, 1), (0, 2), …, (1, 2), ….

    The first half of the modes are the digits of the rows, the second half those of the columns: axis k turns from
    column digit k to row digit k in the first gate that acts on it. With an odd number of modes, the last row digit has
    no column digit. A gate on axes k and l has the shape (row k, row l, the current k, the current l). A single axis
    has one gate, the matrix itself. The rank has no meaning.
    """

    title = "circuit"

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        if order > _MOST:
            raise ConfigError(
                f"format={name!r} has a gate for every two of its axes, and takes up to {_MOST} modes; got "
                f"order={order}: use fewer, larger digits"
            )
        return super().checked_rank(name, rank, order)

    @staticmethod
    def _gates(order: int) -> list[list[tuple[str, int]]]:
        """Return the indices of each gate, outputs before inputs: ("mode", m), or (bond, row digit)."""
        axes = -(-order // 2)
        pairs: list[tuple[int, ...]] = list(itertools.combinations(range(axes), 2)) or [(0,)]
        uses = collections.Counter(axis for pair in pairs for axis in pair)
        # The current index of each axis: the column digit, or None for a row digit without one.
        current = {axis: ("mode", axes + axis) for axis in range(order - axes)}
        gates = []
        for number, pair in enumerate(pairs):
            before = [current[axis] for axis in pair if axis in current]
            for axis in pair:
                uses[axis] -= 1
                current[axis] = (f"bond{number}", axis) if uses[axis] else ("mode", axis)
            gates.append([*(current[axis] for axis in pair), *before])
        return gates

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        # A bond has the size of its axis's row digit, which is mode ``axis``.
        return {
            f"gate{number}": tuple(self.sizes[mode] for _, mode in indices)
            for number, indices in enumerate(self._gates(len(self.sizes)))
        }

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        gates = self._gates(order)
        bonds = list(dict.fromkeys(index for gate in gates for index in gate if index[0] != "mode"))
        modes, others = letters(order, len(bonds))
        letter = dict(zip(bonds, others, strict=True)) | {("mode", m): mode for m, mode in enumerate(modes)}
        return ",".join("".join(letter[index] for index in gate) for gate in gates) + "->" + modes

    def useful_rank(self) -> None:
        return None


# -- Permuted: modes in another order than the vector's, or of several digits ------------------------------------------


# The tensor has the sizes of the fold, whose ``vec`` is the group's vector. Another format computes it, its modes in
# the order of ``axes``. A mode of several digits, such as one of the row's and one of the column's, has the product of
# their sizes, the first digit slow. All other modules see a format like any other.


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
        self.title, self.ones, self.unfolds = own.title, own.ones, own.unfolds
        self._order = [digit for axis in axes for digit in axis]
        self._back = tuple(self._order.index(digit) for digit in range(len(self._order)))
        # Planned here, so that a compiler that traces a call does not have to trace the planning.
        self._legs = own._planned_legs()

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
        tensor = self.own.tensor(backend, arrays, [cover.bounds for cover in covers])
        return backend.permute_dims(self._cropped(backend, tensor, covers), self._back)

    def turned(self, backend: Backend, tensor: Array) -> Array:
        """Return a tensor of the fold's sizes as one of the sizes of the format that makes it."""
        return backend.reshape(backend.permute_dims(tensor, tuple(self._order)), self.own.sizes)

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        return self.own.adjoint(backend, arrays, self.turned(backend, tensor))

    def _cover(self, axis: Sequence[int], ranges: Ranges) -> Cover:
        return covered([self.sizes[digit] for digit in axis], ranges)

    def _cropped(self, backend: Backend, array: Array, covers: Sequence[Cover], more: Sequence[int] = ()) -> Array:
        """Crop an array over the ranges of some modes, and over ``more`` axes, to the digits of the box."""
        shape = [length for cover in covers for length in cover.lengths]
        cut = tuple(part for cover in covers for part in cover.crop)
        reshaped = backend.reshape(array, (*shape, *more))
        return reshaped if all(part == slice(None) for part in cut) else reshaped[cut]

    # -- Unfoldings ----------------------------------------------------------------------------

    def _sides(self, modes: int) -> tuple[int, bool] | None:
        """Return where the modes split into rows and columns and whether rows come first, or None if nowhere."""
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
        """Compute a run of rows of L (the modes before ``place``), or of columns of R (the other modes)."""
        axes = self.axes[:place] if first else self.axes[place:]
        others = [(0, 1)] * (len(self.axes) - len(axes))
        order = [digit for axis in axes for digit in axis]
        back = [order.index(digit) for digit in digits]

        def on_box(box: Ranges) -> Array:
            known = dict(zip(digits, box, strict=True))
            covers = [self._cover(axis, [known[digit] for digit in axis]) for axis in axes]
            spans = [cover.bounds for cover in covers]
            ranges = [*spans, *others] if first else [*others, *spans]
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
        inner = self.own.summed(terms)
        return None if inner is None else type(self)(inner, self.sizes, self.axes)

    def _merged(self, sizes: Sequence[int]) -> list[int]:
        return [math.prod(sizes[digit] for digit in axis) for axis in self.axes]

    def rank_of_legs(self, legs: Sequence[tuple[int, int]]) -> int:
        rows, cols = (self._merged([leg[side] for leg in legs]) for side in (0, 1))
        return self.own.rank_of_legs(list(zip(rows, cols, strict=True)))

    def halves(self, legs: Legs) -> Halves:
        formula, size = self.own._parsed
        return Halves.of(formula, tuple(size.items()), self.axes, self.sizes, legs)

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        for modes, rank in self.own.bounded_unfoldings():
            yield [digit for mode in modes for digit in self.axes[mode]], rank

    def matrix_rank(self) -> int | None:
        return self.own.matrix_rank() if len(self.axes) == len(self.sizes) else None

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return self.own.freedom(self._merged(sizes), times, power)

    def useful_rank(self) -> int | None:
        return self.own.useful_rank()


# -- The formats by name -----------------------------------------------------------------------------------------------


FORMATS: Registry[Format] = Registry(
    "format",
    Format,
    {
        "dense": Dense,
        "cp": CP,
        "cp-weighted": WeightedCP,
        "tucker": Tucker,
        "tt": TensorTrain,
        "cp-batched": BatchedCP,
        "circuit": Circuit,
    },
)


def register_format(name: str, cls: type[Format]) -> None:
    """Register a tensor format under a name, for ``Config(format=name)`` and everything that takes a config.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.algebra.formats.Format`.

    Raises
    ------
    ConfigError
        If the name has another form, is built in, or registered by another module, or the class is not a subclass of
        Format.

    See Also
    --------
    tnadapt.testing.FormatContract : The tests that such a class must pass.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.algebra.formats import Format
    >>> class Three(Format):
    ...     formula = "ar,rs,sb->ab"
    ...     def array_shapes(self, rank):
    ...         return {"left": (self.sizes[0], rank), "middle": (rank, rank), "right": (rank, self.sizes[1])}
    >>> tna.register_format("three", Three)
    >>> tna.UpdatePlan(tna.Config(rank=2, format="three"), [(5, 7)]).num_parameters
    28
    """
    FORMATS.register(name, cls)


def make_format(name: str, sizes: Sequence[int], rank: Rank) -> Format:
    """Return the format with that name for a tensor of these sizes.

    Raises
    ------
    ConfigError
        If there is no format with that name.

    Examples
    --------
    >>> make_format("tt", (4, 5, 6), 100).shapes
    {'core0': (1, 4, 4), 'core1': (4, 5, 6), 'core2': (6, 6, 1)}
    """
    return FORMATS.find(name)(sizes, rank)

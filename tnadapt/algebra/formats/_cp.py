"""CP: sums of outer products; the core is the identity, or diagonal with a weight per component."""

from __future__ import annotations

import collections
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from tnadapt.algebra.products import cp_tensor, khatri_rao
from tnadapt.algebra.unfolding import Cut, along
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError

from ._format import Format, Ranges, Rank, letters, of_cp, rows_of, unfolded

__all__ = ["CP", "BatchedCP", "Circuit", "Dense", "WeightedCP"]


# -- CP: sums of outer products; the core is the identity, or diagonal with a weight per component ---------------------


class CP(Format):
    """``sum_r outer(A_1[:, r], …, A_M[:, r])``: identity core; M = 2 is LoRA."""

    title = "CP"
    zero = "factor0"
    unfolds = True
    diagram = "star"

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
        found: dict[str, Array] = {}
        for mode, factor in enumerate(factors):
            others = factors[:mode] + factors[mode + 1 :]
            rows = unfolded(backend, tensor, mode)
            # With a single mode, each component is a column itself: the tensor is the gradient of all r columns.
            product = backend.matmul(rows, khatri_rao(backend, others)) if others else rows + 0.0 * factor
            if mode == 0 and weights is not None:
                found["weights"] = backend.sum(factor * product, axis=0)
            found[f"factor{mode}"] = product if weights is None else product * weights
        return found

    def boxed(self, lengths: Sequence[int]) -> Self:
        found = copy.copy(self)
        found.sizes = tuple(lengths)
        return found

    def summed(self, terms: int) -> Self:
        return type(self)(self.sizes, terms * self.rank)

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        rows = math.prod(self.sizes[mode] for mode in modes)
        return min(self.rank, rows, math.prod(self.sizes) // rows)

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        order = len(self.sizes)
        for size in range(1, order // 2 + 1):
            for modes in itertools.islice(itertools.combinations(range(order), size), 16):
                yield list(modes), self.rank

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


# -- A batch of CP tensors: one for each index of the leading mode, with factors of its own ----------------------------


class BatchedCP(Format):
    """``T[b] = sum_r outer(A_2[b, :, r], …, A_M[b, :, r])``: of order 3, a low-rank matrix for each b."""

    title = "batched CP"

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        assert isinstance(rank, int)  # checked_rank allows nothing else
        self.rank = rank
        batch, *others = self.sizes
        if len(others) < 2:
            # A batch of numbers or of vectors, which are sums of no more than one of their kind.
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


# -- The dense format: the tensor itself -------------------------------------------------------------------------------


class Dense(Format):
    """The tensor itself. With M = 1, dense fine-tuning (the paper's table 1, first row)."""

    title = "dense"
    zero = "dense"
    diagram = "dense"

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
        rows = math.prod(self.sizes[mode] for mode in modes)
        return min(rows, math.prod(self.sizes) // rows)

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        return iter(())

    def matrix_rank(self) -> int:
        return min(self.sizes)

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return math.prod(sizes)

    def useful_rank(self) -> None:
        return None

    @property
    def products(self) -> int:
        return 0


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
        """Return the indices of each gate, those after it before those before it: ("mode", m), or (bond, row digit)."""
        axes = -(-order // 2)
        pairs: list[tuple[int, ...]] = list(itertools.combinations(range(axes), 2)) or [(0,)]
        uses = collections.Counter(axis for pair in pairs for axis in pair)
        # What each axis is so far: the column digit, or nothing for a row digit without one.
        current = {axis: ("mode", axes + axis) for axis in range(order - axes)}
        found = []
        for number, pair in enumerate(pairs):
            before = [current[axis] for axis in pair if axis in current]
            for axis in pair:
                uses[axis] -= 1
                current[axis] = (f"bond{number}", axis) if uses[axis] else ("mode", axis)
            found.append([*(current[axis] for axis in pair), *before])
        return found

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        # A bond has the size of its axis's row digit, which is mode ``axis``.
        return {
            f"gate{number}": tuple(self.sizes[mode] for _, mode in own)
            for number, own in enumerate(self._gates(len(self.sizes)))
        }

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        gates = self._gates(order)
        bonds = list(dict.fromkeys(index for own in gates for index in own if index[0] != "mode"))
        modes, others = letters(order, len(bonds))
        letter = dict(zip(bonds, others, strict=True)) | {("mode", m): own for m, own in enumerate(modes)}
        return ",".join("".join(letter[index] for index in own) for own in gates) + "->" + modes

    def useful_rank(self) -> None:
        return None

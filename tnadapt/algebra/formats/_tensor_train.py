"""Tensor trains: products of slices of three-way cores."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ..products import tt_left, tt_right, tt_tensor
from ..unfolding import Cut, along
from ._contraction import letters
from ._dimensions import of_train
from ._format import Format, Ranges, Rank, rank_a_mode, rows_of

__all__ = ["TensorTrain"]


class TensorTrain(Format):
    """``G_1[i_1] G_2[i_2] … G_M[i_M]``: products of slices of three-way cores; ranks are capped by the sizes."""

    title = "TT"
    zero = "core0"
    unfolds = True
    diagram = "chain"

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
        found = copy.copy(self)
        found.sizes = tuple(lengths)
        return found

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        cores = [arrays[f"core{mode}"] for mode in range(len(self.sizes))]
        found = {}
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
            found[f"core{mode}"] = (
                backend.reshape(rows, core.shape)
                if after is None
                else backend.reshape(backend.matmul(rows, backend.matrix_transpose(after)), core.shape)
            )
            rest = backend.matmul(backend.matrix_transpose(backend.reshape(core, (left * size, right))), rows)
        return found

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        rows = math.prod(self.sizes[mode] for mode in modes)
        # A cut crosses every bond whose two modes are on different sides.
        chosen = set(modes)
        bonds = [rank for mode, rank in enumerate(self.ranks[1:-1]) if (mode in chosen) != (mode + 1 in chosen)]
        return min(math.prod(bonds), rows, math.prod(self.sizes) // rows)

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

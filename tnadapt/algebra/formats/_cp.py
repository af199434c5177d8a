"""CP: sums of outer products; the core is the identity, or diagonal with a weight per component."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ..factor_products import khatri_rao
from ..products import cp_tensor
from ..unfolding import Cut, along
from ._contraction import letters
from ._dimensions import of_cp
from ._format import Format, Ranges, Rank, rows_of, unfolded

__all__ = ["CP", "WeightedCP"]


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

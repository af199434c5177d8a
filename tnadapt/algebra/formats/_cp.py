"""CP: sums of outer products of vectors, with and without a weight each."""

from __future__ import annotations

from collections.abc import Mapping

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ..products import cp_tensor, khatri_rao
from ..unfolding import Cut, along
from ._format import Format, Ranges, Rank, rows_of, unfolded

__all__ = ["CP", "WeightedCP"]


class CP(Format):
    """``sum_r outer(A_1[:, r], …, A_M[:, r])``: identity core; M = 2 is LoRA."""

    zero = "factor0"

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        assert isinstance(rank, int)  # Config lets no other rank through
        self.rank = rank
        return {f"factor{mode}": (size, rank) for mode, size in enumerate(self.sizes)}

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

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        factors = [arrays[f"factor{mode}"] for mode in range(len(self.sizes))]
        weights = arrays.get("weights")
        found: dict[str, Array] = {}
        for mode, factor in enumerate(factors):
            others = factors[:mode] + factors[mode + 1 :]
            rows = unfolded(backend, tensor, mode)
            # Where there is one mode only, a component is its column itself.
            product = backend.matmul(rows, khatri_rao(backend, others)) if others else rows + 0.0 * factor
            if mode == 0 and weights is not None:
                found["weights"] = backend.sum(factor * product, axis=0)
            found[f"factor{mode}"] = product if weights is None else product * weights
        return found

    def paths(self, name: str) -> int:
        return self.rank

    @property
    def total_paths(self) -> int:
        return self.rank


class WeightedCP(CP):
    """CP with a weight a component: the diagonal core."""

    ones = frozenset({"weights"})

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"weights": (rank,), **super()._shapes(rank)}  # type: ignore[dict-item]

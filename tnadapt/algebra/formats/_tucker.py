"""Tucker: a core C, and a plane factor A_m for each mode or for some of the modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ..products import kronecker_tensor, tucker_tensor
from ..unfolding import Cut, along
from ._contraction import letters
from ._dimensions import of_tucker
from ._format import Format, Ranges, Rank, rank_a_mode, rows_of, unfolded

__all__ = ["Tucker"]


class Tucker(Format):
    """``core x_1 A_1 … x_M A_M`` with ``r_m = min(r, d_m)``: the paper's equation 3, LoRTA."""

    title = "Tucker"
    unfolds = True
    diagram = "core"

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
        """Multiply a core by the rows of its modes' factors; None in ``modes`` marks an axis that is not a mode."""
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
        """Return the number of columns of L and whether the core belongs to L (True) or R (False), or None.

        The core goes to the side that leaves the smaller inner dimension.
        """
        core, order = self.core, len(self.sizes)
        found: list[tuple[int, bool]] = []
        # The half without the core is the Kronecker product of its factors, so each of its modes needs a factor.
        if all(mode in self.modes for mode in range(modes, order)):
            found.append((math.prod(core[modes:]), True))
        if all(mode in self.modes for mode in range(modes)):
            found.append((math.prod(core[:modes]), False))
        return min(found, default=None)

    def inner(self, modes: int) -> int | None:
        found = self._inner(modes)
        return None if found is None else found[0]

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        found = self._inner(cut.modes)
        assert found is not None
        inner, core_left = found
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
                made = self._expanded(backend, arrays, core, axes, box)
                return backend.reshape(made, (-1, inner) if core_left else (inner, -1))

            return along(backend, sizes, *bounds, on_box, axis=0 if core_left else 1)

        if core_left:
            return cored(before, cut.rows), backend.matrix_transpose(bare(after, cut.cols))
        return bare(before, cut.rows), cored(after, cut.cols)

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        turned = {mode: backend.matrix_transpose(arrays[f"factor{mode}"]) for mode in self.modes}

        def projected(skipped: int | None) -> Array:
            factors = [None if mode == skipped else turned.get(mode) for mode in range(len(self.sizes))]
            return tucker_tensor(backend, tensor, factors)

        found = {"core": projected(None)}
        for mode in self.modes:
            rows, core = unfolded(backend, projected(mode), mode), unfolded(backend, arrays["core"], mode)
            found[f"factor{mode}"] = backend.matmul(rows, backend.matrix_transpose(core))
        return found

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        rows = math.prod(self.sizes[mode] for mode in modes)
        core = math.prod(self.core[mode] for mode in modes)
        return min(core, math.prod(self.core) // core, rows, math.prod(self.sizes) // rows)

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

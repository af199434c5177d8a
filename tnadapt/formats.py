"""What one split of one group is made of: dense, CP, Tucker or a tensor train.

One class a format, each with two questions: which arrays, and what tensor do they make on a box. A new
format is one more class and one more line in :data:`FORMATS`; :class:`tnadapt.testing.FormatContract` checks
it against its own whole tensor. Paper symbols: C the core (``core``), A_m the plane factors (``factor0`` …),
r the rank, d_m the sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from .backends import Backend
from .backends.base import Array
from .errors import ConfigError
from .products import cp_tensor, khatri_rao, kronecker_tensor, tt_left, tt_right, tt_tensor, tucker_tensor
from .unfolding import Cut, along

__all__ = ["FORMATS", "Format"]

Rank = int | tuple[int | None, ...]
Ranges = Sequence[tuple[int, int]]


class Format:
    """One way of making a tensor of given sizes from a few arrays.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M``.
    rank : int or tuple
        As in :class:`~tnadapt.Config`.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        The arrays, in order.
    zero : str
        The array that is zero at the start of a linear adapter: the factor of the leading mode.
    ones : frozenset of str
        Arrays that start at one.

    Examples
    --------
    >>> FORMATS["cp"]((5, 7), 2).shapes
    {'factor0': (5, 2), 'factor1': (7, 2)}
    """

    zero: str
    ones: frozenset[str] = frozenset()

    def __init__(self, sizes: Sequence[int], rank: Rank) -> None:
        self.sizes = tuple(sizes)
        self.shapes: dict[str, tuple[int, ...]] = self._shapes(rank)

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        """The tensor on a box.

        Parameters
        ----------
        backend : Backend
            Of the arrays.
        arrays : mapping of str to array
            Of the shapes in ``shapes``.
        ranges : sequence of (int, int)
            Start and stop in every mode.

        Returns
        -------
        array
            Of the box's sizes.
        """
        raise NotImplementedError

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        """The gradient of ``<tensor, T>`` with respect to each array, T being what the arrays make.

        T is linear in each array, so this is the adjoint of each of these maps, the other arrays held.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        tensor : array, shape (d_1, …, d_M)

        Returns
        -------
        dict of str to array
            In the shapes of ``shapes``.
        """
        raise NotImplementedError

    def inner(self, modes: int) -> int | None:
        """How many columns L has where the first ``modes`` modes are rows and the tensor is ``L R``; None for no such.

        ``1 <= modes < M``.
        """
        return None

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        """L and R of a part of an unfolding, where :meth:`inner` says that there are such.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        cut : Cut
            Which modes are rows, and which rows and columns are wanted.

        Returns
        -------
        (array, array)
            Of shapes (rows, inner) and (inner, columns); their product is that part.
        """
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Elements of all arrays."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def paths(self, name: str) -> int:
        """How many elements of one array each element of the tensor is a sum over."""
        raise NotImplementedError

    @property
    def total_paths(self) -> int:
        """How many products of one element of each array an element of the tensor is a sum of."""
        raise NotImplementedError


def unfolded(backend: Backend, tensor: Array, mode: int) -> Array:
    """One mode as rows, the others in order as columns."""
    moved = backend.moveaxis(tensor, mode, 0)
    return backend.reshape(moved, (tensor.shape[mode], math.prod(tensor.shape) // tensor.shape[mode]))


def _rows(array: Array, bounds: tuple[int, int], axis: int = 0) -> Array:
    start, stop = bounds
    if (start, stop) == (0, array.shape[axis]):
        return array
    return array[(*(slice(None),) * axis, slice(start, stop), ...)]


class Dense(Format):
    """The tensor itself. With M = 1, dense fine-tuning (the paper's table 1, first row)."""

    zero = "dense"

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"dense": self.sizes}

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        block = arrays["dense"]
        for axis, bounds in enumerate(ranges):
            block = _rows(block, bounds, axis)
        return block

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        return {"dense": tensor}

    def paths(self, name: str) -> int:
        return 1

    @property
    def total_paths(self) -> int:
        return 1


class CP(Format):
    """``sum_r outer(A_1[:, r], …, A_M[:, r])``: identity core; M = 2 is LoRA."""

    zero = "factor0"

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        assert isinstance(rank, int)  # Config lets no other rank through
        self.rank = rank
        return {f"factor{mode}": (size, rank) for mode, size in enumerate(self.sizes)}

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        factors = [_rows(arrays[f"factor{mode}"], bounds) for mode, bounds in enumerate(ranges)]
        return cp_tensor(backend, arrays.get("weights"), factors)

    def inner(self, modes: int) -> int | None:
        return self.rank

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        factors = [arrays[f"factor{mode}"] for mode in range(len(self.sizes))]
        if "weights" in arrays:
            factors[0] = factors[0] * arrays["weights"]

        def half(first: int, stop: int, bounds: tuple[int, int]) -> Array:
            def on_box(box: Ranges) -> Array:
                return khatri_rao(backend, [_rows(*pair) for pair in zip(factors[first:stop], box, strict=True)])

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


class Tucker(Format):
    """``core x_1 A_1 … x_M A_M`` with ``r_m = min(r, d_m)``: the paper's equation 3, LoRTA."""

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        wanted = (rank,) * len(self.sizes) if isinstance(rank, int) else rank
        self.core = tuple(d if r is None else min(r, d) for r, d in zip(wanted, self.sizes, strict=True))
        self.modes = [mode for mode, r in enumerate(wanted) if r is not None]
        self.zero = f"factor{self.modes[0]}" if self.modes else "core"
        return {"core": self.core} | {f"factor{mode}": (self.sizes[mode], self.core[mode]) for mode in self.modes}

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        return self._expanded(backend, arrays, arrays["core"], range(len(self.sizes)), ranges)

    def _expanded(
        self, backend: Backend, arrays: Mapping[str, Array], core: Array, modes: Sequence[int | None], ranges: Ranges
    ) -> Array:
        """A core times the rows of its modes' factors; ``modes`` has None for an axis that is no mode, and stays."""
        factors: list[Array | None] = []
        bounds = iter(ranges)
        for axis, mode in enumerate(modes):
            factors.append(None)
            if mode in self.modes:
                factors[-1] = _rows(arrays[f"factor{mode}"], next(bounds))
            elif mode is not None:
                core = _rows(core, next(bounds), axis)
        return tucker_tensor(backend, core, factors)

    def _inner(self, modes: int) -> tuple[int, bool] | None:
        """How many columns L has, and whether the core is in it: it goes where it is contracted with more."""
        core, order = self.core, len(self.sizes)
        found: list[tuple[int, bool]] = []
        # The half without the core is the Kronecker product of its factors: every mode has to have one.
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
                factors = [_rows(arrays[f"factor{m}"], where) for m, where in zip(modes, box, strict=True)]
                return kronecker_tensor(backend, factors)

            return along(backend, [self.sizes[m] for m in modes], *bounds, on_box)

        def cored(modes: range, bounds: tuple[int, int]) -> Array:
            sizes, ranks = ([every[m] for m in modes] for every in (self.sizes, self.core))
            # The axis over which the halves are contracted is the last one of L and the first one of R.
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

    def paths(self, name: str) -> int:
        return self.total_paths if name == "core" else self.core[int(name.removeprefix("factor"))]

    @property
    def total_paths(self) -> int:
        return math.prod(self.core[mode] for mode in self.modes)


class TensorTrain(Format):
    """``G_1[i_1] G_2[i_2] … G_M[i_M]``: products of slices of three-way cores; ranks cut to what the sizes allow."""

    zero = "core0"

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        inner = len(self.sizes) - 1
        wanted = (rank,) * inner if isinstance(rank, int) else rank
        left = itertools.accumulate(self.sizes[:-1], lambda a, b: a * b)
        right = reversed(list(itertools.accumulate(reversed(self.sizes[1:]), lambda a, b: a * b)))
        # Config lets no None through here: a train has a bond between any two modes.
        cut = [min(r or 1, before, after) for r, before, after in zip(wanted, left, right, strict=True)]
        self.ranks: tuple[int, ...] = (1, *cut, 1)
        return {f"core{mode}": (self.ranks[mode], size, self.ranks[mode + 1]) for mode, size in enumerate(self.sizes)}

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        return tt_tensor(backend, [_rows(arrays[f"core{mode}"], bounds, 1) for mode, bounds in enumerate(ranges)])

    def inner(self, modes: int) -> int | None:
        return self.ranks[modes]

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        cores = [arrays[f"core{mode}"] for mode in range(len(self.sizes))]

        def part(first: int, box: Ranges) -> list[Array]:
            return [_rows(core, where, 1) for core, where in zip(cores[first:], box, strict=False)]

        def left(box: Ranges) -> Array:
            return tt_left(backend, part(0, box))

        def right(box: Ranges) -> Array:
            return tt_right(backend, part(cut.modes, box))

        return (
            along(backend, self.sizes[: cut.modes], *cut.rows, left),
            along(backend, self.sizes[cut.modes :], *cut.cols, right, axis=1),
        )

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        cores = [arrays[f"core{mode}"] for mode in range(len(self.sizes))]
        found = {}
        # What is left of the tensor once all cores before this one are contracted: (r, d_m, …, d_M).
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

    def paths(self, name: str) -> int:
        mode = int(name.removeprefix("core"))
        return self.ranks[mode] * self.ranks[mode + 1]

    @property
    def total_paths(self) -> int:
        return math.prod(self.ranks)


FORMATS: dict[str, type[Format]] = {
    "dense": Dense,
    "cp": CP,
    "cp-weighted": WeightedCP,
    "tucker": Tucker,
    "tt": TensorTrain,
}


def make_format(name: str, sizes: Sequence[int], rank: Rank) -> Format:
    """The format of that name for a tensor of these sizes.

    Raises
    ------
    ConfigError
        If there is none of that name.

    Examples
    --------
    >>> make_format("tt", (4, 5, 6), 100).shapes
    {'core0': (1, 4, 4), 'core1': (4, 5, 6), 'core2': (6, 6, 1)}
    """
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name](sizes, rank)

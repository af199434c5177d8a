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
from .products import cp_tensor, khatri_rao, kronecker_tensor, tt_halves, tt_tensor, tucker_tensor

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

    def width(self, cut: int) -> int | None:
        """Inner size of :meth:`halves`; None where the tensor has no such form."""
        return None

    def halves(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges, cut: int) -> tuple[Array, Array]:
        """The tensor on a box as a matrix, the first ``cut`` modes by the others, in two factors.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        ranges : sequence of (int, int)
            As for :meth:`tensor`.
        cut : int
            ``0 < cut < M``.

        Returns
        -------
        left : array, shape (rows, width)
            Rows are the elements of the box's first modes, in C order.
        right : array, shape (cols, width)
            ``left @ right.T`` is the tensor reshaped. It depends on the ranges of the other modes alone.
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

    def width(self, cut: int) -> int | None:
        return self.rank

    def halves(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges, cut: int) -> tuple[Array, Array]:
        first, *others = (_rows(arrays[f"factor{mode}"], bounds) for mode, bounds in enumerate(ranges))
        weights = arrays.get("weights")
        factors = [first if weights is None else first * weights, *others]
        return khatri_rao(backend, factors[:cut]), khatri_rao(backend, factors[cut:])

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
        return self._expanded(backend, arrays, ranges, self.modes)

    def _expanded(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges, modes: Sequence[int]) -> Array:
        """The core cut to a box, and in some modes expanded by the factor there."""
        core = arrays["core"]
        factors: list[Array | None] = []
        for mode, bounds in enumerate(ranges):
            if mode in modes:
                factors.append(_rows(arrays[f"factor{mode}"], bounds))
            else:
                core = _rows(core, bounds, mode)
                factors.append(None)
        return tucker_tensor(backend, core, factors)

    def width(self, cut: int) -> int | None:
        # A mode of the columns without a factor would be as wide as itself.
        return math.prod(self.core[cut:]) if all(m in self.modes for m in range(cut, len(self.sizes))) else None

    def halves(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges, cut: int) -> tuple[Array, Array]:
        sizes = [stop - start for start, stop in ranges]
        whole = [(0, rank) for rank in self.core[cut:]]
        left = self._expanded(backend, arrays, [*ranges[:cut], *whole], [mode for mode in self.modes if mode < cut])
        cols = [_rows(arrays[f"factor{mode}"], ranges[mode]) for mode in range(cut, len(sizes))]
        width = math.prod(self.core[cut:])
        return backend.reshape(left, (math.prod(sizes[:cut]), width)), kronecker_tensor(backend, cols)

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

    def width(self, cut: int) -> int | None:
        return self.ranks[cut]

    def halves(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges, cut: int) -> tuple[Array, Array]:
        cores = [_rows(arrays[f"core{mode}"], bounds, 1) for mode, bounds in enumerate(ranges)]
        rows, cols = tt_halves(backend, cores, cut)
        return rows, backend.matrix_transpose(cols)

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

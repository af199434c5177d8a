"""Passes over tensors that are read block by block: memory-mapped arrays, and arrays of dask.

A pass sums sketches of the unfoldings, their Gram matrices, or a projection: each is a sum over blocks. Everything is
computed in double precision, one block at a time.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["ArrayPasses", "BlockPasses", "DaskPasses", "passes_over"]

Place = tuple[slice, ...]


class BlockPasses(abc.ABC):
    """A tensor that is read in blocks, each of which fits in memory several times.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def wide(self) -> np.dtype[Any]:
        """The dtype of the computation."""
        return np.dtype(np.complex128 if self.dtype.kind == "c" else np.float64)

    @abc.abstractmethod
    def sketches(self, tests: Mapping[int, Sequence[np.ndarray]]) -> tuple[dict[int, np.ndarray], float]:
        """Multiply unfoldings by the Khatri-Rao products of test matrices, in one pass.

        Parameters
        ----------
        tests : mapping of int to sequence of ndarray
            For each mode that is sketched, one matrix of shape (d_m, s) for each mode of the tensor; that of the mode
            itself is not used.

        Returns
        -------
        dict of int to ndarray, shape (d_m, s)
        float
            The squared Frobenius norm of the tensor.
        """

    @abc.abstractmethod
    def grams(self, modes: Collection[int]) -> tuple[dict[int, np.ndarray], float]:
        """Compute the Gram matrices of unfoldings, ``x @ x.conj().T``, and the squared Frobenius norm of the tensor."""

    @abc.abstractmethod
    def projected(self, factors: Mapping[int, np.ndarray]) -> np.ndarray:
        """Multiply by the conjugate transposes of matrices of shape (d_m, r_m) along some modes, in one pass."""

    @abc.abstractmethod
    def all_but_one(self, factors: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Compute :meth:`projected` with all factors but one, for each of them in turn, in one pass."""

    @abc.abstractmethod
    def distance(self, core: np.ndarray, factors: Sequence[np.ndarray]) -> float:
        """Compute the Frobenius distance from the Tucker tensor of a core and factors, in one pass."""


class ArrayPasses(BlockPasses):
    """Passes over an array that NumPy slices, such as a memory map.

    Parameters
    ----------
    array : array
    memory : int
        Bytes that a block may have in double precision.
    """

    def __init__(self, array: Any, memory: int) -> None:
        self.array, self.shape, self.dtype = array, tuple(array.shape), np.dtype(array.dtype)
        self.elements = max(1, memory // self.wide.itemsize)

    def _blocks(self, whole: int | None = None) -> Iterator[tuple[Place, np.ndarray]]:
        """Yield each block with its place; blocks have all of the mode ``whole``."""
        sides, left = list(self.shape), self.elements
        if whole is not None:
            left = max(1, left // self.shape[whole])
        # Whole last modes, so that a block is read from few places.
        for mode in range(len(sides) - 1, -1, -1):
            if mode != whole:
                sides[mode] = max(1, min(sides[mode], left))
                left = max(1, left // sides[mode])
        starts = [range(0, size, side) for size, side in zip(self.shape, sides, strict=True)]
        for corner in itertools.product(*starts):
            spans = zip(corner, sides, self.shape, strict=True)
            place = tuple(slice(start, min(start + side, size)) for start, side, size in spans)
            yield place, np.asarray(self.array[place], self.wide)

    def sketches(self, tests: Mapping[int, Sequence[np.ndarray]]) -> tuple[dict[int, np.ndarray], float]:
        found = {mode: np.zeros((self.shape[mode], own[0].shape[1]), self.wide) for mode, own in tests.items()}
        square = 0.0
        for place, block in self._blocks():
            square += float(np.vdot(block, block).real)
            for mode, own in tests.items():
                found[mode][place[mode]] += sketch_of(
                    block, mode, [one[at] for one, at in zip(own, place, strict=True)]
                )
        return found, square

    def grams(self, modes: Collection[int]) -> tuple[dict[int, np.ndarray], float]:
        found, square = dict[int, np.ndarray](), 0.0
        for number, mode in enumerate(modes):
            gram = np.zeros((self.shape[mode],) * 2, self.wide)
            for _, block in self._blocks(whole=mode):
                rows = np.moveaxis(block, mode, 0).reshape(self.shape[mode], -1)
                gram += rows @ rows.conj().T
                square += float(np.vdot(block, block).real) if number == 0 else 0.0
            found[mode] = gram
        return found, square

    def projected(self, factors: Mapping[int, np.ndarray]) -> np.ndarray:
        found = np.zeros([factors[m].shape[1] if m in factors else d for m, d in enumerate(self.shape)], self.wide)
        for place, block in self._blocks():
            own = {mode: factor[place[mode]] for mode, factor in factors.items()}
            found[tuple(slice(None) if m in factors else at for m, at in enumerate(place))] += _projected(block, own)
        return found

    def all_but_one(self, factors: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        found = {}
        for mode in factors:
            sizes = [factors[m].shape[1] if m in factors and m != mode else d for m, d in enumerate(self.shape)]
            found[mode] = np.zeros(sizes, self.wide)
        for place, block in self._blocks():
            for mode in factors:
                others = {m: factors[m][place[m]] for m in factors if m != mode}
                target = tuple(slice(None) if m in others else at for m, at in enumerate(place))
                found[mode][target] += _projected(block, others)
        return found

    def distance(self, core: np.ndarray, factors: Sequence[np.ndarray]) -> float:
        total = 0.0
        for place, block in self._blocks():
            made = core
            for mode, factor in enumerate(factors):
                made = _times(made, factor[place[mode]], mode)
            block = block - made
            total += float(np.vdot(block, block).real)
        return math.sqrt(total)


class DaskPasses(BlockPasses):
    """Passes over a dask array; dask computes them, in threads or on a cluster, as its user configured it.

    Parameters
    ----------
    array : dask.array.Array
    """

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, tuple(int(size) for size in array.shape), np.dtype(array.dtype)
        self.double = array.astype(self.wide)

    def _with_square(self, found: dict[int, Any]) -> tuple[dict[int, np.ndarray], float]:
        import dask

        # Together, so that every chunk is read once.
        found, square = dask.compute(found, (self.double * self.double.conj()).real.sum())
        return {mode: np.asarray(one) for mode, one in found.items()}, float(square)

    def sketches(self, tests: Mapping[int, Sequence[np.ndarray]]) -> tuple[dict[int, np.ndarray], float]:
        import dask.array as da

        found = {}
        for mode, own in tests.items():
            axes = [m for m in range(len(self.shape)) if m != mode]
            x = da.tensordot(self.double, da.from_array(own[axes[-1]], chunks=-1), axes=(axes[-1], 0))
            for axis in reversed(axes[:-1]):
                # The axes behind this one are the sketched mode, if it is one of them, and the components.
                behind = (slice(None), *[None] * (x.ndim - axis - 2), slice(None))
                x = (x * own[axis][behind]).sum(axis=axis)
            found[mode] = x
        return self._with_square(found)

    def grams(self, modes: Collection[int]) -> tuple[dict[int, np.ndarray], float]:
        import dask.array as da

        found = {}
        for mode in modes:
            others = [m for m in range(len(self.shape)) if m != mode]
            found[mode] = da.tensordot(self.double, self.double.conj(), axes=(others, others))
        return self._with_square(found)

    def _lazy(self, factors: Mapping[int, np.ndarray]) -> Any:
        x = self.double
        for mode in _shrinking(factors):
            x = self._along(x, factors[mode].conj().T, mode, factors[mode].shape[1:])
        return x

    def projected(self, factors: Mapping[int, np.ndarray]) -> np.ndarray:
        return np.asarray(self._lazy(factors).compute())

    def all_but_one(self, factors: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        import dask

        found = {mode: self._lazy({m: one for m, one in factors.items() if m != mode}) for mode in factors}
        (computed,) = dask.compute(found)
        return {mode: np.asarray(one) for mode, one in computed.items()}

    def distance(self, core: np.ndarray, factors: Sequence[np.ndarray]) -> float:
        import dask.array as da

        made = da.from_array(core, chunks=-1)
        for mode, factor in enumerate(factors):
            made = self._along(made, factor, mode, self.array.chunks[mode])
        left = self.double - made
        return math.sqrt(float((left * left.conj()).real.sum().compute()))

    @staticmethod
    def _along(x: Any, matrix: np.ndarray, mode: int, rows: Any) -> Any:
        import dask.array as da

        placed = da.from_array(matrix, chunks=(rows, x.chunks[mode]))
        return da.moveaxis(da.tensordot(placed, x, axes=(1, mode)), 0, mode)


def passes_over(array: Any, memory: int) -> BlockPasses | None:
    """Return the passes over an array that is read in blocks; None for one that is in memory."""
    if isinstance(array, np.memmap):
        return ArrayPasses(array, memory)
    if type(array).__module__.partition(".")[0] == "dask" and hasattr(array, "chunks"):
        return DaskPasses(array)
    return None


def sketch_of(block: np.ndarray, mode: int, tests: Sequence[np.ndarray]) -> np.ndarray:
    """Multiply an unfolding by the Khatri-Rao product of the other modes' matrices, without forming that."""
    axes = [m for m in range(block.ndim) if m != mode]
    found = np.tensordot(block, tests[axes[-1]], axes=(axes[-1], 0))
    for axis in reversed(axes[:-1]):
        behind = (slice(None), *[None] * (found.ndim - axis - 2), slice(None))
        found = (found * tests[axis][behind]).sum(axis=axis)
    return found


def _shrinking(factors: Mapping[int, np.ndarray]) -> list[int]:
    """Return the modes in the order in which the tensor shrinks most."""
    return sorted(factors, key=lambda mode: factors[mode].shape[1] / factors[mode].shape[0])


def _projected(block: np.ndarray, factors: Mapping[int, np.ndarray]) -> np.ndarray:
    for mode in _shrinking(factors):
        block = _times(block, factors[mode].conj().T, mode)
    return block


def _times(block: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, block, axes=(1, mode)), 0, mode)

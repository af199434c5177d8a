"""Tensors that are read block by block (memory maps, dask): passes over them, and compression to a small tensor.

A pass sums sketches of the unfoldings, their Gram matrices, or a projection: each is a sum over blocks. Everything is
computed in double precision, one block at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.products import cp_to_tensor
from tnadapt.errors import BackendError, ShapeError

from .fits import FitOutcome
from .linear_algebra import kept
from .sparse_tensor import check_range

# -- Passes ------------------------------------------------------------------------------------------------------------


_WHAT = "a tensor that is read in blocks"


class BlockPasses:
    """Passes over a tensor that is read block by block, each in double precision.

    Parameters
    ----------
    array : numpy.memmap or dask.array.Array
        dask computes one of its chunks after another, in threads or on a cluster, as its user configured it.
    memory : int
        Bytes that a block of a memory map may have in double precision.

    Raises
    ------
    ShapeError
        If there is no mode or no element, or a size is unknown.
    BackendError
        If it does not hold numbers.
    """

    def __init__(self, array: Any, memory: int) -> None:
        if not array.shape or any(size != size for size in array.shape):
            raise ShapeError(
                f"the tensor has shape {array.shape}; expected at least one mode, and known sizes: of a dask array, "
                "call compute_chunk_sizes()"
            )
        self.array, self.shape = array, tuple(int(size) for size in array.shape)
        self.dtype = np.dtype(array.dtype)
        if self.dtype.kind not in "biufc":
            raise BackendError(f"the tensor must hold numbers; got the dtype {self.dtype}")
        if not math.prod(self.shape):
            raise ShapeError(f"the tensor has shape {self.shape}, so there is nothing to decompose")
        #: The dtype of the computation.
        self.wide = np.dtype(np.complex128 if self.dtype.kind == "c" else np.float64)
        self.elements = max(1, memory // self.wide.itemsize)
        self._largest = 0.0

    def blocks(self, whole: int | None = None) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield each block with its position, with the mode ``whole`` undivided in all blocks."""
        chunks = getattr(self.array, "chunks", None) or self._sides(whole)
        spans = []
        for mode, size in enumerate(self.shape):
            edges = np.cumsum([0, *chunks[mode]]).tolist() if mode != whole else [0, size]
            spans.append([slice(*pair) for pair in itertools.pairwise(edges)])
        for place in itertools.product(*spans):
            yield place, np.asarray(self.array[place], self.wide)

    def _sides(self, whole: int | None) -> list[list[int]]:
        """Return the block sizes of a memory map along each mode."""
        sides: list[list[int]] = [[size] for size in self.shape]
        left = self.elements if whole is None else max(1, self.elements // self.shape[whole])
        # Keep the last modes whole, so that a block is read in few pieces.
        for mode in range(len(sides) - 1, -1, -1):
            if mode != whole:
                size = self.shape[mode]
                side = max(1, min(size, left))
                sides[mode] = [min(side, size - start) for start in range(0, size, side)]
                left = max(1, left // side)
        return sides

    def sketches(self, tests: Mapping[int, Sequence[np.ndarray]]) -> tuple[dict[int, np.ndarray], float]:
        """Multiply unfoldings by the Khatri-Rao products of test matrices, in one pass.

        Parameters
        ----------
        tests : mapping of int to sequence of ndarray, shape (d_m, n)
            For the unfolding of each mode, a matrix for every mode; its own is not used.

        Returns
        -------
        dict of int to ndarray, shape (d_mode, n)
        float
            Squared Frobenius norm of the tensor.
        """
        sketches = {
            mode: np.zeros((self.shape[mode], matrices[0].shape[1]), self.wide) for mode, matrices in tests.items()
        }
        square = 0.0
        for place, block in self.blocks():
            square += self._square(block)
            for mode, matrices in tests.items():
                sketches[mode][place[mode]] += khatri_rao_product(
                    block, mode, [matrix[at] for matrix, at in zip(matrices, place, strict=True)]
                )
        return sketches, square

    def grams(self) -> tuple[list[np.ndarray], float]:
        """Compute the Gram matrices of all unfoldings, ``x @ x.conj().T``, and the tensor's squared Frobenius norm."""
        grams, square = [], 0.0
        for mode, size in enumerate(self.shape):
            gram = np.zeros((size, size), self.wide)
            for _, block in self.blocks(whole=mode):
                if not mode:
                    self._square(block)
                rows = np.moveaxis(block, mode, 0).reshape(size, -1)
                gram += rows @ rows.conj().T
            square = float(np.trace(gram).real)
            grams.append(gram)
        return grams, square

    def projections(self, sets: Sequence[Mapping[int, np.ndarray]]) -> list[np.ndarray]:
        """Multiply by the conjugate transposes of matrices of shape (d_m, r_m) along some modes, for each set of them,
        in one pass.
        """
        projections = [
            np.zeros([factors[m].shape[1] if m in factors else d for m, d in enumerate(self.shape)], self.wide)
            for factors in sets
        ]
        for place, block in self.blocks():
            for factors, projection in zip(sets, projections, strict=True):
                target = tuple(slice(None) if m in factors else at for m, at in enumerate(place))
                projected, rows = block, [(mode, factor[place[mode]]) for mode, factor in factors.items()]
                # The modes that shrink the block most come first.
                for mode, matrix in sorted(rows, key=lambda pair: pair[1].shape[1] / pair[1].shape[0]):
                    projected = _times(projected, matrix.conj().T, mode)
                projection[target] += projected
        return projections

    def distance(self, core: np.ndarray | None, factors: Sequence[np.ndarray]) -> float:
        """Compute the Frobenius distance from the Tucker tensor of a core and factors, or the CP tensor of factors, in
        one pass.
        """
        total = 0.0
        for place, block in self.blocks():
            rows = [factor[at] for factor, at in zip(factors, place, strict=True)]
            approximation = cp_to_tensor((None, rows)) if core is None else core
            for mode, matrix in enumerate(() if core is None else rows):
                approximation = _times(approximation, matrix, mode)
            block = block - approximation
            total += float(np.vdot(block, block).real)
        return math.sqrt(total)

    @functools.cached_property
    def norm(self) -> float:
        """Frobenius norm of the tensor, in one pass."""
        return self.norm_of(sum(self._square(block) for _, block in self.blocks()))

    def _square(self, block: np.ndarray) -> float:
        """Return the squared norm of a block, and note its largest magnitude."""
        self._largest = max(self._largest, largest := float(np.max(np.abs(block))))
        if not largest <= 1.0:  # also if it is NaN
            check_range(largest, _WHAT)
        return float(np.vdot(block, block).real)

    def norm_of(self, square: float) -> float:
        """Return the tensor's norm, given its square, after a pass that has seen all elements."""
        check_range(self._largest, _WHAT)
        return math.sqrt(square)


def khatri_rao_product(block: np.ndarray, mode: int, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Multiply an unfolding by the Khatri-Rao product of the other modes' matrices without forming it."""
    axes = [m for m in range(block.ndim) if m != mode]
    # The first products are matrix products, and copy nothing.
    turned = block if mode < block.ndim - 1 else np.swapaxes(block, -1, -2)
    product: np.ndarray = turned @ matrices[axes[-1]]
    for axis in reversed(axes[:-1]):
        product = np.einsum("i...r,ir->...r", np.moveaxis(product, axis, 0), matrices[axis])
    return product


def _times(block: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, block, axes=(1, mode)), 0, mode)


# -- Compression to a small tensor and orthonormal factors, in three passes --------------------------------------------

# By sketches: Halko, Martinsson & Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), with Khatri-Rao
# products of normal matrices as test matrices (Sun, Guo, Luo, Tropp & Udell, "Low-rank Tucker approximation of a tensor
# from streaming data", SIAM J. Math. Data Sci. 2, 2020). By Gram matrices where an error decides on the sizes.


# Gram matrices square the singular values: below this part of the tensor's norm they are noise.
_LEAST_ERROR = 1e-7
# The part of the error from which a singular value is kept.
_LARGE = 0.25
#: Directions of a sketch beyond the rank.
OVERSAMPLED = 10


class Compressed(NamedTuple):
    """A small tensor, and how it expands.

    Attributes
    ----------
    core : ndarray
    factors : list of ndarray
        With orthonormal columns.
    norm : float
        Frobenius norm of the tensor.
    lost : float
        Frobenius distance of the tensor from what the core expands to.
    bound : float
        A lower bound on that distance for any core and factors of these sizes; 0 if none is known.
    """

    core: np.ndarray
    factors: list[np.ndarray]
    norm: float
    lost: float
    bound: float

    def left(self, max_error: float) -> float:
        """Return the relative error that a result for the core may have within one for the tensor."""
        size = float(np.linalg.norm(self.core))
        return math.sqrt(max(0.0, (max_error * self.norm) ** 2 - self.lost**2)) / size if size else 0.0

    def outcome(self, inner: FitOutcome, dtype: np.dtype[Any]) -> FitOutcome:
        """Say how good a result is, from what the compression lost and how good that of the core is."""
        left = inner.error * float(np.linalg.norm(self.core))
        error = math.hypot(self.lost, left) / self.norm if self.norm else 0.0
        bound = min(error, self.bound / self.norm if self.norm else 0.0)
        return FitOutcome(
            error=error, bound=bound, certified=error <= 64.0 * float(np.finfo(dtype).eps), stopped=inner.stopped,
            history=inner.history, method=f"compressed in blocks, {inner.method}",
        )  # fmt: skip


def result_dtype(passes: BlockPasses) -> np.dtype[Any]:
    """Return the dtype of a result: that of the tensor, or float64 for integers, float32 for half precision."""
    if passes.dtype.kind not in "fc":
        return np.dtype(np.float64)
    return np.dtype(np.float32) if passes.dtype.itemsize < 4 else passes.dtype


def compressed(passes: BlockPasses, sizes: Sequence[int] | None, max_error: float | None, seed: int) -> Compressed:
    """Compress a tensor to sizes, or by half of a squared relative error: :meth:`Compressed.left` has the rest.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity, or the error is below what Gram matrices can tell.
    """
    if sizes is not None:
        return _by_sizes(passes, sizes, seed)
    assert max_error is not None
    if max_error < _LEAST_ERROR:
        raise ShapeError(
            f"max_error={max_error} is below {_LEAST_ERROR}, the least for a tensor read in blocks: give ranks, or "
            "load the tensor into memory"
        )
    return _by_error(passes, max_error)


def _by_sizes(passes: BlockPasses, sizes: Sequence[int], seed: int) -> Compressed:
    """Compress each mode to a number of elements, in three passes of ``prod(d) * sum(s)`` multiply-adds or fewer."""
    # The sizes should exceed the rank that is wanted: the subspaces are those of sketches, and a fit to the larger core
    # is then close to the best one.
    rng = np.random.default_rng(seed)
    cut = [mode for mode, (size, d) in enumerate(zip(sizes, passes.shape, strict=True)) if size < d]
    tests = {mode: [rng.standard_normal((d, sizes[mode])).astype(passes.wide) for d in passes.shape] for mode in cut}
    sketches, square = passes.sketches(tests)
    norm = passes.norm_of(square)
    bases = {mode: np.linalg.qr(sketch)[0] for mode, sketch in sketches.items()}
    # Sketches catch the leading directions and much of the rest: a sweep of orthogonal iteration sorts these.
    sets = [{m: basis for m, basis in bases.items() if m != mode} for mode in bases]
    for mode, part in zip(bases, passes.projections(sets), strict=True):
        rows = np.moveaxis(part, mode, 0).reshape(part.shape[mode], -1)
        bases[mode] = np.linalg.svd(rows, full_matrices=False)[0][:, : sizes[mode]]
    return _compressed_core(passes, bases, norm, 0.0)


def _by_error(passes: BlockPasses, max_error: float) -> Compressed:
    """Compress each mode by half of a squared relative error, whose root is at least ``_LEAST_ERROR``."""
    # The pass of the Gram matrices takes ``prod(d) * sum(d)`` multiply-adds.
    grams, square = passes.grams()
    norm, bases, bound = passes.norm_of(square), dict[int, np.ndarray](), 0.0
    loss = max_error * norm / math.sqrt(2.0 * len(passes.shape))
    for mode, gram in enumerate(grams):
        values, vectors = np.linalg.eigh(gram)
        singular = np.sqrt(np.maximum(values[::-1], 0.0))
        # What takes much of the error at once is left to the ranks of the core.
        large = int(np.count_nonzero(singular > _LARGE * max_error * norm))
        count = max(large, kept(singular, len(singular), loss))
        bound = max(bound, float(np.linalg.norm(singular[count:])))
        if count < len(singular):
            bases[mode] = np.ascontiguousarray(vectors[:, ::-1][:, :count])
    return _compressed_core(passes, bases, norm, bound)


def _compressed_core(passes: BlockPasses, bases: dict[int, np.ndarray], norm: float, bound: float) -> Compressed:
    core = passes.projections([bases])[0]
    factors = [
        bases[mode] if mode in bases else np.eye(size, dtype=passes.wide) for mode, size in enumerate(passes.shape)
    ]
    square = norm**2 - float(np.linalg.norm(core)) ** 2
    # If little is lost, this difference is mostly rounding: then compute the residual.
    lost = math.sqrt(square) if square > 1e-10 * norm**2 else passes.distance(core, factors) if bases else 0.0
    return Compressed(core, factors, norm, lost, min(bound, lost))

"""Compression of a tensor that is read block by block to a small tensor and orthonormal factors, in three passes.

By sketches: Halko, Martinsson & Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), with Khatri-Rao
products of normal matrices as test matrices (Sun, Guo, Luo, Tropp & Udell, "Low-rank Tucker approximation of a tensor
from streaming data", SIAM J. Math. Data Sci. 2, 2020). By Gram matrices where an error decides on the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.errors import ShapeError

from .block_passes import BlockPasses
from .matrix_truncation import kept

__all__ = ["Compressed", "by_error", "by_sizes"]

# Gram matrices square the singular values: below this part of the tensor's norm they are noise.
LEAST_ERROR = 1e-7


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


def by_sizes(passes: BlockPasses, sizes: Sequence[int], seed: int) -> Compressed:
    """Compress each mode to a number of elements.

    Parameters
    ----------
    passes : BlockPasses
    sizes : sequence of int
        At most those of the tensor. Take more than the rank that is wanted: the subspaces are those of sketches, and
        what is fitted to the core afterwards is then near the best.
    seed : int

    Notes
    -----
    Three passes of ``prod(d) * sum(s)`` multiply-adds each, or fewer.
    """
    rng = np.random.default_rng(seed)
    cut = [mode for mode, (size, d) in enumerate(zip(sizes, passes.shape, strict=True)) if size < d]
    tests = {mode: [rng.standard_normal((d, sizes[mode])).astype(passes.wide) for d in passes.shape] for mode in cut}
    sketches, square = passes.sketches(tests)
    norm = _norm(square)
    bases = {mode: np.linalg.qr(sketch)[0] for mode, sketch in sketches.items()}
    # Sketches catch the leading directions and much of the rest: a sweep of orthogonal iteration sorts these.
    for mode, part in passes.all_but_one(bases).items():
        rows = np.moveaxis(part, mode, 0).reshape(part.shape[mode], -1)
        bases[mode] = np.linalg.svd(rows, full_matrices=False)[0][:, : sizes[mode]]
    return _projected(passes, bases, norm, 0.0)


def by_error(passes: BlockPasses, max_error: float) -> Compressed:
    """Compress each mode as far as an error allows.

    Parameters
    ----------
    passes : BlockPasses
    max_error : float
        Relative Frobenius error, at least ``LEAST_ERROR``.

    Notes
    -----
    Costs ``prod(d) * sum(d)`` multiply-adds in the pass of the Gram matrices.
    """
    grams, square = passes.grams(range(len(passes.shape)))
    norm, bases, bound = _norm(square), dict[int, np.ndarray](), 0.0
    loss = max_error * norm / math.sqrt(len(passes.shape))
    for mode, gram in grams.items():
        values, vectors = np.linalg.eigh(gram)
        singular = np.sqrt(np.maximum(values[::-1], 0.0))
        count = kept(singular, len(singular), loss)
        bound = max(bound, float(np.linalg.norm(singular[count:])))
        if count < len(singular):
            bases[mode] = np.ascontiguousarray(vectors[:, ::-1][:, :count])
    return _projected(passes, bases, norm, bound)


def _norm(square: float) -> float:
    if not math.isfinite(square):
        raise ShapeError("the tensor holds NaN or infinity, so it cannot be decomposed")
    return math.sqrt(square)


def _projected(passes: BlockPasses, bases: dict[int, np.ndarray], norm: float, bound: float) -> Compressed:
    core = passes.projected(bases)
    factors = [
        bases[mode] if mode in bases else np.eye(size, dtype=passes.wide) for mode, size in enumerate(passes.shape)
    ]
    square = norm**2 - float(np.linalg.norm(core)) ** 2
    # The difference is rounding where little is lost: then take the residual.
    lost = math.sqrt(square) if square > 1e-10 * norm**2 else passes.distance(core, factors) if bases else 0.0
    return Compressed(core, factors, norm, lost, min(bound, lost))

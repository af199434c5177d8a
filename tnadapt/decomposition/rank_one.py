"""The nearest tensor of rank one: the power iteration on all modes, from several starts.

De Lathauwer, De Moor & Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors"
(SIAM J. Matrix Anal. Appl. 21, 2000). A sweep takes two products with the whole tensor, one for each half of the modes;
the vectors of a half come from the small tensor that is left. One start splits modes off one by one, each by a leading
singular triplet of what is left, from either end; another takes each mode's own leading vector.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from tnadapt.algebra.formats import unfolded
from tnadapt.algebra.rearrangement import contracted
from tnadapt.backends import load_backend
from tnadapt.backends.backend import Array

from ._fit import Limits
from ._linear_algebra import Algebra
from ._truncated_svd import on_host

__all__ = ["nearest_rank_one"]

# Tensors of up to this many elements have random starts, too, and each start is followed to its end. Of larger ones
# the start that is best after a few sweeps is followed.
_SMALL = 1 << 16
_RANDOM, _TRIED = 4, 4
# Power iterations for a start, of small tensors and of others.
_POWERS = 30, 3
# An iteration ends when a sweep reduces the error by no more than this part of the tolerance. Sweeps cost little.
_FINER = 1e-2


def nearest_rank_one(algebra: Algebra, tensor: Array, limits: Limits) -> tuple[list[Array], int]:
    """Fit one outer product to a tensor of at least three modes.

    Parameters
    ----------
    algebra : Algebra
    tensor : array, shape (d_1, …, d_M)
        Real, not zero.
    limits : Limits

    Returns
    -------
    list of array, shape (d_m, 1)
    int
        Number of sweeps.
    """
    if algebra.backend.name != "numpy" and on_host(algebra.backend, tensor):
        numpy = load_backend("numpy")
        host = Algebra(numpy, algebra.backend.to_numpy(algebra.like), algebra.svd_method, algebra.seed)
        factors, count = nearest_rank_one(host, algebra.backend.to_numpy(tensor), limits)
        return [algebra.array(factor) for factor in factors], count
    powers, small = _Powers(algebra, tensor), math.prod(tensor.shape) <= _SMALL
    runs = [(start, 0.0) for start in _starts(algebra, tensor, small)]
    if not small:
        tried = limits._replace(iterations=min(_TRIED, limits.iterations))
        runs = [max((powers.followed(*run, tried)[0] for run in runs), key=lambda run: run[1])]
    count = 0
    for number, run in enumerate(runs):
        runs[number], more = powers.followed(*run, limits)
        count += more
    vectors, size = max(runs, key=lambda run: run[1])
    backend = algebra.backend
    return [backend.reshape(v * size if mode == 0 else v, (-1, 1)) for mode, v in enumerate(vectors)], count


def _starts(algebra: Algebra, tensor: Array, small: bool) -> Iterator[list[Array]]:
    backend, order = algebra.backend, len(tensor.shape)
    yield _split(algebra, tensor)
    yield _split(algebra, backend.permute_dims(tensor, range(order)[::-1]))[::-1]
    yield [_leading(algebra, unfolded(backend, tensor, mode))[0] for mode in range(order)]
    rng = algebra.rng
    for _ in range(_RANDOM if small else 0):
        yield [algebra.array(rng.normal(size=int(size))) for size in tensor.shape]


def _split(algebra: Algebra, tensor: Array) -> list[Array]:
    """Return a vector for each mode, each from the leading triplet of what the one before left."""
    backend, sizes = algebra.backend, [int(size) for size in tensor.shape]
    found, left = list[Array](), tensor
    for mode, size in enumerate(sizes[:-1]):
        u, left = _leading(algebra, backend.reshape(left, (size, math.prod(sizes[mode + 1 :]))))
        found.append(u)
    return [*found, left]


def _leading(algebra: Algebra, matrix: Array) -> tuple[Array, Array]:
    """Return a left vector near the leading one, and the matrix times it, after a few power iterations."""
    backend = algebra.backend
    along = algebra.array(algebra.rng.normal(size=(1, int(matrix.shape[0]))))
    steps = _POWERS[matrix.shape[0] * matrix.shape[1] > _SMALL]
    for step in range(steps + 1):
        along = along * (1.0 / (algebra.norm(along) or 1.0))
        rest = backend.matmul(along, matrix)
        if step < steps:
            along = backend.matrix_transpose(backend.matmul(matrix, backend.matrix_transpose(rest)))
    return backend.flatten(along), backend.flatten(rest)


class _Powers:
    """Sweeps of the power iteration on a tensor, seen as a matrix of one half of its modes by the other."""

    def __init__(self, algebra: Algebra, tensor: Array) -> None:
        self.algebra, self.sizes = algebra, [int(size) for size in tensor.shape]
        halves = [math.prod(self.sizes[:m]) + math.prod(self.sizes[m:]) for m in range(1, len(self.sizes))]
        self.cut = 1 + halves.index(min(halves))
        rows = math.prod(self.sizes[: self.cut])
        self.matrix = algebra.backend.reshape(tensor, (rows, math.prod(self.sizes) // rows))
        self.norm = algebra.norm(tensor)

    def sweep(self, vectors: Sequence[Array]) -> tuple[list[Array], float]:
        """Return improved vectors of norm one, and the size of their outer product that is nearest to the tensor."""
        backend, cut = self.algebra.backend, self.cut
        left, right = list(vectors[:cut]), list(vectors[cut:])
        rest = backend.matmul(self.matrix, backend.reshape(_outer(backend, right), (-1, 1)))
        left, _ = self._half(rest, left)
        rest = backend.matmul(backend.reshape(_outer(backend, left), (1, -1)), self.matrix)
        right, size = self._half(rest, right)
        return left + right, size

    def _half(self, rest: Array, vectors: list[Array]) -> tuple[list[Array], float]:
        """Improve the vectors of one half, for what the other half leaves."""
        backend, sizes = self.algebra.backend, [int(vector.shape[0]) for vector in vectors]
        rest, size = backend.reshape(rest, sizes), 0.0
        for mode in range(len(vectors)):
            others: list[Array | None] = [None if m == mode else vector for m, vector in enumerate(vectors)]
            found = contracted(backend, rest, others, (sizes[mode],))
            size = float(np.linalg.norm(backend.to_numpy(found).astype(np.float64)))
            if size > 0.0:
                vectors[mode] = found * (1.0 / size)
        return vectors, size

    def followed(self, vectors: list[Array], size: float, limits: Limits) -> tuple[tuple[list[Array], float], int]:
        """Run sweeps until one gains too little; return the vectors and their size, and the number of sweeps."""
        eps, count = self.algebra.eps, 0
        while count < limits.iterations:
            found, now = self.sweep(vectors)
            count += 1
            gain = (now - size) * (now + size) / self.norm**2
            if not gain > 0.0:
                break
            vectors, size = found, now
            error = math.sqrt(max(eps, 1.0 - (size / self.norm) ** 2))
            if gain <= max(4.0 * eps, 2.0 * error * _FINER * limits.tol):
                break
        return (vectors, size), count


def _outer(backend: Array, vectors: Sequence[Array]) -> Array:
    """Return the outer product of vectors, flattened."""

    def pair(a: Array, b: Array) -> Array:
        return backend.flatten(backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1)))

    return functools.reduce(pair, vectors)

"""Tensor rings by successive truncations (TR-SVD), and by alternating least squares.

Zhao et al., "Tensor ring decomposition" (arXiv 1606.05535), algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .matrix_truncation import Leading

__all__ = ["chain_of", "ring_svd", "ring_sweep"]

# Magnitudes above this share of the largest one are equal to it up to rounding.
_EQUAL = 1.0 - 1e-3


def ring_svd(backend: Backend, tensor: Array, closing: int, truncated: Callable[[Array, int], Leading]) -> list[Array]:
    """Compute the cores of a tensor ring.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M), M ≥ 2
    closing : int
        r_0. The rank of the first truncation is divided by it.
    truncated : callable
        Truncates the matrix of a bond; called with the matrix and the number of the bond, from 0. The first one must
        return a multiple of ``closing`` vectors.

    Returns
    -------
    list of array, shape (r_{m-1}, d_m, r_m), with r_M = r_0
    """
    sizes = [int(size) for size in tensor.shape]
    matrix = backend.reshape(tensor, (sizes[0], math.prod(sizes[1:])))
    u = _signed(backend, truncated(matrix, 0).u)
    rank = int(u.shape[1]) // closing
    core = backend.reshape(u, (sizes[0], closing, rank))
    cores = [backend.permute_dims(core, (1, 0, 2))]
    # The closing rank goes to the end of what is left: (r_1, d_2 ⋯ d_M, r_0).
    rest = backend.reshape(backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix), (closing, rank, -1))
    rest = backend.permute_dims(rest, (1, 2, 0))
    for bond, size in enumerate(sizes[1:-1], 1):
        matrix = backend.reshape(rest, (rank * size, -1))
        u = truncated(matrix, bond).u
        before, rank = rank, int(u.shape[1])
        cores.append(backend.reshape(u, (before, size, rank)))
        rest = backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix)
    return [*cores, backend.reshape(rest, (rank, sizes[-1], closing))]


def _signed(backend: Backend, u: Array) -> Array:
    """Make the first of the largest elements of each singular vector positive, whatever its sign or phase was.

    The ring does depend on them: the vectors of one matrix are distributed over two bonds.
    """
    sizes = abs(backend.detached(u))
    largest = backend.where(sizes >= _EQUAL * backend.xp.max(sizes, axis=0), sizes * 0.0 + 1.0, sizes * 0.0)
    rows = backend.constant(np.arange(int(u.shape[0])).reshape(-1, 1), backend.device(u))
    pivots = backend.sum(backend.where(rows == backend.xp.argmax(largest, axis=0), u, u * 0.0), axis=0)
    pivots = backend.where(pivots == 0.0, pivots * 0.0 + 1.0, pivots)
    return u * (backend.conj(pivots) / abs(pivots))


def chain_of(backend: Backend, cores: Sequence[Array]) -> Array:
    """Contract neighboring cores: shape (r, prod d, r')."""
    found = cores[0]
    for core in cores[1:]:
        left, right = int(found.shape[0]), int(core.shape[2])
        rows = backend.reshape(found, (-1, int(core.shape[0])))
        found = backend.reshape(
            backend.matmul(rows, backend.reshape(core, (int(core.shape[0]), -1))), (left, -1, right)
        )
    return found


def ring_sweep(
    backend: Backend, tensor: Array, cores: Sequence[Array], fixed: Collection[int], ridge: float
) -> list[Array]:
    """Replace each core by the best one with the others fixed, up to the ridge.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M), M ≥ 2
    cores : sequence of array
    fixed : collection of int
        Positions of cores that are not changed.
    ridge : float
        Added to the diagonal of the equations.

    Returns
    -------
    list of array
    """
    cores, order = list(cores), len(cores)
    for mode in range(order):
        if mode in fixed:
            continue
        left, size, right = (int(one) for one in cores[mode].shape)
        # All other cores, from the next one around: (r_m, d_{m+1} ⋯ d_{m-1}, r_{m-1}), as rows of the unknown core.
        others = chain_of(backend, [cores[(mode + step) % order] for step in range(1, order)])
        others = backend.reshape(backend.permute_dims(others, (2, 0, 1)), (left * right, -1))
        turned = backend.permute_dims(tensor, [(mode + step) % order for step in range(order)])
        rows = backend.reshape(turned, (size, -1))
        adjoint = backend.conj(backend.matrix_transpose(others))
        system = backend.matmul(others, adjoint)
        if ridge:
            eye = backend.asarray(np.eye(left * right), backend.dtype_name(tensor), backend.device(tensor))
            system = system + ridge * eye
        right_side = backend.matmul(rows, adjoint)
        solved = backend.solve(backend.matrix_transpose(system), backend.matrix_transpose(right_side))
        core = backend.reshape(solved, (left, right, size))
        cores[mode] = backend.permute_dims(core, (0, 2, 1))
    return cores

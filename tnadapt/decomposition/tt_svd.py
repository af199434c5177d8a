"""Tensor trains by successive truncations: TT-SVD.

Oseledets, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33, 2011), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .matrix_truncation import Leading

__all__ = ["tt_svd"]


def tt_svd(
    backend: Backend, tensor: Array, truncated: Callable[[Array, int], Leading]
) -> tuple[list[Array], list[bool]]:
    """Compute the cores of a tensor train.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    truncated : callable
        Truncates the matrix of a bond; called with the matrix and the number of the bond, from 0.

    Returns
    -------
    list of array, shape (r_{m-1}, d_m, r_m)
        All but the last are orthonormal from the left.
    list of bool
        Of each bond whether its matrix lost something.

    Notes
    -----
    The root of the sum of the squares of the truncations is the error, which is at most √(M - 1) times the least one.
    With one truncation it is the least one.
    """
    sizes = [int(size) for size in tensor.shape]
    rest, rank, cores, cut = tensor, 1, list[Array](), list[bool]()
    for bond, size in enumerate(sizes[:-1]):
        matrix = backend.reshape(rest, (rank * size, math.prod(sizes[bond + 1 :])))
        u = truncated(matrix, bond).u
        before, rank = rank, int(u.shape[1])
        cores.append(backend.reshape(u, (before, size, rank)))
        cut.append(rank < min(int(one) for one in matrix.shape))
        rest = backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix)
    return [*cores, backend.reshape(rest, (rank, sizes[-1], 1))], cut

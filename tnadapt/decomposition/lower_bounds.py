"""Lower bounds on the error of a fit, from the ranks that a network cannot exceed.

A tensor of a format has unfoldings of limited rank, and the distance of an unfolding to the nearest matrix of that rank
is known (Eckart & Young). The largest of these distances is a bound. A fit that meets it is optimal, whatever method
found it. Bounds are computed in float64 for updates of any dtype, and only from whole rows of the first mode, which
contain no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.algebra.products import rearranged
from tnadapt.backends import Array

from .linear_algebra import Algebra

# Unfoldings whose shorter side is longer than this are skipped, and tensors with more elements.
_SIDE, _ELEMENTS = 512, 1 << 25
# Columns per matrix product when a Gram matrix is summed.
_BLOCK = 1 << 10


def lower_bound(algebra: Algebra, network: Network, vec: Array) -> float:
    """Return a lower bound on the distance of a network from a vector, over all arrays; 0 if none is known.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    vec : array, shape (size,)

    Returns
    -------
    float
        Reduced by the possible rounding error. The vector's largest magnitude must be near 1, as its elements are
        squared.
    """
    if network.size > _ELEMENTS:
        return 0.0
    return max((_beyond(algebra, matrix, rank) for matrix, rank in _unfoldings(algebra, network, vec)), default=0.0)


def _unfoldings(algebra: Algebra, network: Network, vec: Array) -> Iterator[tuple[Array, int]]:
    """Yield unfoldings of the vector, and the maximum rank of the network's."""
    backend, sizes = algebra.backend, network.sizes
    rest = math.prod(sizes[1:])
    rows = network.size // rest
    if not rows:
        return
    tensor = backend.reshape(vec[: rows * rest], (rows, *sizes[1:]))
    if len(network.splits) == 1:
        for modes, rank in network.splits[0].bounded_unfoldings():
            yield _matrix(algebra, tensor, modes), network.terms * rank
    elif network.kronecker:
        inner = [split.sizes for split in network.splits]
        if rows != sizes[0] or any(math.prod(s[m] for s in inner) != d for m, d in enumerate(sizes)):
            return
        outer = rearranged(backend, tensor, inner)
        # Of two splits, one unfolding is the other transposed.
        for k in range(len(inner) if len(inner) > 2 else 1):
            yield _matrix(algebra, outer, [k]), network.terms
    elif len(sizes) == 2:
        # The rank of a Hadamard product is at most the product of the factors' ranks.
        yield tensor, network.terms * math.prod(split.unfolding_rank([0]) for split in network.splits)


def _matrix(algebra: Algebra, tensor: Array, modes: list[int]) -> Array:
    """Unfold a tensor with some modes as rows and the others as columns."""
    others = [mode for mode in range(len(tensor.shape)) if mode not in modes]
    rows = math.prod(tensor.shape[mode] for mode in modes)
    turned = algebra.backend.permute_dims(tensor, [*modes, *others])
    return algebra.backend.reshape(turned, (rows, math.prod(tensor.shape) // rows))


def _beyond(algebra: Algebra, matrix: Array, rank: int) -> float:
    """Return a lower bound on the norm of the singular values after the first ``rank``, 0 if the matrix is skipped."""
    backend, double = algebra.backend, algebra.double
    short = min(matrix.shape)
    if rank >= short or short > _SIDE:
        return 0.0
    if matrix.shape[0] > matrix.shape[1]:
        matrix = backend.matrix_transpose(matrix)
    gram = np.zeros((short, short))
    for start in range(0, matrix.shape[1], _BLOCK):
        block = algebra.doubled(matrix[:, start : start + _BLOCK])
        gram += double.backend.to_numpy(double.backend.matmul(block, double.backend.matrix_transpose(block)))
    values = np.linalg.eigvalsh(gram)[: short - rank]
    # An entry of a block's Gram matrix is a sum of _BLOCK products, whose error is typically eps * sqrt(_BLOCK); four
    # times that is allowed. The error of the eigenvalues is at most `short` times as large.
    slack = 4.0 * short * math.sqrt(_BLOCK) * double.eps * float(np.trace(gram))
    return math.sqrt(max(0.0, float(values.sum()) - slack))

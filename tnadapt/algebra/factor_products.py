"""Products of checked factors with a chosen order of contraction; :mod:`._contraction_order` chooses it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

__all__ = ["cp_in_groups", "khatri_rao", "khatri_rao_of_rows", "tucker_in_order", "tucker_with_last"]


def cp_in_groups(backend: Backend, factors: Sequence[Array], groups: tuple[int, int]) -> Array:
    """Compute the tensor of CP factors by a matrix product whose batch, rows and columns are groups of modes.

    The groups are those of :func:`._contraction_order.cp_groups`; all of them give the same tensor.
    """
    (first, second), rank = groups, factors[0].shape[1]
    rows = khatri_rao(backend, factors[first:second])
    columns = factors[second:]
    if first or len(columns) > 1:
        # In this layout the innermost loops are as long as the last factor, not only as its rank.
        cols = khatri_rao_of_rows(backend, [_laid_out(backend, factor) for factor in columns])
    else:
        cols = backend.matrix_transpose(columns[0])
    if first:
        batch = khatri_rao(backend, factors[:first])
        cols = backend.reshape(batch, (-1, rank, 1)) * backend.reshape(cols, (1, rank, -1))
        rows = backend.reshape(rows, (1, -1, rank))
    return backend.reshape(backend.matmul(rows, cols), [factor.shape[0] for factor in factors])


def _laid_out(backend: Backend, factor: Array) -> Array:
    """Return the transpose of a matrix, in C order in memory: flattening moves the elements."""
    return backend.reshape(backend.flatten(backend.matrix_transpose(factor)), (factor.shape[1], factor.shape[0]))


def khatri_rao(backend: Backend, factors: Sequence[Array]) -> Array:
    """Compute the column-wise Kronecker product of (d_m, r) factors: shape (prod d_m, r)."""

    def pair(a: Array, b: Array) -> Array:
        rank = a.shape[1]
        product = backend.reshape(a, (-1, 1, rank)) * backend.reshape(b, (1, -1, rank))
        return backend.reshape(product, (a.shape[0] * b.shape[0], rank))

    return functools.reduce(pair, factors)


def khatri_rao_of_rows(backend: Backend, factors: Sequence[Array]) -> Array:
    """Compute the transpose of :func:`khatri_rao` from transposed factors, (r, d_m): shape (r, prod d_m)."""

    def pair(a: Array, b: Array) -> Array:
        (rank, m), n = a.shape, b.shape[1]
        product = backend.reshape(a, (rank, m, 1)) * backend.reshape(b, (rank, 1, n))
        return backend.reshape(product, (rank, m * n))

    return functools.reduce(pair, factors)


def tucker_with_last(backend: Backend, core: Array, factors: Sequence[Array], last: int) -> Array:
    """Compute the tensor of a core and factors, of which one is applied after all others."""
    if last == len(factors) - 1:
        return tucker_in_order(backend, core, factors)
    core = tucker_in_order(backend, core, [None if m == last else factor for m, factor in enumerate(factors)])
    sizes = [factor.shape[0] for factor in factors]
    batch = (math.prod(sizes[:last]),) if last else ()
    core = backend.reshape(core, (*batch, core.shape[last], math.prod(sizes[last + 1 :])))
    factor = backend.reshape(factors[last], (*(1 for _ in batch), *factors[last].shape))
    return backend.reshape(backend.matmul(factor, core), sizes)


def tucker_in_order(backend: Backend, core: Array, factors: Sequence[Array | None]) -> Array:
    """Compute the tensor of a core and factors, which are applied first to last: the reference implementation."""
    sizes = [core.shape[m] if factor is None else factor.shape[0] for m, factor in enumerate(factors)]
    # Each step contracts the leading mode and appends the result as the last one: after M steps the modes are in order
    # again, and no axes had to be permuted.
    shape = list(core.shape)
    for factor, size in zip(factors, sizes, strict=True):
        rank = shape.pop(0)
        rest = backend.matrix_transpose(backend.reshape(core, (rank, math.prod(shape))))
        core = rest if factor is None else backend.matmul(rest, backend.matrix_transpose(factor))
        shape.append(size)
    return backend.reshape(core, sizes)

"""Alternating least squares over some cores of a tensor train, with the others fixed."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from tnadapt.algebra.products import tt_tensor
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .frobenius import norm_of

__all__ = ["AroundFixed", "moved_right"]


class AroundFixed:
    """A train of which some cores are not changed.

    No core takes a factor of a fixed neighbor, so that the others are not orthogonal in general, and the best core is
    the tensor times the pseudoinverses of both sides.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    cores : list of array
    fixed : collection of int
        Positions of the cores that stay as they are.
    """

    def __init__(self, backend: Backend, tensor: Array, cores: list[Array], fixed: Collection[int]) -> None:
        self.backend, self.tensor, self.cores, self.fixed = backend, tensor, cores, frozenset(fixed)

    def error(self) -> float:
        """Return the norm of the residual."""
        return norm_of(self.backend, self.tensor - tt_tensor(self.backend, self.cores))

    def sweep(self) -> None:
        """Improve each core that is not fixed, from the first to the last."""
        backend, order, after = self.backend, len(self.cores), self._after()
        before: Array = None
        for mode in range(order):
            if mode not in self.fixed:
                self.cores[mode] = self._core(before, after[mode], mode)
                if mode + 1 < order and mode + 1 not in self.fixed:
                    moved_right(backend, self.cores, mode)
            if mode + 1 < order:
                left, size, right = (int(one) for one in self.cores[mode].shape)
                core = backend.reshape(self.cores[mode], (left, size * right))
                before = backend.reshape(core if before is None else backend.matmul(before, core), (-1, right))

    def _after(self) -> list[Array]:
        """Return for each core the product of those after it, shape (r, prod d); None for the last one."""
        backend, found = self.backend, [None]
        for core in reversed(self.cores[1:]):
            left, size, right = (int(one) for one in core.shape)
            last = found[-1]
            flat = core if last is None else backend.matmul(backend.reshape(core, (left * size, right)), last)
            found.append(backend.reshape(flat, (left, -1)))
        return found[::-1]

    def _core(self, before: Array, after: Array, mode: int) -> Array:
        """Return the best core between the products of those before and after it."""
        backend, size = self.backend, int(self.tensor.shape[mode])
        rows = backend.reshape(self.tensor, (math.prod(self.tensor.shape[:mode]), -1))
        if before is not None:
            rows = backend.matmul(self._inverse(before), rows)
        left = int(rows.shape[0])
        rows = backend.reshape(rows, (left * size, -1))
        if after is not None:
            rows = backend.matmul(rows, self._inverse(after))
        return backend.reshape(rows, (left, size, -1))

    def _inverse(self, matrix: Array) -> Array:
        """Compute the pseudoinverse."""
        backend = self.backend
        u, s, vh = backend.svd(matrix)
        values = backend.to_numpy(s)
        keep = int((values > values[0] * max(matrix.shape) * np.finfo(values.dtype).eps).sum())
        scaled = backend.conj(backend.matrix_transpose(vh[:keep, :])) / s[:keep]
        return backend.matmul(scaled, backend.conj(backend.matrix_transpose(u[:, :keep])))


def moved_right(backend: Backend, cores: list[Array], mode: int) -> None:
    """Make a core orthogonal from the left, and multiply the next one by the rest."""
    core, after = cores[mode], cores[mode + 1]
    left, size, right = (int(one) for one in core.shape)
    q, r = backend.qr(backend.reshape(core, (left * size, right)))
    width = int(q.shape[1])
    cores[mode] = backend.reshape(q, (left, size, width))
    rest = backend.matmul(r, backend.reshape(after, (right, -1)))
    cores[mode + 1] = backend.reshape(rest, (width, *after.shape[1:]))

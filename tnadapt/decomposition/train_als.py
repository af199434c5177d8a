"""Tensor trains beyond TT-SVD: alternating least squares over the cores, one at a time.

With the cores before it orthogonal from the left and those after it from the right, the best core is the tensor
contracted with all others, and its norm is that of the whole train (Holtz, Rohwedder & Schneider, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tnadapt.algebra.products import tt_tensor
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._fit import Limits
from ._fixed_cores import AroundFixed, moved_right
from .frobenius import norm_of

__all__ = ["improved_train"]


def improved_train(
    backend: Backend,
    tensor: Array,
    cores: Sequence[Array],
    limits: Limits,
    watch: Callable[[int, float], Any] = lambda *_: None,
    fixed: Collection[int] = (),
) -> tuple[list[Array], int, bool]:
    """Improve the cores of a train by sweeps until one gains no more than the tolerance.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
        Real or complex; not zero.
    cores : sequence of array, shape (r_{m-1}, d_m, r_m)
        A start, such as that of TT-SVD. The ranks stay, unless one is larger than its neighbors can use.
    limits : Limits
        A sweep goes to the first core and back to the last.
    watch : callable
        Called with each sweep's number and relative error; stops the iteration if it returns True.
    fixed : collection of int
        Positions of cores that stay as they are, to the bit.

    Returns
    -------
    cores : list of array
        Their error is never above that of the start. If any differs from the start, and none is fixed, all but the
        last one are orthogonal from the left.
    sweeps : int
    converged : bool
        Whether a sweep gained no more than the tolerance.
    """
    train = AroundFixed(backend, tensor, list(cores), fixed) if fixed else _Train(backend, tensor, list(cores))
    norm = norm_of(backend, tensor)
    best, error = list(cores), train.error()
    for sweep in range(1, limits.iterations + 1):
        train.sweep()
        before, error = error, train.error()
        if not error < before:
            return best, sweep, True
        best = list(train.cores)
        stop = watch(sweep, error / norm) is True
        if stop or before - error <= limits.tol * norm:
            return best, sweep, not stop
    return best, limits.iterations, False


class _Train:
    """A train of fixed ranks, and the tensor contracted with its first or last cores."""

    def __init__(self, backend: Backend, tensor: Array, cores: list[Array]) -> None:
        self.backend, self.cores = backend, cores
        self.sizes = [int(size) for size in tensor.shape]
        self.tensor = tensor
        for mode in range(len(cores) - 1):
            moved_right(self.backend, self.cores, mode)

    def error(self) -> float:
        """Return the norm of the residual."""
        return norm_of(self.backend, self.tensor - tt_tensor(self.backend, self.cores))

    def sweep(self) -> None:
        """Improve each core in turn, from the last to the first and back."""
        order = len(self.cores)
        # What the cores before each one give; the way back does not change it.
        before = [self.backend.reshape(self.tensor, (1, -1))]
        for mode in range(order - 1):
            before.append(self._step(before[-1], mode))
        after: list[Array | None] = [None] * order
        for mode in range(order - 1, 0, -1):
            self.cores[mode] = self._core(before[mode], after[mode], mode)
            self._to_the_left(mode)
            after[mode - 1] = self._rights(mode, after[mode])
        rest = before[0]
        for mode in range(order):
            self.cores[mode] = self._core(rest, after[mode], mode)
            if mode < order - 1:
                moved_right(self.backend, self.cores, mode)
                rest = self._step(rest, mode)

    def _core(self, first: Array, after: Array | None, mode: int) -> Array:
        """Contract the tensor, already contracted with the cores before, with the cores after."""
        backend, (left, size, right) = self.backend, (int(one) for one in self.cores[mode].shape)
        rows = backend.reshape(first, (left * size, math.prod(self.sizes[mode + 1 :])))
        if after is not None:
            rows = backend.matmul(rows, backend.matrix_transpose(backend.conj(after)))
        return backend.reshape(rows, (left, size, right))

    def _step(self, first: Array, mode: int) -> Array:
        """Contract with one more core from the left."""
        backend, core = self.backend, self.cores[mode]
        rows = backend.reshape(first, (int(core.shape[0] * core.shape[1]), -1))
        flat = backend.reshape(core, (-1, int(core.shape[2])))
        return backend.matmul(backend.matrix_transpose(backend.conj(flat)), rows)

    def _rights(self, mode: int, after: Array | None) -> Array:
        """Return the product of one core and those after it, shape (r, prod d)."""
        backend, core = self.backend, self.cores[mode]
        flat = backend.reshape(core, (-1, int(core.shape[2])))
        found = flat if after is None else backend.matmul(flat, after)
        return backend.reshape(found, (int(core.shape[0]), -1))

    def _to_the_left(self, mode: int) -> None:
        """Make a core orthogonal from the right, and multiply the one before it by the rest."""
        backend, core, before = self.backend, self.cores[mode], self.cores[mode - 1]
        left, size, right = (int(one) for one in core.shape)
        flat = backend.reshape(core, (left, size * right))
        q, r = backend.qr(backend.matrix_transpose(backend.conj(flat)))
        width = int(q.shape[1])
        turned = backend.matrix_transpose(backend.conj(q))
        self.cores[mode] = backend.reshape(turned, (width, size, right))
        rest = backend.matmul(backend.reshape(before, (-1, left)), backend.matrix_transpose(backend.conj(r)))
        self.cores[mode - 1] = backend.reshape(rest, (*before.shape[:2], width))

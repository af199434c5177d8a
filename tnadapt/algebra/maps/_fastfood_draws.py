"""The draws of fastfood: permutation Π, normal diagonals 𝒢 and 𝒢', signs ℬ, whole or in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tnadapt.backends import Backend, kernels
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays

from .. import rng

__all__ = ["FastfoodDraws", "hadamard_rows"]

# From this length on, a gather misses the processor's caches.
_FAR = 1 << 19


class FastfoodDraws(FixedArrays):
    """The vectors of one F: ``perm``, ``inverse``, ``g`` and ``diagonal`` as drawn; ``index`` and ``gain`` as used.

    ``H pad(x)`` repeats one period h, so ``z[j] = gain[j] * h[index[j]]`` with ``index = perm`` modulo the period and
    ``gain = g[perm]``.

    Compiled kernels regenerate the permutation in every call from its ``keys``, read signs from the bits of ``words``,
    and use further arrays of their own (``buckets``, ``starts``, ``order``; see
    :mod:`tnadapt.backends._kernels.fastfood`).
    """

    def __init__(self, normal: bool, length: int, padded: int, pruned: int, seed: int, group: int) -> None:
        super().__init__()
        self.lengths = {"diagonal": length}
        self.padded = padded
        #: Whether the transform is long enough to be worth importing the compiled kernels.
        self.long = padded >= rng.WORTH
        self.signs = not normal
        self.pruned, self.seed, self.group = pruned, seed, group
        #: The integers that define the draws. A compiler takes text for a constant, not always a number.
        self.recipe = f"{padded} {pruned} {seed} {group} {int(not normal)}"
        #: Memory that the compiled kernels reuse; it ends with the draws.
        self.space: Any = None

    def free(self) -> None:
        super().free()
        self.space = None

    @property
    def spare_bytes(self) -> int:
        return 0 if self.space is None else int(self.space.nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "space": None}

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of one of the vectors without the rest."""
        if name in ("perm", "inverse"):
            return rng.permutation(self.padded, self.seed, self.group, start, stop, inverse=name == "inverse")
        if name == "g":
            return rng.normals(self.seed, self.group, rng.PURPOSE["gaussian"], start, stop)
        if name == "index":
            return self.part("perm", start, stop) & (self.pruned - 1)
        if name == "gain":
            return rng.normals_at(self.seed, self.group, rng.PURPOSE["gaussian"], self.part("perm", start, stop))
        if self.signs:
            return rng.signs(self.seed, self.group, start, stop)
        return rng.normals(self.seed, self.group, rng.PURPOSE["gaussian_v2"], start, stop)

    def make(self, key: Any) -> np.ndarray:
        if isinstance(key, tuple):
            return self.part(*key)
        if key in _FOR_KERNELS:
            return _FOR_KERNELS[key](self)
        length = self.lengths.get(key, self.padded)
        if key == "gain":
            # Drawing g in order and then gathering costs a quarter of drawing it at scattered positions.
            compiled = kernels("fastfood") if length >= _FAR else None
            if compiled is not None and compiled.permutes(length):
                return compiled.permuted(self.part("g", 0, length), self.held("keys"))  # type: ignore[no-any-return]
            return np.take(self.part("g", 0, length), self.part("perm", 0, length))
        whole = self.part(key, 0, length)
        # Half the memory if positions fit in 32 bits.
        return whole.astype(np.int32) if whole.dtype == np.int64 and self.padded <= 1 << 31 else whole

    def piece(self, backend: Backend, name: str, start: int, stop: int, like: Array, dtype: str | None = None) -> Array:
        """:meth:`part` in like's library; sliced from the whole vector if that has been drawn already."""
        if name in self.kept:
            whole = self.on(backend, name, like)[start:stop]
            return whole if dtype is None else backend.astype(whole, dtype)
        return self.on(backend, (name, start, stop), like, dtype, keep=False)


# Arrays that only the compiled kernels use.
_FOR_KERNELS: dict[str, Callable[[FastfoodDraws], np.ndarray]] = {
    "keys": lambda d: rng.words(d.seed, d.group, rng.PURPOSE["permutation"], 0, 8),
    # Whole vectors of the padded length: the kernels multiply by signs without asking where the output ends.
    "words": lambda d: rng.words(d.seed, d.group, rng.PURPOSE["signs"], 0, max(1, d.padded // 32)),
    "buckets": lambda d: kernels("fastfood").buckets_of(d.padded, d.held("keys")),
    "starts": lambda d: kernels("fastfood").starts_of(d.held("buckets")),
    "order": lambda d: kernels("fastfood").order_of(d.padded, d.held("keys"), d.held("starts")),
}


class _HadamardRows(FixedArrays):
    """Blocks of orthonormal Hadamard matrices: entry (i, j) is (-1) ** popcount(i & j) / sqrt(size).

    Keys are (first row, last row + 1, first column, last column + 1, size).
    """

    def make(self, key: Any) -> np.ndarray:
        row_start, row_stop, col_start, col_stop, size = key
        bits: np.ndarray = np.bitwise_and.outer(np.arange(row_start, row_stop), np.arange(col_start, col_stop))
        # Fold the bits of i & j onto the lowest one by XOR: the parity of the number of set bits.
        for shift in (32, 16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return np.asarray((1 - 2 * (bits & 1)) / math.sqrt(size))


hadamard_rows = _HadamardRows()

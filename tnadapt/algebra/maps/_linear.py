"""Fastfood: F from two Walsh-Hadamard transforms, a normal diagonal, a permutation, and signs or a second diagonal.

Paper symbols (equation 4, appendix A.6): H the Walsh-Hadamard matrix, G the Gaussian diagonal, Π the permutation, B the
signs (G' in the v2 kind).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._digest import digest_of
from ._fastfood_draws import FastfoodDraws, hadamard_rows
from ._map import Map
from .walsh_hadamard import fwht_last

__all__ = ["Linear", "LinearV2"]

# How many elements of the long vector a slice draws at a time: several short blocks together, or part of a long one.
_SLICE_CHUNK = 1 << 16
_SLICE_PART = 1 << 18
# Shorter slices are cut from a block of this length, so that the matrix products are not too thin.
_LEAST_BLOCK = 1 << 10


class Linear(Map):
    """``v = H pad(x);  z[j] = (g v)[perm[j]];  y = (H z)[:n_out] * signs``.

    Attributes
    ----------
    padded : int
        L, the length of the transforms: the least power of two that is at least ``max(n_in, n_out)``.
    draws : FastfoodDraws
    """

    kind = "linear"
    full_rank = exact_in_batches = True
    #: Whether a second normal diagonal replaces the signs.
    normal = False

    def __init__(self, n_in: int, n_out: int, seed: int = 0, group: int = 0) -> None:
        super().__init__(n_in, n_out, seed, group)
        self.padded = 1 << (max(n_in, n_out) - 1).bit_length()
        # Length of the transform in H pad(x) after pruning: H of a zero-padded vector repeats a shorter transform.
        self._pruned = 1 << (n_in - 1).bit_length()
        self.draws = FastfoodDraws(self.normal, n_out, self.padded, self._pruned, seed, group)

    def forward(self, backend: Backend, x: Array) -> Array:
        found = backend.fastfood(x, self.draws, self.n_in, adjoint=False, fallback=self._fallback(backend))
        return self.forward_plain(backend, x) if found is None else found

    def adjoint(self, backend: Backend, y: Array) -> Array:
        found = backend.fastfood(y, self.draws, self.n_in, adjoint=True, fallback=self._fallback(backend))
        return self.adjoint_plain(backend, y) if found is None else found

    def _fallback(self, backend: Backend) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        return functools.partial(self.forward_plain, backend), functools.partial(self.adjoint_plain, backend)

    def forward_plain(self, backend: Backend, x: Array) -> Array:
        """Compute F in the library's own operations: the reference implementation for every kernel."""
        kind = backend.dtype_name(x)
        z = backend.take(self._small_transform(backend, x), self.draws.on(backend, "index", x))
        z = z * self.draws.on(backend, "gain", x, kind)
        return fwht_last(backend, z)[..., : self.n_out] * self.draws.on(backend, "diagonal", x, kind)

    def _small_transform(self, backend: Backend, x: Array) -> Array:
        """Compute one period of ``H pad(x)``, which is periodic because the padding is zero."""
        return fwht_last(backend, backend.pad_last(x, self._pruned)) * math.sqrt(self._pruned / self.padded)

    def adjoint_plain(self, backend: Backend, y: Array) -> Array:
        kind = backend.dtype_name(y)
        u = fwht_last(backend, backend.pad_last(y * self.draws.on(backend, "diagonal", y, kind), self.padded))
        v = backend.take(u * self.draws.on(backend, "gain", y, kind), self.draws.on(backend, "inverse", y))
        # The adjoint of repeating is summing over the repeats.
        v = backend.reshape(v, (*v.shape[:-1], self.padded // self._pruned, self._pruned))
        v = backend.sum(v, axis=-2) * math.sqrt(self._pruned / self.padded)
        return fwht_last(backend, v)[..., : self.n_in]

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        """Compute a slice with ``H = H_high ⊗ H_low``, ``H_low`` as long as the slice.

        Rows of ``H_high`` combine the blocks of z; ``H_low`` then transforms only the combined blocks.
        """
        kind = backend.dtype_name(x)
        low = min(self.padded, max(_LEAST_BLOCK, 1 << (stop - start).bit_length() - 1))
        first, end = start // low, (stop - 1) // low + 1
        y = fwht_last(backend, self._mixed(backend, x, low, first, end))
        y = backend.reshape(y, (*x.shape[:-1], (end - first) * low))[..., start - first * low : stop - first * low]
        return y * self.draws.piece(backend, "diagonal", start, stop, x, kind)

    def _mixed(self, backend: Backend, x: Array, low: int, first: int, end: int) -> Array:
        """Multiply rows ``first`` to ``end - 1`` of H_high by z in blocks of ``low``: shape (…, end - first, low)."""
        kind, high = backend.dtype_name(x), self.padded // low
        small = self._small_transform(backend, x)
        # One part of the columns at a time, so that besides the sum only part of a block is in memory.
        step, width = max(1, _SLICE_CHUNK // low), min(low, _SLICE_PART)
        parts = []
        for column in range(0, low, width):
            mixed = None
            for block in range(0, high, step):
                blocks = min(step, high - block)
                lo = block * low + column
                # Contiguous: either there is one block (step is 1), or its columns are all there (width is low).
                hi = lo + blocks * width
                z = backend.take(small, self.draws.piece(backend, "index", lo, hi, x))
                z = z * self.draws.piece(backend, "gain", lo, hi, x, kind)
                z = backend.reshape(z, (*x.shape[:-1], blocks, width))
                rows = hadamard_rows.on(backend, (first, end, block, block + blocks, high), x, kind, keep=False)
                part = backend.precise_matmul(rows, z)
                mixed = part if mixed is None else mixed + part
            parts.append(mixed)
        return backend.concat(parts, axis=-1)

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of a stream without the rest."""
        return self.draws.part(name, start, stop)

    def gain(self) -> float:
        return math.sqrt(self.n_in * self.n_out) / self.padded

    def variance(self) -> float:
        return self.n_in / self.padded

    def squared_norm(self) -> float:
        return self.n_in * self.n_out / self.padded

    def cost(self) -> int:
        """Return ``L log2 L`` additions per transform, the first one of F's input only, and three products per element.

        ``L`` of the first transform is the least power of two that ``n_in`` fits in.
        """
        small, length = 1 << (self.n_in - 1).bit_length(), self.padded
        return small * (small.bit_length() - 1) + length * (length.bit_length() - 1) + 3 * length

    def digest(self) -> str:
        return digest_of(self, {"perm": self.padded, "g": self.padded, "diagonal": self.n_out})


class LinearV2(Linear):
    """:class:`Linear` with a normal vector g' instead of the signs."""

    kind = "linear_v2"
    normal = True

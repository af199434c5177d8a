"""One-hot maps: each element of the output is one element of the input, scaled so that the map is an isometry."""

from __future__ import annotations

import math

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .. import rng
from ._digest import digest_of
from ._map import Map

__all__ = ["OneHot", "SignedOneHot"]


class OneHot(Map):
    """``y_i = x_j / sqrt(c_j)`` with ``j = perm[i] mod n_in``, and c_j the number of outputs that take x_j.

    The permutation of the outputs is that of :func:`tnadapt.algebra.rng.permutation`, so that every input is taken
    ⌊n_out / n_in⌋ or ⌈n_out / n_in⌉ times, and ``FᵀF = 1`` for ``n_in <= n_out``. Uni-LoRA's map (arXiv 2506.00799),
    whose positions are drawn independently.
    """

    kind = "one-hot"
    fixed: tuple[str, ...] = ("index",)
    signed = False

    def _coefficients(self) -> np.ndarray:
        """1 / sqrt(c_j) of every input; an input that no output takes has 1."""
        taken, rest = divmod(self.n_out, self.n_in)
        counts = np.full(self.n_in, taken, np.int64)
        counts[:rest] += 1
        return 1.0 / np.sqrt(np.maximum(counts, 1))

    def make(self, key: object) -> np.ndarray:
        """Draw the positions, the coefficients of the inputs, or the signs of the outputs."""
        if key == "coefficients":
            return self._coefficients()
        if key == "order":
            # perm[order[k]] = k, so that outputs order[j], order[j + n_in], … take x_j.
            return rng.permutation(self.n_out, self.seed, self.group, inverse=True)
        if key == "signs":
            return rng.signs(self.seed, self.group, 0, self.n_out)
        whole = rng.permutation(self.n_out, self.seed, self.group) % self.n_in
        return whole.astype(np.int32) if self.n_in <= 1 << 31 else whole

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of the permutation or the signs without the rest."""
        if name == "signs":
            return rng.signs(self.seed, self.group, start, stop)
        return rng.permutation(self.n_out, self.seed, self.group, start, stop)

    def digest(self) -> str:
        return digest_of(self, {"perm": self.n_out} | ({"signs": self.n_out} if self.signed else {}))

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.slice(backend, x, 0, self.n_out)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        kind = backend.dtype_name(x)
        scaled = x * self._in_dtype(backend, x, kind)
        found = backend.take(scaled, self.on(backend, "index", x)[start:stop])
        if self.signed:
            found = found * self.on(backend, "signs", x, kind)[start:stop]
        return found

    def _in_dtype(self, backend: Backend, x: Array, kind: str) -> Array:
        return self.on(backend, "coefficients", x, kind)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        # In the order of the permutation, every run of n_in outputs takes each input once.
        kind = backend.dtype_name(y)
        if self.signed:
            y = y * self.on(backend, "signs", y, kind)
        rows = -(-self.n_out // self.n_in)
        sorted_ = backend.take(y, self.on(backend, "order", y))
        padded = backend.pad_last(sorted_, rows * self.n_in)
        summed = backend.sum(backend.reshape(padded, (*y.shape[:-1], rows, self.n_in)), axis=-2)
        return summed * self._in_dtype(backend, y, kind)

    def gain(self) -> float:
        return min(self.n_in, self.n_out) / math.sqrt(self.n_in * self.n_out)

    def squared_norm(self) -> float:
        return float(min(self.n_in, self.n_out))

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        found = np.zeros((self.n_out, self.n_in))
        places = rng.permutation(self.n_out, self.seed, self.group)
        for row, place in enumerate(places.tolist()):
            found[row, place % self.n_in] = 1.0
        if self.signed:
            found *= rng.signs(self.seed, self.group, 0, self.n_out)[:, None]
        return np.asarray(found / np.sqrt(np.maximum(1.0, np.abs(found).sum(axis=0))))


class SignedOneHot(OneHot):
    """:class:`OneHot` with a random sign for every output: those of :func:`tnadapt.algebra.rng.signs`."""

    kind = "signed-one-hot"
    fixed = ("index", "signs")
    signed = True

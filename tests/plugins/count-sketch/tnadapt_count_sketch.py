"""The transposed count sketch for tnadapt: every element of the update is plus or minus one element of a short vector.

Charikar, Chen, Farach-Colton, "Finding frequent items in data streams" (ICALP 2002); as a map of weights HashedNets.
"""

from __future__ import annotations

import numpy as np

import tnadapt as tna
from tnadapt.algebra import rng
from tnadapt.algebra.maps import Map
from tnadapt.backends import Array, Backend

BUCKETS, SIGNS = (1 << 24) + 1, (1 << 24) + 2  # streams of this package's own


class CountSketch(Map):
    """``y[j] = sign[j] * x[bucket[j]]``."""

    fixed = ("bucket", "sign")

    def make(self, key: object) -> np.ndarray:
        if key == "bucket":
            return (rng.words(self.seed, self.group, BUCKETS, 0, self.n_out) % np.uint32(self.n_in)).astype(np.int64)
        if key == "sign":
            bits = rng.words(self.seed, self.group, SIGNS, 0, self.n_out) >> np.uint32(31)
            return (1 - 2 * bits.astype(np.int64)).astype(np.float32)
        # Which elements of the output each element of the input is in: rows padded with n_out, where a zero stands.
        bucket = self.host("bucket")
        counts = np.bincount(bucket, minlength=self.n_in)
        order = np.argsort(bucket, kind="stable")
        place = np.arange(self.n_out) - np.repeat(np.cumsum(counts) - counts, counts)
        members = np.full((self.n_in, int(counts.max())), self.n_out, np.int64)
        members[bucket[order], place] = order
        return members.reshape(-1)

    def forward(self, backend: Backend, x: Array) -> Array:
        taken = backend.take(x, self.on(backend, "bucket", x))
        return taken * self.on(backend, "sign", x, backend.dtype_name(x))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        signed = backend.pad_last(y * self.on(backend, "sign", y, backend.dtype_name(y)), self.n_out + 1)
        gathered = backend.take(signed, self.on(backend, "members", y))
        return backend.sum(backend.reshape(gathered, (*y.shape[:-1], self.n_in, -1)), axis=-1)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        taken = backend.take(x, self.on(backend, "bucket", x)[start:stop])
        return taken * self.on(backend, "sign", x, backend.dtype_name(x))[start:stop]

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return self.n_out

    def matrix(self) -> np.ndarray:
        found = np.zeros((self.n_out, self.n_in))
        for j, (bucket, sign) in enumerate(zip(self.make("bucket"), self.make("sign"), strict=True)):
            found[j, bucket] = sign
        return found


def register() -> None:
    """Entry point in the group ``tnadapt.plugins``."""
    tna.register_map("count-sketch", CountSketch)

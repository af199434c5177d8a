"""Digests of maps whose streams are drawn piece by piece; long streams are digested by their two ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from .. import rng

__all__ = ["digest_of"]

# Streams longer than twice this are digested by their two ends. That is enough to identify a stream, since each element
# is a pure function of its index.
_ENDS = 1 << 19


class _Drawn(Protocol):
    kind: str
    n_in: int
    n_out: int

    def part(self, name: str, start: int, stop: int) -> np.ndarray: ...


def digest_of(found: _Drawn, lengths: Mapping[str, int]) -> str:
    """Return the hex SHA-256 of kind, lengths and streams; beyond 2**20 elements, of the first and last 2**19."""
    head = f"tnadapt {found.kind} {found.n_in} {found.n_out}".encode()
    return rng.digest(iter([head]), *(_bytes(found, *stream) for stream in lengths.items()))


def _bytes(found: _Drawn, name: str, length: int) -> Iterator[bytes]:
    ends = [(0, length)]
    if length > 2 * _ENDS:
        ends = [(0, _ENDS), (length - _ENDS, length)]
    for first, last in ends:
        for lo, hi in rng.chunks(first, last):
            yield found.part(name, lo, hi).astype("<i8" if name == "perm" else "<f4").tobytes()

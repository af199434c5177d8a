"""A plug-in for tnadapt: frozen factors whose columns are columns of a Walsh-Hadamard matrix with permuted rows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from tnadapt.algebra import rng
from tnadapt.errors import ConfigError
from tnadapt.sources import Place, Source, Stream

__all__ = ["HadamardRows", "register"]


@dataclasses.dataclass(frozen=True)
class HadamardRows(Source):
    """A frozen factor (d, r) of entries ±1/√d: entry (i, j) has the sign of the parity of ``perm[i] & j``.

    Parameters
    ----------
    permuted : bool
        Whether the rows are permuted, by the config's seed.
    """

    permuted: bool = True

    @property
    def independent_of_group(self) -> bool:
        return not self.permuted

    def check(self, place: Place) -> None:
        if len(place.shape) != 2:
            raise ConfigError(f"HadamardRows is for factors; {place.name!r} has the shape {place.shape}")

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        rows, columns = shape
        order = rng.permutation(rows, stream.seed, stream.group) if self.permuted else np.arange(rows)
        bits = order[:, None] & np.arange(columns)[None, :]
        parity = np.array([[int(bit).bit_count() & 1 for bit in row] for row in bits])
        return np.asarray((1 - 2 * parity) / math.sqrt(rows), np.float32)

    def mean_square(self, shape: tuple[int, ...]) -> float:
        return 1.0 / shape[0]


def register() -> None:
    """Entry point: make the source known."""
    import tnadapt

    tnadapt.register_source("hadamard-rows", HadamardRows)

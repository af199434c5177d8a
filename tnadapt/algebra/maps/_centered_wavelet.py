"""The inverse wavelet transform of as many coefficients as the weight has elements: that of PEFT's WaveFT."""

from __future__ import annotations

import dataclasses

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._map import Map, Space
from ._map_settings import MapSettings
from ._wavelet import Wavelet, WaveletMap

__all__ = ["CenteredWavelet", "CenteredWaveletMap"]


@dataclasses.dataclass(frozen=True)
class CenteredWavelet(MapSettings):
    """:class:`Wavelet` of a matrix of the weight's own shape, which is put into the middle of its coefficients.

    The coefficients around it are zero, and the upper right and lower left quarter are interchanged, as in PEFT's
    WaveFT. For new adapters, use :class:`Wavelet`.

    Parameters
    ----------
    family : str
        ``"haar"``, or ``"db1"`` to ``"db10"``.

    Raises
    ------
    ConfigError
        If the family is unknown.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection.on_weights(tna.maps.CenteredWavelet("db3"), [(16, 15)])
    >>> f.n_in == 16 * 15
    True
    """

    family: str = "haar"

    def __post_init__(self) -> None:
        Wavelet(self.family)  # raises an error for an unknown one
        super().__post_init__()


class CenteredWaveletMap(Map):
    """``Y = W(E(X))``: E places X among zeros, W is the inverse wavelet transform."""

    kind = "centered-wavelet"
    settings_class = CenteredWavelet
    settings: CenteredWavelet
    shape: tuple[int, int]
    two_sided = True

    def __init__(self, *lengths: int, settings: CenteredWavelet, shape: tuple[int, int]) -> None:
        super().__init__(*lengths, settings=settings, shape=shape)
        wavelet = Wavelet(settings.family)
        self._sizes = wavelet.coefficients(shape[0]), wavelet.coefficients(shape[1])
        _, n_out, *draws = lengths
        self._inner = WaveletMap(self._sizes[0] * self._sizes[1], n_out, *draws, settings=wavelet, shape=shape)
        self.square, self.isometry = True, self._inner.isometry

    @classmethod
    def fixes_length(cls, settings: CenteredWavelet) -> bool:
        return True

    @classmethod
    def domain(cls, codomain: Space, settings: CenteredWavelet) -> Space:
        return codomain

    def make(self, key: object) -> np.ndarray:
        """Return where each element of X is among the coefficients, or which element each coefficient is."""
        (rows, cols), (high, wide) = self.shape, self._sizes
        row = np.arange(rows)[:, None] + (high - rows) // 2
        col = np.arange(cols)[None, :] + (wide - cols) // 2
        # The half of the rows becomes that of the columns, and the other way round.
        upper, left = row < high // 2, col < wide // 2
        row = row % (high // 2) + np.where(left, 0, high // 2)
        col = col % (wide // 2) + np.where(upper, 0, wide // 2)
        places = (row * wide + col).reshape(-1)
        if key == "places":
            return places.astype(np.int64)
        found = np.full(high * wide, self.n_in, np.int64)  # a zero that is appended
        found[places] = np.arange(self.n_in)
        return found

    def _embedded(self, backend: Backend, x: Array) -> Array:
        return backend.take(backend.pad_last(x, self.n_in + 1), self.on(backend, "sources", x))

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._inner.forward(backend, self._embedded(backend, x))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return backend.take(self._inner.adjoint(backend, y), self.on(backend, "places", y))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return self._inner.slice(backend, self._embedded(backend, x), start, stop)

    def cost(self) -> int:
        return self._inner.cost()

    def matrix(self) -> np.ndarray:
        (rows, cols), (high, wide) = self.shape, self._sizes
        whole = np.zeros((high, wide, rows * cols))
        for number in range(rows * cols):
            whole[number // cols + (high - rows) // 2, number % cols + (wide - cols) // 2, number] = 1.0
        (one, two), (three, four) = (np.split(half, 2, axis=1) for half in np.split(whole, 2))
        turned = np.concatenate([np.concatenate([one, three], axis=1), np.concatenate([two, four], axis=1)])
        return np.asarray(self._inner.matrix() @ turned.reshape(high * wide, -1))

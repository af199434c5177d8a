"""The inverse wavelet transform of a matrix, of one level (WaveFT)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends.backend import FixedArrays
from tnadapt.errors import ConfigError, safe_repr

from ._daubechies import DAUBECHIES
from ._map import Space
from ._map_settings import MapSettings
from ._two_sided import TwoSided

__all__ = ["Wavelet", "WaveletMap"]

_FILTERS = {"haar": DAUBECHIES["db1"], **DAUBECHIES}


@dataclasses.dataclass(frozen=True)
class Wavelet(MapSettings):
    """The inverse of one level of the two-dimensional wavelet transform.

    Parameters
    ----------
    family : str
        ``"haar"``, or ``"db1"`` to ``"db10"``: Daubechies with so many vanishing moments.
    periodic : bool
        Whether the weight continues periodically beyond its edges. The transform is then orthonormal, and rows and
        columns must be even. Otherwise any sizes are allowed, and a filter of length L takes
        ``2 ceil((rows + L - 2) / 2)`` rows of coefficients, and likewise for columns.

    Raises
    ------
    ConfigError
        If the family is unknown, or periodic is not a boolean.

    Notes
    -----
    The coefficients are a matrix of four quarters, as :func:`pywt.coeffs_to_array` arranges them: the first half of
    the rows (columns) are those of the low-pass filter along rows (columns).

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection.on_weights("wavelet", [(2, 2)])
    >>> f(np.array([2.0, 0.0, 0.0, 2.0])).reshape(2, 2).round(9)
    array([[2., 0.],
           [0., 2.]])
    >>> tna.Projection.on_weights(tna.maps.Wavelet("db3"), [(16, 16)]).n_in == 20 * 20
    True
    """

    family: str = "haar"
    periodic: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or self.family not in _FILTERS:
            raise ConfigError(
                f"Wavelet's family must be one of {', '.join(map(repr, _FILTERS))}; got {safe_repr(self.family)}"
            )
        if not isinstance(self.periodic, bool):
            raise ConfigError(f"Wavelet's periodic must be True or False; got {safe_repr(self.periodic)}")
        super().__post_init__()

    def coefficients(self, size: int) -> int:
        """Return the number of coefficients along a side of the weight."""
        if self.periodic:
            return size
        size += len(_FILTERS[self.family]) - 2
        return size + size % 2


class _Synthesis(FixedArrays):
    """Matrices from the coefficients to the samples of one side; keys are (family, periodic, number of samples)."""

    def make(self, key: Any) -> np.ndarray:
        family, periodic, samples = key
        low = np.array(_FILTERS[family])
        high = low[::-1] * (-1.0) ** np.arange(len(low))
        length = Wavelet(family, periodic).coefficients(samples)
        found = np.zeros((samples, length))
        for half, taps in enumerate((low, high)):
            for k in range(length // 2):
                for place, tap in enumerate(taps, 2 * k - (len(low) // 2 - 1 if periodic else len(low) - 2)):
                    if periodic:
                        found[place % samples, half * (length // 2) + k] += tap
                    elif 0 <= place < samples:
                        found[place, half * (length // 2) + k] += tap
        return found


class WaveletMap(TwoSided):
    """``Y = U X Vᵀ``, with U and V the synthesis matrices of rows and columns."""

    kind = "wavelet"
    settings_class = Wavelet
    settings: Wavelet
    matrices = _Synthesis()

    def __init__(self, *lengths: int, settings: Wavelet, shape: tuple[int, int]) -> None:
        super().__init__(*lengths, settings=settings, shape=shape)
        self.square = self.n_in == self.n_out
        # The two filters of Haar do not overlap, so that nothing is cut at the edges.
        self.isometry = settings.periodic or (len(_FILTERS[settings.family]) == 2 and self.square)

    @classmethod
    def fixes_length(cls, settings: Wavelet) -> bool:
        return True

    @classmethod
    def domain(cls, codomain: Space, settings: Wavelet) -> Space:
        assert codomain.shape is not None
        rows, cols = codomain.shape
        if settings.periodic and (rows % 2 or cols % 2):
            raise ConfigError(
                f"Wavelet with periodic=True needs even sizes, and a weight has {rows} rows and {cols} columns: leave "
                "periodic out"
            )
        shape = settings.coefficients(rows), settings.coefficients(cols)
        return Space(shape[0] * shape[1], shape)

    @property
    def shape_in(self) -> tuple[int, int]:
        return self.settings.coefficients(self.shape[0]), self.settings.coefficients(self.shape[1])

    @property
    def sides(self) -> Sequence[tuple[tuple[str, bool, int], tuple[str, bool, int]]]:
        family, periodic = self.settings.family, self.settings.periodic
        rows, cols = self.shape
        return [((family, periodic, rows), (family, periodic, cols))]

    def squared_norm(self) -> float:
        if self.isometry:
            return float(self.n_out)
        # fsum is correctly rounded, with the same bits on every machine.
        sums = [math.fsum((self.matrices.held(key) ** 2).reshape(-1).tolist()) for key in self.sides[0]]
        return sums[0] * sums[1]

    def matrix(self) -> np.ndarray:
        found = np.zeros((*self.shape, *self.shape_in))
        for (row, col), _ in np.ndenumerate(found[0, 0]):
            unit = np.zeros(self.shape_in)
            unit[row, col] = 1.0
            for axis in (0, 1):
                unit = np.apply_along_axis(self._synthesized, axis, unit, self.shape[axis])
            found[:, :, row, col] = unit
        return found.reshape(self.n_out, self.n_in)

    def _synthesized(self, coefficients: np.ndarray, samples: int) -> np.ndarray:
        """Compute one side by upsampling and convolution, as a filter bank does."""
        low = np.array(_FILTERS[self.settings.family])
        high = np.array([(-1) ** k * low[len(low) - 1 - k] for k in range(len(low))])
        halves = np.zeros((2, len(coefficients)))
        halves[:, ::2] = coefficients.reshape(2, -1)
        full = np.convolve(halves[0], low) + np.convolve(halves[1], high)
        if not self.settings.periodic:
            return full[len(low) - 2 :][:samples]
        found = np.zeros(samples)
        for place, value in enumerate(full, 1 - len(low) // 2):
            found[place % samples] += value
        return found

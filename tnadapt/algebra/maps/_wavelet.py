"""The inverse wavelet transform of a matrix, of one level (WaveFT)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays
from tnadapt.errors import ConfigError, safe_repr

from ._by_rows import ByRows
from ._daubechies import DAUBECHIES
from ._map import Space
from ._map_settings import MapSettings

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
    The coefficients are a matrix of four quarters, as ``pywt.coeffs_to_array`` arranges them: the first half of
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


class _Taps(FixedArrays):
    """Indices and factors of the filter bank of one side.

    Keys are (name, family, periodic, number of samples). With L taps, each sample is a sum over L / 2 coefficients of
    either half: rows of ``"coefficient"`` and of ``"low"`` and ``"high"``. Each coefficient is, in the adjoint, a sum
    over L samples: rows of ``"sample"``, the number of samples standing for a zero that is appended.
    """

    def make(self, key: Any) -> np.ndarray:
        name, family, periodic, samples = key
        low = np.array(_FILTERS[family])
        length, half = len(low), Wavelet(family, periodic).coefficients(samples) // 2
        shift = length // 2 - 1 if periodic else length - 2
        if name == "sample":
            found = 2 * np.arange(half)[None, :] - shift + np.arange(length)[:, None]
            return found % samples if periodic else np.where((found >= 0) & (found < samples), found, samples)
        places = np.arange(samples)[None, :] + shift
        number = np.arange(length // 2)[:, None]
        if name == "coefficient":
            return (places // 2 - number) % half
        taps = low if name == "low" else _mirrored(low)
        return np.asarray(taps[places % 2 + 2 * number])


def _mirrored(low: np.ndarray) -> np.ndarray:
    """Return the high-pass filter of a low-pass filter."""
    return np.asarray(low[::-1] * (-1.0) ** np.arange(len(low)))


_taps = _Taps()


class WaveletMap(ByRows):
    """``Y = U X Vᵀ``, with U and V the synthesis matrices of rows and columns, applied tap by tap."""

    kind = "wavelet"
    settings_class = Wavelet
    settings: Wavelet

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
    def _shape_in(self) -> tuple[int, int]:
        return self.settings.coefficients(self.shape[0]), self.settings.coefficients(self.shape[1])

    def _key(self, name: str, side: int) -> tuple[str, str, bool, int]:
        return name, self.settings.family, self.settings.periodic, self.shape[side]

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        """Compute some rows of Y, flattened."""
        batch = tuple(x.shape[:-1])
        x = backend.reshape(x, (*batch, *self._shape_in))
        x = backend.matrix_transpose(self._synthesis(backend, backend.matrix_transpose(x), 0, first, last))
        x = self._synthesis(backend, x, 1, 0, self.shape[1])
        return backend.reshape(x, (*batch, (last - first) * self.shape[1]))

    def _synthesis(self, backend: Backend, x: Array, side: int, first: int, last: int) -> Array:
        """Compute some samples of one side, the last axis, from all of its coefficients."""
        kind = backend.dtype_name(x)
        half = x.shape[-1] // 2
        index = _taps.on(backend, self._key("coefficient", side), x)
        found = None
        for name, part in (("low", x[..., :half]), ("high", x[..., half:])):
            taps = _taps.on(backend, self._key(name, side), x, kind)
            for number in range(index.shape[0]):
                own = backend.take(part, index[number, first:last]) * taps[number, first:last]
                found = own if found is None else found + own
        return found

    def adjoint(self, backend: Backend, y: Array) -> Array:
        batch = tuple(y.shape[:-1])
        y = self._analysis(backend, backend.reshape(y, (*batch, *self.shape)), 1)
        y = backend.matrix_transpose(self._analysis(backend, backend.matrix_transpose(y), 0))
        return backend.reshape(y, (*batch, self.n_in))

    def _analysis(self, backend: Backend, y: Array, side: int) -> Array:
        """Apply the adjoint of :meth:`_synthesis`."""
        index = _taps.on(backend, self._key("sample", side), y)
        y = backend.pad_last(y, y.shape[-1] + 1)
        low = _FILTERS[self.settings.family]
        halves: list[Array] = [None, None]
        for number in range(len(low)):
            samples = backend.take(y, index[number, :])
            # The high-pass filter is the mirrored low-pass one, every second tap negated.
            for half, tap in enumerate((low[number], (-1) ** number * low[len(low) - 1 - number])):
                halves[half] = samples * tap if halves[half] is None else halves[half] + samples * tap
        return backend.concat(halves, axis=-1)

    def squared_norm(self) -> float:
        if self.isometry:
            return float(self.n_out)
        # fsum is correctly rounded, with the same bits on every machine.
        keys = [[self._key(name, side) for name in ("low", "high")] for side in (0, 1)]
        rows, cols = (
            math.fsum(v for key in side for v in (_taps.make(key) ** 2).reshape(-1).tolist()) for side in keys
        )
        return rows * cols

    def cost(self) -> int:
        (rows, cols), cols_in = self.shape, self._shape_in[1]
        return len(_FILTERS[self.settings.family]) * rows * (cols_in + cols)

    def matrix(self) -> np.ndarray:
        found = np.zeros((*self.shape, *self._shape_in))
        for (row, col), _ in np.ndenumerate(found[0, 0]):
            unit = np.zeros(self._shape_in)
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

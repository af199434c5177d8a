"""Transforms of the rows and columns of a matrix, ``sum_t L_t X R_tᵀ``: cosine, Fourier, and wavelets."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Array, Backend, FixedArrays
from tnadapt.errors import ConfigError, safe_repr

from ._map import ByRows, Map, MapSettings, Space

# -- One side: a product with a fixed matrix ---------------------------------------------------------------------------


class SideMatrix(Map):
    """``y = M x`` with a square matrix M that several maps share, by its key in ``matrices``."""

    kind = "side matrix"

    def __init__(self, matrices: FixedArrays, key: Hashable, size: int) -> None:
        super().__init__(size, size)
        self._matrices, self._key = matrices, key

    def forward(self, backend: Backend, x: Array) -> Array:
        return backend.precise_matmul(x, backend.matrix_transpose(self._placed(backend, x)))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return backend.precise_matmul(y, self._placed(backend, y))

    def _placed(self, backend: Backend, like: Array) -> Array:
        return self._matrices.on(backend, self._key, like, backend.dtype_name(like))

    def matrix(self) -> np.ndarray:
        return np.asarray(self._matrices.host(self._key))


# -- The base class of two-sided transforms ----------------------------------------------------------------------------


class TwoSided(ByRows):
    """``Y = sum_t L_t X R_tᵀ`` with square matrices, which a subclass names in :attr:`side_keys`, as keys of
    :attr:`matrices`.

    Attributes
    ----------
    matrices : FixedArrays
        Shared by all maps of a class, because maps of equal sizes have equal matrices. They are not digested: they
        depend on sizes and settings only, and the last bits of sines and cosines differ between machines.
    """

    matrices: FixedArrays

    @property
    def side_keys(self) -> Sequence[tuple[Hashable, Hashable]]:
        """Keys of ``L_t``, as long as the rows of Y, and of ``R_t``, as its columns."""
        raise self._lacks("side_keys")

    def sides(self) -> Sequence[tuple[Map, Map]]:
        rows, cols = self.shape
        return [
            (SideMatrix(self.matrices, left, rows), SideMatrix(self.matrices, right, cols))
            for left, right in self.side_keys
        ]

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        """Compute some rows of Y, flattened."""
        batch = tuple(x.shape[:-1])
        x = backend.reshape(x, (*batch, *self.shape))
        total = None
        for left, right in self.side_keys:
            mapped = backend.precise_matmul(x, backend.matrix_transpose(self._side(backend, right, x)))
            part = backend.precise_matmul(self._side(backend, left, x)[first:last, :], mapped)
            total = part if total is None else total + part
        return backend.reshape(total, (*batch, (last - first) * self.shape[1]))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        batch = tuple(y.shape[:-1])
        y = backend.reshape(y, (*batch, *self.shape))
        total = None
        for left, right in self.side_keys:
            back = backend.precise_matmul(backend.matrix_transpose(self._side(backend, left, y)), y)
            part = backend.precise_matmul(back, self._side(backend, right, y))
            total = part if total is None else total + part
        return backend.reshape(total, (*batch, self.n_in))

    def _side(self, backend: Backend, key: Hashable, like: Array) -> Array:
        return self.matrices.on(backend, key, like, backend.dtype_name(like))

    def cost(self) -> int:
        return len(self.side_keys) * self.n_out * sum(self.shape)


# -- The inverse cosine transform (LoCA) -------------------------------------------------------------------------------


class _Cosines(FixedArrays):
    """Transposed orthonormal DCT-II matrices by their sizes."""

    def make(self, key: Any) -> np.ndarray:
        size = int(key)
        # Reduced modulo the period in integers, so that the cosine of a large argument loses nothing.
        turns = ((2 * np.arange(size)[:, None] + 1) * np.arange(size)[None, :]) % (4 * size)
        cosines = np.cos(turns * (math.pi / (2 * size))) * math.sqrt(2.0 / size)
        cosines[:, 0] = 1.0 / math.sqrt(size)
        return np.asarray(cosines)


class Dct2(TwoSided):
    """``Y = Cᵀ X D``, with C and D the orthonormal DCT-II matrices of rows and columns: the inverse transform."""

    kind = "dct2"
    square = isometry = True
    matrices = _Cosines()

    @property
    def side_keys(self) -> Sequence[tuple[int, int]]:
        return [self.shape]

    def squared_norm(self) -> float:
        return float(self.n_out)

    def matrix(self) -> np.ndarray:
        from scipy.fft import idctn

        units = np.eye(self.n_in).reshape(self.n_in, *self.shape)
        return np.asarray(idctn(units, type=2, axes=(1, 2), norm="ortho")).reshape(self.n_in, self.n_out).T


# -- The real part of the inverse Fourier transform (FourierFT) --------------------------------------------------------


# About how many multiply-adds of a matrix product take as long as one of an FFT on the CPU.
_PRODUCTS_PER_STEP = 8


class _Waves(FixedArrays):
    """Cosines, sines and negated sines of ``2 π j k / size``, divided by the size; keys are (name, size)."""

    def make(self, key: Any) -> np.ndarray:
        name, size = key
        # Reduced modulo the period in integers, so that the cosine of a large argument loses nothing.
        turns = np.outer(np.arange(size), np.arange(size)) % size
        angles = turns * (2.0 * math.pi / size)
        if name == "cos":
            return np.asarray(np.cos(angles) / size)
        return np.asarray(np.sin(angles) / (-size if name == "-sin" else size))


class Dft2(TwoSided):
    """``Y = Re(ifft2(X))`` for a real X, with the normalization of ``numpy.fft``: 1 / (rows * cols).

    It is computed by the FFT of X's library, or by products with matrices of cosines and sines: the reference
    implementation, which is also used where a library has no FFT of X, and for sides with which it is faster. These are
    the ones with which an FFT has more than an eighth of the operations, such as primes below 200. The choice depends
    on the sides alone. A slice is cut from the whole by an FFT, which takes less time than the products of one row.
    """

    kind = "dft2"
    square = True
    even_columns = True  # except for up to four frequencies that are their own negatives
    matrices = _Waves()

    @property
    def side_keys(self) -> Sequence[tuple[tuple[str, int], tuple[str, int]]]:
        # The real part of exp(i a) exp(i b): cos a cos b - sin a sin b.
        rows, cols = self.shape
        return [(("cos", rows), ("cos", cols)), (("-sin", rows), ("sin", cols))]

    def forward(self, backend: Backend, x: Array) -> Array:
        transformed = self._by_fft(backend, x)
        return self.forward_plain(backend, x) if transformed is None else transformed

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self.forward(backend, y)  # the matrix is symmetric

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        transformed = self._by_fft(backend, x)
        return super().slice(backend, x, start, stop) if transformed is None else transformed[..., start:stop]

    def forward_plain(self, backend: Backend, x: Array) -> Array:
        """Compute F by matrix products: the reference implementation for every FFT."""
        return super().forward(backend, x)

    def _by_fft(self, backend: Backend, x: Array) -> Array | None:
        if not self._fft_is_faster:
            return None
        matrices = backend.reshape(x, (*x.shape[:-1], *self.shape))
        transformed = backend.dft2(matrices, functools.partial(self._plain_matrices, backend))
        return None if transformed is None else backend.reshape(transformed, x.shape)

    def _plain_matrices(self, backend: Backend, matrices: Array) -> Array:
        batch = matrices.shape[:-2]
        return backend.reshape(
            self.forward_plain(backend, backend.reshape(matrices, (*batch, self.n_in))), (*batch, *self.shape)
        )

    @property
    def _fft_is_faster(self) -> bool:
        return _PRODUCTS_PER_STEP * self._fft_cost <= super().cost()

    @property
    def _fft_cost(self) -> int:
        # A transform of real numbers takes half as many products.
        return math.ceil(self.n_in * sum(map(_products, self.shape)) / 2)

    def cost(self) -> int:
        return self._fft_cost if self._fft_is_faster else super().cost()

    @property
    def _self_conjugate(self) -> int:
        """Number of frequencies that are their own negatives; the others have equal cosines in pairs."""
        return math.gcd(2, self.shape[0]) * math.gcd(2, self.shape[1])

    def squared_norm(self) -> float:
        # The sum of cos² of all angles: half of them, and half the sum of the cosines of the doubled angles, which is
        # rows * cols for every frequency whose double is zero.
        return 0.5 * (1.0 + self._self_conjugate / self.n_out)

    def freedom(self) -> int:
        return (self.n_out + self._self_conjugate) // 2

    def matrix(self) -> np.ndarray:
        units = np.eye(self.n_in).reshape(self.n_in, *self.shape)
        return np.asarray(np.fft.ifft2(units, axes=(1, 2)).real).reshape(self.n_in, self.n_out).T


def _products(size: int) -> float:
    """Return the products per element of a complex FFT of this length."""
    # About p for each prime factor p of the length (Cooley & Tukey, 1965), or three transforms of a power of two of at
    # least twice the length (Bluestein, 1970), if that is less.
    bits = (2 * size - 2).bit_length()
    total, left, factor = 0, size, 2
    while factor * factor <= left:
        if left % factor:
            factor += 1
        else:
            total, left = total + factor, left // factor
    total += left if left > 1 else 0
    return min(total, 6 * bits * (1 << bits) / size)


# -- Filters of the Daubechies wavelets with 1 to 10 vanishing moments -------------------------------------------------

# The factor ``(1 + z)^N Q(z)`` of minimal phase, with the sum √2, computed with 60 digits; PyWavelets calls them
# ``rec_lo``.


DAUBECHIES: dict[str, tuple[float, ...]] = {
    "db1": (0.7071067811865476, 0.7071067811865476),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db3": (
        0.33267055295008263, 0.8068915093110925, 0.45987750211849154, -0.13501102001025458,
        -0.08544127388202666, 0.03522629188570953,
    ),
    "db4": (
        0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854,
        -0.18703481171909309, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032,
    ),
    "db5": (
        0.16010239797419293, 0.6038292697971896, 0.7243085284377729, 0.13842814590132074,
        -0.24229488706638203, -0.032244869584638375, 0.07757149384004572, -0.006241490212798274,
        -0.012580751999081999, 0.0033357252854737712,
    ),
    "db6": (
        0.11154074335010947, 0.49462389039845306, 0.7511339080210954, 0.31525035170919763,
        -0.22626469396543983, -0.12976686756726194, 0.09750160558732304, 0.027522865530305727,
        -0.03158203931748603, 0.0005538422011614961, 0.004777257510945511, -0.0010773010853084796,
    ),
    "db7": (
        0.07785205408500918, 0.3965393194819173, 0.7291320908462351, 0.4697822874051931, -0.14390600392856498,
        -0.22403618499387498, 0.07130921926683026, 0.08061260915108308, -0.03802993693501441,
        -0.01657454163066688, 0.01255099855609984, 0.0004295779729213665, -0.0018016407040474908,
        0.00035371379997452024,
    ),
    "db8": (
        0.05441584224310401, 0.31287159091429995, 0.6756307362972898, 0.5853546836542067,
        -0.015829105256349306, -0.2840155429615469, 0.0004724845739132828, 0.12874742662047847,
        -0.017369301001807547, -0.044088253930794755, 0.013981027917398282, 0.008746094047405777,
        -0.004870352993451574, -0.00039174037337694705, 0.0006754494064505693, -0.00011747678412476953,
    ),
    "db9": (
        0.038077947363878345, 0.24383467461259034, 0.6048231236901112, 0.6572880780513005,
        0.13319738582500756, -0.2932737832791749, -0.09684078322297646, 0.14854074933810638,
        0.03072568147933338, -0.06763282906132997, 0.00025094711483145197, 0.022361662123679096,
        -0.004723204757751397, -0.00428150368246343, 0.0018476468830562265, 0.00023038576352319597,
        -0.0002519631889427101, 3.93473203162716e-05,
    ),
    "db10": (
        0.026670057900555554, 0.1881768000776915, 0.5272011889317256, 0.6884590394536035, 0.2811723436605775,
        -0.24984642432731538, -0.19594627437737705, 0.12736934033579325, 0.09305736460357235,
        -0.07139414716639708, -0.029457536821875813, 0.033212674059341, 0.0036065535669561697,
        -0.010733175483330575, 0.001395351747052901, 0.001992405295185056, -0.0006858566949597116,
        -0.00011646685512928545, 9.358867032006959e-05, -1.3264202894521244e-05,
    ),
}  # fmt: skip


# -- The inverse wavelet transform, of one level (WaveFT) --------------------------------------------------------------


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

    _flags = ("periodic",)

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or self.family not in _FILTERS:
            raise ConfigError(
                f"Wavelet's family must be one of {', '.join(map(repr, _FILTERS))}; got {safe_repr(self.family)}"
            )
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
            index = 2 * np.arange(half)[None, :] - shift + np.arange(length)[:, None]
            return index % samples if periodic else np.where((index >= 0) & (index < samples), index, samples)
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
    _sized_by_settings = True

    def __init__(self, *lengths: int, settings: Wavelet, shape: tuple[int, int]) -> None:
        super().__init__(*lengths, settings=settings, shape=shape)
        self.square = self.n_in == self.n_out
        # Haar's filters do not overlap, so nothing is cut off at the edges.
        self.isometry = settings.periodic or (len(_FILTERS[settings.family]) == 2 and self.square)

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
        dtype = backend.dtype_name(x)
        half = x.shape[-1] // 2
        index = _taps.on(backend, self._key("coefficient", side), x)
        total = None
        for name, part in (("low", x[..., :half]), ("high", x[..., half:])):
            taps = _taps.on(backend, self._key(name, side), x, dtype)
            for number in range(index.shape[0]):
                term = backend.take(part, index[number, first:last]) * taps[number, first:last]
                total = term if total is None else total + term
        return total

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
        matrix = np.zeros((*self.shape, *self._shape_in))
        for (row, col), _ in np.ndenumerate(matrix[0, 0]):
            unit = np.zeros(self._shape_in)
            unit[row, col] = 1.0
            for axis in (0, 1):
                unit = np.apply_along_axis(self._synthesized, axis, unit, self.shape[axis])
            matrix[:, :, row, col] = unit
        return matrix.reshape(self.n_out, self.n_in)

    def _synthesized(self, coefficients: np.ndarray, samples: int) -> np.ndarray:
        """Compute one side by upsampling and convolution, as a filter bank does."""
        low = np.array(_FILTERS[self.settings.family])
        high = np.array([(-1) ** k * low[len(low) - 1 - k] for k in range(len(low))])
        halves = np.zeros((2, len(coefficients)))
        halves[:, ::2] = coefficients.reshape(2, -1)
        full = np.convolve(halves[0], low) + np.convolve(halves[1], high)
        if not self.settings.periodic:
            return full[len(low) - 2 :][:samples]
        wrapped = np.zeros(samples)
        for place, value in enumerate(full, 1 - len(low) // 2):
            wrapped[place % samples] += value
        return wrapped


# -- The inverse wavelet transform of as many coefficients as elements: PEFT's WaveFT ----------------------------------


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
    two_sided = _sized_by_settings = True

    def __init__(self, *lengths: int, settings: CenteredWavelet, shape: tuple[int, int]) -> None:
        super().__init__(*lengths, settings=settings, shape=shape)
        wavelet = Wavelet(settings.family)
        self._sizes = wavelet.coefficients(shape[0]), wavelet.coefficients(shape[1])
        _, n_out, *draws = lengths
        self._inner = WaveletMap(self._sizes[0] * self._sizes[1], n_out, *draws, settings=wavelet, shape=shape)
        self.square, self.isometry = True, self._inner.isometry

    def make(self, key: object) -> np.ndarray:
        """Return where each element of X is among the coefficients, or which element each coefficient is."""
        (rows, cols), (high, wide) = self.shape, self._sizes
        row = np.arange(rows)[:, None] + (high - rows) // 2
        col = np.arange(cols)[None, :] + (wide - cols) // 2
        # The halves of rows and columns are exchanged.
        upper, left = row < high // 2, col < wide // 2
        row = row % (high // 2) + np.where(left, 0, high // 2)
        col = col % (wide // 2) + np.where(upper, 0, wide // 2)
        places = (row * wide + col).reshape(-1)
        if key == "places":
            return places.astype(np.int64)
        element_at = np.full(high * wide, self.n_in, np.int64)  # the index of an appended zero
        element_at[places] = np.arange(self.n_in)
        return element_at

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
        (a, b), (c, d) = (np.split(half, 2, axis=1) for half in np.split(whole, 2))
        turned = np.concatenate([np.concatenate([a, c], axis=1), np.concatenate([b, d], axis=1)])
        return np.asarray(self._inner.matrix() @ turned.reshape(high * wide, -1))

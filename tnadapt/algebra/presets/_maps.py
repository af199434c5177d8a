"""Methods whose map determines the trained values of each weight: SHiRA, FourierFT, LoCA, WaveFT, C3A and MiSS."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.maps import Circulant, Scatter, Tile, Wavelet
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError

from ._preset import (
    AdaptedWeights,
    Float,
    Ladder,
    Named,
    Preset,
    Recognize,
    Sizes,
    alpha_over_rank,
    each_shape,
    one_size,
    preset_config,
    up_to,
)

__all__ = ["c3a", "fourierft", "loca", "miss", "shira", "waveft"]


# -- Methods whose map determines the trained values of each weight: SHiRA, FourierFT, LoCA, WaveFT, C3A and MiSS ------


def _few_values(projection: Any, changes: dict[str, Any]) -> Config:
    """Return a config with one vector per weight, as long as the map determines; alpha is the scale."""
    return preset_config(
        changes, groups="weight", order=1, fold="stack", format="dense", rank=1, projection=projection, on="weight"
    )


@checks_arguments
def shira(n: int = 1000, positions: Sequence[int] | None = None, **changes: Any) -> Config:
    """SHiRA: n elements of each weight are trained, the others stay (Bhardwaj et al., arXiv 2406.13175).

    Settings: one group per weight, order 1, dense, F scatters n values. The positions are seeded, as the paper's random
    mask; the paper's other masks depend on the base, and are given. Parameters: n per weight.

    Parameters
    ----------
    n : int
        Number of elements per weight.
    positions : sequence of int, optional
        Their positions in the weight, row by row; the same in all weights.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(shira(1000), [(768, 768)] * 24)
    24000
    """
    return _few_values(_scatter(n, positions), changes)


@checks_arguments
def fourierft(n: int = 1000, positions: Sequence[int] | None = None, **changes: Any) -> Config:
    """FourierFT: ``ΔW = alpha Re(ifft2(E))`` with n trained entries of E (Gao et al., arXiv 2405.03003).

    Settings: one group per weight, order 1, dense, F scatters n values and transforms them back, alpha = 150 (PEFT's
    ``scaling``). The inverse transform is NumPy's and torch's, divided by rows * cols. The entries start at zero; the
    paper starts them at random, so that the update is not zero at first. Parameters: n per weight.

    Parameters
    ----------
    n : int
        Number of frequencies per weight.
    positions : sequence of int, optional
        Positions of the frequencies in E, row by row; by default seeded, and in all weights the same.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(fourierft(1000), [(768, 768)] * 24)
    24000
    """
    return _few_values([_scatter(n, positions), "dft2"], {"alpha": 150.0, **changes})


@checks_arguments
def loca(n: int = 1000, positions: Sequence[int] | None = None, **changes: Any) -> Config:
    """LoCA: ``ΔW = alpha Cᵀ S D``, the inverse cosine transform of n trained entries (Du et al., arXiv 2502.06820).

    Settings: one group per weight, order 1, dense, F scatters n values and transforms them back; C and D are the
    orthonormal DCT-II matrices. The paper also learns the positions in a first phase; here they are seeded or given.
    Parameters: n per weight.

    Parameters
    ----------
    n : int
        Number of frequencies per weight.
    positions : sequence of int, optional
        Positions of the frequencies in S, row by row; by default seeded, and in all weights the same.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(loca(1000), [(768, 768)] * 24)
    24000
    """
    return _few_values([_scatter(n, positions), "dct2"], changes)


@checks_arguments
def waveft(n: int = 1000, positions: Sequence[int] | None = None, family: str = "haar", **changes: Any) -> Config:
    """WaveFT: ``ΔW = alpha`` times the inverse wavelet transform of n trained coefficients (arXiv 2505.12532).

    Settings: one group per weight, order 1, dense, F scatters n values and transforms them back, one level, alpha = 25
    (PEFT's ``scaling``). Parameters: n per weight.

    Parameters
    ----------
    n : int
        Number of coefficients per weight.
    positions : sequence of int, optional
        Positions in the matrix of coefficients, row by row, which :class:`tnadapt.maps.Wavelet` describes; by default
        seeded, and in all weights the same. (PEFT has its upper right and lower left quarter interchanged, and leaves
        coefficients at the edges out.)
    family : str
        "haar", or "db1" to "db10".

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(waveft(1000), [(768, 768)] * 24)
    24000
    """
    return _few_values([_scatter(n, positions), Wavelet(family)], {"alpha": 25.0, **changes})


def _scatter(n: int, positions: Sequence[int] | None) -> Scatter:
    count = integer("n", n, 1, MAX_SIZE, ConfigError)
    if positions is None:
        return Scatter(count)
    places = tuple(positions)
    if len(places) != count:
        raise ConfigError(f"n must be the number of positions; got n={count} and {len(places)} positions")
    return Scatter(count, places)


@checks_arguments
def c3a(block: int = 768, **changes: Any) -> Config:
    """C3A: blocks that are circulant matrices, ``ΔW_mn[s, t] = w_mn[(t - s) mod b] / cols`` (arXiv 2407.19342).

    Settings: one group per weight, order 1, dense, F makes the blocks. Divided by the number of columns, as in the
    authors' code and in PEFT. Parameters: rows * cols / b per weight.

    Parameters
    ----------
    block : int
        b, the size of a block; divides rows and columns of every weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(c3a(768), [(768, 768)] * 24), tna.parameter_count(c3a(128), [(768, 768)] * 24)
    (18432, 110592)
    """
    return _few_values(Circulant(block, average=True), changes)


@checks_arguments
def miss(r: int = 64, mini: int | None = None, **changes: Any) -> Config:
    """MiSS: ``ΔW[i, j] = D[i, j mod r]``, one matrix of r columns, repeated (Kang & Yin, arXiv 2409.15371).

    Settings: one group per weight, order 1, dense, F repeats the matrix. PEFT's ``miss_block`` is D transposed.
    Parameters: r rows per weight, or r * mini.

    Parameters
    ----------
    r : int
        Number of columns before they are repeated.
    mini : int, optional
        Number of rows before they are repeated, too (PEFT's ``mini_r``); by default rows are not repeated.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(miss(64), [(768, 768)] * 24) == 24 * 64 * 768
    True
    """
    rows = None if mini is None else integer("mini", mini, 1, MAX_SIZE, ConfigError)
    return _few_values(Tile(rows, integer("r", r, 1, MAX_SIZE, ConfigError)), changes)


# -- Formulas, as the papers state them -------------------------------------------------------------------------------


def _values(p: Named, config: Config, size: int) -> Float:
    """Place the trained numbers of SHiRA, FourierFT, LoCA or WaveFT in a vector of zeros."""
    scatter, values = _settings(config)[0], p("split0.dense")
    assert isinstance(scatter, Scatter)
    places = scatter.positions
    vector: Float = np.zeros(size)
    vector[list(places) if places is not None else rng.permutation(size, config.seed, 0, 0, len(values))] = values
    return vector


def _shira(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW = s, sparse; Bhardwaj et al.
    return alpha_over_rank(config) * _values(p, config, math.prod(shape))


def _fourierft(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW = α Re(IDFT(E)); Gao et al., equation (3), with the normalization of their code's torch.fft.ifft2.
    spectrum = _values(p, config, math.prod(shape)).reshape(shape)
    return np.asarray(alpha_over_rank(config) * np.fft.ifft2(spectrum).real)


def _loca(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW = α Cᵀ S D; Du et al.: C_kl = sqrt(2/n) k_k cos((2 l + 1) k π / (2 n)), with k_0 = 1 / sqrt(2).
    spectrum = _values(p, config, math.prod(shape)).reshape(shape)

    def cosines(n: int) -> Float:
        k, place = np.indices((n, n))
        return np.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n)) * np.cos((2 * place + 1) * k * math.pi / (2 * n))

    c, d = map(cosines, shape)
    return np.asarray(alpha_over_rank(config) * c.T @ spectrum @ d)


def _waveft(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW = λ IDWT(C); the filter bank: zeros between coefficients, two convolutions, and the edges cut off.
    wavelet = _settings(config)[1]
    taps = _daubechies(1 if wavelet in ("wavelet", Wavelet("haar")) else int(wavelet.family[2:]))
    mirrored = taps[::-1] * (-1.0) ** np.arange(len(taps))
    longer = [2 * math.ceil((size + len(taps) - 2) / 2) for size in shape]
    grid = _values(p, config, math.prod(longer)).reshape(longer)
    for axis, size in enumerate(shape):
        halves = np.split(np.moveaxis(grid, axis, 0), 2)
        sums: Float = np.zeros((longer[axis] + len(taps), halves[0].shape[1]))
        for half, each in zip(halves, (taps, mirrored), strict=True):
            for k, row in enumerate(half):
                sums[2 * k : 2 * k + len(taps)] += np.outer(each, row)
        grid = np.moveaxis(sums[len(taps) - 2 :][:size], 0, axis)
    return alpha_over_rank(config) * grid


def _daubechies(moments: int) -> Float:
    """Factor ``|H|²`` with so many vanishing moments by the roots inside the unit circle; Daubechies 1988."""
    sine = [math.comb(moments - 1 + k, k) for k in range(moments)]
    polynomial: Any = np.poly1d([1.0])
    for root in np.roots(sine[::-1]):
        # y = (2 - z - 1/z) / 4
        pair = np.roots([1.0, 4.0 * root - 2.0, 1.0])
        polynomial *= np.poly1d([1.0, -pair[np.argmin(np.abs(pair))]])
    polynomial *= np.poly1d([1.0, 1.0]) ** moments
    taps = np.real(polynomial.coeffs)
    return np.asarray(taps * math.sqrt(2.0) / taps.sum())


def _c3a(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # Blocks of circulant matrices; Chen et al., divided by the number of inputs as in their code.
    from scipy.linalg import circulant

    assert isinstance(config.projection, Circulant)
    block, (rows, cols) = config.projection.block, shape
    kernels = p("split0.dense").reshape(rows // block, cols // block, block)
    blocks = [[circulant(kernel).T for kernel in row] for row in kernels]
    return alpha_over_rank(config) * np.block(blocks) / cols


def _miss(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW x = D times the sums of x over its parts of r elements; Kang & Yin. PEFT's mini repeats the rows, too.
    assert isinstance(config.projection, Tile)
    r, (rows, cols) = config.projection.cols, shape
    assert r is not None
    short = p("split0.dense").reshape(-1, r)
    sums = np.eye(r)[:, np.arange(cols) % r]
    whole = np.concatenate([short] * math.ceil(rows / len(short)))[:rows]
    return alpha_over_rank(config) * whole @ sums


# -- Sizes, and how configs are recognized -----------------------------------------------------------------------------


def _numbers_of_values(make: Callable[..., Config]) -> Sizes:
    """Return the numbers of values of each weight, as many as the smallest weight has elements."""
    return lambda weights: [Ladder(make, up_to(min(rows * cols for rows, cols in weights.shapes)))]


def _divisors(make: Callable[..., Config]) -> Sizes:
    def sizes(weights: AdaptedWeights) -> list[Ladder]:
        return [one_size(functools.partial(make, size)) for size in weights.divisors]

    return sizes


def _settings(config: Config) -> tuple[Any, ...]:
    return config.projection if isinstance(config.projection, tuple) else (config.projection,)


def _scattered(make: Callable[..., Config]) -> Recognize:
    def recognize(config: Config) -> str | None:
        scatter, *transform = _settings(config)
        if not isinstance(scatter, Scatter):
            return None
        assert scatter.size is not None  # or its positions set it
        seeded = config.replace(projection=(Scatter(scatter.size), *transform))
        return f"n = {scatter.size}" if seeded == make(scatter.size, alpha=None) else None

    return recognize


def _waveft_label(config: Config) -> str | None:
    _, *transform = _settings(config)
    family = transform[0].family if transform and isinstance(transform[0], Wavelet) else "haar"
    label = _scattered(functools.partial(waveft, family=family))(config)
    return label if label is None or family == "haar" else f"{label}, {family}"


def _c3a_label(config: Config) -> str | None:
    circulant = _settings(config)[0]
    if not isinstance(circulant, Circulant) or config != c3a(circulant.block, alpha=None):
        return None
    return f"b = {circulant.block}"


def _miss_label(config: Config) -> str | None:
    tile = _settings(config)[0]
    if not isinstance(tile, Tile) or not tile.cols or config != miss(tile.cols, tile.rows, alpha=None):
        return None
    return f"r = {tile.cols}" + (f", mini = {tile.rows}" if tile.rows else "")


# -- The records -------------------------------------------------------------------------------------------------------


MAP_PRESETS = (
    Preset(
        "shira", shira, "SHiRA", "Bhardwaj et al., arXiv 2406.13175", {"n": 10},
        sizes=_numbers_of_values(shira), recognize=_scattered(shira), formula=each_shape(_shira),
        peers={"PEFT": "SHIRA"},
    ),
    Preset(
        "fourierft", fourierft, "FourierFT", "Gao et al., arXiv 2405.03003", {"n": 10},
        sizes=_numbers_of_values(fourierft), recognize=_scattered(fourierft), formula=each_shape(_fourierft),
        peers={"PEFT": "FOURIERFT"},
    ),
    Preset(
        "loca", loca, "LoCA", "Du et al., arXiv 2502.06820", {"n": 10},
        sizes=_numbers_of_values(loca), recognize=_scattered(loca), formula=each_shape(_loca),
    ),
    Preset(
        "waveft", waveft, "WaveFT", "Bilican et al., arXiv 2505.12532", {"n": 10, "family": "db2"},
        sizes=_numbers_of_values(waveft), recognize=_waveft_label, formula=each_shape(_waveft),
        peers={"PEFT": "WAVEFT"},
    ),
    Preset(
        "c3a", c3a, "C3A", "Chen et al., arXiv 2407.19342", {"block": 4},
        sizes=_divisors(c3a), recognize=_c3a_label, formula=each_shape(_c3a), peers={"PEFT": "C3A"},
    ),
    Preset(
        "miss", miss, "MiSS", "Kang and Yin, arXiv 2409.15371", {"r": 3},
        sizes=_divisors(miss), recognize=_miss_label, formula=each_shape(_miss), peers={"PEFT": "MISS"},
    ),
)  # fmt: skip

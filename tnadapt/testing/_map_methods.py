"""The formulas of methods whose map determines what is trained; see ``_methods``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import Circulant, Scatter, Tile, Wavelet

from ._method_forms import Float, Method, Named, alpha_over_rank, each_shape

__all__ = ["MAP_METHODS"]


def _values(p: Named, config: Config, size: int) -> Float:
    """Place the trained numbers of SHiRA, FourierFT, LoCA or WaveFT in a vector of zeros."""
    projection = config.projection if isinstance(config.projection, tuple) else (config.projection,)
    scatter, values = projection[0], p("split0.dense")
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
    c, d = (
        np.array(
            [
                [
                    math.sqrt((1 if k == 0 else 2) / n) * math.cos((2 * place + 1) * k * math.pi / (2 * n))
                    for place in range(n)
                ]
                for k in range(n)
            ]
        )
        for n in shape
    )
    return np.asarray(alpha_over_rank(config) * c.T @ spectrum @ d)


def _waveft(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW = λ IDWT(C); the filter bank: zeros between coefficients, two convolutions, and the edges cut off.
    assert isinstance(config.projection, tuple)
    wavelet = config.projection[1]
    taps = _daubechies(1 if wavelet in ("wavelet", Wavelet("haar")) else int(wavelet.family[2:]))  # type: ignore[union-attr]
    mirrored = taps[::-1] * (-1.0) ** np.arange(len(taps))
    longer = [2 * math.ceil((size + len(taps) - 2) / 2) for size in shape]
    found = _values(p, config, math.prod(longer)).reshape(longer)
    for axis, size in enumerate(shape):
        halves = np.split(np.moveaxis(found, axis, 0), 2)
        sums: Float = np.zeros((longer[axis] + len(taps), halves[0].shape[1]))
        for half, each in zip(halves, (taps, mirrored), strict=True):
            for k, row in enumerate(half):
                sums[2 * k : 2 * k + len(taps)] += np.outer(each, row)
        found = np.moveaxis(sums[len(taps) - 2 :][:size], 0, axis)
    return alpha_over_rank(config) * found


def _daubechies(moments: int) -> Float:
    """Factor ``|H|²`` with so many vanishing moments by the roots inside the unit circle; Daubechies 1988."""
    sine = [math.comb(moments - 1 + k, k) for k in range(moments)]
    found: Any = np.poly1d([1.0])
    for root in np.roots(sine[::-1]):
        # y = (2 - z - 1/z) / 4
        pair = np.roots([1.0, 4.0 * root - 2.0, 1.0])
        found *= np.poly1d([1.0, -pair[np.argmin(np.abs(pair))]])
    found *= np.poly1d([1.0, 1.0]) ** moments
    taps = np.real(found.coeffs)
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
    sums: Float = np.zeros((r, cols))
    for column in range(cols):
        sums[column % r, column] = 1.0
    whole = np.concatenate([short] * math.ceil(rows / len(short)))[:rows]
    return alpha_over_rank(config) * whole @ sums


MAP_METHODS: dict[str, Method] = {
    "shira": each_shape(_shira),
    "fourierft": each_shape(_fourierft),
    "loca": each_shape(_loca),
    "waveft": each_shape(_waveft),
    "c3a": each_shape(_c3a),
    "miss": each_shape(_miss),
}

"""Presets whose map determines the trained values of each weight: SHiRA, FourierFT, LoCA, WaveFT, C3A and MiSS.

Users find them in :mod:`tnadapt.presets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, integer

from ._preset_config import preset_config
from .config import Config
from .folding import MAX_SIZE
from .maps import Circulant, Scatter, Tile, Wavelet

__all__ = ["c3a", "fourierft", "loca", "miss", "shira", "waveft"]


def _few_values(projection: Any, changes: dict[str, Any]) -> Config:
    """Return a config with one vector per weight, as long as the map determines; alpha is the scale."""
    own = {
        "groups": "weight",
        "order": 1,
        "fold": "stack",
        "format": "dense",
        "rank": 1,
        "projection": projection,
        "on": "weight",
    }
    return preset_config(own, changes)


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
    return Scatter(count, None if positions is None else tuple(positions))


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

"""Presets that say where the numbers come from: frozen, tied and scaled arrays, and a map before the network.

Users find them in :mod:`tnadapt.presets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, integer

from .config import Config, checked_number
from .folding import MAX_SIZE
from .joint_presets import preset_config
from .maps import Circulant, Scatter, Tile, Wavelet
from .sources import BaseCore, FromBase, Mixed, Scaled, Seeded, Source, Tied

__all__ = [
    "c3a",
    "craft",
    "fourierft",
    "loca",
    "lora_fa",
    "lora_xs",
    "miss",
    "nola",
    "randlora",
    "share_lora",
    "shira",
    "svft",
    "tied_lora",
    "tinylora",
    "unilora",
    "vera",
    "waveft",
]


# -- Presets that say where the numbers come from: frozen, tied and scaled arrays, and a map before the network --------

# Users find them in :mod:`tnadapt.presets`.


def _lora(rank: int, sources: dict[str, Source], changes: dict[str, Any], **own: Any) -> Config:
    """LoRA's settings with sources: one group per weight, stack, M = 2, CP."""
    base = {"groups": "weight", "fold": "stack", "order": 2, "format": "cp", "rank": rank, "sources": sources}
    return preset_config({**base, **own}, changes)


def lora_fa(rank: int = 4, **changes: Any) -> Config:
    """LoRA-FA: LoRA with a frozen random A (Zhang et al., arXiv 2308.03303).

    Settings: LoRA with ``factor1`` seeded, another one for each weight. Parameters: r rows per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(lora_fa(rank=4), [(768, 768)] * 24) == 18_432 * 4
    True
    """
    return _lora(rank, {"factor1": Seeded("normal", shared=False)}, changes)


def share_lora(rank: int = 4, **changes: Any) -> Config:
    """ShareLoRA: LoRA with one A for all weights (Song et al., arXiv 2406.10785).

    Settings: LoRA with ``factor1`` tied to that of group 0, for weights with equal numbers of columns. Parameters:
    r cols, and r rows per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(share_lora(rank=4), [(768, 768)] * 24) == 4 * 768 + 24 * 4 * 768
    True
    """
    return _lora(rank, {"factor1": Tied("group0.split0.factor1")}, changes)


def tied_lora(rank: int = 4, **changes: Any) -> Config:
    """Tied-LoRA: ``ΔW = (alpha / r) diag(v) B diag(u) A``, B and A shared (Renduchintala et al., arXiv 2311.09578).

    Settings: LoRA with both factors tied to those of group 0, for weights of one shape; ``factor0.size`` is v and
    ``factor1.rank`` is u, which each weight has for itself. Parameters: r (rows + cols), and rows + r per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(tied_lora(rank=4), [(768, 768)] * 24) == 4 * 1536 + 24 * (768 + 4)
    True
    """
    sources: dict[str, Source] = {
        "factor0": Scaled(Tied("group0.split0.factor0")),
        "factor1": Scaled(Tied("group0.split0.factor1"), size=False, rank=True),
    }
    return _lora(rank, sources, changes)


@checks_arguments
def vera(rank: int = 256, *, d_initial: float = 0.1, **changes: Any) -> Config:
    """VeRA: ``ΔW = diag(b) B diag(d) A``, B and A random and shared by all weights (Kopiczko et al., arXiv 2310.11454).

    Settings: LoRA with both factors seeded and shared, cut to size where sizes differ; ``factor0.size`` is b, zero at
    the start, and ``factor1.rank`` is d. Parameters: rows + r per weight.

    Parameters
    ----------
    rank : int
        r; large, as it costs r parameters per weight.
    d_initial : float
        Initial value of d.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(vera(rank=256), [(768, 768)] * 24) == 24 * (768 + 256)
    True
    """
    # The paper's factors are uniform with the variance 2 / fan_in, which for B is 2 / r.
    wide = math.sqrt(2.0 / integer("rank", rank, 1, MAX_SIZE, ConfigError))
    sources: dict[str, Source] = {
        "factor0": Scaled(Seeded("uniform", scale=wide), start=0.0),
        "factor1": Scaled(Seeded("uniform"), size=False, rank=True, start=checked_number("d_initial", d_initial, 1e30)),
    }
    return _lora(rank, sources, changes)


@checks_arguments
def randlora(rank: int | tuple[int, ...] = 32, *, rows: int, cols: int, **changes: Any) -> Config:
    """RandLoRA: a sum of low-rank products of full rank together (Albert et al., arXiv 2502.00987).

    ``ΔW = (alpha / r) sum_t B_t diag(λ_t) A diag(γ_t)``, with random B_t and A shared by all weights. Settings:
    T = ⌈min(rows, cols) / r⌉ terms of LoRA; the factor of the shorter side is A, with ``.size`` γ_t and ``.rank`` λ_t,
    which is zero at the start. Parameters: T (r + min(rows, cols)) per weight.

    Parameters
    ----------
    rank : int
    rows, cols : int
        Shape of the largest weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(randlora(rank=32, rows=768, cols=768), [(768, 768)] * 24)
    460800
    """
    rank, rows, cols = (
        integer(name, value, 1, MAX_SIZE, ConfigError)
        for name, value in (("rank", rank), ("rows", rows), ("cols", cols))
    )
    terms, last = -(-min(rows, cols) // rank), max(rows, cols)
    short, long = ("factor1", "factor0") if cols <= rows else ("factor0", "factor1")
    first = f"term0.split0.{short}" if terms > 1 else short
    start = 1.0 / last, 0.0
    sources: dict[str, Source] = {
        long: Seeded("uniform"),
        first: Scaled(Seeded("uniform"), size=True, rank=True, start=start),
    }
    if terms > 1:
        sources[short] = Scaled(Tied(first), size=True, rank=True, start=start)
    return _lora(rank, sources, changes, terms=terms)


def _of_base(rank: int, changes: dict[str, Any], **own: Any) -> Config:
    """``U C Vᵀ`` with U and V from the base weight: Tucker of order 2."""
    sources: dict[str, Source] = {"factor0": FromBase("rows"), "factor1": FromBase("cols")}
    return _lora(rank, sources, changes, **{"format": "tucker", **own})


def lora_xs(rank: int = 16, **changes: Any) -> Config:
    """LoRA-XS: ``ΔW = U R Vᵀ``, U and V from the base weight, R of r × r trained (Bałazy et al., arXiv 2405.17604).

    Settings: one group per weight, stack, Tucker of order 2 with both factors from the base weight: orthonormal bases
    of its dominant singular subspaces. ``core`` is R. Parameters: r² per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(lora_xs(rank=16), [(768, 768)] * 24) == 24 * 16**2
    True
    """
    return _of_base(rank, changes)


@checks_arguments
def svft(rank: int | None = None, *, rows: int | None = None, cols: int | None = None, **changes: Any) -> Config:
    """SVFT: ``ΔW = U diag(m) Vᵀ``, U and V the singular vectors of the base weight (Lingam et al., arXiv 2405.19597).

    Settings: one group per weight, stack, weighted CP of order 2 with both factors from the base weight; ``weights`` is
    m. Parameters: r per weight.

    Parameters
    ----------
    rank : int, optional
        Number of singular vectors; min(rows, cols) by default, the paper's plain variant.
    rows, cols : int, optional
        Shape of the smallest weight, if no rank is given.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(svft(rows=768, cols=768), [(768, 768)] * 24)
    18432
    """
    if rank is None:
        if rows is None or cols is None:
            raise ConfigError(
                "svft needs the number of singular vectors: give rank=r, or rows= and cols= of the weights"
            )
        sides = (integer(name, value, 1, MAX_SIZE, ConfigError) for name, value in (("rows", rows), ("cols", cols)))
        rank = min(sides)
    sources: dict[str, Source] = {
        "factor0": FromBase("rows", vectors=True),
        "factor1": FromBase("cols", vectors=True),
    }
    return _lora(rank, sources, changes, format="cp-weighted")


@checks_arguments
def craft(rank: int | tuple[int, ...] = 64, *, weights: int | None = None, **changes: Any) -> Config:
    """CRAFT: a Tucker decomposition of the base weights, with a trained square matrix per mode (arXiv 2602.17510).

    The weights of a role are a tensor (weights, rows, cols). Its truncated higher-order SVD, ``G ×_0 U_0 ×_1 U_1 ×_2
    U_2``, is frozen, and ``ΔW = G ×_0 U_0 J_0 ×_1 U_1 J_1 ×_2 U_2 J_2 - G ×_0 U_0 ×_1 U_1 ×_2 U_2``, where the matrices
    J start at the identity (Dewage et al.).

    Settings: one group per role, that fold, Tucker with core and factors from the base weights, each factor mixed by a
    trained matrix, ``start="random"``. Parameters: the squares of the three ranks, for each role.

    Parameters
    ----------
    rank : int
        Rank of rows and columns.
    weights : int, optional
        Rank of the mode of weights: at most, and by default, the number of weights of a role, or the rank if that is
        smaller.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(craft(rank=16), [(768, 768)] * 24, roles="qv" * 12)
    >>> plan.num_parameters == 2 * (12**2 + 16**2 + 16**2)
    True
    """
    bases: Source = Mixed(FromBase("mode"))
    base = {
        "groups": "role",
        "fold": ("weights", "rows", "cols"),
        "order": 3,
        "format": "tucker",
        "rank": rank if weights is None else (integer("weights", weights, 1, MAX_SIZE, ConfigError), rank, rank),
        "sources": {"core": BaseCore(), "factor0": bases, "factor1": bases, "factor2": bases},
        "start": "random",
    }
    return preset_config(base, changes)


@checks_arguments
def tinylora(parameters: int = 13, rank: int = 2, **changes: Any) -> Config:
    """TinyLoRA: LoRA-XS whose R are random combinations of a few parameters (Morris et al., arXiv 2602.04118).

    Settings: :func:`lora_xs` with ``before="normal"``: all R together are ``P θ`` with a random P.

    Parameters
    ----------
    parameters : int
        Elements of θ, for all weights together; with ``scope="group"`` for each weight.
    rank : int

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(tinylora(13), [(768, 768)] * 24)
    13
    """
    return _of_base(rank, changes, before="normal", parameters=parameters)


@checks_arguments
def unilora(parameters: int = 256, rank: int = 4, **changes: Any) -> Config:
    """Uni-LoRA: each number of all A and B is one of a few parameters, scaled (Li et al., arXiv 2506.00799).

    Settings: LoRA with ``before="one-hot"``. The paper starts at small random parameters, where ΔW is almost zero. Here
    the factors start like LoRA's, and θ at zero, so that ΔW is zero. ``offset=False`` gives the paper's form, B and A
    from θ alone, for parameters that are trained already: ``tnadapt.convert`` reads PEFT's adapters so. It has no
    gradient at θ = 0, so that it cannot be trained from its start.

    Parameters
    ----------
    parameters : int
        Elements of θ.
    rank : int

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(unilora(256), [(768, 768)] * 24)
    256
    """
    return _lora(rank, {}, changes, before="one-hot", parameters=parameters)


@checks_arguments
def nola(parameters: int = 1000, rank: int = 4, **changes: Any) -> Config:
    """NOLA: A and B are linear combinations of random matrices (Koohpayegani et al., arXiv 2310.02556).

    Settings: LoRA with ``before="normal"`` and a θ for each array: k coefficients for the A and k for the B of each
    weight. Parameters: 2 k per weight.

    Parameters
    ----------
    parameters : int
        k, the number of random matrices.
    rank : int

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(nola(100), [(768, 768)] * 24)
    4800
    """
    return _lora(rank, {}, changes, before="normal", parameters=parameters, scope="array")


# -- Presets whose map determines the trained values of each weight: SHiRA, FourierFT, LoCA, WaveFT, C3A and MiSS ------

# Users find them in :mod:`tnadapt.presets`.


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

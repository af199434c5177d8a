"""Named methods as :class:`~tnadapt.Config` presets: table 1 of the paper, and others from the literature.

The tests check each preset against the formula in the method's paper. Keyword arguments that a preset does not name
are fields of :class:`~tnadapt.Config` (``alpha``, ``seed``, …) and override the preset's choice.

LoDA, which the paper also names, is not included: its nonlinearity acts on activations, so it defines no ΔW.

Methods that stack all weights of a group into one tensor (``lotr``, ``fact_tt``, ``fact_tk``, ``cara``, ``lorta_cp``,
``metatt``) take the number of weights and their shape from the weights of each group. If the sizes are given as
arguments, they are a condition (``Config.weight_shape``): other weights are refused. The weights of a group must have
one shape;
``groups="role"`` makes one group of all queries, one of all values and so on, which have different shapes in
grouped-query attention. The weights must be in the order layer 0 query, layer 0 value, layer 1 query, …
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, integer, safe_repr

from .config import Config
from .folding import MAX_SIZE
from .joint_presets import cara, fact_tk, fact_tt, lorta_cp, lotr, metatt, preset_config
from .source_presets import (
    c3a,
    craft,
    fourierft,
    loca,
    lora_fa,
    lora_xs,
    miss,
    nola,
    randlora,
    share_lora,
    shira,
    svft,
    tied_lora,
    tinylora,
    unilora,
    vera,
    waveft,
)

__all__ = [
    "c3a",
    "cara",
    "compacter",
    "craft",
    "dense",
    "dora",
    "fact_tk",
    "fact_tt",
    "fastfood",
    "fourierft",
    "gralora",
    "hira",
    "krona",
    "loca",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lora_fa",
    "lora_xs",
    "lorta",
    "lorta_cp",
    "lotr",
    "metatt",
    "miss",
    "nola",
    "quanta",
    "randlora",
    "share_lora",
    "shira",
    "superlora",
    "svft",
    "tied_lora",
    "tinylora",
    "unilora",
    "vera",
    "waveft",
]


# -- Presets that say how the update meets the weight: DoRA and HiRA ---------------------------------------------------

# Users find them in :mod:`tnadapt.presets`.


def dora(rank: int = 8, **changes: Any) -> Config:
    """DoRA: ``W' = m ∘ (W + ΔW) / ‖W + ΔW‖`` by row, with LoRA's ΔW and a trained m (Liu et al., arXiv 2402.09353).

    Settings: LoRA with ``apply="magnitude"``. m starts at ‖W‖, so that a fresh adapter changes nothing. As in PEFT, a
    row is an output feature; ``magnitude_axis="cols"`` is LyCORIS's ``wd_on_out=False``. Parameters: r (rows + cols) +
    rows per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(dora(rank=8), [(768, 768)] * 24)
    313344
    """
    return _lora(rank, "magnitude", changes)


def hira(rank: int = 32, **changes: Any) -> Config:
    """HiRA: ``W' = W + W ∘ ΔW`` with LoRA's ΔW, a change of full rank (Huang et al., ICLR 2025).

    Settings: LoRA with ``apply="hadamard"``. The paper's A and B are LoRA's. Parameters: r (rows + cols) per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(hira(rank=32), [(768, 768)] * 24) == 2 * 768 * 32 * 24
    True
    """
    return _lora(rank, "hadamard", changes)


def _lora(rank: int, apply: str, changes: dict[str, Any]) -> Config:
    base = {"groups": "weight", "fold": "stack", "order": 2, "format": "cp", "rank": rank, "apply": apply}
    return preset_config(base, changes)


# -- Named methods as tnadapt.Config presets: table 1 of the paper, and others from the literature ---------------------


def _config(own: dict[str, Any], changes: dict[str, Any]) -> Config:
    return preset_config(own, changes)


def dense(**changes: Any) -> Config:
    """Full fine-tuning of each weight (table 1, first row: M = 1, C = I, F = I).

    Settings: one group per weight, order 1, dense. Parameters: rows * cols per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(dense(), [(768, 768)] * 24)
    14155776
    """
    return _config({"groups": "weight", "order": 1, "fold": "stack", "format": "dense"}, changes)


def lora(rank: int = 4, **changes: Any) -> Config:
    """LoRA: ``ΔW = (alpha / r) B A`` (table 1; Hu et al., arXiv 2106.09685).

    Settings: one group per weight, stack, M = 2, CP. ``factor0`` is ``lora_B`` (rows, r), ``factor1`` is
    ``lora_A`` transposed (cols, r). Parameters: r (rows + cols) per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(lora(rank=4), [(768, 768)] * 24)
    147456
    """
    return _config({"groups": "weight", "fold": "stack", "order": 2, "format": "cp", "rank": rank}, changes)


def lokr(rank: int = 4, **changes: Any) -> Config:
    """LoKr: ``ΔW = (alpha / r) W1 ⊗ (B A)`` (table 1; Yeh et al., arXiv 2309.14859).

    Settings: one group per weight, stack, K = 2, balanced sizes; split 0 dense (W1), split 1 CP. Pass
    ``leading="same"`` for a low-rank W1, ``split_size=f`` for a W1 of f × f.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.SuperLoRA(lokr(rank=1), [(768, 768)]).param_shapes
    {'group0.split0.dense': (24, 24), 'group0.split1.factor0': (32, 1), 'group0.split1.factor1': (32, 1)}
    """
    return _config(
        {"groups": "weight", "fold": "stack", "order": 2, "splits": 2, "format": "cp", "rank": rank}, changes
    )


def krona(**changes: Any) -> Config:
    """KronA: ``ΔW = s A ⊗ B`` with both factors dense (Edalati et al., arXiv 2212.10650).

    Settings: one group per weight, stack, K = 2, balanced sizes, dense.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.SuperLoRA(krona(), [(768, 768)]).num_parameters == 24**2 + 32**2
    True
    """
    return _config({"groups": "weight", "fold": "stack", "order": 2, "splits": 2, "format": "dense"}, changes)


def loha(rank: int = 4, **changes: Any) -> Config:
    """LoHa: ``ΔW = (alpha / r) (B1 A1) ∘ (B2 A2)`` (Hyeon-Woo et al., FedPara, arXiv 2108.06098; arXiv 2309.14859).

    Settings: one group per weight, stack, K = 2 combined by the Hadamard product, both splits CP.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(loha(rank=4), [(768, 768)])
    12288
    """
    return _config(
        {
            "groups": "weight",
            "fold": "stack",
            "order": 2,
            "splits": 2,
            "combine": "hadamard",
            "leading": "same",
            "format": "cp",
            "rank": rank,
        },
        changes,
    )


@checks_arguments
def lonkr(
    rank: int | tuple[int, ...] = 4, splits: int = 3, groups: Any = 1, split_size: Any = 8, **changes: Any
) -> Config:
    """LoNKr: the N-split LoKr of the paper (table 1, figure 3c; section 4.2 uses sizes 6, 8, 10).

    Settings: G groups, hypercube (or ``fold="stack"``), K > 2, splits 1 to K - 1 dense with size ``split_size``
    in every mode, the last one CP.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.SuperLoRA(lonkr(rank=1), [(768, 768)] * 24).num_parameters == 8**2 + 8**2 + 59 + 59
    True
    """
    return _config(
        {
            "groups": groups,
            "fold": "hypercube",
            "order": 2,
            "splits": splits,
            "split_size": split_size,
            "leading": "dense",
            "format": "cp",
            "rank": rank,
        },
        changes,
    )


@checks_arguments
def lorta(rank: int | tuple[int, ...] = 4, order: int = 3, groups: Any = 1, **changes: Any) -> Config:
    """LoRTA of the SuperLoRA paper: Tucker on a hypercube (table 1, equation 3).

    Settings: G groups, hypercube, M > 2, Tucker. For Hounie's LoRTA see :func:`lorta_cp`.

    Examples
    --------
    >>> import tnadapt as tna
    >>> unet = [(64, 64)] * 10 + [(128, 128)] * 32
    >>> tna.parameter_count(lorta(rank=1, order=5), unet)
    76
    """
    return _config({"groups": groups, "fold": "hypercube", "order": order, "format": "tucker", "rank": rank}, changes)


@checks_arguments
def gralora(rank: int | tuple[int, ...] = 4, blocks: int = 2, **changes: Any) -> Config:
    """GraLoRA: each weight cut into k × k blocks, each with its own low-rank matrix (Jung et al., arXiv 2505.20355).

    Settings: one group per weight, fold ``(weights, k, rows / k, k, cols / k)``, axes that make the blocks one mode,
    batched CP of rank r / k: ``ΔW[a, b] = (alpha / r) B_ab A_abᵀ``. Parameters: r (rows + cols) per weight, as for LoRA
    of rank r; the matrix rank is up to k r.

    Parameters
    ----------
    rank : int
        r, a multiple of ``blocks``.
    blocks : int
        k, which divides rows and columns.
    alpha : float, optional
        As in :class:`~tnadapt.Config`, of the rank r.

    Raises
    ------
    ConfigError
        If blocks does not divide the rank.

    Examples
    --------
    >>> import tnadapt as tna
    >>> ad = tna.SuperLoRA(gralora(rank=8, blocks=2), [(768, 768)] * 24)
    >>> ad.num_parameters == 24 * 8 * (768 + 768), ad.lora_rank
    (True, 16)
    """
    k = integer("blocks", blocks, 1, MAX_SIZE, ConfigError)
    rank = integer("rank", rank, 1, MAX_SIZE, ConfigError)
    if rank % k:
        raise ConfigError(f"blocks must divide the rank, as each block has rank / blocks; got rank={rank}, blocks={k}")
    alpha = Config(alpha=changes.get("alpha")).alpha
    if alpha is not None:
        changes = {**changes, "alpha": alpha / k}
    own = {
        "groups": "weight",
        "order": 3,
        "fold": ("weights", k, f"rows/{k}", k, f"cols/{k}"),
        "axes": ((0, 1, 3), 2, 4),
        "format": "cp-batched",
        "rank": rank // k,
    }
    return _config(own, changes)


@checks_arguments
def quanta(digits: Sequence[int] = (16, 8), **changes: Any) -> Config:
    """QuanTA: a circuit of small tensors, each of which acts on two axes of the features (arXiv 2406.00132).

    A few digits index the columns of a weight, and as many its rows. ``ΔW = T_n … T_1 - S_n … S_1``, where each gate T
    acts on two of the digits, with one gate for every two, and S is T at the start (Chen et al.).

    Settings: one group per weight, fold of the digits of rows and columns, circuit, ``start="random"``. Parameters: for
    every two axes of sizes a and b, ``a² b²`` for square weights.

    Parameters
    ----------
    digits : sequence of int
        Sizes of all digits but the last one, from the most significant one. The last digit is the number of rows, or of
        columns, divided by the product of these, which must divide it: 16, 8 and 6 for 768.

    Raises
    ------
    ConfigError
        If a digit is not an integer of at least 1, there are more than 7, or a rank is given.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(quanta((16, 8)), [(768, 768)]) == (16 * 8) ** 2 + (16 * 6) ** 2 + (8 * 6) ** 2
    True
    """
    if not isinstance(digits, (tuple, list)) or not digits:
        raise ConfigError(f"digits must be a tuple of sizes, such as (16, 8); got {safe_repr(digits)}")
    sizes = tuple(integer(f"digits[{place}]", size, 1, MAX_SIZE, ConfigError) for place, size in enumerate(digits))
    if "rank" in changes:
        raise ConfigError(f"quanta has gates, and no rank; got rank={safe_repr(changes['rank'])}: choose the digits")
    known = math.prod(sizes)
    if known >= 10**18:  # the largest divisor in a fold
        raise ConfigError(f"digits multiply to {known}; expected less than 1e18")
    own = {
        "groups": "weight",
        "order": 2 * len(sizes) + 2,
        "fold": ("weights", *sizes, f"rows/{known}", *sizes, f"cols/{known}"),
        "axes": ((0, 1), *range(2, 2 * len(sizes) + 3)),
        "format": "circuit",
        "rank": 1,
        "start": "random",
    }
    return _config(own, changes)


@checks_arguments
def fastfood(ratio: float = 0.01, **changes: Any) -> Config:
    """Intrinsic dimension by fastfood: a dense vector and a linear F (Aghajanyan et al., arXiv 2012.13255).

    Settings: G = 1, M = 1, dense, linear F with compression ratio ρ. The SuperLoRA paper's "dense with projection".

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(fastfood(ratio=0.01), [(768, 768)] * 24)
    141558
    """
    own = {"groups": 1, "order": 1, "fold": "hypercube", "format": "dense", "projection": "linear", "ratio": ratio}
    return _config(own, changes)


def superlora(
    rank: int = 4, groups: Any = 1, projection: str = "identity", ratio: float = 1.0, **changes: Any
) -> Config:
    """SuperLoRA: the paper's main method, 2D with reshape, for any number of groups and any F.

    Settings: G groups (default 1), hypercube, M = 2, CP, F as given.

    Examples
    --------
    >>> import tnadapt as tna
    >>> cfg = superlora(rank=26, projection="linear", ratio=0.5)
    >>> tna.parameter_count(cfg, [(768, 768)] * 24)
    138372
    """
    own = {
        "groups": groups,
        "fold": "hypercube",
        "order": 2,
        "format": "cp",
        "rank": rank,
        "projection": projection,
        "ratio": ratio,
    }
    return _config(own, changes)


@checks_arguments
def compacter(rank: int | tuple[int, ...] = 1, terms: int = 4, **changes: Any) -> Config:
    """Compacter's low-rank PHM: ``ΔW = sum_{i=1}^{n} A_i ⊗ (B_i C_iᵀ)`` (Mahabadi et al., arXiv 2106.04647).

    Settings: one group per weight, stack, T = n terms, K = 2, A_i dense of n × n, the other split CP. In the paper
    all layers share the A_i, and the sum is the weight of adapter layers; here each weight has its own A_i.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(compacter(rank=1, terms=4), [(768, 768)]) == 4 * (16 + 192 + 192)
    True
    """
    own = {
        "groups": "weight",
        "fold": "stack",
        "order": 2,
        "splits": 2,
        "split_size": terms,
        "terms": terms,
        "leading": "dense",
        "format": "cp",
        "rank": rank,
    }
    return _config(own, changes)

"""Presets: named methods as :class:`~tnadapt.Config`, from table 1 of the paper and from the literature.

The tests check each preset against the formula in the method's paper. Keyword arguments that a preset does not name
are fields of :class:`~tnadapt.Config` (``alpha``, ``seed``, …) and override the preset's choice.

LoDA, which the paper also names, is not included: its nonlinearity acts on activations, so it defines no ΔW.

Methods that stack all weights of a group into one tensor (``lotr``, ``fact_tt``, ``fact_tk``, ``cara``, ``lorta_cp``,
``metatt``) take the number of weights and their shape from the weights of each group. If the sizes are given as
arguments, they are a condition (``Config.weight_shape``): other weights are refused. The weights of a group must have
one shape; ``groups="role"`` makes one group of all queries, one of all values and so on, which have different shapes
in grouped-query attention. The weights must be in the order layer 0 query, layer 0 value, layer 1 query, …
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, integer, safe_repr

from .config import Config, checked_number
from .folding import MAX_SIZE
from .maps import Circulant, Scatter, Tile, Wavelet
from .sources import BaseCore, FromBase, Mixed, Scaled, Seeded, Source, Tied

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


# -- What all presets share --------------------------------------------------------------------------------------------


def _config(own: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Return the config of a preset: its settings, what the caller changes, and the rate that all presets share."""
    return Config.from_dict({"rate": "adam", **own, **changes})


def _lora(rank: int, changes: dict[str, Any], **own: Any) -> Config:
    """LoRA's settings, and others of the preset's own: one group per weight, stack, M = 2, CP."""
    base = {"groups": "weight", "fold": "stack", "order": 2, "format": "cp", "rank": rank}
    return _config({**base, **own}, changes)


# -- Methods of table 1, and others with one network per group ---------------------------------------------------------


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
    return _lora(rank, changes)


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


# -- Methods with factors shared among weights: all weights of a group are one tensor ----------------------------------


Fold = tuple[int | str, ...]


def _stacked(
    sizes: dict[str, int | None], fold: Callable[..., Fold], own: dict[str, Any], changes: dict[str, Any]
) -> Config:
    """Stack all weights of a group into one tensor whose last modes are rows and columns.

    ``fold`` maps the sizes, or their names where the caller gives no sizes, to the fold. If the caller gives a fold, it
    replaces this one and may be used with weights of any shapes.
    """
    sizes = {
        name: None if size is None else integer(name, size, 1, MAX_SIZE, ConfigError) for name, size in sizes.items()
    }
    absent = [name for name, size in sizes.items() if size is None]
    if absent and len(absent) < len(sizes):
        raise ConfigError(
            f"{', '.join(name for name in sizes if name not in absent)} given without {', '.join(absent)}: give all of "
            f"{', '.join(sizes)}, or none to take them from the weights of each group"
        )
    made = fold(*(sizes if absent else sizes.values()))
    if "fold" in changes:
        own = {**own, "order": len(made)}
    elif absent:
        own = {**own, "order": len(made), "fold": made}
    else:
        own = {**own, "order": len(made), "fold": made, "weight_shape": (sizes["rows"], sizes["cols"])}
    return _config({"groups": 1, **own}, changes)


def _in_heads(rows: int | str, heads: int | None, head_size: int | None) -> Fold:
    """Return the number of heads and their size, of which one is given; the other is a quotient of the rows."""
    if (heads is None) == (head_size is None):
        raise ConfigError(
            f"give heads, or head_size where weights have different numbers of heads; got heads={safe_repr(heads)}, "
            f"head_size={safe_repr(head_size)}"
        )
    name, value = ("heads", heads) if head_size is None else ("head_size", head_size)
    given = integer(name, value, 1, MAX_SIZE, ConfigError)
    other = f"{rows}/{given}" if isinstance(rows, str) else _head_size(rows, given, name)
    return (given, other) if head_size is None else (other, given)


def _head_size(rows: int, given: int, name: str) -> int:
    rows = integer("rows", rows, 1, MAX_SIZE, ConfigError)
    if rows % given:
        raise ConfigError(f"{name} must divide rows; got {name}={given}, rows={rows}")
    return rows // given


def _in_layers(layers: int | str, matrices: int | None, changes: dict[str, Any]) -> Fold:
    """Return the number of layers, and of the matrices of each that are in a group."""
    if matrices is None:
        matrices = 1 if changes.get("groups") == "role" else 2
    matrices = integer("matrices", matrices, 1, MAX_SIZE, ConfigError)
    return (f"weights/{matrices}" if isinstance(layers, str) else layers, matrices)


@checks_arguments
def lotr(
    rank: int | tuple[int, ...] = 4,
    *,
    weights: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    train: bool = False,
    **changes: Any,
) -> Config:
    """LoTR: all updates as one tensor ``(weights, rows, cols)`` (table 1; Bershatsky et al., arXiv 2402.01376).

    Settings: G = 1, that fold, Tucker with no factor in mode 0: ``ΔW_s = A G_s Bᵀ``, where all weights of a group share
    A and B and each has its own core G_s. With ``train=True``, a tensor train over the same modes.

    Parameters
    ----------
    rank : int
        Rank of rows and columns (of both bonds for a train).
    weights, rows, cols : int, optional
        Number of weights, and their common shape; by default those of each group.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.SuperLoRA(lotr(rank=2, weights=3, rows=8, cols=5), [(8, 5)] * 3).param_shapes
    {'group0.split0.core': (3, 2, 2), 'group0.split0.factor1': (8, 2), 'group0.split0.factor2': (5, 2)}

    Queries and values of grouped-query attention:

    >>> tna.parameter_count(lotr(rank=2, groups="role"), [(64, 32), (16, 32)] * 3, roles="qvqvqv")
    312
    """
    own: dict[str, Any] = {"format": "tucker", "rank": (None, rank, rank)}
    if train:
        own = {"format": "tt", "rank": rank}
    return _stacked({"weights": weights, "rows": rows, "cols": cols}, lambda *sizes: sizes, own, changes)


@checks_arguments
def fact_tt(
    rank: int | tuple[int, ...] = 4,
    *,
    weights: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    **changes: Any,
) -> Config:
    """FacT-TT: ``ΔW_s = U Σ_s Vᵀ``, U and V shared by all weights (Jie & Deng, arXiv 2212.03145).

    Settings: G = 1, fold ``(weights, rows, cols)``, Tucker with no factor in mode 0: FacT's tensor train, with its
    outer cores on rows and columns and Σ between them, is equal to this Tucker form.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(fact_tt(rank=2, weights=3, rows=8, cols=5), [(8, 5)] * 3) == 3 * 4 + 16 + 10
    True
    """
    return lotr(rank, weights=weights, rows=rows, cols=cols, **changes)


@checks_arguments
def fact_tk(
    rank: int | tuple[int, ...] = 4,
    *,
    weights: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    **changes: Any,
) -> Config:
    """FacT-TK: Tucker over (weights, rows, cols) with a factor in every mode (Jie & Deng, arXiv 2212.03145).

    Settings: G = 1, that fold, Tucker.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(fact_tk(rank=2, weights=3, rows=8, cols=5), [(8, 5)] * 3) == 8 + 6 + 16 + 10
    True
    """
    own = {"format": "tucker", "rank": rank}
    return _stacked({"weights": weights, "rows": rows, "cols": cols}, lambda *sizes: sizes, own, changes)


@checks_arguments
def cara(
    rank: int | tuple[int, ...] = 4,
    *,
    weights: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    heads: int | None = None,
    head_size: int | None = None,
    **changes: Any,
) -> Config:
    """CaRA: weighted CP over matrices, heads, head size and input (Veeramacheneni et al., ICML 2025).

    Settings: G = 1, cp-weighted on ``(weights, heads, rows / heads, cols)``. The paper counts query, key and
    value of every layer; here ``weights`` is the number of adapted weights.

    Parameters
    ----------
    rank : int
    weights, rows, cols : int, optional
        Number of weights, and their common shape; by default those of each group.
    heads, head_size : int
        Number of attention heads, or the rows of each; one of them. It divides rows.

    Raises
    ------
    ConfigError
        If heads or head_size does not divide rows.

    Examples
    --------
    >>> import tnadapt as tna
    >>> cfg = cara(rank=4, weights=24, rows=768, cols=768, heads=12)
    >>> tna.parameter_count(cfg, [(768, 768)] * 24) == 4 + 4 * (24 + 12 + 64 + 768)
    True
    """

    def fold(weights: int | str, rows: int | str, cols: int | str) -> Fold:
        return (weights, *_in_heads(rows, heads, head_size), cols)

    own = {"format": "cp-weighted", "rank": rank}
    return _stacked({"weights": weights, "rows": rows, "cols": cols}, fold, own, changes)


@checks_arguments
def lorta_cp(
    rank: int | tuple[int, ...] = 4,
    *,
    layers: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    heads: int | None = None,
    head_size: int | None = None,
    matrices: int | None = None,
    **changes: Any,
) -> Config:
    """LoRTA of Hounie et al.: CP over layers, matrices, heads, head size and input (arXiv 2410.04060).

    A different method from :func:`lorta`, published under the same name. Settings: G = 1, CP on
    ``(layers, matrices, heads, rows / heads, cols)``.

    Parameters
    ----------
    rank : int
    layers, rows, cols : int, optional
        Number of layers, and the common shape of the weights; by default those of each group.
    heads, head_size : int
        Number of attention heads, or the rows of each; one of them. It divides rows.
    matrices : int
        Adapted matrices of each layer in a group: by default 2 (query and value), and 1 with ``groups="role"``.

    Raises
    ------
    ConfigError
        If heads or head_size does not divide rows.

    Examples
    --------
    >>> import tnadapt as tna
    >>> cfg = lorta_cp(rank=4, layers=12, rows=768, cols=768, heads=12)
    >>> tna.parameter_count(cfg, [(768, 768)] * 24) == 4 * (12 + 2 + 12 + 64 + 768)
    True
    """

    def fold(layers: int | str, rows: int | str, cols: int | str) -> Fold:
        return (*_in_layers(layers, matrices, changes), *_in_heads(rows, heads, head_size), cols)

    return _stacked({"layers": layers, "rows": rows, "cols": cols}, fold, {"format": "cp", "rank": rank}, changes)


@checks_arguments
def metatt(
    rank: int | tuple[int, ...] = 4,
    *,
    layers: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    heads: int | None = None,
    head_size: int | None = None,
    matrices: int | None = None,
    **changes: Any,
) -> Config:
    """MetaTT: one tensor train for all weights, ``ΔWᵀ = G1 G2[layer] G3[matrix] G4`` (arXiv 2506.09105).

    Settings: G = 1, fold ``(layers, matrices, rows, cols)``, a tensor train over (cols, layers, matrices, rows):
    MetaTT-4D. With heads, the rows are ``(heads, rows / heads)``: MetaTT-5D. Parameters of 4D, where no rank exceeds
    the sizes: ``r (rows + cols) + r² (layers + matrices)``.

    Parameters
    ----------
    rank : int
        Of all bonds.
    layers, rows, cols : int, optional
        Number of layers, and the common shape of the weights; by default those of each group.
    heads, head_size : int, optional
        For 5D: the number of attention heads, or the rows of each. It divides rows.
    matrices : int
        Adapted matrices of each layer in a group: by default 2 (query and value), and 1 with ``groups="role"``.

    Raises
    ------
    ConfigError
        If heads or head_size does not divide rows.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(metatt(rank=8), [(768, 768)] * 24) == 8 * (768 + 768) + 64 * (12 + 2)
    True
    >>> tna.SuperLoRA(metatt(rank=8), [(768, 768)] * 24).lora_rank
    8
    """
    split = heads is not None or head_size is not None

    def fold(layers: int | str, rows: int | str, cols: int | str) -> Fold:
        return (
            *_in_layers(layers, matrices, changes),
            *(_in_heads(rows, heads, head_size) if split else (rows,)),
            cols,
        )

    own: dict[str, Any] = {"format": "tt", "rank": rank, "axes": (4, 0, 1, 2, 3) if split else (3, 0, 1, 2)}
    return _stacked({"layers": layers, "rows": rows, "cols": cols}, fold, own, changes)


# -- Methods that say how the update meets the weight: DoRA and HiRA ---------------------------------------------------


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
    return _lora(rank, changes, apply="magnitude")


def hira(rank: int = 32, **changes: Any) -> Config:
    """HiRA: ``W' = W + W ∘ ΔW`` with LoRA's ΔW, a change of full rank (Huang et al., ICLR 2025).

    Settings: LoRA with ``apply="hadamard"``. The paper's A and B are LoRA's. Parameters: r (rows + cols) per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(hira(rank=32), [(768, 768)] * 24) == 2 * 768 * 32 * 24
    True
    """
    return _lora(rank, changes, apply="hadamard")


# -- Methods that say where the numbers come from: frozen, tied and scaled arrays, and a map before the network --------


def lora_fa(rank: int = 4, **changes: Any) -> Config:
    """LoRA-FA: LoRA with a frozen random A (Zhang et al., arXiv 2308.03303).

    Settings: LoRA with ``factor1`` seeded, another one for each weight. Parameters: r rows per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(lora_fa(rank=4), [(768, 768)] * 24) == 18_432 * 4
    True
    """
    return _lora(rank, changes, sources={"factor1": Seeded("normal", shared=False)})


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
    return _lora(rank, changes, sources={"factor1": Tied("group0.split0.factor1")})


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
    return _lora(rank, changes, sources=sources)


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
    return _lora(rank, changes, sources=sources)


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
    return _lora(rank, changes, sources=sources, terms=terms)


def _of_base(rank: int, changes: dict[str, Any], **own: Any) -> Config:
    """``U C Vᵀ`` with U and V from the base weight: Tucker of order 2."""
    sources: dict[str, Source] = {"factor0": FromBase("rows"), "factor1": FromBase("cols")}
    return _lora(rank, changes, sources=sources, **{"format": "tucker", **own})


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
    return _lora(rank, changes, sources=sources, format="cp-weighted")


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
    return _config(base, changes)


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
    return _lora(rank, changes, before="one-hot", parameters=parameters)


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
    return _lora(rank, changes, before="normal", parameters=parameters, scope="array")


# -- Methods whose map determines the trained values of each weight: SHiRA, FourierFT, LoCA, WaveFT, C3A and MiSS ------


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
    return _config(own, changes)


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

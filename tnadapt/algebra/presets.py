"""Named methods as :class:`~tnadapt.Config` presets: table 1 of the paper, and others from the literature.

The tests check each preset against the formula in the method's paper. Keyword arguments that a preset does not name
are fields of :class:`~tnadapt.Config` (``alpha``, ``seed``, …) and override the preset's choice.

LoDA, which the paper also names, is not included: its nonlinearity acts on activations, so it defines no ΔW.

Methods that stack all weights of a group into one tensor (``lotr``, ``fact_tt``, ``fact_tk``, ``cara``, ``lorta_cp``,
``metatt``) take the number of weights and their shape from the weights of each group. If the sizes are given as arguments, they are
a condition (``Config.weight_shape``): other weights are refused. The weights of a group must have one shape;
``groups="role"`` makes one group of all queries, one of all values and so on, which have different shapes in
grouped-query attention. The weights must be in the order layer 0 query, layer 0 value, layer 1 query, …
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tnadapt.errors import ConfigError, integer, safe_repr

from .config import Config
from .folding import MAX_SIZE

__all__ = [
    "cara",
    "compacter",
    "dense",
    "fact_tk",
    "fact_tt",
    "fastfood",
    "krona",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lorta",
    "lorta_cp",
    "lotr",
    "metatt",
    "superlora",
]


def _config(own: dict[str, Any], changes: dict[str, Any]) -> Config:
    return Config.from_dict({**own, **changes})


Fold = tuple[int | str, ...]


def _stacked(
    sizes: dict[str, int | None], fold: Callable[..., Fold], own: dict[str, Any], changes: dict[str, Any]
) -> Config:
    """Stack all weights of a group into one tensor whose last modes are rows and columns.

    ``fold`` maps the sizes, or their names where the caller gives no sizes, to the fold. If the caller gives a fold, it
    replaces this one and may be used with weights of any shapes.
    """
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


def lonkr(rank: int = 4, splits: int = 3, groups: Any = 1, split_size: Any = 8, **changes: Any) -> Config:
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


def lotr(
    rank: int = 4,
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


def lorta(rank: int = 4, order: int = 3, groups: Any = 1, **changes: Any) -> Config:
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


def lorta_cp(
    rank: int = 4,
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


def cara(
    rank: int = 4,
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


def _in_layers(layers: int | str, matrices: int | None, changes: dict[str, Any]) -> Fold:
    """Return the number of layers, and of the matrices of each that are in a group."""
    if matrices is None:
        matrices = 1 if changes.get("groups") == "role" else 2
    return (f"weights/{matrices}" if isinstance(layers, str) else layers, matrices)


def _head_size(rows: int, given: int, name: str) -> int:
    rows = integer("rows", rows, 1, MAX_SIZE, ConfigError)
    if rows % given:
        raise ConfigError(f"{name} must divide rows; got {name}={given}, rows={rows}")
    return rows // given


def fact_tt(
    rank: int = 4, *, weights: int | None = None, rows: int | None = None, cols: int | None = None, **changes: Any
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


def metatt(
    rank: int = 4,
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


def fact_tk(
    rank: int = 4, *, weights: int | None = None, rows: int | None = None, cols: int | None = None, **changes: Any
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


def compacter(rank: int = 1, terms: int = 4, **changes: Any) -> Config:
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

"""Methods with factors shared among weights: all weights of a group are one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config, is_named
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError, safe_repr

from ._preset import (
    AdaptedWeights,
    Float,
    Ladder,
    Params,
    Preset,
    Shapes,
    Sizes,
    alpha_over_rank,
    groups_label,
    long_vector_cut,
    preset_config,
    up_to,
)

__all__ = ["cara", "fact_tk", "fact_tt", "lorta_cp", "lotr", "metatt"]


# -- Methods with factors shared among weights: all weights of a group are one tensor ----------------------------------


Fold = tuple[int | str, ...]


def _stacked(
    sizes: dict[str, int | None], fold: Callable[..., Fold], settings: dict[str, Any], changes: dict[str, Any]
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
    modes = fold(*(sizes if absent else sizes.values()))
    if "fold" not in changes:
        settings = {**settings, "fold": modes}
        if not absent:
            settings["weight_shape"] = sizes["rows"], sizes["cols"]
    return preset_config(changes, groups=1, order=len(modes), **settings)


def _in_heads(rows: int | str, heads: int | None, head_size: int | None) -> Fold:
    """Return the number of heads and their size, of which one is given; the other is a quotient of the rows."""
    if (heads is None) == (head_size is None):
        raise ConfigError(
            f"give heads, or head_size where weights have different numbers of heads; got heads={safe_repr(heads)}, "
            f"head_size={safe_repr(head_size)}"
        )
    name, value = ("heads", heads) if head_size is None else ("head_size", head_size)
    divisor = integer(name, value, 1, MAX_SIZE, ConfigError)
    if isinstance(rows, int) and rows % divisor:
        raise ConfigError(f"{name} must divide rows; got {name}={divisor}, rows={rows}")
    other = rows // divisor if isinstance(rows, int) else f"{rows}/{divisor}"
    return (divisor, other) if head_size is None else (other, divisor)


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
    settings = {"format": "tt", "rank": rank} if train else {"format": "tucker", "rank": (None, rank, rank)}
    return _stacked({"weights": weights, "rows": rows, "cols": cols}, lambda *sizes: sizes, settings, changes)


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
    settings = {"format": "tucker", "rank": rank}
    return _stacked({"weights": weights, "rows": rows, "cols": cols}, lambda *sizes: sizes, settings, changes)


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

    settings = {"format": "cp-weighted", "rank": rank}
    return _stacked({"weights": weights, "rows": rows, "cols": cols}, fold, settings, changes)


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
        row_digits = _in_heads(rows, heads, head_size) if split else (rows,)
        return (*_in_layers(layers, matrices, changes), *row_digits, cols)

    settings: dict[str, Any] = {"format": "tt", "rank": rank, "axes": (4, 0, 1, 2, 3) if split else (3, 0, 1, 2)}
    return _stacked({"layers": layers, "rows": rows, "cols": cols}, fold, settings, changes)


# -- Formulas, as the papers state them -------------------------------------------------------------------------------


def _lotr(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW_s = A G_s Bᵀ; LoTR (FacT-TT, U Σ_s Vᵀ, is the same product).
    if config.format == "tt":
        first, middle, last = (params[f"group0.split0.core{m}"] for m in range(3))
        return [np.tensordot(first[0, s], middle, 1) @ last[:, :, 0] for s in range(len(shapes))]
    core = params["group0.split0.core"]
    a, b = params["group0.split0.factor1"], params["group0.split0.factor2"]
    return [a @ core[s] @ b.T for s in range(len(shapes))]


def _fact_tk(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW_s = U (C x_1 P_s) Vᵀ; FacT.
    core, p, u, v = (params[f"group0.split0.{n}"] for n in ("core", "factor0", "factor1", "factor2"))
    return [u @ np.tensordot(p[s], core, 1) @ v.T for s in range(len(shapes))]


def _heads_cp(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # A sum over r of outer products over layers and matrices, heads, head size and input: LoRTA (Hounie et
    # al.) and CaRA, whose components have weights.
    factors = [params[f"group0.split0.factor{m}"] for m in range(config.order)]
    rank = factors[0].shape[1]
    weights = params.get("group0.split0.weights", np.ones(rank))
    total: Float = np.zeros([len(factor) for factor in factors])
    for r in range(rank):
        outer = weights[r]
        for factor in factors:
            outer = np.multiply.outer(outer, factor[:, r])
        total = total + outer
    return long_vector_cut(total.reshape(-1), shapes)


def _metatt(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = (G1 G2[l] G3[m] G4)ᵀ with one train for all layers l and matrices m, and with heads G4[h] G5; MetaTT.
    first, by_layer, by_matrix, *last = (params[f"group0.split0.core{k}"] for k in range(config.order))
    updates = []
    for place, (rows, cols) in enumerate(shapes):
        layer, matrix = divmod(place, by_matrix.shape[1])
        product = first[0] @ by_layer[:, layer] @ by_matrix[:, matrix]
        for core in last:
            product = np.tensordot(product, core, 1)
        updates.append(alpha_over_rank(config) * product.reshape(cols, rows).T)
    return updates


# -- Sizes, and how configs are recognized -----------------------------------------------------------------------------


def _stacked_ranks(make: Callable[..., Config], **settings: Any) -> Sizes:
    """Return the ranks of a preset that stacks the weights of a group, which have one shape."""

    def sizes(weights: AdaptedWeights) -> list[Ladder]:
        groups: Any = 1 if weights.uniform else "role"
        return [Ladder(functools.partial(make, groups=groups, **settings), up_to(4 * weights.side))]

    return sizes


def _ranks_in_heads(make: Callable[..., Config]) -> Sizes:
    def sizes(weights: AdaptedWeights) -> Any:
        return [] if weights.head_size is None else _stacked_ranks(make, head_size=weights.head_size)(weights)

    return sizes


def _lotr_label(config: Config) -> str | None:
    rank, fold = config.rank, config.fold
    if not (isinstance(rank, tuple) and len(rank) == 3 and isinstance(fold, tuple) and len(fold) == 3):
        return None
    last = rank[-1]
    sizes: dict[str, Any] = (
        {} if is_named(fold) else dict(zip(("weights", "rows", "cols"), map(int, fold), strict=True))
    )
    if last is None or config != lotr(last, groups=config.groups, **sizes):
        return None
    return ", ".join([*groups_label(config), f"r = {last}"])


# -- The records -------------------------------------------------------------------------------------------------------


_FOUR = {"weights": 4, "rows": 12, "cols": 8}

# What a mode of a fold means to a model is not in a config, so only the first is recognized.
STACKED_PRESETS = (
    Preset(
        "lotr", lotr, "LoTR", "Bershatsky et al., arXiv 2402.01376", {"rank": 3, **_FOUR},
        sizes=_stacked_ranks(lotr), recognize=_lotr_label, formula=_lotr,
    ),
    Preset(
        "fact_tt", fact_tt, "FacT-TT", "Jie and Deng, arXiv 2212.03145", {"rank": 3, **_FOUR},
        sizes=_stacked_ranks(fact_tt), formula=_lotr,
    ),
    Preset(
        "fact_tk", fact_tk, "FacT-TK", "Jie and Deng, arXiv 2212.03145", {"rank": 3, **_FOUR},
        sizes=_stacked_ranks(fact_tk), formula=_fact_tk,
    ),
    Preset(
        "cara", cara, "CaRA", "Veeramacheneni et al., ICML 2025", {"rank": 3, "heads": 3, **_FOUR},
        sizes=_ranks_in_heads(cara), formula=_heads_cp,
    ),
    Preset(
        "lorta_cp", lorta_cp, "LoRTA (CP)", "Hounie et al., arXiv 2410.04060",
        {"rank": 3, "layers": 2, "rows": 12, "cols": 8, "heads": 3}, sizes=_ranks_in_heads(lorta_cp), formula=_heads_cp,
    ),
    Preset(
        "metatt", metatt, "MetaTT", "Lopez-Piqueres et al., arXiv 2506.09105",
        {"rank": 2, "layers": 2, "rows": 12, "cols": 8, "alpha": 3}, sizes=_stacked_ranks(metatt), formula=_metatt,
    ),
)  # fmt: skip

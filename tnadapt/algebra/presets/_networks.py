"""Methods with one network per group, as in table 1 of the paper, and DoRA and HiRA, which apply LoRA's otherwise."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.maps.projection import make_map
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError, safe_repr

from ._preset import (
    AdaptedWeights,
    Float,
    Ladder,
    Named,
    Params,
    Preset,
    Shapes,
    alpha_over_rank,
    by_factors,
    each,
    each_shape,
    groups_label,
    is_of,
    long_vector_cut,
    lora_config,
    lora_formula,
    one_size,
    preset_config,
    rank_label,
    recognized_by,
    up_to,
)

__all__ = [
    "compacter",
    "dense",
    "dora",
    "fastfood",
    "gralora",
    "hira",
    "krona",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lorta",
    "quanta",
    "superlora",
]


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
    return preset_config(changes, groups="weight", order=1, fold="stack", format="dense")


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
    return lora_config(changes, rank=rank)


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
    return lora_config(changes, rank=rank, splits=2)


def krona(**changes: Any) -> Config:
    """KronA: ``ΔW = s A ⊗ B`` with both factors dense (Edalati et al., arXiv 2212.10650).

    Settings: one group per weight, stack, K = 2, balanced sizes, dense.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.SuperLoRA(krona(), [(768, 768)]).num_parameters == 24**2 + 32**2
    True
    """
    return lora_config(changes, splits=2, format="dense")


def loha(rank: int = 4, **changes: Any) -> Config:
    """LoHa: ``ΔW = (alpha / r) (B1 A1) ∘ (B2 A2)`` (Hyeon-Woo et al., FedPara, arXiv 2108.06098; arXiv 2309.14859).

    Settings: one group per weight, stack, K = 2 combined by the Hadamard product, both splits CP.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(loha(rank=4), [(768, 768)])
    12288
    """
    return lora_config(changes, rank=rank, splits=2, combine="hadamard", leading="same")


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
    splitting = {"splits": splits, "split_size": split_size, "leading": "dense"}
    return lora_config(changes, rank=rank, groups=groups, fold="hypercube", **splitting)


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
    return preset_config(changes, groups=groups, fold="hypercube", order=order, format="tucker", rank=rank)


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
    fold = ("weights", k, f"rows/{k}", k, f"cols/{k}")
    axes = ((0, 1, 3), 2, 4)
    return preset_config(changes, groups="weight", order=3, fold=fold, axes=axes, format="cp-batched", rank=rank // k)


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
    order, fold = 2 * len(sizes) + 2, ("weights", *sizes, f"rows/{known}", *sizes, f"cols/{known}")
    axes = ((0, 1), *range(2, order + 1))
    return preset_config(
        changes, groups="weight", order=order, fold=fold, axes=axes, format="circuit", rank=1, start="random"
    )


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
    return preset_config(changes, groups=1, order=1, fold="hypercube", format="dense", projection="linear", ratio=ratio)


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
    return lora_config(changes, rank=rank, groups=groups, fold="hypercube", projection=projection, ratio=ratio)


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
    return lora_config(changes, rank=rank, splits=2, split_size=terms, terms=terms, leading="dense")


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
    return lora_config(changes, rank=rank, apply="magnitude")


def hira(rank: int = 32, **changes: Any) -> Config:
    """HiRA: ``W' = W + W ∘ ΔW`` with LoRA's ΔW, a change of full rank (Huang et al., ICLR 2025).

    Settings: LoRA with ``apply="hadamard"``. The paper's A and B are LoRA's. Parameters: r (rows + cols) per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(hira(rank=32), [(768, 768)] * 24) == 2 * 768 * 32 * 24
    True
    """
    return lora_config(changes, rank=rank, apply="hadamard")


# -- Formulas, as the papers state them -------------------------------------------------------------------------------


def _dense(p: Named, config: Config) -> Float:
    return p("split0.dense")


def _kron(a: Float, b: Float) -> Float:
    return np.asarray(np.kron(a, b), np.float64)


def _lokr(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) W1 ⊗ (W2_b W2_a); Yeh et al.
    return alpha_over_rank(config) * _kron(p("split0.dense"), p("split1.factor0") @ p("split1.factor1").T)


def _krona(p: Named, config: Config) -> Float:
    # ΔW = s A_K ⊗ B_K; Edalati et al.
    return alpha_over_rank(config) * _kron(p("split0.dense"), p("split1.dense"))


def _loha(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) (B1 A1) ∘ (B2 A2); Hyeon-Woo et al.
    first = p("split0.factor0") @ p("split0.factor1").T
    second = p("split1.factor0") @ p("split1.factor1").T
    return alpha_over_rank(config) * first * second


def _compacter(p: Named, config: Config) -> Float:
    # W = sum_i A_i ⊗ (s_i t_iᵀ); Mahabadi et al.
    terms = [f"term{i}." if config.terms > 1 else "" for i in range(config.terms)]
    products = [
        _kron(p(f"{term}split0.dense"), p(f"{term}split1.factor0") @ p(f"{term}split1.factor1").T) for term in terms
    ]
    return alpha_over_rank(config) * np.asarray(np.sum(products, axis=0))


def _lonkr(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # Figure 3c of the paper with G = 1: D_1 ⊗ … ⊗ D_{K-1} ⊗ (A Bᵀ) on a square.
    last = f"group0.split{config.splits - 1}."
    product: Float = params[last + "factor0"] @ params[last + "factor1"].T
    for k in reversed(range(config.splits - 1)):
        product = _kron(params[f"group0.split{k}.dense"], product)
    n = sum(rows * cols for rows, cols in shapes)
    side = math.isqrt(n - 1) + 1  # the square root, rounded up
    return long_vector_cut(product[:side, :side].reshape(-1), shapes)


def _lorta(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # Equation 3 of the paper, mode by mode: fold C x_m A_m one after another.
    tensor = params["group0.split0.core"]
    for mode in range(config.order):
        tensor = np.moveaxis(np.tensordot(params[f"group0.split0.factor{mode}"], tensor, (1, mode)), 0, mode)
    return long_vector_cut(tensor.reshape(-1), shapes)


def _superlora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # The headline with G = 1: F(vec(A Bᵀ)).
    n = sum(rows * cols for rows, cols in shapes)
    n_in = max(1, math.ceil(Decimal(str(config.ratio)) * n))
    vec = (params["group0.split0.factor0"] @ params["group0.split0.factor1"].T).reshape(-1)[:n_in]
    return long_vector_cut(_projected(config, vec, n), shapes)


def _fastfood(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # θ = P θ_d with P a fastfood matrix; Aghajanyan et al.
    n = sum(rows * cols for rows, cols in shapes)
    return long_vector_cut(_projected(config, params["group0.split0.dense"], n), shapes)


def _projected(config: Config, x: Float, n_out: int) -> Float:
    """Compute F(x) with the dense matrix."""
    f = make_map(config.projection, len(x), n_out, config.seed)
    y: Float = f.linear_part.matrix() @ x
    return y if f.linear else y - np.tanh(y)


def _gralora(p: Named, config: Config) -> Float:
    # k × k blocks, each (alpha / r) B A of rank r / k; Jung et al.
    b, a = p("split0.factor1"), p("split0.factor2")
    k = math.isqrt(len(b))
    rank = k * b.shape[2]
    scale = 1.0 if config.alpha is None else config.alpha * k / rank
    return scale * np.block([[b[k * i + j] @ a[k * i + j].T for j in range(k)] for i in range(k)])


def _gates(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # T_n … T_1 as matrices, each T ⊗ 1 after the digits are reordered; Chen et al.
    assert isinstance(config.fold, tuple)
    axes = len(config.fold) // 2
    known = [size for size in config.fold[1:axes] if isinstance(size, int)]
    dims = [*known, shape[1] // math.prod(known)]
    total: Float = np.eye(math.prod(dims))
    pairs = [(k, j) for k in range(axes) for j in range(k + 1, axes)]
    for number, pair in enumerate(pairs):
        gate = p(f"split0.gate{number}")
        order = np.moveaxis(np.arange(math.prod(dims)).reshape(dims), pair, range(2)).reshape(-1)
        inner = math.prod(dims[axis] for axis in pair)
        lifted = _kron(gate.reshape(-1, inner), np.eye(math.prod(dims) // inner)) @ total[order]
        for axis, size in zip(pair, gate.shape, strict=False):
            dims[axis] = size
        place = np.moveaxis(np.arange(math.prod(dims)).reshape(dims), pair, range(2)).reshape(-1)
        total = np.empty_like(lifted)
        total[place] = lifted
    return total


def _quanta(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = T_n … T_1 - S_n … S_1, where S is T at the start; Chen et al.
    begun = {name.removeprefix("begun."): array for name, array in params.items() if name.startswith("begun.")}
    now, then = (each_shape(_gates)(arrays, config, shapes) for arrays in (params, begun))
    return [product - start for product, start in zip(now, then, strict=True)]


def _dora(params: Params, config: Config, weights: Sequence[Float]) -> list[Float]:
    # W' = m (W0 + B A) / ||W0 + B A||, one m for each output; Liu et al., equation (5).
    new_weights: list[Float] = []
    for i, update in enumerate(each(lora_formula)(params, config, [weight.shape for weight in weights])):
        direction = weights[i] + update
        lengths = np.array([math.sqrt(math.fsum(x * x for x in row)) for row in direction.tolist()])
        new_weights.append(params[f"weight{i}.magnitude"][:, None] * direction / lengths[:, None])
    return new_weights


def _hira(params: Params, config: Config, weights: Sequence[Float]) -> list[Float]:
    # W' = W0 + W0 ⊙ (B A); Huang et al.
    updates = each(lora_formula)(params, config, [weight.shape for weight in weights])
    return [weight + np.multiply(weight, update) for weight, update in zip(weights, updates, strict=True)]


# -- Sizes, and how configs are recognized -----------------------------------------------------------------------------


def _lonkr_sizes(weights: AdaptedWeights) -> list[Ladder]:
    side = math.isqrt(weights.size - 1) + 1
    return [
        Ladder(functools.partial(lonkr, splits=splits, split_size=f), by_factors)
        for splits in (2, 3, 4)
        for f in (*range(2, 33), *range(33, 257, 4))
        if f ** (splits - 1) <= side
    ]


def _fastfood_sizes(weights: AdaptedWeights) -> list[Ladder]:
    # With ten decimals of ρ, the number of parameters is within one of the budget for 10^10 elements.
    def config(size: int) -> Config:
        return fastfood(math.floor(size / weights.size * 1e10) / 1e10 or 1e-10)

    return [Ladder(config, up_to(weights.size))]


def _compacter_sizes(weights: AdaptedWeights) -> list[Ladder]:
    return [
        Ladder(functools.partial(compacter, terms=terms), up_to(max(1, weights.side // terms)))
        for terms in (2, 4, 8)
        if weights.side >= terms
    ]


def _quanta_sizes(weights: AdaptedWeights) -> list[Ladder]:
    """Return circuits of two to four digits, as balanced as the common divisors of the sides allow."""
    divisors = [size for size in weights.divisors if size > 1]
    several = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(divisors, number) for number in (1, 2, 3)
    )
    fitting = [digits for digits in several if math.prod(digits) in divisors]
    return [one_size(functools.partial(quanta, digits)) for digits in fitting]


def _superlora_label(config: Config) -> str | None:
    if config.format != "cp" or not is_of(config, superlora, config.rank, config.groups):
        return None
    return ", ".join([*groups_label(config), f"r = {config.rank}"])


def _lorta_label(config: Config) -> str | None:
    if config.order < 3 or not is_of(config, lorta, config.rank, config.order, config.groups):
        return None
    return ", ".join([f"M = {config.order}", *groups_label(config), f"r = {rank_label(config.rank)}"])


def _lonkr_label(config: Config) -> str | None:
    if config.splits < 2 or not is_of(config, lonkr, config.rank, config.splits, config.groups, config.split_size):
        return None
    sizes = [f"K = {config.splits}", f"f = {config.split_size}"]
    return ", ".join([*sizes, *groups_label(config), f"r = {rank_label(config.rank)}"])


def _quanta_label(config: Config) -> str | None:
    if config.format != "circuit" or not isinstance(config.fold, tuple):
        return None
    digits = config.fold[1 : len(config.fold) // 2]
    return "·".join(map(str, digits)) if is_of(config, quanta, digits) else None


# -- The records -------------------------------------------------------------------------------------------------------


NETWORK_PRESETS = (
    Preset(
        "dense", dense, "dense", "full fine-tuning",
        sizes=lambda weights: [one_size(dense)], recognize=recognized_by(dense), formula=each(_dense),
        peers={"LyCORIS": "full"},
    ),
    Preset(
        "lora", lora, "LoRA", "Hu et al., arXiv 2106.09685", {"rank": 3, "alpha": 6},
        recognize=recognized_by(lora, rank="r"), formula=each(lora_formula), peers={"PEFT": "LORA", "LyCORIS": "lora"},
    ),
    Preset(
        "lokr", lokr, "LoKr", "Yeh et al., arXiv 2309.14859", {"rank": 2, "alpha": 3},
        sizes=lambda weights: [Ladder(lokr, by_factors)], recognize=recognized_by(lokr, rank="r"), formula=each(_lokr),
        peers={"PEFT": "LOKR", "LyCORIS": "lokr"},
    ),
    Preset(
        "krona", krona, "KronA", "Edalati et al., arXiv 2212.10650",
        sizes=lambda weights: [one_size(krona)], recognize=recognized_by(krona), formula=each(_krona),
    ),
    Preset(
        "loha", loha, "LoHa", "Hyeon-Woo et al. (FedPara), arXiv 2108.06098", {"rank": 2, "alpha": 3},
        recognize=recognized_by(loha, rank="r"), formula=each(_loha), peers={"PEFT": "LOHA", "LyCORIS": "loha"},
    ),
    Preset(
        "lonkr", lonkr, "LoNKr", "Chen et al. (SuperLoRA), arXiv 2403.11887", {"rank": 2, "splits": 3, "split_size": 2},
        sizes=_lonkr_sizes, recognize=_lonkr_label, formula=_lonkr,
    ),
    Preset(
        "lorta", lorta, "LoRTA", "Chen et al. (SuperLoRA), arXiv 2403.11887", {"rank": 2, "order": 4},
        sizes=lambda weights: [Ladder(functools.partial(lorta, order=order), by_factors) for order in (3, 4, 5)],
        recognize=_lorta_label, formula=_lorta,
    ),
    Preset(
        "gralora", gralora, "GraLoRA", "Jung et al., arXiv 2505.20355", {"rank": 4, "blocks": 2, "alpha": 3},
        sizes=lambda weights: [Ladder(lambda size: gralora(2 * size, 2), up_to(max(1, weights.side // 2)))],
        formula=each(_gralora), peers={"PEFT": "GRALORA"},
    ),
    Preset(
        "quanta", quanta, "QuanTA", "Chen et al., arXiv 2406.00132", {"digits": (2, 2)},
        sizes=_quanta_sizes, recognize=_quanta_label, formula=_quanta,
    ),
    Preset(
        "fastfood", fastfood, "fastfood", "Aghajanyan et al., arXiv 2012.13255", {"ratio": 0.1},
        sizes=_fastfood_sizes, recognize=recognized_by(fastfood, ratio="ρ"), formula=_fastfood,
    ),
    Preset(
        "superlora", superlora, "SuperLoRA", "Chen et al., arXiv 2403.11887",
        {"rank": 2, "projection": "linear", "ratio": 0.3},
        sizes=lambda weights: [Ladder(superlora, by_factors)], recognize=_superlora_label, formula=_superlora,
    ),
    Preset(
        "compacter", compacter, "Compacter", "Karimi Mahabadi et al., arXiv 2106.04647", {"rank": 1, "terms": 2},
        sizes=_compacter_sizes, recognize=recognized_by(compacter, terms="n", rank="r"), formula=each(_compacter),
    ),
    Preset(
        "dora", dora, "DoRA", "Liu et al., arXiv 2402.09353", {"rank": 3, "alpha": 6},
        recognize=recognized_by(dora, rank="r"), formula=each(lora_formula), changed=_dora, peers={"PEFT": "LORA"},
    ),
    Preset(
        "hira", hira, "HiRA", "Huang et al., ICLR 2025", {"rank": 3, "alpha": 6},
        recognize=recognized_by(hira, rank="r"), formula=each(lora_formula), changed=_hira, peers={"PEFT": "HIRA"},
    ),
)  # fmt: skip

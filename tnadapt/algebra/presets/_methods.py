"""The named methods (LoRA, LoKr, DoRA, VeRA, …): a function for each that returns its config; formula, sizes, record.

Sections: one network per group, as in table 1 of the paper, and DoRA and HiRA, which apply LoRA's ΔW in another way;
factors that all weights of a group share; frozen, tied and scaled arrays, and a map before the network; and maps that
determine the trained values of each weight. Each ends with the formulas as the papers state them, and the records.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config, checked_number, is_named
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.maps import CenteredWavelet, Circulant, Scatter, TiedElements, Tile, TorchScatter, Wavelet
from tnadapt.algebra.maps.projection import make_map
from tnadapt.algebra.sources import BaseCore, FromBase, Given, Mixed, Scaled, Seeded, Source, Tied
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError, safe_repr

from ._preset import AdaptedWeights, Float, Ladder, Params, Preset, Shapes, by_factors, groups_label, rank_label

__all__ = [
    "c3a", "cara", "compacter", "craft", "dense", "dora", "fact_tk", "fact_tt", "fastfood", "fourierft", "gralora",
    "hira", "krona", "loca", "loha", "lokr", "lonkr", "lora", "lora_fa", "lora_xs", "lorta", "lorta_cp", "lotr",
    "metatt", "miss", "nola", "quanta", "randlora", "share_lora", "shira", "superlora", "svft", "tied_lora",
    "tinylora", "unilora", "vera", "waveft",
]  # fmt: skip


# -- Helpers of the records: configs, sizes, and formulas --------------------------------------------------------------


Make = Callable[..., Config]
Sizes = Callable[[AdaptedWeights], Sequence[Ladder]]
Named = Callable[[str], Float]


def preset_config(changes: Mapping[str, Any], **settings: Any) -> Config:
    """Return the config of a preset: its settings, what the caller changes, and the rate that all presets share."""
    if settings.get("before") is None:
        _refuse_count(changes, next((name for name in ("rank", "ratio") if name in settings), ""))
    return Config.from_dict({"rate": "adam", **settings, **changes})


def _refuse_count(changes: Mapping[str, Any], size: str) -> None:
    """Refuse a number of parameters for a preset that takes another size, named if not empty."""
    if "parameters" in changes and changes.get("before") is None:
        takes = f"this preset takes {size}; " if size else ""
        count = safe_repr(changes["parameters"])
        raise ConfigError(
            f"parameters={count}: {takes}unilora, tinylora, fastfood and nola take a number of parameters"
        )


def lora_config(changes: Mapping[str, Any], **settings: Any) -> Config:
    """LoRA's settings, and others of the preset: one group per weight, stack, M = 2, CP."""
    base = {"groups": "weight", "fold": "stack", "order": 2, "format": "cp"}
    return preset_config(changes, **{**base, **settings})


def up_to(most: int) -> Callable[[Any], int]:
    return lambda plan: most


def one_size(make: Callable[[], Config]) -> Ladder:
    return Ladder(lambda _: make(), up_to(1))


def of_theta(
    make: Make, dimensions: Callable[[AdaptedWeights, int], int], first_rank: int, most: int = 1 << 40
) -> Sizes:
    """Return the sizes of θ, up to the dimensions of what it determines; ranks in powers of two.

    Of equal sizes, a search takes the first: the smallest rank with enough dimensions.
    """

    def sizes(weights: AdaptedWeights) -> list[Ladder]:
        powers = [first_rank << step for step in range(16) if first_rank << step <= max(first_rank, weights.side)]
        return [
            Ladder(functools.partial(make, rank=rank), up_to(min(most, dimensions(weights, rank))))
            for rank in powers
            if dimensions(weights, rank) >= 1
        ]

    return sizes


Formula = Callable[[Params, Config, Shapes], list[Float]]


def each(formula: Callable[[Named, Config], Float]) -> Formula:
    """Apply the formula of one weight to all."""
    return each_shape(lambda arrays, config, shape: formula(arrays, config))


def each_shape(formula: Callable[[Named, Config, tuple[int, int]], Float]) -> Formula:
    """Apply the formula of one weight, which depends on its shape, to all."""

    def all_weights(params: Params, config: Config, shapes: Shapes) -> list[Float]:
        deltas = []
        for group, shape in enumerate(shapes):
            prefix = f"group{group}."
            arrays = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
            deltas.append(formula(arrays.__getitem__, config, shape).reshape(shape))
        return deltas

    return all_weights


def alpha_over_rank(config: Config) -> float:
    assert isinstance(config.rank, int)
    return 1.0 if config.alpha is None else config.alpha / config.rank


def lora_formula(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) B A; Hu et al.
    lora_b, lora_a = p("split0.factor0"), p("split0.factor1").T
    return alpha_over_rank(config) * lora_b @ lora_a


def long_vector_cut(vector: Float, shapes: Shapes) -> list[Float]:
    """Cut the vector of all updates into the weights."""
    edges = np.cumsum([rows * cols for rows, cols in shapes]).tolist()
    return [part.reshape(shape) for part, shape in zip(np.split(vector[: edges[-1]], edges[:-1]), shapes, strict=True)]


# -- Recognition: which configs a preset makes, and the label of their arguments ---------------------------------------


Arguments = Mapping[str, Any]
Read = Callable[[Config], Arguments | bool | None]


def recognized_by(make: Make, read: Read | None = None, /, **symbols: str) -> Callable[[Config], str | None]:
    """Recognize the configs that a preset makes of some arguments, and label each by these: ``"r = 4"`` by rank="r".

    ``read`` returns the arguments that a config would be made of, None if there are none; or whether its fields of the
    same names may be these.
    """

    @functools.cache
    def smallest() -> tuple[Any, ...]:
        return _outline(make(**dict.fromkeys(symbols, 1)))

    def like_smallest(config: Config) -> bool:  # most configs fail this test, which is faster than computing a value
        return _outline(config) == smallest()

    def recognize(config: Config) -> str | None:
        config = _with_presets_maps(config)
        arguments = (read or like_smallest)(config)
        if arguments is True:
            arguments = {name: getattr(config, name) for name in symbols}
        try:
            if not isinstance(arguments, Mapping) or not _same_method(config, make(**{"alpha": None, **arguments})):
                return None
        except ConfigError:
            return None
        words = [_words(config, symbol, name, arguments[name]) for name, symbol in symbols.items()]
        return ", ".join(itertools.chain(*words))

    return recognize


def _with_presets_maps(config: Config) -> Config:
    """Return the config of the same method that draws its positions and indices as presets do, not as PEFT does."""
    steps = tuple(map(_presets_map, _settings(config)))
    if steps != _settings(config):
        config = config.replace(projection=steps if len(steps) > 1 else steps[0])
    if config.before == TiedElements(normalized=True):  # Uni-LoRA, trained from θ alone
        config = config.replace(before="one-hot", offset=True)
    return config


def _presets_map(step: Any) -> Any:
    if isinstance(step, TorchScatter):
        return Scatter(step.size)
    if isinstance(step, CenteredWavelet):
        return Wavelet(step.family)
    return "wavelet" if step == "centered-wavelet" else step


def _settings(config: Config) -> tuple[Any, ...]:
    return config.projection if isinstance(config.projection, tuple) else (config.projection,)


def _same_method(config: Config, usual: Config) -> bool:
    """Return whether two configs are equal, apart from arrays that a file brings in place of a preset's random ones."""
    sources = dict(config.sources)
    for name in sources.keys() & usual.sources.keys():
        sources[name] = _usual_source(sources[name], usual.sources[name])
    return config.replace(sources=sources) == usual


def _usual_source(source: Source, usual: Source) -> Source:
    if isinstance(source, Scaled) and isinstance(usual, Scaled):
        return dataclasses.replace(source, of=_usual_source(source.of, usual.of))
    if isinstance(source, Given) and isinstance(usual, Seeded) and source.shared == usual.shared:
        return usual
    return source


def _words(config: Config, symbol: str, name: str, value: Any) -> list[str]:
    """Return the words of a label that describe an argument, none for its usual value."""
    if name == "groups":
        return groups_label(config)
    if value is None or value == "haar":
        return []
    if name == "digits":
        return ["·".join(map(str, value))]
    if isinstance(value, float):
        value = f"{value:.4g}"
    word = rank_label(value) if isinstance(value, tuple) else str(value)
    return [f"{symbol} = {word}" if symbol else word]


def _outline(config: Config) -> tuple[Any, ...]:
    """Return the parts of a config that its numbers do not change."""
    return config.groups, config.fold, config.format, config.before, config.apply, tuple(config.sources)


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
    >>> tna.UpdatePlan(lokr(rank=1), [(768, 768)]).param_shapes
    {'group0.split0.dense': (24, 24), 'group0.split1.factor0': (32, 1), 'group0.split1.factor1': (32, 1)}
    """
    return lora_config(changes, rank=rank, splits=2)


def krona(**changes: Any) -> Config:
    """KronA: ``ΔW = s A ⊗ B`` with both factors dense (Edalati et al., arXiv 2212.10650).

    Settings: one group per weight, stack, K = 2, balanced sizes, dense.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.UpdatePlan(krona(), [(768, 768)]).num_parameters == 24**2 + 32**2
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
    >>> tna.UpdatePlan(lonkr(rank=1), [(768, 768)] * 24).num_parameters == 8**2 + 8**2 + 59 + 59
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
    >>> plan = tna.UpdatePlan(gralora(rank=8, blocks=2), [(768, 768)] * 24)
    >>> plan.num_parameters == 24 * 8 * (768 + 768), plan.lora_rank
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
def fastfood(ratio: float | None = None, parameters: int | None = None, **changes: Any) -> Config:
    """Intrinsic dimension by fastfood: a dense vector and a linear F (Aghajanyan et al., arXiv 2012.13255).

    Settings: G = 1, M = 1, dense, linear F with compression ratio ρ. The SuperLoRA paper's "dense with projection".
    For a number of parameters: F as the map before a dense vector of the length of ΔW (``before="linear"``).

    Parameters
    ----------
    ratio : float, optional
        ρ, the share of the elements of all weights that are trained: 0.01 if ``parameters`` is not given.
    parameters : int, optional
        Number of trained parameters, instead of ``ratio``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(fastfood(ratio=0.01), [(768, 768)] * 24)
    141558
    >>> tna.parameter_count(fastfood(parameters=1000), [(768, 768)] * 24)
    1000
    """
    settings: dict[str, Any] = {"groups": 1, "order": 1, "fold": "hypercube", "format": "dense"}
    if "before" in changes:  # the parameters are those of this map
        changes, parameters = changes | {"parameters": parameters}, None
    if parameters is None:
        ratio = 0.01 if ratio is None else ratio
        if ratio > 1:
            raise ConfigError(f"ratio must be at most 1, a share of all elements; got {ratio}: use parameters={ratio}")
        return preset_config(changes, **settings, projection="linear", ratio=ratio)
    if ratio is not None:
        raise ConfigError(f"fastfood takes ratio or parameters; got ratio={ratio} and parameters={parameters}")
    return preset_config(changes, **settings, before="linear", parameters=parameters)


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


# -- Methods that apply the update to the weight in another way: DoRA and HiRA -----------------------------------------


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


# -- Networks: formulas, as the papers state them ----------------------------------------------------------------------


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
    if config.before is None:
        return long_vector_cut(_projected(config, params["group0.split0.dense"], n), shapes)
    f = make_map(config.before, len(params["theta"]), n, config.seed, 2**31)
    return long_vector_cut(f.linear_part.matrix() @ params["theta"], shapes)


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


# -- Networks: sizes, and how configs are recognized -------------------------------------------------------------------


def _lonkr_sizes(weights: AdaptedWeights) -> list[Ladder]:
    side = math.isqrt(weights.size - 1) + 1
    return [
        Ladder(functools.partial(lonkr, splits=splits, split_size=f), by_factors)
        for splits in (2, 3, 4)
        for f in (*range(2, 33), *range(33, 257, 4))
        if f ** (splits - 1) <= side
    ]


def _any_rank(config: Config) -> Arguments | None:
    # Dense arrays have none: it divides alpha alone.
    return {"rank": config.rank} if config.format == "dense" else None


def _fastfood_arguments(config: Config) -> dict[str, Any]:
    return {"parameters": config.parameters, "ratio": config.ratio if config.before is None else None}


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


def _quanta_arguments(config: Config) -> Arguments | None:
    if config.format != "circuit" or not isinstance(config.fold, tuple):
        return None
    return {"digits": config.fold[1 : len(config.fold) // 2]}


# -- Networks: the records ---------------------------------------------------------------------------------------------


NETWORK_PRESETS = (
    Preset(
        "dense", dense, "dense", "full fine-tuning",
        sizes=lambda weights: [one_size(dense)], recognize=recognized_by(dense, _any_rank), formula=each(_dense),
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
        sizes=lambda weights: [one_size(krona)], recognize=recognized_by(krona, _any_rank), formula=each(_krona),
    ),
    Preset(
        "loha", loha, "LoHa", "Hyeon-Woo et al. (FedPara), arXiv 2108.06098", {"rank": 2, "alpha": 3},
        recognize=recognized_by(loha, rank="r"), formula=each(_loha), peers={"PEFT": "LOHA", "LyCORIS": "loha"},
    ),
    Preset(
        "lonkr", lonkr, "LoNKr", "Chen et al. (SuperLoRA), arXiv 2403.11887", {"rank": 2, "splits": 3, "split_size": 2},
        sizes=_lonkr_sizes, formula=_lonkr,
        recognize=recognized_by(
            lonkr, lambda config: config.splits > 1, splits="K", split_size="f", groups="G", rank="r"
        ),
    ),
    Preset(
        "lorta", lorta, "LoRTA", "Chen et al. (SuperLoRA), arXiv 2403.11887", {"rank": 2, "order": 4},
        sizes=lambda weights: [Ladder(functools.partial(lorta, order=order), by_factors) for order in (3, 4, 5)],
        recognize=recognized_by(lorta, lambda config: config.order > 2, order="M", groups="G", rank="r"),
        formula=_lorta,
    ),
    Preset(
        "gralora", gralora, "GraLoRA", "Jung et al., arXiv 2505.20355", {"rank": 4, "blocks": 2, "alpha": 3},
        sizes=lambda weights: [Ladder(lambda size: gralora(2 * size, 2), up_to(max(1, weights.side // 2)))],
        formula=each(_gralora), peers={"PEFT": "GRALORA"},
    ),
    Preset(
        "quanta", quanta, "QuanTA", "Chen et al., arXiv 2406.00132", {"digits": (2, 2)},
        sizes=_quanta_sizes, recognize=recognized_by(quanta, _quanta_arguments, digits=""), formula=_quanta,
    ),
    Preset(
        "fastfood", fastfood, "fastfood", "Aghajanyan et al., arXiv 2012.13255", {"ratio": 0.1},
        sizes=_fastfood_sizes, recognize=recognized_by(fastfood, _fastfood_arguments, parameters="p", ratio="ρ"),
        formula=_fastfood,
    ),
    Preset(
        "superlora", superlora, "SuperLoRA", "Chen et al., arXiv 2403.11887",
        {"rank": 2, "projection": "linear", "ratio": 0.3},
        sizes=lambda weights: [Ladder(superlora, by_factors)], formula=_superlora,
        recognize=recognized_by(superlora, lambda config: config.format == "cp", groups="G", rank="r"),
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


# -- Methods with factors shared among weights: all weights of a group are one tensor ----------------------------------


Fold = tuple[int | str, ...]


def _stacked(
    sizes: dict[str, int | None], fold: Callable[..., Fold], settings: dict[str, Any], changes: dict[str, Any]
) -> Config:
    """Return a config that stacks all weights of a group into one tensor whose last modes are rows and columns."""
    sizes = {
        name: None if size is None else integer(name, size, 1, MAX_SIZE, ConfigError) for name, size in sizes.items()
    }
    absent = [name for name, size in sizes.items() if size is None]
    if absent and len(absent) < len(sizes):
        raise ConfigError(
            f"{', '.join(name for name in sizes if name not in absent)} given without {', '.join(absent)}: give all of "
            f"{', '.join(sizes)}, or none to take them from the weights of each group"
        )
    # The fold of the sizes, or of their names if the caller gives no sizes.
    modes = fold(*(sizes if absent else sizes.values()))
    # A fold of the caller's replaces this one, and may be used with weights of any shapes.
    if "fold" not in changes:
        settings = {**settings, "fold": modes}
        if not absent:
            settings["weight_shape"] = sizes["rows"], sizes["cols"]
    return preset_config(changes, groups=1, order=len(modes), **settings)


def _in_heads(rows: int | str, heads: int | None, head_size: int | None) -> Fold:
    """Return the number of heads and their size, of which one is given and the other divides the rows."""
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
    """Return the number of layers, and how many matrices of each are in a group."""
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
    >>> tna.UpdatePlan(lotr(rank=2, weights=3, rows=8, cols=5), [(8, 5)] * 3).param_shapes
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
    >>> tna.UpdatePlan(metatt(rank=8), [(768, 768)] * 24).lora_rank
    8
    """
    split = heads is not None or head_size is not None

    def fold(layers: int | str, rows: int | str, cols: int | str) -> Fold:
        row_digits = _in_heads(rows, heads, head_size) if split else (rows,)
        return (*_in_layers(layers, matrices, changes), *row_digits, cols)

    settings: dict[str, Any] = {"format": "tt", "rank": rank, "axes": (4, 0, 1, 2, 3) if split else (3, 0, 1, 2)}
    return _stacked({"layers": layers, "rows": rows, "cols": cols}, fold, settings, changes)


# -- Shared factors: formulas, as the papers state them ----------------------------------------------------------------


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


# -- Shared factors: sizes, and how configs are recognized -------------------------------------------------------------


def _stacked_ranks(make: Make, **settings: Any) -> Sizes:
    """Return the ranks of a preset that stacks the weights of a group, which must have one shape."""

    def sizes(weights: AdaptedWeights) -> list[Ladder]:
        groups: Any = 1 if weights.uniform else "role"
        return [Ladder(functools.partial(make, groups=groups, **settings), up_to(4 * weights.side))]

    return sizes


def _ranks_in_heads(make: Make) -> Sizes:
    def sizes(weights: AdaptedWeights) -> Any:
        return [] if weights.head_size is None else _stacked_ranks(make, head_size=weights.head_size)(weights)

    return sizes


def _lotr_arguments(config: Config) -> Arguments | None:
    rank, fold = config.rank, config.fold
    if not (isinstance(rank, tuple) and isinstance(fold, tuple) and len(rank) == len(fold) == 3):
        return None
    sizes = {} if is_named(fold) else dict(zip(("weights", "rows", "cols"), map(int, fold), strict=True))
    return {"rank": rank[-1], "groups": config.groups, **sizes}


# -- Shared factors: the records ---------------------------------------------------------------------------------------


_FOUR = {"weights": 4, "rows": 12, "cols": 8}

# A config does not say what a mode of the fold means to the model, so only the first preset is recognized.
STACKED_PRESETS = (
    Preset(
        "lotr", lotr, "LoTR", "Bershatsky et al., arXiv 2402.01376", {"rank": 3, **_FOUR},
        sizes=_stacked_ranks(lotr), recognize=recognized_by(lotr, _lotr_arguments, groups="G", rank="r"), formula=_lotr,
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


# -- Methods with sources of arrays: frozen, tied and scaled ones, and a map before the network ------------------------


def lora_fa(rank: int = 4, **changes: Any) -> Config:
    """LoRA-FA: LoRA with a frozen random A (Zhang et al., arXiv 2308.03303).

    Settings: LoRA with ``factor1`` seeded, another one for each weight. Parameters: r rows per weight.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.parameter_count(lora_fa(rank=4), [(768, 768)] * 24) == 18_432 * 4
    True
    """
    return lora_config(changes, rank=rank, sources={"factor1": Seeded("normal", shared=False)})


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
    return lora_config(changes, rank=rank, sources={"factor1": Tied("group0.split0.factor1")})


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
    return lora_config(changes, rank=rank, sources=sources)


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
    return lora_config(changes, rank=rank, sources=sources)


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
    sizes = {"rank": rank, "rows": rows, "cols": cols}
    rank, rows, cols = (integer(name, size, 1, MAX_SIZE, ConfigError) for name, size in sizes.items())
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
    return lora_config(changes, rank=rank, sources=sources, terms=terms)


def _of_base(rank: int, changes: dict[str, Any], **settings: Any) -> Config:
    """Return the config of ``U C Vᵀ`` (Tucker of order 2) with U and V from the base weight."""
    sources = {"factor0": FromBase("rows"), "factor1": FromBase("cols")}
    return lora_config(changes, rank=rank, sources=sources, format="tucker", **settings)


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
    sources = {"factor0": FromBase("rows", vectors=True), "factor1": FromBase("cols", vectors=True)}
    return lora_config(changes, rank=rank, sources=sources, format="cp-weighted")


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
    >>> plan = tna.UpdatePlan(craft(rank=16), [(768, 768)] * 24, roles="qv" * 12)
    >>> plan.num_parameters == 2 * (12**2 + 16**2 + 16**2)
    True
    """
    bases, fold = Mixed(FromBase("mode")), ("weights", "rows", "cols")
    sources = {"core": BaseCore(), "factor0": bases, "factor1": bases, "factor2": bases}
    ranks = rank if weights is None else (integer("weights", weights, 1, MAX_SIZE, ConfigError), rank, rank)
    return preset_config(
        changes, groups="role", fold=fold, order=3, format="tucker", rank=ranks, sources=sources, start="random"
    )


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
    return lora_config(changes, rank=rank, before="one-hot", parameters=parameters)


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
    return lora_config(changes, rank=rank, before="normal", parameters=parameters, scope="array")


# -- Sources of numbers: formulas, as the papers state them ------------------------------------------------------------


def _vera(p: Named, config: Config) -> Float:
    # ΔW = Λ_b B Λ_d A; Kopiczko et al.
    b, d = np.diag(p("split0.factor0.size")), np.diag(p("split0.factor1.rank"))
    return alpha_over_rank(config) * b @ p("split0.factor0") @ d @ p("split0.factor1").T


def _svft(p: Named, config: Config) -> Float:
    # ΔW = U M Vᵀ with a diagonal M; Lingam et al.
    return alpha_over_rank(config) * p("split0.factor0") @ np.diag(p("split0.weights")) @ p("split0.factor1").T


def _lora_xs(p: Named, config: Config) -> Float:
    # ΔW = U R Vᵀ; Bałazy et al.
    return alpha_over_rank(config) * p("split0.factor0") @ p("split0.core") @ p("split0.factor1").T


def _share_lora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW_i = (alpha / r) B_i A; Song et al.
    a = params["group0.split0.factor1"].T
    return [alpha_over_rank(config) * params[f"group{i}.split0.factor0"] @ a for i in range(len(shapes))]


def _tied_lora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW_i = (alpha / r) Λ_v,i B Λ_u,i A; Renduchintala et al.
    b, a = params["group0.split0.factor0"], params["group0.split0.factor1"].T
    updates: list[Float] = []
    for i in range(len(shapes)):
        v, u = params[f"group{i}.split0.factor0.size"], params[f"group{i}.split0.factor1.rank"]
        updates.append(alpha_over_rank(config) * v[:, None] * (b @ (u[:, None] * a)))
    return updates


def _randlora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = (alpha / r) sum_n B_n Λ_n A Γ_n, where A, Λ and Γ are on the shorter side; Albert et al.
    updates: list[Float] = []
    for i, (rows, cols) in enumerate(shapes):
        total: Float = np.zeros((rows, cols))
        short, long = ("factor1", "factor0") if cols <= rows else ("factor0", "factor1")
        terms = [f"group{i}.term{n}.split0." if config.terms > 1 else f"group{i}.split0." for n in range(config.terms)]
        for name in terms:
            a = params[terms[0] + short].T
            a = np.diag(params[f"{name}{short}.rank"]) @ a @ np.diag(params[f"{name}{short}.size"])
            product = params[name + long] @ a
            total = total + (product if short == "factor1" else product.T)
        updates.append(alpha_over_rank(config) * total)
    return updates


def _combined(params: Params, changes: Params) -> dict[str, Float]:
    """Add what θ changes to what the arrays start from."""
    return {**params, **{name: params[f"begun.{name}"] + change for name, change in changes.items()}}


def _unilora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # All entries of all B and A are P θ, where a row of P has one entry 1 / sqrt(n_j); Li et al.
    names = [f"group{i}.split0.factor{m}" for i in range(len(shapes)) for m in range(2)]
    sizes = [params[f"begun.{name}"].size for name in names]
    theta = params["theta"]
    index = rng.permutation(sum(sizes), config.seed, 2**31) % len(theta)
    values = theta[index] / np.sqrt(np.bincount(index, minlength=len(theta)))[index]
    parts = np.split(values, np.cumsum(sizes)[:-1])
    changes = {name: part.reshape(params[f"begun.{name}"].shape) for name, part in zip(names, parts, strict=True)}
    return each(lora_formula)(_combined(params, changes), config, shapes)


def _nola(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # A = sum_k α_k A_k and B = sum_k β_k B_k, with random A_k and B_k; Koohpayegani et al.
    changes = {}
    names = [f"group{i}.split0.factor{m}" for i in range(len(shapes)) for m in range(2)]
    for stream, name in enumerate(names):
        shape, coefficients = params[f"begun.{name}"].shape, params[f"{name}.theta"]
        count, size = len(coefficients), math.prod(shape)
        basis = _normal_map(size, count, config.seed, stream)
        changes[name] = np.asarray(sum(c * basis[:, k].reshape(shape) for k, c in enumerate(coefficients)))
    return each(lora_formula)(_combined(params, changes), config, shapes)


def _tinylora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # R_i = sum_k v_k P_ik; Morris et al.
    names = [f"group{i}.split0.core" for i in range(len(shapes))]
    shape, theta = params[f"begun.{names[0]}"].shape, params["theta"]
    basis = _normal_map(len(names) * math.prod(shape), len(theta), config.seed, 0)
    basis = basis.reshape(len(names), *shape, len(theta))
    changes = {name: np.tensordot(basis[i], theta, 1) for i, name in enumerate(names)}
    return each(_lora_xs)(_combined(params, changes), config, shapes)


def _normal_map(size: int, count: int, seed: int, stream: int) -> Float:
    """Return a matrix whose columns are random with norms of about 1."""
    drawn = rng.normals(seed, 2**31 + stream, rng.PURPOSE["normal_map"], 0, size * count).astype(np.float64)
    return np.float32(drawn / math.sqrt(size)).astype(np.float64).reshape(size, count)


def _craft(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = G ×_0 U_0 J_0 ×_1 U_1 J_1 ×_2 U_2 J_2 - G ×_0 U_0 ×_1 U_1 ×_2 U_2, for one tensor of all; Dewage et al.
    arrays = {name.removeprefix("group0.split0."): array for name, array in params.items()}
    bases = [arrays[f"factor{mode}"] for mode in range(3)]
    mixed = [base @ arrays[f"factor{mode}.mix"] for mode, base in enumerate(bases)]
    formula = "ijk,ai,bj,ck->abc"
    return list(np.einsum(formula, arrays["core"], *mixed) - np.einsum(formula, arrays["core"], *bases))


# -- Sources of numbers: sizes, and how configs are recognized ---------------------------------------------------------


#: The largest θ before a dense random matrix, which is drawn in each step.
LARGEST_DENSE = 4096


def _of_factors(weights: AdaptedWeights, rank: int) -> int:
    return sum(rank * (rows + cols) for rows, cols in weights.shapes)


def _of_cores(weights: AdaptedWeights, rank: int) -> int:
    return len(weights.shapes) * rank * rank


def _of_one_array(weights: AdaptedWeights, rank: int) -> int:
    return rank * weights.side


def _vera_sizes(weights: AdaptedWeights) -> list[Ladder]:
    # The rank only sets the length of a diagonal, and the paper uses ranks beyond the sides of the weights.
    return [Ladder(vera, up_to(4 * max(max(shape) for shape in weights.shapes)))]


def _randlora_sizes(weights: AdaptedWeights) -> list[Ladder]:
    rows, cols = max(weights.shapes, key=lambda shape: shape[0] * shape[1])

    def config(terms: int) -> Config:
        return randlora(-(-weights.side // terms), rows=rows, cols=cols)

    return [Ladder(config, up_to(min(weights.side, 64)))]


def _craft_arguments(config: Config) -> Arguments | None:
    if "core" not in config.sources:
        return None
    weights, *_, rank = (None, config.rank) if isinstance(config.rank, int) else config.rank
    return {"rank": rank, "weights": weights, "groups": config.groups}


def _randlora_label(config: Config) -> str | None:
    rank = config.rank
    if not config.sources or not isinstance(rank, int):
        return None
    for shape in ((config.terms * rank, 1 << 40), (1 << 40, config.terms * rank)):
        # The initial diagonals depend on the longer side, which does not matter here.
        if _same_method(_without_starts(config), _without_starts(randlora(rank, rows=shape[0], cols=shape[1]))):
            return f"r = {rank}"
    return None


def _without_starts(config: Config) -> Config:
    sources = {
        name: dataclasses.replace(source, start=None) if isinstance(source, Scaled) else source
        for name, source in config.sources.items()
    }
    return config.replace(sources=sources)


# -- Sources of numbers: the records -----------------------------------------------------------------------------------


SOURCE_PRESETS = (
    Preset(
        "craft", craft, "CRAFT", "Dewage et al., arXiv 2602.17510", {"rank": 3, "groups": 1},
        recognize=recognized_by(craft, _craft_arguments, groups="G", rank="r", weights="weights"), formula=_craft,
    ),
    Preset(
        "lora_fa", lora_fa, "LoRA-FA", "Zhang et al., arXiv 2308.03303", {"rank": 3, "alpha": 6},
        recognize=recognized_by(lora_fa, rank="r"), formula=each(lora_formula),
    ),
    Preset(
        "lora_xs", lora_xs, "LoRA-XS", "Bałazy et al., arXiv 2405.17604", {"rank": 3},
        recognize=recognized_by(lora_xs, rank="r"), formula=each(_lora_xs), planned=True,
    ),
    Preset(
        "nola", nola, "NOLA", "Koohpayegani et al., arXiv 2310.02556", {"parameters": 5, "rank": 2},
        sizes=of_theta(nola, _of_one_array, 4), recognize=recognized_by(nola, parameters="k", rank="r"), formula=_nola,
    ),
    Preset(
        "randlora", randlora, "RandLoRA", "Albert et al., arXiv 2502.00987",
        {"rank": 3, "rows": 12, "cols": 8, "alpha": 6},
        sizes=_randlora_sizes, recognize=_randlora_label, formula=_randlora, peers={"PEFT": "RANDLORA"},
    ),
    Preset(
        "share_lora", share_lora, "ShareLoRA", "Song et al., arXiv 2406.10785", {"rank": 3},
        recognize=recognized_by(share_lora, rank="r"), formula=_share_lora,
    ),
    Preset(
        "svft", svft, "SVFT", "Lingam et al., arXiv 2405.19597", {"rank": 8},
        recognize=recognized_by(svft, rank="r"), formula=each(_svft),
    ),
    Preset(
        "tied_lora", tied_lora, "Tied-LoRA", "Renduchintala et al., arXiv 2311.09578", {"rank": 3, "alpha": 6},
        recognize=recognized_by(tied_lora, rank="r"), formula=_tied_lora,
    ),
    Preset(
        "tinylora", tinylora, "TinyLoRA", "Morris et al., arXiv 2602.04118", {"parameters": 5},
        sizes=of_theta(tinylora, _of_cores, 2, LARGEST_DENSE),
        recognize=recognized_by(tinylora, parameters="p", rank="r"), formula=_tinylora, planned=True,
        peers={"PEFT": "TINYLORA"},
    ),
    Preset(
        "unilora", unilora, "Uni-LoRA", "Li et al., arXiv 2506.00799", {"parameters": 11, "rank": 3},
        sizes=of_theta(unilora, _of_factors, 4), recognize=recognized_by(unilora, parameters="p", rank="r"),
        formula=_unilora, planned=True, peers={"PEFT": "UNILORA"},
    ),
    Preset(
        "vera", vera, "VeRA", "Kopiczko et al., arXiv 2310.11454", {"rank": 5},
        sizes=_vera_sizes, recognize=recognized_by(vera, rank="r"), formula=each(_vera), planned=True,
        peers={"PEFT": "VERA"},
    ),
)  # fmt: skip


# -- Methods whose map determines the trained values of each weight: SHiRA, FourierFT, LoCA, WaveFT, C3A and MiSS ------


_SCATTERED = "n, the number for each weight"


def _few_values(size: str, projection: Any, changes: dict[str, Any]) -> Config:
    """Return a config with one vector per weight, whose length the map determines, and alpha as the scale."""
    _refuse_count(changes, size)
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
    return _few_values(_SCATTERED, _scatter(n, positions), changes)


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
    return _few_values(_SCATTERED, [_scatter(n, positions), "dft2"], {"alpha": 150.0, **changes})


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
    return _few_values(_SCATTERED, [_scatter(n, positions), "dct2"], changes)


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
    return _few_values(_SCATTERED, [_scatter(n, positions), Wavelet(family)], {"alpha": 25.0, **changes})


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
    return _few_values("block", Circulant(block, average=True), changes)


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
    return _few_values("r", Tile(rows, integer("r", r, 1, MAX_SIZE, ConfigError)), changes)


# -- Maps: formulas, as the papers state them --------------------------------------------------------------------------


def _values(p: Named, config: Config, size: int) -> Float:
    """Scatter the trained numbers of SHiRA, FourierFT, LoCA or WaveFT into a vector of zeros."""
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
        for half, filter_ in zip(halves, (taps, mirrored), strict=True):
            for k, row in enumerate(half):
                sums[2 * k : 2 * k + len(taps)] += np.outer(filter_, row)
        grid = np.moveaxis(sums[len(taps) - 2 :][:size], 0, axis)
    return alpha_over_rank(config) * grid


def _daubechies(moments: int) -> Float:
    """Return the Daubechies low-pass filter with this many vanishing moments."""
    # Spectral factorization of ``|H|²`` by its roots inside the unit circle (Daubechies, 1988).
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


# -- Maps: sizes, and how configs are recognized -----------------------------------------------------------------------


def _numbers_of_values(make: Make) -> Sizes:
    """Return the numbers of values per weight to consider, up to the elements of the smallest weight."""
    return lambda weights: [Ladder(make, up_to(min(rows * cols for rows, cols in weights.shapes)))]


def _divisors(make: Make) -> Sizes:
    def sizes(weights: AdaptedWeights) -> list[Ladder]:
        return [one_size(functools.partial(make, size)) for size in weights.divisors]

    return sizes


def _scatter_arguments(config: Config) -> dict[str, Any] | None:
    scatter = _settings(config)[0]
    return {"n": scatter.size, "positions": scatter.positions} if isinstance(scatter, Scatter) else None


def _waveft_arguments(config: Config) -> Arguments | None:
    scatter, wavelet = _scatter_arguments(config), _settings(config)[-1]
    return scatter and {**scatter, "family": wavelet.family if isinstance(wavelet, Wavelet) else "haar"}


def _c3a_arguments(config: Config) -> Arguments | None:
    circulant = config.projection
    return {"block": circulant.block} if isinstance(circulant, Circulant) else None


def _miss_arguments(config: Config) -> Arguments | None:
    tile = config.projection
    return {"r": tile.cols, "mini": tile.rows} if isinstance(tile, Tile) else None


# -- Maps: the records -------------------------------------------------------------------------------------------------


MAP_PRESETS = (
    Preset(
        "shira", shira, "SHiRA", "Bhardwaj et al., arXiv 2406.13175", {"n": 10},
        sizes=_numbers_of_values(shira), formula=each_shape(_shira),
        recognize=recognized_by(shira, _scatter_arguments, n="n"),
        peers={"PEFT": "SHIRA"},
    ),
    Preset(
        "fourierft", fourierft, "FourierFT", "Gao et al., arXiv 2405.03003", {"n": 10},
        sizes=_numbers_of_values(fourierft), formula=each_shape(_fourierft),
        recognize=recognized_by(fourierft, _scatter_arguments, n="n"),
        peers={"PEFT": "FOURIERFT"},
    ),
    Preset(
        "loca", loca, "LoCA", "Du et al., arXiv 2502.06820", {"n": 10},
        sizes=_numbers_of_values(loca), formula=each_shape(_loca),
        recognize=recognized_by(loca, _scatter_arguments, n="n"),
    ),
    Preset(
        "waveft", waveft, "WaveFT", "Bilican et al., arXiv 2505.12532", {"n": 10, "family": "db2"},
        sizes=_numbers_of_values(waveft), formula=each_shape(_waveft),
        recognize=recognized_by(waveft, _waveft_arguments, n="n", family=""),
        peers={"PEFT": "WAVEFT"},
    ),
    Preset(
        "c3a", c3a, "C3A", "Chen et al., arXiv 2407.19342", {"block": 4},
        sizes=_divisors(c3a), formula=each_shape(_c3a), peers={"PEFT": "C3A"},
        recognize=recognized_by(c3a, _c3a_arguments, block="b"),
    ),
    Preset(
        "miss", miss, "MiSS", "Kang and Yin, arXiv 2409.15371", {"r": 3},
        sizes=_divisors(miss), formula=each_shape(_miss), peers={"PEFT": "MISS"},
        recognize=recognized_by(miss, _miss_arguments, r="r", mini="mini"),
    ),
)  # fmt: skip


BUILT_IN = sorted((*NETWORK_PRESETS, *STACKED_PRESETS, *SOURCE_PRESETS, *MAP_PRESETS), key=lambda preset: preset.name)

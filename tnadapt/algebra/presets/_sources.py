"""Methods that say where the numbers come from: frozen, tied and scaled arrays, and a map before the network."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config, checked_number
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.sources import BaseCore, FromBase, Mixed, Scaled, Seeded, Source, Tied
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError

from ._preset import (
    AdaptedWeights,
    Float,
    Ladder,
    Named,
    Params,
    Preset,
    Shapes,
    alpha_over_rank,
    each,
    groups_label,
    is_of,
    lora_config,
    lora_formula,
    of_theta,
    preset_config,
    recognized_by,
    up_to,
)

__all__ = [
    "craft",
    "lora_fa",
    "lora_xs",
    "nola",
    "randlora",
    "share_lora",
    "svft",
    "tied_lora",
    "tinylora",
    "unilora",
    "vera",
]


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
    """``U C Vᵀ`` with U and V from the base weight: Tucker of order 2."""
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
    >>> plan = tna.SuperLoRA(craft(rank=16), [(768, 768)] * 24, roles="qv" * 12)
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


# -- Formulas, as the papers state them -------------------------------------------------------------------------------


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
    """Columns of random numbers of norm about 1."""
    drawn = rng.normals(seed, 2**31 + stream, rng.PURPOSE["normal_map"], 0, size * count).astype(np.float64)
    return np.float32(drawn / math.sqrt(size)).astype(np.float64).reshape(size, count)


def _craft(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = G ×_0 U_0 J_0 ×_1 U_1 J_1 ×_2 U_2 J_2 - G ×_0 U_0 ×_1 U_1 ×_2 U_2, for one tensor of all; Dewage et al.
    arrays = {name.removeprefix("group0.split0."): array for name, array in params.items()}
    bases = [arrays[f"factor{mode}"] for mode in range(3)]
    mixed = [base @ arrays[f"factor{mode}.mix"] for mode, base in enumerate(bases)]
    formula = "ijk,ai,bj,ck->abc"
    return list(np.einsum(formula, arrays["core"], *mixed) - np.einsum(formula, arrays["core"], *bases))


# -- Sizes, and how configs are recognized -----------------------------------------------------------------------------


#: The largest θ before a dense random matrix, which is drawn in each step.
LARGEST_DENSE = 4096


def _of_factors(weights: AdaptedWeights, rank: int) -> int:
    return sum(rank * (rows + cols) for rows, cols in weights.shapes)


def _of_cores(weights: AdaptedWeights, rank: int) -> int:
    return len(weights.shapes) * rank * rank


def _of_one_array(weights: AdaptedWeights, rank: int) -> int:
    return rank * weights.side


def _vera_sizes(weights: AdaptedWeights) -> list[Ladder]:
    # Its rank only sets the length of a diagonal: its paper goes beyond the sides of the weights.
    return [Ladder(vera, up_to(4 * max(max(shape) for shape in weights.shapes)))]


def _randlora_sizes(weights: AdaptedWeights) -> list[Ladder]:
    rows, cols = max(weights.shapes, key=lambda shape: shape[0] * shape[1])

    def config(terms: int) -> Config:
        return randlora(-(-weights.side // terms), rows=rows, cols=cols)

    return [Ladder(config, up_to(min(weights.side, 64)))]


def _craft_label(config: Config) -> str | None:
    rank = config.rank
    last, weights = (rank, None) if isinstance(rank, int) else (rank[-1], rank[0])
    if "core" not in config.sources or last is None:
        return None
    if not is_of(config, craft, last, weights=weights, groups=config.groups):
        return None
    return ", ".join([*groups_label(config), f"r = {last}", *([f"{weights} of weights"] if weights else [])])


def _randlora_label(config: Config) -> str | None:
    rank = config.rank
    if not config.sources or not isinstance(rank, int):
        return None
    for shape in ((config.terms * rank, 1 << 40), (1 << 40, config.terms * rank)):
        # The initial diagonals depend on the longer side, which does not matter here.
        if _without_starts(config) == _without_starts(randlora(rank, rows=shape[0], cols=shape[1])):
            return f"r = {rank}"
    return None


def _without_starts(config: Config) -> Config:
    sources = {
        name: dataclasses.replace(source, start=None) if isinstance(source, Scaled) else source
        for name, source in config.sources.items()
    }
    return config.replace(sources=sources)


# -- The records -------------------------------------------------------------------------------------------------------


SOURCE_PRESETS = (
    Preset(
        "craft", craft, "CRAFT", "Dewage et al., arXiv 2602.17510", {"rank": 3, "groups": 1},
        recognize=_craft_label, formula=_craft,
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

"""The formulas of methods with frozen or tied arrays, or with arrays made of the base or of θ; see ``_methods``."""

from __future__ import annotations

import math

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config

from ._method_forms import Float, Method, Named, Params, Shapes, alpha_over_rank, each, lora

__all__ = ["SOURCE_METHODS"]


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
    found: list[Float] = []
    for i in range(len(shapes)):
        v, u = params[f"group{i}.split0.factor0.size"], params[f"group{i}.split0.factor1.rank"]
        found.append(alpha_over_rank(config) * v[:, None] * (b @ (u[:, None] * a)))
    return found


def _randlora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = (alpha / r) sum_n B_n Λ_n A Γ_n, where A, Λ and Γ are on the shorter side; Albert et al.
    found: list[Float] = []
    for i, (rows, cols) in enumerate(shapes):
        total: Float = np.zeros((rows, cols))
        short, long = ("factor1", "factor0") if cols <= rows else ("factor0", "factor1")
        terms = [f"group{i}.term{n}.split0." if config.terms > 1 else f"group{i}.split0." for n in range(config.terms)]
        for name in terms:
            a = params[terms[0] + short].T
            a = np.diag(params[f"{name}{short}.rank"]) @ a @ np.diag(params[f"{name}{short}.size"])
            product = params[name + long] @ a
            total = total + (product if short == "factor1" else product.T)
        found.append(alpha_over_rank(config) * total)
    return found


def _combined(params: Params, config: Config, made: Params) -> dict[str, Float]:
    """Add arrays that θ moves to what they start from."""
    return {**params, **{full: params[f"begun.{full}"] + array for full, array in made.items()}}


def _unilora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # All entries of all B and A are P θ, where a row of P has one entry 1 / sqrt(n_j); Li et al.
    names = [f"group{i}.split0.factor{m}" for i in range(len(shapes)) for m in range(2)]
    sizes = [params[f"begun.{name}"].size for name in names]
    theta = params["theta"]
    index = rng.permutation(sum(sizes), config.seed, 2**31) % len(theta)
    values = theta[index] / np.sqrt(np.bincount(index, minlength=len(theta)))[index]
    parts = np.split(values, np.cumsum(sizes)[:-1])
    made = {name: part.reshape(params[f"begun.{name}"].shape) for name, part in zip(names, parts, strict=True)}
    return each(lora)(_combined(params, config, made), config, shapes)


def _nola(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # A = sum_k α_k A_k and B = sum_k β_k B_k, with random A_k and B_k; Koohpayegani et al.
    made = {}
    names = [f"group{i}.split0.factor{m}" for i in range(len(shapes)) for m in range(2)]
    for stream, name in enumerate(names):
        shape, coefficients = params[f"begun.{name}"].shape, params[f"{name}.theta"]
        count, size = len(coefficients), math.prod(shape)
        basis = _normal_map(size, count, config.seed, stream)
        made[name] = np.asarray(sum(c * basis[:, k].reshape(shape) for k, c in enumerate(coefficients)))
    return each(lora)(_combined(params, config, made), config, shapes)


def _tinylora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # R_i = sum_k v_k P_ik; Morris et al.
    names = [f"group{i}.split0.core" for i in range(len(shapes))]
    shape, theta = params[f"begun.{names[0]}"].shape, params["theta"]
    basis = _normal_map(len(names) * math.prod(shape), len(theta), config.seed, 0)
    basis = basis.reshape(len(names), *shape, len(theta))
    made = {name: np.tensordot(basis[i], theta, 1) for i, name in enumerate(names)}
    return each(_lora_xs)(_combined(params, config, made), config, shapes)


def _normal_map(size: int, count: int, seed: int, stream: int) -> Float:
    """Columns of random numbers of norm about 1."""
    drawn = rng.normals(seed, 2**31 + stream, rng.PURPOSE["normal_map"], 0, size * count).astype(np.float64)
    return np.float32(drawn / math.sqrt(size)).astype(np.float64).reshape(size, count)


def _craft(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = G ×_0 U_0 J_0 ×_1 U_1 J_1 ×_2 U_2 J_2 - G ×_0 U_0 ×_1 U_1 ×_2 U_2, for one tensor of all; Dewage et al.
    own = {name.removeprefix("group0.split0."): array for name, array in params.items()}
    bases = [own[f"factor{mode}"] for mode in range(3)]
    mixed = [base @ own[f"factor{mode}.mix"] for mode, base in enumerate(bases)]
    formula = "ijk,ai,bj,ck->abc"
    return list(np.einsum(formula, own["core"], *mixed) - np.einsum(formula, own["core"], *bases))


SOURCE_METHODS: dict[str, Method] = {
    "craft": _craft,
    "lora_fa": each(lora),
    "lora_xs": each(_lora_xs),
    "nola": _nola,
    "randlora": _randlora,
    "share_lora": _share_lora,
    "svft": each(_svft),
    "tied_lora": _tied_lora,
    "tinylora": _tinylora,
    "unilora": _unilora,
    "vera": each(_vera),
}

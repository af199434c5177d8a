"""The formula of each named method as its paper states it, implemented independently of this library.

:data:`METHODS` maps the name of a preset to a function ``(params, config, shapes) -> [ΔW, …]`` in float64 NumPy, and
:data:`CHANGED` that of a preset that does not add ΔW to a function ``(params, config, weights) -> [W', …]``.
:mod:`tnadapt.verify` and the tests compare every preset with it, which proves that each method is a setting of the
library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

from tnadapt.algebra.config import Config

from ._map_methods import MAP_METHODS
from ._method_forms import Float, Method, Named, Params, Shapes, alpha_over_rank, each, each_shape, lora
from ._reference import project
from ._source_methods import SOURCE_METHODS

__all__ = ["CHANGED", "METHODS"]


def _dense(p: Named, config: Config) -> Float:
    return p("split0.dense")


def _lokr(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) W1 ⊗ (W2_b W2_a); Yeh et al.
    return alpha_over_rank(config) * np.kron(p("split0.dense"), p("split1.factor0") @ p("split1.factor1").T)


def _krona(p: Named, config: Config) -> Float:
    # ΔW = s A_K ⊗ B_K; Edalati et al.
    return alpha_over_rank(config) * np.kron(p("split0.dense"), p("split1.dense"))


def _loha(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) (B1 A1) ∘ (B2 A2); Hyeon-Woo et al.
    one = p("split0.factor0") @ p("split0.factor1").T
    two = p("split1.factor0") @ p("split1.factor1").T
    return alpha_over_rank(config) * one * two


def _compacter(p: Named, config: Config) -> Float:
    # W = sum_i A_i ⊗ (s_i t_iᵀ); Mahabadi et al.
    terms = [f"term{i}." if config.terms > 1 else "" for i in range(config.terms)]
    products = [
        np.kron(p(f"{term}split0.dense"), p(f"{term}split1.factor0") @ p(f"{term}split1.factor1").T) for term in terms
    ]
    return alpha_over_rank(config) * np.asarray(np.sum(products, axis=0))


def _long(vector: Float, shapes: Shapes) -> list[Float]:
    """Cut the vector of all updates into the weights."""
    edges = np.cumsum([rows * cols for rows, cols in shapes]).tolist()
    return [part.reshape(shape) for part, shape in zip(np.split(vector[: edges[-1]], edges[:-1]), shapes, strict=True)]


def _lonkr(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # Figure 3c of the paper with G = 1: D_1 ⊗ … ⊗ D_{K-1} ⊗ (A Bᵀ) on a square.
    last = f"group0.split{config.splits - 1}."
    product: Float = params[last + "factor0"] @ params[last + "factor1"].T
    for k in reversed(range(config.splits - 1)):
        product = np.kron(params[f"group0.split{k}.dense"], product)
    n = sum(rows * cols for rows, cols in shapes)
    side = math.isqrt(n - 1) + 1  # the square root, rounded up
    return _long(product[:side, :side].reshape(-1), shapes)


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


def _lorta(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # Equation 3 of the paper, mode by mode: fold C x_m A_m one after another.
    tensor = params["group0.split0.core"]
    for mode in range(config.order):
        tensor = np.moveaxis(np.tensordot(params[f"group0.split0.factor{mode}"], tensor, (1, mode)), 0, mode)
    return _long(tensor.reshape(-1), shapes)


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
    return _long(total.reshape(-1), shapes)


def _superlora(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # The headline with G = 1: F(vec(A Bᵀ)).
    n = sum(rows * cols for rows, cols in shapes)
    n_in = max(1, math.ceil(Decimal(str(config.ratio)) * n))
    vec = (params["group0.split0.factor0"] @ params["group0.split0.factor1"].T).reshape(-1)[:n_in]
    return _long(project(config, vec, n, 0), shapes)


def _fastfood(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # θ = P θ_d with P a fastfood matrix; Aghajanyan et al.
    n = sum(rows * cols for rows, cols in shapes)
    return _long(project(config, params["group0.split0.dense"], n, 0), shapes)


def _metatt(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = (G1 G2[l] G3[m] G4)ᵀ with one train for all layers l and matrices m, and with heads G4[h] G5; MetaTT.
    first, by_layer, by_matrix, *last = (params[f"group0.split0.core{k}"] for k in range(config.order))
    found = []
    for place, (rows, cols) in enumerate(shapes):
        layer, matrix = divmod(place, by_matrix.shape[1])
        product = first[0] @ by_layer[:, layer] @ by_matrix[:, matrix]
        for core in last:
            product = np.tensordot(product, core, 1)
        found.append(alpha_over_rank(config) * product.reshape(cols, rows).T)
    return found


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
        lifted = np.kron(gate.reshape(-1, inner), np.eye(math.prod(dims) // inner)) @ total[order]
        for axis, size in zip(pair, gate.shape, strict=False):
            dims[axis] = size
        place = np.moveaxis(np.arange(math.prod(dims)).reshape(dims), pair, range(2)).reshape(-1)
        total = np.empty_like(lifted)
        total[place] = lifted
    return total


def _quanta(params: Params, config: Config, shapes: Shapes) -> list[Float]:
    # ΔW = T_n … T_1 - S_n … S_1, where S is T at the start; Chen et al.
    begun = {name.removeprefix("begun."): array for name, array in params.items() if name.startswith("begun.")}
    now, then = (each_shape(_gates)(own, config, shapes) for own in (params, begun))
    return [one - other for one, other in zip(now, then, strict=True)]


METHODS: dict[str, Method] = {
    "dense": each(_dense),
    "lora": each(lora),
    "lokr": each(_lokr),
    "krona": each(_krona),
    "loha": each(_loha),
    "lonkr": _lonkr,
    "lotr": _lotr,
    "lorta": _lorta,
    "lorta_cp": _heads_cp,
    "fastfood": _fastfood,
    "superlora": _superlora,
    "fact_tt": _lotr,
    "fact_tk": _fact_tk,
    "cara": _heads_cp,
    "metatt": _metatt,
    "quanta": _quanta,
    "gralora": each(_gralora),
    "compacter": each(_compacter),
    **SOURCE_METHODS,
    **MAP_METHODS,
    "dora": each(lora),
    "hira": each(lora),
}


def _dora(params: Params, config: Config, weights: Sequence[Float]) -> list[Float]:
    # W' = m (W0 + B A) / ||W0 + B A||, one m for each output; Liu et al., equation (5).
    found: list[Float] = []
    for i, update in enumerate(each(lora)(params, config, [weight.shape for weight in weights])):
        direction = weights[i] + update
        lengths = np.array([math.sqrt(math.fsum(x * x for x in row)) for row in direction.tolist()])
        found.append(params[f"weight{i}.magnitude"][:, None] * direction / lengths[:, None])
    return found


def _hira(params: Params, config: Config, weights: Sequence[Float]) -> list[Float]:
    # W' = W0 + W0 ⊙ (B A); Huang et al.
    updates = each(lora)(params, config, [weight.shape for weight in weights])
    return [weight + np.multiply(weight, update) for weight, update in zip(weights, updates, strict=True)]


Change = Callable[[Params, Config, Sequence[Float]], list[Float]]
CHANGED: dict[str, Change] = {"dora": _dora, "hira": _hira}

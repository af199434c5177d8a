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
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import Circulant, Scatter, Tile, Wavelet

from ._reference import Float, Params, Shapes, project

__all__ = [
    "CHANGED",
    "METHODS",
    "each",
]


# -- Types, and functions that apply the formula of one weight to all --------------------------------------------------


Method = Callable[[Params, Config, Shapes], list[Float]]
Named = Callable[[str], Float]


def each(formula: Callable[[Named, Config], Float]) -> Method:
    """Return a weight-wise method that applies the formula of one weight to all."""
    return each_shape(lambda own, config, shape: formula(own, config))


def each_shape(formula: Callable[[Named, Config, tuple[int, int]], Float]) -> Method:
    """Return a weight-wise method that applies the formula of one weight, which depends on its shape, to all."""

    def all_weights(params: Params, config: Config, shapes: Shapes) -> list[Float]:
        found = []
        for group, shape in enumerate(shapes):
            prefix = f"group{group}."
            own = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
            found.append(formula(own.__getitem__, config, shape).reshape(shape))
        return found

    return all_weights


def alpha_over_rank(config: Config) -> float:
    assert isinstance(config.rank, int)
    return 1.0 if config.alpha is None else config.alpha / config.rank


def lora(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) B A; Hu et al.
    lora_b, lora_a = p("split0.factor0"), p("split0.factor1").T
    return alpha_over_rank(config) * lora_b @ lora_a


# -- Methods whose map determines what is trained ----------------------------------------------------------------------


def _values(p: Named, config: Config, size: int) -> Float:
    """Place the trained numbers of SHiRA, FourierFT, LoCA or WaveFT in a vector of zeros."""
    projection = config.projection if isinstance(config.projection, tuple) else (config.projection,)
    scatter, values = projection[0], p("split0.dense")
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
    c, d = (
        np.array(
            [
                [
                    math.sqrt((1 if k == 0 else 2) / n) * math.cos((2 * place + 1) * k * math.pi / (2 * n))
                    for place in range(n)
                ]
                for k in range(n)
            ]
        )
        for n in shape
    )
    return np.asarray(alpha_over_rank(config) * c.T @ spectrum @ d)


def _waveft(p: Named, config: Config, shape: tuple[int, int]) -> Float:
    # ΔW = λ IDWT(C); the filter bank: zeros between coefficients, two convolutions, and the edges cut off.
    assert isinstance(config.projection, tuple)
    wavelet = config.projection[1]
    taps = _daubechies(1 if wavelet in ("wavelet", Wavelet("haar")) else int(wavelet.family[2:]))  # type: ignore[union-attr]
    mirrored = taps[::-1] * (-1.0) ** np.arange(len(taps))
    longer = [2 * math.ceil((size + len(taps) - 2) / 2) for size in shape]
    found = _values(p, config, math.prod(longer)).reshape(longer)
    for axis, size in enumerate(shape):
        halves = np.split(np.moveaxis(found, axis, 0), 2)
        sums: Float = np.zeros((longer[axis] + len(taps), halves[0].shape[1]))
        for half, each in zip(halves, (taps, mirrored), strict=True):
            for k, row in enumerate(half):
                sums[2 * k : 2 * k + len(taps)] += np.outer(each, row)
        found = np.moveaxis(sums[len(taps) - 2 :][:size], 0, axis)
    return alpha_over_rank(config) * found


def _daubechies(moments: int) -> Float:
    """Factor ``|H|²`` with so many vanishing moments by the roots inside the unit circle; Daubechies 1988."""
    sine = [math.comb(moments - 1 + k, k) for k in range(moments)]
    found: Any = np.poly1d([1.0])
    for root in np.roots(sine[::-1]):
        # y = (2 - z - 1/z) / 4
        pair = np.roots([1.0, 4.0 * root - 2.0, 1.0])
        found *= np.poly1d([1.0, -pair[np.argmin(np.abs(pair))]])
    found *= np.poly1d([1.0, 1.0]) ** moments
    taps = np.real(found.coeffs)
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
    sums: Float = np.zeros((r, cols))
    for column in range(cols):
        sums[column % r, column] = 1.0
    whole = np.concatenate([short] * math.ceil(rows / len(short)))[:rows]
    return alpha_over_rank(config) * whole @ sums


MAP_METHODS: dict[str, Method] = {
    "shira": each_shape(_shira),
    "fourierft": each_shape(_fourierft),
    "loca": each_shape(_loca),
    "waveft": each_shape(_waveft),
    "c3a": each_shape(_c3a),
    "miss": each_shape(_miss),
}


# -- Methods with frozen or tied arrays, or with arrays made of the base or of θ ---------------------------------------


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


# -- All methods by name, with the other formulas ----------------------------------------------------------------------


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

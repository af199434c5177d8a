"""The choice of the form in which an export writes each module's update: an exact one if possible, else the nearest.

LoRA is the truncated SVD, the best approximation of its rank. LoKr and LoHa are fitted by :func:`tnadapt.decompose`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.norms import norm, relative, together
from tnadapt.errors import ConfigError, safe_repr

from ._file_format import TO_FULL, ConversionRequest, ExportChoice
from ._files import factorization
from ._updates import Float, Module, ModuleUpdate, Pair, Unpacked, as_matrix


def choose(modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest) -> ExportChoice:
    """Choose the form of every module's update.

    Raises
    ------
    ConfigError
        If the form needs a rank, and none is given.
    """
    if request.kind == "full":
        return _choice_of([ModuleUpdate("dense", module.shape, (module.delta(unpacked),)) for module in modules], True)
    return {"lora": _lora, "loha": _loha, "lokr": _lokr}[request.kind](modules, unpacked, request)


def _choice_of(updates: list[ModuleUpdate], exact: bool) -> ExportChoice:
    return ExportChoice(updates, [update.rank for update in updates], exact, {})


# -- Low rank ------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """The SVD ``u @ diag(s) @ v.T``, without singular values that are mere rounding errors.

    Attributes
    ----------
    u, v : ndarray, shape (rows, kept), (cols, kept)
        The leading singular vectors, as many as will be used.
    s : ndarray, shape (k,)
        All singular values.
    """

    u: Float
    s: Float
    v: Float

    @property
    def rank(self) -> int:
        """k, the matrix rank."""
        return int(self.s.size)

    def pair(self, rank: int) -> Pair:
        """Return the best factors of a given rank, each with the square roots of the singular values."""
        kept = max(1, min(rank, self.rank))
        if not self.rank:
            return Pair(np.zeros((self.u.shape[0], 1)), np.zeros((self.v.shape[0], 1)))
        roots = np.sqrt(self.s[:kept])
        return Pair(self.u[:, :kept] * roots, self.v[:, :kept] * roots)


def _spectrum(module: Module, unpacked: Unpacked, form: ModuleUpdate | None, kept: int | None) -> Spectrum:
    """Compute the SVD of a module's update; for low-rank updates and Kronecker products from the factors alone.

    ``kept`` singular vectors are returned. If None, their number is the matrix rank if two factors of that rank are
    smaller than the update, and 0 otherwise.
    """
    if form is not None and form.kind == "lora" and form.rank < min(form.shape):
        pair = form.absorb_scale().pair
        (left, upper), (right, lower) = np.linalg.qr(pair.b), np.linalg.qr(pair.a)
        u, s, vt = np.linalg.svd(upper @ lower.T)
        u, v = left @ u, right @ vt.T
    elif form is not None and form.kind == "lokr":
        return _kronecker_spectrum(form, kept)
    else:
        u, s, vt = np.linalg.svd(module.delta(unpacked), full_matrices=False)
        v = vt.T
    rank, kept = _ranks(s, module.shape, kept)
    # Copies, so that the memory of the other vectors is freed.
    return Spectrum(u[:, :kept].copy(), s[:rank], v[:, :kept].copy())


def _kronecker_spectrum(form: ModuleUpdate, kept: int | None) -> Spectrum:
    """Compute the SVD of a Kronecker product: its singular values and vectors are products of the factors'."""
    svd1, svd2 = (np.linalg.svd(as_matrix(part), full_matrices=False) for part in form.absorb_scale().parts)
    s = np.outer(svd1.S, svd2.S).reshape(-1)
    order = np.argsort(-s, kind="stable")
    rank, kept = _ranks(s[order], form.shape, kept)
    first, last = np.divmod(order[:kept], svd2.S.size)
    u = (svd1.U[:, None, first] * svd2.U[None, :, last]).reshape(form.shape[0], kept)
    v = (svd1.Vh.T[:, None, first] * svd2.Vh.T[None, :, last]).reshape(form.shape[1], kept)
    return Spectrum(u, s[order[:rank]], v)


def _ranks(s: Float, shape: tuple[int, int], kept: int | None) -> tuple[int, int]:
    """Return the rank by NumPy's tolerance for descending singular values, and the number of vectors to keep."""
    rank = int(np.count_nonzero(s > s[0] * max(shape) * np.finfo(np.float64).eps))
    if kept is None:
        kept = rank if _is_smaller(rank, shape) else 0
    return rank, min(kept, rank)


def _is_smaller(rank: int, shape: tuple[int, int]) -> bool:
    """Return whether two factors of a rank have fewer elements than their product."""
    rows, cols = shape
    return rank * (rows + cols) < rows * cols


def _exact_pair(module: Module, unpacked: Unpacked, form: ModuleUpdate | None, rank: int | None) -> Pair | Spectrum:
    """Return exact factors of a module's update of at most the given rank; otherwise its spectrum, to truncate.

    Without a rank, factors with more elements than the update itself are not accepted.
    """
    if form is not None and form.kind == "lora" and (rank is None or form.rank <= rank):
        return form.absorb_scale().pair
    spectrum = _spectrum(module, unpacked, form, rank)
    small = _is_smaller(spectrum.rank, module.shape) if rank is None else spectrum.rank <= rank
    return spectrum.pair(spectrum.rank) if small else spectrum


def _lora(modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest) -> ExportChoice:
    """Choose LoRA for every module.

    With a maximum error but no rank, all modules that must be truncated get the same rank: the smallest within the
    error.
    """
    rank, candidates = request.rank, list[ModuleUpdate | Spectrum]()
    for module in modules:
        form = module.form(unpacked)
        if form is not None and form.kind == "lora" and (rank is None or form.rank <= rank):
            candidates.append(form)  # keep the scale separate, so that the factors keep their bits
            continue
        pair = _exact_pair(module, unpacked, form, rank)
        candidates.append(ModuleUpdate("lora", module.shape, (pair,)) if isinstance(pair, Pair) else pair)
    spectra = [candidate for candidate in candidates if isinstance(candidate, Spectrum)]
    cut = rank or (_smallest_rank(modules, unpacked, candidates, request.max_error) if spectra else 0)
    updates = []
    for module, candidate in zip(modules, candidates, strict=True):
        if isinstance(candidate, Spectrum):
            if rank is None:
                candidate = _spectrum(module, unpacked, module.form(unpacked), cut)
            candidate = ModuleUpdate("lora", module.shape, (candidate.pair(cut),))
        updates.append(candidate)
    return _choice_of(updates, all(spectrum.rank <= cut for spectrum in spectra))


def _smallest_rank(
    modules: Sequence[Module],
    unpacked: Unpacked,
    candidates: Sequence[ModuleUpdate | Spectrum],
    max_error: float | None,
) -> int:
    from tnadapt.decomposition.fits import smallest_within

    spectra = [(module, fit) for module, fit in zip(modules, candidates, strict=True) if isinstance(fit, Spectrum)]
    module, worst = max(spectra, key=lambda pair: pair[1].rank)
    if max_error is None:
        raise ConfigError(
            f"the update of {safe_repr(module.path)} has matrix rank {worst.rank}, and LoRA of that rank is larger "
            f"than the update itself, {module.shape[0]} × {module.shape[1]}: give rank= (--rank) or max_error= "
            f"(--max-error) for the nearest of lower rank, or {TO_FULL}"
        )
    # Exact updates do not contribute to the error, but to the norm that it is relative to.
    exact = [
        norm(module.delta(unpacked))
        for module, fit in zip(modules, candidates, strict=True)
        if isinstance(fit, ModuleUpdate)
    ]
    whole = together([*exact, *(norm(fit.s) for _, fit in spectra)])

    def error(rank: int) -> float:
        return relative(together(norm(spectrum.s[rank:]) for _, spectrum in spectra), whole)

    return smallest_within(lambda rank: rank, error, max_error, worst.rank)


# -- LoHa ----------------------------------------------------------------------------------------


def _loha(modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest) -> ExportChoice:
    fits = [_one_loha(module, unpacked, request.rank) for module in modules]
    return _choice_of([update for update, _ in fits], all(exact for _, exact in fits))


def _one_loha(module: Module, unpacked: Unpacked, rank: int | None) -> tuple[ModuleUpdate, bool]:
    """Return LoHa for a module, and whether it is exact."""
    form = module.form(unpacked)
    if form is not None and form.kind == "loha" and (rank is None or form.rank <= rank):
        return form, True
    pair = _exact_pair(module, unpacked, form, rank)
    if isinstance(pair, Pair):
        return _times_ones(module, pair), True
    if rank is None:
        raise _no_rank(module, "LoHa")
    delta = module.delta(unpacked)
    fitted = _fit(delta, Config(rank=rank, splits=2, combine="hadamard", leading="same"))
    pairs = (Pair(fitted[f"split{k}.factor0"], fitted[f"split{k}.factor1"]) for k in (0, 1))
    # A LoHa fit of a given rank may be worse than LoRA of that rank.
    candidates = [ModuleUpdate("loha", module.shape, tuple(pairs)), _times_ones(module, pair.pair(rank))]
    return min(candidates, key=lambda update: float(np.linalg.norm(update.delta() - delta))), False


def _times_ones(module: Module, pair: Pair) -> ModuleUpdate:
    """Return a product of two factors as LoHa: the Hadamard product with a matrix of ones, which has rank 1."""
    rows, cols = module.shape
    return ModuleUpdate("loha", module.shape, (pair, Pair(np.ones((rows, 1)), np.ones((cols, 1)))))


# -- LoKr ----------------------------------------------------------------------------------------


def _lokr(modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest) -> ExportChoice:
    """Choose LoKr for every module.

    Kronecker products are kept if the library can load them. Low-rank updates become a low-rank W2 with a W1 of 1 × 1.
    Other updates become the nearest of the given rank, with the sizes that the library would choose.
    """
    stored = [module.stored for module in modules]
    forms = [module.form(unpacked) for module in modules]
    products = [form for form in forms if form is not None and form.kind == "lokr"]
    if len(products) == len(modules) and all(request.rank is None or form.rank <= request.rank for form in products):
        choice = request.format.fit_kronecker(products, stored)
        if choice is not None:
            return choice
    factors = [_exact_pair(module, unpacked, form, request.rank) for module, form in zip(modules, forms, strict=True)]
    pairs = [pair for pair in factors if isinstance(pair, Pair)]
    if len(pairs) == len(modules):
        # A W1 of 1 × 1 fits a weight of any size.
        choice = request.format.fit_kronecker([_times_one(pair) for pair in pairs], stored)
        if choice is None:
            raise ConfigError(request.format.no_kronecker)
        return choice
    if request.rank is None:
        raise _no_rank(next(m for m, pair in zip(modules, factors, strict=True) if isinstance(pair, Spectrum)), "LoKr")
    deltas = [module.delta(unpacked) for module in modules]
    fitted = [_nearest_lokr(module, unpacked, request.rank) for module in modules]
    # LoRA is LoKr of the same rank with a W1 of 1 × 1, and is often nearer.
    plain = [_times_one(pair if isinstance(pair, Pair) else pair.pair(request.rank)) for pair in factors]

    def squared_error(updates: Sequence[ModuleUpdate]) -> float:
        return math.fsum(float(np.sum((u.delta() - d) ** 2)) for u, d in zip(updates, deltas, strict=True))

    nearest = sorted((fitted, plain), key=squared_error)
    choice = next((fit for updates in nearest if (fit := request.format.fit_kronecker(updates, stored))), None)
    if choice is None:
        raise ConfigError(request.format.no_kronecker)
    return choice._replace(exact=False)


def _times_one(pair: Pair) -> ModuleUpdate:
    """Return a product of two factors as LoKr with a W1 of 1 × 1."""
    return ModuleUpdate("lokr", pair.shape, (np.ones((1, 1)), pair))


def _nearest_lokr(module: Module, unpacked: Unpacked, rank: int) -> ModuleUpdate:
    """Fit a LoKr update whose W1 has the sizes that PEFT and LyCORIS choose by default."""
    (p, k), (q, n) = (factorization(size) for size in module.stored[:2])
    full = 2 * rank >= max(k, n)  # both libraries store W2 of such a rank as a full matrix
    config = Config(rank=rank, splits=2, split_size=(p, q), format="dense" if full else "cp")
    arrays = _fit(module.delta(unpacked), config)
    last = arrays["split1.dense"] if full else Pair(arrays["split1.factor0"], arrays["split1.factor1"])
    assert arrays["split0.dense"].shape == (p, q)
    assert last.shape == (k, n * math.prod(module.stored[2:]))
    return ModuleUpdate("lokr", module.shape, (arrays["split0.dense"], last))


def _fit(delta: Float, config: Config) -> dict[str, Float]:
    """Fit the arrays of one weight to an update; return them without the group's prefix."""
    from tnadapt.decomposition import decompose  # imports SciPy and TensorLy, which exact conversions do not need

    params, _ = decompose([delta], config)
    return {name.removeprefix("group0."): np.asarray(array, np.float64) for name, array in params.items()}


def _no_rank(module: Module, method: str) -> ConfigError:
    return ConfigError(
        f"the update of {safe_repr(module.path)} is not exactly {method}: give rank= (--rank) for the nearest of that "
        f"rank, and max_error= (--max-error) for the largest error allowed; or {TO_FULL}"
    )

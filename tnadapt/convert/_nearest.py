"""Choose the form in which an export writes each module's update: an exact one if possible, else the nearest.

The nearest is the truncated SVD, the best approximation of its rank. As LoKr it gets a W1 of 1 × 1, as LoHa one of
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import numpy as np

from tnadapt.algebra.norms import norm, relative, together
from tnadapt.errors import ConfigError, safe_repr

from ._file_format import TO_FULL, ConversionRequest, ExportChoice
from ._updates import Float, Module, ModuleUpdate, Pair, Unpacked, as_matrix


def choose(modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest) -> ExportChoice:
    """Choose the form of every module's update.

    Kronecker products are kept if the library can load all of them; as LoKr of another update, its W2 has two factors.

    Raises
    ------
    ConfigError
        If the form needs a rank, and none is given; or if the library can load no such Kronecker products.
    """
    if request.kind == "full":
        return _choice_of([ModuleUpdate("dense", module.shape, (module.delta(unpacked),)) for module in modules], True)
    stored = [module.stored for module in modules]
    if request.kind == "lokr":
        forms = [module.form(unpacked) for module in modules]
        products = [form for form in forms if _has_form(form, ("lokr",), request.rank)]
        fitted = request.format.fit_kronecker(products, stored) if len(products) == len(modules) else None
        if fitted is not None:
            return fitted
    choice = _low_rank(modules, unpacked, request)
    if request.kind == "lora":
        return choice
    if request.kind == "loha":
        updates = [update if update.kind == "loha" else _times_ones(update) for update in choice.updates]
        return _choice_of(updates, choice.exact)
    # A W1 of 1 × 1 fits a weight of any size.
    ones = [ModuleUpdate("lokr", update.shape, (np.ones((1, 1)), _pair_of(update))) for update in choice.updates]
    fitted = request.format.fit_kronecker(ones, stored)
    if fitted is None:
        raise ConfigError(request.format.no_kronecker)
    return fitted._replace(exact=choice.exact)


def _has_form(form: ModuleUpdate | None, kinds: Sequence[str], rank: int | None) -> TypeGuard[ModuleUpdate]:
    """Return whether a module's update has one of these forms, with at most the given rank."""
    return form is not None and form.kind in kinds and (rank is None or form.rank <= rank)


def _pair_of(update: ModuleUpdate) -> Pair:
    return update.absorb_scale().pair


def _times_ones(update: ModuleUpdate) -> ModuleUpdate:
    """Return a low-rank update as LoHa: its Hadamard product with a matrix of ones, which has rank 1."""
    rows, cols = update.shape
    return ModuleUpdate("loha", update.shape, (_pair_of(update), Pair(np.ones((rows, 1)), np.ones((cols, 1)))))


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
    """Compute the SVD of a module's update, with ``kept`` singular vectors."""
    # Low-rank updates and Kronecker products are decomposed by their factors alone.
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
    """Return the rank of descending singular values by NumPy's tolerance, and the number of vectors to keep."""
    rank = int(np.count_nonzero(s > s[0] * max(shape) * np.finfo(np.float64).eps))
    if kept is None:  # factors that are larger than the update are of no use
        kept = rank if _is_smaller(rank, shape) else 0
    return rank, min(kept, rank)


def _is_smaller(rank: int, shape: tuple[int, int]) -> bool:
    """Return whether two factors of a rank have fewer elements than their product."""
    rows, cols = shape
    return rank * (rows + cols) < rows * cols


def _low_rank(modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest) -> ExportChoice:
    """Return every update as LoRA, or as LoHa if that is requested and the update has that form."""
    rank, candidates = request.rank, list[ModuleUpdate | Spectrum]()
    kept = ("lora", "loha") if request.kind == "loha" else ("lora",)
    for module in modules:
        form = module.form(unpacked)
        if _has_form(form, kept, rank):
            candidates.append(form)  # with its scale, so that the factors keep their bits
        else:
            spectrum = _spectrum(module, unpacked, form, rank)
            # Without a rank, factors with more elements than the update are not accepted.
            small = _is_smaller(spectrum.rank, module.shape) if rank is None else spectrum.rank <= rank
            pair = spectrum.pair(spectrum.rank) if small else None
            candidates.append(spectrum if pair is None else ModuleUpdate("lora", module.shape, (pair,)))
    spectra = [candidate for candidate in candidates if isinstance(candidate, Spectrum)]
    # Given a maximum error but no rank, all truncated modules get the same rank: the smallest within the error.
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
            f"than the update itself, {module.shape[0]} × {module.shape[1]}: give max_error= (--max-error) for the "
            f"nearest of lower rank, with rank= (--rank) if that is fixed, or {TO_FULL}"
        )
    # Exact updates contribute nothing to the error, only to the norm that it is relative to.
    exact = [
        norm(module.delta(unpacked))
        for module, fit in zip(modules, candidates, strict=True)
        if isinstance(fit, ModuleUpdate)
    ]
    whole = together([*exact, *(norm(fit.s) for _, fit in spectra)])

    def error(rank: int) -> float:
        return relative(together(norm(spectrum.s[rank:]) for _, spectrum in spectra), whole)

    return smallest_within(lambda rank: rank, error, max_error, worst.rank)

"""Updates as products of two factors: as they are, or by the singular value decomposition, the best there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.norms import norm, relative, together
from tnadapt.errors import ConfigError, shown

from ._modules import Module
from ._taking_apart import Wide
from ._updates import Float, Pair, Update, product, scaled

__all__ = ["Chosen", "Spectrum", "exact_pair", "low_rank", "spectrum_of"]


class Chosen(NamedTuple):
    """What a module's update becomes.

    Attributes
    ----------
    update : Update
    exact : bool
        Whether it is the same but for rounding.
    """

    update: Update
    exact: bool


class Spectrum(NamedTuple):
    """``u @ diag(s) @ v.T``, with the singular values that are nothing but rounding left out.

    Attributes
    ----------
    u, v : ndarray, shape (rows, kept), (cols, kept)
        The leading singular vectors, as many as somebody wants.
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
        """The best two factors of a rank, each with the roots of the singular values."""
        kept = max(1, min(rank, self.rank))
        if not self.rank:
            return Pair(np.zeros((self.u.shape[0], 1)), np.zeros((self.v.shape[0], 1)))
        roots = np.sqrt(self.s[:kept])
        return Pair(self.u[:, :kept] * roots, self.v[:, :kept] * roots)


def spectrum_of(module: Module, wide: Wide, form: Update | None, kept: int | None) -> Spectrum:
    """The singular value decomposition of a module's update; of one that is low-rank already, of its factors alone.

    Singular vectors are kept for that rank; without one, for the whole if that is smaller than the update, else none.
    """
    if form is not None and form.kind == "lora" and form.rank < min(form.shape):
        (pair,) = scaled(form).parts
        assert isinstance(pair, Pair)
        (left, upper), (right, lower) = np.linalg.qr(pair.b), np.linalg.qr(pair.a)
        u, s, vt = np.linalg.svd(upper @ lower.T)
        u, v = left @ u, right @ vt.T
    elif form is not None and form.kind == "lokr":
        return _of_kronecker(form, kept)
    else:
        u, s, vt = np.linalg.svd(module.delta(wide), full_matrices=False)
        v = vt.T
    rank, kept = _ranks(s, module.shape, kept)
    # Copies, so that what is left out is given back.
    return Spectrum(u[:, :kept].copy(), s[:rank], v[:, :kept].copy())


def _of_kronecker(form: Update, kept: int | None) -> Spectrum:
    """The decomposition of a Kronecker product by those of its factors: singular values and vectors are products."""
    one, two = (np.linalg.svd(product(part), full_matrices=False) for part in scaled(form).parts)
    s = np.outer(one.S, two.S).reshape(-1)
    order = np.argsort(-s, kind="stable")
    rank, kept = _ranks(s[order], form.shape, kept)
    first, last = np.divmod(order[:kept], two.S.size)
    u = (one.U[:, None, first] * two.U[None, :, last]).reshape(form.shape[0], kept)
    v = (one.Vh.T[:, None, first] * two.Vh.T[None, :, last]).reshape(form.shape[1], kept)
    return Spectrum(u, s[order[:rank]], v)


def _ranks(s: Float, shape: tuple[int, int], kept: int | None) -> tuple[int, int]:
    """The rank that descending singular values say, by NumPy's own bound; and of how many the vectors are kept."""
    rank = int(np.count_nonzero(s > s[0] * max(shape) * np.finfo(np.float64).eps))
    if kept is None:
        kept = rank if _smaller(rank, shape) else 0
    return rank, min(kept, rank)


def _smaller(rank: int, shape: tuple[int, int]) -> bool:
    """Whether two factors of a rank have fewer elements than their product."""
    rows, cols = shape
    return rank * (rows + cols) < rows * cols


def exact_pair(module: Module, wide: Wide, form: Update | None, rank: int | None) -> Pair | Spectrum:
    """Two factors of a module's update, of at most a rank; else its spectrum, of which to take what is wanted.

    Without a rank two factors that have more elements than the update itself are no answer either.
    """
    if form is not None and form.kind == "lora" and (rank is None or form.rank <= rank):
        (pair,) = scaled(form).parts
        assert isinstance(pair, Pair)
        return pair
    spectrum = spectrum_of(module, wide, form, rank)
    small = _smaller(spectrum.rank, module.shape) if rank is None else spectrum.rank <= rank
    return spectrum.pair(spectrum.rank) if small else spectrum


def low_rank(modules: Sequence[Module], wide: Wide, rank: int | None, max_error: float | None) -> list[Chosen]:
    """Every module's update as LoRA.

    Without a rank but with an error the ranks are one number, the smallest within the error.

    Raises
    ------
    ConfigError
        If it takes a rank, or an error, to make that possible.
    """
    found: list[Chosen | Spectrum] = []
    for module in modules:
        form = module.form(wide)
        if form is not None and form.kind == "lora" and (rank is None or form.rank <= rank):
            found.append(Chosen(form, True))  # with its own scale, and so with its own bits
            continue
        own = exact_pair(module, wide, form, rank)
        found.append(Chosen(Update("lora", module.shape, (own,)), True) if isinstance(own, Pair) else own)
    cut = rank
    if rank is None and any(isinstance(one, Spectrum) for one in found):
        cut = _smallest_rank(modules, wide, found, max_error)
    made = []
    for module, one in zip(modules, found, strict=True):
        if isinstance(one, Spectrum):
            assert cut is not None
            if rank is None:
                one = spectrum_of(module, wide, module.form(wide), cut)
            one = Chosen(Update("lora", module.shape, (one.pair(cut),)), one.rank <= cut)
        made.append(one)
    return made


def _smallest_rank(
    modules: Sequence[Module], wide: Wide, found: Sequence[Chosen | Spectrum], max_error: float | None
) -> int:
    spectra = [(module, one) for module, one in zip(modules, found, strict=True) if isinstance(one, Spectrum)]
    module, worst = max(spectra, key=lambda pair: pair[1].rank)
    if max_error is None:
        raise ConfigError(
            f"the update of {shown(module.path)} has matrix rank {worst.rank}, and LoRA of that rank is larger than "
            f"the update itself, {module.shape[0]} × {module.shape[1]}: give rank= or max_error= for the nearest of "
            "lower rank, or to='lycoris-full' for all of it"
        )
    # What is exact has no error, and counts in the whole.
    exact = [norm(own.delta(wide)) for own, one in zip(modules, found, strict=True) if isinstance(one, Chosen)]
    whole = together([*exact, *(norm(one.s) for _, one in spectra)])
    for rank in range(1, worst.rank + 1):
        if relative(together(norm(one.s[rank:]) for _, one in spectra), whole) <= max_error:
            return rank
    return worst.rank

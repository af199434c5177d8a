"""A start for Hadamard products of CP splits of a matrix, from the space of its rows.

If X = (A1 B1ᵀ) ∘ … ∘ (AK BKᵀ), then X = U Vᵀ, where each row of V is the Kronecker product of the rows of the Bk. The
rank r1 ⋯ rK of X is smaller than its sizes in general, and V spans its row space. With the projector P onto the
complement of that, the Bk solve ‖P V‖ = 0, in which there are no Ak. With all others fixed, the best orthonormal Bk are
the eigenvectors of ``P ∘ (B1 B1ᵀ) ∘ … ∘ (BK BKᵀ)``, without Bk itself, that belong to its least eigenvalues.

Factors with disjoint rows solve it, too, and are useless. Between the steps, rows are divided by a power of their
norms, which keeps away from those. The exponent is 1/2 for two parts and 3/4 for three: with smaller ones steps end
there, and with larger ones they seldom end at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["subspace_start"]

# Random starts of a round, their steps, how many of the best go on, and for how many steps; the most rounds. Each step
# decomposes a matrix of as many rows as there are columns, of which no more than this number are taken.
_TRIED, _FIRST, _KEPT, _LAST, _ROUNDS, _COLUMNS = 20, 90, 5, 400, 4, 40
# Steps end where the loss is below the first number; a result is the answer where its error is below the second one, or
# this many times that of the nearest matrix of this rank.
_ENOUGH, _EXACT, _NEAR = 1e-14, 1e-4, 3.0
# Only matrices are tried whose distance to those of this rank is below this fraction of the error to be improved.
_FAR = 0.1

Pairs = list[tuple[np.ndarray, np.ndarray]]


def subspace_start(
    matrix: np.ndarray, ranks: Sequence[int], error: float, rng: np.random.RandomState
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Search the factors of a matrix that is nearly a Hadamard product of matrices of low rank.

    Parameters
    ----------
    matrix : ndarray, shape (m, n)
        Real; not zero.
    ranks : sequence of int
        Of the K ≥ 2 matrices.
    error : float
        The relative error of a known result.
    rng : RandomState

    Returns
    -------
    list of (ndarray, ndarray), shapes (m, r_k) and (n, r_k), or None
        None if the matrix is too far from the rank that such products have, if its rows' space does not determine them,
        or if nothing better was found.

    Examples
    --------
    >>> rng = np.random.RandomState(0)
    >>> parts = [rng.normal(size=(9, 2)) @ rng.normal(size=(2, 12)) for _ in range(2)]
    >>> wanted = parts[0] * parts[1]
    >>> (a, b), (c, d) = subspace_start(wanted, (2, 2), 1.0, rng)
    >>> bool(np.linalg.norm((a @ b.T) * (c @ d.T) - wanted) < 1e-3 * np.linalg.norm(wanted))
    True
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = subspace_start(matrix.T, ranks, error, rng)
        return None if found is None else [(left, right) for right, left in found]
    whole, norm = math.prod(ranks), float(np.linalg.norm(matrix))
    some = matrix[:, np.sort(rng.permutation(matrix.shape[1])[:_COLUMNS])]
    if not _determined(some.shape, ranks):
        return None
    least = float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[whole:])) / norm
    if least > _FAR * error:
        return None
    vh = np.linalg.svd(some, full_matrices=False)[2][:whole]
    search = _Search(np.eye(some.shape[1]) - vh.T @ vh, ranks, rng)
    best: Pairs | None = None
    for _ in range(_ROUNDS):
        for factors in search.round():
            pairs = _completed(matrix, _with_left(some, factors))
            left = math.prod((a @ b.T for a, b in pairs), start=np.ones(matrix.shape)) - matrix
            now = float(np.linalg.norm(left)) / norm
            if now < error:
                best, error = pairs, now
        if best is not None and error <= max(_EXACT, _NEAR * least):
            break
    return best


def _determined(shape: tuple[int, ...], ranks: Sequence[int]) -> bool:
    """Return whether there are no fewer equations than unknowns, without those that change no product."""
    rows, cols = shape
    whole, more = math.prod(ranks), len(ranks) - 1
    unknowns = cols * (sum(ranks) - more) - sum(rank**2 for rank in ranks) + more
    return whole < rows and whole * (cols - whole) >= unknowns


class _Search:
    """Alternating eigenvectors from random starts."""

    def __init__(self, projector: np.ndarray, ranks: Sequence[int], rng: np.random.RandomState) -> None:
        self.projector, self.ranks, self.rng, self.size = projector, ranks, rng, len(projector)

    def round(self) -> list[list[np.ndarray]]:
        """Return the factors from some starts, best first."""
        starts = [[self.rng.normal(size=(self.size, rank)) for rank in self.ranks] for _ in range(_TRIED)]
        tried = sorted((self._steps(start, _FIRST) for start in starts), key=lambda pair: pair[0])
        kept = (self._steps(factors, _LAST) for _, factors in tried[:_KEPT])
        return [factors for _, factors in sorted(kept, key=lambda pair: pair[0])]

    def _steps(self, factors: list[np.ndarray], count: int) -> tuple[float, list[np.ndarray]]:
        """Return the loss relative to the norm, and the factors."""
        from scipy.linalg import eigh

        factors, loss, power = list(factors), math.inf, 1.0 - 2.0 ** (1 - len(factors))
        for step in range(count):
            k = step % len(factors)
            weighed = np.ones_like(self.projector)
            for j, factor in enumerate(factors):
                if j != k:
                    rows = np.linalg.norm(factor, axis=1, keepdims=True)
                    factors[j] = factor / np.maximum(rows, 1e-150) ** power
                    weighed *= factors[j] @ factors[j].T
            values, factors[k] = eigh(
                self.projector * weighed, subset_by_index=[0, self.ranks[k] - 1], check_finite=False
            )
            size = float(np.einsum("ij,ij,i->", factors[k], factors[k], np.diag(weighed)))
            loss = float(values.sum()) / size if size else math.inf
            if loss < _ENOUGH:
                break
        return loss, factors


def _completed(matrix: np.ndarray, pairs: Pairs) -> Pairs:
    """Return the right factors of all columns, from the left ones."""
    if len(pairs[0][1]) == matrix.shape[1]:
        return pairs
    return [(left, right) for right, left in _with_left(matrix.T, [left for left, _ in pairs])]


def _with_left(matrix: np.ndarray, right: Sequence[np.ndarray]) -> Pairs:
    """Return the left factors that belong to given right ones: rows of least squares, made Kronecker products."""
    products = right[0]
    for factor in right[1:]:
        products = (products[:, :, None] * factor[:, None, :]).reshape(len(factor), -1)
    rest = np.linalg.lstsq(products, matrix.T, rcond=1e-8)[0].T
    pairs = []
    for factor in right[:-1]:
        u, s, vh = np.linalg.svd(rest.reshape(len(matrix), factor.shape[1], -1), full_matrices=False)
        pairs.append((u[:, :, 0], factor))
        rest = s[:, :1] * vh[:, 0]
    return [*pairs, (rest, right[-1])]

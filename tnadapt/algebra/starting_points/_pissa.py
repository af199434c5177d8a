"""PiSSA: the start is the part of the weight with the largest singular values."""

from __future__ import annotations

import numpy as np

from .. import rng
from ..sources import OVERSAMPLING, Stream, dominant_svd
from ._factor_start import FactorStart

__all__ = ["PiSSA"]


class PiSSA(FactorStart):
    """``B = U sqrt(S)``, ``A = sqrt(S) Vᵀ`` of the ``rank`` largest singular values (arXiv 2404.02948).

    Computed in float64 by subspace iteration from seeded normal numbers, with the largest entry of each left singular
    vector positive (:mod:`tnadapt.algebra.sources._subspace`): 16 passes, of ``2 d n (2 r + 8)`` multiply-adds each.
    Where the singular values fall slowly, the iteration ends at a part of the weight with nearly the largest ones.
    """

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`FactorStart.factors`."""
        rows = matrix.shape[0]
        width = min(2 * rank + OVERSAMPLING, *matrix.shape)
        drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, rows * width)
        left, values, right = dominant_svd(matrix, drawn.astype(np.float64).reshape(rows, width), rank, what)
        return left * np.sqrt(values), right * np.sqrt(values)

"""MiLoRA: the start is the part of the weight with the smallest singular values."""

from __future__ import annotations

import numpy as np

from ..sources import Stream, minor_svd
from ._factor_start import FactorStart

__all__ = ["MiLoRA"]


class MiLoRA(FactorStart):
    """``B = U sqrt(S)``, ``A = sqrt(S) Vᵀ`` of the ``rank`` smallest singular values (arXiv 2406.09044).

    By the whole singular value decomposition in float64, with the largest entry of each left singular vector positive:
    iterations for the smallest ones need a factorization of the matrix as well. It costs about ``20 d n min(d, n)``
    multiply-adds.
    """

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`FactorStart.factors`."""
        left, values, right = minor_svd(matrix, rank, what)
        return left * np.sqrt(values), right * np.sqrt(values)

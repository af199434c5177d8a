"""OLoRA: the start is an orthonormal basis of the first columns of the weight, and the weight's part in it."""

from __future__ import annotations

import numpy as np

from ..sources import Stream, leading_qr
from ._factor_start import FactorStart

__all__ = ["OLoRA"]


class OLoRA(FactorStart):
    """``B = Q_r``, ``A = R_r`` of the QR decomposition of the weight (arXiv 2406.01775).

    Computed in float64, with a positive diagonal of R. Q_r depends on the first ``rank`` columns alone, and
    ``R_r = Q_rᵀ W``. PEFT does not divide the factors by the scale: the two agree for a scale of 1, and for another one
    PEFT's W - s Q R keeps less or more of the weight in the base.
    """

    def factors(self, matrix: np.ndarray, rank: int, stream: Stream, what: str) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`FactorStart.factors`."""
        q = leading_qr(matrix, rank, what)
        return q, matrix.T @ q

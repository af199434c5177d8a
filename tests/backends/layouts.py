"""The same numbers in other memory layouts."""

from __future__ import annotations

import numpy as np

__all__ = ["LAYOUTS", "laid_out"]

LAYOUTS = ("C", "Fortran", "read-only", "backwards", "every third", "unaligned", "axes turned", "repeated")


def laid_out(x: np.ndarray, how: str) -> np.ndarray:
    """Return the same numbers in that memory layout; those of "repeated" are the first of the last axis."""
    if how == "Fortran":
        return np.asfortranarray(x)
    if how == "read-only":
        x = x.copy()
        x.flags.writeable = False
    elif how == "backwards":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    elif how == "every third":
        wide = np.full((*x.shape[:-1], 3 * x.shape[-1]), np.nan, x.dtype)
        wide[..., 1::3] = x
        return wide[..., 1::3]
    elif how == "unaligned":
        odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        odd[...] = x
        return odd
    elif how == "axes turned":
        return np.ascontiguousarray(np.moveaxis(x, 0, -1)).transpose(x.ndim - 1, *range(x.ndim - 1))
    elif how == "repeated":
        return np.broadcast_to(x[..., :1], x.shape)
    return x

"""Rounding of float32 values to half-precision dtypes, on NumPy, which has no bfloat16."""

from __future__ import annotations

import numpy as np

__all__ = ["rounded_to"]


def rounded_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to those of another dtype, as array libraries do: to nearest, ties to even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return array

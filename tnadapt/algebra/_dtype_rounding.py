"""Rounding of float32 values to half-precision dtypes, on NumPy, which has no bfloat16."""

from __future__ import annotations

import numpy as np

__all__ = ["rounded_to"]


def rounded_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round values to those of a half-precision dtype, as array libraries do: to nearest, ties to even.

    They are float32 values, or are rounded to float32 first, as a model computes them.
    """
    if dtype not in ("float16", "bfloat16"):
        return array
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
        if dtype == "float16":
            return array.astype(np.float16).astype(np.float32)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

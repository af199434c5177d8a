"""Floats as files and weights store them, in NumPy arrays: bfloat16, which NumPy lacks, is its bits in uint16."""

from __future__ import annotations

import numpy as np

from tnadapt.errors import BackendError, safe_repr

from . import FLOAT_DTYPES


def widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored numbers in at least single precision, without rounding: float64 as it is, the others as float32.

    Examples
    --------
    >>> widened(np.array([0x3F80, 0xC000], np.uint16), "bfloat16").tolist()
    [1.0, -2.0]
    """
    if dtype == "bfloat16":
        # The bits of a bfloat16 are the upper half of a float32's.
        bits = stored.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return stored.astype(np.float32) if dtype == "float16" else stored


def rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Round numbers as a weight of a dtype stores them: to float32, and then to the dtype, to nearest, ties to even.

    Examples
    --------
    >>> rounded(np.array([1.0, 1.0 + 2**-8]), "bfloat16").tolist() == [0x3F80, 0x3F80]
    True
    """
    if dtype not in FLOAT_DTYPES:
        raise BackendError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {safe_repr(dtype)}")
    if dtype == "float64":
        return numbers.astype(np.float64, copy=False)
    single = numbers.astype(np.float32)
    if dtype == "float32":
        return single
    if dtype == "float16":
        return single.astype(np.float16)
    bits = np.empty(single.shape, np.uint32)
    to_bfloat16(single, bits)
    return bits.astype(np.uint16)


def to_bfloat16(single: np.ndarray, out: np.ndarray) -> None:
    """Write the bits of float32 numbers rounded to bfloat16 to an array of uint32."""
    # Round to nearest, ties to even: add half a unit, less one if the last bit kept is even, and drop the low half.
    bits = single.view(np.uint32)
    np.right_shift(bits, 16, out=out)
    np.bitwise_and(out, 1, out=out)
    np.add(out, 0x7FFF, out=out)
    np.add(out, bits, out=out)
    np.right_shift(out, 16, out=out)
    nan = np.isnan(single)
    if nan.any():
        out[nan] = 0x7FC0  # the addition might have carried into the sign


def rounded_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the values of a half-precision dtype, kept as float32; for any other dtype, return the array as it is.

    Examples
    --------
    >>> rounded_to(np.array([1.0 + 2**-8, 3.0]), "bfloat16").tolist()
    [1.0, 3.0]
    """
    if dtype not in ("float16", "bfloat16"):
        return array
    with np.errstate(over="ignore"):
        return widened(rounded(array, dtype), dtype)

"""Dtypes: everything is computed in float64, and stored in the narrowest dtype that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tnadapt.errors import ConfigError, FileError, shown

from ._updates import Float

__all__ = ["brain", "check_range", "narrowed", "rounded", "widened", "widest"]


def widened(name: str, tag: str, array: np.ndarray) -> Float:
    """A stored tensor as float64; an error unless it is of real numbers, all finite."""
    if tag == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name.endswith(".alpha") and array.dtype.kind in "iu":
        return array.astype(np.float64)  # some scripts count the ranks
    if array.dtype.kind != "f":
        raise FileError(f"{shown(name)} is {tag}; the tensors of an adapter are floating-point numbers")
    if not np.isfinite(array).all():
        raise FileError(f"{shown(name)} holds NaN or infinity")
    return array.astype(np.float64)


def widest(dtypes: set[str]) -> str:
    """The dtype that holds the numbers of all of these."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "float64" if "float64" in dtypes else "float32"


def narrowed(arrays: Mapping[str, Float], dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays in a dtype if it holds each of their numbers to the bit, else in float32 (of float64: float64).

    Returns
    -------
    dict, dict
        The arrays; and of bfloat16, which NumPy lacks, float32 arrays and the names that say so.
    """
    made, says = rounded(arrays, dtype)
    if all(np.array_equal(made[name], arrays[name]) for name in arrays):
        return made, says
    return rounded(arrays, "float32")


def rounded(arrays: Mapping[str, Any], dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays in a dtype, to the nearest number that it has."""
    if dtype == "bfloat16":
        return {name: brain(array) for name, array in arrays.items()}, dict.fromkeys(arrays, "bfloat16")
    with np.errstate(over="ignore"):  # who writes them says what is infinite
        return {name: np.asarray(array).astype(dtype, order="C") for name, array in arrays.items()}, {}


def brain(array: Any) -> np.ndarray:
    """The nearest numbers that bfloat16 has, ties to even, as float32."""
    with np.errstate(over="ignore"):
        bits = np.array(array, dtype=np.float32, order="C").view(np.uint32)
    finite = np.isfinite(array)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(finite, nearest, bits).astype(np.uint32).view(np.float32)


def check_range(arrays: Mapping[str, np.ndarray], dtype: str) -> None:
    """A ConfigError if rounding to the dtype made a number infinite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ConfigError(f"{shown(name)} has numbers that are too large for {dtype}; use float32")

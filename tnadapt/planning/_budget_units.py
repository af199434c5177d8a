"""Parsing of budgets: a number of parameters, or bytes of a dtype."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from tnadapt.backends.backend import FLOAT_DTYPES
from tnadapt.errors import ConfigError, integer, safe_repr

__all__ = ["bytes_each", "parameters_of"]

UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
}  # fmt: skip
MOST = 1 << 62
_FORM = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def bytes_each(dtype: str) -> int:
    """Return the bytes of one parameter.

    Raises
    ------
    ConfigError
        If adapters do not support that dtype.

    Examples
    --------
    >>> bytes_each("bfloat16")
    2
    """
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {safe_repr(dtype)}")
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def parameters_of(budget: Any, dtype: str = "float32") -> int:
    """Return the number of parameters of a budget.

    Parameters
    ----------
    budget : int or str
        A number of parameters, also as a string; or bytes, with a unit: B, kB, MB, GB (powers of 1000), KiB, MiB, GiB.
    dtype : str
        Dtype of the parameters, for a budget in bytes.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ConfigError
        If it is neither, or is too small for one parameter.

    Examples
    --------
    >>> parameters_of(1000), parameters_of("10,000"), parameters_of("4 kB"), parameters_of("4 KiB", "float16")
    (1000, 10000, 1000, 2048)
    """
    each = bytes_each(dtype)
    if not isinstance(budget, str):
        return integer("budget", budget, 1, MOST, ConfigError, "of parameters, or bytes as text, such as '4 kB'")
    match = _FORM.fullmatch(budget)
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in UNITS):
        raise ConfigError(
            f"a budget is a number of parameters, such as 1000, or of bytes, such as '4 kB' or '64 KiB'; "
            f"got {safe_repr(budget)}"
        )
    number = Decimal(match[1].replace(",", "").replace("_", ""))
    if not unit and number != int(number):
        raise ConfigError(f"a budget of parameters must be a whole number; got {safe_repr(budget)}")
    found = int(number * UNITS[unit]) // each if unit else int(number)
    if found < 1:
        least = f"; one parameter is {each} bytes in {dtype}" if unit else ""
        raise ConfigError(f"a budget must be at least 1 parameter; got {safe_repr(budget)}{least}")
    return min(found, MOST)

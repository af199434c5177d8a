"""How kernels are compiled: once, kept on disk, without the interpreter's lock, and announced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

__all__ = ["compiled"]

if numba.config.DISABLE_JIT:
    raise ImportError("numba is told not to compile (NUMBA_DISABLE_JIT)")

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function, compiled for the types that it is first called with."""
    made: Function = numba.njit(nogil=True, cache=True)(function)
    return made

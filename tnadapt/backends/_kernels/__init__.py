"""Compiled kernels, called only through methods of a backend.

Design requirements of this package:

* A kernel takes and returns NumPy arrays and is independent of backends. Threads, alignment and SIMD
  width are handled in this package only.
* Each kernel has a reference implementation, which runs if the compiler is missing; a property test
  checks that the two are equal.
* A module of kernels, and with it the compiler, is imported when it is first needed.
* No OpenMP: numba's OpenMP threads make torch many times slower in the same process. Kernels release
  the interpreter lock, and ordinary threads run them in parallel
  (:mod:`~tnadapt.backends._kernels.work_space`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

__all__ = ["kernels"]


@functools.cache
def kernels(name: str) -> Any:
    """Return the module of kernels with that name; None if its compiler (the extra ``fast``) is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        logging.getLogger("tnadapt").info("no compiled kernels for %s, plain operations are used: %s", name, error)
        return None

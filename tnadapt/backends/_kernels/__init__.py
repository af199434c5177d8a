"""Compiled kernels for what plain code computes, too; reached only through a method of a backend.

Design requirements of this package:

* A kernel takes and gives NumPy arrays, and knows nothing of backends. Threads, alignment and the
  width of vectors are known here and nowhere else.
* Each kernel has a reference implementation, which runs where the compiler is missing; a property test
  holds the two equal.
* A module of kernels, and with it the compiler, is imported when it is first asked for.
* No OpenMP: numba's threads by it make torch many times slower in the same process. Kernels hold no
  interpreter lock while they run, and ordinary threads share them out (:mod:`~tnadapt.backends._kernels.thread_pool`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

__all__ = ["kernels"]


@functools.cache
def kernels(name: str) -> Any:
    """The module of kernels of that name; None where what compiles it is not there (the extra ``fast``)."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        logging.getLogger("tnadapt").info("no compiled kernels of %s, the plain way is taken: %s", name, error)
        return None

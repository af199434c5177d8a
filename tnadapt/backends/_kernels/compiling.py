"""Compilation of kernels: on first call, cached on disk, releasing the interpreter lock, and logged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import event
from numba.core.caching import FunctionCache

if numba.config.DISABLE_JIT:
    raise ImportError("numba's compiler is disabled (NUMBA_DISABLE_JIT)")

Function = TypeVar("Function", bound=Callable[..., Any])

_log = logging.getLogger("tnadapt")
_ROOMS = Path(__file__).parent


def compiled(function: Function) -> Function:
    """Decorate a function to be compiled for each combination of argument types, or loaded from the cache on disk."""
    # Division by zero as in NumPy: Python's check for it would prevent vectorized loops.
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        dispatcher._cache = _Kept(function)
    except RuntimeError as error:  # none of numba's cache folders is writable
        _say_once("compiled kernels are not cached, so that each process recompiles them (NUMBA_CACHE_DIR)", str(error))
    result: Function = dispatcher
    return result


class _Kept(FunctionCache):  # type: ignore[misc]
    """numba's cache on disk, keyed by the source of all kernels.

    numba checks only the file of a function itself for changes, but its machine code also includes inlined functions
    from other files.
    """

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _digest())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a truncated file, or one of another numba version, may raise anything
            _say_once("a cached kernel cannot be read and is recompiled", repr(error))
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say_once("compiled kernels could not be cached on disk", str(error))


_said: set[str] = set()


def _say_once(what: str, why: str) -> None:
    """Log a message once, not for every kernel."""
    if what not in _said:
        _said.add(what)
        _log.info("%s: %s", what, why)


@functools.cache
def _digest() -> str:
    """Return a digest of the source files of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(_ROOMS.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Announcer(event.Listener):  # type: ignore[misc]
    """Log a message when a process first compiles one of our kernels, but not if all come from the cache."""

    said = False

    def on_start(self, event: Any) -> None:
        # numba notifies us of all functions, also of other packages; one created by exec() has no module.
        module = getattr(event.data["dispatcher"].py_func, "__module__", None) or ""
        if module.startswith(__package__ or "") and not self.said:
            self.said = True
            _log.info("compiling kernels, which takes some seconds, once after installing or on another processor")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announcer())

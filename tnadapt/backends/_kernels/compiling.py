"""How kernels are compiled: when first called, kept on disk, without the interpreter's lock, and announced."""

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

__all__ = ["compiled"]

if numba.config.DISABLE_JIT:
    raise ImportError("numba is told not to compile (NUMBA_DISABLE_JIT)")

Function = TypeVar("Function", bound=Callable[..., Any])

_log = logging.getLogger("tnadapt")
_ROOMS = Path(__file__).parent


def compiled(function: Function) -> Function:
    """The function, compiled for the types that it is first called with, in this process or one before."""
    # A division by zero gives what NumPy gives; to look for one would keep loops from being vectorised.
    made: Any = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        made._cache = _Kept(function)
    except RuntimeError as error:  # no folder of numba's can be written
        _say_once("compiled kernels are not kept, so that each process compiles anew (NUMBA_CACHE_DIR)", str(error))
    found: Function = made
    return found


class _Kept(FunctionCache):  # type: ignore[misc]
    """numba's cache on disk, which looks at a function's own file alone: its code is made of others', too."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _digest())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever a file that was cut, or written by another numba, makes of unpickling
            _say_once("a kernel that was kept on disk cannot be read, and is compiled anew", repr(error))
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say_once("compiled kernels could not be kept on disk", str(error))


_said: set[str] = set()


def _say_once(what: str, why: str) -> None:
    """There are many kernels, and one reason."""
    if what not in _said:
        _said.add(what)
        _log.info("%s: %s", what, why)


@functools.cache
def _digest() -> str:
    """Of all that kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted(_ROOMS.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Announcer(event.Listener):  # type: ignore[misc]
    """Says it when a process first compiles a kernel of ours; silent where all come from the cache."""

    said = False

    def on_start(self, event: Any) -> None:
        # It is told of everybody's functions; one that was made by exec() has no module.
        module = getattr(event.data["dispatcher"].py_func, "__module__", None) or ""
        if module.startswith(__package__ or "") and not self.said:
            self.said = True
            _log.info("compiling kernels, which takes some seconds, once after installing or on another processor")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announcer())

"""A layer between the library and the disk that reports every change of the disk before and after it happens.

It replaces ``os``, ``open`` and the library's only direct system call in this process. With it, tests record the order
of steps, kill a process between any two of them, and derive what a power failure could leave.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.checkpoints.internals import atomic_files as renaming
from tests.checkpoints.internals import shards


class Call(NamedTuple):
    """One step.

    Attributes
    ----------
    name : str
        That of the function, or "create" for opening a new file, "exchange" and "rename_new" for ``renameat2``.
    paths : tuple of str
        Absolute. Of fsync: that of what is synchronized.
    content : bytes or None
        Of fsync of a file: what it held.
    state : tuple of int, or None
        Of fsync of a file, and after writing to one: its size and modification time.
    """

    name: str
    paths: tuple[str, ...]
    content: bytes | None = None
    state: tuple[int, int] | None = None

    @property
    def short(self) -> str:
        return f"{self.name} {' '.join(map(os.path.basename, self.paths))}"


Watcher = Callable[[Call], None]


def _of_handle(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def _state(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


def _absolute(path: Any, dir_fd: int | None = None) -> str:
    text = os.fsdecode(path)
    return os.path.normpath(os.path.join(_of_handle(dir_fd) if dir_fd is not None else os.getcwd(), text))


@contextlib.contextmanager
def intercepted(before: Watcher, after: Watcher = lambda call: None, exchange: bool = True) -> Iterator[None]:
    """Report each step in the block, by any thread, one at a time.

    Parameters
    ----------
    before, after : callable
    exchange : bool
        Whether the system has ``renameat2``.
    """
    turn = threading.RLock()

    def reported(call: Call, act: Callable[[], Any]) -> Any:
        with turn:
            before(call)
            found = act()
            after(call)
            return found

    def with_paths(name: str, real: Callable[..., Any], count: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            paths = tuple(_absolute(path, settings.get("dir_fd")) for path in arguments[:count])
            return reported(Call(name, paths), lambda: real(*arguments, **settings))

        return wrapped

    real_open, real_os_open, real_fsync = builtins.open, os.open, os.fsync
    real_renameat2, real_lexists = renaming._renameat2, os.path.lexists

    def open_(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa"):
            return real_open(file, mode, *arguments, **settings)
        call = Call("create", (_absolute(file),))
        return reported(call, lambda: real_open(file, mode, *arguments, **settings))

    def os_open(path: Any, flags: int, *arguments: Any, **settings: Any) -> int:
        if not flags & os.O_CREAT or real_lexists(path):
            return real_os_open(path, flags, *arguments, **settings)
        call = Call("create", (_absolute(path),))
        found: int = reported(call, lambda: real_os_open(path, flags, *arguments, **settings))
        return found

    def fsync(handle: int) -> None:
        path = _of_handle(handle)
        if os.path.isdir(path):
            call = Call("fsync", (path,))
        else:
            call = Call("fsync", (path,), os.pread(handle, os.fstat(handle).st_size, 0), _state(handle))
        reported(call, lambda: real_fsync(handle))

    def renameat2(source: str, target: str, flags: int) -> bool:
        if not exchange:
            return False
        name = "exchange" if flags == renaming._EXCHANGE else "rename_new"
        call = Call(name, (_absolute(source), _absolute(target)))
        with turn:
            before(call)
            done = real_renameat2(source, target, flags)
            if done:  # else the file system lacks it, and another way is taken
                after(call)
            return done

    def written(name: str, real: Callable[..., Any], position: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            handle = arguments[position].fileno()
            call = Call(name, (_of_handle(handle),))
            with turn:
                before(call)
                found = real(*arguments)
                after(call._replace(state=_state(handle)))
                return found

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, with_paths(name, getattr(os, name), 1))
        for name in ("rename", "replace", "link"):
            patch.setattr(os, name, with_paths(name, getattr(os, name), 2))
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "open", os_open)
        patch.setattr(builtins, "open", open_)
        patch.setattr(renaming, "_renameat2", renameat2)
        patch.setattr(shards, "write_at", written("write", shards.write_at, 0))
        patch.setattr(shards, "copy_range", written("copy", shards.copy_range, 2))
        yield


class Killed(BaseException):
    """As good as SIGKILL, in one process: every later step on the disk raises it, too."""


def killed_before(due: Callable[[Call, list[Call]], bool], act: Callable[[], Any], exchange: bool = True) -> None:
    """Run it until a step is due to be its last, of which nothing happens, nor of any after it.

    Parameters
    ----------
    due : callable
        Given a step and those before it.
    act : callable
    exchange : bool
        Whether the system has ``renameat2``.
    """
    seen: list[Call] = []
    dead = False

    def before(call: Call) -> None:
        nonlocal dead
        dead = dead or due(call, seen)
        if dead:
            raise Killed
        seen.append(call)

    with intercepted(before, exchange=exchange), pytest.raises(Killed):
        act()


def recorded(act: Callable[[], Any], exchange: bool = True) -> list[Call]:
    """The steps of a call, in the order in which they were done."""
    calls: list[Call] = []
    with intercepted(lambda call: None, calls.append, exchange):
        act()
    return calls

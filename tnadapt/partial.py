"""What is being made beside its final place: file by file, resumed after a kill, and put there by one rename.

Beside ``OUT`` is the folder ``OUT.tnadapt-partial`` with the state of the work, ``state.json``, and the finished and
unfinished files in ``files``. The state says what the work is made from and which files are finished; where another run
finds the same there, it goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from .durable import replace_file, sync_folder
from .errors import FileError
from .strict_json import json_file

__all__ = ["SUFFIX", "Partial", "partial"]

SUFFIX = ".tnadapt-partial"

_STATE, _FILES, _OLD = "state.json", "files", "old"
_MAX_STATE = 1 << 26


class Partial:
    """The folder beside; :func:`partial` makes it.

    Attributes
    ----------
    folder : str
        Of the files: write there.
    done : dict of str to int
        The names of files that an earlier run, or this one, has finished, and their sizes.
    complete : bool
        Whether everything is in its final place already: an earlier run was stopped after its last step.
    """

    def __init__(self, out: str, identity: Mapping[str, Any]) -> None:
        self.out, self.identity = out, dict(identity)
        self.root = out + SUFFIX
        self.folder = os.path.join(self.root, _FILES)
        self.done: dict[str, int] = {}
        self.complete = False

    def path(self, name: str) -> str:
        """Where a file is made."""
        return os.path.join(self.folder, name)

    def finished(self, name: str) -> None:
        """A file is whole and synchronised."""
        self.done[name] = os.path.getsize(self.path(name))
        self._write()

    def publish(self, name: str | None, overwrite: bool) -> None:
        """Put one file, or the whole folder if None, in its final place, instead of what is there.

        Raises
        ------
        FileError
            If something is there and is not to be overwritten; what was made is kept then.
        """
        self.complete = True
        self._write()
        if not overwrite and os.path.lexists(self.out):
            raise FileError("came to be while it was made: remove it, or allow it to be overwritten, and run again")
        made = self.folder if name is None else self.path(name)
        old = os.path.join(self.root, _OLD)
        sync_folder(self.folder)
        if name is None and os.path.isdir(self.out):
            # No system renames a folder onto one with files in it.
            os.rename(self.out, old)
            try:
                os.rename(made, self.out)
            except OSError:
                os.rename(old, self.out)
                raise
        else:
            os.replace(made, self.out)
        sync_folder(os.path.dirname(self.out))

    def remove(self) -> None:
        """Take all of it away."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _write(self) -> None:
        state = {**self.identity, "done": self.done, "complete": self.complete}
        replace_file(os.path.join(self.root, _STATE), json.dumps(state, sort_keys=True).encode())

    def _resume(self) -> None:
        """Take up what an earlier run of the same work left, or take it away."""
        old = os.path.join(self.root, _OLD)
        if os.path.isdir(old) and not os.path.lexists(self.out):
            os.rename(old, self.out)  # stopped between the two renames
        state = _read(os.path.join(self.root, _STATE))
        done, complete = state.pop("done", None), state.pop("complete", None)
        os.makedirs(self.folder, exist_ok=True)
        if state == self.identity and isinstance(done, dict):
            self.done = {name: size for name, size in done.items() if _size(self.path(name)) == size}
            self.complete = complete is True and not self.done and os.path.lexists(self.out)
        for folder, known in ((self.root, {_FILES, _STATE}), (self.folder, set(self.done))):
            for name in set(os.listdir(folder)) - known:
                _unlink(os.path.join(folder, name))


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) and not os.path.islink(path) else -1


def _read(path: str) -> dict[str, Any]:
    try:
        return json_file(path, _MAX_STATE)
    except (OSError, ValueError):  # a FileError is a ValueError: a state that cannot be read is none
        return {}


def _unlink(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


@contextlib.contextmanager
def partial(out: str, identity: Mapping[str, Any]) -> Iterator[Partial]:
    """The folder beside ``out``, with what an earlier run of the same work finished.

    When the block ends it is taken away. Where an error ends it (Ctrl-C, a full disk), the files that are finished
    stay, and another run with the same identity goes on from there.

    Parameters
    ----------
    out : str
        The final place, absolute, in a folder that exists.
    identity : mapping
        JSON: what tells this work from another.

    Raises
    ------
    FileError
        If something else of that name is in the way, or another process is at work there.
    OSError
        If nothing can be written there.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with partial(folder + "/out", {"made from": 1}) as work:
    ...         replace_file(work.path("a"), b"content")
    ...         work.finished("a")
    ...         work.publish(None, overwrite=False)
    ...     os.listdir(folder), os.listdir(folder + "/out")
    (['out'], ['a'])
    """
    work = Partial(out, identity)
    if os.path.lexists(work.root):
        own = os.path.isdir(work.root) and not os.path.islink(work.root)
        if not own or set(os.listdir(work.root)) - {_STATE, _FILES, _OLD} - _temporary(work.root):
            raise FileError(f"{work.root} is in the way, and is no unfinished merge: remove it, or choose another name")
    os.makedirs(work.root, exist_ok=True)
    with _locked(work.root):
        work._resume()
        try:
            yield work
        except BaseException:
            if work.done and os.path.isdir(work.folder):
                for name in set(os.listdir(work.folder)) - set(work.done):
                    with contextlib.suppress(OSError):
                        _unlink(work.path(name))
                with contextlib.suppress(OSError):
                    work._write()  # a full disk had no room for it before
            else:
                work.remove()
            raise
        work.remove()


def _temporary(root: str) -> set[str]:
    """Halves of a state, left by a kill."""
    return {name for name in os.listdir(root) if name.startswith(".tnadapt-") and name.endswith(".tmp")}


@contextlib.contextmanager
def _locked(root: str) -> Iterator[None]:
    """One process at a time, where the system has locks that end with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"another process is making {root}: wait for it, or choose another name") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)

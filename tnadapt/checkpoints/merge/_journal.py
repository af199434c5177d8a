"""Output that is built beside its final place, resumed after a kill, and published in one step.

Beside ``OUT``, while it is being made, or after a run that was stopped::

    OUT.tnadapt-partial/
        lock                the process at work holds a lock on this file
        run-<random>/       what one process is making
            state.json      from what, and which files are finished
            files/          the files
            old/            the previous output, between the two renames of systems that cannot exchange names
        trash-<random>/     being deleted

Any process may be killed between any two system calls, any number of them may want the same ``OUT``, and locks may not
work (network file systems). These rules keep the output whole:

1. Whoever works holds the lock. The lock file is deleted last, by its holder, so that a process that opened it before
   can lock a deleted file: after locking, it checks that the file still has that name, and otherwise starts over.
2. A process works only in a run folder whose name it made up itself. It takes over the run of another by renaming it,
   and every later step of the other one, its publishing too, fails, as its paths are gone. So even without locks
   the files of two processes never mix.
3. Runs are never half deleted: what goes is renamed to ``trash-…`` first. All decisions are about whole folders.
4. ``done`` in the state is the promise that these files are finished and on the disk. It is emptied, on the disk,
   before publishing begins: from then on ``files`` may hold the previous content of ``OUT``, and is never published.
5. Nothing at ``OUT`` is ever taken for the result because of what a state says. After a kill the files are recomputed;
   where ``OUT`` must not be replaced, it is then compared with them byte by byte.

So what the next run finds after a kill, and does:

=================================  ================================================================================
``old`` and ``files``              renames ``old`` back to ``OUT``; if something else is there, and ``OUT`` may be
                                   overwritten, deletes ``old`` once the new output is published; else an error
``publishing``, with files         deletes them, unless they are nothing that could be replaced; makes all again
``publishing``, without files      makes all again
``done`` lists files               keeps those of the recorded size and time, makes the others
anything else                      starts over
=================================  ================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from tnadapt.errors import FileError

from ..atomic_files import replace_file, sync_folder, sync_tree
from ..strict_json import json_file
from ._publishing import LeftoverError, Refusal, place, put_back
from ._work_lock import LOCK, RUN, TRASH, work_lock

__all__ = ["SUFFIX", "MergeJournal", "partial"]

SUFFIX = ".tnadapt-partial"

_STATE, _FILES, _OLD = "state.json", "files", "old"
_MAX_STATE = 1 << 26


class MergeJournal:
    """The run of this process; :func:`partial` makes it.

    Attributes
    ----------
    out, root, run : str
        The final place, the folder beside it, and the run folder in that.
    folder : str
        Where the files are made.
    done : dict of str to list of int
        The names of files that an earlier run, or this one, has finished, with their size and modification time.
    maybe_published : bool
        Whether an earlier run of the same work was killed as it published: ``out`` may be the result.
    """

    def __init__(self, out: str, identity: Mapping[str, Any], refusal: Refusal, overwrite: bool) -> None:
        self.out, self.identity, self._refusal, self._overwrite = out, dict(identity), refusal, overwrite
        self.root = out + SUFFIX
        self._leftovers: list[str] = []  # runs with what is to be replaced, too
        self._published = False
        self.done: dict[str, list[int]] = {}
        self.maybe_published = self._publishing = self._said_publishing = self.removed = False
        self._enter(self._new(RUN))

    def _enter(self, run: str) -> None:
        self.run, self.folder = run, os.path.join(run, _FILES)

    def _new(self, kind: str) -> str:
        return os.path.join(self.root, kind + secrets.token_hex(8))

    def path(self, name: str) -> str:
        """Where a file is made."""
        return os.path.join(self.folder, name)

    def make_folder(self, name: str) -> None:
        """Make a folder among the files, and those that it is in."""
        path = self.folder
        for part in name.split(os.sep) if name else []:
            path = os.path.join(path, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)

    def finished(self, name: str) -> None:
        """Record that a file is whole and synchronised."""
        self.done[name] = _stamp(self.path(name))
        self._write()

    # -- Publishing --------------------------------------------------------------------------

    def publish(self, name: str | None) -> None:
        """Put one file, or the whole folder if None, in its final place.

        Where nothing may be overwritten and an earlier run may have published the same, what is there is compared with
        what was made, and left as it is if it is equal.

        Raises
        ------
        FileError
            If something is there that is not to be replaced; what was made is kept then.
        """
        made = self.folder if name is None else self.path(name)
        sync_tree(self.folder)
        before = _identity(made)
        finished, self.done, self._publishing = self.done, {}, True
        old, refusal = os.path.join(self.run, _OLD), self._refusal if self._overwrite else None
        try:
            self._write(name)
            place(made, self.out, old, refusal, self.maybe_published)
        except BaseException:
            if before is not None and _identity(made) == before:  # not published
                self.done, self._publishing = finished, False
            raise
        for folder in (os.path.dirname(self.out), os.path.dirname(made)):
            sync_folder(folder)
        self._publishing, self._published = False, True

    # -- What earlier runs left ----------------------------------------------------------------

    def _take_over(self) -> None:
        """Resume the earlier run of the same work, and delete all others."""
        taken = False
        for name in sorted(_listed(self.root)):
            path = os.path.join(self.root, name)
            if name.startswith(TRASH):
                _delete(path)
            elif name.startswith(RUN):
                own = self._new(RUN)
                try:
                    os.rename(path, own)
                except FileNotFoundError:  # another process was quicker, where locks do not work
                    continue
                state = _read(os.path.join(own, _STATE))
                if self._is_needed(own, state):
                    self._leftovers.append(own)
                elif taken or {key: state.get(key) for key in self.identity} != self.identity:
                    self._discard(own)
                else:
                    taken = True
                    self._enter(own)
                    self._resume(state)
        if not taken:
            os.makedirs(self.root, exist_ok=True)
            os.mkdir(self.run)
        # Never with its parent: if this run has been taken over, what follows must fail.
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder)

    def _is_needed(self, run: str, state: Mapping[str, Any]) -> bool:
        """Put the previous output back; whether a run must stay until there is a new one.

        An error if it holds something that was not to be replaced.
        """
        files, old = os.path.join(run, _FILES), os.path.join(run, _OLD)
        if not os.path.lexists(files):
            return False
        if os.path.lexists(old):
            try:
                put_back(old, self.out)
            except LeftoverError:
                if not self._overwrite:
                    raise
                return True
        elif state.get("publishing") is True:
            name = state.get("name")
            replaced = os.path.join(files, name) if isinstance(name, str) and name else files
            if (why := self._refusal(replaced)) is not None:
                raise LeftoverError(
                    f"{replaced} stood here when an earlier run was killed, and {why}: move it away first"
                )
        return False

    def _resume(self, state: Mapping[str, Any]) -> None:
        done, publishing = state.get("done"), state.get("publishing") is True
        self.maybe_published = publishing or state.get("maybe_published") is True
        if publishing or not isinstance(done, dict):
            self._discard(self.folder)
            done = {}
            self._write()  # only after it may there be files again
        self.done = {name: stamp for name, stamp in done.items() if _stamp(self.path(name)) == stamp}
        for folder, known in ((self.run, {_FILES, _STATE}), (self.folder, set(self.done))):
            for name in set(_listed(folder)) - known:
                self._discard(os.path.join(folder, name))

    # -- Ending --------------------------------------------------------------------------------

    def _discard(self, path: str) -> None:
        trash = self._new(TRASH)
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return
        _delete(trash)

    def remove(self) -> None:
        """Delete all of it, and let others begin; the state last, as it says that ``out`` may be the result."""
        if self.removed:
            return
        for name in (_FILES, _OLD):
            self._discard(os.path.join(self.run, name))
        self._discard(self.run)
        for run in self._leftovers if self._published else []:
            self._discard(run)
        self.done, self.removed = {}, True
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.root, LOCK))
        with contextlib.suppress(OSError):  # another process may be there already
            os.rmdir(self.root)

    def _keep(self) -> None:
        """Leave what is finished to the next run."""
        with contextlib.suppress(OSError, FileError):  # a full disk
            self._write()
        if self._said_publishing:
            return  # what the state says of the files holds for all of them
        for name in set(_listed(self.folder)) - set(self.done):
            with contextlib.suppress(OSError):
                self._discard(self.path(name))
        with contextlib.suppress(OSError, FileError):  # the disk may have space only now
            self._write()

    def _stopped(self) -> None:
        """Tidy up after an error."""
        if self._publishing or os.path.lexists(os.path.join(self.run, _OLD)):
            return  # as after a kill: the next run looks at what is where
        if self.done or self.maybe_published:
            self._keep()
        else:
            self.remove()

    def _write(self, name: str | None = None) -> None:
        publishing = {"publishing": self._publishing, "name": name, "maybe_published": self.maybe_published}
        state = {**self.identity, **publishing, "done": self.done}
        replace_file(os.path.join(self.run, _STATE), json.dumps(state, sort_keys=True).encode())
        self._said_publishing = self._publishing


def _delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _stamp(path: str) -> list[int]:
    if not os.path.isfile(path) or os.path.islink(path):
        return []
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: str) -> dict[str, Any]:
    try:
        return json_file(path, _MAX_STATE)
    except (OSError, FileError):  # a state that cannot be read is none
        return {}


@contextlib.contextmanager
def partial(
    out: str, identity: Mapping[str, Any], refusal: Refusal = lambda path: None, overwrite: bool = False
) -> Iterator[MergeJournal]:
    """A run for ``out``, with what an earlier run of the same work finished.

    When the block ends it is deleted. If an error ends it (Ctrl-C, a full disk), the files that are finished stay, and
    another run with the same identity continues from there.

    Parameters
    ----------
    out : str
        The final place, absolute, in a folder that exists.
    identity : mapping
        JSON: what tells this work from another.
    refusal : callable, optional
        What may be replaced (:data:`tnadapt.checkpoints.merge._publishing.Refusal`).
    overwrite : bool
        Whether anything may be.

    Raises
    ------
    FileError
        If something else of that name is in the way, or another process is at work there, or took over.
    OSError
        If nothing can be written there.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with partial(folder + "/out", {"made from": 1}) as work:
    ...         replace_file(work.path("a"), b"content")
    ...         work.finished("a")
    ...         work.publish(None)
    ...     os.listdir(folder), os.listdir(folder + "/out")
    (['out'], ['a'])
    """
    with work_lock(out + SUFFIX):
        work = MergeJournal(out, identity, refusal, overwrite)
        try:
            work._take_over()
            yield work
        except Exception as error:
            if not work.removed and not os.path.isdir(work.run) and not isinstance(error, LeftoverError):
                raise FileError(
                    f"its unfinished files in {work.root} were removed, or taken over by another process: run it again"
                ) from error
            work._stopped()
            raise
        except BaseException:
            work._stopped()
            raise
        work.remove()

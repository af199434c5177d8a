"""Journal of a merge: output is built next to its final path, resumed after a kill, and published in one step.

While the output is being built, or after an interrupted run, there is next to ``OUT``::

    OUT.tnadapt-partial/
        lock                locked by the active process
        run-<random>/       the work of one process
            state.json      identity of the work, and the finished files
            files/          the files
            old/            the previous output, between the two renames of systems that cannot exchange names
        trash-<random>/     being deleted

Any process may be killed between any two system calls, any number of processes may want the same ``OUT``, and locks may
not work (network file systems). These rules keep the output intact:

1. The active process holds the lock. It deletes the lock file last. Another process that had opened the file before may
   then lock a deleted file, so after locking, each process checks that the file still has its name, and retries if not.
2. A process works only in a run folder with a random name that it chose itself. It takes over the run of another
   process by renaming the folder. Every later step of that process, including its publishing, then fails, as its paths
   are gone. So even without locks, the files of two processes never mix.
3. Runs are never half deleted: they are renamed to ``trash-…`` first. All decisions apply to whole folders.
4. ``done`` in the state guarantees that the listed files are finished and on disk. It is emptied, on disk, before
   publishing begins: from then on, ``files`` may hold the previous content of ``OUT``, and is never published.
5. The content of ``OUT`` is never assumed to be the result because of what a state says. After a kill during
   publishing, the files are recomputed; if ``OUT`` must not be replaced, it is then compared with them byte by byte.

Depending on what it finds after a kill, the next run proceeds as follows:

=================================  ================================================================================
``old`` and ``files``              rename ``old`` back to ``OUT``; if that exists and may be overwritten, delete
                                   ``old`` once the new output is published; otherwise raise an error
``publishing``, with files         delete them and recompute everything; raise an error if they are the previous
                                   content of ``OUT`` and must not be replaced
``publishing``, without files      recompute everything
``done`` lists files               keep those of the recorded size and time, recompute the others
anything else                      start over
=================================  ================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tnadapt.checkpoints import atomic_files
from tnadapt.checkpoints.container import json_file
from tnadapt.errors import FileError

from ._shards import same_content

# -- Publishing: a finished file or folder moves to its final path, always reversibly ----------------------------------

# If the system can exchange names (:mod:`tnadapt.checkpoints.atomic_files`), readers find either the previous or the
# new content at any time, and the previous content ends up at the path where the new one was built. Otherwise a folder
# takes two renames, between which its name is missing. The previous content is set aside until the new one is in place.


#: Given a path, returns why its content must not be replaced, or None if it may be or the path is free.
Refusal = Callable[[str], str | None]

_ATTEMPTS = 100


class LeftoverError(FileError):
    """An earlier run moved content away, and something else now has its path."""


def place(source: str, out: str, aside: str, refusal: Refusal | None, compare: bool = False) -> None:
    """Rename new content to its final path.

    Parameters
    ----------
    source, out : str
        The new content and its final path, on one file system. Previous content of ``out`` is afterwards at
        ``source``, at ``aside``, or deleted.
    aside : str
        A free name for the previous folder, used only if two renames are needed.
    refusal : callable, optional
        Decides what may be replaced; if None, nothing may. It is called before the rename, and again on what was
        actually replaced, as that may have been created in between. If it then refuses, the rename is undone.
    compare : bool
        Whether existing content that must not be replaced, but equals the new one, counts as success.

    Raises
    ------
    FileError
        If the path exists and must not be replaced. Nothing has changed then.
    OSError
        If the file system fails.
    """
    for _ in range(_ATTEMPTS):
        try:
            return atomic_files.rename_new(source, out)
        except FileExistsError:
            pass
        if refusal is None:
            if compare and same_content(source, out):
                return None
            raise FileError(
                "is not the output of an earlier run, which was killed during publishing: remove it, or "
                "run again with overwrite=True (--overwrite)"
                if compare
                else "was created during the merge: remove it, or run again with overwrite=True (--overwrite)"
            )
        _check(refusal, out)
        try:
            return _replace(source, out, aside, refusal)
        except FileNotFoundError:
            if not os.path.lexists(source):
                raise
            # The previous content has disappeared, so the name is free: try again.
    raise FileError("is created and removed by something else again and again: choose another name")


def _check(refusal: Refusal, path: str) -> None:
    if (why := refusal(path)) is not None:
        raise FileError(why)


def _replace(source: str, out: str, aside: str, refusal: Refusal) -> None:
    if atomic_files.exchange(source, out):
        if (why := refusal(source)) is not None:
            try:
                atomic_files.exchange(source, out)
            except FileNotFoundError:
                atomic_files.rename_new(source, out)
            raise FileError(why)
        return
    if not os.path.isdir(source):
        os.replace(source, out)
        return
    # A folder cannot be renamed onto one with files in it.
    try:
        os.rename(out, aside)
        _check(refusal, aside)
        atomic_files.rename_new(source, out)
    except BaseException:
        if os.path.lexists(aside) and os.path.lexists(source):
            put_back(aside, out)
        raise


def put_back(aside: str, out: str) -> None:
    """Undo the first of two renames.

    Raises
    ------
    LeftoverError
        If something else has taken the path ``out``.
    """
    try:
        atomic_files.rename_new(aside, out)
    except FileExistsError:
        raise LeftoverError(
            f"has been created while its previous content, now in {aside}, was being replaced: move one of them away, "
            "and run again"
        ) from None
    atomic_files.sync_folder(os.path.dirname(out))


# -- The lock on a folder of unfinished work, which its holders create and delete --------------------------------------


#: Name of the lock file, and prefixes of the other names in the folder.
LOCK, RUN, TRASH = "lock", "run-", "trash-"

_OWN = re.compile(rf"{LOCK}|(?:{RUN}|{TRASH})[0-9a-f]{{16}}")
_LOCK_ATTEMPTS = 1000


@contextlib.contextmanager
def work_lock(root: str) -> Iterator[None]:
    """Create the folder if needed, and hold its lock during the block.

    Raises
    ------
    FileError
        If something else has that name, or another process holds the lock.
    OSError
        If the folder cannot be created.

    Examples
    --------
    >>> with work_lock("work"), work_lock("work"):
    ...     pass
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: another process is writing work: wait for it, or choose another name
    """
    if not atomic_files.HAS_LOCKS:
        _check_own(root)
        os.makedirs(root, exist_ok=True)
        yield
        return
    handle = _locked(root)
    try:
        yield
    finally:
        atomic_files.unlock(handle)
        os.close(handle)
        # On NFS, a folder cannot be removed while a deleted file in it is still open, so remove it only now. If another
        # process has started in the meantime, its lock file keeps the folder, or it creates the folder again.
        with contextlib.suppress(OSError):
            os.rmdir(root)


def _locked(root: str) -> int:
    path = os.path.join(root, LOCK)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(_LOCK_ATTEMPTS):
        _check_own(root)
        with contextlib.suppress(FileExistsError):
            os.mkdir(root)
        try:
            handle = os.open(path, flags, 0o666)
        except FileNotFoundError:  # the last holder of the lock has just deleted the folder
            continue
        try:
            if not atomic_files.lock(handle):
                raise FileError(f"another process is writing {root}: wait for it, or choose another name")
            if atomic_files.names_handle(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        # The last holder deleted the file before releasing the lock: a lock on it protects nothing.
        os.close(handle)
    raise FileError(f"other processes are writing {root} again and again: wait for them, or choose another name")


def _check_own(root: str) -> None:
    """Raise FileError if the name is taken by anything that a merge would not have created."""
    # No lock is needed: other processes never put other names in the folder. Names that begin with a dot belong to the
    # system (.DS_Store, NFS's .nfs…) and are ignored.
    try:
        is_merge = stat.S_ISDIR(os.lstat(root).st_mode)
        is_merge = is_merge and all(name.startswith(".") or _OWN.fullmatch(name) for name in os.listdir(root))
        is_merge = is_merge and stat.S_ISREG(_mode(os.path.join(root, LOCK)))
    except FileNotFoundError:
        return
    if not is_merge:
        raise FileError(f"{root} is in the way, and is not an unfinished merge: remove it, or choose another name")


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return stat.S_IFREG


# -- The journal -------------------------------------------------------------------------------------------------------


SUFFIX = ".tnadapt-partial"

_STATE, _FILES, _OLD = "state.json", "files", "old"
_MAX_STATE = 1 << 26


class MergeJournal:
    """The run of this process, as created by :func:`partial`.

    Attributes
    ----------
    out, root, run : str
        The final path, the working folder next to it, and the run folder in that.
    folder : str
        The folder in which the files are written.
    done : dict of str to list of int
        The names of the files finished by this run or an earlier one, with their size and modification time.
    maybe_published : bool
        Whether an earlier run of the same work was killed during publishing, so that ``out`` may be the result.
    """

    def __init__(self, out: str, identity: Mapping[str, Any], refusal: Refusal, overwrite: bool) -> None:
        self.out, self.identity, self._refusal, self._overwrite = out, dict(identity), refusal, overwrite
        self.root = out + SUFFIX
        self._leftovers: list[str] = []  # runs that hold previous output, deleted after publishing
        self._published = False
        self.done: dict[str, list[int]] = {}
        self.maybe_published = self._publishing = self._said_publishing = self.removed = False
        self._enter(self._new(RUN))

    def _enter(self, run: str) -> None:
        self.run, self.folder = run, os.path.join(run, _FILES)

    def _new(self, prefix: str) -> str:
        return os.path.join(self.root, prefix + secrets.token_hex(8))

    def path(self, name: str) -> str:
        """Return the path at which a file is written."""
        return os.path.join(self.folder, name)

    def make_folder(self, name: str) -> None:
        """Create a folder for files, and its parents within the run."""
        path = self.folder
        for part in name.split(os.sep) if name else []:
            path = os.path.join(path, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)

    def finished(self, name: str) -> None:
        """Record that a file is complete and synchronized."""
        self.done[name] = _stamp(self.path(name))
        self._write()

    # -- Publishing --------------------------------------------------------------------------

    def publish(self, name: str | None) -> None:
        """Move one file, or the whole folder if None, to its final path.

        If nothing may be overwritten and an earlier run may have published the same result, existing content is
        compared with the new one, and left as it is if equal.

        Raises
        ------
        FileError
            If the path exists and must not be replaced. The new files are kept then.
        """
        # The state is on disk before the rename: a kill from here on leaves `publishing`, and the next run trusts
        # neither `files` nor `out`. After an error, the inode of `source` tells whether the rename has happened.
        source = self.folder if name is None else self.path(name)
        atomic_files.sync_tree(self.folder)
        before = _identity(source)
        finished, self.done, self._publishing = self.done, {}, True
        old, refusal = os.path.join(self.run, _OLD), self._refusal if self._overwrite else None
        try:
            self._write(name)
            place(source, self.out, old, refusal, self.maybe_published)
        except BaseException:
            if before is not None and _identity(source) == before:  # not published
                self.done, self._publishing = finished, False
            raise
        for folder in (os.path.dirname(self.out), os.path.dirname(source)):
            atomic_files.sync_folder(folder)
        self._publishing, self._published = False, True

    # -- Leftovers of earlier runs -------------------------------------------------------------

    def _take_over(self) -> None:
        """Resume the earlier run of the same work, and delete all others."""
        taken = False
        for name in sorted(_listed(self.root)):
            path = os.path.join(self.root, name)
            if name.startswith(TRASH):
                _delete(path)
            elif name.startswith(RUN):
                run = self._new(RUN)
                try:
                    os.rename(path, run)
                except FileNotFoundError:  # another process took it over first, as locks do not work
                    continue
                state = _read(os.path.join(run, _STATE))
                if self._is_needed(run, state):
                    self._leftovers.append(run)
                elif taken or {key: state.get(key) for key in self.identity} != self.identity:
                    self._discard(run)
                else:
                    taken = True
                    self._enter(run)
                    self._resume(state)
        if not taken:
            os.makedirs(self.root, exist_ok=True)
            os.mkdir(self.run)
        # Do not create its parent: if another process has taken over this run, the following steps must fail.
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder)

    def _is_needed(self, run: str, state: Mapping[str, Any]) -> bool:
        """Move the previous output back, and return whether a run must stay until the new output is published."""
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
            if (why := self._refusal(replaced)) is not None:  # it must not be deleted
                raise LeftoverError(
                    f"{replaced} is the previous content of {self.out}, left by a killed run, and {why}: move it away "
                    "first"
                )
        return False

    def _resume(self, state: Mapping[str, Any]) -> None:
        done, publishing = state.get("done"), state.get("publishing") is True
        self.maybe_published = publishing or state.get("maybe_published") is True
        if publishing or not isinstance(done, dict):
            self._discard(self.folder)
            done = {}
            self._write()  # clear `publishing` on disk before new files are written
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
        """Delete the run and release its name. The state goes last, as it records that ``out`` may be the result."""
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
        with contextlib.suppress(OSError):  # another process may have started already
            os.rmdir(self.root)

    def _keep(self) -> None:
        """Keep finished files for the next run."""
        with contextlib.suppress(OSError, FileError):  # a full disk
            self._write()
        if self._said_publishing:
            return  # the state on disk says `publishing`, so the next run discards all files anyway
        for name in set(_listed(self.folder)) - set(self.done):
            with contextlib.suppress(OSError):
                self._discard(self.path(name))
        with contextlib.suppress(OSError, FileError):  # deleting may have freed the space for it
            self._write()

    def _stopped(self) -> None:
        """Clean up after an error."""
        if self._publishing or os.path.lexists(os.path.join(self.run, _OLD)):
            return  # leave everything as after a kill: the next run examines it
        if self.done or self.maybe_published:
            self._keep()
        else:
            self.remove()

    def _write(self, name: str | None = None) -> None:
        publishing = {"publishing": self._publishing, "name": name, "maybe_published": self.maybe_published}
        state = {**self.identity, **publishing, "done": self.done}
        atomic_files.replace_file(os.path.join(self.run, _STATE), json.dumps(state, sort_keys=True).encode())
        self._said_publishing = self._publishing


def _delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _stamp(path: str) -> list[int]:
    if not os.path.isfile(path) or os.path.islink(path):
        return []
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: str) -> dict[str, Any]:
    try:
        return json_file(path, _MAX_STATE)
    except (OSError, FileError):  # an unreadable state counts as none
        return {}


@contextlib.contextmanager
def partial(
    out: str, identity: Mapping[str, Any], refusal: Refusal = lambda path: None, overwrite: bool = False
) -> Iterator[MergeJournal]:
    """Start a run for ``out``, or resume an earlier run of the same work.

    The run is deleted when the block ends. If an error ends the block (Ctrl-C, a full disk), finished files are kept,
    and another run with the same identity resumes with them.

    Parameters
    ----------
    out : str
        The final path, absolute, in an existing folder.
    identity : mapping
        JSON-compatible values that identify this work.
    refusal : callable, optional
        Decides what may be replaced (:data:`Refusal`).
    overwrite : bool
        Whether anything may be replaced.

    Raises
    ------
    FileError
        If something else has the name of the working folder, or another process is active there, or took over.
    OSError
        If the working folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with partial(folder + "/out", {"made from": 1}) as work:
    ...         atomic_files.replace_file(work.path("a"), b"content")
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

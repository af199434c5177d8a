"""Merges on disk: order of steps, power failures, kills, and concurrent merges."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from tests.stress_merge import SETTINGS, Setting
from tests.support import checkpoint_files as cp
from tests.support.file_layer import Call, intercepted, killed_before, recorded
from tests.support.macos_errors import ENOTSUP, as_on_macos
from tests.support.power_failure import after_failures, put
from tnadapt.checkpoints import atomic_files as file_locks
from tnadapt.checkpoints import atomic_files as renaming
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.merge import _journal as partial_module
from tnadapt.checkpoints.merge import _journal as publishing
from tnadapt.checkpoints.merge import _journal as work_lock
from tnadapt.checkpoints.merge import _merge_checkpoint as job
from tnadapt.checkpoints.merge._journal import MergeJournal, partial
from tnadapt.checkpoints.merge._shards import Shard, Writer

from .merge_scene import TARGETS, Scene, content, plain_base, scene

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
PARTIAL = ".tnadapt-partial"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests synchronize often."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = shared / f"tnadapt-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def prepared(folder: Path, setting: Setting) -> Scene:
    where = scene(folder, setting.single)
    where.put(where.results[1] if setting.old else None)
    return where


# -- Order and power failures ------------------------------------------------------------------------


def published(calls: list[Call], out: Path) -> int:
    """The number of the step that puts the result in its place."""
    (found,) = [
        number for number, call in enumerate(calls)
        if (call.name in ("rename", "replace", "rename_new", "exchange", "link") and call.paths[1] == str(out))
        or (call.name == "exchange" and call.paths[0] == str(out))
    ]  # fmt: skip
    return found


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_everything_is_on_the_disk_before_it_is_published_and_the_name_after(setting: Setting, memory: Path) -> None:
    where = prepared(memory, setting)
    calls = recorded(lambda: where.merge(0, setting.old), setting.exchange)
    at = published(calls, where.out)
    before, after = calls[:at], calls[at + 1 :]

    made = Path(calls[at].paths[0])
    files = {made} if setting.single else {made / name for name in where.results[0]}
    assert all(
        str(made) in (call.paths[0], str(Path(call.paths[0]).parent)) or not setting.single for call in [calls[at]]
    )
    for path in files:
        steps = [call.name for call in before if call.paths[0] == str(path)]
        assert steps[0] == "create"
        assert steps[-1] == "fsync", f"{path.name} was written to after it was synchronized"
    folders = {path.parent for path in files} | ({made} if not setting.single else set())
    for folder in folders:
        last = [
            number for number, call in enumerate(before)
            if call.name in ("create", "mkdir") and Path(call.paths[0]).parent == folder
        ][-1]  # fmt: skip
        assert Call("fsync", (str(folder),)) in before[last:], f"{folder.name} was not synchronized"

    # The state no longer promises anything of `files`, on the disk, before they may be the old output.
    states = [number for number, call in enumerate(before) if call.paths[-1].endswith("state.json")]
    assert before[states[-1]].name == "replace"
    assert Call("fsync", (os.path.dirname(before[states[-1]].paths[1]),)) in before[states[-1] :]

    deletions = [number for number, call in enumerate(after) if call.name in ("unlink", "rmdir")]
    # Linking takes the old name away at once.
    first = deletions[1 if calls[at].name == "link" else 0]
    for folder in (where.out.parent, made.parent):
        assert Call("fsync", (str(folder),)) in after[:first], f"{folder.name} was not synchronized"


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_after_a_power_failure_it_is_the_old_one_or_the_new_one(setting: Setting, memory: Path) -> None:
    where = prepared(memory / "scene", setting)
    shutil.copytree(where.folder, memory / "start")
    old = where.results[1] if setting.old else None
    calls = recorded(lambda: where.merge(0, setting.old), setting.exchange)
    states: dict[int, tuple[int, dict[str, Any]]] = {}
    for number, tree in after_failures(calls, where.folder, memory / "start"):
        own = {name: node for name, node in tree.items() if name.startswith("out")}
        states[hash(frozenset(own.items()))] = number, own
    assert len(states) > len(calls) // 2
    every = list(states.values())
    for number, tree in every if LONG else every[::3] + every[-12:]:
        where.clear()
        put(tree, where.folder)
        found = content(where.out)
        between = not setting.exchange and not setting.single and setting.old and found is None
        assert found in (old, where.results[0]) or between, calls[number - 1]
        if number == len(calls):
            assert found == where.results[0], "the merge returned, and its result was not there to stay"
        if found == where.results[0] and not setting.old:
            # Verified, or refused where nothing tells any more that it may be the result.
            with contextlib.suppress(tna.FileError):
                where.merge(0)
        else:
            where.merge(0, setting.old)
        assert content(where.out) == where.results[0]


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("single", [True, False])
def test_a_failing_disk_is_an_error_and_no_success(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = scene(tmp_path, single)
    real, count = os.fsync, len([call for call in recorded(lambda: where.merge(0)) if call.name == "fsync"])
    for failing in range(1, count + 1):
        where.clear()
        left = failing

        def fsync(handle: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise OSError(5, "Input/output error")
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(tna.FileError, match="Input/output error"):
            where.merge(0)
        monkeypatch.undo()
        assert content(where.out) in (None, where.results[0])
        try:
            where.merge(0)
        except tna.FileError as error:
            pytest.fail(f"fsync {failing}: {error}")
        assert content(where.out) == where.results[0]
        assert not where.beside.exists()


# -- Killed, and the user acts before the next merge ----------------------------------------------------


def killed_after_publishing(where: Scene, overwrite: bool, step: str) -> None:
    """A merge that is killed before its first step of that kind after publishing."""

    def due(call: Call, before: list[Call]) -> bool:
        return call.short.startswith(step) and any(str(where.out) in done.paths for done in before)

    killed_before(due, lambda: where.merge(0, overwrite))


@pytest.mark.law("merge-publishing")
def test_killed_while_cleaning_up_a_base_that_is_put_there_is_not_taken_for_the_result(tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    killed_after_publishing(where, False, "rename run-")
    assert content(where.out) == where.results[0]
    plain_base(where)
    with pytest.raises(tna.FileError, match="is not the output of an earlier run, which was killed during publishing"):
        where.merge(0)
    assert content(where.out) == content(where.base)
    where.merge(0, overwrite=True)
    assert content(where.out) == where.results[0]
    assert not where.beside.exists()


@pytest.mark.law("merge-publishing")
def test_killed_while_cleaning_up_a_result_that_is_whole_is_verified(tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    killed_after_publishing(where, False, "rename run-")
    assert content(where.out) == where.results[0]
    inode = where.out.stat().st_ino
    assert where.merge(0).files == 2
    assert where.out.stat().st_ino == inode, "it was whole, and not to be overwritten"
    assert not where.beside.exists()


@pytest.mark.law("merge-publishing")
@pytest.mark.parametrize("step", ["fsync", "rename files", "unlink", "rename run-"])
def test_killed_while_cleaning_up_the_old_output_never_comes_back(step: str, tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    where.put(where.results[1])
    killed_after_publishing(where, True, step)
    assert content(where.out) == where.results[0]
    where.out.rename(where.elsewhere)
    where.merge(0, overwrite=True)
    assert content(where.out) == content(where.elsewhere) == where.results[0]


@pytest.mark.law("merge-publishing")
def test_the_old_output_is_put_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    where.put(where.results[1])
    run = between_two_renames(where)
    assert content(where.out) is None
    assert content(run / "old") == where.results[1]

    def refused() -> None:
        # Whatever is wanted there next, and even if it fails.
        with pytest.raises(tna.FileError, match="already exists"):
            where.merge(1)

    calls = recorded(refused, exchange=False)
    at = next(number for number, call in enumerate(calls) if call.name == "rename" and call.paths[1] == str(where.out))
    assert calls[at + 1] == Call("fsync", (str(tmp_path),))
    assert content(where.out) == where.results[1]
    assert not where.beside.exists()


@pytest.mark.law("merge-publishing")
def test_what_was_created_between_two_renames_is_not_replaced_by_the_old_output(tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    where.put(where.results[1])
    between_two_renames(where)
    plain_base(where)
    for _ in range(2):
        with pytest.raises(tna.FileError, match=r"has been created while its previous content, now in .*, was being"):
            where.merge(0)
        assert content(where.out) == content(where.base)
        assert [content(old) for old in where.beside.glob("run-*/old")] == [where.results[1]]
    # Both were to be replaced, and are, but not before there is something else.

    def due(call: Call, before: list[Call]) -> bool:
        return call.name in ("rename", "exchange") and str(where.out) in call.paths

    killed_before(due, lambda: where.merge(0, overwrite=True))
    assert content(where.out) == content(where.base)
    assert [content(old) for old in where.beside.glob("run-*/old")] == [where.results[1]]
    where.merge(0, overwrite=True)
    assert content(where.out) == where.results[0]
    assert not where.beside.exists()


@pytest.mark.law("merge-publishing")
def test_killed_twice_while_the_files_are_made_again(tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    where.put(where.results[1])
    killed_after_publishing(where, True, "fsync")
    for step in ("create model", "write", "create .tnadapt"):
        killed_before(
            lambda call, before, step=step: call.short.startswith(step), lambda: where.merge(0, overwrite=True)
        )
    where.merge(0, overwrite=True)
    assert content(where.out) == where.results[0]
    assert not where.beside.exists()


def test_publishing_that_fails_on_a_disk_without_space_for_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = scene(tmp_path, single=False)
    full = OSError(28, "No space left on device")
    real, failed = partial_module.replace_file, False

    def place(*arguments: Any) -> None:
        nonlocal failed
        failed = True
        raise full

    def write(path: str, piece: bytes) -> None:
        if failed:
            raise full
        real(path, piece)

    monkeypatch.setattr(partial_module, "place", place)
    monkeypatch.setattr(partial_module, "replace_file", write)
    with pytest.raises(tna.FileError, match="No space left on device"):
        where.merge(0)
    monkeypatch.undo()
    where.merge(0)
    assert content(where.out) == where.results[0]
    assert not where.beside.exists()


def between_two_renames(where: Scene) -> Path:
    """As a kill between the two renames of a system without renameat2 leaves it; the run folder."""

    def due(call: Call, before: list[Call]) -> bool:
        return call.name == "rename" and call.paths[1] == str(where.out)

    killed_before(due, lambda: where.merge(0, overwrite=True), exchange=False)
    (run,) = where.beside.glob("run-*")
    return run


@pytest.mark.law("merge-killed", "merge-races")
def test_kills_and_races_in_short(memory: Path) -> None:
    command = [sys.executable, "-m", "tests.stress_merge", "--folder", str(memory)]
    command += ["--kills", "3000" if LONG else "32", "--seconds", "1800" if LONG else "5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3], env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n0 wrong\n")


# -- Locks ------------------------------------------------------------------------------------------------


@pytest.mark.law("merge-races")
def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path / f"out{PARTIAL}")
    real, locked = file_locks.lock, list[int]()

    def lock(handle: int, wait: bool = False) -> bool:
        if not locked:
            # Its holder finishes right now: deletes the file, and lets go.
            shutil.rmtree(root)
        locked.append(os.fstat(handle).st_ino)
        return real(handle, wait)

    monkeypatch.setattr(work_lock, "lock", lock)
    with work_lock.work_lock(root):
        assert len(locked) == 2
        assert os.stat(os.path.join(root, "lock")).st_ino == locked[1]
        with (
            pytest.raises(
                tna.FileError, match=rf"another process is writing {root} \(process {os.getpid()} on .+\): wait"
            ),
            work_lock.work_lock(root),
        ):
            pass


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000000002a00000001", "._lock"])
def test_names_that_the_system_puts_beside_unfinished_work_are_left_alone(tmp_path: Path, name: str) -> None:
    where = scene(tmp_path, single=False)
    where.beside.mkdir()
    (where.beside / name).write_text("the system's")
    for number in range(2):
        where.merge(number, overwrite=True)
        assert content(where.out) == where.results[number]
        assert [path.name for path in where.beside.iterdir()] == [name]


def test_the_folder_of_unfinished_work_is_deleted_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients rename a file that is open when it is deleted, and delete it once it is closed."""
    where = scene(tmp_path, single=False)
    unlink, close = os.unlink, os.close
    kept = where.beside / ".nfs0001"

    def nfs_unlink(path: Any, **settings: Any) -> None:
        if str(path) == str(where.beside / "lock"):
            os.rename(path, kept)
        else:
            unlink(path, **settings)

    def nfs_close(handle: int) -> None:
        last = kept.exists() and os.path.samestat(os.fstat(handle), os.stat(kept))
        close(handle)
        if last:
            unlink(kept)

    monkeypatch.setattr(os, "unlink", nfs_unlink)
    monkeypatch.setattr(os, "close", nfs_close)
    where.merge(0)
    assert content(where.out) == where.results[0]
    assert not where.beside.exists()


@pytest.mark.law("merge-races")
def test_one_that_waited_for_a_lock_and_one_that_came_later_do_not_work_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a race of four processes: the file had tensors of two adapters."""
    where = scene(tmp_path, single=True, adapters=3)
    opened, finished, at_work, done = (threading.Event() for _ in range(4))
    real_lock, real_remove, real_run = work_lock.lock, MergeJournal.remove, job.Job.run
    results: dict[str, str] = {}

    def lock(handle: int, wait: bool = False) -> bool:
        if threading.current_thread().name == "second":
            opened.set()
            assert finished.wait(30)
        return real_lock(handle, wait)

    def remove(work: MergeJournal) -> None:
        if threading.current_thread().name == "first":
            second.start()
            assert opened.wait(30)
        real_remove(work)

    def run(job: job.Job, *arguments: Any) -> None:
        if threading.current_thread().name == "second":
            at_work.set()
            assert done.wait(30)
        real_run(job, *arguments)

    def merge(number: int) -> None:
        try:
            where.merge(number, overwrite=True)
            results[threading.current_thread().name] = "made"
        except tna.FileError as error:
            results[threading.current_thread().name] = str(error)

    monkeypatch.setattr(work_lock, "lock", lock)
    monkeypatch.setattr(MergeJournal, "remove", remove)
    monkeypatch.setattr(job.Job, "run", run)
    first, second, third = (
        threading.Thread(target=merge, args=(number,), name=name)
        for number, name in enumerate(["first", "second", "third"])
    )
    first.start()
    first.join()
    finished.set()
    assert at_work.wait(30)
    third.start()
    third.join()
    done.set()
    second.join()
    assert results.pop("third").startswith(f"{where.out}: another process is writing")
    assert results == {"first": "made", "second": "made"}
    assert content(where.out) == where.results[1]


@pytest.mark.parametrize("late", ["what is done meanwhile", "the last file"])
def test_what_fails_when_all_is_written_is_an_error(late: str, tmp_path: Path) -> None:
    where, written, made = scene(tmp_path, single=True), threading.Event(), tmp_path / "made"
    checkpoint = open_checkpoint(where.base)
    (file,) = checkpoint.files

    def failing() -> None:
        assert written.wait(60)
        raise FileNotFoundError(late)

    def finished() -> None:
        written.set()
        if late == "the last file":
            raise FileNotFoundError(late)

    shard = Shard(file, str(made), {}, {}, finished)
    with pytest.raises(FileNotFoundError, match=late):
        Writer(checkpoint, lambda count: None).write([shard], failing if late != "the last file" else None)
    assert made.read_bytes() == Path(file).read_bytes()


@pytest.mark.parametrize("single", [True, False])
def test_a_system_that_has_no_locks_is_left_as_tidy(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locks, "HAS_LOCKS", False)
    monkeypatch.setattr(work_lock, "HAS_LOCKS", False)
    where = scene(tmp_path, single)
    where.merge(0)
    assert content(where.out) == where.results[0]
    assert not where.beside.exists()
    with work_lock.work_lock(str(tmp_path / "work")):
        assert (tmp_path / "work").is_dir()
    (tmp_path / "work" / "theirs").touch()
    with pytest.raises(tna.FileError, match="is in the way"), work_lock.work_lock(str(tmp_path / "work")):
        pass
    # One that is stopped after it has finished a file leaves that one, and the next goes on.
    done = MergeJournal.finished

    def stopped(work: MergeJournal, name: str) -> None:
        done(work, name)
        raise KeyboardInterrupt

    monkeypatch.setattr(MergeJournal, "finished", stopped)
    with pytest.raises(KeyboardInterrupt):
        where.merge(1, overwrite=True)
    assert where.beside.exists()
    monkeypatch.setattr(MergeJournal, "finished", done)
    assert where.merge(1, overwrite=True).resumed >= 1
    assert content(where.out) == where.results[1]
    assert not where.beside.exists()


@pytest.mark.law("merge-races")
@pytest.mark.parametrize("single", [True, False])
def test_without_locks_one_that_comes_later_takes_over_and_the_first_one_says_so(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locks.fcntl, "flock", lambda handle, operation: None)
    where, taken = scene(tmp_path, single), False

    def second(done: int, total: int) -> None:
        nonlocal taken
        if not taken:
            taken = True
            where.merge(1, overwrite=True)

    with pytest.raises(tna.FileError, match="were removed, or taken over by another process: run it again"):
        tna.merge(where.base, where.adapters[0], where.out, overwrite=True, progress=second)
    assert taken
    assert content(where.out) == where.results[1]
    assert not where.beside.exists()


@pytest.mark.law("merge-races")
@pytest.mark.parametrize("step", ["mkdir files", "create model", "fsync model", "replace ", "rename_new", "exchange"])
def test_taken_over_at_any_step_nothing_of_the_first_one_is_published(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locks.fcntl, "flock", lambda handle, operation: None)
    where = scene(tmp_path, single=False)
    where.put(where.results[1])
    seen = False

    def before(call: Call) -> None:
        nonlocal seen
        if not seen and call.short.startswith(step):
            seen = True
            with partial(str(where.out), {"another": "work"}, lambda path: None):
                pass

    with pytest.raises(tna.FileError, match="were removed, or taken over"), intercepted(before):
        where.merge(0, overwrite=True)
    assert seen
    assert content(where.out) == where.results[1]


@pytest.mark.law("merge-races")
def test_taken_over_as_it_takes_over_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_locks.fcntl, "flock", lambda handle, operation: None)
    where = scene(tmp_path, single=False)

    def due(call: Call, before: list[Call]) -> bool:
        return [done.name for done in before].count("replace") == 1 and call.name == "create"

    killed_before(due, lambda: where.merge(0))
    assert len(list(where.beside.glob("run-*/files/*.safetensors"))) == 2  # one of them is unfinished
    seen = False

    def before(call: Call) -> None:
        nonlocal seen
        if not seen and call.short.startswith("unlink trash-"):
            seen = True
            with partial(str(where.out), {"another": "work"}):
                pass

    with pytest.raises(tna.FileError, match="were removed, or taken over"), intercepted(before):
        where.merge(0)
    assert seen
    assert not where.out.exists()
    where.merge(0)
    assert content(where.out) == where.results[0]


def test_the_lock_of_the_next_one_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = scene(tmp_path, single=False)
    other = cp.write(tmp_path / "other", cp.base(TARGETS, seed=9))
    tensors = cp.base(TARGETS)
    tna.save(tmp_path / "adapter", cp.adapter(tna.presets.lora(2), TARGETS, tensors))
    real, stack = MergeJournal.remove, contextlib.ExitStack()

    def remove(work: MergeJournal) -> None:
        first = not work.removed
        real(work)
        if first:
            stack.enter_context(work_lock.work_lock(work.root))  # the next one comes at once

    monkeypatch.setattr(MergeJournal, "remove", remove)
    with pytest.raises(tna.FileError, match="is another base model"):
        tna.merge(other, tmp_path / "adapter", where.out)
    with stack:
        assert (where.beside / "lock").exists()


@pytest.mark.law("merge-races")
@pytest.mark.parametrize("single", [True, False])
def test_with_overwrite_false_one_of_many_threads_wins(single: bool, tmp_path: Path) -> None:
    where = scene(tmp_path, single, adapters=4)
    for _ in range(30 if LONG else 3):
        said: dict[int, str] = {}
        together = threading.Barrier(4)

        def merge(number: int, said: dict[int, str] = said, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                where.merge(number)
                said[number] = "made"
            except tna.FileError as error:
                said[number] = str(error)

        threads = [threading.Thread(target=merge, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [number for number, words in said.items() if words == "made"]
        assert content(where.out) == where.results[winner]
        told = ("another process is writing", "already exists", "other processes are writing")
        assert all(any(words in one for words in told) for one in said.values() if one != "made"), said
        assert not where.beside.exists()
        where.clear()


def test_the_folder_beside_is_not_taken_if_it_is_somebody_else_s(tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    for make in (
        lambda: (where.beside.mkdir(), (where.beside / "thesis.txt").write_text("")),
        lambda: (where.beside.mkdir(), (where.beside / "run-1").mkdir()),
        lambda: (where.beside.mkdir(), os.mkfifo(where.beside / "lock")),
        lambda: where.beside.write_text("a file"),
        lambda: where.beside.symlink_to(tmp_path / "elsewhere"),
        lambda: os.mkfifo(where.beside),
    ):
        make()
        with pytest.raises(
            tna.FileError, match="is in the way, and is not an unfinished merge: remove it, or choose another"
        ):
            where.merge(0)
        assert os.path.lexists(where.beside)
        where.clear()


# -- What is there by the time of publishing -----------------------------------------------------------------


# os.replace cannot be undone: only a system that can exchange two names can look at a file that it has replaced.
@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize(("single", "exchange"), [(True, True), (False, True), (False, False)])
def test_what_takes_the_name_at_the_last_moment_is_not_lost(
    single: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = scene(tmp_path, single)
    where.put(where.results[1])
    real, real_renameat2, swapped = publishing._replace, renaming._renameat2, False

    def replace(*arguments: Any) -> None:
        nonlocal swapped
        if not swapped:
            swapped = True
            where.out.rename(where.elsewhere)
            if single:
                os.mkfifo(where.out)
            else:
                where.out.mkdir()
                (where.out / "thesis.txt").write_text("the only copy")
        real(*arguments)

    monkeypatch.setattr(publishing, "_replace", replace)
    if not exchange:
        monkeypatch.setattr(renaming, "_renameat2", lambda *arguments: False)
    with pytest.raises(tna.FileError, match="and is not overwritten"):
        where.merge(0, overwrite=True)
    assert swapped
    assert content(where.out) == ({"thesis.txt": b"the only copy"} if not single else b"something that is no file")
    monkeypatch.setattr(renaming, "_renameat2", real_renameat2)
    where.out.rename(where.refused)
    assert where.merge(0).resumed == (1 if single else 2), "what was finished was lost"
    assert content(where.out) == where.results[0]


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_with_overwrite_false_what_comes_to_be_meanwhile_stays(single: bool, exchange: bool, memory: Path) -> None:
    where = scene(memory, single)
    other = where.results[1]

    def before(call: Call) -> None:
        # Right before the name is taken, after all that looks whether it is free.
        if call.name in ("rename_new", "link") and call.paths[1] == str(where.out) and not where.out.exists():
            where.put(other)
        if call.name == "rename" and call.paths[1] == str(where.out) and not where.out.exists():
            where.put(other)

    with intercepted(before, exchange=exchange), pytest.raises(tna.FileError, match="was created during the merge"):
        where.merge(0)
    assert content(where.out) == other
    where.out.rename(where.elsewhere)
    assert where.merge(0).resumed == (1 if single else 2)


# -- Renames -----------------------------------------------------------------------------------------------


def system_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renaming, "_renameat2", lambda *arguments: False)


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize("way", ["renameat2", "links", "neither"])
@pytest.mark.parametrize("there", ["file", "folder", "full folder", "dangling link", "pipe"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_new_name_is_never_taken_from_anything(
    what: str, there: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "renameat2":
        system_without(monkeypatch)
    if way == "neither":
        monkeypatch.setattr(os, "link", lambda *arguments, **settings: (_ for _ in ()).throw(OSError(1, "EPERM")))
    source, target = tmp_path / "source", tmp_path / "target"
    if what == "folder":
        source.mkdir()
        (source / "inside").write_text("1")
    else:
        source.write_text("1")
    {
        "file": lambda: target.write_text("2"),
        "folder": target.mkdir,
        "full folder": lambda: (target.mkdir(), (target / "inside").write_text("2")),
        "dangling link": lambda: target.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(target),
    }[there]()
    before = os.lstat(target).st_ino
    with pytest.raises(FileExistsError):
        renaming.rename_new(str(source), str(target))
    assert os.lstat(target).st_ino == before
    assert source.exists()
    renaming.rename_new(str(source), str(tmp_path / "free"))
    assert not source.exists()
    assert (tmp_path / "free").exists()


def test_a_file_system_without_links_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = as_on_macos(monkeypatch, "tnadapt.checkpoints.atomic_files")

    def link(*arguments: Any, **settings: Any) -> None:
        raise OSError(ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(module, "_renameat2", lambda *arguments: False)
    (tmp_path / "a").write_text("1")
    module.rename_new(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "1"
    assert not (tmp_path / "a").exists()


def test_a_call_that_a_file_system_lacks_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = as_on_macos(monkeypatch, "tnadapt.checkpoints.atomic_files")

    def call(*arguments: Any) -> int:
        ctypes.set_errno(ENOTSUP)
        return -1

    monkeypatch.setattr(module, "_system_call", lambda: call)
    assert not module.exchange(str(tmp_path / "a"), str(tmp_path / "b"))


def test_where_names_cannot_be_exchanged_it_says_so_and_other_failures_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError):
        renaming.exchange(str(tmp_path / "a"), str(tmp_path / "missing"))
    if not renaming.exchange(str(tmp_path / "a"), str(tmp_path / "b")):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a").is_dir()
    assert (tmp_path / "b").read_text() == "1"
    monkeypatch.setattr(renaming, "_system_call", lambda: None)
    assert not renaming.exchange(str(tmp_path / "a"), str(tmp_path / "b"))


# -- Inputs that change -------------------------------------------------------------------------------------


@pytest.mark.law("merge-disk-faults")
def test_an_adapter_that_is_replaced_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tnadapt.checkpoints.merge import _merge_checkpoint

    where = scene(tmp_path, single=False)
    real, other = _merge_checkpoint.load, tna.load(where.adapters[1])

    def load(path: str) -> tna.AdapterFile:
        found = real(path)
        tna.save(path, other)
        return found

    monkeypatch.setattr(_merge_checkpoint, "load", load)
    with pytest.raises(tna.FileError, match=f"^{where.adapters[0]}: was changed while it was read: run it again"):
        where.merge(0)
    assert not where.beside.exists()


@pytest.mark.law("merge-disk-faults")
def test_a_base_that_is_replaced_after_its_header_was_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tnadapt.checkpoints.merge import _merge_checkpoint

    where = scene(tmp_path, single=True)
    real = _merge_checkpoint.resolve

    def place(*arguments: Any) -> Any:
        replace_file(str(where.base), where.base.read_bytes())
        return real(*arguments)

    monkeypatch.setattr(_merge_checkpoint, "resolve", place)
    with pytest.raises(tna.FileError, match="was changed while it was merged: run it again"):
        where.merge(0)
    assert not where.out.exists()
    assert not where.beside.exists()


# -- Publishing by itself ---------------------------------------------------------------------------------------------


def test_a_name_that_is_created_and_removed_forever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").write_text("new")
    tries = []

    def taken(source: str, target: str) -> None:
        tries.append(target)
        raise FileExistsError(target)

    def gone(*names: str) -> None:
        raise FileNotFoundError(names[0])

    monkeypatch.setattr(publishing, "rename_new", taken)
    monkeypatch.setattr(publishing, "exchange", gone)
    out, aside = str(tmp_path / "out"), str(tmp_path / "aside")
    with pytest.raises(tna.FileError, match="is created and removed by something else again and again: choose another"):
        publishing.place(str(tmp_path / "made"), out, aside, lambda path: None)
    assert 10 <= len(tries) <= 1000
    assert (tmp_path / "made").read_text() == "new"
    # Where what was made is gone itself, that is the error.
    (tmp_path / "made").unlink()
    with pytest.raises(FileNotFoundError):
        publishing.place(str(tmp_path / "made"), out, aside, lambda path: None)


def test_what_was_replaced_and_may_not_be_goes_back_even_if_the_name_is_free_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").write_text("new")
    (tmp_path / "out").write_text("somebody's")
    asked = []

    def refusal(path: str) -> str | None:
        asked.append(path)
        if len(asked) == 1:
            return None
        (tmp_path / "out").unlink()  # by somebody else, after the exchange
        return "is somebody's"

    with pytest.raises(tna.FileError, match="is somebody's"):
        publishing.place(str(tmp_path / "made"), str(tmp_path / "out"), str(tmp_path / "aside"), refusal)
    assert (tmp_path / "out").read_text() == "somebody's"

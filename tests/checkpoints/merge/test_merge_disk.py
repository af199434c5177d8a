"""Merges on disk: order of steps, power failures, kills, and concurrent merges."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import io
import itertools
import json
import os
import re
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
from tests.support.depth import LONG
from tests.support.file_layer import Call, intercepted, killed_before, recorded
from tests.support.macos_errors import ENOTSUP, as_on_macos
from tests.support.power_failure import after_failures, put

from ..internals import atomic_files, journal, merge_job, shards
from ..test_atomic_files import raising
from . import merge_scene
from .merge_scene import Scene, content, scene

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")


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


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_after_a_power_failure_it_is_the_old_one_or_the_new_one(setting: Setting, memory: Path) -> None:
    where = scene(memory / "scene", setting.single)
    old = setting.prepare(where)
    shutil.copytree(where.folder, memory / "start")
    calls = recorded(lambda: where.merge(0, setting.old), setting.exchange)
    states: dict[int, tuple[int, dict[str, Any]]] = {}
    for number, tree in after_failures(calls, where.folder, memory / "start"):
        own = {name: node for name, node in tree.items() if name.startswith("out")}
        states[hash(frozenset(own.items()))] = number, own
    assert len(states) > len(calls) // 2
    every = list(states.values())
    for number, tree in every if LONG else every[::2] + every[-12:]:
        where.clear()
        put(tree, where.folder)
        found = setting.left(where, old)
        if number == len(calls):
            assert found == where.results[0], "the merge returned, and its result was not there to stay"
        if found == where.results[0] and not setting.old:
            # Verified, or refused where nothing tells any more that it may be the result.
            with contextlib.suppress(tna.FileError):
                where.merge(0)
            assert content(where.out) == where.results[0]
        else:
            where.finish(overwrite=setting.old)


@pytest.mark.law("power-failure", "merge-disk-faults")
@pytest.mark.parametrize("single", [True, False])
def test_a_failing_disk_is_an_error_and_no_success(single: bool, tmp_path: Path) -> None:
    where = scene(tmp_path, single)
    calls = recorded(lambda: where.merge(0))
    published = next(number for number, call in enumerate(calls) if str(where.out) in call.paths)
    naming = ("create", "rename", "rename_new", "replace", "exchange", "link")
    steps_of_data = [number for number, call in enumerate(calls) if call.name in ("fsync", "write", "copy")]
    for failing in [*steps_of_data, None]:  # None: no space from publishing on, and so none for the state, either
        where.clear()
        error = OSError(28, "No space left on device") if failing is None else OSError(5, "Input/output error")
        steps = itertools.count()

        def before(call: Call, failing: int | None = failing, error: OSError = error, steps: Any = steps) -> None:
            number = next(steps)
            if number == failing or (failing is None and number >= published and call.name in naming):
                raise error

        with pytest.raises(tna.FileError, match=error.strerror), intercepted(before):
            where.merge(0)
        assert content(where.out) in (None, where.results[0])
        where.finish(overwrite=False)


def killed_after_publishing(where: Scene, overwrite: bool, step: str) -> None:
    """A merge that is killed before its first step of that kind after publishing."""

    def due(call: Call, before: list[Call]) -> bool:
        return call.short.startswith(step) and any(str(where.out) in done.paths for done in before)

    killed_before(due, lambda: where.merge(0, overwrite))
    assert content(where.out) == where.results[0]


@pytest.mark.law("merge-killed")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_killed_before_any_step_the_next_merge_goes_on(setting: Setting, memory: Path) -> None:
    where = scene(memory, setting.single)
    old = setting.prepare(where)
    steps = len(recorded(lambda: where.merge(0, setting.old), setting.exchange))
    for number in range(steps):
        setting.prepare(where)
        killed_before(
            lambda call, before, number=number: len(before) == number,
            lambda: where.merge(0, setting.old),
            setting.exchange,
        )
        setting.left(where, old)
        states = [json.loads(state.read_text()) for state in where.beside.glob("run-*/state.json")]
        done = [name for state in states for name in state["done"]]
        assert where.finish().resumed == len(done) or not done


def renamed(where: Scene) -> None:
    (where.out / "config.json").rename(where.elsewhere)


def replaced_by_a_link(where: Scene) -> None:
    renamed(where)
    (where.out / "config.json").symlink_to(where.elsewhere)


def replaced_by_a_folder(where: Scene) -> None:
    renamed(where)
    (where.out / "config.json").mkdir()


@pytest.mark.law("merge-publishing")
@pytest.mark.parametrize(
    "change",
    [merge_scene.plain_base, merge_scene.half_deleted, merge_scene.one_byte_flipped, merge_scene.a_file_added,
     merge_scene.other_result, merge_scene.precious, replaced_by_a_link, replaced_by_a_folder, renamed],
)  # fmt: skip
def test_killed_while_cleaning_up_what_is_changed_is_not_taken_for_the_result(change: Any, tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    killed_after_publishing(where, False, "rename run-")
    change(where)
    changed = content(where.out)
    with pytest.raises(tna.FileError, match="is not the output of an earlier run, which was killed during publishing"):
        where.merge(0)
    assert content(where.out) == changed
    if change is merge_scene.plain_base:
        where.finish()
    else:
        where.out.rename(where.refused)
        where.finish(overwrite=False)


@pytest.mark.law("merge-publishing")
def test_killed_while_cleaning_up_a_whole_result_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = scene(tmp_path, single=False)
    for piece in (shards._PIECE, 3):
        killed_after_publishing(where, False, "rename run-")
        monkeypatch.setattr(shards, "_PIECE", piece)
        inode = where.out.stat().st_ino
        assert where.merge(0).files == 2
        assert where.out.stat().st_ino == inode, "it was whole, and not to be overwritten"
        assert not where.beside.exists()
        where.clear()


@pytest.mark.law("merge-publishing")
@pytest.mark.parametrize("step", ["fsync", "rename files", "unlink", "rename run-"])
def test_killed_while_cleaning_up_the_old_output_never_comes_back(step: str, tmp_path: Path) -> None:
    where = scene(tmp_path, single=False)
    where.put(where.results[1])
    killed_after_publishing(where, True, step)
    where.out.rename(where.elsewhere)
    # Killed again while the files are made again.
    for again in ("create model", "write", "create .tnadapt"):
        killed_before(
            lambda call, before, again=again: call.short.startswith(again), lambda: where.merge(0, overwrite=True)
        )
    where.finish()
    assert content(where.elsewhere) == where.results[0]


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
    merge_scene.plain_base(where)
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
    where.finish()


def between_two_renames(where: Scene) -> Path:
    """As a kill between the two renames of a system without renameat2 leaves it; the run folder."""

    def due(call: Call, before: list[Call]) -> bool:
        return call.name == "rename" and call.paths[1] == str(where.out)

    killed_before(due, lambda: where.merge(0, overwrite=True), exchange=False)
    (run,) = where.beside.glob("run-*")
    return run


@pytest.mark.law("merge-killed", "merge-races")
def test_kills_and_races_in_short(memory: Path) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.stress_merge", "--folder", str(memory)]
    command += ["--kills", "3000" if LONG else "32", "--seconds", "1800" if LONG else "5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n0 wrong\n")


@pytest.mark.law("merge-races")
def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a race of four processes: the file had tensors of two adapters."""
    root = str(tmp_path / "out.tnadapt-partial")
    real, locked = atomic_files.lock, list[int]()

    def lock(handle: int, wait: bool = False) -> bool:
        if not locked:
            # Its holder finishes right now: deletes the file, and lets go.
            shutil.rmtree(root)
        locked.append(os.fstat(handle).st_ino)
        return real(handle, wait)

    monkeypatch.setattr(atomic_files, "lock", lock)
    why = rf"another process is writing {root}: wait"
    with journal.work_lock(root):
        assert len(locked) == 2
        assert os.stat(os.path.join(root, "lock")).st_ino == locked[1]
        with pytest.raises(tna.FileError, match=why), journal.work_lock(root):
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
    where.finish(overwrite=False)


@pytest.mark.parametrize("single", [True, False])
def test_a_system_that_has_no_locks_is_left_as_tidy(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "HAS_LOCKS", False)
    where = scene(tmp_path, single)
    where.finish(overwrite=False)
    with journal.work_lock(str(tmp_path / "work")):
        assert (tmp_path / "work").is_dir()
    (tmp_path / "work" / "theirs").touch()
    with pytest.raises(tna.FileError, match="is in the way"), journal.work_lock(str(tmp_path / "work")):
        pass
    # One that is stopped before it publishes leaves what it has finished, and the next goes on.

    def before(call: Call) -> None:
        if call.name in ("exchange", "replace") and str(where.out) in call.paths:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intercepted(before):
        where.merge(1, overwrite=True)
    assert where.beside.exists()
    assert where.finish(1).resumed >= 1


def taking_over(where: Scene, step: str) -> None:
    """Another process without locks takes over the unfinished work before the first step that begins like this."""
    seen: list[Call] = []

    def before(call: Call) -> None:
        if not seen and call.short.startswith(step):
            seen.append(call)
            with journal.partial(str(where.out), {"another": "work"}, lambda path: None):
                pass

    with pytest.raises(tna.FileError, match="were removed, or taken over"), intercepted(before):
        where.merge(0, overwrite=True)
    assert seen


@pytest.mark.law("merge-races")
@pytest.mark.parametrize("step", ["mkdir files", "create model", "fsync model", "replace ", "rename_new", "exchange"])
def test_taken_over_at_any_step_nothing_of_the_first_one_is_published(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files.fcntl, "flock", lambda handle, operation: None)
    where = scene(tmp_path, single=False, adapters=3)
    where.put(where.results[1])
    taking_over(where, step)
    assert content(where.out) == where.results[1]
    where.finish(2)


@pytest.mark.law("merge-races")
def test_taken_over_as_it_takes_over_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files.fcntl, "flock", lambda handle, operation: None)
    where = scene(tmp_path, single=False)

    def due(call: Call, before: list[Call]) -> bool:
        return [done.name for done in before].count("replace") == 1 and call.name == "create"

    killed_before(due, lambda: where.merge(0))
    assert len(list(where.beside.glob("run-*/files/*.safetensors"))) == 2  # one of them is unfinished
    taking_over(where, "unlink trash-")
    assert not where.out.exists()
    where.finish(overwrite=False)


@pytest.mark.law("merge-races")
@pytest.mark.parametrize("single", [True, False])
def test_with_overwrite_false_one_of_many_threads_wins(single: bool, tmp_path: Path) -> None:
    where = scene(tmp_path, single, adapters=4)
    told = ("another process is writing", "already exists", "other processes are writing")
    together = threading.Barrier(4)

    def attempt(number: int) -> str:
        together.wait()
        try:
            where.merge(number)
        except tna.FileError as error:
            return next((words for words in told if words in str(error)), f"WRONG {error}")
        return "made"

    for _ in range(30 if LONG else 3):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            said = list(pool.map(attempt, range(4)))
        assert said.count("made") == 1
        assert set(said) <= {"made", *told}
        assert content(where.out) == where.results[said.index("made")]
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
        why = "is in the way, and is not an unfinished merge: remove it, or choose another"
        with pytest.raises(tna.FileError, match=why):
            where.merge(0)
        assert os.path.lexists(where.beside)
        where.clear()


# os.replace cannot be undone: only a system that can exchange two names can look at a file that it has replaced.
@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize(("single", "exchange"), [(True, True), (False, True), (False, False)])
def test_what_takes_the_name_at_the_last_moment_is_not_lost(single: bool, exchange: bool, tmp_path: Path) -> None:
    where = scene(tmp_path, single)
    where.put(where.results[1])
    swapped: list[Call] = []

    def before(call: Call) -> None:
        if not swapped and call.name in ("exchange", "rename") and str(where.out) in call.paths:
            swapped.append(call)
            where.out.rename(where.elsewhere)
            (merge_scene.pipe if single else merge_scene.precious)(where)

    with intercepted(before, exchange=exchange), pytest.raises(tna.FileError, match="and is not overwritten"):
        where.merge(0, overwrite=True)
    assert swapped
    assert content(where.out) == ({"thesis.txt": b"the only copy"} if not single else b"something that is no file")
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
        taking = call.name in ("rename_new", "link", "rename") and call.paths[1] == str(where.out)
        if taking and not where.out.exists():
            where.put(other)

    with intercepted(before, exchange=exchange), pytest.raises(tna.FileError, match="was created during the merge"):
        where.merge(0)
    assert content(where.out) == other
    where.out.rename(where.elsewhere)
    assert where.merge(0).resumed == (1 if single else 2)


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize("way", ["renameat2", "links", "neither"])
@pytest.mark.parametrize("there", ["file", "folder", "full folder", "dangling link", "pipe"])
@pytest.mark.parametrize("what", ["file", "full folder"])
def test_a_new_name_is_never_taken_from_anything(
    what: str, there: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "renameat2":
        monkeypatch.setattr(atomic_files, "_renameat2", lambda *arguments: False)
    if way == "neither":
        monkeypatch.setattr(os, "link", raising(errno.EPERM))
    source, target = tmp_path / "source", tmp_path / "target"
    make = {
        "file": lambda path: path.write_text("1"),
        "folder": Path.mkdir,
        "full folder": lambda path: (path.mkdir(), (path / "inside").write_text("2")),
        "dangling link": lambda path: path.symlink_to("nowhere"),
        "pipe": os.mkfifo,
    }
    make[what](source)
    make[there](target)
    before = os.lstat(target).st_ino
    with pytest.raises(FileExistsError):
        atomic_files.rename_new(str(source), str(target))
    assert os.lstat(target).st_ino == before
    assert source.exists()
    atomic_files.rename_new(str(source), str(tmp_path / "free"))
    assert not source.exists()
    assert (tmp_path / "free").exists()


def test_where_names_cannot_be_exchanged_it_says_so_and_other_failures_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError):
        atomic_files.exchange(str(tmp_path / "a"), str(tmp_path / "missing"))
    if not atomic_files.exchange(str(tmp_path / "a"), str(tmp_path / "b")):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a").is_dir()
    assert (tmp_path / "b").read_text() == "1"
    monkeypatch.setattr(atomic_files, "_system_call", lambda: None)
    assert not atomic_files.exchange(str(tmp_path / "a"), str(tmp_path / "b"))


@pytest.mark.law("merge-disk-faults", "merge-links")
@pytest.mark.parametrize("what", ["adapter", "base", "another file"])
def test_an_input_that_changes_while_it_is_read_is_noticed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = scene(tmp_path, single=what != "another file")
    adapter = where.adapters[0]
    path, when, owner, step = {
        "adapter": (adapter, "read", merge_job, "load_single"),
        "base": (where.base, "merged", merge_job, "resolve"),  # after its header has been read
        "another file": (where.base / "config.json", r"merged \(config.json\)", merge_job.Job, "_copy_others"),
    }[what]
    real = getattr(owner, step)

    def replacing(*arguments: Any) -> Any:
        if what == "base":
            atomic_files.replace_file(str(path), path.read_bytes())
        elif what == "another file":  # which would be copied from outside of the checkpoint
            path.unlink()
            path.symlink_to(adapter)
        found = real(*arguments)
        if what == "adapter":
            shutil.copyfile(where.adapters[1], path)
        return found

    monkeypatch.setattr(owner, step, replacing)
    named = adapter if what == "adapter" else where.base
    with pytest.raises(tna.FileError, match=f"^{named}: was changed while it was {when}: run it again"):
        where.merge(0)
    assert not where.out.exists()
    assert what == "another file" or not where.beside.exists()


def test_a_name_that_is_created_and_removed_forever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").write_text("new")
    monkeypatch.setattr(atomic_files, "rename_new", raising(errno.EEXIST))
    monkeypatch.setattr(atomic_files, "exchange", raising(errno.ENOENT))
    out, aside = str(tmp_path / "out"), str(tmp_path / "aside")
    with pytest.raises(tna.FileError, match="is created and removed by something else again and again: choose another"):
        journal.place(str(tmp_path / "made"), out, aside, lambda path: None)
    assert (tmp_path / "made").read_text() == "new"
    # Where what was made is gone itself, that is the error.
    (tmp_path / "made").unlink()
    with pytest.raises(FileNotFoundError):
        journal.place(str(tmp_path / "made"), out, aside, lambda path: None)


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
        journal.place(str(tmp_path / "made"), str(tmp_path / "out"), str(tmp_path / "aside"), refusal)
    assert (tmp_path / "out").read_text() == "somebody's"


def opened_pair(folder: Path) -> tuple[Any, Any]:
    (folder / "source").write_bytes(b"0123456789")
    return open(folder / "source", "rb", buffering=0), open(folder / "target", "w+b", buffering=0)


def test_copying_fails_where_no_other_way_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = opened_pair(tmp_path)
    with source, target:
        with pytest.raises(tna.FileError, match="ended before its last tensor"):
            shards.copy_range(source, 5, target, 0, 6, lambda count: None)
        for number in (errno.ENOSPC, errno.EIO, errno.EFBIG):
            monkeypatch.setattr(shards, "_WAYS", [raising(number), shards._by_hand])
            with pytest.raises(OSError, match=re.escape(os.strerror(number))):
                shards.copy_range(source, 0, target, 0, 10, lambda count: None)


@pytest.mark.parametrize("number", [errno.EXDEV, ENOTSUP])
def test_what_the_kernel_cannot_copy_is_copied_by_hand(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = as_on_macos(monkeypatch, shards.__name__)
    monkeypatch.setattr(module, "_WAYS", [raising(number), module._by_hand])
    source, target = opened_pair(tmp_path)
    with source, target:
        module.copy_range(source, 2, target, 0, 5, lambda count: None)
    assert (tmp_path / "target").read_bytes() == b"23456"


def test_writing_takes_as_many_goes_as_it_needs(tmp_path: Path) -> None:
    class Slow(io.BytesIO):
        def write(self, content: Any) -> int:
            return super().write(bytes(content[:3]))

    slow: Any = Slow()
    shards.write_at(slow, 2, b"0123456789")
    assert slow.getvalue() == b"\0\x000123456789"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(__file__)
    for name, why in (("pipe", "is not a regular file"), ("link", "link")):
        with pytest.raises(OSError, match=why):
            shards.open_regular(str(tmp_path / name))
    os.close(shards.open_regular(__file__))


@pytest.mark.skipif(not atomic_files.HAS_LOCKS, reason="no advisory locks here")
def test_a_file_system_without_locks_counts_as_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "file", "w") as one, open(tmp_path / "file") as two:
        assert atomic_files.lock(one.fileno())
        assert not atomic_files.lock(two.fileno())
        atomic_files.unlock(one.fileno())
        assert atomic_files.lock(two.fileno())
        monkeypatch.setattr(atomic_files.fcntl, "flock", raising(errno.ENOLCK))
        assert atomic_files.lock(one.fileno())
        atomic_files.unlock(one.fileno())


@pytest.mark.skipif(not atomic_files.HAS_LOCKS, reason="no advisory locks here")
def test_the_lock_of_a_folder_that_is_always_deleted_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def deleted(path: Any, *rest: Any, **settings: Any) -> int:
        if os.path.dirname(path) == str(tmp_path / "work"):
            os.rmdir(tmp_path / "work")
        return plain(path, *rest, **settings)

    monkeypatch.setattr(os, "open", deleted)
    why = r"other processes are writing \S+ again and again"
    with pytest.raises(tna.FileError, match=why), journal.work_lock(str(tmp_path / "work")):
        pass
    assert not (tmp_path / "work").exists()

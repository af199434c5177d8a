"""Atomic writes of files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_layer import recorded
from tests.support.macos_errors import ENOTSUP, as_on_macos
from tests.support.power_failure import after_failures
from tnadapt import FileError
from tnadapt.checkpoints.atomic_files import atomic_write, replace_file


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"two", b""):
        replace_file(str(path), content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_who_may_read_it_is_the_umask_s_affair_and_the_old_file_s(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        replace_file(str(path), b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    replace_file(str(path), b"two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(target)
    replace_file(str(link), b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_relative_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_file("file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.law("full-disk")
@pytest.mark.parametrize(
    ("path", "why"),
    [("", "is a folder"), ("missing/file", "does not exist; make it first"), ("taken/file", "does not exist")],
)
def test_where_nothing_can_be_written(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "taken").write_bytes(b"a file, and no folder")
    with pytest.raises(FileError, match=why):
        replace_file(str(tmp_path / path), b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.law("no-overwrite")
def test_a_device_is_not_replaced() -> None:
    with pytest.raises(FileError, match="neither a file nor a folder"):
        replace_file(os.devnull, b"new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.law("killed-saving")
@pytest.mark.parametrize("step", ["open", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o604)  # another mode than a new file's

    def fail(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        replace_file(str(path), b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As FAT, SMB and some of FUSE are."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o604)

    def chmod(*arguments: Any, **settings: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "chmod", chmod)
    replace_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_mode_that_is_right_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(str(path), b"old")

    def chmod(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "chmod", chmod)
    replace_file(str(path), b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_that_cannot_be_synchronized_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = as_on_macos(monkeypatch, "tnadapt.checkpoints.atomic_files")

    def fsync(handle: int) -> None:
        raise OSError(ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "fsync", fsync)
    module.sync_folder(str(tmp_path))


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.law("full-disk")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    # A limit on the length of files, which writing meets half-way.
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
import resource, sys
from tnadapt.checkpoints.atomic_files import replace_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    replace_file(sys.argv[1], bytes(1 << 20))
except OSError as error:
    print(type(error).__name__)
"""
    assert run(code, str(path)).stdout == "OSError\n"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.law("killed-saving")
def test_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
import os, signal, sys
from tnadapt.checkpoints.atomic_files import replace_file
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
replace_file(sys.argv[1], b"new" * 1000)
"""
    assert run(code, str(path)).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


# -- Order ---------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")


@pytest.mark.law("power-failure")
@linux
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_content_is_on_the_disk_before_the_name_and_the_name_after(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "file"
    if overwrite:
        path.write_bytes(b"old")
    calls = recorded(lambda: replace_file(str(path), b"new", overwrite))
    made = calls[0].paths[0]
    assert [(call.name, call.paths) for call in calls] == [
        ("create", (made,)),
        ("fsync", (made,)),
        ("replace" if overwrite else "rename_new", (made, str(path))),
        ("fsync", (str(tmp_path),)),
    ]
    assert calls[1].content == b"new"


@pytest.mark.law("power-failure")
@linux
def test_after_a_power_failure_it_is_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").write_bytes(b"old")
    shutil.copytree(place, tmp_path / "start")
    calls = recorded(lambda: replace_file(str(place / "file"), b"new"))
    found = [(number, tree["file"]) for number, tree in after_failures(calls, place, tmp_path / "start")]
    assert {node[0] for _, node in found if node} == {b"old", b"new"}
    assert all(node and node[0] == b"new" for number, node in found if number == len(calls))


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize("there", ["file", "folder", "link", "pipe"])
def test_what_must_not_be_overwritten_is_not_even_if_it_came_meanwhile(tmp_path: Path, there: str) -> None:
    path = tmp_path / "file"
    make = {
        "file": lambda: path.write_bytes(b"theirs"),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(path),
    }[there]
    refused = pytest.raises(FileError, match=r"exists; give another path, or overwrite=True \(--overwrite\)")
    with refused, atomic_write(str(path), overwrite=False) as file:
        file.write(b"ours")
        make()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert not (path.is_file() and path.read_bytes() == b"ours")


@pytest.mark.law("no-overwrite")
def test_a_pipe_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    refused = pytest.raises(FileError, match="is neither a file nor a folder")
    with refused, atomic_write(str(path)) as file:
        file.write(b"ours")
        os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.law("power-failure")
def test_a_disk_that_cannot_keep_a_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fails = os.fsync, 5

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(fails, os.strerror(fails))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(str(tmp_path / "file"), b"new")
    fails = 22  # EINVAL: a file system that does not synchronize folders
    replace_file(str(tmp_path / "file"), b"newer")
    assert (tmp_path / "file").read_bytes() == b"newer"

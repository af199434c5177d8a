"""Atomic writes of files."""

from __future__ import annotations

import ctypes
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

from .internals import atomic_files

atomic_write, replace_file = atomic_files.atomic_write, atomic_files.replace_file


def test_who_may_read_it_is_the_umask_s_affair_and_the_old_file_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        replace_file("file", b"one")
    finally:
        os.umask(before)
    path = tmp_path / "file"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    for content in (b"two", b""):
        replace_file(str(path), content)
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
        assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(target)
    replace_file(str(link), b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


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


def raising(number: int) -> Any:
    def call(*arguments: Any, **settings: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As FAT, SMB and some of FUSE are."""
    path = tmp_path / "file"
    replace_file(str(path), b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", raising(errno.EIO))  # a mode that is right is not set
        replace_file(str(path), b"older")
    path.chmod(0o604)
    monkeypatch.setattr(os, "chmod", raising(number))
    replace_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_file_system_lacks_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = as_on_macos(monkeypatch, atomic_files.__name__)
    for name in ("fsync", "link"):
        monkeypatch.setattr(os, name, raising(ENOTSUP))

    def call(*arguments: Any) -> int:
        ctypes.set_errno(ENOTSUP)
        return -1

    monkeypatch.setattr(module, "_system_call", lambda: call)
    module.sync_folder(str(tmp_path))
    one, other = tmp_path / "a", tmp_path / "b"
    assert not module.exchange(str(one), str(other))
    one.write_text("1")
    module.rename_new(str(one), str(other))
    assert other.read_text() == "1"
    assert not one.exists()


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    replace_file(sys.argv[1], bytes(1 << 20))
except OSError as error:
    print(type(error).__name__)
"""
KILLED = """
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
replace_file(sys.argv[1], b"new" * 1000)
"""


@pytest.mark.law("full-disk", "killed-saving")
@pytest.mark.parametrize(("code", "said", "status"), [(FULL, "OSError\n", 0), (KILLED, "", -signal.SIGKILL)])
def test_a_full_disk_or_a_kill_leaves_the_old_file(tmp_path: Path, code: str, said: str, status: int) -> None:
    # The disk is full as a limit on the length of files makes it, which writing meets half-way.
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = f"import os, signal, sys\nfrom {atomic_files.__name__} import replace_file\n{code}"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (said, status)
    assert path.read_bytes() == b"old"
    if not status:
        assert list(tmp_path.iterdir()) == [path]


linux = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")


@pytest.mark.law("power-failure")
@linux
@pytest.mark.parametrize("overwrite", [True, False])
def test_after_a_power_failure_it_is_the_old_file_or_the_new_one(tmp_path: Path, overwrite: bool) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if overwrite:
        (place / "file").write_bytes(b"old")
    shutil.copytree(place, tmp_path / "start")
    calls = recorded(lambda: replace_file(str(place / "file"), b"new", overwrite))
    assert [call.name for call in calls] == ["create", "fsync", "replace" if overwrite else "rename_new", "fsync"]
    found = [(number, tree.get("file")) for number, tree in after_failures(calls, place, tmp_path / "start")]
    assert {node and node[0] for _, node in found} == {b"old" if overwrite else None, b"new"}
    assert all(node and node[0] == b"new" for number, node in found if number == len(calls))


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize(("there", "overwrite"), [("file", False), ("pipe", False), ("pipe", True)])
def test_what_must_not_be_overwritten_is_not_even_if_it_came_meanwhile(
    tmp_path: Path, there: str, overwrite: bool
) -> None:
    path = tmp_path / "file"
    why = r"exists; give another path, or overwrite=True \(--overwrite\)"
    refused = pytest.raises(FileError, match="is neither a file nor a folder" if overwrite else why)
    with refused, atomic_write(str(path), overwrite=overwrite) as file:
        file.write(b"ours")
        os.mkfifo(path) if there == "pipe" else path.write_bytes(b"theirs")
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_fifo() if there == "pipe" else path.read_bytes() == b"theirs"


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

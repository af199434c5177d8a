"""Bytes and files of a merge: copied by every method that the system has, compared, and locked."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.macos_errors import ENOTSUP, as_on_macos
from tnadapt import FileError
from tnadapt.checkpoints import atomic_files as file_locks
from tnadapt.checkpoints.merge import _shards as comparison
from tnadapt.checkpoints.merge import _shards as copying
from tnadapt.checkpoints.merge._journal import work_lock
from tnadapt.checkpoints.merge._shards import Stopped, copy_range, open_regular, same_content, write_at

# -- Copying of bytes between files by every method that the system has ------------------------------------------------


@given(st.data())
@pytest.mark.parametrize("way", range(len(copying._WAYS)))
def test_a_range_is_copied_and_nothing_else(
    way: int, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("case")
    content = bytes(range(256)) * 3
    start = data.draw(st.integers(0, len(content)))
    count = data.draw(st.integers(0, len(content) - start))
    at = data.draw(st.integers(0, 99))
    (folder / "source").write_bytes(content)
    (folder / "target").write_bytes(b"-" * 1000)
    copied: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_WAYS", [copying._WAYS[way]])
        patch.setattr(copying, "_KERNEL_PIECE", 100)
        patch.setattr(copying, "_PIECE", 100)
        with open(folder / "source", "rb", buffering=0) as a, open(folder / "target", "r+b", buffering=0) as b:
            copy_range(a, start, b, at, count, copied.append)
    expected = b"-" * at + content[start : start + count] + b"-" * (1000 - at - count)
    assert (folder / "target").read_bytes() == expected
    assert sum(copied) == count
    assert max(copied, default=0) <= 100


def files(folder: Path) -> tuple[Any, Any]:
    (folder / "source").write_bytes(b"0123456789")
    return open(folder / "source", "rb", buffering=0), open(folder / "target", "w+b", buffering=0)


def test_a_source_that_ends_too_soon(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    with source, target, pytest.raises(FileError, match="ended before its last tensor"):
        copy_range(source, 5, target, 0, 6, lambda count: None)


def test_it_stops_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_KERNEL_PIECE", 4)
    monkeypatch.setattr(copying, "_PIECE", 4)
    source, target = files(tmp_path)

    def stop(count: int) -> None:
        raise Stopped

    with source, target, pytest.raises(Stopped):
        copy_range(source, 0, target, 0, 10, stop)
    assert (tmp_path / "target").read_bytes() == b"0123"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_what_is_no_matter_of_the_way_is_not_tried_by_another(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def way(*arguments: Any) -> int:
        raise OSError(number, "it")

    monkeypatch.setattr(copying, "_WAYS", [way, copying._by_hand])
    source, target = files(tmp_path)
    with source, target, pytest.raises(OSError, match="it"):
        copy_range(source, 0, target, 0, 10, lambda count: None)


@pytest.mark.parametrize("number", [errno.ENOTSOCK, ENOTSUP])
def test_without_a_sendfile_for_files_they_are_copied_by_hand(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, whose sendfile takes sockets only."""
    module = as_on_macos(monkeypatch, "tnadapt.checkpoints.merge._shards")

    def sendfile(*arguments: Any) -> int:
        raise OSError(number, "not for files")

    monkeypatch.setattr(os, "sendfile", sendfile)
    monkeypatch.setattr(module, "_WAYS", [module._by_sendfile, module._by_hand])
    source, target = files(tmp_path)
    with source, target:
        module.copy_range(source, 2, target, 0, 5, lambda count: None)
    assert (tmp_path / "target").read_bytes() == b"23456"


def test_writing_takes_as_many_goes_as_it_needs(tmp_path: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.place, self.content = 0, bytearray(12)

        def seek(self, place: int) -> None:
            self.place = place

        def write(self, content: memoryview) -> int:
            some = bytes(content[:3])
            self.content[self.place : self.place + len(some)] = some
            self.place += len(some)
            return len(some)

    slow: Any = Slow()
    write_at(slow, 2, b"0123456789")
    assert bytes(slow.content) == b"\0\x000123456789"


# -- Comparison of files, and advisory locks ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_bytes(b"some bytes")
    return tmp_path


def test_folders_of_the_same_files_are_the_same(folder: Path) -> None:
    assert same_content(str(folder / "one"), str(folder / "two"))


def another_byte(place: Path) -> None:
    (place / "inner" / "file").write_bytes(b"some bytez")


def another_size(place: Path) -> None:
    (place / "inner" / "file").write_bytes(b"some bytes.")


def another_name(place: Path) -> None:
    (place / "inner" / "file").rename(place / "inner" / "other")


def one_more(place: Path) -> None:
    (place / "more").touch()


def a_link(place: Path) -> None:
    (place / "inner" / "file").rename(place.parent / "moved")
    (place / "inner" / "file").symlink_to(place.parent / "moved")


def a_pipe(place: Path) -> None:
    (place / "inner" / "file").unlink()
    os.mkfifo(place / "inner" / "file")


def a_folder(place: Path) -> None:
    (place / "inner" / "file").unlink()
    (place / "inner" / "file").mkdir()


def nothing(place: Path) -> None:
    (place / "inner" / "file").unlink()
    (place / "inner").rmdir()
    place.rmdir()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "change", [another_byte, another_size, another_name, one_more, a_link, a_pipe, a_folder, nothing]
)
def test_any_difference_is_one(folder: Path, change: Any, first: bool) -> None:
    if change is a_pipe and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    change(folder / ("one" if first else "two"))
    assert not same_content(str(folder / "one"), str(folder / "two"))


def test_a_file_of_many_pieces_is_compared_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_PIECE", 3)
    for end, same in ((b"z", False), (b"g", True)):
        (tmp_path / "one").write_bytes(b"abcdefg")
        (tmp_path / "two").write_bytes(b"abcdef" + end)
        assert same_content(str(tmp_path / "one"), str(tmp_path / "two")) is same


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        open_regular(str(tmp_path / "pipe"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="link"):
        open_regular(str(tmp_path / "link"))
    os.close(open_regular(str(tmp_path / "file")))


# -- Locks --------------------------------------------------------------------------------------


@pytest.mark.skipif(not file_locks.HAS_LOCKS, reason="no advisory locks here")
def test_a_file_system_without_locks_counts_as_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "file", "w") as one, open(tmp_path / "file") as two:
        assert file_locks.lock(one.fileno())
        assert not file_locks.lock(two.fileno())
        file_locks.unlock(one.fileno())
        assert file_locks.lock(two.fileno())

        def without(*_: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(file_locks.fcntl, "flock", without)
        assert file_locks.lock(one.fileno())
        file_locks.unlock(one.fileno())


def test_a_system_without_locks_makes_the_work_folder_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locks, "HAS_LOCKS", False)
    monkeypatch.setattr("tnadapt.checkpoints.merge._journal.HAS_LOCKS", False)
    with open(tmp_path / "file", "w") as file:
        assert file_locks.lock(file.fileno())
    root = str(tmp_path / "work")
    with work_lock(root), work_lock(root):
        assert os.path.isdir(root)
    (tmp_path / "work" / "mine").touch()
    with pytest.raises(FileError), work_lock(root):
        pass
    assert (tmp_path / "work" / "mine").exists()


@pytest.mark.skipif(not file_locks.HAS_LOCKS, reason="no advisory locks here")
def test_the_lock_of_a_folder_that_is_always_deleted_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def deleted(path: Any, *rest: Any, **settings: Any) -> int:
        if os.path.dirname(path) == str(tmp_path / "work"):
            os.rmdir(tmp_path / "work")
        return plain(path, *rest, **settings)

    monkeypatch.setattr(os, "open", deleted)
    with (
        pytest.raises(FileError, match=r"other processes are writing \S+ again and again"),
        work_lock(str(tmp_path / "work")),
    ):
        pass
    assert not (tmp_path / "work").exists()

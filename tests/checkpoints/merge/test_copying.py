"""Copying of bytes between files by every method that the system has."""

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
from tnadapt.checkpoints.merge import _shards as copying
from tnadapt.checkpoints.merge._shards import Stopped, copy_range, write_at


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

"""Replacing a converted adapter: old and new files never mix, wherever a kill or a disk error stops it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import tnadapt as tna
from tnadapt.convert import _files as files_module

from .conversions import made

NAMES = ("adapter_model.safetensors", "adapter_config.json")
# The same tensors' names and shapes, and other numbers and another scale: only the content tells them apart.
OLD, NEW = (made(tna.presets.lora(2, alpha=alpha), seed=alpha) for alpha in (1, 64))

Pair = tuple[bytes | None, ...]


def pair(folder: Path) -> Pair:
    return tuple((folder / name).read_bytes() if (folder / name).exists() else None for name in NAMES)


def written(file: tna.AdapterFile, folder: Path, **settings: Any) -> Path:
    tna.convert(file, to="peft-lora").save(folder, **settings)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Pair:
    return pair(written(OLD, tmp_path / "old"))


@pytest.fixture
def new(tmp_path: Path) -> Pair:
    return pair(written(NEW, tmp_path / "new"))


@pytest.mark.parametrize("length", range(8))
def test_tensors_begin_at_multiples_of_eight_bytes(length: int, tmp_path: Path) -> None:
    file = made(tna.presets.lora(1), {"a.0." + "q" * (length + 1): (3, 5)})
    for to in ("lycoris-lora", "lycoris-full"):
        content = tna.convert(file, to=to).content
        size = int.from_bytes(content[:8], "little")
        assert size % 8 == 0
        assert content[8 : 8 + size].rstrip(b" ").endswith(b"}")
        assert size - len(content[8 : 8 + size].rstrip(b" ")) < 8
        (tmp_path / "one.safetensors").write_bytes(content)
        assert load_file(tmp_path / "one.safetensors")


# Kills a child at every call that changes a folder or a disk, each in a copy of its own: 1, 2, 3, ...
KILLED = """
import itertools, os, shutil, signal, sys
import tnadapt as tna
new, old, copies = sys.argv[1:]
made = tna.convert(new, to="peft-lora")
for number in itertools.count(1):
    folder = os.path.join(copies, str(number))
    shutil.copytree(old, folder)
    if not (child := os.fork()):
        left = number
        def kill_at(name):
            plain = getattr(os, name)
            def wrapped(*arguments, **settings):
                global left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*arguments, **settings)
            setattr(os, name, wrapped)
        for name in ("rename", "replace", "remove", "unlink", "rmdir", "mkdir", "open", "fsync"):
            kill_at(name)
        made.save(folder, overwrite=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        break
"""


@pytest.mark.law("killed-saving")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_any_point_a_folder_is_the_old_adapter_or_the_new_one_or_refused(
    tmp_path: Path, old: Pair, new: Pair
) -> None:
    tna.save(tmp_path / "adapter", NEW)
    copies = tmp_path / "copies"
    copies.mkdir()
    command = [sys.executable, "-c", KILLED, *map(str, (tmp_path / "adapter", tmp_path / "old", copies))]
    subprocess.run(command, check=True, timeout=300)
    seen = set[str]()
    folders = sorted(copies.iterdir(), key=lambda path: int(path.name))
    for folder in folders:
        found = pair(folder)
        if found in (old, new):
            seen.add("old" if found == old else "new")
            assert len(tna.convert(folder, to="tnadapt").errors) == len(OLD.targets)
        else:
            seen.add("refused")
            with pytest.raises(tna.FileError, match=r"adapter_config\.json"):
                tna.convert(folder, to="tnadapt")
            # And nothing is lost.
            beside = {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert beside >= set(old), folder
        written(NEW, folder, overwrite=True)
        assert pair(folder) == new
        assert all(path.name in NAMES or path.name.startswith(".tnadapt-") for path in folder.iterdir())
    assert seen == {"old", "refused", "new"}
    assert sorted(path.name for path in folders[-1].iterdir()) == sorted(NAMES), "the last one was not killed"


def test_peft_refuses_what_a_kill_leaves(tmp_path: Path, old: Pair) -> None:
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(tmp_path / "old").lora_alpha == 1
    (tmp_path / "old" / NAMES[1]).unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftConfig.from_pretrained(tmp_path / "old")


def failing(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> list[int]:
    """Renames whose numbers are from ``first`` to ``last`` fail."""
    plain, count = os.rename, [0]

    def rename(*arguments: Any) -> None:
        count[0] += 1
        if first <= count[0] <= last:
            raise OSError(errno.EIO, "Input/output error")
        plain(*arguments)

    monkeypatch.setattr(files_module.os, "rename", rename)
    return count


@pytest.mark.law("full-disk")
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_disk_that_fails_once_changes_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Pair
) -> None:
    folder = tmp_path / "old"
    (folder / "README.md").write_text("of the user")
    failing(monkeypatch, number, number)
    with pytest.raises(tna.FileError, match=r"old: Input/output error|old: .*Input/output error"):
        written(NEW, folder, overwrite=True)
    assert pair(folder) == old
    assert sorted(os.listdir(folder)) == sorted([*NAMES, "README.md"])


@pytest.mark.law("full-disk")
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_disk_that_fails_for_good_says_where_the_old_files_are(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Pair
) -> None:
    folder = tmp_path / "old"
    failing(monkeypatch, number, 1000)
    with pytest.raises(tna.FileError, match="nor put back as it was") as caught:
        written(NEW, folder, overwrite=True)
    monkeypatch.undo()
    place = Path(str(caught.value).split(" is in ")[1].split(": move it back")[0])
    with pytest.raises(tna.FileError):
        tna.convert(folder, to="tnadapt")
    for name in os.listdir(place):
        shutil.move(place / name, folder / name)
    assert pair(folder) == old


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_where_a_file_is_to_be_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name / "precious").mkdir(parents=True)
    with pytest.raises(tna.FileError, match=f"out: has a folder {name}, where a file has to be; move it away"):
        written(NEW, tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path / "out") == [name]
    assert os.listdir(tmp_path / "out" / name) == ["precious"]

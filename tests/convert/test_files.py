"""Writing files and folders of another library: old and new never mix, wherever a kill, a disk or the power fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from tests.checkpoints.merge.merge_scene import content
from tests.support.file_layer import Call, intercepted, recorded
from tests.support.power_failure import after_failures
from tnadapt.checkpoints import atomic_files

from .conversions import made
from .internals import replace_folder

NAMES = WEIGHTS, CONFIG = ("adapter_model.safetensors", "adapter_config.json")
# The same tensors' names and shapes, and other numbers and another scale: only the content tells them apart.
OLD, NEW = (tna.convert(made(tna.presets.lora(2, alpha=alpha), seed=alpha), to="peft-lora") for alpha in (1, 64))


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with the old adapter."""
    OLD.save(tmp_path / "old")
    return tmp_path / "old"


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
def test_killed_at_any_point_a_folder_is_the_old_adapter_or_the_new_one_or_refused(tmp_path: Path, old: Path) -> None:
    tna.save(tmp_path / "adapter", made(tna.presets.lora(2, alpha=64), seed=64))
    copies = tmp_path / "copies"
    copies.mkdir()
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "adapter", old, copies], check=True, timeout=300)
    seen = set[str]()
    folders = sorted(copies.iterdir(), key=lambda path: int(path.name))
    for folder in folders:
        found = read(folder)
        if found in (OLD.files, NEW.files):
            seen.add("old" if found == OLD.files else "new")
            assert len(tna.convert(folder, to="tnadapt").errors) == 3
        else:
            seen.add("refused")
            with pytest.raises(tna.FileError, match=r"adapter_config\.json"):
                tna.convert(folder, to="tnadapt")
            # And nothing is lost.
            beside = {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert beside >= set(OLD.files.values()), folder
        NEW.save(folder, overwrite=True)
        assert read(folder) == NEW.files
        assert all(path.name in NAMES or path.name.startswith(".tnadapt-") for path in folder.iterdir())
    assert seen == {"old", "refused", "new"}
    assert sorted(path.name for path in folders[-1].iterdir()) == sorted(NAMES), "the last one was not killed"


def test_peft_refuses_what_a_kill_leaves(old: Path) -> None:
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(old).lora_alpha == 1
    (old / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftConfig.from_pretrained(old)


@pytest.mark.law("full-disk")
@pytest.mark.parametrize(
    ("first", "last"), [(1, 1), (2, 2), (3, 3), (4, 4), (2, 1000), (3, 1000), (4, 1000)], ids=lambda number: str(number)
)
def test_a_disk_that_fails_changes_nothing_or_says_where_the_old_files_are(
    first: int, last: int, monkeypatch: pytest.MonkeyPatch, old: Path
) -> None:
    (old / "README.md").write_text("of the user")
    rename, calls = os.rename, list[Any]()

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if first <= len(calls) <= last:
            raise OSError(errno.EIO, "Input/output error")
        rename(*arguments)

    monkeypatch.setattr(os, "rename", failing)
    message = "nor put back as it was" if last > first else r"old: .*Input/output error"
    with pytest.raises(tna.FileError, match=message) as caught:
        NEW.save(old, overwrite=True)
    monkeypatch.undo()
    if last > first:
        place = Path(str(caught.value).split(" is in ")[1].split(": move it back")[0])
        with pytest.raises(tna.FileError):
            tna.convert(old, to="tnadapt")
        for name in os.listdir(place):
            shutil.move(place / name, old / name)
    else:
        assert sorted(os.listdir(old)) == sorted([*NAMES, "README.md"])
    assert read(old) == OLD.files


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_where_a_file_is_to_be_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name / "precious").mkdir(parents=True)
    with pytest.raises(tna.FileError, match=f"out: has a folder {name}, where a file has to be; move it away"):
        NEW.save(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path / "out") == [name]
    assert os.listdir(tmp_path / "out" / name) == ["precious"]


@on_linux
@pytest.mark.law("power-failure")
@pytest.mark.parametrize("replaces", [True, False])
def test_after_a_power_failure_it_is_one_adapter_or_none(replaces: bool, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if replaces:
        OLD.save(place / "out")
    shutil.copytree(place, tmp_path / "start")
    calls = recorded(lambda: NEW.save(place / "out", overwrite=True))
    for number, tree in after_failures(calls, place, tmp_path / "start"):
        found = {name: tree[f"out/{name}"][0] for name in NAMES if f"out/{name}" in tree}
        assert found in (OLD.files, NEW.files) or CONFIG not in found, calls[number - 1]
        if number == len(calls):
            assert found == NEW.files


@on_linux
@pytest.mark.law("two-writers")
def test_writers_of_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once left the weights of one beside the settings of the other."""
    out = tmp_path / "out"
    replace_folder(str(out), {WEIGHTS: b"old", CONFIG: b"old"})
    halfway, go_on = threading.Event(), threading.Event()
    real = atomic_files.sync_folder

    def sync_folder(folder: str) -> None:
        real(folder)
        if threading.current_thread().name == "first" and read(out) == {WEIGHTS: b"first"}:
            halfway.set()
            assert go_on.wait(30)

    monkeypatch.setattr(atomic_files, "sync_folder", sync_folder)
    first, second = (
        threading.Thread(target=replace_folder, args=(str(out), dict.fromkeys(NAMES, name.encode())), name=name)
        for name in ("first", "second")
    )
    first.start()
    assert halfway.wait(30)
    second.start()
    second.join(0.3)
    assert second.is_alive(), "it did not wait for its turn"
    go_on.set()
    first.join()
    second.join()
    assert read(out) == {WEIGHTS: b"second", CONFIG: b"second"}
    assert sorted(os.listdir(out)) == [CONFIG, WEIGHTS]


@on_linux
@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize(
    ("to", "overwrite"), [("tnadapt", False), ("lycoris-lora", False), ("peft-lora", False), ("peft-lora", True)]
)
def test_what_another_wrote_meanwhile_is_overwritten_only_if_asked(to: str, overwrite: bool, tmp_path: Path) -> None:
    out, is_there = tmp_path / "out", False
    if to == "tnadapt":
        OLD.save(tmp_path / "peft1")
        NEW.save(tmp_path / "peft2")
        ours, theirs = (tna.convert(tmp_path / name, to="tnadapt") for name in ("peft1", "peft2"))
    else:
        ours, theirs = (tna.convert(made(tna.presets.lora(2), seed=seed), to=to) for seed in range(2))

    def before(call: Call) -> None:
        nonlocal is_there
        if call.name == "rename_new" and call.paths[1] == str(out) and not is_there:
            is_there = True
            theirs.save(out)

    message = r"exists; give another path, or overwrite=True \(--overwrite\)"
    refusal = contextlib.nullcontext() if overwrite else pytest.raises(tna.FileError, match=message)
    with intercepted(before), refusal:
        ours.save(out, overwrite=overwrite)
    assert is_there
    (ours if overwrite else theirs).save(tmp_path / "expected")
    assert content(out) == content(tmp_path / "expected")
    assert not list(tmp_path.glob("*.tmp"))

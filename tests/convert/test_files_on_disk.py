"""Writing a folder of another library on disk: order of steps, power failures, kills, and concurrent writers."""

from __future__ import annotations

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
from tests.support.file_layer import Call, Killed, intercepted, recorded
from tests.support.power_failure import after_failures
from tnadapt.convert import _files as files_module
from tnadapt.convert._files import replace_folder

from .conversions import made

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OLD = {WEIGHTS: b"old weights", CONFIG: b"old settings"}
NEW = {WEIGHTS: b"new weights", CONFIG: b"new settings"}


def visible(tree: dict[str, Any]) -> dict[str, bytes]:
    """The adapter's own files, of a state of the disk."""
    return {name: tree[f"out/{name}"][0] for name in (WEIGHTS, CONFIG) if f"out/{name}" in tree}


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG) if (folder / name).exists()}


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("old", [True, False])
def test_after_a_power_failure_it_is_one_adapter_or_none(old: bool, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if old:
        replace_folder(str(place / "out"), OLD)
    shutil.copytree(place, tmp_path / "start")
    calls = recorded(lambda: replace_folder(str(place / "out"), NEW))
    for number, tree in after_failures(calls, place, tmp_path / "start"):
        found = visible(tree)
        assert found in (OLD, NEW) or CONFIG not in found, calls[number - 1]
        if number == len(calls):
            assert found == NEW


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("old", [True, False])
def test_each_name_is_on_the_disk_before_the_next_one_changes(old: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if old:
        replace_folder(str(out), OLD)
    calls = recorded(lambda: replace_folder(str(out), NEW))
    place = out if old else tmp_path
    moves = [
        number for number, call in enumerate(calls)
        if call.name in ("rename", "rename_new") and str(place) in {os.path.dirname(path) for path in call.paths}
    ]  # fmt: skip
    assert len(moves) == (4 if old else 1)
    for number in moves:
        assert calls[number + 1] == Call("fsync", (str(place),))
    assert all(call.name != "unlink" for call in calls[: moves[-1]])
    # Content comes before all of the names.
    for name in NEW:
        made = [number for number, call in enumerate(calls) if call.content == NEW[name]]
        assert made
        assert made[-1] < moves[0]


@pytest.mark.law("killed-saving")
def test_killed_anywhere_it_is_one_adapter_or_none_and_can_be_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    replace_folder(str(out), OLD)
    count = len(recorded(lambda: replace_folder(str(out), NEW)))
    for at in range(count):
        shutil.rmtree(out)
        replace_folder(str(out), OLD)
        left = at

        def before(call: Call) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with intercepted(before), pytest.raises((Killed, tna.FileError)):
            replace_folder(str(out), NEW)
        found = read(out)
        assert found in (OLD, NEW) or CONFIG not in found
        replace_folder(str(out), NEW)
        assert read(out) == NEW


@pytest.mark.law("two-writers")
def test_writers_of_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once left the weights of one beside the settings of the other."""
    out = tmp_path / "out"
    replace_folder(str(out), OLD)
    halfway, go_on = threading.Event(), threading.Event()
    real = files_module.sync_folder

    def sync_folder(folder: str) -> None:
        real(folder)
        if threading.current_thread().name == "first" and read(out) == {WEIGHTS: b"first"}:
            halfway.set()
            assert go_on.wait(30)

    monkeypatch.setattr(files_module, "sync_folder", sync_folder)
    first = threading.Thread(
        target=replace_folder, args=(str(out), {WEIGHTS: b"first", CONFIG: b"first"}), name="first"
    )
    second = threading.Thread(target=replace_folder, args=(str(out), {WEIGHTS: b"second", CONFIG: b"second"}))
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


def test_a_folder_that_another_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for overwrite in (True, False):
        shutil.rmtree(out, ignore_errors=True)

        def before(call: Call) -> None:
            if call.name == "rename_new" and call.paths[1] == str(out):
                out.mkdir()
                for name, piece in OLD.items():
                    (out / name).write_bytes(piece)

        with intercepted(before):
            if overwrite:
                replace_folder(str(out), NEW, overwrite)
            else:
                with pytest.raises(
                    tna.FileError, match=r"exists; give another path, or overwrite=True \(--overwrite\)"
                ):
                    replace_folder(str(out), NEW, overwrite)
        assert content(out) == (NEW if overwrite else OLD)
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.law("no-overwrite")
@pytest.mark.parametrize("kind", ["tnadapt", "lycoris-lora", "peft-lora"])
def test_a_conversion_that_must_not_overwrite_never_does(kind: str, tmp_path: Path) -> None:
    shapes = {"blocks.0.q": (8, 8)}
    one, two = (made(tna.presets.lora(2), shapes, seed) for seed in range(2))
    if kind == "tnadapt":
        tna.convert(one, to="peft-lora").save(tmp_path / "peft1")
        tna.convert(two, to="peft-lora").save(tmp_path / "peft2")
        found = [tna.convert(tmp_path / name, to="tnadapt") for name in ("peft1", "peft2")]
    else:
        found = [tna.convert(file, to=kind) for file in (one, two)]
    out, seen = tmp_path / "out", False

    def before(call: Call) -> None:
        nonlocal seen
        if call.name == "rename_new" and call.paths[1] == str(out) and not seen:
            seen = True
            found[1].save(out)

    with intercepted(before), pytest.raises(tna.FileError, match="exists; give another path"):
        found[0].save(out)
    assert seen
    found[1].save(tmp_path / "expected")
    assert content(out) == content(tmp_path / "expected")


SAVING = """
import itertools, sys
from tnadapt.convert._files import replace_folder
out, text = sys.argv[1:]
print("at it", flush=True)
while True:
    replace_folder(out, {"adapter_model.safetensors": text.encode(), "adapter_config.json": text.encode()})
"""


@pytest.mark.law("two-writers")
def test_two_processes_that_write_one_folder_leave_the_whole_of_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    for number in range(100 if long else 2):
        writers = [
            subprocess.Popen([sys.executable, "-c", SAVING, str(out), text], stdout=subprocess.PIPE)
            for text in ("one", "two")
        ]
        try:
            for writer in writers:
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"at it\n"
            threading.Event().wait(0.1)
        finally:
            for writer in writers[:: 1 if number % 2 else -1]:
                writer.kill()
                writer.wait()
                assert writer.stdout is not None
                writer.stdout.close()
        found = read(out)
        assert CONFIG not in found or found[CONFIG] == found.get(WEIGHTS), number

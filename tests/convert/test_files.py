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

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

import tnadapt as tna
from tests.checkpoints.merge.merge_scene import content
from tests.support.file_layer import Call, intercepted, recorded
from tests.support.power_failure import after_failures

from .conversions import made
from .internals import files_module, replace_folder, safetensors_content

# -- Replacing a converted adapter: old and new files never mix, wherever a kill or a disk error stops it --------------


NAMES = WEIGHTS, CONFIG = ("adapter_model.safetensors", "adapter_config.json")
# The same tensors' names and shapes, and other numbers and another scale: only the content tells them apart.
OLD, NEW = (made(tna.presets.lora(2, alpha=alpha), seed=alpha) for alpha in (1, 64))

Files = dict[str, bytes]


def read(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


def written(file: tna.AdapterFile, folder: Path, **settings: Any) -> Path:
    tna.convert(file, to="peft-lora").save(folder, **settings)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Files:
    return read(written(OLD, tmp_path / "old"))


@pytest.fixture
def new(tmp_path: Path) -> Files:
    return read(written(NEW, tmp_path / "new"))


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
    tmp_path: Path, old: Files, new: Files
) -> None:
    tna.save(tmp_path / "adapter", NEW)
    copies = tmp_path / "copies"
    copies.mkdir()
    command = [sys.executable, "-c", KILLED, *map(str, (tmp_path / "adapter", tmp_path / "old", copies))]
    subprocess.run(command, check=True, timeout=300)
    seen = set[str]()
    folders = sorted(copies.iterdir(), key=lambda path: int(path.name))
    for folder in folders:
        found = read(folder)
        if found in (old, new):
            seen.add("old" if found == old else "new")
            assert len(tna.convert(folder, to="tnadapt").errors) == len(OLD.targets)
        else:
            seen.add("refused")
            with pytest.raises(tna.FileError, match=r"adapter_config\.json"):
                tna.convert(folder, to="tnadapt")
            # And nothing is lost.
            beside = {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert beside >= set(old.values()), folder
        written(NEW, folder, overwrite=True)
        assert read(folder) == new
        assert all(path.name in NAMES or path.name.startswith(".tnadapt-") for path in folder.iterdir())
    assert seen == {"old", "refused", "new"}
    assert sorted(path.name for path in folders[-1].iterdir()) == sorted(NAMES), "the last one was not killed"


def test_peft_refuses_what_a_kill_leaves(tmp_path: Path, old: Files) -> None:
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

    monkeypatch.setattr(os, "rename", rename)
    return count


@pytest.mark.law("full-disk")
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_disk_that_fails_once_changes_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Files
) -> None:
    folder = tmp_path / "old"
    (folder / "README.md").write_text("of the user")
    failing(monkeypatch, number, number)
    with pytest.raises(tna.FileError, match=r"old: .*Input/output error"):
        written(NEW, folder, overwrite=True)
    assert read(folder) == old
    assert sorted(os.listdir(folder)) == sorted([*NAMES, "README.md"])


@pytest.mark.law("full-disk")
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_disk_that_fails_for_good_says_where_the_old_files_are(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Files
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
    assert read(folder) == old


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_where_a_file_is_to_be_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name / "precious").mkdir(parents=True)
    with pytest.raises(tna.FileError, match=f"out: has a folder {name}, where a file has to be; move it away"):
        written(NEW, tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path / "out") == [name]
    assert os.listdir(tmp_path / "out" / name) == ["precious"]


# -- Writing a folder of another library on disk: order of steps, power failures, kills, and concurrent writers --------


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")


OLD_FILES = {WEIGHTS: b"old weights", CONFIG: b"old settings"}
NEW_FILES = {WEIGHTS: b"new weights", CONFIG: b"new settings"}


def visible(tree: dict[str, Any]) -> dict[str, bytes]:
    """The adapter's own files, of a state of the disk."""
    return {name: tree[f"out/{name}"][0] for name in NAMES if f"out/{name}" in tree}


@on_linux
@pytest.mark.law("power-failure")
@pytest.mark.parametrize("old", [True, False])
def test_after_a_power_failure_it_is_one_adapter_or_none(old: bool, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if old:
        replace_folder(str(place / "out"), OLD_FILES)
    shutil.copytree(place, tmp_path / "start")
    calls = recorded(lambda: replace_folder(str(place / "out"), NEW_FILES))
    for number, tree in after_failures(calls, place, tmp_path / "start"):
        found = visible(tree)
        assert found in (OLD_FILES, NEW_FILES) or CONFIG not in found, calls[number - 1]
        if number == len(calls):
            assert found == NEW_FILES


@on_linux
@pytest.mark.law("two-writers")
def test_writers_of_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once left the weights of one beside the settings of the other."""
    out = tmp_path / "out"
    replace_folder(str(out), OLD_FILES)
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


@on_linux
def test_a_folder_that_another_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for overwrite in (True, False):
        shutil.rmtree(out, ignore_errors=True)

        def before(call: Call) -> None:
            if call.name == "rename_new" and call.paths[1] == str(out):
                out.mkdir()
                for name, piece in OLD_FILES.items():
                    (out / name).write_bytes(piece)

        message = r"exists; give another path, or overwrite=True \(--overwrite\)"
        refusal = contextlib.nullcontext() if overwrite else pytest.raises(tna.FileError, match=message)
        with intercepted(before), refusal:
            replace_folder(str(out), NEW_FILES, overwrite)
        assert content(out) == (NEW_FILES if overwrite else OLD_FILES)
        assert os.listdir(tmp_path) == ["out"]


@on_linux
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


ROOT = Path(__file__).parents[2]
SAVING = """
import itertools, sys
from tests.convert.internals import replace_folder
out, text = sys.argv[1:]
print("at it", flush=True)
while True:
    replace_folder(out, {"adapter_model.safetensors": text.encode(), "adapter_config.json": text.encode()})
"""


@on_linux
@pytest.mark.law("two-writers")
def test_two_processes_that_write_one_folder_leave_the_whole_of_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    for number in range(100 if long else 2):
        writers = [
            subprocess.Popen([sys.executable, "-c", SAVING, str(out), text], stdout=subprocess.PIPE, cwd=ROOT)
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


@on_linux
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["f2", "f4", "f8", "i8", "u1"]), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1, max_size=6,
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
)  # fmt: skip
def test_safetensors_reads_what_is_written(entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    arrays = {n: rng.integers(0, 9, shape).astype(dtype) for n, (dtype, shape) in entries.items()}
    stored = safetensors_content(arrays, {}, metadata)
    found = load(stored)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    # Tensors begin at a multiple of eight bytes, with as few spaces as that takes.
    size = int.from_bytes(stored[:8], "little")
    header = stored[8 : 8 + size].rstrip(b" ")
    assert size % 8 == 0
    assert header.endswith(b"}")
    assert size - len(header) < 8

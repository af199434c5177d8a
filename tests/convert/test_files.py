"""Writing files and folders of another library: old and new never mix, wherever a kill, a disk or the power fails."""

from __future__ import annotations

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
from safetensors.numpy import load_file

import tnadapt as tna
from tests.checkpoints.merge.merge_scene import content
from tests.support.file_layer import Call, Killed, intercepted, recorded
from tests.support.power_failure import after_failures
from tnadapt.convert import _files as files_module
from tnadapt.convert._files import replace_folder, safetensors_content

from .conversions import made

# -- Replacing a converted adapter: old and new files never mix, wherever a kill or a disk error stops it --------------


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

    monkeypatch.setattr(os, "rename", rename)
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


# -- Writing a folder of another library on disk: order of steps, power failures, kills, and concurrent writers --------


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the file layer reads /proc")


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OLD_FILES = {WEIGHTS: b"old weights", CONFIG: b"old settings"}
NEW_FILES = {WEIGHTS: b"new weights", CONFIG: b"new settings"}


def visible(tree: dict[str, Any]) -> dict[str, bytes]:
    """The adapter's own files, of a state of the disk."""
    return {name: tree[f"out/{name}"][0] for name in (WEIGHTS, CONFIG) if f"out/{name}" in tree}


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG) if (folder / name).exists()}


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
@pytest.mark.law("power-failure")
@pytest.mark.parametrize("old", [True, False])
def test_each_name_is_on_the_disk_before_the_next_one_changes(old: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if old:
        replace_folder(str(out), OLD_FILES)
    calls = recorded(lambda: replace_folder(str(out), NEW_FILES))
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
    for name in NEW_FILES:
        made = [number for number, call in enumerate(calls) if call.content == NEW_FILES[name]]
        assert made
        assert made[-1] < moves[0]


@on_linux
@pytest.mark.law("killed-saving")
def test_killed_anywhere_it_is_one_adapter_or_none_and_can_be_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    replace_folder(str(out), OLD_FILES)
    count = len(recorded(lambda: replace_folder(str(out), NEW_FILES)))
    for at in range(count):
        shutil.rmtree(out)
        replace_folder(str(out), OLD_FILES)
        left = at

        def before(call: Call) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with intercepted(before), pytest.raises((Killed, tna.FileError)):
            replace_folder(str(out), NEW_FILES)
        found = read(out)
        assert found in (OLD_FILES, NEW_FILES) or CONFIG not in found
        replace_folder(str(out), NEW_FILES)
        assert read(out) == NEW_FILES


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

        with intercepted(before):
            if overwrite:
                replace_folder(str(out), NEW_FILES, overwrite)
            else:
                with pytest.raises(
                    tna.FileError, match=r"exists; give another path, or overwrite=True \(--overwrite\)"
                ):
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


SAVING = """
import itertools, sys
from tnadapt.convert._files import replace_folder
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
    from safetensors.numpy import load

    rng = np.random.default_rng(0)
    arrays = {n: rng.integers(0, 9, shape).astype(dtype) for n, (dtype, shape) in entries.items()}
    found = load(safetensors_content(arrays, {}, metadata))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)

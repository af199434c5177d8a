"""Full and read-only disks, concurrent writers, and processes killed at random points: nothing is lost.

Small disks are file systems in memory that only root can mount. There are twelve kills each; 150 with
``HYPOTHESIS_PROFILE=long``. Merges are killed in merge/test_merge_disk.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tests.convert.conversions import made
from tests.support import checkpoint_files as cp
from tests.support.depth import LONG

from .merge.merge_scene import content

SHAPES = {f"blocks.{number}.q": (64, 64) for number in range(4)}
ONE, TWO = (made(tna.presets.lora(8), SHAPES, seed) for seed in range(2))
KILLS = 150 if LONG else 12

needs_kills = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


def holds(path: Path, file: tna.AdapterFile) -> bool:
    return all(np.array_equal(array, file.arrays[name]) for name, array in tna.load(path).arrays.items())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB."""
    made = tmp_path / "disk"
    made.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(made)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk can be mounted by root alone")
    yield made
    subprocess.run(["umount", str(made)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


@pytest.mark.law("full-disk")
def test_a_full_disk_keeps_the_file_that_is_there(disk: Path) -> None:
    path = disk / "adapter"
    tna.save(path, ONE)
    before = path.read_bytes()
    filler = fill(disk)
    with pytest.raises(tna.FileError, match=f"^{path}: No space left on device"):
        tna.save(path, TWO)
    assert path.read_bytes() == before
    assert sorted(os.listdir(disk)) == ["adapter", "filler"]
    filler.unlink()
    tna.save(path, TWO)
    assert holds(path, TWO)


@pytest.mark.law("merge-disk-faults")
def test_a_merge_on_a_full_disk_goes_on_when_there_is_space(disk: Path, tmp_path: Path) -> None:
    weights: cp.Tensors = {target.name: ("F32", np.ones(target.stored, np.float32)) for target in ONE.targets}
    base = cp.write(tmp_path / "base", weights | {"big": ("F32", np.zeros(70_000, np.float32))}, 3)
    # Too small from the start: not begun.
    with pytest.raises(tna.FileError, match=r"34\d,\d+ bytes are to be written, and the disk has 26\d,\d+"):
        tna.merge(base, ONE, disk / "out")
    assert os.listdir(disk) == []
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    # Another process takes the space meanwhile.
    with pytest.raises(tna.FileError, match="out: No space left on device"):
        tna.merge(base, ONE, disk / "out", progress=lambda done, total: fill(disk) and None)
    assert not (disk / "out").exists()
    (disk / "filler").unlink()
    tna.merge(base, ONE, disk / "out")
    tna.merge(base, ONE, tmp_path / "expected")  # on another file system
    assert content(disk / "out") == content(tmp_path / "expected")
    assert os.listdir(disk) == ["out"]


@pytest.mark.law("full-disk")
def test_a_sweep_on_a_full_disk_says_so_and_goes_on(disk: Path) -> None:
    pytest.importorskip("torch")
    from tnadapt.finetune.results import Results

    path = disk / "results.jsonl"
    settings = {"fields": {"key", "value"}}
    with Results(path, {"what": "a sweep"}, **settings) as results:
        results.add({"key": "0", "value": 0})
        filler = fill(disk)
        refused = None
        for number in range(1, 100):  # the last page holds a few lines
            try:
                results.add({"key": str(number), "value": "x" * 1000})
            except tna.FileError as error:
                refused = refused or str(error)
        assert refused == f"cannot write results to {path}: No space left on device"
        said = dict(results.records)
    filler.unlink()
    with Results(path, {"what": "a sweep"}, **settings) as results:
        assert results.records == said
        results.add({"key": "next", "value": 1})


@pytest.mark.law("full-disk")
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders have no such mode there")
def test_a_folder_that_may_only_be_read(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = os.geteuid() == 0  # who may write anywhere but on a disk that may only be read
    folder = request.getfixturevalue("disk") if root else tmp_path
    tna.save(folder / "adapter", ONE)
    if root:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    else:
        folder.chmod(0o555)
    why = "Read-only file system" if root else "Permission denied"
    with pytest.raises(tna.FileError, match=f"^{folder / 'adapter'}: {why}"):
        tna.save(folder / "adapter", TWO)
    with pytest.raises(tna.FileError, match=why):
        tna.convert(ONE, to="peft-lora").save(folder / "peft")
    assert holds(folder / "adapter", ONE)
    assert os.listdir(folder) == ["adapter"]
    if not root:
        folder.chmod(0o755)


def killed(code: str, *arguments: object, delays: Iterator[float]) -> list[str]:
    """Start a program, wait until it says that it is at it, and kill it a moment later: the lines it said since."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"at it\n", process.stderr.read().decode()
        time.sleep(next(delays))
        process.kill()
        # Not communicate(), which misses what came together with the first line.
        said, error = process.stdout.read(), process.stderr.read()
        assert process.wait() == -signal.SIGKILL, error.decode()
    return said[: said.rfind(b"\n") + 1].decode().splitlines()


def moments(longest: float) -> Iterator[float]:
    drawn = random.Random(5)
    while True:
        yield drawn.uniform(0.0, longest)


SAVING = """
import itertools, sys
import tnadapt as tna
*files, path = sys.argv[1:]
files = [tna.load(file) for file in files]
print("at it", flush=True)
for file in itertools.cycle(files):
    tna.save(path, file)
"""


@pytest.fixture
def either(tmp_path: Path) -> set[bytes]:
    """The files one and two, of different lengths, so that a mixture would show."""
    for name, rank in (("one", 1), ("two", 16)):
        tna.save(tmp_path / name, made(tna.presets.lora(rank), SHAPES))
    shutil.copy(tmp_path / "one", tmp_path / "saved")
    return {(tmp_path / name).read_bytes() for name in ("one", "two")}


@pytest.mark.law("two-writers")
def test_two_processes_that_write_one_name_leave_one_of_the_two(either: set[bytes], tmp_path: Path) -> None:
    path = tmp_path / "saved"
    command = [sys.executable, "-c", SAVING]
    writers = [
        subprocess.Popen([*command, str(tmp_path / name), str(path)], stdout=subprocess.PIPE) for name in ("one", "two")
    ]
    seen = set()
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"at it\n"
        ends = time.monotonic() + 60.0
        for number in itertools.count():
            seen.add(path.read_bytes())
            if number > 300 and (seen >= either or time.monotonic() > ends):
                break
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    assert seen == either
    tna.load(path)


@pytest.mark.slow
@needs_kills
@pytest.mark.law("killed-saving")
def test_a_file_that_is_saved_is_the_old_one_or_the_new_one(either: set[bytes], tmp_path: Path) -> None:
    path, seen, delays = tmp_path / "saved", set(), moments(0.05)
    for _ in range(KILLS):
        killed(SAVING, tmp_path / "one", tmp_path / "two", path, delays=delays)
        seen.add(path.read_bytes())
        # What a killed process leaves beside it has a name of its own, and is in nobody's way.
        left = set(os.listdir(tmp_path)) - {"one", "two", "saved"}
        assert all(name.startswith(".tnadapt-") for name in left)
    assert seen == either, "damaged, or killed at one point only"
    tna.save(path, ONE)
    assert holds(path, ONE)


SWEEPING = """
import sys
from pathlib import Path
from tnadapt.finetune.results import Results
with Results(Path(sys.argv[1]), {"what": "a sweep"}, fields={"key", "value"}) as results:
    results.begin_session(jobs=1)
    print("at it", flush=True)
    while True:
        number = len(results.records)
        results.add({"key": str(number), "value": "x" * (number % 97)})
        print(number, flush=True)  # a kill from here on must not lose it
"""


@pytest.mark.slow
@needs_kills
@pytest.mark.law("killed-sweep")
def test_a_sweep_has_every_line_that_it_said_was_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tnadapt.finetune.results import Results

    path, promised, delays = tmp_path / "results.jsonl", 0, moments(0.03)
    for _ in range(KILLS // 3):
        said = killed(SWEEPING, path, delays=delays)
        promised = max([promised, *(int(number) + 1 for number in said)])
        with Results(path, {"what": "a sweep"}, fields={"key", "value"}) as results:
            found = results.records
        assert len(found) >= promised
        assert found == {str(n): {"key": str(n), "value": "x" * (n % 97)} for n in range(len(found))}
        promised = len(found)
    assert promised

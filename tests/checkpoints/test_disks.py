"""Full and read-only disks, as small file systems in memory that only root can mount; and concurrent writers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tests.convert.conversions import made

SHAPES = {f"blocks.{number}.q": (64, 64) for number in range(4)}
ONE, TWO = (made(tna.presets.lora(8), SHAPES, seed) for seed in range(2))


def holds(path: Path, file: tna.AdapterFile) -> bool:
    return all(np.array_equal(array, file.arrays[name]) for name, array in tna.load(path).arrays.items())


def mounted(disk: Path, options: str) -> None:
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk can be mounted by root alone")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB."""
    made = tmp_path / "disk"
    made.mkdir()
    mounted(made, "size=256k")
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


@pytest.mark.law("full-disk")
def test_a_full_disk_keeps_a_converted_adapter_whole(disk: Path) -> None:
    found = tna.convert(ONE, to="peft-lora")
    found.save(disk / "peft")
    before = {path.name: path.read_bytes() for path in (disk / "peft").iterdir()}
    filler = fill(disk)
    with pytest.raises(tna.FileError, match="No space left on device"):
        tna.convert(TWO, to="peft-lora").save(disk / "peft", overwrite=True)
    assert {path.name: path.read_bytes() for path in (disk / "peft").iterdir()} == before
    filler.unlink()
    tna.convert(TWO, to="peft-lora").save(disk / "peft", overwrite=True)
    assert {path.name for path in (disk / "peft").iterdir()} == set(before)


@pytest.mark.law("full-disk")
def test_a_sweep_on_a_full_disk_says_so_and_goes_on(disk: Path) -> None:
    pytest.importorskip("torch")
    from tnadapt.finetune.results import Results

    path = disk / "results.jsonl"
    fields = {"key", "value"}
    with Results(path, {"what": "a sweep"}, fields=fields) as results:
        results.add({"key": "0", "value": 0})
        filler = fill(disk)
        # The last page holds a few lines.
        refused = None
        for number in range(1, 100):
            try:
                results.add({"key": str(number), "value": "x" * 1000})
            except tna.FileError as error:
                refused = refused or str(error)
        assert refused == f"cannot write results to {path}: No space left on device"
        said = dict(results.records)
    filler.unlink()
    with Results(path, {"what": "a sweep"}, fields=fields) as results:
        assert results.records == said
        results.add({"key": "next", "value": 1})


@pytest.mark.law("full-disk")
def test_a_disk_that_may_only_be_read(disk: Path) -> None:
    tna.save(disk / "adapter", ONE)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(tna.FileError, match=f"^{disk / 'adapter'}: Read-only file system"):
        tna.save(disk / "adapter", TWO)
    assert holds(disk / "adapter", ONE)
    with pytest.raises(tna.FileError, match="Read-only file system"):
        tna.convert(ONE, to="peft-lora").save(disk / "peft")
    assert os.listdir(disk) == ["adapter"]


CLOSED = """
import os, sys
import tnadapt as tna
path = sys.argv[1]
file = tna.load(path)
if os.geteuid() == 0:  # who may write anywhere, and whose modules nobody else may read
    tna.save(path, file)
    os.setegid(65534)
    os.seteuid(65534)
try:
    tna.save(path, file)
except tna.FileError as error:
    print(error)
tna.load(path)
"""


@pytest.mark.law("full-disk")
@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such mode there")
def test_a_folder_that_may_only_be_read() -> None:
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tna.save(folder / "adapter", ONE)
        folder.chmod(0o555)
        try:
            command = [sys.executable, "-c", CLOSED, str(folder / "adapter")]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        finally:
            folder.chmod(0o700)
        assert done.stdout == f"{folder / 'adapter'}: Permission denied\n"
        assert os.listdir(folder) == ["adapter"]
        assert holds(folder / "adapter", ONE)


SAVING = """
import sys
import tnadapt as tna
file, path = tna.load(sys.argv[1]), sys.argv[2]
print("at it", flush=True)
while True:
    tna.save(path, file)
"""


@pytest.mark.law("two-writers")
def test_two_processes_that_write_one_name_leave_one_of_the_two(tmp_path: Path) -> None:
    # Of other lengths, so that a mixture would show.
    for name, rank in (("one", 1), ("two", 16)):
        tna.save(tmp_path / name, made(tna.presets.lora(rank), SHAPES))
    either = {(tmp_path / name).read_bytes() for name in ("one", "two")}
    path = tmp_path / "both"
    tna.save(path, made(tna.presets.lora(1), SHAPES))
    command = [sys.executable, "-c", SAVING]
    writers = [
        subprocess.Popen([*command, str(tmp_path / name), str(path)], stdout=subprocess.PIPE) for name in ("one", "two")
    ]
    seen = set()
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"at it\n"
        ends = time.monotonic() + 60.0
        for _ in range(300):
            content = path.read_bytes()
            assert content in either
            seen.add(content)
        while seen != either and time.monotonic() < ends:
            seen.add(path.read_bytes())
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    assert seen == either
    tna.load(path)

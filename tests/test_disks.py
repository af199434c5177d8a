"""Disks that are full or read-only, for real: small file systems in memory, which only root can mount; two writers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna

SHAPES = [(64, 64)] * 4
TARGETS = tuple(tna.Target(f"block{number}.q", shape, "q") for number, shape in enumerate(SHAPES))


def adapter(value: float, rank: int = 8) -> tna.AdapterFile:
    config = tna.presets.lora(rank)
    shapes = tna.SuperLoRA(config, SHAPES).param_shapes
    return tna.AdapterFile(
        config=config, targets=TARGETS, arrays={n: np.full(s, value, np.float32) for n, s in shapes.items()}
    )


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


def test_a_full_disk_keeps_the_file_that_is_there(disk: Path) -> None:
    path = disk / "adapter"
    tna.save(path, adapter(1.0))
    before = path.read_bytes()
    filler = fill(disk)
    with pytest.raises(tna.FileError, match=f"^{path}: No space left on device"):
        tna.save(path, adapter(2.0))
    assert path.read_bytes() == before
    assert sorted(os.listdir(disk)) == ["adapter", "filler"]
    filler.unlink()
    tna.save(path, adapter(2.0))
    assert tna.load(path).arrays["group0.split0.factor0"].flat[0] == 2.0


def test_a_full_disk_keeps_a_converted_adapter_whole(disk: Path) -> None:
    found = tna.convert(adapter(1.0), to="peft-lora")
    found.save(disk / "peft")
    before = {path.name: path.read_bytes() for path in (disk / "peft").iterdir()}
    filler = fill(disk)
    with pytest.raises(tna.FileError, match="No space left on device"):
        tna.convert(adapter(2.0), to="peft-lora").save(disk / "peft", overwrite=True)
    assert {path.name: path.read_bytes() for path in (disk / "peft").iterdir()} == before
    filler.unlink()
    tna.convert(adapter(2.0), to="peft-lora").save(disk / "peft", overwrite=True)
    assert {path.name for path in (disk / "peft").iterdir()} == set(before)


def test_a_sweep_on_a_full_disk_says_so_and_goes_on(disk: Path) -> None:
    pytest.importorskip("torch")
    from tnadapt.finetune.results import Results

    path = disk / "results.jsonl"
    fields = {"key", "value"}
    with Results(path, {"what": "a sweep"}, fields=fields) as results:
        results.add({"key": "0", "value": 0})
        filler = fill(disk)
        # The last page has room for a few lines.
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


def test_a_disk_that_may_only_be_read(disk: Path) -> None:
    tna.save(disk / "adapter", adapter(1.0))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(tna.FileError, match=f"^{disk / 'adapter'}: Read-only file system"):
        tna.save(disk / "adapter", adapter(2.0))
    assert tna.load(disk / "adapter").arrays["group0.split0.factor0"].flat[0] == 1.0
    with pytest.raises(tna.FileError, match="Read-only file system"):
        tna.convert(adapter(1.0), to="peft-lora").save(disk / "peft")
    assert os.listdir(disk) == ["adapter"]


def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    tna.save(folder / "adapter", adapter(1.0))
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("root may write anywhere")
        with pytest.raises(tna.FileError, match=f"^{folder / 'adapter'}: Permission denied"):
            tna.save(folder / "adapter", adapter(2.0))
        assert tna.load(folder / "adapter").num_parameters
    finally:
        folder.chmod(0o700)


SAVING = """
import sys
import tnadapt as tna
file, path = tna.load(sys.argv[1]), sys.argv[2]
print("at it", flush=True)
while True:
    tna.save(path, file)
"""


def test_two_processes_that_write_one_name_leave_one_of_the_two(tmp_path: Path) -> None:
    # Of other lengths, so that a mixture would show.
    for name, rank in (("one", 1), ("two", 16)):
        tna.save(tmp_path / name, adapter(1.0, rank))
    either = {(tmp_path / name).read_bytes() for name in ("one", "two")}
    path = tmp_path / "both"
    tna.save(path, adapter(1.0, 1))
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

"""Processes killed at random points while they save, merge and sweep: nothing is lost, and the next run resumes.

Twelve kills each; 150 with ``HYPOTHESIS_PROFILE=long``.
"""

from __future__ import annotations

import json
import os
import random
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

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")]

KILLS = 150 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 12
SHAPES = {f"blocks.{number}.q": (64, 48) for number in range(6)}
ONE, TWO, THREE = (made(tna.presets.lora(4), SHAPES, seed) for seed in range(3))


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
one, two, path = tna.load(sys.argv[1]), tna.load(sys.argv[2]), sys.argv[3]
print("at it", flush=True)
for file in itertools.cycle((one, two)):
    tna.save(path, file)
"""


@pytest.mark.law("killed-saving")
def test_a_file_that_is_saved_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    tna.save(tmp_path / "one", ONE)
    tna.save(tmp_path / "two", TWO)
    either = {(tmp_path / name).read_bytes() for name in ("one", "two")}
    path = tmp_path / "saved"
    tna.save(path, ONE)
    seen = set()
    delays = moments(0.05)
    for _ in range(KILLS):
        killed(SAVING, tmp_path / "one", tmp_path / "two", path, delays=delays)
        content = path.read_bytes()
        assert content in either
        seen.add(content)
        # What a killed process leaves beside it has a name of its own, and is in nobody's way.
        assert all(left.name.startswith(".tnadapt-") for left in set(tmp_path.iterdir()) - {
            path, tmp_path / "one", tmp_path / "two"
        })  # fmt: skip
    assert seen == either, "killed at one point only"
    tna.save(path, THREE)
    assert all(np.array_equal(array, THREE.arrays[name]) for name, array in tna.load(path).arrays.items())


MERGING = """
import itertools, sys
import tnadapt as tna
base, one, two, out = sys.argv[1:]
tna.merge(base, one, out, overwrite=True)
print("at it", flush=True)
for file in itertools.cycle((two, one)):
    tna.merge(base, file, out, overwrite=True)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.law("merge-killed")
def test_a_merge_is_whole_or_goes_on(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    base = tmp_path / "base"
    base.mkdir()
    index = {}
    for number, target in enumerate(ONE.targets):
        name = f"model-{number + 1:05}-of-{len(SHAPES):05}.safetensors"
        save_file({target.name: rng.standard_normal(target.shape).astype(np.float32)}, base / name)
        index[target.name] = name
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    adapters, out = [tmp_path / "one", tmp_path / "two"], tmp_path / "out"
    merged = []
    for adapter, file in zip(adapters, (ONE, TWO), strict=True):
        tna.save(adapter, file)
        begun = time.monotonic()
        tna.merge(base, adapter, out, overwrite=True)
        took = time.monotonic() - begun
        merged.append(files_of(out))
    # Every file of one is another than the other's, so that a mixture is neither.
    assert all(merged[0][name] != merged[1][name] for name in index.values())
    before = files_of(base)
    delays = moments(2 * took)
    seen = set()
    for number in range(KILLS):
        killed(MERGING, base, *adapters[:: 1 if number % 2 else -1], out, delays=delays)
        # Systems that cannot exchange two names have a moment without it; the next run puts it back.
        (place,) = [out] if out.exists() else tmp_path.glob("out?*/run-*/old")
        found = files_of(place)
        assert found in merged
        seen.add(merged.index(found))
        assert files_of(base) == before
    assert seen == {0, 1}, "killed at one point only"
    tna.merge(base, adapters[0], out, overwrite=True)
    assert files_of(out) == merged[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "out", "two"]


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


@pytest.mark.law("killed-sweep")
def test_a_sweep_has_every_line_that_it_said_was_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tnadapt.finetune.results import Results

    path = tmp_path / "results.jsonl"
    promised = 0
    delays = moments(0.03)
    for _ in range(KILLS // 3):
        said = killed(SWEEPING, path, delays=delays)
        promised = max([promised, *(int(number) + 1 for number in said)])
        with Results(path, {"what": "a sweep"}, fields={"key", "value"}) as results:
            found = results.records
        assert len(found) >= promised
        assert found == {str(n): {"key": str(n), "value": "x" * (n % 97)} for n in range(len(found))}
        promised = len(found)
    assert promised

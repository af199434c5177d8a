"""Files of many small adapters, read, appended to and changed by member: ``python benchmarks/population_files.py``.

A population of 100,000 members of 100 float32 numbers, with names and without, of two presets: LoRA's factors, of which
nothing is drawn, and Uni-LoRA's θ for 24 weights of 768 × 768, whose fixed draws are checked at the first load. Times
are of calls in one process, with the file in the page cache, in milliseconds: the median of 20, the lowest, and the
median of processor time, which other processes disturb less; ``load`` is how many of them there were at the end, with
this one. ``read`` is what one call in a process of its own reads from the disk with nothing in the page cache, and
``written`` what one call writes, in bytes.

Results go to ``results/population_files.json``. ``--smoke`` takes 1,000 members, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

import tnadapt as tna

RESULTS = Path(__file__).parent / "results" / "population_files.json"
ROUNDS = 20
# What a process of its own does, with the path, a member and the place of the library.
COLD = """
import sys
import tnadapt as tna
path, member = sys.argv[1:3]
tna.load(sys.argv[3])
before = int(open("/proc/self/io").read().split("read_bytes:")[1].split()[0])
tna.load(path, members=[int(member) if member.isdigit() else member])
print(int(open("/proc/self/io").read().split("read_bytes:")[1].split()[0]) - before)
"""


def member_of(preset: str) -> tna.AdapterFile:
    """Return an adapter of 100 numbers."""
    config, shape, count = {
        "lora": (tna.presets.lora(1), (10, 15), 4),
        "unilora": (tna.presets.unilora(100, 4), (768, 768), 24),
    }[preset]
    targets = [tna.Target(f"layers.{number}.attention.query", shape, "q") for number in range(count)]
    member = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [shape] * count).init())
    assert member.num_parameters == 100
    return member


def written() -> int:
    """Return how many bytes this process has passed to ``write``."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Return the median and lowest milliseconds of a call, and the median of its processor time."""
    wall, cpu = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    times = {"median": statistics.median(wall), "low": min(wall), "cpu": statistics.median(cpu)}
    return {name: round(1000 * seconds, 3) for name, seconds in times.items()}


def cold(path: Path, which: int | str, other: Path) -> int:
    """Return the bytes that are read from the disk to load a member; 0 where the system does not count them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    result = subprocess.run(
        [sys.executable, "-c", COLD, path, str(which), other], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def rows(folder: Path, preset: str, named: bool, count: int) -> dict[str, Any]:
    """Measure one population."""
    member, rng = member_of(preset), np.random.default_rng(0)
    path, other = folder / f"{preset}-{named}.safetensors", folder / f"{preset}.safetensors"
    arrays = {name: rng.standard_normal((count, *array.shape), np.float32) for name, array in member.arrays.items()}
    names = [f"user-{number}" for number in range(count)] if named else None
    tna.save(path, tna.PopulationFile(member, arrays, names))
    tna.save(other, member)
    size = path.stat().st_size
    numbers = itertools.cycle(int(number) for number in rng.integers(count, size=ROUNDS))
    result: dict[str, Any] = {"preset": preset, "names": named, "members": count, "bytes": size}
    # First of all: pages that a process has mapped stay in the page cache.
    result["read, members=[number]"] = cold(path, count // 2, other)
    if named:
        result["read, members=[name]"] = cold(path, f"user-{count // 2}", other)
    path.read_bytes()  # into the page cache
    tna.load(path)  # checks the draws
    result["one adapter alone"] = timed(lambda: tna.load(other))
    result["load, members=[number]"] = timed(lambda: tna.load(path, members=[next(numbers)]))
    population = tna.load(path)
    result["population[number]"] = timed(lambda: population[next(numbers)])
    result["load"] = timed(lambda: tna.load(path))
    result["load, all arrays"] = timed(lambda: tna.load(path).arrays)
    if named:
        result["load, members=[name]"] = timed(lambda: tna.load(path, members=[f"user-{next(numbers)}"]))
        result["population[name]"] = timed(lambda: population[f"user-{next(numbers)}"])
    new = itertools.count()
    before = written()
    tna.append(path, member, f"new-{next(new)}" if named else None)
    result["written, append"] = written() - before
    result["append"] = timed(lambda: tna.append(path, member, f"new-{next(new)}" if named else None))
    before = written()
    tna.replace(path, next(numbers), member)
    result["written, replace"] = written() - before
    result["replace"] = timed(lambda: tna.replace(path, next(numbers), member))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small populations; write no results")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for preset, named in itertools.product(("lora", "unilora"), (False, True)):
            results.append(rows(Path(folder), preset, named, 1000 if options.smoke else 100_000))
            print(json.dumps(results[-1], indent=2), flush=True)
    if not options.smoke:
        content = {"machine": machine(), "load": os.getloadavg()[0], "rounds": ROUNDS, "rows": results}
        RESULTS.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

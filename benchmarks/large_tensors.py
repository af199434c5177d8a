"""Decompose a tensor of a billion elements from a memory map, and record time, peak memory and error.

    python benchmarks/large_tensors.py [--side 1000] [--folder FOLDER] [--smoke]

Writes results/large_tensors.json. The file of the tensor, 4 GB for a side of 1000, is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tnadapt.tensors import random_tucker

RESULTS = Path(__file__).parent / "results" / "large_tensors.json"
RANK, NOISE = (10, 12, 8), 0.01


def made(path: Path, side: int) -> np.memmap:
    """Write a tensor of low multilinear rank with noise, slab by slab."""
    small = random_tucker((side, side, side), RANK, orthogonal=True, random_state=1)
    array = np.memmap(path, np.float32, "w+", shape=(side, side, side))
    level = NOISE * float(np.linalg.norm(small.core)) / side**1.5
    rng = np.random.default_rng(2)
    step = max(1, (1 << 24) // side**2)
    for start in range(0, side, step):
        slab = small.part(slice(start, start + step)).to_tensor().astype(np.float32)
        slab += level * rng.standard_normal(slab.shape, np.float32)
        array[start : start + step] = slab
    array.flush()
    return array


def measured(array: np.memmap, name: str, request: dict[str, Any], memory: int) -> dict[str, Any]:
    """Decompose in a process of its own, whose peak is that of the decomposition."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        found = getattr(tna, name)(array, memory=memory, **request)
        line = {
            "function": name,
            "request": {key: str(value) for key, value in request.items()},
            "seconds": round(time.perf_counter() - begun, 1),
            "error": found.error,
            "rank": str(found.rank),
            "peak above the start, MB": round((anonymous() - before / 1024.0), 0),
        }
        os.write(write, json.dumps(line).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{name} failed")
    return dict(json.loads(text))


def anonymous() -> float:
    """Peak of the process's own memory in MB; pages of the mapped file are the system's to drop."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if ":" in line
    )
    return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) / 1024.0


def main() -> None:
    """Make the tensor, decompose it in each way, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the tensor is written")
    parser.add_argument("--smoke", action="store_true", help="a small tensor, nothing is written")
    given = parser.parse_args()
    side, memory = (60, 1 << 18) if given.smoke else (given.side, 1 << 27)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        array = made(Path(folder) / "tensor", side)
        rows = [
            measured(array, name, request, memory)
            for name, request in (
                ("tucker", {"rank": RANK}),
                ("tucker", {"max_error": 0.02}),
                ("tensor_train", {"rank": (RANK[0], RANK[2])}),
            )
        ]
    for row in rows:
        print(json.dumps(row))
        if row["error"] > 2 * NOISE:
            sys.exit(f"the error of {row['function']} is {row['error']:.3g}; expected about {NOISE}")
    if not given.smoke:
        facts = {"shape": [side] * 3, "dtype": "float32", "block, bytes": memory, "noise": NOISE}
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        RESULTS.write_text(json.dumps({**facts, **machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

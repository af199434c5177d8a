"""One weight out of a group of 2**30 elements, against a copy of as many: a part of ``benchmarks/fast.py``.

Query and value of Llama-7B are 64 weights of 4096² in one group. The benchmark requests one of them, 2**24 float32,
aligned in the group (*aligned*) or 12,345 elements further (*off*), and compares it with a copy of an array of that
size, on one thread. In one setting, the memory written is new from the system at each call, and its page faults cost
as much as a copy; in the other the allocator keeps it (glibc's ``M_MMAP_MAX`` 0), and only the work remains.
Memory beyond the slice is the peak growth of the process's resident set.

A slice of a linear F processes the draws of all of F: it is timed separately, with its memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tnadapt.backends import load_backend

__all__ = ["keep_memory", "measure"]

Row = dict[str, Any]

WEIGHTS, WIDTH = 64, 4096
OFF = 12_345
ROUNDS = 15


def _config(**settings: Any) -> tna.Config:
    return tna.Config(**{"groups": 1, "fold": "hypercube", "rank": 8, **settings})


CASES: dict[str, tna.Config] = {
    **{f"CP, M = {order}, r = 8": _config(order=order) for order in (2, 3, 4, 5)},
    **{f"Tucker, M = {order}, r = 4": _config(order=order, rank=4, format="tucker") for order in (3, 5)},
    **{f"tensor train, M = {order}, r = 8": _config(order=order, format="tt") for order in (3, 5)},
    **{f"Kronecker, K = {splits}": _config(splits=splits) for splits in (2, 3)},
}
#: Weights, width: ViT-base's 2**24 (padded) elements, and 2**30.
THROUGH_F = ((24, 768), (64, 4096))


def measure(smoke: bool) -> list[Row]:
    """Return a row for each case, library, place and setting; then those through F."""
    rows: list[Row] = []
    for library in ("numpy", "torch"):
        for memory in ("kept", "new"):
            rows += _child("cases", library, memory, smoke)
    rows += _child("through_f", "numpy", "new", smoke)
    return rows


def _child(what: str, library: str, memory: str, smoke: bool) -> list[Row]:
    """Return the rows of a separate process, whose allocator is configured at the start."""
    command = [sys.executable, str(Path(__file__)), what, library, memory, *(["smoke"] if smoke else [])]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in told.splitlines()]


def cases(library: str, memory: str, smoke: bool) -> list[Row]:
    """Measure one library's slices and copies."""
    if memory == "kept" and not keep_memory():
        return []
    backend = load_backend(library)
    if library == "torch":
        import torch

        torch.set_num_threads(1)
    count, width = (4, 64) if smoke else (WEIGHTS, WIDTH)
    size, rows = width * width, list[Row]()
    source = backend.asarray(np.ones(size, np.float32))
    copy: Callable[[], Any] = source.clone if library == "torch" else source.copy
    for case, config in CASES.items():
        plan, params = _made(config, count, width, library)
        for place, start in (("aligned", count // 2 * size), ("off", count // 2 * size + OFF % size)):

            def work(plan: Any = plan, params: Any = params, start: int = start) -> Any:
                return plan.vector(params, start, start + size)

            pairs = [(_seconds(work), _seconds(copy)) for _ in range(3 if smoke else ROUNDS)][1:]
            row = {
                "case": case, "library": library, "place": place, "memory": memory, "elements": size,
                "group": plan.size, "seconds": statistics.median(one for one, _ in pairs),
                "copy_seconds": statistics.median(other for _, other in pairs),
                "ratio": statistics.median(one / other for one, other in pairs),
            }  # fmt: skip
            if memory == "new":
                row["bytes_beyond"] = _resident(work) - 4 * size
            rows.append(row)
    return rows


def through_f(library: str, memory: str, smoke: bool) -> list[Row]:
    """Measure one weight out of a group through a linear F, with nothing of F cached before or after."""
    rows = []
    for count, width in ((4, 64),) if smoke else THROUGH_F:
        config = _config(projection="linear", ratio=0.01)
        plan, params = _made(config, count, width, library)

        def work(config: Any = config, plan: Any = plan, params: Any = params) -> Any:
            return tna.SuperLoRA(config, plan.shapes).delta(params, len(plan.shapes) // 2)

        found = _resident(work, times := list[float]())
        rows.append(
            {
                "case": "linear F, ρ = 0.01",
                "library": library,
                "place": "aligned",
                "elements": width * width,
                "group": plan.size,
                "seconds": times[0],
                "bytes_beyond": found - 4 * width * width,
                "compressed_bytes": 4 * plan.groups[0].network.size,
            }
        )
    return rows


def _made(config: tna.Config, count: int, width: int, library: str) -> tuple[tna.SuperLoRA, dict[str, Any]]:
    plan, rng, backend = (
        tna.SuperLoRA(config, [(width, width)] * count),
        np.random.default_rng(0),
        load_backend(library),
    )
    host = {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.param_shapes.items()}
    return plan, {name: backend.asarray(array) for name, array in host.items()}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    found = work()
    took = time.perf_counter() - began
    del found  # releasing the memory is not timed
    return took


def keep_memory() -> bool:
    """Tell glibc to take all memory from its heap and return none; False with another C library."""
    try:
        told = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return bool(told(m_mmap_max, 0) and told(m_trim_threshold, 2**31 - 1) and told(m_top_pad, 1 << 29))


def _resident(work: Callable[[], Any], times: list[float] | None = None) -> int:
    """Return the peak growth of the resident set, including the result."""
    gc.collect()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return 0
    took = _seconds(work)
    if times is not None:
        times.append(took)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 3:
        for found in globals()[sys.argv[1]](sys.argv[2], sys.argv[3], "smoke" in sys.argv):
            print(json.dumps(found), flush=True)
    else:
        for found in measure("--smoke" in sys.argv):
            print(found, flush=True)

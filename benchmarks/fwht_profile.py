"""Where the time of ``tnadapt.fwht`` goes: its passes over memory, its call from Python, and narrower vectors.

``python benchmarks/fwht.py --profile`` prints the first two, ``--avx2`` the transform in place with AVX2 only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from fwht import Contestants, numbers, timed

import tnadapt as tna
from tnadapt.backends._kernels import kernels

__all__ = ["call", "passes", "with_avx2"]

Row = dict[str, Any]


def passes(bits: int, dtype: str, smoke: bool) -> list[Row]:
    """Compare each pass of a transform in place with a copy of as many bytes, all on one thread."""
    compiled = kernels("walsh")
    if compiled is None:
        return []
    x, to, of = (numbers(1 << bits, dtype) for _ in range(3))
    x[...] = 0
    rows = []
    for number, one in enumerate(compiled.planned(x.shape, -1, x.itemsize, 1), 1):
        runs: Contestants = {
            "ours": lambda one=one: one.kernel(x, x, 0, one.pieces, *one.how, 1.0),  # type: ignore[misc]
            "copy, one thread": lambda: np.copyto(to, of),
        }
        found = timed(runs, lambda: None, smoke)
        moved = 2 * x.nbytes  # each number is read once and written once
        about = {"GB/s": moved / found["ours"] / 1e9, "GB/s of the copy": moved / found["copy, one thread"] / 1e9}
        name = f"pass {number}, {one.kernel.__name__}"
        rows.append({"case": name, "size": x.size, "dtype": dtype, **found, **about})
    return rows


def call(bits: int, dtype: str, smoke: bool) -> list[Row]:
    """Divide the time of a call on a small vector into the kernel and everything around it.

    The time of the kernel is what each further row of a small batch adds to one call.
    """
    compiled, torch = kernels("walsh"), sys.modules.get("torch")
    if compiled is None:
        return []
    x, memory, rows = np.zeros(1 << bits, dtype), numbers(4 << bits, dtype), 4
    memory[...] = 0
    one, *_ = compiled.planned(x.shape, -1, x.itemsize, 1)
    ways: Contestants = {
        "ours": lambda: tna.fwht(x, normalize=False),
        "in place": lambda: compiled.transform_into(x, x, 1.0),
        "kernel on one row": lambda: one.kernel(memory, memory, 0, 1, *one.how, 1.0),
        "kernel on some rows": lambda: one.kernel(memory, memory, 0, rows, *one.how, 1.0),
    }
    if torch is not None:
        t = torch.from_numpy(x)
        ways["torch"] = lambda: tna.fwht(t, normalize=False)
    found = timed(ways, lambda: None, smoke)
    kernel = (found["kernel on some rows"] - found["kernel on one row"]) / (rows - 1)
    about = {"kernel": kernel, "ours - kernel": found["ours"] - kernel, "in place - kernel": found["in place"] - kernel}
    if torch is not None:
        about["torch - ours"] = found["torch"] - found["ours"]
    return [{"case": "a call", "size": x.size, "dtype": dtype, **found, **about}]


def with_avx2(smoke: bool) -> list[Row]:
    """Measure the transform in place in a process whose kernels are compiled without AVX-512; none if so they are."""
    simd = kernels("simd")
    if simd is None or simd.VECTOR_BYTES < 64:
        return []
    import llvmlite.binding

    there = llvmlite.binding.get_host_cpu_features()
    kept = (
        ("+" if on and not name.startswith(("avx512", "avx10", "evex")) else "-") + name for name, on in there.items()
    )
    code = (
        "import json, fwht\n"
        f"for bits, dtype in fwht.cases({smoke})[: {1 if smoke else None}]:\n"
        f"    print(json.dumps(fwht.in_memory_that_is_there(bits, dtype, {smoke})))"
    )
    environment = {**os.environ, "NUMBA_CPU_FEATURES": ",".join(kept)}
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    found = [row for line in done.stdout.splitlines() for row in json.loads(line)]
    return [{**row, "case": f"{row['case']}, {row['instructions']}"} for row in found]

"""How time and memory grow with the number of elements, by format: a part of ``benchmarks/fast.py``.

One group of all query and value weights of a model, from 10**5 to 10**9 elements; the ranks stay constant while the
models grow. Timed are the plan, all updates computed one weight after another, and all at once if they fit into memory.
Peak memory is the peak of NumPy and Python (tracemalloc), in a separate call. The allocator is told to keep its memory,
if possible, up to its limit of 2 GiB: otherwise the system provides new pages for arrays of more than 32 MB at each
call, and the resulting step in all curves at one weight size, which a copy shows as well, would be mistaken for growth.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna

__all__ = ["draw", "measure"]

Row = dict[str, Any]
Params = dict[str, np.ndarray]

#: Weights and their width: q and v of ever larger models, ViT-S, ViT-base, ViT-L and Llama-7B among them.
MODELS = ((4, 160), (12, 288), (24, 384), (24, 768), (48, 1024), (64, 2048), (64, 4096))
SMOKE = ((4, 32), (4, 64))
#: Updates are computed at once up to this many bytes of float32; less through F, which takes about thirty per element.
WHOLE, WHOLE_F = 3e9, 3e8
#: Bytes that are written once before anything is timed: more than any case uses.
TOUCHED = 8 << 30
#: Time limit for one case of one size.
PATIENCE = 20.0


def _config(**settings: Any) -> tna.Config:
    return tna.Config(**{"groups": 1, "fold": "hypercube", **settings})


CASES: dict[str, tna.Config] = {
    "CP, M = 2": _config(rank=8),
    "CP, M = 3": _config(rank=8, order=3),
    "Tucker, M = 3": _config(rank=4, order=3, format="tucker"),
    "Tucker, M = 5": _config(rank=4, order=5, format="tucker"),
    "tensor train, M = 4": _config(rank=8, order=4, format="tt"),
    "Kronecker, K = 2": _config(rank=8, splits=2),
    "Kronecker, K = 3": _config(rank=8, splits=3),
    "Hadamard, K = 2": _config(rank=4, splits=2, combine="hadamard", leading="same"),
    "4 terms of CP": _config(rank=2, terms=4),
    "4 terms of Kronecker": _config(rank=8, splits=2, terms=4),
    "linear F, ρ = 0.01": _config(rank=8, projection="linear", ratio=0.01),
    "shuffle": _config(rank=8, projection="shuffle"),
}


def measure(smoke: bool) -> list[Row]:
    """Return a row for each case, phase and size."""
    keep_memory()
    # The host may not have allocated all memory of a virtual machine yet, which takes seconds per gigabyte, once.
    np.ones(1 if smoke else TOUCHED, np.uint8)
    sizes = SMOKE if smoke else MODELS
    return [row for case, config in CASES.items() for size in sizes for row in _of_size(case, config, *size)]


def keep_memory() -> None:
    """Tell glibc to take all memory from its heap and return none; another C library does as it likes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 1 << 29)):
            mallopt(option, value)


def _of_size(case: str, config: tna.Config, count: int, width: int) -> list[Row]:
    shapes = [(width, width)] * count
    plan = tna.SuperLoRA(config, shapes)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.param_shapes.items()}

    def row(phase: str, work: Callable[[], object]) -> Row:
        seconds = _seconds(work)
        found = {"case": case, "phase": phase, "elements": plan.size, "weights": count, "seconds": seconds}
        return found | {"parameters": plan.num_parameters, "peak_bytes": _peak(work), "weight_bytes": 4 * width * width}

    rows = [row("plan", lambda: tna.SuperLoRA(config, shapes).num_parameters)]
    mixed = config.projection not in ("identity", "shuffle")
    if mixed or config.projection == "shuffle":
        # A slice processes the draws of the whole group, or forms it: over all weights this is quadratic.
        rows.append(row("one weight", lambda: tna.SuperLoRA(config, shapes).delta(params, count // 2)))
    else:
        rows.append(row("weight by weight", lambda: _each(plan, params)))
    if 4 * plan.size <= (WHOLE_F if mixed else WHOLE):
        if config.projection != "identity":
            rows.append(row("whole, drawn anew", lambda: tna.SuperLoRA(config, shapes).deltas(params)))
            plan.deltas(params)
        rows.append(row("whole", lambda: plan.deltas(params)))
    return rows


def _each(plan: tna.SuperLoRA, params: Params) -> None:
    for weight in range(len(plan.shapes)):
        plan.delta(params, weight)


def _seconds(work: Callable[[], object]) -> float:
    """Return the median of a few runs; short work is repeated within a run."""
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    if first > PATIENCE / 5:
        return first
    times = max(1, math.ceil(1e-3 / max(first, 1e-7)))
    found = []
    for _ in range(5):
        gc.collect()
        began = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - began) / times)
    return statistics.median(found)


def _peak(work: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- The picture -----------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    """Plot time and memory against the number of elements, one line per format, and a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    colours = dict(zip(CASES, plt.colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    for case, colour in colours.items():
        for phase, style in {"weight by weight": "-", "whole": "-", "one weight": ":"}.items():
            own = sorted((r for r in rows if (r["case"], r["phase"]) == (case, phase)), key=lambda r: r["elements"])
            if not own or (phase == "whole" and CASES[case].projection == "identity"):
                continue
            label = {"-": case, ":": f"{case}, one weight"}[style]
            sizes = [r["elements"] for r in own]
            left.plot(sizes, [r["seconds"] for r in own], style, color=colour, marker="o", markersize=3, label=label)
            right.plot(sizes, [r["peak_bytes"] for r in own], style, color=colour, marker="o", markersize=3)
    ends = np.array([min(r["elements"] for r in rows), max(r["elements"] for r in rows)], float)
    left.plot(ends, 2e-9 * ends, "--", color="black", linewidth=1, label="2 ns per element (slope 1)")
    right.plot(ends, 4 * ends, "--", color="black", linewidth=1, label="float32 of all elements (slope 1)")
    for axes, title, unit in (
        (left, "Time of all updates, weight by weight or whole", "seconds"),
        (right, "Peak memory", "bytes"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="elements N", ylabel=unit, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)

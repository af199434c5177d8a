"""Planning, extraction and merging: ``python benchmarks/fast.py files``.

- ``plan``: :func:`tnadapt.plan` and its printed table for many weights, in seconds.
- ``extract``: :func:`tnadapt.extract` of the q and v of a checkpoint of ViT-base's shapes, in seconds.
- ``merge``: :func:`tnadapt.merge` into it, over a plain read and write of the same file by ``safetensors.numpy``, in
  turn.

``cpu`` is processor time of all threads, which other processes on the machine disturb less than ``wall``. The merge
synchronizes its files with the disk, and a plain write does not: ``plain_synced`` is the plain one with an fsync. All
files are in the page cache.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import tnadapt as tna
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.fingerprint import fingerprint
from tnadapt.targets.checkpoint_targets import find_stored

PRESETS = {
    "lora(4)": tna.presets.lora(4),
    "lokr(16)": tna.presets.lokr(16),
    "superlora(4)": tna.presets.superlora(4),
    "lorta(4)": tna.presets.lorta(4),
    "dense": tna.presets.dense(),
    "superlora(4) + F, ρ = 1": tna.presets.superlora(4, projection="linear"),
    "superlora(4) + F, ρ = 0.1": tna.presets.superlora(4, projection="linear", ratio=0.1),
    "fastfood(0.01)": tna.presets.fastfood(0.01),
}


def vit(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as transformers stores a ViT."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, hidden), "embeddings.position_embeddings": (1, 197, hidden),
        "embeddings.patch_embeddings.projection.weight": (hidden, 3, 16, 16),
    }  # fmt: skip
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        linear = {f"{at}.attention.attention.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        linear[f"{at}.attention.output.dense"] = (hidden, hidden)
        linear[f"{at}.intermediate.dense"] = (4 * hidden, hidden)
        linear[f"{at}.output.dense"] = (hidden, 4 * hidden)
        for name, shape in linear.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        found |= {f"{at}.layernorm_{place}.weight": (hidden,) for place in ("before", "after")}
    return found


def make(folder: Path, hidden: int, layers: int) -> tuple[Path, Path]:
    """Write a checkpoint of random numbers, and one whose queries and values differ from it."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape, np.float32) * 0.02 for name, shape in vit(hidden, layers).items()}
    save_file(base, folder / "base.safetensors")
    for name in find_stored({name: array.shape for name, array in base.items()}, "qv", None):
        left, right = rng.standard_normal((hidden, 8), np.float32), rng.standard_normal((8, hidden), np.float32)
        base[name.name] += 1e-4 * (left @ right + rng.standard_normal((hidden, hidden), np.float32))
    save_file(base, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def adapter(path: Path, base: Path, config: tna.Config) -> None:
    """Write an adapter as if trained on the base's queries and values."""
    checkpoint = open_checkpoint(base)
    targets = find_stored({name: entry.shape for name, entry in checkpoint.entries.items()}, "qv", checkpoint.config)
    plan = tna.UpdatePlan(config, [target.shape for target in targets])
    rng = np.random.default_rng(1)
    arrays = {name: array + rng.normal(size=array.shape).astype("f4") * 0.01 for name, array in plan.init().items()}
    known = fingerprint((checkpoint.array(target.name) for target in targets), "float32")
    tna.save(path, tna.AdapterFile(config, targets, arrays, base=known))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return processor time and wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def plans(weights: int) -> Iterator[dict[str, Any]]:
    """Plan for weights of one shape, and for those of grouped-query attention with layers and roles."""
    keys = {"layers": [i // 2 for i in range(weights)], "roles": ["q", "v"] * (weights // 2)}
    cases: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
        "one shape": ([(768, 768)] * weights, {}),
        "layers and roles": ([(768, 768)] * weights, keys),
        "grouped queries": ([(768, 768), (256, 768)] * (weights // 2), keys),
    }
    for name, (shapes, known) in cases.items():
        found: list[tna.planning.Plan] = []
        searched = timed(lambda: found.append(tna.plan(shapes, "1 MB", **known)))  # noqa: B023
        printed = timed(lambda: str(found[0]))  # noqa: B023
        yield {
            "case": f"plan, {name}", "weights": weights, "settings": len(found[0].rows),
            "cpu": searched[0] + printed[0],
            "wall": searched[1] + printed[1], "cpu_of_table": printed[0],
        }  # fmt: skip


def extractions(base: Path, tuned: Path) -> Iterator[dict[str, Any]]:
    for name, config in PRESETS.items():
        found: list[Any] = []
        cpu, wall = timed(lambda: found.append(tna.extract(base, tuned, config, max_error=None)))  # noqa: B023
        report = found[0].report
        yield {
            "case": f"extract, {name}", "cpu": cpu, "wall": wall, "error": report.error,
            "iterations": sum(group.iterations for group in report.groups), "method": report.groups[0].method,
        }  # fmt: skip


def synchronized(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.close(handle)


def merges(base: Path, rounds: int) -> Iterator[dict[str, Any]]:
    folder = base.parent
    out, copy = folder / "merged.safetensors", folder / "copy.safetensors"

    def plain() -> None:
        save_file(load_file(base), copy)

    def plain_synced() -> None:
        plain()
        synchronized(copy)

    for name, config in PRESETS.items():
        file = folder / "adapter.safetensors"
        adapter(file, base, config)
        ways: dict[str, Callable[[], Any]] = {
            "plain": plain, "plain_synced": plain_synced, "merge": lambda: tna.merge(base, file, out)  # noqa: B023
        }  # fmt: skip
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, work in ways.items():
                for path in (out, copy):
                    path.unlink(missing_ok=True)
                os.sync()
                took = timed(work)
                if number:  # the first fills the page cache and compiles kernels
                    seconds[way].append(took)
        middle = {way: [statistics.median(one) for one in zip(*took, strict=True)] for way, took in seconds.items()}
        yield {
            "case": f"merge, {name}", "bytes": base.stat().st_size, "rounds": rounds,
            **{f"cpu_{way}": found[0] for way, found in middle.items()},
            **{f"wall_{way}": found[1] for way, found in middle.items()},
            "cpu_ratio": middle["merge"][0] / middle["plain"][0],
            "wall_ratio": middle["merge"][1] / middle["plain"][1],
            "wall_ratio_synced": middle["merge"][1] / middle["plain_synced"][1],
        }  # fmt: skip


def measure(smoke: bool = False) -> list[dict[str, Any]]:
    """Measure all cases; on tiny sizes if ``smoke``."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TNADAPT_BENCHMARK_FOLDER")))
    rows = []
    try:
        base, tuned = make(folder, 64 if smoke else 768, 2 if smoke else 12)
        weights, rounds = (20, 1) if smoke else (10_000, 5)
        for row in itertools.chain(plans(weights), extractions(base, tuned), merges(base, rounds)):
            rows.append({name: round(one, 4) if isinstance(one, float) else one for name, one in row.items()})
            print({name: one for name, one in rows[-1].items() if name != "method"}, flush=True)
    finally:
        shutil.rmtree(folder)
    return rows

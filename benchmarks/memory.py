"""Peak memory of a training step of ViT-base, against PEFT's LoRA: a part of ``benchmarks/fast.py``.

Each case takes three steps in a separate process; the measurement is the system's peak resident size of that process
since it started (``VmHWM``; ``getrusage`` would report at least the parent's peak).

``python benchmarks/memory.py --profile [CASE …]`` reports where the peak of each case lies and what it consists of, and
stores it in ``results/memory_profile.jsonl``: the peak of forward and of backward in the last step, what numba adds as
it is loaded, and the bytes of the arrays of F.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import steps
from profiles import store

import tnadapt as tna
import tnadapt.torch
from tnadapt.backends import kernels

__all__ = ["measure"]

#: The cases besides PEFT's LoRA.
CASES = ("peft lokr r=4", "peft fourierft", *steps.OURS)


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return one row per case; in the smoke run one case, on a tiny model."""
    return above("vit", CASES[-1:] if smoke else CASES, smoke)


def above(kind: str, names: Iterable[str], smoke: bool) -> list[dict[str, Any]]:
    """Return the peak of each case, and its difference from PEFT's LoRA."""
    found: dict[str, float] = {}
    for name in dict.fromkeys([steps.REFERENCE, *names]):
        command = [sys.executable, __file__, kind, name, *(["--smoke"] if smoke else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found[name] = float(done.stdout.split()[-1])
    return [
        {"problem": kind, "case": name, "peak MB": round(value), "above lora MB": round(value - found[steps.REFERENCE])}
        for name, value in found.items()
    ]


def peak(kind: str, name: str, smoke: bool) -> float:
    """Return the peak resident megabytes of this process after a few steps."""
    contestant = steps.Contestant(name, steps.PROBLEMS[kind](smoke=smoke))
    for _ in range(3):
        contestant.step()
    return resident("VmHWM")


def resident(entry: str = "VmRSS") -> float:
    """Return the resident megabytes of this process, or at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory was resident")


# -- What the peak consists of ---------------------------------------------------------------


def profiles(kind: str, names: Iterable[str], smoke: bool) -> list[dict[str, Any]]:
    """Return the rows of :func:`profile` for each case, with the differences of the peaks from PEFT's LoRA."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([steps.REFERENCE, *names]):
        command = [sys.executable, __file__, "--profile-one", kind, name, *(["--smoke"] if smoke else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    lora = found[steps.REFERENCE]
    return [
        {
            "problem": kind,
            "case": name,
            "part": part,
            "MB": round(value, 1),
            **({"above lora MB": round(value - lora[part], 1)} if part in lora else {}),
        }
        for name, parts in found.items()
        for part, value in parts.items()
    ]


def profile(kind: str, name: str, smoke: bool) -> dict[str, float]:
    """Return megabytes by part: what is loaded, the peaks of a step, and the arrays of F."""
    problem = steps.PROBLEMS[kind](smoke=smoke)
    parts = {"libraries and model": resident()}
    if name in steps.OURS:
        _use_kernels()
        parts["numba and the kernels"] = resident() - parts["libraries and model"]
    contestant = steps.Contestant(name, problem)
    parts["peak of three steps"] = 0.0
    peaks = {}
    for _ in range(3):
        loss, peaks["peak of forward"] = _at_peak(lambda: contestant.model(**contestant.batch).loss)
        peaks["after forward"] = resident()
        _, peaks["peak of backward"] = _at_peak(loss.backward)
        del loss
        contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
        parts["peak of three steps"] = max(parts["peak of three steps"], *peaks.values())
    return {**parts, **peaks, **_arrays(contestant)}


def _use_kernels() -> None:
    """Load the kernels of F as a step does: numba registers its types in the first call."""
    if kernels("fastfood") is not None:
        f = tna.Projection("linear", 1, 1 << 14)
        f.adjoint(f(np.ones(1, np.float32)))


def _at_peak(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a function, and the peak resident megabytes during the call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    made = run()
    return made, resident("VmHWM")


def _arrays(contestant: steps.Contestant) -> dict[str, float]:
    """Return the megabytes of ΔW, of each array that F keeps, and of its idle work space."""
    parts: dict[str, float] = {}
    for adapter in tnadapt.torch.adapters(contestant.model).values():
        for group in adapter.plan.arrays_plan.groups:
            parts["ΔW, whole"] = parts.get("ΔW, whole", 0.0) + 4 * group.projection.n_out / 2**20
            for draws in group.projection.map.components():
                for key, array in draws.kept.items():
                    parts[f"F: {key}"] = parts.get(f"F: {key}", 0.0) + array.nbytes / 2**20
                spare = draws.spare_bytes / 2**20
                parts["F: work space"] = parts.get("F: work space", 0.0) + spare
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="for a profile; by default those with F")
    parser.add_argument("--profile", action="store_true", help="what the peak of each case consists of")
    parser.add_argument("--profile-one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: only check that it runs")
    given = parser.parse_args()
    steps.torch.set_num_threads(steps.THREADS)
    if given.profile:
        rows = profiles("vit", given.cases or ("superlora", *steps.SLOW), given.smoke)
        for row in rows:
            print(f"{row['case']:18} {row['MB']:>8.1f} MB {row.get('above lora MB', ''):>7}  {row['part']}")
        if not given.smoke:
            store(
                "memory_profile", rows, {"case": "case", "part": "part", "MB": "MB", "above lora MB": "above LoRA, MB"}
            )
    elif given.profile_one:
        print(json.dumps(profile(*given.cases, given.smoke)))
    else:
        print(peak(*given.cases, given.smoke))


if __name__ == "__main__":
    main()

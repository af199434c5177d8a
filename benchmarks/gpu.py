"""On a CUDA device: the Hadamard transform, the linear F and a training step: ``python benchmarks/gpu.py [--smoke]``.

Transforms and F are compared with a copy of as many bytes on the device (read once, written once), from torch and, if
installed, from CuPy. A step is of ViT-base in bfloat16, batch 128 of 224², q and v adapted, against PEFT's LoRA of
rank 4. Contestants alternate, each timed from an idle device to an idle device; the numbers are medians, with the name
of the GPU. Without a device there is one row that says so; the smoke run then tests tiny sizes on the CPU.

``python benchmarks/gpu.py --first-run`` does all that has to be done first on a new card: the kernels' tests, the
checks of ``gpu_first_run.py``, and these measurements. Each item runs in a process of its own, and the rest goes on if
one fails. Card, date, versions and figures are written to ``gpu_first_run.json`` (``--out``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_first_run import CHECKS, first_run
from steps import CASES, REFERENCE, Contestant, Problem, vit

import tnadapt as tna
from tnadapt.backends import available_backends

__all__ = ["measure"]

ROUNDS = 30
STEPS = ["lora", "lokr", "superlora", "dense", "superlora F 0.01", "superlora F 1"]


def idle(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def medians(device: str, contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the milliseconds of each, alternating, after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-2, rounds):
        for name, run in contestants.items():
            idle(device)
            start = time.perf_counter()
            run()
            idle(device)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def arrays(library: str, device: str, size: int, dtype: str) -> tuple[Any, Any, Callable[[], Any]]:
    """Return random numbers of a library on the device, a buffer of the same size, and a copy from one to the other."""
    if library == "torch":
        x = torch.randn(size, dtype=getattr(torch, dtype), device=device)
        buffer = torch.empty_like(x)
        return x, buffer, lambda: buffer.copy_(x)
    import cupy

    x = cupy.random.standard_normal(size, dtype=dtype)
    buffer = cupy.empty_like(x)
    return x, buffer, lambda: cupy.copyto(buffer, x)


def libraries(device: str) -> list[str]:
    """Return the libraries with arrays on the device."""
    return ["torch", "cupy"] if device == "cuda" and "cupy" in available_backends() else ["torch"]


def transforms(device: str, bits: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure fwht of float32 and float64 vectors, and of a batch of short ones with as many bytes as 2**24 numbers."""
    shapes = [(f"2^{b}", (1 << b,)) for b in bits]
    shapes += [(f"2^{b} × 2^{bits[-1] - b}", (1 << bits[-1] - b, 1 << b)) for b in bits[:1]]
    for library in libraries(device):
        for dtype in ("float32", "float64"):
            for name, shape in shapes:
                x, _, copy = arrays(library, device, math.prod(shape), dtype)
                x = x.reshape(shape)
                found = medians(device, {"copy": copy, "fwht": lambda x=x: tna.fwht(x)}, rounds)
                yield {
                    "what": "fwht", "library": library, "dtype": dtype, "points": name, "ms": found["fwht"],
                    "copy ms": found["copy"], "× copy": found["fwht"] / found["copy"],
                }  # fmt: skip


def projections(device: str, size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure F of that size and its adjoint; F stores nothing, so every time includes its draws."""
    for library in libraries(device):
        for kind in ("linear", "linear_v2"):
            for ratio in (0.01, 1.0):
                f = tna.Projection(kind, max(1, round(ratio * size)), size, seed=0)
                x, _, _ = arrays(library, device, f.n_in, "float32")
                y, _, copy = arrays(library, device, size, "float32")
                ways = {"copy": copy, "forward": lambda f=f, x=x: f(x), "backward": lambda f=f, y=y: f.adjoint(y)}
                found = medians(device, ways, rounds)
                for way in ("forward", "backward"):
                    yield {
                        "what": "F", "library": library, "kind": kind, "ρ": ratio, "points": size, "way": way,
                        "ms": found[way], "copy ms": found["copy"], "× copy": found[way] / found["copy"],
                    }  # fmt: skip


class OnDevice(Contestant):
    """A contestant whose step is in bfloat16, and ends when the device is idle."""

    def step(self) -> float:
        device = self.batch["pixel_values"].device.type
        idle(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        idle(device)
        return time.perf_counter() - start


def steps(device: str, smoke: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure alternating training steps, each with its ratio to PEFT's LoRA in the same round."""
    made = vit(smoke)
    batch = {name: tensor.to(device) for name, tensor in made.batch.items()}
    repeats = 1 if smoke else 16
    batch = {name: tensor.repeat(repeats, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    problem = Problem(made.model.to(device, torch.bfloat16), batch, *made[2:])
    contestants = [OnDevice(name, problem) for name in [REFERENCE, *STEPS] if name in CASES]
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(-2, rounds):
        for index in range(len(contestants)):
            contestant = contestants[(turn + index) % len(contestants)]
            seconds = contestant.step()
            if turn >= 0:
                times[contestant.name].append(seconds)
    for name, found in times.items():
        ratios = [mine / lora for mine, lora in zip(found, times[REFERENCE], strict=True)]
        yield {
            "what": "step of ViT-base", "case": name, "batch": len(batch["labels"]),
            "ms": 1e3 * statistics.median(found), "× PEFT's LoRA": statistics.median(ratios),
        }  # fmt: skip


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return all rows; without a device, one that says "not measured"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    if smoke or device == "cuda":
        rounds = 1 if smoke else ROUNDS
        rows += transforms(device, [4, 6] if smoke else list(range(10, 28, 2)), rounds)
        rows += projections(device, 100 if smoke else 1 << 24, rounds)
        rows += steps(device, smoke, rounds)
    if device == "cpu":
        return [{"what": "all of it", "result": "not measured: no CUDA device"}]
    card = torch.cuda.get_device_name()
    return [{**row, "card": card} for row in rows]


def items() -> dict[str, Callable[[str, bool], Iterable[dict[str, Any]]]]:
    """Return what a first run does, in order."""
    return {
        **{name: CHECKS[name] for name in ("kernel tests", "same bits")},
        "transforms": lambda device, smoke: transforms(
            device, [4, 6] if smoke else [13, 22, 24], 1 if smoke else ROUNDS
        ),
        "F": lambda device, smoke: projections(device, 100 if smoke else 1 << 24, 1 if smoke else ROUNDS),
        **CHECKS,
        "step of ViT-base": lambda device, smoke: steps(device, smoke, 1 if smoke else ROUNDS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--first-run", action="store_true", help="all checks and measurements, each in a process")
    parser.add_argument("--item", choices=list(items()), help="one item of the first run")
    parser.add_argument("--out", type=Path, default=Path("gpu_first_run.json"), help="the file of the first run")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (given.first_run or given.item) and device == "cpu" and not given.smoke:
        parser.error(
            "there is no CUDA device, so nothing is measured; --smoke tries all items in tiny sizes on the CPU"
        )
    if given.first_run:
        raise SystemExit(0 if first_run(list(items()), given.out, given.smoke) else 1)
    for row in items()[given.item](device, given.smoke) if given.item else measure(given.smoke):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()

"""Peak memory of a training step of ViT-base, against PEFT's LoRA: a part of ``benchmarks/fast.py``.

Each case takes three steps in a separate process; the measurement is the system's peak resident size of that process
since it started (``VmHWM``; ``getrusage`` would report at least the parent's peak).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import steps

#: The cases besides PEFT's LoRA.
CASES = ("peft lokr r=4", "peft fourierft", *steps.OURS)


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return the peak of each case, and its difference from PEFT's LoRA; of one in the smoke run, on a tiny model."""
    found: dict[str, float] = {}
    for name in (steps.REFERENCE, *(CASES[-1:] if smoke else CASES)):
        command = [sys.executable, __file__, name, *(["--smoke"] if smoke else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found[name] = float(done.stdout.split()[-1])
    lora = found[steps.REFERENCE]
    return [
        {"problem": "vit", "case": name, "peak MB": round(value), "above lora MB": round(value - lora)}
        for name, value in found.items()
    ]


def peak(name: str, smoke: bool) -> float:
    """Return the peak resident megabytes of this process after a few steps."""
    contestant = steps.Contestant(name, steps.vit(smoke))
    for _ in range(3):
        contestant.step()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory was resident")


if __name__ == "__main__":
    name, *options = sys.argv[1:]
    steps.torch.set_num_threads(steps.THREADS)
    print(peak(name, "--smoke" in options))

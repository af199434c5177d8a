"""The cost of importing and attaching: a part of ``benchmarks/fast.py``.

``import tnadapt``, with the modules that it imports when they are first used, beyond ``import numpy``, and
``import tnadapt.torch`` beyond ``import torch``, in processes that alternate; and ``tnadapt.torch.attach`` on a model
of Llama-7B's sizes from its config alone, on the meta device and on the CPU (in bfloat16, whose memory is never written
to and so takes none), beyond the cost of drawing its arrays.

``python benchmarks/startup.py --commands`` measures how long the command line takes to refuse a wrong option, as
processor time of user and system, beside Python alone and the libraries that the command line imports; processes
alternate. It writes ``benchmarks/results/command_line.json``.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

__all__ = ["measure", "measure_commands"]

#: Wrong options, and what their cost is compared with.
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import typer, rich": ["-c", "import typer, rich"],
    "import numpy": ["-c", "import numpy"],
    "import tnadapt": ["-c", "import tnadapt"],
    "tnadapt fintune": ["-m", "tnadapt", "fintune"],
    "tnadapt finetune --presett lora": ["-m", "tnadapt", "finetune", "--presett", "lora"],
    "tnadapt finetune --preset lorra": ["-m", "tnadapt", "finetune", "--preset", "lorra"],
    "tnadapt finetune --rank 0": ["-m", "tnadapt", "finetune", "--rank", "0"],
    "tnadapt finetune --data a.csv --model bert": ["-m", "tnadapt", "finetune", "--data", "a.csv", "--model", "bert"],
    "tnadapt predict none --data none.csv": ["-m", "tnadapt", "predict", "none", "--data", "none.csv"],
    "tnadapt plan": ["-m", "tnadapt", "plan"],
    "tnadapt merge none none -o none": ["-m", "tnadapt", "merge", "none", "none", "-o", "none"],
    "tnadapt verify --preset lorra": ["-m", "tnadapt", "verify", "--preset", "lorra"],
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "command_line.json"

Row = dict[str, Any]

#: The imports, what each is compared with, and what is used of it: its modules are imported then.
IMPORTS = {"tnadapt": ("numpy", "tnadapt.SuperLoRA, tnadapt.presets, tnadapt.Target"), "tnadapt.torch": ("torch", "")}


def measure(smoke: bool) -> list[Row]:
    """Return a row for each import, and for each adapter and device."""
    return [*_imports(2 if smoke else 15), *_attached(smoke)]


def _imports(rounds: int) -> list[Row]:
    rows = []
    for name, (base, used) in IMPORTS.items():
        code = f"import {base}, {name}; {used}"
        pairs = [(_process(code), _process(f"import {base}")) for _ in range(rounds + 1)][1:]
        rows.append(
            {
                "case": f"import {name}",
                "beyond": base,
                "seconds_beyond": statistics.median(one - other for one, other in pairs),
                "base_seconds": statistics.median(other for _, other in pairs),
            }
        )
    return rows


def measure_commands(rounds: int = 7) -> dict[str, float]:
    """Return the median processor time of each command in seconds; the first round, which may compile, is left out."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            used = os.wait4(process.pid, 0)[2]
            times[name].append(used.ru_utime + used.ru_stime)
    return {name: round(statistics.median(found[1:]), 3) for name, found in times.items()}


def _process(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def _attached(smoke: bool) -> list[Row]:
    logging.disable(logging.INFO)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tnadapt as tna
    import tnadapt.torch

    presets = tna.presets
    adapters = {
        "SuperLoRA": (presets.superlora(8), "qv"),
        "SuperLoRA + F": (presets.superlora(8, projection="linear", ratio=0.01), "qv"),
        "fastfood": (presets.fastfood(0.001), "qv"),
        "LoRTA": (presets.lorta(4, order=5), "qv"),
        "LoKr": (presets.lokr(8), "qv"),
        "LoRA": (presets.lora(8), "qv"),
        "LoRA, all linear": (presets.lora(8), "all-linear"),
        "LoKr, all linear": (presets.lokr(8), "all-linear"),
    }
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes) if smoke else LlamaConfig()  # Llama-7B's are the defaults
    rows = []
    for device in ("meta", "cpu"):
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        if device == "cpu":
            model.to_empty(device="cpu")
        elements = sum(parameter.numel() for parameter in model.parameters())
        for case, (settings, targets) in adapters.items():
            beyond, arrays = [], []
            for _ in range(2 if smoke else 5):
                began = time.perf_counter()
                adapter = tna.torch.attach(model, settings, targets)
                attached = time.perf_counter() - began
                shapes, layers = adapter.plan.shapes, [target.layer for target in adapter.targets]
                plan = tna.SuperLoRA(settings, shapes, layers)  # has drawn nothing yet
                began = time.perf_counter()
                if device == "cpu":
                    plan.init("torch")
                arrays.append(time.perf_counter() - began)
                beyond.append(attached - arrays[-1])
                weights = len(adapter.targets)
                adapter.detach()
            rows.append(
                {
                    "case": f"attach {case}",
                    "device": device,
                    "elements": elements,
                    "weights": weights,
                    "seconds_beyond": statistics.median(beyond),
                    "arrays_seconds": statistics.median(arrays),
                    "parameters": plan.num_parameters,
                }
            )
    return rows


if __name__ == "__main__":
    if "--commands" in sys.argv:
        found = {"machine": machine(), "load": round(os.getloadavg()[0], 1), "seconds": measure_commands()}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(RESULTS.read_text())
        raise SystemExit
    for row in measure("--smoke" in sys.argv):
        print(row)

"""The cost of importing and attaching: a part of ``benchmarks/fast.py``.

``import tnadapt`` beyond ``import numpy`` and ``import tnadapt.torch`` beyond ``import torch``, in processes that
alternate; and ``tnadapt.torch.attach`` on a model of Llama-7B's sizes from its config alone, on the meta device
and on the CPU (in bfloat16, whose memory is never written to and so takes none), beyond the cost of drawing its arrays.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import time
from typing import Any

__all__ = ["measure"]

Row = dict[str, Any]

#: The imports, and what each is compared with.
IMPORTS = {"tnadapt": "numpy", "tnadapt.torch": "torch"}


def measure(smoke: bool) -> list[Row]:
    """Return a row for each import, and for each adapter and device."""
    return [*_imports(2 if smoke else 15), *_attached(smoke)]


def _imports(rounds: int) -> list[Row]:
    rows = []
    for name, base in IMPORTS.items():
        pairs = [(_process(f"import {base}, {name}"), _process(f"import {base}")) for _ in range(rounds + 1)][1:]
        rows.append(
            {
                "case": f"import {name}",
                "beyond": base,
                "seconds_beyond": statistics.median(one - other for one, other in pairs),
                "base_seconds": statistics.median(other for _, other in pairs),
            }
        )
    return rows


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
    for row in measure("--smoke" in sys.argv):
        print(row)

"""A linear layer's training step with each strategy, and how close the chosen one is to the best.

A part of ``benchmarks/fast.py``. For every number of tokens, width and format, one square layer with an adapter takes
forward and backward passes (its input requires a gradient, its weight does not) with each strategy available for that
format, in turn; the result is the median for the whole layer. ``chosen`` is the choice of
:mod:`tnadapt.torch._strategy_choice` for these tokens, and ``over best`` its time relative to the best.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch

P = tna.presets
STRATEGIES = ("weight", "factored", "additive")
TOKENS = (1, 8, 64, 197, 1024, 1576, 4096, 8192)
WIDTHS = (384, 768, 1024, 2048, 4096)
THREADS = int(os.environ.get("THREADS", "2"))

FORMATS: dict[str, Callable[[int], tna.Config]] = {
    "lora": lambda width: P.lora(4),
    "lokr": lambda width: P.lokr(4),
    "krona": lambda width: P.krona(),
    "kronecker of three": lambda width: tna.Config(splits=3, format="dense"),
    # Rows that do not match the layer's, like those of a weight in a group of many.
    "superlora": lambda width: P.superlora(8, groups="weight", fold=(4 * width, width // 4)),
    "tucker": lambda width: tna.Config(format="tucker", rank=16),
}


def layer(width: int, config: tna.Config, strategy: str, tokens: int) -> tuple[nn.Module, str]:
    """Return a linear layer with an adapter, and its strategy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    adapter = tnadapt.torch.attach(model, config, "all-linear", strategy=strategy, tokens=tokens)
    for parameter in adapter.parameters():
        parameter.detach().normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model, adapter.strategy[0]


def step(model: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Run forward and backward; return the seconds."""
    start = time.perf_counter()
    model(x).backward(gradient)
    seconds = time.perf_counter() - start
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def case(width: int, tokens: int, name: str, seconds: float) -> dict[str, Any]:
    """Measure one row, for at least some seconds and three steps."""
    x = torch.randn(tokens, width, requires_grad=True)
    gradient = torch.randn(tokens, width)
    config = FORMATS[name](width)
    models = {}
    for strategy in STRATEGIES:
        try:
            models[strategy] = layer(width, config, strategy, tokens)[0]
        except tna.ConfigError:
            continue  # rows and columns do not stay separate
    _, chosen = layer(width, config, "auto", tokens)
    times: dict[str, list[float]] = {strategy: [] for strategy in models}
    for model in models.values():
        step(model, x, gradient)
    began = time.perf_counter()
    while len(times["weight"]) < 3 or time.perf_counter() - began < seconds:
        for strategy, model in models.items():
            times[strategy].append(step(model, x, gradient))
    found = {strategy: statistics.median(several) for strategy, several in times.items()}
    best = min(found, key=lambda strategy: found[strategy])
    return {
        "format": name,
        "tokens": tokens,
        "width": width,
        **{f"{strategy} ms": round(1e3 * value, 4) for strategy, value in found.items()},
        "best": best,
        "chosen": chosen,
        "over best": round(found[chosen] / found[best], 3),
    }


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return rows for the page, the large layers last; in the smoke run, of small ones."""
    torch.set_num_threads(1 if smoke else THREADS)
    widths, tokens, seconds = ((32,), (1, 5), 0.0) if smoke else (WIDTHS, TOKENS, 0.5)
    return [case(*one, seconds) for one in itertools.product(widths, tokens, FORMATS)]

"""Overhead of a layer, and many adapters on one model, for ``fast.py``.

*A layer*: passes through linear layers of 32 by 32, each with an update, per layer and in processor time; small layers,
so that only the overhead counts. *Many*: adapters on q and v of a BERT of MiniLM's size (random weights). Memory is
resident memory, in a process of its own for each case, after one adapter has acted: what is loaded with the first, such
as numba, is not counted.

``python benchmarks/adapters.py --profile`` prints what a pass consists of, per layer: calls of Python functions and of
compiled ones, operators of torch (those that others call included), and nodes of the graph that backward goes through.
"""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import json
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch

P = tna.presets
LAYERS: dict[str, tna.Config] = {
    "lora(4)": P.lora(4),
    "krona": P.krona(),
    "compacter": P.compacter(),
    "superlora(4)": P.superlora(4),
}
MANY: dict[str, Callable[[int], tna.Config]] = {
    "lora(8)": lambda seed: P.lora(8),
    "superlora(8)": lambda seed: P.superlora(8),
    "superlora(8) + F, one seed": lambda seed: P.superlora(8, projection="linear", ratio=0.1),
    "superlora(8) + F, a seed each": lambda seed: P.superlora(8, projection="linear", ratio=0.1, seed=seed),
}


# -- A layer ---------------------------------------------------------------------------------


def peft_lora(model: nn.Module, names: list[str]) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names)).eval()


def without_gradients(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def forward(model: nn.Module, x: Tensor) -> None:
    model(x)


def backward_too(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


HOW = {"without gradients": without_gradients, "forward": forward, "forward and backward": backward_too}


def stacks(number: int) -> dict[str, nn.Module]:
    """Return the same number of layers for each contestant."""

    def plain() -> nn.Module:
        return nn.Sequential(*[nn.Linear(32, 32) for _ in range(number)]).eval().requires_grad_(False)

    models = {"base": plain(), "peft lora(4)": peft_lora(plain(), [str(index) for index in range(number)])}
    for name, config in LAYERS.items():
        models[name] = plain()
        tnadapt.torch.attach(models[name], config, "all-linear")
    return models


def layers(number: int, rounds: int, how: str) -> list[dict[str, Any]]:
    """Return the processor time of each case, in microseconds a layer, and over PEFT's in the same round."""
    run, models = HOW[how], stacks(number)
    times: dict[str, list[float]] = {name: [] for name in models}
    # As behind an embedding whose outputs need gradients: every layer passes one on.
    x = torch.randn(4, 32, requires_grad=how != "without gradients")
    for model in models.values():
        run(model, x)
    for turn in range(rounds):
        for place in range(len(models)):
            name = list(models)[(turn + place) % len(models)]
            start = time.process_time()
            run(models[name], x)
            times[name].append(time.process_time() - start)
    return [
        {
            "case": name,
            "layers": number,
            "how": how,
            "µs a layer": round(statistics.median(own) / number * 1e6, 1),
            "over peft": round(statistics.median(map(operator.truediv, own, times["peft lora(4)"])), 3),
            "rounds": rounds,
        }
        for name, own in times.items()
    ]


def profile(number: int) -> list[dict[str, Any]]:
    """Count what the passes of each case consist of, per layer."""
    rows = []
    for name, model in stacks(number).items():
        for how, run in HOW.items():
            x = torch.randn(4, 32, requires_grad=how != "without gradients")
            run(model, x)
            calls: collections.Counter[str] = collections.Counter()
            sys.setprofile(lambda frame, event, argument, calls=calls: calls.update([event]))
            run(model, x)
            sys.setprofile(None)
            with torch.autograd.profiler.profile(use_kineto=False) as seen:
                run(model, x)
            operators = sum(event.name.startswith("aten::") for event in seen.function_events)
            rows.append(
                {
                    "case": name,
                    "how": how,
                    "Python calls a layer": round(calls["call"] / number, 1),
                    "calls of compiled functions a layer": round(calls["c_call"] / number, 1),
                    "torch operators a layer": round(operators / number, 1),
                    "graph nodes a layer": 0 if how == "without gradients" else round(nodes(model(x)) / number, 1),
                }
            )
    return rows


def nodes(y: Tensor) -> int:
    """Return the number of nodes of a tensor's graph."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [other for other, _ in node.next_functions]
    return len(seen)


# -- Many adapters ---------------------------------------------------------------------------


def minilm(smoke: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        if smoke
        else {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    )
    torch.manual_seed(0)
    return BertModel(BertConfig(**sizes)).eval().requires_grad_(False)


def resident() -> float:
    """Return the resident memory of this process in MB, after free memory was given back."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@torch.no_grad()
def many(case: str, number: int, smoke: bool) -> dict[str, Any]:
    """Attach adapters, let each act once, and switch between them."""
    model, ids = minilm(smoke), torch.arange(16)[None]
    adapters = [tnadapt.torch.attach(model, MANY[case](seed), "qv", f"a{seed}") for seed in range(number)]
    for adapter in adapters:
        adapter.set_weight(0.0)

    def run() -> float:
        start = time.perf_counter()
        model(input_ids=ids)
        return time.perf_counter() - start

    base = statistics.median(run() for _ in range(10))
    adapters[0].activate()
    run()
    before, first = resident(), []
    for adapter in adapters:
        adapter.activate()
        first.append(run())
    grown, switching = resident() - before, []
    for adapter in adapters:
        start = time.perf_counter()
        adapter.activate()
        switching.append(time.perf_counter() - start)
    return {
        "case": case,
        "adapters": number,
        "numbers of all, MB": round(number * adapters[0].num_parameters * 4 / 1e6, 1),
        "more once each has acted, MB": round(grown, 1),
        "switch, ms": round(statistics.median(switching) * 1e3, 3),
        "first pass after it, ms": round(statistics.median(first) * 1e3, 1),
        "base, ms": round(base * 1e3, 1),
    }


@torch.no_grad()
def on_disk(case: str, number: int, smoke: bool) -> dict[str, Any]:
    """Write files of many adapters, and let some of them act, one after another, in the place of one."""
    model, ids = minilm(smoke), torch.arange(16)[None]
    adapter = tnadapt.torch.attach(model, MANY[case](0), "qv")
    with tempfile.TemporaryDirectory() as folder:
        for index in range(number):
            path = Path(folder) / f"{index}.safetensors"
            if index < 20:
                for parameter in adapter.parameters():
                    parameter.fill_(1e-3 * (index + 1))
                adapter.save(path)
            else:
                shutil.copy(Path(folder) / f"{index % 20}.safetensors", path)
        chosen = torch.randperm(number, generator=torch.Generator().manual_seed(0))[: min(number, 200)].tolist()
        adapter.swap(Path(folder) / "0.safetensors")
        model(input_ids=ids)
        before, swapping = resident(), []
        for index in chosen:
            start = time.perf_counter()
            adapter.swap(Path(folder) / f"{index}.safetensors")
            swapping.append(time.perf_counter() - start)
            model(input_ids=ids)
        grown = resident() - before
    return {
        "case": case,
        "files": number,
        "swapped": len(chosen),
        "swap, ms": round(statistics.median(swapping) * 1e3, 2),
        "more memory, MB": round(grown, 1),
    }


def alone(work: str, case: str, number: int, smoke: bool) -> dict[str, Any]:
    """Run one case in a process of its own."""
    code = f"import json, adapters; print(json.dumps(adapters.{work}({case!r}, {number}, {smoke})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return rows for the page; the smoke run has few adapters and layers."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = itertools.product((8,) if smoke else (64, 224, 1000), HOW)
        rows = [row for number, how in cases for row in layers(number, 2 if smoke else 15, how)]
        rows += profile(8 if smoke else 64)
    rows += [alone("many", case, 3 if smoke else 100, smoke) for case in (list(MANY)[2:3] if smoke else MANY)]
    rows.append(alone("on_disk", "superlora(8) + F, one seed", 3 if smoke else 10_000, smoke))
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", required=True, help="count calls, operators and nodes")
    parser.add_argument("--layers", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in profile(given.layers):
            print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()

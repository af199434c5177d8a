"""What to run first on a CUDA device, item by item; see ``python benchmarks/gpu.py --first-run``.

An item is a function ``item(device, smoke)`` that returns rows, and raises an error if something is wrong. Each runs in
a process of its own, because an error on the device makes all later calls of its process fail.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import machine

import tnadapt as tna
import tnadapt.torch as tt

__all__ = ["CHECKS", "first_run"]

Rows = list[dict[str, Any]]
HERE = Path(__file__).parent
KERNEL_TESTS = ("test_triton_compile.py", "test_triton.py")
#: Seconds after which an item counts as failed.
LIMIT = 1200
F = {"projection": "linear", "ratio": 0.01}
CONFIGS = {
    "lora": tna.presets.lora(4),
    "superlora": tna.presets.superlora(4),
    "superlora F": tna.presets.superlora(4, **F),
}


def kernel_tests(device: str, smoke: bool) -> Rows:
    """Run the kernels' tests on the device: draws to the bit, seeds of 64 bits, derivatives, operators."""
    folder = HERE.parent / "tests" / "backends" / "kernels"
    rows = []
    for name in KERNEL_TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(folder / name)]
        done = subprocess.run([*command, *(["--collect-only"] if smoke else [])], capture_output=True, text=True)
        if done.returncode and not (smoke and done.returncode == 5):  # 5: without Triton nothing is collected
            raise RuntimeError(f"{name} failed:\n{done.stdout[-4000:]}")
        rows.append({"tests": name, "result": done.stdout.strip().splitlines()[-1]})
    return rows


def same_bits(device: str, smoke: bool) -> Rows:
    """Compare the bits of two runs, and of a side stream, and of a second device if there is one."""
    size = 1 << (8 if smoke else 22)
    f = tna.Projection("linear", size // 8, size - 3, seed=2**64 - 59)
    x, y = torch.randn(f.n_in, device=device), torch.randn(f.n_out, device=device)
    first = [f(x), f.adjoint(y), tna.fwht(x[: size // 16])]
    rows = [_equal("a second run", first, [f(x), f.adjoint(y), tna.fwht(x[: size // 16])])]
    if device != "cuda":
        return rows
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [f(x), f.adjoint(y), tna.fwht(x[: size // 16])]
    stream.synchronize()
    rows.append(_equal("a side stream", first, found))
    if torch.cuda.device_count() > 1:
        x, y = x.to("cuda:1"), y.to("cuda:1")
        rows.append(_equal("a second device", first, [f(x), f.adjoint(y), tna.fwht(x[: size // 16])]))
    return rows


def _equal(what: str, one: list[Any], other: list[Any]) -> dict[str, Any]:
    for a, b in zip(one, other, strict=True):
        if not torch.equal(a, b.to(a.device)):
            raise RuntimeError(f"{what} gave other bits")
    return {"what": what, "result": "the same bits"}


def compiled_with_tf32(device: str, smoke: bool) -> Rows:
    """Compare F and its gradient with float64 where TF32 is allowed: eager, compiled, and by the basic operations."""
    from tnadapt.backends import _torch_kernels as torch_kernels

    torch.set_float32_matmul_precision("high")
    f, rows = tna.Projection("linear", 1000, 1 << (10 if smoke else 20)), Rows()
    x = torch.randn(f.n_in, device=device, requires_grad=True)
    exact = f(x.detach().double().cpu()).numpy()
    supported = torch_kernels.is_supported
    for way in ("eager", "compiled", "basic operations", "basic operations, compiled"):
        torch._dynamo.reset()
        torch_kernels.is_supported = (lambda x: False) if way.startswith("basic") else supported
        run = torch.compile(f, fullgraph=True) if way.endswith("compiled") else f
        found = run(x)
        found.sum().backward()
        error = float(abs(found.detach().double().cpu().numpy() - exact).max() / abs(exact).max())
        if error > 1e-5:
            raise RuntimeError(f"{way}: F is off by {error:.1e}")
        rows.append({"what": "F with TF32 allowed", "way": way, "relative error": error})
    return rows


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Raise an error where something waits for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def nothing_waits(device: str, smoke: bool) -> Rows:
    """Run passes with and without gradients, in which waiting for the device is an error."""
    rows = Rows()
    for name, config in CONFIGS.items():
        model, x = _layers(config, device, smoke)
        for turn in range(2):  # kernels are compiled, and draws copied, in the first turn
            with no_waiting(device if turn else "none"):
                with torch.no_grad():
                    model(x)
                model(x).square().mean().backward()
        rows.append({"what": "waiting is an error", "case": name, "result": "none"})
    return rows


def captured_graph(device: str, smoke: bool) -> Rows:
    """Capture a pass in a CUDA graph; its replay has to follow a change of the arrays."""
    rows = Rows()
    for name, config in CONFIGS.items() if device == "cuda" else ():
        model, x = _layers(config, device, smoke)
        side = torch.cuda.Stream()
        with torch.no_grad():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = model(x)
            for parameter in tt.adapters(model)["default"].parameters():
                parameter.add_(0.01)
            graph.replay()
            error = float((found - model(x)).abs().max() / found.abs().max())
        if error > 1e-4:
            raise RuntimeError(f"{name}: the replay of a graph is off by {error:.1e}")
        rows.append({"what": "replay of a captured pass", "case": name, "relative error": error})
    return rows


def _layers(config: tna.Config, device: str, smoke: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    width = 32 if smoke else 1024
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))).to(device)
    adapter = tt.attach(model, config, "all-linear")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model, torch.randn(2, width, device=device)


def decoding(device: str, smoke: bool) -> Rows:
    """Measure one token through two layers of Llama-8B's shape, in bfloat16, over the base (goal: 1.05)."""
    from gpu import medians
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    full = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    settings = LlamaConfig(**(sizes if smoke else full), num_hidden_layers=2, vocab_size=1000)
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings).to(device, torch.bfloat16).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def run() -> None:
        model(token, use_cache=False)

    rows, rounds = Rows(), 2 if smoke else 100
    for name, config in CONFIGS.items():
        adapter = tt.attach(model, config)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.01)

        def base(adapter: Any = adapter) -> None:
            with adapter.disabled():
                run()

        found = medians(device, {"base": base, "adapted": run}, rounds)
        rows.append({"case": name, "ms": found["adapted"], "× base": found["adapted"] / found["base"]})
        adapter.detach()
    return rows


def draws(device: str, smoke: bool) -> Rows:
    """Measure F with draws inside the kernels, and with stored ones through the basic operations."""
    from gpu import arrays, medians

    from tnadapt.backends import _torch_kernels as torch_kernels

    size, rows, supported = 100 if smoke else 1 << 24, Rows(), torch_kernels.is_supported
    for ratio in (0.01, 1.0):
        f = tna.Projection("linear", max(1, round(ratio * size)), size)
        x, y = torch.randn(f.n_in, device=device), torch.randn(size, device=device)
        for way in ("in the kernels", "stored"):
            torch_kernels.is_supported = supported if way == "in the kernels" else lambda x: False
            ways = {"copy": arrays("torch", device, size, "float32")[2], "forward": lambda f=f, x=x: f(x)}
            found = medians(device, {**ways, "backward": lambda f=f, y=y: f.adjoint(y)}, 2 if smoke else 30)
            copies = {f"{which}, copies": found[which] / found["copy"] for which in ("forward", "backward")}
            rows.append({"what": "draws", "ρ": ratio, "way": way, **copies})
    return rows


#: What is checked, in order; the measurements of ``gpu.py`` come in between.
CHECKS: dict[str, Callable[[str, bool], Rows]] = {
    "kernel tests": kernel_tests,
    "same bits": same_bits,
    "compiled with TF32": compiled_with_tf32,
    "nothing waits": nothing_waits,
    "captured graph": captured_graph,
    "draws": draws,
    "decoding": decoding,
}


def first_run(items: list[str], out: Path, smoke: bool) -> bool:
    """Run items in processes of their own; write a JSON file after each. Return whether all succeeded."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    record: dict[str, Any] = {"card": card, "smoke": smoke, "machine": machine(), "items": {}}
    for name in items:
        started = time.monotonic()
        result = _one(name, smoke)
        record["items"][name] = {**result, "seconds": round(time.monotonic() - started, 1)}
        out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {result['status']}", flush=True)
    return all(item["status"] == "done" for item in record["items"].values())


def _one(name: str, smoke: bool) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "gpu.py"), "--item", name, *(["--smoke"] if smoke else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "error": f"still running after {LIMIT} seconds"}
    if done.returncode:
        return {"status": "failed", "error": done.stderr[-4000:]}
    rows = [json.loads(line) for line in done.stdout.splitlines() if re.match(r"\{", line)]
    return {"status": "done", "rows": rows}

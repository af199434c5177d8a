"""What works on each library's quantized layers, and how much of an update survives a merge into them.

``python benchmarks/quantized.py``. On one layer or embedding of 1024 by 1024 of each kind: attach, train, save, load,
merge and unmerge, each tried; the time to dequantize; and, for updates of several sizes relative to the weight, the
error of the merged weight and the part of the update that it has (:class:`tnadapt.torch.RequantizedWeight`). The weight
is normal with standard deviation 0.02, and the update is of rank 8.

Results go to ``results/quantized.json``, and the table of the documentation, made of them, to
``results/quantized.rst``; ``--tables`` makes the table alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from formatting import list_table
from machine import installed, machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "quantized.json"
TABLES = RESULTS.with_suffix(".rst")
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
PACKAGES = ("torch", "bitsandbytes", "torchao", "optimum-quanto", "hqq", "transformers", "gguf")
STEPS = ("attach", "train", "save", "load", "merge")
SHOWN = (0.01, 0.03, 0.1)
WIDTH, RANK, SEED = 1024, 8, 0


def kinds() -> dict[str, Any]:
    """Return what makes a layer of each kind of a linear one; those of a library that is missing raise when called."""
    sys.path.insert(0, str(ROOT))
    from tests.torch.quantized_models import EMBEDDINGS, KINDS, library
    from tests.torch.test_calibrated_layers import awq, gptq

    def of(kind: Any) -> Any:
        return lambda plain: kind.quantize(library(kind.library), plain)

    found = {name: of(kind) for name, kind in {**KINDS, **EMBEDDINGS}.items()}
    # Nothing quantizes to these formats without data: layers of the tests, which are small.
    return {**found, "GPTQ 4 bits": lambda _: gptq(4), "AWQ 4 bits": lambda _: awq()}


def before(name: str) -> Any:
    """Return the layer of a kind before quantization."""
    import torch

    table = "embedding" in name
    made: Any = torch.nn.Embedding(WIDTH, WIDTH) if table else torch.nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        made.weight.copy_(0.02 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(SEED)))
    return made


def tried(name: str, make: Any) -> dict[str, str]:
    """Return "yes", or the error, for each step."""
    import torch

    import tnadapt as tna
    import tnadapt.torch as tt

    done: dict[str, str] = {}

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        try:
            yield
            done[name] = "yes"
        except Exception as error:
            done[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    model = torch.nn.Sequential(make(before(name)))
    table = "embedding" in name
    with step("attach"):
        adapter = tt.attach(model, tna.presets.lora(RANK), "embeddings" if table else "all-linear")
    x = torch.randn(32, adapter.targets[0].shape[1], generator=torch.Generator().manual_seed(1))
    x = torch.arange(0, WIDTH, 8) if table else x
    with step("train"):
        train(model, adapter, x)
    with tempfile.TemporaryDirectory() as folder:
        with step("save"):
            adapter.save(Path(folder) / "a.safetensors")
        with step("load"):
            other = torch.nn.Sequential(make(before(name)))
            tt.load(other, Path(folder) / "a.safetensors")
            assert torch.equal(other(x), model(x))
    with step("merge"):
        attached = model(x).detach()
        adapter.merge()
        adapter.unmerge()
        assert torch.equal(model(x), attached)
    return done


def train(model: Any, adapter: Any, x: Any) -> None:
    """Train, and raise an AssertionError if the loss does not fall."""
    import torch

    optimizer = torch.optim.Adam(adapter.parameters(), 0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses


def codes_alone(name: str) -> Any:
    """Return a layer of full size of a format that the tests have a small one of: any codes take the same time."""
    import torch

    from tests.torch.test_calibrated_layers import Layer

    def words(*shape: int) -> Any:
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).to(torch.int32)

    groups, packed = WIDTH // 128, WIDTH // 8
    tensors = {"qzeros": words(groups, packed), "scales": torch.rand(groups, WIDTH)}
    if name.startswith("AWQ"):
        made = Layer(None, {"qweight": words(WIDTH, packed), **tensors}, w_bit=4)
    else:
        index = torch.arange(WIDTH, dtype=torch.int32) // 128
        made = Layer(None, {"qweight": words(packed, WIDTH), "g_idx": index, **tensors}, bits=4)
    made.in_features = made.out_features = WIDTH
    return made


def off_by(make: Any, rows: int, cols: int) -> float:
    """Return the relative error of a quantized weight of a shape."""
    import torch

    from tnadapt.torch._weights import numbers

    plain = torch.nn.Linear(cols, rows, bias=False)
    own = 0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        plain.weight.copy_(own)
    return float(torch.linalg.norm(numbers(make(plain), "weight") - own) / torch.linalg.norm(own))


def seconds_to_dequantize(layer: Any) -> float:
    """Return the time for one element."""
    from tnadapt.torch._weights import numbers

    times = []
    for _ in range(7):
        start = time.perf_counter()
        found = numbers(layer, "weight")
        times.append(time.perf_counter() - start)
    return min(times) / found.numel()


def merged(name: str, make: Any, size: float) -> dict[str, float]:
    """Return what a merge of an update of this size relative to the weight does."""
    import torch

    import tnadapt as tna
    import tnadapt.torch as tt
    from tnadapt.torch._weights import numbers

    model = torch.nn.Sequential(make(before(name)))
    weight = numbers(model[0], "weight").float()
    adapter = tt.attach(model, tna.presets.lora(RANK), "embeddings" if "embedding" in name else "all-linear")
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        scale = size * torch.linalg.norm(weight) / torch.linalg.norm(adapter.deltas()[0])
        next(iter(adapter.parameters())).mul_(scale)
    adapter.merge()
    (row,) = adapter.merge_report
    return {"error": row.error, "update_error": row.update_error, "kept": row.kept}


def measure() -> dict[str, Any]:
    """Return all results."""
    import torch

    from tnadapt.torch._weights import numbers

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, make in kinds().items():
        print(name, flush=True)
        row: dict[str, Any] = {"steps": tried(name, make)}
        layer = make(before(name))
        values = numbers(layer, "weight").float()
        whole = values.numel() == WIDTH * WIDTH
        row["dequantize"] = seconds_to_dequantize(layer if whole else codes_alone(name))
        if row["steps"]["merge"] == "yes":
            own = before(name).weight.detach()
            row["quantization"] = float(torch.linalg.norm(values - own) / torch.linalg.norm(own))
            row["merges"] = {str(size): merged(name, make, size) for size in SIZES}
        if name.startswith("bitsandbytes") and "embedding" not in name:
            row["64 by 96"], row["96 by 64"] = off_by(make, 64, 96), off_by(make, 96, 64)
        found[name] = row
    return {"machine": machine(), "versions": installed(*PACKAGES), "kinds": found}


def tables(results: dict[str, Any]) -> str:
    """Return the table of the documentation, without embeddings, whose numbers are those of the linear layers."""
    shares = [f"{size:.0%}" for size in SHOWN]
    rows = [("layer", "merge", "error of W", *(f"kept, {share}" for share in shares), f"off, {shares[-1]}", "ns")]
    for name, row in results["kinds"].items():
        if "embedding" in name:
            continue
        numbers = ["–"] * (len(SHOWN) + 2)
        if "merges" in row:
            merges = [row["merges"][str(size)] for size in SHOWN]
            kept = [f"{merge['kept']:.2f}" for merge in merges]
            numbers = [f"{row['quantization']:.3f}", *kept, f"{merges[-1]['update_error']:.2f}"]
        merge = "yes" if row["steps"]["merge"] == "yes" else "refused"
        rows.append((name, merge, *numbers, f"{1e9 * row['dequantize']:.1f}"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f".. Made by benchmarks/quantized.py.\n\nMeasured on the CPU with {versions}.\n\n{list_table(rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="make the tables of the results that are there")
    if not parser.parse_args(arguments).tables:
        warnings.simplefilter("ignore")
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    TABLES.write_text(tables(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

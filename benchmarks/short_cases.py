"""The cases of ``short.py``: in each, a call of the library and the one it is compared with.

A case is built in its own function, which imports what it needs: a process that measures one case loads no other's
libraries. A peer that is not installed raises ImportError there.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tnadapt as tna

__all__ = ["CASES", "GROUPS", "Case"]

Run = Callable[[], object]
Pair = tuple[Run, Run]
P = tna.presets


class Case(NamedTuple):
    """What is measured, over what.

    Attributes
    ----------
    name, over : str
        The texts of the table.
    build : callable
        Builds the two calls, ours first, from ``smoke`` and an empty folder.
    clock : callable
        Time of the processor, in which other programs of the machine are not, but all threads of this one; time on the
        wall where the call waits for the disk.
    """

    name: str
    over: str
    build: Callable[[bool, Path], Pair]
    clock: Callable[[], float] = time.process_time


# -- Arrays ----------------------------------------------------------------------------------


def transform(peer: str, bits: int, smoke: bool, folder: Path) -> Pair:
    """The Hadamard transform, over a copy or FFHT; all return new arrays."""
    x = normal(1 << (8 if smoke else bits))
    if peer == "copy":
        return lambda: tna.fwht(x, normalize=False), x.copy
    import fht_cpu

    return lambda: tna.fwht(x, normalize=False), lambda: fht_cpu.fht(x, inplace=False)


def through_f(adjoint: bool, smoke: bool, folder: Path) -> Pair:
    """F or its adjoint, over a copy of the longer vector."""
    size = 1 << (8 if smoke else 18)
    f = tna.Projection("linear", size // 8, size)
    x, y = normal(f.n_in), normal(size)
    there = np.empty_like(y)
    return (lambda: f.adjoint(y)) if adjoint else (lambda: f(x)), lambda: np.copyto(there, y)


def kronecker(smoke: bool, folder: Path) -> Pair:
    """A Kronecker product of two matrices, over NumPy's."""
    a, b = normal(32 * 32).reshape(32, 32), normal(32 * 32).reshape(32, 32)
    return lambda: tna.kronecker([a, b]), lambda: np.kron(a, b)


def normal(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size, np.float32)


# -- Models ----------------------------------------------------------------------------------


def step(name: str, smoke: bool, folder: Path) -> Pair:
    """A training step of two layers of ViT-base on two images, over PEFT's LoRA."""
    import steps

    problem = steps.vit(smoke, layers=None if smoke else 2)
    problem = problem._replace(batch={key: value[:2] for key, value in problem.batch.items()})
    return steps.Contestant(name, problem).step, steps.Contestant(steps.REFERENCE, problem).step


def decoding(dtype: str, config: tna.Config, smoke: bool, folder: Path) -> Pair:
    """One token through two layers of a Llama, an adapter on q and v that is not merged, over the base."""
    import decoding
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 64 if smoke else 2048
    torch.manual_seed(0)
    sizes = LlamaConfig(
        num_hidden_layers=2, vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(sizes).to(getattr(torch, dtype)).requires_grad_(False).eval()
    adapted, change = decoding.ours(base, config)
    change()
    runs = [decoding.decoder(model, decoding.static_cache(base)) for model in (adapted, base)]
    ours, theirs = (torch.no_grad()(run) for run in runs)
    return ours, theirs


def many_weights(config: tna.Config, how: str, dtype: str, smoke: bool, folder: Path) -> Pair:
    """A pass of 224 small layers, whose cost is that of Python for each layer, over PEFT's LoRA."""
    import peft
    import torch
    from torch import nn

    import tnadapt.torch

    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4 if smoke else 224))).to(getattr(torch, dtype))
    adapted, other = copy.deepcopy(layers), copy.deepcopy(layers)
    tnadapt.torch.attach(adapted, config, r"\d+")
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, target_modules=r"\d+"))
    x = torch.ones(8, 64, dtype=getattr(torch, dtype), requires_grad=how == "backward")

    def run(model: nn.Module) -> object:
        with torch.set_grad_enabled(how != "without gradients"):
            y = model(x)
        return y.sum().backward() if how == "backward" else y

    return functools.partial(run, adapted), functools.partial(run, other)


def switch(smoke: bool, folder: Path) -> Pair:
    """Switching between two adapters of a model, over PEFT's."""
    import peft
    from transformers import BertConfig, BertModel

    import tnadapt.torch

    model = BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=64, num_attention_heads=12, vocab_size=99)
    )
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    other = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    other.add_adapter("two", config)
    one, two = (tnadapt.torch.attach(model, P.lora(4), name=name) for name in ("one", "two"))

    def ours() -> None:
        one.activate()
        two.activate()

    def theirs() -> None:
        other.set_adapter("one")
        other.set_adapter("two")

    return ours, theirs


# -- Files -----------------------------------------------------------------------------------


def plan(smoke: bool, folder: Path) -> Pair:
    """A plan for many weights of two shapes, over a loop in Python, since no peer does it."""
    shapes = [(768, 768), (256, 768)] * (2 if smoke else 500)

    def loop() -> int:
        total = 0
        for number in range(1_000 if smoke else 10_000_000):
            total += number
        return total

    return lambda: tna.plan(shapes, "1 MB"), loop


def checkpoints(smoke: bool, folder: Path) -> tuple[Path, Path]:
    """Write a model, and one whose q and v differ by a matrix of low rank."""
    from safetensors.numpy import save_file

    width = 32 if smoke else 1024
    rng = np.random.default_rng(0)
    arrays = {
        f"model.layers.{layer}.self_attn.{role}_proj.weight": rng.standard_normal((width, width), np.float32)
        for layer in range(2 if smoke else 6)
        for role in "qkvo"
    }
    base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    save_file(arrays, base)
    for name in arrays:
        if ".q_" in name or ".v_" in name:
            arrays[name] += rng.standard_normal((width, 4), np.float32) @ rng.standard_normal((4, width), np.float32)
    save_file(arrays, tuned)
    return base, tuned


def read(*paths: Path) -> int:
    return sum(len(path.read_bytes()) for path in paths)


def extraction(smoke: bool, folder: Path) -> Pair:
    """Extraction of a LoRA, over a read of the two files."""
    base, tuned = checkpoints(smoke, folder)
    return lambda: tna.extract(base, tuned, P.lora(4)), lambda: read(base, tuned)


def merging(config: tna.Config, smoke: bool, folder: Path) -> Pair:
    """A merge on disk, over reading and writing the file and waiting for the disk, as the merge does."""
    from safetensors.numpy import load_file, save_file

    base, tuned = checkpoints(smoke, folder)
    # An adapter of these settings for these weights. Which numbers it has makes no difference to the merge's time.
    found = tna.extract(base, tuned, P.lora(4)).file
    layout = tna.UpdatePlan(config, [target.shape for target in found.targets])
    arrays = {name: array + np.float32(0.01) for name, array in layout.init().items()}
    adapter, out, copied = (folder / f"{name}.safetensors" for name in ("adapter", "merged", "copied"))
    tna.save(adapter, tna.AdapterFile(config, found.targets, arrays))

    def ours() -> None:
        tna.merge(base, adapter, out, overwrite=True)

    def theirs() -> None:
        save_file(load_file(base), copied)
        handle = os.open(copied, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)

    return ours, theirs


# -- Decompositions --------------------------------------------------------------------------


def decomposition(kind: str, smoke: bool, folder: Path) -> Pair:
    """A decomposition of the benchmark of decompositions, over TensorLy's."""
    import decompositions

    case = next(case for case in decompositions.decompositions(smoke) if case.kind == kind)
    return case.runs[decompositions.OURS], case.runs["TensorLy"]


def _bind(function: Callable[..., Pair], *settings: Any) -> Callable[[bool, Path], Pair]:
    return functools.partial(function, *settings)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS and torch to one thread: the ratio then depends less on what else the machine does."""
    from timing import threads

    with threads(1):
        yield


PEFT_LORA = "PEFT's LoRA"
WITH_F = P.superlora(4, projection="linear", ratio=0.1)

#: The cases of each group. A group runs in one process.
GROUPS: dict[str, list[Case]] = {
    "arrays": [
        Case("fwht of 2^18", "a copy", _bind(transform, "copy", 18)),
        Case("fwht of 2^16", "FFHT", _bind(transform, "FFHT", 16)),
        Case("linear F of 2^18, ρ = 1/8", "a copy", _bind(through_f, False)),
        Case("adjoint of that F", "a copy", _bind(through_f, True)),
        Case("kronecker, 32² and 32²", "numpy.kron", _bind(kronecker)),
    ],
    "step": [
        Case(f"step of ViT-base, 2 layers, {name}", PEFT_LORA, _bind(step, name))
        for name in ("lora", "lokr", "superlora", "dense", "superlora F 0.01")
    ],
    "decoding": [
        Case(f"decoding, {dtype}, {name}", "the base", _bind(decoding, dtype, config))
        for dtype, name, config in (
            ("float32", "lora(4)", P.lora(4)),
            ("float32", "superlora(4)", P.superlora(4)),
            ("bfloat16", "superlora(4)", P.superlora(4)),
            ("bfloat16", "lokr(4)", P.lokr(4)),
        )
    ],
    "layers": [
        *(
            Case(f"224 layers{what}, {name}", PEFT_LORA, _bind(many_weights, config, how, dtype))
            for what, name, config, how, dtype in (
                ("", "lora(4)", P.lora(4), "forward", "float32"),
                (" with backward", "lora(4)", P.lora(4), "backward", "float32"),
                (" without gradients", "lora(4)", P.lora(4), "without gradients", "float32"),
                (" of bfloat16", "lora(4)", P.lora(4), "forward", "bfloat16"),
                (" of bfloat16 with backward", "lora(4)", P.lora(4), "backward", "bfloat16"),
                (" without gradients", "compacter", P.compacter(), "without gradients", "float32"),
            )
        ),
        Case("switching between two adapters", "PEFT", _bind(switch)),
    ],
    "files": [
        Case("plan for 1,000 weights", "a loop of 10^7", _bind(plan)),
        Case("extract, lora(4)", "reading the files", _bind(extraction)),
        *(
            Case(f"merge on disk, {name}", "read and write", _bind(merging, config), time.perf_counter)
            for name, config in {
                "lora(4)": P.lora(4),
                "superlora(4)": P.superlora(4),
                "superlora(4) + F, ρ = 0.1": WITH_F,
            }.items()
        ),
    ],
    "decompositions": [
        Case("CP, 50³, rank 5", "TensorLy", _bind(decomposition, "CP")),
        Case("Tucker, 50³, rank 5", "TensorLy", _bind(decomposition, "Tucker")),
        Case("tensor train, 50³, rank 5", "TensorLy", _bind(decomposition, "tensor train")),
    ],
}
CASES: dict[str, Case] = {case.name: case for cases in GROUPS.values() for case in cases}

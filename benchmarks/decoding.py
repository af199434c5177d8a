"""Decoding with adapters that are not merged, for ``fast.py``: one token at a time through two layers of Llama-8B.

Each contestant is a copy of the model's modules that shares its weights, with q and v adapted. A pass gets one token
and a static cache of 64 tokens, as in ``generate``. Contestants alternate, and each ratio is to the base in the same
round. *first* is the first pass after the adapter's numbers have changed, which computes every update. *bytes* are
those that a pass has to read, the updates or their factors included, over those of the base: the ratio cannot be lower
where reading takes all the time.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import ratios, shared_copy, take_turns
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch
from tnadapt.torch._forward_pass import rounded_delta
from tnadapt.torch._forward_patch import ForwardPatch
from tnadapt.torch._state import current, is_array

P = tna.presets
THREADS = 2
ROUNDS = 15
#: The dtype of the arrays of a case, where it is not float32.
ARRAYS = {"dense, of bfloat16": torch.bfloat16}
CASES: dict[str, tna.Config] = {
    "lora(4)": P.lora(4),
    "superlora(4)": P.superlora(4),
    "lorta(4)": P.lorta(4),
    "loha(4)": P.loha(4),
    "lokr(4)": P.lokr(4),
    "fourierft(1000)": P.fourierft(1000),
    "dense": P.dense(),
    "dense, of bfloat16": P.dense(),
    "superlora(4) + F, ρ = 0.1": P.superlora(4, projection="linear", ratio=0.1),
}
#: Compiling takes half a minute each.
COMPILED = ("lora(4)", "superlora(4)", "superlora(4) + F, ρ = 0.1")


def llama(layers: int, vocabulary: int, width: int, mlp: int, heads: int, key_value_heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=key_value_heads,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def stir(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def ours(
    model: nn.Module, config: tna.Config, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Callable[[], None]]:
    adapted = shared_copy(model)
    adapter = tnadapt.torch.attach(adapted, config, "qv", dtype=dtype)
    return adapted, lambda: stir(adapter.parameters())


def peft_lora(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    import peft

    adapted = peft.get_peft_model(shared_copy(model), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    return adapted, lambda: stir(p for name, p in adapted.named_parameters() if "lora_" in name)


def bytes_read(model: nn.Module) -> int:
    """Return the bytes of weights, of cached updates and of the arrays of factors that one token reads."""
    base = [p for name, p in model.named_parameters() if "embed" not in name and not is_array(name)]
    found = sum(parameter.nbytes for parameter in base)
    for module in model.modules():
        patch = ForwardPatch.of(module)
        for patched in [] if patch is None else patch.weights:
            for slot in patched.slots:
                if slot.strategy == "weight":
                    found += rounded_delta(slot, patched.tensor.dtype).nbytes
                else:
                    found += sum(array.nbytes for array in current(slot.adapter, slot.factoring.names))
    return found


def static_cache(model: nn.Module) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=64)


def decoder(model: nn.Module, caches: Any) -> Callable[[], Tensor]:
    token = torch.tensor([[3]])

    def step() -> Tensor:
        caches.reset()
        return model(input_ids=token, past_key_values=caches, use_cache=True).logits

    return step


@torch.no_grad()
def compare(dtype: torch.dtype, smoke: bool, compiled: bool) -> list[dict[str, Any]]:
    """Return one row for each case."""
    model = llama(2, 256, *((256, 64, 4, 4) if smoke else (4096, 14336, 32, 8))).to(dtype)
    several: dict[str, tuple[nn.Module, Callable[[], None]]] = {"base": (model, lambda: None)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not compiled:
            several["peft lora(4)"] = peft_lora(model)
        for name in COMPILED if compiled else CASES:
            if name in ARRAYS and ARRAYS[name] != dtype:
                continue  # arrays of fewer bits than the weights', which are converted in each call
            several[name] = ours(model, CASES[name], ARRAYS.get(name, torch.float32))
    kind = "compiled" if compiled else "eager"
    steps: dict[str, Callable[[], Tensor]] = {}
    first: dict[str, float] = {}
    read: dict[str, int] = {}
    for name, (adapted, change) in several.items():
        if compiled:
            torch._dynamo.reset()
            adapted.forward = torch.compile(adapted.forward)
        steps[name] = decoder(adapted, static_cache(model))
        steps[name]()
        change()
        start = time.perf_counter()
        steps[name]()
        first[name] = time.perf_counter() - start
        read[name] = bytes_read(adapted)
    times = take_turns(steps, 2 if smoke else ROUNDS)
    rows = []
    for name, own in times.items():
        ratio = ratios(own, times["base"])
        row = {"case": name, "dtype": str(dtype).removeprefix("torch."), "how": kind, "ratio": ratio.pop("ratio")}
        row |= {"bytes": round(read[name] / read["base"], 3), **ratio, "seconds": round(statistics.median(own), 5)}
        rows.append({**row, "first": round(first[name], 4)})
    return rows


def measure(smoke: bool) -> list[dict[str, Any]]:
    """Return rows for the page; in the smoke run, of a tiny model in float32 that is not compiled."""
    torch.set_num_threads(1 if smoke else THREADS)
    if smoke:
        return compare(torch.float32, smoke, compiled=False)
    kinds = itertools.product((torch.float32, torch.bfloat16), (False, True))
    return [row for dtype, compiled in kinds for row in compare(dtype, smoke, compiled)]

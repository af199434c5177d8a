"""Adapters of few parameters on a model of 7 billion weights: attaching, a training step, the file, loading.

``python benchmarks/few_parameters.py`` builds a Llama of 7B with random bfloat16 weights (13.5 GB), attaches LoRA-XS of
rank 8, whose frozen factors come from the base, and TinyLoRA of 13 parameters to all query and value projections, and
writes what it measured to ``results/few_parameters.json``. ``--smoke`` does the same on a tiny model, and writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM

import tnadapt as tna
import tnadapt.torch as tt

__all__ = ["main"]

RESULTS = Path(__file__).with_name("results") / "few_parameters.json"
SEVEN_BILLION = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 100,
}  # fmt: skip
TOKENS = 8


def _model(settings: dict[str, int]) -> Any:
    """A Llama with random weights of the usual size; drawing normal numbers for all of them would take minutes."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            parameter.data.uniform_(-0.035, 0.035)
    # Buffers that the model computes when it is built are not filled by to_empty().
    model.model.rotary_emb.__init__(model.config)
    return model


def _progress(done: int, of: int) -> None:
    end = "\n" if done == of else ""
    print(f"\rarrays from the base: {done} of {of}", end=end, flush=True)


def _seconds(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def _measured(model: Any) -> dict[str, Any]:
    ids = torch.arange(1, TOKENS + 1)[None]
    with torch.no_grad():
        before = model(ids).logits
    found: dict[str, Any] = {"weights": sum(p.numel() for p in model.parameters()), "tokens": TOKENS}
    seconds, adapter = _seconds(lambda: tt.attach(model, tna.presets.lora_xs(8), progress=_progress))
    found["lora_xs(8)"] = {"parameters": adapter.num_parameters, "attach_s": round(seconds, 2)}
    adapter.detach()
    seconds, adapter = _seconds(lambda: tt.attach(model, tna.presets.tinylora(13), progress=_progress))
    own: dict[str, Any] = {"parameters": adapter.num_parameters, "attach_s": round(seconds, 2)}
    with torch.no_grad():
        own["first_output_bit_equal"] = bool(torch.equal(model(ids).logits, before))
    # The base is random: the adapter learns one sequence by heart, a little.
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1.0)
    losses = []
    for _ in range(3):

        def step() -> float:
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        seconds, loss = _seconds(step)
        losses.append(round(loss, 5))
    own |= {"step_s": round(seconds, 2), "losses": losses}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        own["save_s"], _ = _seconds(lambda: adapter.save(path))
        own["bytes"] = path.stat().st_size
        with torch.no_grad():
            after = model(ids).logits
        adapter.detach()
        own["load_s"], loaded = _seconds(lambda: tt.load(model, path))
        with torch.no_grad():
            own["loaded_output_bit_equal"] = bool(torch.equal(model(ids).logits, after))
        own["loaded_parameters"] = loaded.num_parameters
    own["save_s"], own["load_s"] = round(own["save_s"], 2), round(own["load_s"], 2)
    found["tinylora(13)"] = own
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, and no results")
    smoke = parser.parse_args(arguments).smoke
    found = _measured(_model(TINY if smoke else SEVEN_BILLION))
    print(json.dumps(found, indent=2))
    if not smoke:
        RESULTS.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

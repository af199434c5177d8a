"""Many adapters in one batch, against PEFT's LoRA and one adapter at a time: ``python benchmarks/mixed_batch.py``.

A batch of 64 prompts goes through a Llama of SmolLM2-135M's width (fewer layers, random weights) with 1, 8 or 64
adapters on q and v, each with as many rows as the others: once with 32 tokens a row (*prefill*) and once with one
(*decode*). All contestants live in one process, share the base's weights and alternate in a rotating order. Each round
gives each one a ratio to PEFT's LoRA with ``adapter_names=`` in that round; the printed value is the median.
*one by one* is a pass for each adapter on its rows.

Rows are written to ``results/mixed_batch.jsonl``, and the documentation's table to ``mixed_batch.rst`` beside it. Keep
the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from decoding import llama
from formatting import list_table
from machine import machine
from timing import ratios, shared_copy, take_turns
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch

P = tna.presets
RESULTS = Path(__file__).parent / "results" / "mixed_batch.jsonl"
REFERENCE = "peft lora, mixed"
OURS: dict[str, tna.Config] = {"lora": P.lora(8), "superlora": P.superlora(8), "lokr": P.lokr(8)}
ADAPTERS = (1, 8, 64)
BATCH, LAYERS, ROUNDS, THREADS = 64, 6, 9, 1
TOKENS = {"prefill": 32, "decode": 1}


def stir(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


class Ours:
    """A model with a preset's adapters."""

    def __init__(self, base: nn.Module, config: tna.Config, number: int) -> None:
        self.model = shared_copy(base)
        self.handles = [tnadapt.torch.attach(self.model, config, "qv", f"a{index}") for index in range(number)]
        for index, handle in enumerate(self.handles):
            stir((parameter for _, parameter in handle.named_parameters()), index)
        self.names = [f"a{index}" for index in range(number)]

    def mixed(self, ids: Tensor, names: Sequence[str]) -> Tensor:
        with tnadapt.torch.rows(self.model, names):
            return self.model(ids).logits

    def alone(self, ids: Tensor, name: str) -> Tensor:
        tnadapt.torch.adapters(self.model)[name].activate()
        return self.model(ids).logits


class Peft:
    """A model with PEFT's LoRA."""

    def __init__(self, base: nn.Module, number: int) -> None:
        import peft

        def config() -> Any:
            return peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])

        self.names = [f"a{index}" for index in range(number)]
        self.model = peft.get_peft_model(shared_copy(base), config(), self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config())
        for index, name in enumerate(self.names):
            own = (p for path, p in self.model.named_parameters() if "lora_" in path and f".{name}." in path)
            stir(own, index)
        self.model.eval()

    def mixed(self, ids: Tensor, names: Sequence[str]) -> Tensor:
        return self.model(input_ids=ids, adapter_names=list(names)).logits

    def alone(self, ids: Tensor, name: str) -> Tensor:
        self.model.set_adapter(name)
        return self.model(input_ids=ids).logits


def one_by_one(contestant: Ours | Peft, ids: Tensor, names: Sequence[str]) -> Tensor:
    """A pass for each adapter on its rows, put together in the batch's order."""
    found = list[Tensor]()
    order = list[int]()
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        found.append(contestant.alone(ids[rows], name))
        order += rows
    return torch.cat(found)[torch.tensor(order).argsort()]


def contestants(base: nn.Module, number: int) -> dict[str, Callable[[Tensor, Sequence[str]], Tensor]]:
    """All ways by name."""
    found: dict[str, Callable[[Tensor, Sequence[str]], Tensor]] = {}
    theirs = Peft(base, number)
    found[REFERENCE] = theirs.mixed
    found["peft lora, one by one"] = lambda ids, names: one_by_one(theirs, ids, names)
    for name, config in OURS.items():
        ours = Ours(base, config, number)
        found[f"{name}, rows"] = ours.mixed
        found[f"{name}, one by one"] = lambda ids, names, ours=ours: one_by_one(ours, ids, names)  # type: ignore[misc]
    found["base alone"] = lambda ids, names: base(ids).logits
    return found


@torch.no_grad()
def compare(base: nn.Module, number: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way and number of tokens."""
    names = [f"a{row % number}" for row in range(batch)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        several = contestants(base, number)
    found = []
    for work, tokens in TOKENS.items():
        ids = torch.randint(1, 1024, (batch, tokens), generator=torch.Generator().manual_seed(1))
        check(several, ids, names)
        runs = {name: functools.partial(way, ids, names) for name, way in several.items()}
        times = take_turns(runs, rounds)
        found += [
            {
                "work": work,
                "adapters": number,
                "case": name,
                **ratios(seconds, times[REFERENCE]),
                "seconds": round(statistics.median(seconds), 4),
                "rounds": rounds,
            }
            for name, seconds in times.items()
        ]
    return found


def check(several: dict[str, Callable[[Tensor, Sequence[str]], Tensor]], ids: Tensor, names: Sequence[str]) -> None:
    """Every way of a method gives the same outputs; this also fills the caches."""
    outputs = {name: way(ids, names) for name, way in several.items()}
    for name, output in outputs.items():
        other = name.replace("rows", "one by one").replace("mixed", "one by one")
        torch.testing.assert_close(output, outputs[other], rtol=1e-3, atol=1e-3, msg=lambda text: f"{name}: {text}")  # noqa: B023


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the documentation's table: the median ratio of each case."""
    about, *rows = rows
    columns = [(work, number) for work in TOKENS for number in ADAPTERS]
    found = {(row["work"], row["adapters"], row["case"]): row for row in rows}
    lines = [["", *(f"{work}, {number}" for work, number in columns)]]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [found[work, number, case] for work, number in columns]
        lines.append([case, *(f"{row['ratio']:.2f}" for row in cells)])
    how = about["machine"]
    kept = ("processor", "cores", "layers", "threads", "batch", "torch", "peft", "transformers", "date")
    listed = ", ".join(f"{name} {how[name]}" for name in kept if name in how)
    return f"{list_table(lines)}\n({listed})\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: only check that all ways agree")
    torch.set_num_threads(THREADS)
    if parser.parse_args().smoke:
        for number in (1, 4):
            compare(llama(2, 1024, 32, 48, 4, 2), number, 8, 1)
        return
    base = llama(LAYERS, 1024, 576, 1536, 9, 3)
    about = {**machine(), "layers": LAYERS, "threads": THREADS, "batch": BATCH}
    rows: list[dict[str, Any]] = [{"machine": about}]
    for number in ADAPTERS:
        for row in compare(base, number, BATCH, ROUNDS):
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    RESULTS.with_suffix(".rst").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

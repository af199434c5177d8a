"""What is left of a model's weights after adapters were merged and unmerged: ``python benchmarks/unmerge.py FOLDER``.

LoRAs of rank 8 on the queries and values of MiniLM (fetched into FOLDER by :mod:`paper.registries`), with updates whose
norm is 1 % of the weights', are merged and unmerged one after another by PEFT, and by tnadapt: one, ten, and a hundred,
as by a server that switches between them. Counted are the elements of these weights that differ from before, and the
norm of the difference over that of one update.

Results go to ``results/unmerge.json``, and the table of the documentation, made of them, to ``results/unmerge.rst``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formatting import list_table
from machine import installed

import tnadapt as tna
from paper.registries import fetch

RESULTS = Path(__file__).parent / "results" / "unmerge.json"
TABLE = RESULTS.with_suffix(".rst")
TIMES = (1, 10, 100)
DTYPES = ("bfloat16", "float16", "float32")
TARGETS = ["query", "value"]
SIZE = 0.01


def model_of(folder: Path, dtype: str) -> Any:
    """Return MiniLM in a dtype."""
    import transformers

    made = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    return made.eval()


def weights_of(model: Any) -> list[torch.Tensor]:
    """Return the weights of queries and values."""
    return [
        module.get_parameter("weight")
        for name, module in model.named_modules()
        if name.endswith(("query", "value")) and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]


def draw(
    factors: list[tuple[torch.Tensor, torch.Tensor]], weights: list[torch.Tensor], scale: float, seed: int
) -> None:
    """Draw the factors B and A of each weight, so that the update has the norm ``SIZE`` times the weight's."""
    drawn = torch.Generator().manual_seed(seed)
    for (b, a), weight in zip(factors, weights, strict=True):
        for factor in (b, a):
            factor.data.copy_(torch.randn(factor.shape, generator=drawn))
        norm = (scale * (b.double() @ a.double())).norm()
        b.data.mul_(SIZE * weight.double().norm() / norm)


def by_peft(model: Any) -> tuple[Callable[[int], None], Callable[[], None], list[torch.Tensor]]:
    """Return what merges the adapter of a seed, what unmerges it, and the weights, with PEFT's LoRA."""
    import peft

    found = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    layers = [module for module in found.modules() if isinstance(module, peft.tuners.lora.Linear)]
    weights = [layer.base_layer.weight for layer in layers]
    factors = [(layer.lora_B["default"].weight, layer.lora_A["default"].weight) for layer in layers]

    def merge(seed: int) -> None:
        draw(factors, weights, 1.0, seed)
        found.merge_adapter()

    return merge, found.unmerge_adapter, weights


def by_tnadapt(model: Any) -> tuple[Callable[[int], None], Callable[[], None], list[torch.Tensor]]:
    """Return what merges the adapter of a seed, what unmerges it, and the weights, with tnadapt's."""
    adapter = tna.torch.attach(model, tna.presets.lora(8, rate="sgd"))
    arrays = dict(zip(adapter.plan.param_shapes, adapter.parameters(), strict=True))
    pairs = [(f"group{n}.split0.factor0", f"group{n}.split0.factor1") for n in range(len(adapter.targets))]
    weights = weights_of(model)
    factors = [(arrays[b].detach(), arrays[a].detach().mT) for b, a in pairs]

    def merge(seed: int) -> None:
        draw(factors, weights, adapter.config.scale, seed)
        adapter.clear_cache()
        adapter.merge()

    return merge, adapter.unmerge, weights


LIBRARIES = {"PEFT": by_peft, "tnadapt": by_tnadapt}


def measured(library: str, folder: Path, dtype: str) -> list[dict[str, Any]]:
    """Return what differs after each number of rounds."""
    merge, unmerge, weights = LIBRARIES[library](model_of(folder, dtype))
    before = [weight.detach().clone() for weight in weights]
    elements = sum(weight.numel() for weight in weights)
    update = SIZE * sum(float(weight.double().norm()) ** 2 for weight in before) ** 0.5
    rows, done = [], 0
    for times in TIMES:
        while done < times:
            merge(done)
            assert not all(map(torch.equal, weights, before)), "the merge changed nothing"
            unmerge()
            done += 1
        pairs = list(zip(weights, before, strict=True))
        changed = sum(int((weight != own).sum()) for weight, own in pairs)
        off = sum(float((weight.double() - own.double()).norm()) ** 2 for weight, own in pairs) ** 0.5
        rows.append(
            {
                "library": library, "dtype": dtype, "times": times, "elements": elements, "changed": changed,
                "error": off / update,
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of PEFT in reStructuredText; tnadapt changes nothing, which a test asserts."""
    by_case = {(row["dtype"], row["times"]): row for row in rows if row["library"] == "PEFT"}
    text = [("dtype", *(f"{times} adapter{'s' * (times > 1)}" for times in TIMES))]
    text += [(dtype, *(_cell(by_case[dtype, times]) for times in TIMES)) for dtype in DTYPES]
    return list_table(text)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['changed'] / row['elements']:.0%}, {row['error']:.2g}"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description="What is left of a model after merging and unmerging adapters.")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true", help="only write the table from the results")
    given = parser.parse_args()
    if not given.table:
        if given.folder is None:
            parser.error("give a folder for the model")
        folder, _ = fetch("reviews", given.folder)
        rows = [row for name in LIBRARIES for dtype in DTYPES for row in measured(name, folder, dtype)]
        versions = installed("torch", "peft", "transformers")
        RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()

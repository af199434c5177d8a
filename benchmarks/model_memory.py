"""What an adapter of a Llama's queries and values costs, from shapes alone: ``python benchmarks/model_memory.py``.

Nothing is measured. A step has 2,048 tokens under ``torch.autocast`` in bfloat16, the default of TRL's trainers. The
results go to ``results/model_memory.json``, and the documentation's table to ``results/model_memory.rst``.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from formatting import list_table, number

import tnadapt as tna
from tnadapt.algebra.factoring import factoring
from tnadapt.planning import step_cost

RESULTS = Path(__file__).parent / "results" / "model_memory.json"
TOKENS = 2048
UNITS = {"state": 1e3, "file": 1e3, "fixed": 1e6, "activations": 1e6}


class Llama(NamedTuple):
    """The sizes in a model's ``config.json``."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    value: int
    vocabulary: int = 128_256

    @property
    def linear(self) -> int:
        """The number of elements of all matrices that each token is multiplied by."""
        return self.hidden * (self.layers * (2 * self.query + 2 * self.value + 3 * self.intermediate) + self.vocabulary)

    @property
    def targets(self) -> list[tna.Target]:
        """The query and value of each layer."""
        return [
            tna.Target(f"model.layers.{layer}.self_attn.{role}_proj.weight", (rows, self.hidden), role)
            for layer in range(self.layers)
            for role, rows in (("q", self.query), ("v", self.value))
        ]


MODELS = {
    "Llama-3.2-1B": Llama(16, 2048, 8192, 2048, 512), "Llama-3.2-3B": Llama(28, 3072, 8192, 3072, 1024),
    "Llama-3.1-8B": Llama(32, 4096, 14_336, 4096, 1024),
}  # fmt: skip
METHODS = {
    "LoRA, r = 8": tna.presets.lora(8), "DoRA, r = 8": tna.presets.dora(8),
    "SuperLoRA, r = 8": tna.presets.superlora(8), "VeRA, r = 256": tna.presets.vera(256),
    "Uni-LoRA, 1,000": tna.presets.unilora(1000), "TinyLoRA, 13": tna.presets.tinylora(13),
}  # fmt: skip


def fixed_bytes(plan: tna.UpdatePlan) -> int:
    """Return the bytes kept besides the trained numbers: frozen arrays, and what a map before the network keeps."""
    total = 0
    for group, count in plan.alike:
        numbers = sum(math.prod(group.network.shapes[name]) for name in group.frozen_names)
        total += 4 * numbers * (count if plan.base_shapes else 1)  # groups of one shape share what is drawn
    for part in plan.theta.parts if plan.theta else ():
        n_in, n_out = part.projection.n_in, part.projection.n_out
        total += {"one-hot": 12 * n_out + 8 * n_in, "normal": 4 * n_out + 4 * n_in * n_out}[str(plan.config.before)]
    return total


def activation_bytes(plan: tna.UpdatePlan) -> int:
    """Return what backward keeps for a token: x of query and value, each x times a factor, and outputs for DoRA."""
    total = 0
    for index, (rows, cols) in enumerate(plan.shapes):
        if products := factoring(plan, index):
            total += 2 * sum(size.width or 0 for size in products.sizes)
        total += 2 * cols * (index % 2 == 0) + 4 * rows * bool(plan.weight_param_shapes)
    return total


def compute() -> Iterator[dict[str, Any]]:
    """Yield a row for each model, and for each method on it."""
    for title, llama in MODELS.items():
        whole = 2 * TOKENS * llama.linear  # forward, and the gradients of the inputs
        yield {"title": title, "products": whole}
        for method, config in METHODS.items():
            plan = tna.UpdatePlan(config, [target.shape for target in llama.targets])
            file = tna.AdapterFile(config, llama.targets, {n: np.zeros(s, "f4") for n, s in plan.param_shapes.items()})
            with tempfile.NamedTemporaryFile() as written:
                tna.save(written.name, file)
                size = Path(written.name).stat().st_size
            yield {
                "title": method, "trained": plan.num_parameters, "state": 16 * plan.num_parameters, "file": size,
                "fixed": fixed_bytes(plan), "activations": TOKENS * activation_bytes(plan),
                "products": step_cost(plan), "share": step_cost(plan) / whole,
            }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the documentation's table."""
    lines = [["", "trained", "state, kB", "file, kB", "fixed, MB", "activations, MB", "multiplications, G"]]
    for row in rows:
        cells, share = [f"**{row['title']}**", *[""] * 5], ""
        if "share" in row:
            cells = [row["title"], f"{row['trained']:,}", *(number(row[key] / unit) for key, unit in UNITS.items())]
            share = f" ({100 * row['share']:.2g} %)"
        lines.append([*cells, f"{number(row['products'] / 1e9)}{share}"])
    return list_table(lines, ":widths: 24 16 12 12 12 12 12")


if __name__ == "__main__":
    results = list(compute())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".rst").write_text(table(results), encoding="utf-8")

"""Do many small trainings pay in one process? ``python benchmarks/vmap.py`` measures adapters batched by torch.vmap.

Sixteen adapters of the small ViT of ``tnadapt finetune`` take a step together, on the same batch and base, as trainings
at sixteen learning rates would: ``vmap(grad_and_value(loss))`` over their stacked parameters. The result is the
processor time for each adapter, over that of a step of one adapter alone. It is written to ``results/vmap.json``, and
the table that ``docs/many_adapters.rst`` shows to ``results/vmap.rst``. Takes two minutes.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch.func import functional_call, grad_and_value, vmap

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.finetune import Spec
from tnadapt.finetune._problem_loading import open_problem
from tnadapt.finetune.loop import batches

RESULTS = Path(__file__).parent / "results"
ADAPTERS = 16
ROUNDS = 7
CONFIGS = {
    "lora(4)": tna.presets.lora(4),
    "superlora(1)": tna.presets.superlora(1),
    "superlora(4) behind F, ρ = 0.1": tna.presets.superlora(4, projection="linear", ratio=0.1),
    "dense": tna.presets.dense(),
}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measured() -> dict[str, Any]:
    """Return the median ratio of each setting, of alternating rounds."""
    torch.set_num_threads(1)
    problem = open_problem(Spec())
    part = problem.parts["training"]
    torch.manual_seed(0)
    indices = batches(part, 32)[0]
    x, y = part.batch(indices, torch.device("cpu")), part.labels[indices]
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        model = problem.build(0)
        tt.attach(model, config, "qv", keep_trainable=problem.keep_trainable)
        model.train()
        trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        stacked = {key: p.detach().expand(ADAPTERS, *p.shape).clone() for key, p in trained.items()}

        def loss(values: dict[str, torch.Tensor], model: torch.nn.Module = model) -> torch.Tensor:
            return problem.task.loss(functional_call(model, values, (x,)), y)

        def alone(model: torch.nn.Module = model) -> None:
            model.zero_grad()
            problem.task.loss(problem.logits(model, x), y).backward()

        together = functools.partial(vmap(grad_and_value(loss), randomness="different"), stacked)
        rounds = [(_seconds(together), _seconds(alone)) for _ in range(ROUNDS + 1)]
        # The first round draws, and loads what it needs.
        ratios = [every / ADAPTERS / one for every, one in rounds[1:]]
        found[name] = {"over_one_alone": round(statistics.median(ratios), 2), "rounds": [round(r, 2) for r in ratios]}
    return {"adapters": ADAPTERS, "settings": found, "machine": machine()}


def table(results: dict[str, Any]) -> str:
    """Return the table in reStructuredText."""
    rows = [
        line
        for name, found in results["settings"].items()
        for line in (f"   * - {name}", f"     - {found['over_one_alone']:.2f}")
    ]
    return (
        "\n".join([".. list-table::", "   :header-rows: 1", "", "   * - adapters", "     - over one alone", *rows])
        + "\n"
    )


def main() -> None:
    """Measure, and write the results."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch has no rule for its attention
        results = measured()
    (RESULTS / "vmap.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (RESULTS / "vmap.rst").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

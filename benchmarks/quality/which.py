"""The page "Which method?", generated from the results: an answer for each task and budget."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.lora_export import lora_export

from . import replication, store, tasks
from .comparison import Outcome, at_budget, base_of, dense_of, difference, improves, leader_of, outcomes_of
from .facts import Facts
from .figures import budgets_of
from .report import row, scored, shown
from .tasks import QualityTask

__all__ = ["lora_rank", "page", "write"]

#: Names in a cell.
_NAMED = 5


def write(folder: Path) -> Path:
    """Write the page next to the results.

    Raises
    ------
    FileError
        If results are damaged, or the file cannot be written.
    """
    path = folder / "which.md"
    replace_file(str(path), page(folder).encode())
    return path


def page(folder: Path) -> str:
    """Return the page as Markdown."""
    return "\n".join(_page(folder)) + "\n"


def _page(folder: Path) -> Iterator[str]:
    for paragraph in INTRODUCTION.split("\n\n"):
        yield (
            paragraph
            if paragraph.startswith(("#", "```", "-"))
            else textwrap.fill(paragraph, 120, break_on_hyphens=False)
        )
        yield ""
    missing = []
    for name in tasks.TASKS:
        task = tasks.find(name)
        found = [(scale, own) for scale in task.scales if (own := store.read(folder, name, scale)) is not None]
        for scale, own in found:
            outcomes = outcomes_of(task, own.records.values())
            if budgets_of(outcomes):
                yield from _section(task, scale, outcomes)
                repeated = replication.summary(folder, task, scale)
                if repeated:
                    yield from (textwrap.fill(repeated, 120, break_on_hyphens=False), "")
        if not found:
            missing.append(f"- {task.title}")
    if missing:
        yield from ("## Not measured yet", "", *missing, "")


def _section(task: QualityTask, scale: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    facts = task.facts(task.sketch())
    yield f"## {task.title}{'' if scale == 'small' else f', scale {scale}'}"
    yield ""
    yield _controls(task, outcomes, facts)
    yield ""
    yield row(
        [
            "parameters",
            "best",
            f"test {task.metric}",
            "statistically tied",
            "best as LoRA",
            f"test {task.metric}",
            "behind best",
        ]
    )
    yield "|--:|---|--:|---|---|--:|--:|"
    base = base_of(outcomes)
    for budget in budgets_of(outcomes):
        here = at_budget(outcomes, budget)
        best = leader_of(task, here)
        assert best is not None
        name = _named(best) if improves(task, best, base) else f"{_named(best)} (no gain)"
        servable = [one for one in here if lora_rank(one, facts) is not None]
        lora = leader_of(task, servable)
        cells = ["–", "–", "–"]
        if lora is not None:
            behind = "" if lora is best else shown(task, difference(task, best, lora))
            cells = [f"{_named(lora)} (rank {lora_rank(lora, facts)})", scored(task, lora), behind]
        yield row([f"{budget:,}", name, scored(task, best), _tied(task, here, best), *cells])
    yield ""


def _controls(task: QualityTask, outcomes: Sequence[Outcome], facts: Facts) -> str:
    words = []
    for one, name in ((base_of(outcomes), "No adapter"), (dense_of(outcomes), "dense updates")):
        if one is not None:
            counted = f" ({facts.size:,} parameters)" if one.parameters else ""
            words.append(f"{name}{counted}: {scored(task, one)}")
    return "; ".join(words) + f". {len(facts.shapes)} weights are adapted."


def _named(one: Outcome) -> str:
    return f"{one.name} {one.label}".strip()


def _tied(task: QualityTask, here: Sequence[Outcome], best: Outcome) -> str:
    """Return the methods that the best one, which held-out scores chose, is not decided to be better than."""
    tied = []
    for one in sorted(here, key=lambda one: -task.quality(one.mean)):
        gain = None if one is best else difference(task, best, one)
        if gain is not None and gain.low <= 0.0:
            tied.append(f"{one.name} (better on test)" if gain.decided else one.name)
    names = ", ".join(tied[:_NAMED])
    more = len(tied) - _NAMED
    return f"{names} and {more} more" if more > 0 else names or "none"


def lora_rank(one: Outcome, facts: Facts) -> int | None:
    """Return the rank of LoRA that holds a setting's updates exactly; None if none does, or if it is not known."""
    if one.library == "PEFT":
        return one.config.get("r") if one.method == "peft-lora" and one.config is not None else None
    assert one.config is not None  # controls alone have none
    return lora_export(SuperLoRA(Config.from_dict(one.config), facts.shapes, facts.layers, facts.roles)).rank


INTRODUCTION = """\
# Which method?

Generated by `python -m benchmarks.quality page` from the results of {doc}`quality`, and from nothing else. Find the
task that is most like yours, and the row of your budget:

- *best*: the method with the best held-out score at that budget, at its best learning rate. Test scores choose nothing.
  "(no gain)" means that its test score is not clearly better than that of no adapter: the paired interval includes 0.
- *statistically tied*: methods whose test score does not differ from it by a paired interval of 95 %. Choose one of
  these for other reasons, such as its speed or a library that reads it, but look at its score in {doc}`quality` first:
  if scores vary a lot between seeds, a method several points behind may still be tied. "(better on test)" marks methods
  that are clearly better on the test samples, though the held-out samples chose another one.
- *best as LoRA*: the best of those that export exactly as LoRA, so that vLLM, SGLang, PEFT or diffusers load them
  ({doc}`serving`), and the LoRA rank that it takes. All others can be merged into the weights. *behind best* is what
  that costs.

"(PEFT)" marks PEFT's own implementation of a method, which starts and is scaled in another way. {doc}`glossary` has the
symbols of settings.

If the column *statistically tied* is long, the choice of method matters less than the learning rate and the number of
parameters. `tnadapt plan` puts its rows in the order of these results where they apply: to weights with a tenth to ten
times as many elements, and at most 3.2 times more or fewer parameters. Rows in which no method is clearly better than
no adapter do not count. It says which results it used, or that none apply. If your weights differ in size from those of
the task that is most like yours, the order may come from another task. Then compare two or three candidates on your own
data with `tnadapt finetune`.
"""

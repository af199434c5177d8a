"""One method for each budget: the one that reaches most of the gain of dense updates over all tasks.

With it go the rank of LoRA that holds its updates, and the time of a training step by ``python benchmarks/steps.py``.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.checkpoints.lora_export import lora_export
from tnadapt.errors import FileError

from . import store, tasks
from .comparison import Outcome, at_budget, control_of, difference, improves, outcomes_of, share, tells
from .facts import Facts
from .figures import budgets_of
from .tasks import QualityTask

#: Rows that ``python benchmarks/steps.py --problem minilm --rounds 12 --results THIS CASE CASE CASE`` appends: a call
#: for each two or three cases, as other load on the machine affects short rounds less.
STEPS = Path(__file__).parents[1] / "results" / "method_steps.jsonl"
#: The cases of ``steps.py`` that stand for methods whose names are not cases.
CASES = {
    "superlora-projected": "superlora F 0.01",
    "peft-lora": "peft lora r=4",
    "peft-unilora": "peft unilora",
    "peft-fourierft": "peft fourierft",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """The outcomes of a task."""

    task: QualityTask
    facts: Facts
    outcomes: Sequence[Outcome]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method over several tasks."""

    name: str
    #: Its key, such as "superlora-projected".
    method: str
    #: Its gain over the best control on the test samples of each task, divided by that of dense updates.
    shares: tuple[float, ...]
    #: Names of the tasks in which it is not decided to be better than the best control.
    undecided: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The name, and where it gains nothing."""
        return f"{self.name} (no gain: {', '.join(self.undecided)})" if self.undecided else self.name


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The answer for a budget."""

    budget: int
    #: Names of the tasks in which a method of this budget is decided to be better than the best control.
    tasks: tuple[str, ...]
    #: Of the methods that were measured on all of these tasks, the one with the largest mean share on held-out samples.
    best: Choice
    #: The same, of the methods that export exactly as LoRA.
    served: Choice | None
    #: The number of methods that were measured on all of these tasks.
    compared: int
    #: How many of the others are not decided to be worse than the best one on any of them.
    tied: int
    #: Names of the tasks with results at this budget in which no method is decided to be better than the best control.
    #: They do not count, as their shares are chance.
    idle: tuple[str, ...] = ()


def studies_of(folder: Path, scale: str = "small") -> list[Study]:
    """Return the tasks that have results at a scale and can tell methods apart."""
    studies = []
    for name in tasks.TASKS:
        task = tasks.find(name)
        found = store.read(folder, name, scale)
        if found is not None:
            outcomes = outcomes_of(task, found.records.values())
            if not tells(task, outcomes):
                continue
            studies.append(Study(task, task.facts(task.sketch()), outcomes))
    return studies


def recommendations(studies: Sequence[Study], library: str | None = None) -> list[Recommendation]:
    """Return an answer for each budget at which the chosen method is decided to gain over controls on some task."""
    budgets = sorted({budget for study in studies for budget in budgets_of(study.outcomes)})
    found = (_recommendation(budget, studies, library) for budget in budgets)
    return [one for one in found if one is not None]


def _decides(study: Study, budget: int) -> bool:
    """Return whether some method is decided to be better than the best control, and shares can be said."""
    here, control = at_budget(study.outcomes, budget), control_of(study.task, study.outcomes)
    if not any(improves(study.task, one, control) for one in here):
        return False
    return all(share(study.task, here[0], study.outcomes, held_out) is not None for held_out in (False, True))


def _recommendation(budget: int, measured: Sequence[Study], library: str | None) -> Recommendation | None:
    measured = [study for study in measured if at_budget(study.outcomes, budget)]
    studies = [study for study in measured if _decides(study, budget)]
    if not studies:
        return None
    by_method: list[Mapping[str, Outcome]] = [
        {one.method: one for one in at_budget(study.outcomes, budget) if library in (None, one.library)}
        for study in studies
    ]
    shared = [name for name in by_method[0] if all(name in own for own in by_method)]
    candidates = [[own[name] for own in by_method] for name in shared]
    best = _best(studies, candidates)
    # Nothing is recommended if what held-out samples choose does not gain on test samples anywhere.
    if best is None or len(best.undecided) == len(studies):
        return None
    served = _best(studies, [own for own in candidates if _is_served(studies, own)])
    tied = sum(_tied(studies, own, candidates[shared.index(best.method)]) for own in candidates) - 1
    names = tuple(one.task.name for one in studies)
    idle = tuple(one.task.name for one in measured if one.task.name not in names)
    return Recommendation(budget, names, best, served, len(candidates), tied, idle)


def _tied(studies: Sequence[Study], own: Sequence[Outcome], best: Sequence[Outcome]) -> bool:
    """Return whether a method is not decided to be worse than the best one on any task."""
    pairs = zip(studies, own, best, strict=True)
    gains = [difference(study.task, leader, one) for study, one, leader in pairs]
    return all(gain is None or gain.low <= 0.0 for gain in gains)


def _best(studies: Sequence[Study], candidates: Iterable[Sequence[Outcome]]) -> Choice | None:
    """Return the method with the largest mean share on held-out samples; test samples play no role."""
    best = max(candidates, key=lambda own: statistics.fmean(_shares(studies, own, held_out=True)), default=None)
    if best is None:
        return None
    undecided = tuple(
        study.task.name
        for study, one in zip(studies, best, strict=True)
        if not improves(study.task, one, control_of(study.task, study.outcomes))
    )
    shares = _shares(studies, best, held_out=False)
    return Choice(best[0].name, best[0].method, shares, undecided)


def _shares(studies: Sequence[Study], own: Sequence[Outcome], held_out: bool) -> tuple[float, ...]:
    found = (share(study.task, one, study.outcomes, held_out) for study, one in zip(studies, own, strict=True))
    return tuple(one for one in found if one is not None)


def _is_served(studies: Sequence[Study], own: Sequence[Outcome]) -> bool:
    """Return whether its updates are exactly LoRA on all tasks."""
    return all(lora_rank(one, study.facts) is not None for study, one in zip(studies, own, strict=True))


def _percent(shares: Sequence[float], of: str = "") -> str:
    """Return the mean in percent, of what it is, and the lowest and highest of several."""
    mean, *ends = (round(100.0 * one) for one in (statistics.fmean(shares), min(shares), max(shares)))
    return f"{mean}%{of}" if len(shares) == 1 else f"{mean}%{of}, from {ends[0]}% to {ends[1]}%"


def sentence(one: Recommendation) -> str:
    """Return the answer in words: which method to choose, and which one if it is to be served as LoRA."""
    best, served = one.best, one.served
    share_of_best = _percent(best.shares, " of dense updates' gain")
    told = f"Up to {one.budget:,} parameters, choose {best.shown} ({share_of_best})"
    if served is None:
        return f"{told}; LoRA servers such as vLLM take no measured method."
    if served.method == best.method:
        return f"{told}, which LoRA servers such as vLLM take."
    return f"{told}; for LoRA servers such as vLLM, {served.shown} ({_percent(served.shares)})."


def basis(one: Recommendation) -> str:
    """Return what an answer is based on."""
    measured, idle = ("; ".join(tasks.find(name).title for name in names) for names in (one.tasks, one.idle))
    others = one.compared - 1
    told = f"Measured on {measured}, where {one.tied} of {others} other methods are statistically tied with the first."
    return f"{told} No method was clearly better than the best control on {idle}." if idle else told


def lora_rank(one: Outcome, facts: Facts) -> int | None:
    """Return the rank of LoRA that holds a setting's updates exactly; None if none does, or if it is not known."""
    if one.library == "PEFT":
        return one.config.get("r") if one.method == "peft-lora" and one.config is not None else None
    assert one.config is not None  # controls alone have none
    return lora_export(UpdatePlan(Config.from_dict(one.config), facts.shapes, facts.layers, facts.roles)).rank


def step_ratios(path: Path = STEPS) -> dict[str, float]:
    """Return the time of a training step of MiniLM by case, divided by that of PEFT's LoRA of rank 4."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["case"]: float(row["ratio"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} has no times of steps: {error}") from None


def step_ratio(ratios: Mapping[str, float], method: str) -> str:
    """Return a cell of a table: the ratio of a method, or a dash if it was not measured.

    Examples
    --------
    >>> step_ratio({"superlora F 0.01": 1.234}, "superlora-projected"), step_ratio({}, "boft")
    ('1.23', '–')
    """
    found = ratios.get(CASES.get(method, method))
    return "–" if found is None else f"{found:.2f}"

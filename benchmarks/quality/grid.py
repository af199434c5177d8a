"""The grid of a task: which settings take part at which budget, and the trainings of a shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tnadapt.errors import TnadaptError

from . import methods
from .facts import Facts
from .methods import Method, Setting
from .tasks import QualityTask

BUDGETS = (13, 100, 1_000, 10_000, 100_000)


@dataclasses.dataclass(frozen=True)
class Absent:
    """A method that has no setting at a budget."""

    method: str
    budget: int
    why: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """The settings of a task."""

    facts: Facts
    #: The controls and references first, then by budget and method.
    settings: tuple[Setting, ...]
    absent: tuple[Absent, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training."""

    task: str
    scale: str
    setting: Setting
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """The key of its result line; it does not depend on the budget that the setting was found for."""
        one = self.setting
        return methods.key_of(self.task, self.scale, one.method, one.values, self.seed, self.rate)

    @property
    def method(self) -> Method:
        """The method."""
        return methods.find(self.setting.method)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.task}: {self.setting.name}"


def grid_of(task: QualityTask, names: Sequence[str] | None = None, budgets: Sequence[int] = BUDGETS) -> Grid:
    """Find the settings of all methods at all budgets.

    A method takes part at a budget with its largest setting, if that has at least half as many parameters. Budgets
    above the number of elements of the weights, which is that of a dense update, are left out.
    """
    if any(budget < 1 for budget in budgets):
        raise TnadaptError(f"a budget must be at least 1 parameter; got {min(budgets)}")
    chosen = [methods.find(name) for name in (methods.names() if names is None else names)]
    sketch = task.sketch()
    facts = task.facts(sketch)
    controls = [methods.find(name).largest(facts, sketch, 0) for name in task.controls]
    settings, absent = [], []
    for budget in sorted(set(budgets)):
        if budget > facts.size:
            continue
        for method in chosen:
            if method.library == "control":
                continue
            try:
                found = method.largest(facts, sketch, budget)
            except methods.UnfitError as error:
                absent.append(Absent(method.name, budget, str(error)))
                continue
            if 2 * found.parameters < budget:
                absent.append(Absent(method.name, budget, f"reaches {found.parameters:,} parameters"))
            else:
                settings.append(found)
    _check_budgets(settings)
    return Grid(facts, (*controls, *settings), tuple(absent))


def _check_budgets(settings: Sequence[Setting]) -> None:
    """Refuse a setting at two budgets: its trainings are the same, and the tables would count them at one alone."""
    budgets: dict[tuple[str, str], int] = {}
    for one in settings:
        other = budgets.setdefault((one.method, one.spec), one.budget)
        if other != one.budget:
            raise TnadaptError(
                f"{one.name} is the largest setting at budgets of {other:,} and {one.budget:,} parameters; "
                "give budgets that differ more, by a factor above 2"
            )


def shard_of(settings: Sequence[Setting], shard: tuple[int, int]) -> list[Setting]:
    """Return the settings of one shard; all trainings of a setting are in one shard, which chooses its rate.

    Examples
    --------
    >>> shard_of(["a", "b", "c"], (1, 2)), shard_of(["a", "b", "c"], (2, 2))
    (['a', 'c'], ['b'])
    """
    number, of = shard
    if not 1 <= number <= of:
        raise TnadaptError(f"a shard is I/N with I from 1 to N; got {number}/{of}")
    return list(settings[number - 1 :: of])

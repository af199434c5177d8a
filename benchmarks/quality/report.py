"""The table of a task as Markdown, computed from its results file."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.report import TextTable

from ..formatting import folded, wrapped
from . import store
from .comparison import Difference, Outcome, at_budget, control_of, dense_of, difference, leader_of, outcomes_of, tells
from .figures import LIBRARIES, budgets_of, draw_methods, draw_scores
from .tasks import QualityTask


def write(folder: Path, task: QualityTask, scale: str) -> list[Path]:
    """Write the table and the figures of a task next to its results, if it has any; return their paths."""
    found = store.read(folder, task.name, scale)
    if found is None:
        return []
    name = store.path_of(folder, task.name, scale).stem
    page = folder / f"{name}.md"
    replace_file(str(page), table(task, found, name).encode())
    return [page, *draw(folder, task, scale)]


def draw(folder: Path, task: QualityTask, scale: str) -> list[Path]:
    """Draw the figures of a task with results; return their paths."""
    found = store.read(folder, task.name, scale)
    outcomes = [] if found is None else outcomes_of(task, found.records.values())
    if found is None or not budgets_of(outcomes):
        return []
    name, note = store.path_of(folder, task.name, scale).stem, note_of(task, found, outcomes)
    scores, methods = folder / f"{name}.png", folder / f"{name}-methods.png"
    draw_scores(task, outcomes, scores, note)
    draw_methods(task, outcomes, methods, note)
    return [scores, methods]


def note_of(task: QualityTask, found: store.TaskResults, outcomes: Sequence[Outcome]) -> str:
    """Return the small print of figures: samples, seeds, rates."""
    sizes = ", ".join(f"{count:,} {part}" for part, count in found.study["samples"].items())
    return f"{sizes} samples; {_seeds(outcomes)}; bars: one standard deviation over seeds; {_rates(outcomes)}"


def _seeds(outcomes: Sequence[Outcome]) -> str:
    number = max((len(one.test) for one in outcomes), default=0)
    return f"{number} seed{'s' * (number != 1)}"


def _rates(outcomes: Sequence[Outcome]) -> str:
    numbers = [len(one.tried) for one in outcomes if one.library != "control"]
    if not numbers:
        return "no rates"
    span = f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
    return f"filled: each at the rate of its row, of {span} tried; hollow: at the best of them, if it is another"


# -- The table ------------------------------------------------------------------------------------


def table(task: QualityTask, found: store.TaskResults, name: str) -> str:
    """Return the section of a task: what was done, the figures, and a table for each budget."""
    return "\n".join(_section(task, found, name)) + "\n"


def _section(task: QualityTask, found: store.TaskResults, name: str) -> Iterator[str]:
    outcomes = outcomes_of(task, found.records.values())
    yield from wrapped(f"# {task.title}")
    yield from wrapped(READING)
    yield from _about(task, found, outcomes)
    if budgets_of(outcomes):
        yield ""
        yield f"![{task.metric} against parameters]({name}.png)"
        yield ""
        yield f"![Every method at each budget]({name}-methods.png)"
    controls = [one for one in outcomes if one.library == "control" and one.measured]
    if controls:
        yield from ("", "**Controls**", "")
        head = ("control", "parameters", "rate", f"held-out {task.chosen_by}", f"test {task.metric}")
        rows = [
            (one.title, f"{one.parameters:,}", _rate(one), _held_out(task, one), scored(task, one)) for one in controls
        ]
        yield TextTable(rows, head, range(1, 5)).markdown()
    control, dense = control_of(task, outcomes), dense_of(outcomes)
    if control is not None and dense is not None:
        gain = f"{control.title}: dense updates gain {shown(task, difference(task, dense, control))}"
        left_out = (
            "" if tells(task, outcomes) else ", fewer than three standard errors, so that the task counts nowhere"
        )
        yield from ("", f"Gains are over the best control, {gain}{left_out}.")
    for budget in budgets_of(outcomes):
        some = at_budget(outcomes, budget)
        leader = leader_of(task, some)
        assert leader is not None
        best = f"● {leader.name} {leader.label}".rstrip()
        yield ""
        yield folded(
            f"At most {budget:,} parameters: {len(some)} methods, {best} with {task.metric} {scored(task, leader)}",
            "\n".join(_budget(task, some, leader, control)),
        ).rstrip("\n")
    yield from _missing(task, found, outcomes)


def _about(task: QualityTask, found: store.TaskResults, outcomes: Sequence[Outcome]) -> Iterator[str]:
    study, records = found.study, found.records.values()
    sizes = ", ".join(f"{count:,} {part}" for part, count in study["samples"].items())
    kept = max((one.kept for one in outcomes), default=0)
    yield f"{task.parts}: {sizes} samples."
    if kept:
        at = f", at the rate {study['head_rate']:g} with all adapters" if "head_rate" in study else ""
        yield f"In addition to every adapter, and not counted, a head of {kept:,} parameters is trained{at}."
    rates = sorted({line["rate"] for line in records})
    tuned = sorted({one.tuned_by for one in outcomes if len(one.tried) > 1})
    by = " or ".join(map(str, tuned)) or "no"
    hours = sum(line["seconds"] for line in records) / 3600
    yield (
        f"{len(records):,} trainings of {len(outcomes):,} settings, {_seeds(outcomes)}, {hours:.1f} hours in sum. "
        f"Rates tried, the best of them chosen by {by} seed{'s' * (by != '1')} on held-out {task.chosen_by}: "
        f"{', '.join(f'{rate:g}' for rate in rates)}."
    )
    failed = sum("failed" in line for line in records)
    if failed:
        number = f"{failed:,} training{'s' * (failed != 1)}"
        yield f"{number} ended with an error; a rate with one counts as one that diverges."
    chosen = [words for library in LIBRARIES if (words := _best_rates(outcomes, library))]
    if chosen:
        yield f"Best rates: {'; '.join(chosen)}."
    edges = [one for one in outcomes if one.edge and one.library != "control" and one.measured]
    if edges:
        yield f"The best rate of {len(edges)} settings is the lowest or highest that was tried; they are marked with ←."
    yield f"Machine: {'; '.join(dict.fromkeys(map(_machine, found.sessions)))}."


def _best_rates(outcomes: Sequence[Outcome], library: str) -> str:
    """Return the range of the best rates of a library's settings, and the most frequent one."""
    rates = [one.best_rate for one in outcomes if one.library == library and one.measured]
    if not rates:
        return ""
    if len(set(rates)) == 1:
        return f"{library} {rates[0]:g} for all settings"
    usual, count = collections.Counter(sorted(rates)).most_common(1)[0]
    return f"{library} from {min(rates):g} to {max(rates):g}, {usual:g} for {count} of {len(rates)} settings"


def _machine(session: dict[str, Any]) -> str:
    versions = {"Python": session["versions"]["python"], **session["versions"], **session.get("peers", {})}
    versions.pop("python", None)
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{session['cores']} cores of {session['processor']}, device {session.get('device', 'cpu')}, {shown}"


def _budget(task: QualityTask, outcomes: Sequence[Outcome], leader: Outcome, control: Outcome | None) -> Iterator[str]:
    head = (
        "", "method", "setting", "parameters", "rate", f"held-out {task.chosen_by}", f"test {task.metric}",
        "best rate", "at best rate", f"gain over {'controls' if control is None else control.title}", "behind ●",
    )  # fmt: skip
    rows = []
    for one in sorted(outcomes, key=lambda one: (-task.quality(one.mean), one.name)):
        behind = None if one is leader else difference(task, leader, one)
        tied = behind is not None and not behind.decided
        mark = "●" if one is leader else "○" if tied else ""
        rows.append((
            mark, one.name, one.label, f"{one.parameters:,}", _rate(one), _held_out(task, one), scored(task, one),
            *_at_best(task, one), "" if control is None else shown(task, difference(task, one, control)),
            shown(task, behind),
        ))  # fmt: skip
    yield TextTable(rows, head, range(3, 11)).markdown()


def _rate(one: Outcome) -> str:
    return f"{one.rate:g}" if one.tried != (one.rate,) else "–"


def _at_best(task: QualityTask, one: Outcome) -> tuple[str, str]:
    """Return the best rate and its test score, if it is another one than that of the row."""
    if one.best_rate == one.rate:
        return f"the same{' ←' * one.edge}", ""
    return f"{one.best_rate:g}{' ←' * one.edge}", "" if one.best_test is None else value(task, one.best_test)


def value(task: QualityTask, score: float) -> str:
    """Return a score as tables show it."""
    return f"{100 * score:.1f}" if task.percent else f"{score:.4g}"


def _held_out(task: QualityTask, one: Outcome) -> str:
    return value(task, statistics.fmean(one.held_out.values()))


def scored(task: QualityTask, one: Outcome) -> str:
    """Return the mean test score and its standard deviation over seeds."""
    return f"{value(task, one.mean)} ± {value(task, one.spread)}" if len(one.test) > 1 else value(task, one.mean)


def shown(task: QualityTask, found: Difference | None) -> str:
    """Return a difference with its interval."""
    if found is None:
        return ""
    if found.seeds < 2:
        return value(task, found.mean)
    return f"{value(task, found.mean)} [{value(task, found.low)}, {value(task, found.high)}]"


def _missing(task: QualityTask, found: store.TaskResults, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """List settings that have no result, and why."""
    every = outcomes_of(task, found.records.values(), every=True)
    unfinished = len(every) - len(outcomes)
    lines = [
        f"- {one.name}, at most {one.budget:,}: {f'failed: {one.failed}' if one.failed else 'diverged at its rate'}"
        for one in outcomes
        if not one.measured
    ]
    if unfinished:
        lines.append(f"- {unfinished} settings are not finished.")
    if lines:
        yield from ("", "**Without a result**", "", *lines)


READING = """\
● has the best held-out score at its budget. *behind ●* is the difference between its test score and that of the row,
paired over seeds, with the 95 % interval of Student's t. ○ marks the methods whose interval includes 0: these seeds do
not decide between the two. ± is the standard deviation over seeds. [How it is
measured](https://tnadapt.readthedocs.io/en/latest/quality.html)
"""

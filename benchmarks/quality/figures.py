"""Figures of a task, drawn from its results: scores against parameters, and every method at every budget."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnadapt.plot.canvas import figure, ink, pale, quiet, saved

from .comparison import Outcome, at_budget, control_of, dense_of, leader_of, share
from .methods import BASE
from .tasks import QualityTask

#: Colour and marker of each library.
LIBRARIES = {"tnadapt": ("#D55E00", "o"), "PEFT": ("#0072B2", "s")}
#: Methods of each budget that are named in the first figure.
NAMED = 3


def shown(task: QualityTask, value: float) -> float:
    """Return a score as it is drawn."""
    return 100 * value if task.percent else value


def axis_of(task: QualityTask) -> str:
    """Return the title of the axis of scores."""
    unit = ", %" if task.percent else ""
    return f"test {task.metric}{unit}, {'lower' if task.lower else 'higher'} is better"


def budgets_of(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the budgets at which something was measured."""
    return sorted({one.budget for one in outcomes if one.library != "control" and one.measured})


def draw_scores(task: QualityTask, outcomes: Sequence[Outcome], path: Path, note: str = "") -> None:
    """Draw the score of every setting against its parameters; name those with the best held-out scores.

    The line of each library joins the settings with the best held-out score at each budget.
    """
    drawn, axes = figure(10, 5.8)
    axes.set_xscale("log")
    for library, (colour, marker) in LIBRARIES.items():
        own = [one for one in outcomes if one.library == library and one.measured]
        if not own:
            continue
        axes.plot(
            [one.parameters for one in own], [shown(task, one.mean) for one in own], marker=marker, linestyle="none",
            color=colour, alpha=0.35, markersize=5, markeredgewidth=0, zorder=2,
        )  # fmt: skip
        best = [leader_of(task, at_budget(own, budget)) for budget in budgets_of(own)]
        line = [one for one in best if one is not None]
        axes.errorbar(
            [one.parameters for one in line], [shown(task, one.mean) for one in line],
            yerr=[shown(task, one.spread) for one in line], color=colour, marker=marker, markersize=6.5, linewidth=1.3,
            elinewidth=1.0, capsize=2.5, zorder=4,
            label=f"{library}: at the default rate, best of each budget by held-out score",
        )  # fmt: skip
        tuned = [one for one in own if one.best_rate != one.rate and one.best_test is not None]
        axes.plot(
            [one.parameters for one in tuned], [shown(task, one.best_test or 0.0) for one in tuned], marker=marker,
            linestyle="none", color=colour, alpha=0.6, markersize=5, fillstyle="none", zorder=3,
            label=f"{library}: at another rate, the best one" if tuned else None,
        )  # fmt: skip
    for one in _levels(task, outcomes):
        level = shown(task, one.mean)
        axes.axhline(level, color=pale(), linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        counted = f", {one.parameters:,} parameters" if one.parameters else ""
        axes.annotate(
            f"{one.title}{counted}: {level:.3g}", (0.005, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color="#666666",
        )  # fmt: skip
    _named(task, outcomes, axes)
    axes.set_xlabel("trained parameters of the adapter", fontsize=9, color=ink())
    axes.set_ylabel(axis_of(task), fontsize=9, color=ink())
    budgets = budgets_of(outcomes)
    axes.set_xlim(min(budgets) / 10, max(budgets) * 1.5)  # the controls are named on the left
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    axes.grid(axis="both", which="major", color="#E6E6E6", linewidth=0.7)
    axes.set_title(task.title, loc="left", fontsize=11, color=ink(), pad=22, parse_math=False)
    # Above the axes, where it covers no point.
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=7.5, frameon=False, borderaxespad=0.2)
    quiet(axes)
    _small_print(drawn, note)
    saved(drawn, path)


def draw_learned(studies: Sequence[tuple[QualityTask, Sequence[Outcome]]], path: Path) -> None:
    """Draw for each task how much of the gain of dense updates tnadapt's methods reach with how many parameters.

    A line joins the methods with the best held-out score at each budget; points are all methods.
    """
    drawn, axes = figure(10, 5.2)
    axes.set_xscale("log")
    for place, (task, outcomes) in enumerate(studies):
        colour = f"C{place}"
        ours = [one for one in outcomes if one.library == "tnadapt" and one.measured]
        shares = {id(one): 100 * (share(task, one, outcomes) or 0.0) for one in ours}
        numbers = [one.parameters for one in ours]
        axes.plot(numbers, [shares[id(one)] for one in ours], "o", color=colour, alpha=0.35, markersize=4)
        best = [one for budget in budgets_of(ours) if (one := leader_of(task, at_budget(ours, budget))) is not None]
        axes.plot(
            [one.parameters for one in best], [shares[id(one)] for one in best], "o-", color=colour, label=task.title
        )
    for level in (0, 50, 100):
        axes.axhline(level, color=pale(), linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(-60, 130)
    axes.set_xlabel("trained parameters of the adapter", fontsize=9, color=ink())
    axes.set_ylabel("gain over the best control, % of that of dense updates (cut off below)", fontsize=9, color=ink())
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    quiet(axes)
    saved(drawn, path)


def _levels(task: QualityTask, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return what is drawn as a line: no adapter, the best control, and dense updates."""
    levels = {one.method: one for one in (control_of(task, outcomes), dense_of(outcomes)) if one is not None}
    levels |= {one.method: one for one in outcomes if one.method == BASE.name and one.measured}
    return list(levels.values())


def _small_print(drawn: Any, note: str) -> None:
    """Write a note below a figure, in as many lines as it needs."""
    if note:
        lines = textwrap.fill(note, int(18 * drawn.get_figwidth()))
        drawn.supxlabel(lines, x=0.01, ha="left", fontsize=7, color=pale(), parse_math=False)


def _named(task: QualityTask, outcomes: Sequence[Outcome], axes: Any) -> None:
    """Write the names of the best settings of each budget, below each other above the highest of them."""
    for budget in budgets_of(outcomes):
        ranked = sorted(at_budget(outcomes, budget), key=lambda one: -_held_out(task, one))[:NAMED]
        words = "\n".join(f"{place}. {one.name}" for place, one in enumerate(ranked, 1))
        top = max(ranked, key=lambda one: shown(task, one.mean) + shown(task, one.spread))
        axes.annotate(
            words, (budget, shown(task, top.mean) + shown(task, top.spread)), xytext=(0, 7),
            textcoords="offset points", fontsize=7, color=ink(), ha="right", va="bottom", linespacing=1.25, zorder=5,
            parse_math=False,
            # The line of a control may be behind the names.
            bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))


def _held_out(task: QualityTask, one: Outcome) -> float:
    return sum(map(task.held_out_quality, one.held_out.values())) / len(one.held_out)


def draw_methods(task: QualityTask, outcomes: Sequence[Outcome], path: Path, note: str = "") -> None:
    """Draw a panel per budget with every method's mean and standard deviation, the best first."""
    budgets = budgets_of(outcomes)
    counts = [len(at_budget(outcomes, budget)) for budget in budgets]
    columns = min(3, len(budgets))
    most = [max(counts[start : start + columns]) for start in range(0, len(counts), columns)]
    drawn, first = figure(max(7.5, 4.1 * columns), 0.9 + sum(1.0 + 0.15 * count for count in most))
    first.remove()
    ratios = [6.7 + count for count in most]
    grid = drawn.subplots(len(most), columns, sharex=True, squeeze=False, height_ratios=ratios).reshape(-1)
    for place, (axes, budget) in enumerate(zip(grid, budgets, strict=False)):
        _panel(task, outcomes, budget, axes, most[place // columns])
    for axes in grid[len(budgets) :]:
        axes.remove()
    drawn.suptitle(task.title, x=0.01, ha="left", fontsize=11, color=ink(), parse_math=False)
    _small_print(drawn, note)
    saved(drawn, path)


def _panel(task: QualityTask, outcomes: Sequence[Outcome], budget: int, axes: Any, rows: int) -> None:
    """Draw a panel that holds ``rows`` methods, the best of which is at the top."""
    ranked = sorted(at_budget(outcomes, budget), key=lambda one: task.quality(one.mean))
    for place, one in enumerate(ranked):
        colour, marker = LIBRARIES[one.library]
        axes.errorbar(
            [shown(task, one.mean)], [place], xerr=[shown(task, one.spread)], color=colour, marker=marker, markersize=4,
            elinewidth=0.9,
        )  # fmt: skip
        if one.best_rate != one.rate and one.best_test is not None:
            axes.plot(
                [shown(task, one.best_test)], [place], marker=marker, color=colour, markersize=4, fillstyle="none"
            )
    for control in _levels(task, outcomes):
        axes.axvline(shown(task, control.mean), color=pale(), linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(ranked)), [one.name for one in ranked], fontsize=7)
    axes.set_ylim(len(ranked) - rows - 0.7, len(ranked) - 0.3)
    axes.set_title(f"at most {budget:,} parameters", loc="left", fontsize=9, color=ink())
    axes.set_xlabel(axis_of(task), fontsize=8, color=ink())
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    quiet(axes)
    axes.tick_params(axis="y", labelsize=7)
    axes.tick_params(labelbottom=True)

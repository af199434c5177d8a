"""Plots over the number of parameters: accuracy with its Pareto front, and rank for each order (figure 2)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan, parameter_count
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, safe_repr

from . import canvas
from .canvas import checked_text, figure, ground, ink, labelled, legible, pale, quiet, saved, styles, tone

# -- Accuracy, or another score, with the Pareto front -----------------------------------------------------------------


# About the width of the axes in inches.
_WIDTH = 7.4


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Axis:
    """The vertical axis of :func:`pareto`: accuracy by default.

    Attributes
    ----------
    label : str
        Without a unit.
    percent : bool
        Whether the scores are fractions, which are drawn in percent.
    lower : bool
        Whether lower scores are better; they are drawn higher up.

    Examples
    --------
    >>> Axis().shown(81.25), Axis("test loss", percent=False, lower=True).shown(1.23456)
    ('81.2 %', '1.235')
    """

    label: str = "test accuracy"
    percent: bool = True
    lower: bool = False

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return 100.0 if self.percent else 1.0

    @checks_arguments
    def shown(self, number: float) -> str:
        """Return a drawn number as text."""
        return f"{float(number):.1f} %" if self.percent else f"{float(number):.4g}"


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Mark:
    """One method in a plot of accuracy against parameters.

    Attributes
    ----------
    family : str
        Determines color and shape.
    label : str
        Written next to the mark if it is on the front.
    parameters : int
        0 is drawn as a reference line, as is the family ``dense``.
    accuracies : tuple of float
        Scores, one per seed; accuracies go from 0 to 1.
    front : bool
        Whether it is on the Pareto front.
    factor : float
        What the scores are multiplied by to be drawn: 100 for percent.

    Examples
    --------
    >>> mark = Mark("LoRA", "r = 1", 1024, (0.8, 0.82))
    >>> round(mark.mean, 3), round(mark.spread, 3)
    (81.0, 1.414)
    """

    family: str
    label: str
    parameters: int
    accuracies: tuple[float, ...]
    front: bool = False
    factor: float = 100.0

    @property
    def mean(self) -> float:
        """Mean score, in percent if it is an accuracy."""
        return self.factor * statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds, in the same unit; 0 for one seed."""
        return self.factor * statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@checks_arguments
def pareto(
    marks: Sequence[Mark], path: str | os.PathLike[str], title: str = "", note: str = "", axis: Axis = Axis()
) -> None:
    """Draw accuracy against trainable parameters, with the Pareto front as steps, into a file.

    Parameters
    ----------
    marks : sequence of Mark
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    title, note : str
        Text above the plot, and small text below.
    axis : Axis
        What the scores are.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    Two methods and the reference line of the head alone::

        marks = [
            Mark("LoRA", "r = 1", 1024, (0.8, 0.82)),
            Mark("SuperLoRA", "r = 1", 364, (0.85, 0.83), front=True),
            Mark("head alone", "", 0, (0.7,)),
        ]
        pareto(marks, "front.png", "two methods")
    """
    checked_text(title=title, note=note)
    drawn, axes = figure(8.6, 5.2)
    # A diverged training has no finite score, and no position.
    marks = [
        dataclasses.replace(mark, factor=axis.factor) for mark in marks if all(map(math.isfinite, mark.accuracies))
    ]
    points = [mark for mark in marks if mark.parameters]
    lines = [mark for mark in marks if not mark.parameters]
    _axes(axes, points or marks, marks, axis)
    for mark in lines:
        _reference_line(axes, mark, axis)
    _front(axes, [mark for mark in points if mark.front])
    families = styles(mark.family for mark in points)
    colours = {
        family: ink() if family.startswith("dense") else legible(colour) for family, (colour, _) in families.items()
    }
    for family, (_, shape) in families.items():
        of_family = [mark for mark in points if mark.family == family]
        _family(axes, family, of_family, colours[family], shape, axis)
    _labels(axes, points, -1.0 if axis.lower else 1.0, colours)
    labelled(axes, title, 10, "trainable parameters of the adapter", f"{axis.label}, %" if axis.percent else axis.label)
    if marks:
        axes.legend(
            loc="lower right", fontsize=8, facecolor=ground(), edgecolor="none", framealpha=1.0, labelcolor=ink()
        )
    if note:
        drawn.supxlabel(note, x=0.01, ha="left", fontsize=7, color=pale(), parse_math=False)
    saved(drawn, path)


def _axes(axes: Any, points: Sequence[Mark], marks: Sequence[Mark], axis: Axis) -> None:
    counts = [max(1, mark.parameters) for mark in points] or [1]
    axes.set_xscale("log")
    between = math.log10(max(counts) / min(counts))
    # Space for the labels on the left, and at least a decade, so that few points have ticks with round numbers.
    span, around = between + 0.2, max(0.0, 1.0 - between) / 2
    axes.set_xlim(min(counts) / 10 ** (0.16 * span + around), max(counts) * 10 ** (0.05 * span + around))
    low = min((mark.mean - mark.spread for mark in marks), default=0.0)
    high = max((mark.mean + mark.spread for mark in marks), default=100.0)
    if axis.percent:
        margin = max(2.0, 0.08 * (high - low))
        axes.set_ylim(max(0.0, low - margin), min(101.0, high + 1.6 * margin))
    else:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(*((high + margin, low - 1.6 * margin) if axis.lower else (low - margin, high + 1.6 * margin)))
    canvas.count_ticks(axes.xaxis)
    axes.grid(axis="both", which="major", color=tone(0.902), linewidth=0.7)
    quiet(axes)


def _reference_line(axes: Any, mark: Mark, axis: Axis) -> None:
    label = f"{mark.family}, {axis.shown(mark.mean)}"
    axes.axhline(mark.mean, color=pale(), linewidth=1.0, linestyle=(0, (4, 3)), zorder=1, label=label)
    if mark.spread:
        axes.axhspan(mark.mean - mark.spread, mark.mean + mark.spread, color=pale(), alpha=0.12, linewidth=0, zorder=0)


def _front(axes: Any, front: Sequence[Mark]) -> None:
    if not front:
        return
    points = [(mark.parameters, mark.mean) for mark in sorted(front, key=lambda mark: mark.parameters)]
    counts, means = zip(*points, (axes.get_xlim()[1], points[-1][1]), strict=True)
    axes.step(
        counts, means, where="post",
        color=ink(), linewidth=1.3, alpha=0.75, zorder=2, label="Pareto front",
    )  # fmt: skip


def _family(axes: Any, family: str, marks: Sequence[Mark], colour: str, shape: str, axis: Axis) -> None:
    if family.startswith("dense"):
        shape = "*"
        _reference_line(axes, marks[0], axis)
    size = 9.0 if shape in "*P" else 6.5
    drawn = {"linestyle": "none", "marker": shape, "color": colour}
    for mark in marks:
        # Marks on the front have a dark edge, to distinguish them from dominated ones.
        axes.errorbar(
            [mark.parameters], [mark.mean], yerr=[mark.spread] if mark.spread else None, ecolor=colour, elinewidth=1.0,
            markersize=size + 1.5 * mark.front, markeredgecolor=ink() if mark.front else ground(),
            markeredgewidth=0.9 if mark.front else 0.7, zorder=5 if mark.front else 4, clip_on=False, **drawn,
        )  # fmt: skip
    axes.plot([], [], markersize=size, markeredgecolor=ground(), markeredgewidth=0.7, label=family, **drawn)


def _labels(axes: Any, points: Sequence[Mark], up: float, colours: Mapping[str, str]) -> None:
    """Label the marks on the front at their upper left, where by definition of the front there are no other marks."""
    last = -math.inf
    low, high = sorted(axes.get_ylim())
    left, right = map(math.log, axes.get_xlim())
    for mark in sorted((mark for mark in points if mark.front and mark.label), key=lambda mark: mark.parameters):
        # If two are at almost the same height, the second label moves up, and a line leads to it from its mark.
        top = up * mark.mean + mark.spread
        height = max(top, last + 0.028 * (high - low))
        last = height
        share = (math.log(mark.parameters) - left) / (right - left)
        inside = _WIDTH * share > canvas.text_width(mark.label, 7.5)
        colour = colours[mark.family]
        if height > top:
            ends = (mark.parameters, mark.parameters), (up * mark.mean, up * height)
            axes.plot(*ends, color=colour, linewidth=0.7, linestyle=(0, (1, 2)), zorder=3)
        axes.annotate(
            mark.label, (mark.parameters, up * height), xytext=(-4 if inside else 4, 4), textcoords="offset points",
            fontsize=7.5, color=legible(colour, text=True), ha="right" if inside else "left", va="bottom", zorder=6,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": ground(), "edgecolor": "none", "alpha": 0.75},
        )  # fmt: skip


# -- Parameters against rank, one line per order: the paper's figure 2 -------------------------------------------------


# From dark to light as the order grows.
_COLOURS = ("#1B2A6B", "#1F6F9F", "#2A9D8F", "#8AB446", "#E9A23B", "#D1495B")

Shapes = Sequence[tuple[int, int]]


@checks_arguments
def parameters(
    shapes: Shapes,
    path: str | os.PathLike[str],
    budget: int | None = None,
    orders: Sequence[int] = (2, 3, 4, 5),
    ranks: int = 128,
    title: str = "",
) -> None:
    """Draw the number of parameters against the rank into a file, one line for each order of the fold.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
        Shapes of the weights, which form one group, folded to a hypercube, with a CP factorization.
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    budget : int, optional
        Drawn as a horizontal line, with the largest rank of each order within the budget; not drawn if it is at least
        the number of elements.
    orders : sequence of int
        The orders M.
    ranks : int
        The largest rank to draw.
    title : str

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    The query and value weights of ViT-base::

        parameters([(768, 768)] * 24, "parameters.png", budget=10_000)
    """
    checked_text(title=title)
    if budget is not None and budget < 1:
        raise ConfigError(f"budget must be at least 1; got {safe_repr(budget)}")
    if not len(orders):
        raise ConfigError("orders is empty; give at least one order, such as (2, 3)")
    drawn, axes = figure(8.6, 5.2)
    size = UpdatePlan(Config(order=1, groups=1, fold="hypercube", format="dense"), shapes).size
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    quiet(axes)
    axes.grid(axis="y", which="major", color=tone(0.902), linewidth=0.7)
    # Up to where at least one order has fewer parameters than there are elements.
    ranks = max(2, min(ranks, size // min(next(counted(shapes, order, 1))[1] for order in orders)))
    lora = _below(_line(Config(), shapes, ranks), size)
    lines = [("LoRA, one group per weight", tone(0.4), lora)]
    for order, colour in zip(orders, itertools.cycle(_COLOURS), strict=False):
        lines.append((f"M = {order}", legible(colour), _below(counted(shapes, order, ranks), size)))
    for place, (name, colour, line) in enumerate(lines):
        style: dict[str, Any] = {"linewidth": 2.0} if place else {"linewidth": 1.4, "linestyle": (0, (5, 2))}
        axes.plot(*zip(*line, strict=True), color=colour, zorder=3, label=name, **style)
    dotted = {"color": pale(), "linewidth": 1.0, "linestyle": (0, (1, 2)), "zorder": 2}
    axes.axhline(size, label=f"all {size:,} elements", **dotted)
    if budget is not None and budget < size:
        axes.axhline(budget, color=ink(), linewidth=1.0, zorder=2, label=f"budget, {budget:,}")
        for _, colour, line in lines:
            _fits(axes, [point for point in line if point[1] <= budget], ranks, colour)
    axes.set_xlim(1, ranks * 1.02)
    lowest = min([line[0][1] for _, _, line in lines] + ([budget] if budget and budget < size else []))
    axes.set_ylim(lowest / 1.8, 1.6 * max(size, *(line[-1][1] for _, _, line in lines)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.legend(loc="lower right", fontsize=8, facecolor=ground(), edgecolor="none", framealpha=1.0, labelcolor=ink())
    labelled(axes, title, 10, "rank r", "parameters")
    saved(drawn, path)


def counted(shapes: Shapes, order: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Yield (rank, parameters) of a single group of all weights, folded to an order.

    Examples
    --------
    >>> list(counted([(768, 768)] * 24, 2, 2))
    [(1, 7526), (2, 15052)]
    """
    return _line(Config(order=order, groups=1, fold="hypercube"), shapes, ranks)


def _line(config: Config, shapes: Shapes, ranks: int) -> Iterator[tuple[int, int]]:
    for rank in range(1, ranks + 1):
        yield rank, parameter_count(config.replace(rank=rank), shapes)


def _below(line: Iterator[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the points of a line with at most as many parameters as elements, but at least one point."""
    points = list(line)
    return [point for point in points if point[1] <= size] or points[:1]


def _fits(axes: Any, within: Sequence[tuple[int, int]], ranks: int, colour: str) -> None:
    """Mark the last point of a line within the budget."""
    if not within:
        return
    rank, count = within[-1]
    axes.plot(
        [rank], [count], marker="o", markersize=7, color=colour, markeredgecolor=ground(), zorder=5, clip_on=False
    )
    axes.annotate(
        f"r = {rank}" if rank < ranks else f"r ≥ {rank}", (rank, count), xytext=(4, -13), textcoords="offset points",
        ha="left", fontsize=8, color=colour, zorder=6,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": ground(), "edgecolor": "none", "alpha": 0.8},
    )  # fmt: skip

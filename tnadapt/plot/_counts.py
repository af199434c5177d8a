"""The plot of parameters against rank, one line per order: the paper's figure 2."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA, parameter_count
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, safe_repr

from .canvas import checked_text, figure, ground, ink, legible, pale, quiet, saved, tone

__all__ = ["counted", "parameters"]

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
    size = SuperLoRA(Config(order=1, groups=1, fold="hypercube", format="dense"), shapes).size
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    quiet(axes)
    axes.grid(axis="y", which="major", color=tone(0.902), linewidth=0.7)
    ranks = _useful(shapes, orders, ranks, size)
    lora = _below(_line(Config(), shapes, ranks), size)
    lines = [("LoRA, one group per weight", tone(0.4), lora)]
    for place, order in enumerate(orders):
        lines.append(
            (f"M = {order}", legible(_COLOURS[place % len(_COLOURS)]), _below(counted(shapes, order, ranks), size))
        )
    for place, (_, colour, line) in enumerate(lines):
        style: dict[str, Any] = {"linewidth": 2.0} if place else {"linewidth": 1.4, "linestyle": (0, (5, 2))}
        axes.plot(*zip(*line, strict=True), color=colour, zorder=3, **style)
    _level(axes, size, pale(), (0, (1, 2)))
    ends = [((ranks, size), f"all {size:,} elements", tone(0.4))]
    if budget is not None and budget < size:
        _level(axes, budget, ink(), "-")
        ends.append(((ranks, budget), f"budget, {budget:,}", ink()))
        for _, colour, line in lines:
            _fits(axes, [point for point in line if point[1] <= budget], ranks, colour)
    _name(axes, [*ends, *((line[-1], text, colour) for text, colour, line in lines)])
    axes.set_xlim(1, ranks * 1.02)
    lowest = min([line[0][1] for _, _, line in lines] + ([budget] if budget and budget < size else []))
    axes.set_ylim(lowest / 1.8, 1.6 * max(size, *(line[-1][1] for _, _, line in lines)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("rank r", fontsize=9, color=ink())
    axes.set_ylabel("parameters", fontsize=9, color=ink())
    axes.set_title(title, loc="left", fontsize=11, color=ink(), pad=10, parse_math=False)
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


def _useful(shapes: Shapes, orders: Sequence[int], ranks: int, size: int) -> int:
    """Return the rank up to which at least one order has fewer parameters than there are elements."""
    firsts = [next(counted(shapes, order, 1))[1] for order in orders]
    return max(2, min(ranks, size // min(firsts)))


def _below(line: Iterator[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the points of a line with at most as many parameters as elements, at least one."""
    points = list(line)
    return [point for point in points if point[1] <= size] or points[:1]


def _level(axes: Any, height: float, colour: str, style: Any) -> None:
    axes.axhline(height, color=colour, linewidth=1.0, linestyle=style, zorder=2)


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


def _name(axes: Any, ends: Sequence[tuple[tuple[int, int], str, str]]) -> None:
    """Write each line's name to the right of its end; if two would overlap, one moves up."""
    counts = [count for (_, count), _, _ in ends]
    apart = max(1.05, (max(counts) / min(counts)) ** 0.04)
    taken: list[tuple[int, float]] = []
    for (rank, count), text, colour in sorted(ends, key=lambda end: end[0][1]):
        height = float(count)
        for other, low in sorted(taken, key=lambda one: one[1]):
            if max(rank, other) < 1.5 * min(rank, other) and low / apart < height < low * apart:
                height = low * apart
        taken.append((rank, height))
        axes.annotate(
            text, (rank, height), xytext=(6, 0), textcoords="offset points", fontsize=8.5, color=colour, va="center",
            annotation_clip=False, zorder=6,
        )  # fmt: skip

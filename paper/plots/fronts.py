"""Plots of quality against parameters, one curve per arm: all its points and its front."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any

from tnadapt.plot.canvas import OTHERS, STYLES, figure, ink, pale, quiet, saved

__all__ = ["Curve", "Dot", "Panel", "fronts", "fronts_grid"]

# The paper's arms in the colours of their methods; arms of other recipes get the remaining colours.
_ARMS = {
    "LoRA": STYLES["LoRA"],
    "SuperLoRA 2D": STYLES["LoKr"],
    "SuperLoRA 2D, reshape": STYLES["SuperLoRA"],
    "LoRTA 3D": STYLES["LoRTA"],
    "LoNKr": STYLES["LoNKr"],
    "LoNKr, groups": STYLES["LoNKr"],
    "LoRTA, groups": STYLES["LoRTA"],
    "LoRTA 4D": ("#8C510A", "<"),
    "LoRTA 5D": ("#332288", ">"),
    "SuperLoRA 1D, dense, with projection": STYLES["fastfood"],
    "SuperLoRA 2D, reshape, with projection": STYLES["SuperLoRA + F"],
    "LoRTA, with projection": ("#882255", "h"),
    "SuperLoRA 2D, shuffled": ("#44AA99", "d"),
    "SuperLoRA 2D, reshape, shuffled": ("#999933", "p"),
}


@dataclasses.dataclass(frozen=True)
class Dot:
    """One setting.

    Attributes
    ----------
    parameters : int
    values : tuple of float
        One per seed.
    """

    parameters: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one.

        Examples
        --------
        >>> Dot(10, (1.0, 3.0)).mean, round(Dot(10, (1.0, 3.0)).spread, 3), Dot(10, (1.0,)).spread
        (2.0, 1.414, 0.0)
        """
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """An arm; drawn as a horizontal line if it is named ``dense`` or has no parameters."""

    name: str
    dots: tuple[Dot, ...]

    def front(self, higher: bool = True) -> list[Dot]:
        """Return its non-dominated dots, by parameters.

        Examples
        --------
        >>> curve = Curve("LoRA", (Dot(1, (0.5,)), Dot(2, (0.4,)), Dot(3, (0.6,))))
        >>> [dot.parameters for dot in curve.front()]
        [1, 3]
        """
        found: list[Dot] = []
        for dot in sorted(self.dots, key=lambda dot: (dot.parameters, -dot.mean if higher else dot.mean)):
            if not found or (dot.mean > found[-1].mean if higher else dot.mean < found[-1].mean):
                found.append(dot)
        return found


@dataclasses.dataclass(frozen=True)
class Panel:
    """One measure of all arms.

    Attributes
    ----------
    curves : tuple of Curve
    quality : str
        Name of the measure.
    higher : bool
        Whether higher is better.
    """

    curves: tuple[Curve, ...]
    quality: str
    higher: bool = True


def fronts(
    curves: Sequence[Curve],
    path: str | os.PathLike[str],
    title: str = "",
    note: str = "",
    quality: str = "test accuracy, %",
    higher: bool = True,
) -> None:
    """Draw all points of every arm with error bars (standard deviation over seeds), and each arm's front as steps.

    Parameters
    ----------
    curves : sequence of Curve
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    title, note : str
        Text above the plot, and small text below.
    quality : str
        Name of the measure.
    higher : bool
        Whether higher is better.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    Two arms::

        fronts([Curve("LoRA", (Dot(1024, (92.7,)),)), Curve("LoRTA 5D", (Dot(112, (88.0,)),))], "fronts.png")
    """
    drawn, axes = figure(9.4, 5.6)
    draw(axes, curves, quality, higher)
    finish(drawn, axes, path, title, note)


def fronts_grid(
    panels: Sequence[Panel], path: str | os.PathLike[str], title: str = "", note: str = "", columns: int = 3
) -> None:
    """Draw several measures of the same settings, one panel each, as in :func:`fronts`.

    Parameters
    ----------
    panels : sequence of Panel
        At least one.
    path, title, note
        As in :func:`fronts`.
    columns : int

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    Two measures, the first of which is better when lower::

        fid = Panel((Curve("LoRA", (Dot(1024, (12.0,)),)),), "FID", higher=False)
        recall = Panel((Curve("LoRA", (Dot(1024, (0.6,)),)),), "improved recall")
        fronts_grid([fid, recall], "metrics.png")
    """
    rows = -(-len(panels) // columns)
    drawn, first = figure(4.3 * columns + 2.6, 3.5 * rows)
    first.remove()
    grid = drawn.subplots(rows, columns, sharex=True, squeeze=False).reshape(-1)
    for axes, panel in zip(grid, panels, strict=False):
        words = f"{panel.quality} ({'higher' if panel.higher else 'lower'} is better)"
        draw(axes, panel.curves, words, panel.higher)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.remove()
    drawn.suptitle(title, x=0.01, ha="left", fontsize=11, color=ink(), parse_math=False)
    handles, labels = grid[0].get_legend_handles_labels()
    finish(drawn, None, path, "", note, (handles, labels))


def draw(axes: Any, curves: Sequence[Curve], quality: str, higher: bool) -> None:
    """Draw all arms into axes; references as horizontal lines."""
    lines = [curve for curve in curves if curve.name == "dense" or not any(dot.parameters for dot in curve.dots)]
    arms = [curve for curve in curves if curve not in lines and curve.dots]
    counts = [dot.parameters for curve in arms for dot in curve.dots] or [1]
    axes.set_xscale("log")
    axes.set_xlim(min(counts) / 1.4, max(counts) * 1.4)
    for curve in lines:
        for dot in curve.dots:
            _across(axes, curve.name, dot)
    others = [curve.name for curve in arms if curve.name not in _ARMS]
    for curve in arms:
        place = others.index(curve.name) if curve.name in others else 0
        colour, shape = _ARMS.get(curve.name, OTHERS[place % len(OTHERS)])
        _arm(axes, curve, colour, shape, higher)
    axes.set_xlabel("trainable parameters of the adapter", fontsize=9, color=ink())
    axes.set_ylabel(quality, fontsize=9, color=ink())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="both", which="major", color="#E6E6E6", linewidth=0.7)
    quiet(axes)


def finish(
    drawn: Any, axes: Any, path: str | os.PathLike[str], title: str, note: str, legend: tuple[Any, ...] = ()
) -> None:
    """Add title, note and a legend outside the axes, and write the file."""
    if axes is not None:
        axes.set_title(title, loc="left", fontsize=11, color=ink(), pad=10, parse_math=False)
    handles, labels = legend or axes.get_legend_handles_labels()
    if handles:
        drawn.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    if note:
        drawn.supxlabel(note, x=0.01, ha="left", fontsize=7, color=pale(), parse_math=False)
    saved(drawn, path)


def _across(axes: Any, name: str, dot: Dot) -> None:
    axes.axhline(dot.mean, color=pale(), linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"{name}, {_short(dot.mean)}", (0.005, dot.mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", fontsize=8, color="#666666",
    )  # fmt: skip


def _arm(axes: Any, curve: Curve, colour: str, shape: str, higher: bool) -> None:
    front = curve.front(higher)
    axes.step(
        [*(dot.parameters for dot in front), axes.get_xlim()[1]], [*(dot.mean for dot in front), front[-1].mean],
        where="post", color=colour, linewidth=1.3, alpha=0.8, zorder=2,
    )  # fmt: skip
    for dot in curve.dots:
        axes.errorbar(
            [dot.parameters], [dot.mean], yerr=[dot.spread] if dot.spread else None, ecolor=colour, elinewidth=1.0,
            linestyle="none", marker=shape, markersize=6.5, color=colour, markeredgewidth=0.9,
            markeredgecolor=ink() if dot in front else "white", zorder=4 if dot in front else 3,
        )  # fmt: skip
    axes.plot([], [], linestyle="-", marker=shape, markersize=6.5, color=colour, label=curve.name)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

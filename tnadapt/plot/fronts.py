"""Quality against parameters, a curve an arm: all its points, and its own front."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any

from .canvas import INK, OTHERS, PALE, STYLES, figure, quiet

__all__ = ["Curve", "Dot", "fronts"]

# The paper's arms in the colours of their methods; what another recipe names gets the others.
_ARMS = {
    "LoRA": STYLES["LoRA"],
    "SuperLoRA 2D": STYLES["LoKr"],
    "SuperLoRA 2D, reshape": STYLES["SuperLoRA"],
    "LoRTA 3D": STYLES["LoRTA"],
    "LoRTA 4D": ("#009E73", "<"),
    "LoRTA 5D": ("#332288", ">"),
    "SuperLoRA 1D, dense, with projection": STYLES["fastfood"],
    "SuperLoRA 2D, reshape, with projection": STYLES["SuperLoRA + F"],
}


@dataclasses.dataclass(frozen=True)
class Dot:
    """One setting.

    Attributes
    ----------
    parameters : int
    values : tuple of float
        One a seed.
    """

    parameters: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
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
    """An arm; one of a single point without parameters, or of the name ``dense``, is a line across."""

    name: str
    dots: tuple[Dot, ...]

    def front(self, higher: bool = True) -> list[Dot]:
        """Its dots that no other of it beats with as few parameters, by parameters.

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


def fronts(
    curves: Sequence[Curve],
    path: str | os.PathLike[str],
    title: str = "",
    note: str = "",
    quality: str = "test accuracy, %",
    higher: bool = True,
) -> None:
    """Draw all points of every arm, with a bar of one standard deviation over seeds, and each arm's front as steps.

    Parameters
    ----------
    curves : sequence of Curve
    path : path-like
        Its suffix says the format: ``.png``, ``.pdf``, ``.svg``.
    title, note : str
        Above, and small below.
    quality : str
        What the values are.
    higher : bool
        Whether more of it is better.

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
    axes.set_xlabel("trainable parameters of the adapter", fontsize=9, color=INK)
    axes.set_ylabel(quality, fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="both", which="major", color="#E6E6E6", linewidth=0.7)
    quiet(axes)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10, parse_math=False)
    if arms:
        drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    if note:
        drawn.supxlabel(note, x=0.01, ha="left", fontsize=7, color=PALE, parse_math=False)
    drawn.savefig(path)


def _across(axes: Any, name: str, dot: Dot) -> None:
    axes.axhline(dot.mean, color=PALE, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"{name}, {dot.mean:.1f}", (0.005, dot.mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
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
            markeredgecolor=INK if dot in front else "white", zorder=4 if dot in front else 3,
        )  # fmt: skip
    axes.plot([], [], linestyle="-", marker=shape, markersize=6.5, color=colour, label=curve.name)

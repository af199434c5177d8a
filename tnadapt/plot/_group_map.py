"""The plot of a plan's layout: groups as bars, weights as pieces of the bars."""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from tnadapt.algebra.group import Group
from tnadapt.algebra.layout import Piece
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ShapeError

from .canvas import between, checked_text, figure, ground, ink, labelled, quiet, rgb, saved, text_width, tone

# Colors of Okabe and Ito for q, v and others; neighbors of the same role alternate between lighter and darker.
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# Of more than _MOST bars, those before the _LAST few are replaced by a line of text.
_MOST, _LAST = 24, 3
# Inches: width of the plot, width of its bars, and height of a bar with the space below it.
_WIDTH, _INCHES, _BAR = 10.0, 7.6, 0.5
_HEIGHT = 0.62


class _Bar(NamedTuple):
    number: int
    group: Group
    y: float


@checks_arguments
def layout(
    plan: UpdatePlan,
    path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw into a file which slice of which group each weight is.

    Parameters
    ----------
    plan : UpdatePlan
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    names : sequence of str, optional
        A short name per weight; their indices by default.
    roles : sequence of str, optional
        One per weight: weights of the same role have the same color.
    title : str

    Raises
    ------
    ShapeError
        If there is not exactly one name, or role, per weight.
    ImportError
        If matplotlib is not installed.

    Notes
    -----
    A bar is a group, in the order of its vector. A name that is wider than its piece is left out. A piece that goes on
    in another group has an arrow at the edge where it is cut. The hatched part is the padding of the folded tensor
    beyond the group; where F computes the group from a shorter vector, the text next to the bar says so.

    Examples
    --------
    Three groups of five weights, of which two straddle them::

        plan = UpdatePlan(Config(groups=3, fold="hypercube"), [(6, 8), (6, 8), (4, 8), (8, 6), (8, 6)])
        layout(plan, "layout.png")
    """
    checked_text(title=title)
    weights = len(plan.shapes)
    names = [str(weight) for weight in range(weights)] if names is None else list(names)
    roles = [""] * weights if roles is None else list(roles)
    for what, entries in (("names", names), ("roles", roles)):
        if len(entries) != weights:
            raise ShapeError(f"{what} has {len(entries)} entries for {weights} weights; give one per weight")
    bars, hidden = _bars(plan)
    lines = len(bars) + bool(hidden)
    drawn, axes = figure(_WIDTH, 1.4 + _BAR * lines)
    longest = max(_length(bar.group) for bar in bars)
    axes.set_xlim(0, longest)
    axes.set_ylim(-lines + 0.35, 0.55)
    colours, sizes = _colours(roles), list(map(math.prod, plan.shapes))
    for bar in bars:
        for piece in bar.group.pieces:
            weight = piece.weight
            _draw_piece(axes, bar, piece, sizes[weight], names[weight], colours[weight], longest / _INCHES)
        if rest := _length(bar.group) - bar.group.size:
            axes.barh(bar.y, rest, left=bar.group.size, height=_HEIGHT, zorder=2, **_hatched())
        sizes_told = " × ".join(f"{size:,}" for size in bar.group.network.sizes)
        told = sizes_told if bar.group.projection.map.identity else f"{sizes_told}, F to {bar.group.size:,}"
        axes.annotate(
            told, (longest, bar.y), xytext=(8, 0), textcoords="offset points", fontsize=7.5,
            color=tone(1 / 3), va="center", annotation_clip=False,
        )  # fmt: skip
    if hidden:
        axes.annotate(f"⋮  {hidden:,} more groups", (0, -(_MOST - _LAST)), fontsize=8, color=tone(0.4), va="center")
    quiet(axes)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([bar.y for bar in bars], [f"group {bar.number}" for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=6)
    has_legend = _legend(axes, plan, bars, roles)
    labelled(axes, title, 26 if has_legend else 8, "position in the group's vector")
    saved(drawn, path)


def _bars(plan: UpdatePlan) -> tuple[list[_Bar], int]:
    """Return the bars that are drawn, and the number of omitted ones."""
    bars = [_Bar(index, group, -index) for index, group in enumerate(plan.groups)]
    hidden = len(bars) - _MOST
    if hidden <= 1:
        return bars, 0
    # One line of text stands for the hidden ones.
    last = [bar._replace(y=bar.y + hidden - 1) for bar in bars[-_LAST:]]
    return [*bars[: _MOST - _LAST], *last], hidden


def _length(group: Group) -> int:
    """Return the length of a bar, which is the group plus, without F, the padding of the folded tensor."""
    return math.prod(group.network.sizes) if group.projection.map.identity else group.size


# -- Colors --------------------------------------------------------------------------------------


def _colours(roles: Sequence[str]) -> list[str]:
    """Return the color of each weight: the hue of its role, alternately darker and lighter."""
    hues, seen = _hues(roles), dict.fromkeys(roles, 0)
    colours = []
    for role in roles:
        colours.append(between(hues[role], "white", 0.1 if seen[role] % 2 == 0 else 0.42))
        seen[role] += 1
    return colours


def _hues(roles: Sequence[str]) -> dict[str, str]:
    return {role: _HUES[place % len(_HUES)] for place, role in enumerate(dict.fromkeys(roles))}


# -- Bars ----------------------------------------------------------------------------------------


def _draw_piece(axes: Any, bar: _Bar, piece: Piece, size: int, name: str, colour: str, inch: float) -> None:
    """Draw a piece of a weight of some size, with arrows where it is cut; ``inch`` is in elements."""
    axes.barh(
        bar.y, piece.length, left=piece.group_start, height=_HEIGHT, color=colour, edgecolor=ground(),
        linewidth=0.8 if piece.length > 0.1 * inch else 0.0, zorder=2,
    )  # fmt: skip
    if piece.length >= inch * (text_width(name, 7.5) + 0.08):
        axes.annotate(
            name, (piece.group_start + piece.length / 2, bar.y), ha="center", va="center", fontsize=7.5, zorder=4,
            parse_math=False, color="white" if colorsys.rgb_to_yiq(*rgb(colour))[0] < 0.58 else "#222222",
        )  # fmt: skip
    inward = min(0.07 * inch, piece.length / 2)
    style = {"markersize": 5.5, "color": ink(), "markeredgecolor": ground(), "markeredgewidth": 0.7, "zorder": 5}
    if piece.weight_start > 0:
        axes.plot([piece.group_start + inward], [bar.y - 0.19], marker="<", clip_on=False, **style)
    if piece.weight_start + piece.length < size:
        end = piece.group_start + piece.length
        axes.plot([end - inward], [bar.y - 0.19], marker=">", clip_on=False, **style)


def _hatched() -> dict[str, Any]:
    return {"facecolor": tone(0.937), "edgecolor": tone(0.604), "hatch": "//////", "linewidth": 0.0}


def _legend(axes: Any, plan: UpdatePlan, bars: Sequence[_Bar], roles: Sequence[str]) -> bool:
    """Draw a legend of the colors and signs that occur, and return whether there are any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    signs: list[Any] = []
    if any(roles):
        hues = _hues(roles).items()
        signs += [Patch(facecolor=between(hue, "white", 0.1), label=role or "others") for role, hue in hues]
    if any(len(plan.layout.of_weight(piece.weight)) > 1 for bar in bars for piece in bar.group.pieces):
        style: dict[str, Any] = {"linestyle": "none", "marker": ">", "markersize": 5.5, "color": ink()}
        signs.append(Line2D([], [], label="continues in another group", **style))
    if any(_length(bar.group) > bar.group.size for bar in bars):
        signs.append(Patch(label="padding", **_hatched()))
    if signs:
        axes.legend(
            handles=signs, loc="lower left", bbox_to_anchor=(-0.006, 1.0), ncols=len(signs), fontsize=8, frameon=False,
            borderaxespad=0.2, handlelength=1.2, handleheight=1.0, columnspacing=1.6,
        )  # fmt: skip
    return bool(signs)

"""The plot of one group as a tensor diagram: trained arrays, summed indices, and the steps from tensor to weights."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Hashable, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import checks_arguments

from ._diagram import Diagram, Label, Node, SplitDrawing, diagram
from .canvas import OTHERS, STYLES, between, checked_text, figure, ground, ink, pale, saved, tone

# Each kind also has a different shape, for print in grey.
_COLOURS = {
    "factor": STYLES["LoKr"][0],
    "core": STYLES["LoRTA"][0],
    "train": STYLES["LoNKr"][0],
    "dense": STYLES["SuperLoRA + F"][0],
    "weights": STYLES["SuperLoRA"][0],
    "array": OTHERS[5][0],
}
_MARGIN = 0.3


@checks_arguments
def network(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    path: str | os.PathLike[str],
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
    group: Any = 0,
    title: str = "",
    note: str = "",
) -> None:
    """Draw the tensor network of one group, and the steps from its tensor to the weights, into a file.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
        Shapes of the weights.
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    layers : sequence of hashable, optional
        One key per weight, for ``groups="layer"``.
    roles : sequence of hashable, optional
        One key per weight, for ``groups="role"``.
    group : int
        Index of the group, ``0 <= group < G``.
    title, note : str
        Text above the plot, and small text below.

    Raises
    ------
    ConfigError
        If the config does not suit these weights.
    ShapeError
        If there is no such group, or a shape or fold does not fit.
    ImportError
        If matplotlib is not installed.

    Notes
    -----
    A node is an array, named as in ``param_shapes`` (:math:`A_0` is ``factor0``). A line between two nodes is an index
    that is summed over, with its size; an open line is a mode. A dot gives all its lines the same index, as in a CP
    factorization of rank r. A dashed outline marks an array of which nothing is trained. Only one of several terms is
    drawn. Of more than ten modes or five splits, only the first few and the last are drawn.

    Examples
    --------
    LoRA of the query and value weights of ViT-base::

        network(tna.presets.lora(rank=4), [(768, 768)] * 24, "lora.svg", title="LoRA")
    """
    checked_text(title=title, note=note)
    drawing = diagram(SuperLoRA(config, shapes, layers, roles), group)
    inner = drawing.width - 2 * _MARGIN
    head, foot = textwrap.wrap(title, int(inner / 0.092)), textwrap.wrap(note, int(inner / 0.059))
    above = 0.15 + 0.2 * len(head)
    below = 0.62 + 0.13 * len(foot)
    drawn, axes = figure(drawing.width, above + drawing.height + below)
    # One unit is an inch.
    drawn.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(-drawing.height - below, above)
    style: dict[str, Any] = {"va": "top", "parse_math": False}
    axes.text(_MARGIN, above - 0.12, "\n".join(head), fontsize=11, color=ink(), **style)
    _key(axes, drawing)
    _frames(axes, drawing)
    for part in drawing.parts:
        _part(axes, part)
    for sign in drawing.signs:
        _label(axes, sign)
    _steps(axes, drawing)
    axes.text(drawing.width / 2, -drawing.height - 0.2, drawing.words, ha="center", fontsize=8.5, color=ink(), **style)
    axes.text(_MARGIN, -drawing.height - 0.5, "\n".join(foot), fontsize=7, color=pale(), **style)
    saved(drawn, path)


def _part(axes: Any, part: SplitDrawing) -> None:
    for bond in part.bonds:
        for (x, y), (to_x, to_y) in itertools.pairwise(bond.line):
            _line(axes, (part.x + x, part.y + y), (part.x + to_x, part.y + to_y))
    for leg in part.legs:
        _line(axes, (part.x + leg.x, part.y + leg.top), (part.x + leg.x, part.y + leg.bottom))
    for node in part.nodes:
        _node(axes, node, part.x, part.y)
    for label in part.labels:
        _label(axes, label, part.x, part.y)


def _line(axes: Any, start: tuple[float, float], stop: tuple[float, float]) -> None:
    """Draw a line: straight along an axis, else a curve that ends from above."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points, codes = [start, stop], [Path.MOVETO, Path.LINETO]
    if start[0] != stop[0] and start[1] != stop[1]:
        over, drop = stop[0] - start[0], start[1] - stop[1]
        points = [start, (start[0] + 0.62 * over, start[1] - 0.04 * drop), (stop[0], stop[1] + 0.72 * drop), stop]
        codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    axes.add_patch(PathPatch(Path(points, codes), facecolor="none", edgecolor=ink(), linewidth=1.2, zorder=2))


def _shape(kind: str, x: float, y: float, width: float, height: float, frozen: bool = False) -> Any:
    from matplotlib.patches import Circle, FancyBboxPatch, Polygon

    style: dict[str, Any] = {"edgecolor": ink(), "linewidth": 1.0, "zorder": 3}
    if kind == "dot":
        return Circle((x, y), width / 2, facecolor=ink(), **style)
    if kind == "frozen":
        kind, frozen = "array", True
        style["facecolor"] = ground()
    else:
        style["facecolor"] = between(_COLOURS[kind], ground(), 0.85 if frozen else 0.35)  # texts are legible on it
    if frozen:
        style["linestyle"] = (0, (3, 2))
    if kind == "factor":
        return Circle((x, y), width / 2, **style)
    if kind == "weights":
        half = 0.56 * width
        return Polygon([(x - half, y), (x, y + half), (x + half, y), (x, y - half)], **style)
    # Cores and arrays of general networks have round corners, dense arrays have none.
    corner = {"train": 0.3, "core": 0.5, "dense": 0.0, "array": 0.3}[kind] * height / 2
    shape = f"round,pad=0,rounding_size={corner}" if corner else "square,pad=0"
    return FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=shape, **style)


def _node(axes: Any, node: Node, x: float, y: float) -> None:
    axes.add_patch(_shape(node.kind, x + node.x, y + node.y, node.width, node.height, node.frozen))
    if node.symbol:
        axes.text(x + node.x, y + node.y, node.symbol, ha="center", va="center", fontsize=9.5, color=ink(), zorder=4)


def _label(axes: Any, label: Label, x: float = 0.0, y: float = 0.0) -> None:
    axes.text(
        x + label.x, y + label.y, label.text, ha=label.align, va="center_baseline", fontsize=label.points, zorder=5,
        color=tone(1 / 3) if label.role == "word" else ink(), parse_math=False,
    )  # fmt: skip


def _key(axes: Any, drawing: Diagram) -> None:
    for entry in drawing.key:
        size = 0.05 if entry.kind == "dot" else 0.14
        axes.add_patch(_shape(entry.kind, entry.x + 0.08, entry.y, size if entry.kind == "dot" else 0.15, size))
        axes.text(entry.x + 0.24, entry.y, entry.text, va="center_baseline", fontsize=7.5, color=tone(1 / 3))


def _frames(axes: Any, drawing: Diagram) -> None:
    """Draw the frames behind several splits, and the brackets of a sum."""
    from matplotlib.patches import FancyBboxPatch

    for left, bottom, right, top in drawing.frames:
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), right - left, top - bottom, facecolor=tone(0.949), edgecolor="none", zorder=1,
                boxstyle="round,pad=0,rounding_size=0.1",
            )
        )  # fmt: skip
    if drawing.brackets:
        left, bottom, right, top = drawing.brackets
        for x, inward in ((left, 0.09), (right, -0.09)):
            corners = [x + inward, x, x, x + inward], [top, top, bottom, bottom]
            axes.plot(*corners, color=ink(), linewidth=1.2, solid_joinstyle="miter")


def _steps(axes: Any, drawing: Diagram) -> None:
    from matplotlib.patches import FancyBboxPatch

    middle = drawing.width / 2
    left, right, above = drawing.brace
    axes.plot([left, left, right, right], [above + 0.06, above, above, above + 0.06], color=pale(), linewidth=0.9)
    for step in drawing.steps:
        top = step.y + step.height / 2
        arrow = {"arrowstyle": "-|>,head_length=0.35,head_width=0.18", "color": ink(), "linewidth": 0.9}
        axes.annotate("", (middle, top), (middle, above), arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        axes.text(
            middle + 0.14, (above + top) / 2, step.note, va="center_baseline", fontsize=7.5, color=tone(1 / 3),
            parse_math=False,
        )  # fmt: skip
        axes.add_patch(
            FancyBboxPatch(
                (middle - step.width / 2, step.y - step.height / 2), step.width, step.height, facecolor=ground(),
                boxstyle="round,pad=0,rounding_size=0.06", edgecolor=ink() if step.fixed else pale(),
                linewidth=1.2 if step.fixed else 0.9, linestyle=(0, (4, 2.5)) if step.fixed else "-", zorder=2,
            )
        )  # fmt: skip
        axes.text(
            middle, step.y, "\n".join(step.lines), ha="center", va="center", fontsize=8.5, color=ink(), zorder=3,
            linespacing=1.35, parse_math=False,
        )  # fmt: skip
        above = step.y - step.height / 2

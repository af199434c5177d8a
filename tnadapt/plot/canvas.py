"""Parts shared by all plots: colours, a figure that is drawn into a file, and unobtrusive axes."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable
from typing import Any

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.container import file_error_context

__all__ = ["INK", "OTHERS", "PALE", "STYLES", "count_ticks", "figure", "quiet", "saved", "styles"]

# The colour-blind safe palette of Okabe and Ito, with different shapes for print in grey.
STYLES: dict[str, tuple[str, str]] = {
    "LoRA": ("#0072B2", "s"),
    "LoKr": ("#56B4E9", "D"),
    "LoNKr": ("#009E73", "P"),
    "LoRTA": ("#E69F00", "^"),
    "SuperLoRA": ("#D55E00", "o"),
    "SuperLoRA + F": ("#CC79A7", "v"),
    "fastfood": ("#7F7F7F", "X"),
}
OTHERS = (("#332288", "h"), ("#117733", "<"), ("#882255", ">"), ("#AA4499", "p"), ("#999933", "*"), ("#44AA99", "d"))
INK = "#222222"
PALE = "#8A8A8A"


def styles(families: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a color and a marker for each family: those of ``STYLES``, and others in turn for the rest.

    Parameters
    ----------
    families : iterable of str
        In the order of the legend. Names may repeat.

    Returns
    -------
    dict of str to tuple of (str, str)
        No two families share a color and a marker, unless there are more than 36 outside ``STYLES``.

    Examples
    --------
    >>> styles(["LoRA", "TinyLoRA"])
    {'LoRA': ('#0072B2', 's'), 'TinyLoRA': ('#332288', 'h')}
    """
    colors, markers = zip(*OTHERS, strict=True)
    # After one round, the same colors again, each with the next marker.
    others = itertools.cycle(
        (color, markers[(place + turn) % len(markers)])
        for turn in range(len(markers)) for place, color in enumerate(colors)
    )  # fmt: skip
    return {family: STYLES.get(family) or next(others) for family in dict.fromkeys(families)}


def figure(width: float, height: float) -> tuple[Any, Any]:
    """Create a figure of this size in inches that draws into files; return it and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made, made.add_subplot(facecolor="white")


def quiet(axes: Any) -> None:
    """Reduce axes to two sides and small ticks."""
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    axes.tick_params(which="minor", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)


def count_ticks(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as whole numbers.

    Within a decade there are few powers of ten, so that matplotlib labels some ticks between them, as 3 × 10².
    """
    from matplotlib.ticker import LogFormatterSciNotation

    class _Counts(LogFormatterSciNotation):  # it decides which ticks have a label
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.0f}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_minor_formatter(_Counts(labelOnlyBase=False))
    axis.set_tick_params(which="minor", labelsize=8, labelcolor=INK)


def saved(drawn: Any, path: str | os.PathLike[str]) -> None:
    """Draw a figure into a file, which is replaced atomically.

    Parameters
    ----------
    drawn : matplotlib.figure.Figure
    path : path-like
        Its suffix determines the format; without one, ``.png`` is appended.

    Raises
    ------
    FileError
        If the file cannot be written.
    ValueError
        If matplotlib does not support the format.
    """
    place = os.fspath(path)
    kind = os.path.splitext(place)[1][1:]
    if not kind:  # as matplotlib does
        kind, place = "png", place.rstrip(".") + ".png"
    content = io.BytesIO()
    drawn.savefig(content, format=kind)
    with file_error_context(place):
        replace_file(place, content.getvalue())

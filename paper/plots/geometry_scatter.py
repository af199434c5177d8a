"""The scatter plot of singular spaces and distances of updates to the dense one: the paper's figure 14."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tnadapt.plot.canvas import OTHERS, STYLES, ink, pale, quiet, saved

__all__ = ["similarity"]

_AXES = {"d_left": "left similarity d_L", "d_right": "right similarity d_R", "d_euclid": "distance d_E"}
_PAIRS = (("d_left", "d_right"), ("d_euclid", "d_right"), ("d_euclid", "d_left"))
_ROWS = {"query": ("q",), "value": ("v",), "query and value": ("q", "v")}


def similarity(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "", note: str = ""
) -> None:
    """Draw three pairs of measures, for query, value and both, one dot per weight, into a file.

    Parameters
    ----------
    rows : sequence of mapping
        With ``arm``, ``role`` (``q`` or ``v``), ``d_left``, ``d_right``, ``d_euclid``.
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    title, note : str
        Text above the plot, and small text below.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    One weight of one method::

        row = {"arm": "LoRA", "role": "q", "d_left": 0.4, "d_right": 0.5, "d_euclid": 0.9}
        similarity([row], "geometry.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12.4, 9.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(drawn)
    grid = drawn.subplots(len(_ROWS), len(_PAIRS), sharex="col", sharey="col")
    styles = [STYLES[name] for name in ("LoRA", "LoKr", "SuperLoRA", "SuperLoRA + F")] + list(OTHERS)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for (name, roles), line in zip(_ROWS.items(), grid, strict=True):
        for axes, (across, up) in zip(line, _PAIRS, strict=True):
            for arm, (colour, shape) in zip(arms, styles, strict=False):
                own = [row for row in rows if row["arm"] == arm and row["role"] in roles]
                axes.plot(
                    [row[across] for row in own], [row[up] for row in own], linestyle="none", marker=shape,
                    markersize=4.5, color=colour, alpha=0.75, markeredgecolor="white", markeredgewidth=0.4, label=arm,
                )  # fmt: skip
            axes.set_xlabel(_AXES[across], fontsize=8, color=ink())
            axes.set_ylabel(f"{_AXES[up]} ({name})" if axes is line[0] else _AXES[up], fontsize=8, color=ink())
            axes.grid(color="#E6E6E6", linewidth=0.7)
            quiet(axes)
    handles, labels = grid[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    drawn.suptitle(title, x=0.01, ha="left", fontsize=11, color=ink(), parse_math=False)
    if note:
        drawn.supxlabel(note, x=0.01, ha="left", fontsize=7, color=pale(), parse_math=False)
    saved(drawn, path)

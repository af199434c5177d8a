"""The pictures of the page on speed, at most one per part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

Rows = Sequence[Mapping[str, Any]]

OURS, PEER, LIMIT = "#1f6f8b", "#c8743a", "#555555"


def draw(part: str, rows: Rows, folder: Path) -> list[str]:
    """Draw the pictures of a part and return their names; none if it has no picture or too few rows."""
    make = _PICTURES.get(part)
    if make is None or not rows:
        return []
    import matplotlib

    matplotlib.use("Agg")
    name = f"speed_{part}.png"
    return [name] if make(rows, folder / name) else []


def _steps(rows: Rows, path: Path) -> bool:
    """Draw bars: the step time of each method relative to PEFT's LoRA."""
    import matplotlib.pyplot as plt

    problems = [problem for problem in dict.fromkeys(row["problem"] for row in rows) if problem != "alone"]
    figure, several = plt.subplots(1, len(problems), figsize=(11, 7), layout="constrained", squeeze=False)
    for axes, problem in zip(several[0], problems, strict=True):
        own = sorted(
            (row for row in rows if row["problem"] == problem and row.get("low") is not None),
            key=lambda row: row["ratio"],
        )
        peers = [
            row["case"].startswith(("peft", "lycoris")) or row["case"] in ("head only", "full q and v") for row in own
        ]
        axes.barh(
            [row["case"] for row in own],
            [row["ratio"] for row in own],
            xerr=[[row["ratio"] - row["low"] for row in own], [row["high"] - row["ratio"] for row in own]],
            color=[PEER if peer else OURS for peer in peers],
            error_kw={"elinewidth": 0.8, "ecolor": LIMIT},
        )
        axes.axvline(1.0, color=LIMIT, linewidth=1)
        axes.set(xlim=(0.4, None), xlabel="step over PEFT's LoRA, r = 4", title=problem)
    several[0][0].legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=OURS), plt.Rectangle((0, 0), 1, 1, color=PEER)],
        labels=["tnadapt", "others"],
        loc="lower right",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _fwht(rows: Rows, path: Path) -> bool:
    """Draw lines: nanoseconds per number against the length, for a new array."""
    import matplotlib.pyplot as plt

    new = {kind: [row for row in rows if row["case"] == f"a new array, {kind}"] for kind in ("NumPy", "NumPy, plain")}
    lines = {
        "tnadapt": (new["NumPy"], "ours", OURS, "-"),
        "tnadapt without numba": (new["NumPy, plain"], "ours", OURS, ":"),
        "FFHT (C, in place, one thread)": (new["NumPy"], "FFHT", PEER, "-"),
        "hadamard-transform (torch)": (new["NumPy"], "hadamard-transform", PEER, ":"),
        "copy to a new array, two threads": (new["NumPy"], "copy", LIMIT, "--"),
    }
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, (own, column, colour, style) in lines.items():
        own = [row for row in own if row.get(column) is not None]
        axes.plot(
            [row["size"] for row in own],
            [1e9 * row[column] / row["size"] for row in own],
            style,
            color=colour,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set(yscale="log", xlabel="length", ylabel="ns per number (median)", title="Hadamard transform, float32")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _growth(rows: Rows, path: Path) -> bool:
    import growth

    growth.draw(list(rows), path)
    return True


_PICTURES: dict[str, Callable[[Rows, Path], bool]] = {"fwht": _fwht, "steps": _steps, "growth": _growth}

"""The section on the geometric analysis: how near each method's updates are to the dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.report import TextTable

from .compared_studies import ComparedStudy
from .paired_statistics import interval
from .phrases import folded, several
from .similarity import summary

__all__ = ["TITLE", "distances", "geometry_section", "verdicts"]


TITLE = "The distance to the dense update shrinks, most of all with reshaping"
RESHAPED, STACKED = "SuperLoRA 2D, reshape", "SuperLoRA 2D"


def geometry_section(found: dict[str, ComparedStudy]) -> list[str]:
    """Return the section as Markdown; empty without a geometric study."""
    if "geometry" not in found:
        return []
    study = found["geometry"]
    inside = [
        "Each at its own best rate:\n\n", _spaces(_own_rate(study)),
        "\nAll at the dense update's best rate, since the paper has one rate for all; also drawn below:\n\n",
        _spaces(_one_rate(study)), f"\n![Singular spaces and distance, weight by weight]({study.name}/figure.png)\n",
    ]  # fmt: skip
    return [
        f"\n## {TITLE}\n\n",
        f"In the paper: A.4, figure 14. {study.about}. Means over weights, and the difference from LoRA's d_E seed by "
        "seed (below 0: nearer to the dense update). With a d_E above 1, no update at all would be nearer. The length "
        f"of an update depends on its rate, so both choices of the rate are shown. {distances(found)}.\n\n",
        folded("Both tables and the figure", "".join(inside)),
    ]


def _own_rate(study: ComparedStudy) -> list[dict[str, Any]]:
    return [row for row in study.spaces if not row["one_rate"]]


def _one_rate(study: ComparedStudy) -> list[dict[str, Any]]:
    return [row for row in study.spaces if row["one_rate"]]


def distances(found: dict[str, ComparedStudy]) -> str:
    """Describe whether the distance shrinks, with each method at its own rate and with all at the same rate."""
    return "; ".join(f"{told}, {rates}" for rates, told in _by_rates(found).items())


def verdicts(found: dict[str, ComparedStudy]) -> dict[str, str]:
    """Return the verdict for each choice of the rate, in one word."""
    return {rates: told.partition(" ")[0] for rates, told in _by_rates(found).items()}


def _by_rates(found: dict[str, ComparedStudy]) -> dict[str, str]:
    rows = {"each at its own rate": _own_rate(found["geometry"]), "all at one rate": _one_rate(found["geometry"])}
    return {rates: _nearer(some) for rates, some in rows.items()}


def _nearer(rows: Sequence[dict[str, Any]]) -> str:
    apart = [interval(_apart(rows, arm)) for arm in _arms(rows) if arm != "LoRA"]
    nearer, farther = sum(high < 0 for _, _, high in apart), sum(low > 0 for _, low, _ in apart)
    word = "mixed" if nearer and farther else "confirmed" if nearer else "reversed" if farther else "inconclusive"
    told = f"{word} (nearer than LoRA in {nearer} of {several(len(apart), 'method')}, farther in {farther}"
    if {RESHAPED, STACKED} <= set(_arms(rows)):
        mean, low, high = interval(_apart(rows, RESHAPED, STACKED))
        told += f"; reshaped minus stacked {mean:+.2f}, from {low:+.2f} to {high:+.2f}"
    return f"{told})"


def _arms(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _space(rows: Sequence[dict[str, Any]], arm: str, seed: int | None = None) -> dict[str, Any]:
    (means,) = summary([row for row in rows if row["arm"] == arm and seed in (None, row["seed"])])
    return means


def _apart(rows: Sequence[dict[str, Any]], arm: str, other: str = "LoRA") -> list[float]:
    """Return how much farther a method's update is from the dense one than another method's, seed by seed."""
    seeds = sorted({row["seed"] for row in rows})
    return [_space(rows, arm, seed)["d_euclid"] - _space(rows, other, seed)["d_euclid"] for seed in seeds]


def _spaces(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per arm: the mean similarities, the distance, and its difference from LoRA's."""
    heads = ["method", "parameters", "rate", "d_L", "d_R", "d_E", "d_E minus LoRA's"]
    lines = []
    for arm in _arms(rows):
        mean, low, high = interval(_apart(rows, arm))
        rate = next(row["rate"] for row in rows if row["arm"] == arm)
        means = _space(rows, arm)
        spaces = [f"{means[name]:.3f}" for name in ("d_left", "d_right", "d_euclid")]
        told = "" if arm == "LoRA" else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append([arm, f"{means['parameters']:,}", f"{rate:g}", *spaces, told])
    return TextTable(lines, heads).markdown() + "\n"

"""Tables and figures of a recipe, computed from its results alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Recipe

if TYPE_CHECKING:
    from .diffusion.generation import Generated

__all__ = ["FigureData", "draw", "read"]

Rows = list[dict[str, Any]]

#: Number of images shown per setting: two of each class.
SHOWN = 20
#: The arm of real images of the target, measured in the same way as generated ones.
REAL = "real images"


@dataclasses.dataclass(frozen=True)
class FigureData:
    """The data of a table and its figure.

    Attributes
    ----------
    rows : list of dict
        The rows of the table.
    drawn : list of dict
        The data of the figure, where they differ from the rows.
    note : str
        The small print below the figure: data, seeds, rates.
    """

    rows: Rows
    drawn: Rows
    note: str


def read(recipe: Recipe, folder: Path, points: Sequence[Any] | None = None) -> FigureData:
    """Read the results in a folder.

    Parameters
    ----------
    recipe : Recipe
    folder : Path
        The folder in which :func:`~paper.run` left its results.
    points : sequence, optional
        Only these points of a study; by default all finished ones.

    Returns
    -------
    FigureData

    Raises
    ------
    OSError, ValueError, KeyError, IndexError
        If there are no results, or they are damaged or incomplete.
    """
    if recipe.kind == "counts":
        text = (folder / "counts.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        return FigureData(rows, rows, "")
    from tnadapt.finetune.pareto_report import points_in, trained_on
    from tnadapt.finetune.results import read_lines

    lines = read_lines(folder / "results.jsonl")
    study = lines[0]["study"]
    rates = len({line["rate"] for line in lines if line.get("config")})
    if recipe.kind == "diffusion":
        return _generated(recipe, folder, study, rates, points)
    points = _in_order(recipe, points or points_in(folder / "results.jsonl"), lambda point: point.method.family)
    at = "all at the dense update's rate, the best of" if recipe.kind == "geometry" else "each at the best of"
    trained = trained_on(list(study["samples"].values()), len(points[0].test), rates, at)
    note = f"{study['problem']}; {trained}"
    if recipe.kind == "geometry":
        from .similarity import VECTORS, summary

        drawn = [row for row in read_lines(folder / "geometry.jsonl") if row["one_rate"]]
        return FigureData(
            summary(drawn), drawn, f"{note}; the first {VECTORS} singular vectors; one dot per weight and seed"
        )
    rows = [
        {
            "arm": point.method.family,
            "setting": point.method.label,
            "parameters": point.parameters,
            "rate": point.rate,
            "test": [round(100 * value, 2) for value in point.test],
        }
        for point in points
    ]
    return FigureData(rows, rows, note)


def _generated(
    recipe: Recipe, folder: Path, study: dict[str, Any], rates: int, points: Sequence[Any] | None
) -> FigureData:
    from .diffusion.generation import generated_in
    from .diffusion.metrics import METRICS

    points = _in_order(recipe, points or generated_in(folder / "results.jsonl"), lambda point: point.arm)
    rows = [
        {
            "arm": point.arm,
            "setting": point.setting,
            "parameters": point.parameters,
            "rate": point.rate,
            "loss": [record["validation_loss"] for record in point.records if not record["diverged"]],
            **{metric: [value for value in point.values(metric) if value is not None] for metric in METRICS},
        }
        for point in points
    ]
    floors = [record["real"] for record in points[0].records if "real" in record]
    if floors:
        values = {metric: [one["metrics"][metric] for one in floors] for metric in METRICS}
        there = {metric: [value for value in some if value is not None] for metric, some in values.items()}
        rows.insert(0, {"arm": REAL, "setting": "", "parameters": 0, "rate": 0.0, "loss": [], **there})
    looks = f"a classifier of {study['target']}" if study["features"] == "classifier" else "Inception"
    note = (
        f"{study['source']} to {study['target']}; {study['generated']:,} images of each, measured by {looks}; "
        f"{_several(len(points[0].records), 'seed')}; each at the best of {rates} rates by held-out loss"
    )
    real = [{"words": REAL, "path": folder / "images" / one.get("images", "")} for one in floors[:1]]
    # From high to extremely low counts, as in figures 8 to 10.
    by_size = sorted(points, key=lambda point: -point.parameters)
    return FigureData(rows, real + [_first_images(point, folder) for point in by_size], note)


def _first_images(point: Generated, folder: Path) -> dict[str, Any]:
    """Return the caption of a setting, and the file of the first images of its first seed."""
    named = f"{point.setting}, " if point.setting else ""
    words = f"{point.arm}\n{named}{point.parameters:,} parameters" if point.parameters else point.arm
    return {"words": words, "path": folder / "images" / point.records[0].get("images", "")}


def _in_order(recipe: Recipe, points: Sequence[Any], arm: Any) -> list[Any]:
    """Sort points by the recipe's arms; points of none, such as the head alone, come first."""
    places = {one.name: place for place, one in enumerate(recipe.arms)}
    return sorted(points, key=lambda point: (places.get(arm(point), -1), point.parameters))


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


# -- Figures -----------------------------------------------------------------------------------


def draw(recipe: Recipe, found: FigureData, out: Path) -> Path:
    """Draw ``figure.png`` into ``out``, and ``generated.png`` if there are images.

    Returns
    -------
    Path
        The path of the figure.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    FileError
        If it cannot be written.
    """
    from tnadapt.plot import parameters

    from .plots import similarity

    path = out / "figure.png"
    if recipe.kind == "counts":
        ranks = max(int(row["rank"]) for row in found.rows)
        parameters(recipe.weights.shapes, path, ranks=ranks, title=f"{recipe.title}: {recipe.weights.what}")
    elif recipe.kind == "geometry":
        similarity(found.drawn, path, title=recipe.title, note=found.note)
    elif recipe.kind == "diffusion":
        _qualities(recipe, found, path)
        _images(recipe, found, out / "generated.png")
    else:
        _fronts(recipe, found, path)
    return path


def _fronts(recipe: Recipe, found: FigureData, path: Path) -> None:
    from .plots import Curve, Dot, fronts

    curves = [
        Curve(arm, tuple(Dot(row["parameters"], tuple(row["test"])) for row in found.rows if row["arm"] == arm))
        for arm in dict.fromkeys(row["arm"] for row in found.rows)
    ]
    fronts(curves, path, title=recipe.title, note=found.note)


def _qualities(recipe: Recipe, found: FigureData, path: Path) -> None:
    from .diffusion.metrics import LOWER, METRICS
    from .plots import Curve, Dot, Panel, fronts_grid

    arms = dict.fromkeys(row["arm"] for row in found.rows)
    panels = []
    for metric, words in {**METRICS, "loss": "loss on held-out images"}.items():
        own = [row for row in found.rows if row[metric]]
        dots = {arm: [Dot(row["parameters"], tuple(row[metric])) for row in own if row["arm"] == arm] for arm in arms}
        curves = tuple(Curve(arm, tuple(some)) for arm, some in dots.items() if some)
        if curves:
            panels.append(Panel(curves, words, metric not in (*LOWER, "loss")))
    if panels:
        fronts_grid(panels, path, title=recipe.title, note=found.note)


def _images(recipe: Recipe, found: FigureData, path: Path) -> None:
    import numpy as np

    from .plots import generated

    rows = [
        # Memory-mapped, so that a damaged file that claims a huge size takes no memory.
        (row["words"], np.array(np.load(row["path"], mmap_mode="r", allow_pickle=False)[:SHOWN]))
        for row in found.drawn
        if row["path"].is_file()
    ]
    if rows:
        generated(rows, path, title=recipe.title, note=found.note)

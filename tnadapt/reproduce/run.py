"""A recipe, run: what its kind asks for, into one folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, TnadaptError
from .recipe import Recipe

if TYPE_CHECKING:
    from ..finetune import Point as Trained
    from ..finetune import Reporter
    from .diffusion.generation import Generated, Generation

__all__ = ["Outcome", "run"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes
    ----------
    rows : list of dict
        As the table shows them.
    results : Path
        JSON lines.
    picture : Path, optional
        None where matplotlib is not installed.
    """

    rows: list[dict[str, Any]]
    results: Path
    picture: Path | None


def run(
    recipe: Recipe,
    out: Path,
    *,
    cache: Path | None = None,
    model: str | None = None,
    data: str | None = None,
    features: str | None = None,
    rates: Sequence[float] = (),
    seeds: int | None = None,
    jobs: int = 1,
    device: str | None = None,
    fresh: bool = False,
    reporter: Reporter | None = None,
) -> Outcome:
    """Do what is not yet done of a recipe, and draw its figure of all results.

    Parameters
    ----------
    recipe : Recipe
    out : Path
        A folder, made if need be: results as JSON lines, the figure, adapters. The same call again goes on from what is
        finished, and draws anew.
    cache : Path, optional
        Where what is fetched is kept; ``out / "cache"`` if not given.
    model, data, rates, seeds, device
        As :func:`~tnadapt.reproduce.classification.study_of` takes them.
    features : str, optional
        What looks at generated images: as :func:`~tnadapt.reproduce.diffusion.opening.generation_of` takes it.
    jobs : int
        Trainings at once.
    fresh : bool
        Remove what an earlier run left there.
    reporter : Reporter, optional
        Is told how far it is.

    Returns
    -------
    Outcome

    Raises
    ------
    TnadaptError
        If model or data cannot be had, or the folder cannot be used.

    Examples
    --------
    Figure 2 for a small model; only what trains needs torch:

    >>> from pathlib import Path
    >>> from tnadapt.reproduce import open_recipe, run
    >>> outcome = run(open_recipe("params", "mini"), Path("figure-2"))
    >>> outcome.rows[0], outcome.results.name
    ({'arm': 'LoRA', 'rank': 1, 'parameters': 1024}, 'counts.jsonl')
    """
    if recipe.kind == "counts":
        return _counted(recipe, out)
    if recipe.kind == "diffusion":
        from .diffusion.opening import generation_of

        generation = generation_of(
            recipe, cache or out / "cache", model=model, data=data, features=features, rates=rates, seeds=seeds,
            device=device, reporter=reporter,
        )  # fmt: skip
        return _generated(recipe, generation.run(out, jobs, fresh), generation, out)
    if features is not None:
        raise TnadaptError(f"recipe {recipe.name} generates no images, and has no --features")
    from .classification import study_of

    geometric = recipe.kind == "geometry"
    study = study_of(
        recipe, cache or out / "cache", model=model, data=data, rates=rates, seeds=seeds, device=device,
        keep_references=geometric, reporter=reporter,
    )  # fmt: skip
    done = study.run(out, jobs, fresh)
    sizes = " / ".join(f"{len(part.labels):,}" for part in study.problem.parts.values())
    seeds = len(study.seeds)
    note = (
        f"{study.problem.name}; {sizes} samples to train on, choose the rate by, and test; {seeds} "
        f"seed{'s' * (seeds > 1)}; each at the better of {len(study.rates)} rate{'s' * (len(study.rates) > 1)}"
    )
    if geometric:
        return _similar(recipe, done.points, out, note)
    rows = [
        {
            "arm": point.method.family,
            "setting": point.method.label,
            "parameters": point.parameters,
            "rate": point.rate,
            "test": [round(100 * value, 2) for value in point.test],
        }
        for point in done.points
    ]
    return Outcome(rows, out / "results.jsonl", _drawn(_fronts, recipe, rows, out / "figure.png", note))


# -- Kinds -------------------------------------------------------------------------------------


def _counted(recipe: Recipe, out: Path) -> Outcome:
    rows = [{"arm": point.arm, "rank": point.config.rank, "parameters": point.parameters} for point in recipe.points()]
    return Outcome(rows, _written(rows, out / "counts.jsonl"), _drawn(_counts, recipe, rows, out / "figure.png", ""))


def _similar(recipe: Recipe, points: Sequence[Trained], out: Path, note: str) -> Outcome:
    from .similarity import VECTORS, measured, summary

    rows = list(measured(points, out / "adapters"))
    path = _written(rows, out / "geometry.jsonl")
    note = f"{note}; the first {VECTORS} singular vectors; a dot a weight and seed"
    return Outcome(summary(rows), path, _drawn(_scatter, recipe, rows, out / "figure.png", note))


def _generated(recipe: Recipe, points: Sequence[Generated], generation: Generation, out: Path) -> Outcome:
    from .diffusion.metrics import METRICS

    rows = [
        {
            "arm": point.arm,
            "setting": point.setting,
            "parameters": point.parameters,
            "rate": point.rate,
            "loss": [record["validation_loss"] for record in point.records if not record["diverged"]],
            **{metric: list(point.values(metric)) for metric in METRICS},
        }
        for point in points
    ]
    setup, seeds = generation.setup, len(generation.seeds)
    note = (
        f"{setup.source} to {setup.target}, {setup.size} pixels; {generation.how.samples:,} images of each, seen by "
        f"{'a classifier of ' + setup.target if setup.features == 'classifier' else 'Inception'}; {seeds} "
        f"seed{'s' * (seeds > 1)}; each at the rate of {len(generation.rates)} with the least loss on images held out"
    )
    _drawn(_samples, recipe, _chosen(points, out), out / "generated.png", note)
    return Outcome(rows, out / "results.jsonl", _drawn(_qualities, recipe, rows, out / "figure.png", note))


def _chosen(points: Sequence[Generated], out: Path) -> list[dict[str, Any]]:
    """Of every setting, the first images of the first seed."""
    found = []
    for point in points:
        path = out / "images" / point.records[0].get("images", "")
        if path.is_file():
            found.append({"words": _words(point.arm, point.setting, point.parameters), "path": path})
    return found


def _words(arm: str, setting: str, parameters: int) -> str:
    return f"{arm}\n{setting + ', ' if setting else ''}{parameters:,} parameters" if parameters else arm


def _written(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; give another folder with --out") from None
    return path


# -- Pictures ----------------------------------------------------------------------------------


def _drawn(draw: Any, recipe: Recipe, rows: Sequence[dict[str, Any]], path: Path, note: str) -> Path | None:
    try:
        draw(recipe, rows, path, note)
    except ImportError:
        return None
    except OSError as error:
        raise FileError(f"cannot draw into {path}: {error.strerror}; give another folder with --out") from None
    return path


def _counts(recipe: Recipe, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    from ..plot import parameters

    ranks = max(int(row["rank"]) for row in rows)
    parameters(recipe.weights.shapes, path, ranks=ranks, title=f"{recipe.title}: {recipe.weights.what}")


def _fronts(recipe: Recipe, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    from ..plot import Curve, Dot, fronts

    curves = [
        Curve(arm, tuple(Dot(row["parameters"], tuple(row["test"])) for row in rows if row["arm"] == arm))
        for arm in dict.fromkeys(row["arm"] for row in rows)
    ]
    fronts(curves, path, title=recipe.title, note=note)


def _qualities(recipe: Recipe, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    from ..plot import Curve, Dot, Panel, fronts_grid
    from .diffusion.metrics import LOWER, METRICS

    arms = dict.fromkeys(row["arm"] for row in rows)
    panels = []
    for metric, words in METRICS.items():
        dots = {
            arm: tuple(Dot(row["parameters"], tuple(row[metric])) for row in rows if row["arm"] == arm and row[metric])
            for arm in arms
        }
        curves = tuple(Curve(arm, own) for arm, own in dots.items() if own)
        if curves:
            panels.append(Panel(curves, words, metric not in LOWER))
    if panels:
        fronts_grid(panels, path, title=recipe.title, note=note)


def _samples(recipe: Recipe, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    import numpy as np

    from ..plot import generated

    found = [(row["words"], np.load(row["path"], allow_pickle=False)[:20]) for row in rows]
    if found:
        generated(found, path, title=recipe.title, note=note)


def _scatter(recipe: Recipe, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    from ..plot import similarity

    similarity(rows, path, title=recipe.title, note=note)

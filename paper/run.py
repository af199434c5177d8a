"""Running a recipe into a folder, and producing its table and figures from the results there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import FileError, TnadaptError

from .figures import draw, read
from .recipe import Recipe

if TYPE_CHECKING:
    from tnadapt.finetune import Reporter

__all__ = ["RecipeOutcome", "redraw", "run"]


@dataclasses.dataclass(frozen=True)
class RecipeOutcome:
    """The outcome of a recipe.

    Attributes
    ----------
    rows : list of dict
        The rows of the table.
    results : Path
        A file of JSON lines.
    picture : Path, optional
        None if matplotlib is not installed.
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
    jobs: int | None = None,
    device: str | None = None,
    fresh: bool = False,
    reporter: Reporter | None = None,
    engine: str = "local",
    options: Mapping[str, str] | None = None,
) -> RecipeOutcome:
    """Run the unfinished trainings of a recipe, and draw its figure from all results.

    Parameters
    ----------
    recipe : Recipe
    out : Path
        The output folder for results as JSON lines, the figure and adapters; created if needed. Calling again continues
        after the finished trainings and redraws the figure.
    cache : Path, optional
        Folder for fetched files; ``out / "cache"`` by default.
    model, data, rates, seeds, device
        As in :func:`~paper.classification.study_of`.
    features : str, optional
        What measures generated images, as in :func:`~paper.diffusion.opening.generation_of`.
    jobs : int, optional
        Number of parallel trainings; 0 for as many as fit. By default 1 on this machine, and 0 on a cluster.
    fresh : bool
        Discard the results of an earlier run in that folder.
    reporter : Reporter, optional
        Receives progress.
    engine : str
        Where parallel trainings run: see :func:`tnadapt.finetune.run_tasks`.
    options : mapping of str to str, optional
        Settings of the engine.

    Returns
    -------
    RecipeOutcome

    Raises
    ------
    TnadaptError
        If model or data are unavailable, or the folder cannot be used.

    Examples
    --------
    Figure 2 for a small model; only recipes that train need torch:

    >>> from pathlib import Path
    >>> from paper import open_recipe, run
    >>> outcome = run(open_recipe("params", "mini"), Path("figure-2"))
    >>> outcome.rows[0], outcome.results.name
    ({'arm': 'LoRA', 'rank': 1, 'parameters': 1024}, 'counts.jsonl')
    """
    points: Sequence[Any] | None = None
    if recipe.kind == "counts":
        _write(
            [{"arm": one.arm, "rank": one.config.rank, "parameters": one.parameters} for one in recipe.points()], out
        )
    elif recipe.kind == "diffusion":
        from tnadapt.finetune import open_engine

        from .diffusion.opening import generation_of

        points = generation_of(
            recipe, cache or out / "cache", model=model, data=data, features=features, rates=rates, seeds=seeds,
            device=device, reporter=reporter, engine=open_engine(engine, jobs, options),
        ).run(out, jobs, fresh, engine, options)  # fmt: skip
    else:
        if features is not None:
            raise TnadaptError(f"recipe {recipe.name} generates no images, so --features does not apply; leave it out")
        from tnadapt.finetune import open_engine

        from .classification import study_of

        study = study_of(
            recipe, cache or out / "cache", model=model, data=data, rates=rates, seeds=seeds, device=device,
            keep_references=recipe.kind == "geometry", reporter=reporter, engine=open_engine(engine, jobs, options),
        )  # fmt: skip
        points = study.run(out, jobs, fresh, engine, options).points
        if recipe.kind == "geometry":
            from .similarity import at_one_rate, measured

            own = measured(points, out / "adapters")
            shared = measured(at_one_rate(points, out / "results.jsonl"), out / "adapters", one_rate=True)
            _write([*own, *shared], out, "geometry.jsonl")
    return _shown(recipe, out, out, points)


def redraw(recipe: Recipe, out: Path, pictures: Path | None = None) -> RecipeOutcome:
    """Recompute the table and figures from the results in a folder, without training, model or data.

    Parameters
    ----------
    recipe : Recipe
    out : Path
        The folder in which :func:`run` left its results.
    pictures : Path, optional
        Another folder for the figures.

    Returns
    -------
    RecipeOutcome

    Raises
    ------
    TnadaptError
        If there are no results there.

    Examples
    --------
    >>> from paper import open_recipe
    >>> recipe = open_recipe("params", "mini")
    >>> redraw(recipe, run(recipe, Path("figure-2")).results.parent).rows[0]
    {'arm': 'LoRA', 'rank': 1, 'parameters': 1024}
    """
    return _shown(recipe, out, pictures or out, None)


def _shown(recipe: Recipe, out: Path, pictures: Path, points: Sequence[Any] | None) -> RecipeOutcome:
    results = out / {"counts": "counts.jsonl", "geometry": "geometry.jsonl"}.get(recipe.kind, "results.jsonl")
    try:
        found = read(recipe, out, points)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TnadaptError(f"cannot read the results of recipe {recipe.name} in {out}: {error}; run it first") from None
    try:
        picture = draw(recipe, found, pictures)
    except ImportError:
        picture = None
    except FileError as error:
        raise FileError(f"cannot draw into {pictures}: {error}; give another folder") from None
    except OSError as error:
        raise FileError(f"cannot draw into {pictures}: {error.strerror}; give another folder") from None
    except (ValueError, EOFError) as error:
        raise FileError(f"cannot draw what is in {out}: {error}") from None
    return RecipeOutcome(found.rows, results, picture)


def _write(rows: Sequence[dict[str, Any]], out: Path, name: str = "counts.jsonl") -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(os.fspath(out / name), text.encode())
    except FileError as error:
        raise FileError(f"cannot write {out / name}: {error}; give another folder with --out") from None
    except OSError as error:
        raise FileError(f"cannot write {out / name}: {error.strerror}; give another folder with --out") from None

"""The command line of the paper's experiments: ``python -m paper``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tnadapt import TnadaptError
from tnadapt.cli.terminal import (
    ENGINE_HELP,
    ENGINE_OPTION_HELP,
    EscapingCommand,
    echo,
    echo_json,
    engine_options,
    help_text,
    print_table,
    reporter,
)

from .recipe import SCALES, Recipe, names, open_recipe
from .run import RecipeOutcome, redraw, run

__all__ = ["app", "experiment"]


def experiment(
    name: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(names())}; without a name, they are listed.")
    ] = None,
    scale: Annotated[str, typer.Option(help="full: as in the paper; mini: feasible on two cores.")] = "full",
    out: Annotated[Path | None, typer.Option(help="The output folder; runs/NAME-SCALE by default.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A folder for fetched files; inside the output folder by default.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A local folder or file of the model.")] = None,
    data: Annotated[str | None, typer.Option(help="A local folder or file of the data.")] = None,
    features: Annotated[
        str | None, typer.Option(help="What measures generated images: classifier, or a file of Inception's weights.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this method; repeat for more.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Other learning rates; repeat for more.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, instead of the recipe's.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=0, help="Parallel trainings; 0: as many as fit. 1 by default, and on a cluster 0."),
    ] = None,
    engine: Annotated[str, typer.Option(help=ENGINE_HELP)] = "local",
    engine_option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=ENGINE_OPTION_HELP)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the results of an earlier run.")] = False,
    redrawn: Annotated[
        bool, typer.Option("--redraw", help="Only redraw the results in --out; no training, model or data.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list every setting with its count.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run an experiment of the SuperLoRA paper from its recipe, and draw its figure.

    Without a name, the recipes are listed. --dry-run lists a recipe's settings with their parameter counts, and the
    counts that the paper states; it needs neither model nor data. Run the same command again to resume after an
    interruption, or to redraw the figure from existing results.

    Exit code: 0; 1 if a count differs from the paper's; 2 for an error.
    """
    if name is None:
        _list(as_json)
        return
    recipe = open_recipe(name, scale).only(arm or ())
    if dry_run:
        _print_points(recipe, as_json)
        return
    folder = out or Path("runs", f"{name}-{scale}")
    if redrawn:
        _print_outcome(recipe, redraw(recipe, folder), as_json)
        return
    try:
        with reporter() as shown:
            outcome = run(
                recipe, folder, cache=cache, model=model, data=data, features=features, rates=lr or (), seeds=seeds,
                jobs=jobs, device=device, fresh=fresh, reporter=shown, engine=engine,
                options=engine_options(engine_option or ()),
            )  # fmt: skip
    except KeyboardInterrupt:
        echo("", err=True)
        echo(f"stopped; finished trainings are in {folder}; run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    except ImportError as error:
        raise TnadaptError(
            f"recipe {name} trains, which needs an extra: pip install 'tnadapt[paper]' ({error})"
        ) from None
    _print_outcome(recipe, outcome, as_json)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=EscapingCommand, help=help_text(experiment))(experiment)


def _list(as_json: bool) -> None:
    found = []
    for name in names():
        scales = [scale for scale in SCALES if _has(name, scale)]
        recipe = open_recipe(name, scales[0])
        found.append({"name": name, "title": recipe.title, "paper": recipe.paper, "scales": scales})
    if as_json:
        echo_json(found)
        return
    titles = ["recipe", "what", "in the paper", "scales"]
    rows = [[one["name"], one["title"], one["paper"], ", ".join(one["scales"])] for one in found]
    print_table(titles, rows, right=())  # type: ignore[arg-type]


def _has(name: str, scale: str) -> bool:
    try:
        open_recipe(name, scale)
    except TnadaptError:
        return False
    return True


def _print_points(recipe: Recipe, as_json: bool) -> None:
    points, checked = recipe.points(), recipe.checked()
    wrong = [one for one in checked if one[1] != one[2]]
    if as_json:
        listed = [
            {
                "arm": point.arm,
                "setting": point.setting,
                "parameters": point.parameters,
                "config": point.config.to_dict(),
            }
            for point in points
        ]
        stated = [{"what": what, "paper": paper, "parameters": ours} for what, paper, ours in checked]
        head = {"recipe": recipe.name, "scale": recipe.scale, "weights": recipe.weights.what, "notes": recipe.notes}
        echo_json({**head, "points": listed, "stated": stated})
    else:
        rows = [[point.arm, point.setting, f"{point.parameters:,}"] for point in points]
        print_table(["arm", "setting", "parameters"], rows, right=(2,))
        echo(f"{len(points)} settings of {recipe.weights.what}")
        for what, paper, ours in checked:
            same = "the same here" if paper == ours else f"HERE {ours:,}"
            echo(f"the paper states {paper:,} for {what}: {same}")
        for note in recipe.notes:
            echo(f"note: {note}")
    if wrong:
        raise typer.Exit(1)


def _print_outcome(recipe: Recipe, outcome: RecipeOutcome, as_json: bool) -> None:
    if as_json:
        found: dict[str, Any] = {"recipe": recipe.name, "scale": recipe.scale, "rows": outcome.rows}
        found |= {"results": str(outcome.results), "picture": outcome.picture and str(outcome.picture)}
        echo_json(found)
        return
    if recipe.kind != "counts":
        columns = list(outcome.rows[0])
        numbers = range(columns.index("parameters"), len(columns))
        print_table(columns, [[_cell(row[column]) for column in columns] for row in outcome.rows], right=numbers)
    echo(f"results: {outcome.results}")
    echo("no picture: pip install 'tnadapt[plot]'" if outcome.picture is None else f"picture: {outcome.picture}")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return _mean(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean(values: Sequence[float]) -> str:
    """Format mean and standard deviation with significant digits; – for an empty list."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 10 else 4
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

"""The command line of the paper's experiments: ``python -m paper``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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
    stoppable,
)

from .batch import EVERY, check_counts, check_inputs, inputs_of, recipes_of
from .recipe import SCALES, Recipe, names, open_recipe
from .run import RecipeOutcome, redraw, run

__all__ = ["app", "experiment"]


def experiment(
    name: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(names())}; several; or all. Without a name, they are listed."),
    ] = None,
    scale: Annotated[str, typer.Option(help="full: as in the paper; mini: feasible on two cores.")] = "full",
    out: Annotated[
        Path | None,
        typer.Option(help="The output folder; runs/NAME-SCALE by default. Of several, that above NAME-SCALE."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A folder for fetched files; inside the output folder by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A local folder or file of the model; for several recipes, the folder above.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A local folder or file of the data; for several recipes, the folder above.")
    ] = None,
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
    """Run experiments of the SuperLoRA paper from their recipes, and draw their figures.

    Without a name, the recipes are listed. --dry-run lists a recipe's settings with their parameter counts, and the
    counts that the paper states; it needs neither model nor data. Run the same command again to resume after an
    interruption, or to redraw the figure from existing results.

    Several recipes run one after the other. All counts are checked before the first training, and whatever is missing
    and cannot be fetched is named. If one fails, the others go on.

    Exit code: 0; 1 if --dry-run finds a count that differs from the paper's; 2 for an error.
    """
    if not name:
        _list(as_json)
        return
    recipes = recipes_of(name, scale)
    several = len(recipes) > 1 or EVERY in name
    if arm and several:
        raise TnadaptError("--arm takes one recipe at a time, because arms have other names in each")
    recipes = [recipe.only(arm or ()) for recipe in recipes]
    if dry_run:
        _print_points(recipes, several, as_json)
        return
    parent = out or Path("runs")
    folders = [out if out and not several else parent / f"{recipe.name}-{scale}" for recipe in recipes]
    if redrawn:
        _print_outcomes(recipes, [redraw(*one) for one in zip(recipes, folders, strict=True)], several, as_json)
        return
    where = engine_options(engine_option or ())
    if several:
        check_inputs(recipes, data, features)
        if any(recipe.kind != "counts" for recipe in recipes):
            _check_engine(engine, jobs, where)
    counted = check_counts(recipes)
    if several:
        echo(f"{len(recipes)} recipes with {counted:,} settings; no count differs from the paper's", err=True)

    def train(recipe: Recipe, folder: Path) -> RecipeOutcome:
        own = inputs_of(recipe, model, data) if several else (model, data)
        looks = features if recipe.kind == "diffusion" or not several else None
        from tnadapt.cli.training_reporter import reporter  # imports torch

        with reporter() as shown:
            return run(
                recipe, folder, cache=cache or (parent / "cache" if several else None), model=own[0], data=own[1],
                features=looks, rates=lr or (), seeds=seeds, jobs=jobs, device=device, fresh=fresh, reporter=shown,
                engine=engine, options=where,
            )  # fmt: skip

    outcomes: list[RecipeOutcome | None] = []
    for recipe, folder in zip(recipes, folders, strict=True):
        try:
            if several:
                echo(f"{recipe.name}: {recipe.title}", err=True)
            with stoppable(f"finished trainings are in {folder}; run the same command again to continue"):
                outcomes.append(train(recipe, folder))
        except typer.Exit:  # stopped, and an exception like others
            raise
        except Exception as error:
            known = _needs_extra(error) if isinstance(error, ImportError) else error
            if not several:
                raise known from None
            # The others do not depend on it.
            echo(f"{recipe.name} failed: {known}", err=True)
            outcomes.append(None)
    _print_outcomes(recipes, outcomes, several, as_json)
    if failed := [recipe.name for recipe, outcome in zip(recipes, outcomes, strict=True) if outcome is None]:
        raise TnadaptError(
            f"{len(failed)} of {len(recipes)} recipes failed: {', '.join(failed)}; the others are finished. What is "
            "finished is kept: run the same command again to continue"
        )


def _check_engine(engine: str, jobs: int | None, options: Mapping[str, str]) -> None:
    """Refuse an engine that cannot be used, before the first recipe."""
    try:
        from tnadapt.finetune import open_engine
    except ImportError as error:
        raise _needs_extra(error) from None
    open_engine(engine, jobs, options)


def _needs_extra(error: ImportError) -> TnadaptError:
    return TnadaptError(f"recipes that train need an extra: pip install 'tnadapt[paper]' ({error})")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=EscapingCommand, help=help_text(experiment), context_settings={"help_option_names": ["-h", "--help"]})(
    experiment
)


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


def _print_points(recipes: Sequence[Recipe], several: bool, as_json: bool) -> None:
    if as_json:
        found = [_counts(recipe) for recipe in recipes]
        echo_json(found if several else found[0])
    else:
        for recipe in recipes:
            if several:
                echo(f"{recipe.name}: {recipe.title}")
            _print_counts(recipe)
    if any(paper != ours for recipe in recipes for _, paper, ours in recipe.checked()):
        raise typer.Exit(1)


def _counts(recipe: Recipe) -> dict[str, Any]:
    listed = [
        {"arm": point.arm, "setting": point.setting, "parameters": point.parameters, "config": point.config.to_dict()}
        for point in recipe.points()
    ]
    stated = [{"what": what, "paper": paper, "parameters": ours} for what, paper, ours in recipe.checked()]
    head = {"recipe": recipe.name, "scale": recipe.scale, "weights": recipe.weights.what, "notes": recipe.notes}
    return {**head, "points": listed, "stated": stated}


def _print_counts(recipe: Recipe) -> None:
    points = recipe.points()
    rows = [[point.arm, point.setting, f"{point.parameters:,}"] for point in points]
    print_table(["arm", "setting", "parameters"], rows, right=(2,))
    echo(f"{len(points)} settings of {recipe.weights.what}")
    for what, paper, ours in recipe.checked():
        same = "the same here" if paper == ours else f"HERE {ours:,}"
        echo(f"the paper states {paper:,} for {what}: {same}")
    for note in recipe.notes:
        echo(f"note: {note}")


def _print_outcomes(
    recipes: Sequence[Recipe], outcomes: Sequence[RecipeOutcome | None], several: bool, as_json: bool
) -> None:
    pairs = [(recipe, outcome) for recipe, outcome in zip(recipes, outcomes, strict=True) if outcome is not None]
    if as_json:
        found = [_found(*pair) for pair in pairs]
        echo_json(found if several else found[0])
        return
    for recipe, outcome in pairs:
        if several:
            echo(f"{recipe.name}: {recipe.title}")
        _print_outcome(recipe, outcome)


def _found(recipe: Recipe, outcome: RecipeOutcome) -> dict[str, Any]:
    found: dict[str, Any] = {"recipe": recipe.name, "scale": recipe.scale, "rows": outcome.rows}
    return found | {"results": str(outcome.results), "picture": outcome.picture and str(outcome.picture)}


def _print_outcome(recipe: Recipe, outcome: RecipeOutcome) -> None:
    if recipe.kind != "counts":
        columns = list(outcome.rows[0])
        numbers = range(columns.index("parameters"), len(columns))
        print_table(columns, [[_cell(row[column]) for column in columns] for row in outcome.rows], right=numbers)
    echo(f"results: {outcome.results}")
    echo("no picture: pip install -e '.[paper]'" if outcome.picture is None else f"picture: {outcome.picture}")


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

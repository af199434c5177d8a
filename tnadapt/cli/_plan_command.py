"""The command ``tnadapt plan``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import tnadapt
from tnadapt.errors import TnadaptError, safe_repr

from ._common_options import AsJson, ModelOfHeaders, OwnSettings, TargetsOfHeaders, preset_option
from ._interrupts import stoppable
from ._planned_weights import Weights, planned_weights
from ._printing import echo, echo_json, print_table
from ._settings import chosen_config, targets_of

__all__ = ["plan_command"]

# Columns to omit, in this order, if a terminal is too narrow.
SPARE = ("share", "bytes", "padding", "step", "LoRA")


def plan_command(
    model: ModelOfHeaders = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="A number of parameters, such as 1000; or of bytes, such as 4kB or 64KiB.",
            show_default="required",
        ),
    ] = None,
    targets: TargetsOfHeaders = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWSxCOLS",
            help="Shape of a weight, instead of a model; repeat for more, 768x768*24 for 24.",
            show_default="the weights of the model",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the adapter file.")] = "float32",
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Criteria of the Pareto front: parameters, freedom, cost, rank, waste; repeat for more.",
            show_default="parameters, freedom and cost",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show all settings that were compared.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Plot parameters against rank in this file: .png, .pdf, .svg.", show_default="none"),
    ] = None,
    layout_picture: Annotated[
        Path | None, typer.Option(help="Plot where a setting places each weight in this file.", show_default="none")
    ] = None,
    preset: Annotated[
        str | None, preset_option("The setting of --layout-picture, e.g. superlora", "the first row")
    ] = None,
    settings: OwnSettings = None,
    as_json: AsJson = False,
) -> None:
    """Show which settings of which methods fit a budget of parameters, with their capacity and cost.

    Exit code: 0, or 2 if the request is not possible.
    """
    if (preset or settings) and layout_picture is None:
        raise TnadaptError("--preset and --set say what --layout-picture draws; give its file, too")
    for path in (picture, layout_picture):
        if path is not None and (path.is_dir() or not path.suffix):
            raise TnadaptError(f"a picture is a file that ends in .png, .pdf or .svg; got {safe_repr(str(path))}")
    if budget is None:
        raise TnadaptError("give a budget: --budget 1000 for parameters, --budget 4kB for bytes")
    drawn = chosen_config(preset, settings or [], None)
    with stoppable("there is no plan"), tnadapt.ProgressBar("planning") as bar:
        weights = planned_weights(model, targets, shape)
        found = tnadapt.plan(
            weights.shapes,
            budget,
            layers=weights.layers,
            roles=weights.roles,
            dtype=dtype,
            progress=bar.counts,
            **({"by": by} if by else {}),
        )
        table = found.table(every)
    chosen = found.shown[0].config if drawn is None else drawn
    adapter = tnadapt.SuperLoRA(chosen, weights.shapes, weights.layers, weights.roles)
    if picture is not None or layout_picture is not None:
        _draw(found, weights, adapter, picture, layout_picture)
    if as_json:
        more: dict[str, Any] = {"model": model, "targets": weights.targets}
        if layout_picture is not None:
            more["layout"] = chosen.to_dict()
        echo_json({**more, **found.to_dict(every)})
        return
    _print(found, table, targets_of(targets) if targets else [])
    if picture is not None:
        echo(f"parameters against rank: {picture}")
    if layout_picture is not None:
        echo(f"where {tnadapt.planning.known_as(chosen)} places each weight: {layout_picture}")


def _draw(
    found: tnadapt.planning.Plan,
    weights: Weights,
    adapter: tnadapt.SuperLoRA,
    picture: Path | None,
    layout_picture: Path | None,
) -> None:
    from tnadapt.plot import layout, parameters

    try:
        if picture is not None:
            parameters(found.shapes, picture, budget=found.budget, title=f"{len(found.shapes)} weights in one group")
        if layout_picture is not None:
            method = str(tnadapt.planning.known_as(adapter.config))
            layout(adapter, layout_picture, weights.names, weights.drawn_roles, method)
    except ImportError as error:
        raise TnadaptError(f"pictures need their extra: pip install 'tnadapt[plot]' ({error})") from None
    except ValueError as error:  # raised by matplotlib for an unknown suffix
        raise TnadaptError(f"cannot draw: {error}") from None


def _print(found: tnadapt.planning.Plan, table: Sequence[Sequence[str]], targets: str | list[str]) -> None:
    kept = list(range(len(table[0])))
    if sys.stdout.isatty():
        widths = [max(len(row[column]) for row in table) for column in kept]
        for spare in SPARE:
            if sum(widths[column] + 2 for column in kept) - 2 <= shutil.get_terminal_size().columns:
                break
            kept.remove(table[0].index(spare))
    rows = [[row[column] for column in kept] for row in table]
    print_table(rows[0], rows[1:], right=range(3, len(kept)))
    for note in found.notes(targets):
        echo(note)

"""The command ``tnadapt verify``."""

from __future__ import annotations

from typing import Annotated

import typer

import tnadapt

from ._common_options import AsJson, ConfigFile, OwnSettings, preset_option
from ._interrupts import stoppable
from ._printing import echo_json, echo_table
from ._settings import chosen_config, shapes_of

__all__ = ["verify_command"]


def verify_command(
    preset: Annotated[str | None, preset_option("A named method, e.g. superlora", "all, and the library")] = None,
    settings: OwnSettings = None,
    config: ConfigFile = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWSxCOLS",
            help="Shape of a weight; repeat for more, 12x8*4 for four.",
            show_default="12x8, 12x8, 8x12",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="An array library to check; repeat for more.", show_default="all that are installed"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random parameters.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Check the laws of the library, or of one config, on every installed array library.

    Exit code: 0 if all laws hold, 1 if one does not, 2 for invalid arguments.
    """
    chosen = chosen_config(preset, settings or [], config)
    shapes = shapes_of(shape or []) or None
    with stoppable("there is no report"), tnadapt.ProgressBar("checking") as bar:
        report = tnadapt.verify(chosen, shapes, backends=backend, seed=seed, progress=bar.lines)
    if as_json:
        echo_json(report.to_dict())
    else:
        echo_table(str(report))
    raise typer.Exit(0 if report.holds else 1)

"""The command ``tnadapt verify``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import tnadapt
from tnadapt.errors import escaped

from ._common_options import AsJson, ConfigFile, OwnSettings, preset_option
from ._interrupts import stoppable
from ._printing import echo_json, echo_table
from ._progress import status
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
    with stoppable("there is no report"), status("checking") as show:
        report = tnadapt.verify(
            chosen, shapes, backends=backend, seed=seed, progress=lambda line: show(f"checking {line}")
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        _print(report)
    raise typer.Exit(0 if report.holds else 1)


def _print(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        echo_table(str(report))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("law", overflow="fold")
    table.add_column("backend", no_wrap=True)
    for title in ("cases", "largest error", "allowed"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in report.rows():
        table.add_row(*map(Text, row), style=None if row[-1] == "holds" else "bold red")
    console.print(table)
    for name, why in report.absent.items():
        console.print(Text(escaped(f"{name}: not checked: {why}")))
    console.print("all laws hold" if report.holds else "NOT all laws hold")

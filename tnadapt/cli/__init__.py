"""The command line, a thin layer over library calls. It needs ``pip install "tnadapt[cli]"``."""

from __future__ import annotations

from typing import Annotated

import typer

from tnadapt import __version__

from .terminal import LazyGroup, echo

__all__ = ["app"]


app = typer.Typer(
    cls=LazyGroup,
    name="tnadapt",
    help="Fine-tune, plan, convert and merge adapters with few parameters.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit it
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"tnadapt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune, plan, convert and merge adapters with few parameters."""

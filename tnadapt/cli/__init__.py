"""The command line. Needs ``pip install "tnadapt[cli]"``; everything it does is a library call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from .. import __version__
from .convert import convert_command
from .extract import extract_command
from .finetune import finetune_command
from .info import info_command
from .merge import merge_command
from .plan import plan_command
from .reproduce import reproduce_command
from .verify import verify_command

__all__ = ["app"]

app = typer.Typer(
    name="tnadapt",
    help="Weight updates as small tensor networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tnadapt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Weight updates as small tensor networks: SuperLoRA and its relatives."""


def _help(command: Callable[..., None]) -> str:
    """A docstring's paragraphs, each in one line: the terminal says how wide they are."""
    return "\n\n".join(" ".join(text.split()) for text in inspect.getdoc(command).split("\n\n"))  # type: ignore[union-attr]


app.command("finetune", help=_help(finetune_command))(finetune_command)
app.command("plan", help=_help(plan_command))(plan_command)
app.command("extract", help=_help(extract_command))(extract_command)
app.command("convert", help=_help(convert_command))(convert_command)
app.command("merge", help=_help(merge_command))(merge_command)
app.command("info", help=_help(info_command))(info_command)
app.command("reproduce", help=_help(reproduce_command))(reproduce_command)
app.command("verify", help=_help(verify_command))(verify_command)

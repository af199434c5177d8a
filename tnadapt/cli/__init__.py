"""The command line, a thin layer over library calls. It needs ``pip install "tnadapt[cli]"``."""

from __future__ import annotations

from typing import Annotated

import typer

from tnadapt import __version__

from ._convert_command import convert_command
from ._extract_command import extract_command
from ._finetune_command import finetune_command
from ._info_command import info_command
from ._merge_command import merge_command
from ._plan_command import plan_command
from ._predict_command import predict_command
from ._presets_command import presets_command
from ._verify_command import verify_command
from .terminal import EscapingGroup, echo, help_text

__all__ = ["app"]


app = typer.Typer(
    cls=EscapingGroup,
    name="tnadapt",
    help="Weight updates as small tensor networks.",
    no_args_is_help=True,
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
    """Weight updates as small tensor networks: SuperLoRA and its relatives."""


app.command("finetune", help=help_text(finetune_command))(finetune_command)
app.command("predict", help=help_text(predict_command))(predict_command)
app.command("presets", help=help_text(presets_command))(presets_command)
app.command("plan", help=help_text(plan_command))(plan_command)
app.command("extract", help=help_text(extract_command))(extract_command)
app.command("convert", help=help_text(convert_command))(convert_command)
app.command("merge", help=help_text(merge_command))(merge_command)
app.command("info", help=help_text(info_command))(info_command)
app.command("verify", help=help_text(verify_command))(verify_command)

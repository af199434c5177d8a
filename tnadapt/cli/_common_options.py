"""Options that several commands have, with their help, as types of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from ._settings import presets_that_begin_with

__all__ = [
    "TARGETS_HELP",
    "AsJson",
    "ConfigFile",
    "ModelOfHeaders",
    "OwnSettings",
    "TargetsOfHeaders",
    "preset_option",
]


def preset_option(help: str, show_default: str, panel: str | None = None) -> typer.models.OptionInfo:
    """Return an option ``--preset``, which shells complete.

    Parameters
    ----------
    help : str
    show_default : str
        What it is without the option.
    panel : str, optional
        Of the help page.
    """
    found: typer.models.OptionInfo = typer.Option(
        help=f"{help}; tnadapt presets lists them.", show_default=show_default, rich_help_panel=panel,
        autocompletion=presets_that_begin_with,
    )  # fmt: skip
    return found


#: Of ``--targets``, after the words that a command takes.
TARGETS_HELP = "a module's name, the end of its path, or a regex such as '.*proj'; repeat for more names."

ModelOfHeaders: TypeAlias = Annotated[
    str | None, typer.Argument(help="A folder, a safetensors file or index, or a hub name. Only headers are read.")
]
TargetsOfHeaders: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--targets", help=f"qv, qkvo, embeddings, {TARGETS_HELP}", show_default="qv"),
]
OwnSettings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="A Config field, or a preset's argument.", show_default="the preset's"
    ),
]
ConfigFile: TypeAlias = Annotated[
    Path | None, typer.Option("--config", help="A JSON file of Config fields.", show_default="none")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]

"""Printing through one path that escapes control characters, so that no file can control the terminal."""

from __future__ import annotations

import json
from typing import Any

import typer

from tnadapt.errors import escaped

__all__ = ["echo", "echo_json", "echo_table"]


def echo(line: str, err: bool = False) -> None:
    """Print one line."""
    typer.echo(escaped(line), err=err)


def echo_table(text: str) -> None:
    """Print the lines of a report, which must escape text from files itself."""
    for line in text.split("\n"):
        echo(line)


def echo_json(value: Any) -> None:
    """Print JSON in ASCII, with all other characters escaped."""
    typer.echo(json.dumps(value, indent=2))

"""What is printed, on one way out, so that nothing in a file can speak to the terminal."""

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
    """Print the lines of a report, which escapes what it takes from files itself."""
    for line in text.split("\n"):
        echo(line)


def echo_json(value: Any) -> None:
    """Print JSON in ASCII: what is neither that nor visible is escaped, as JSON has it."""
    typer.echo(json.dumps(value, indent=2))

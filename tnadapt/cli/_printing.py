"""Printing through one path that escapes control characters, so that no file can control the terminal."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import typer

from tnadapt.errors import escaped
from tnadapt.report import text_table

__all__ = ["cell", "echo", "echo_json", "echo_table", "print_table"]

# Maximum characters of a cell: a name in a file may have thousands, and all rows would become as wide.
_WIDEST = 200


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


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> None:
    """Print a table with the columns ``right`` aligned to the right, and rows that begin with ● in bold."""
    for line in text_table([list(map(cell, row)) for row in (titles, *rows)], right):
        # Escape sequences are left out where stdout is no terminal.
        typer.echo(typer.style(line, bold=True) if line.startswith("●") else line)


def cell(text: str) -> str:
    """Return a text as shown in a table: escaped and truncated.

    Examples
    --------
    >>> cell("q\\nk"), len(cell(1000 * "q"))
    ('q\\\\nk', 202)
    """
    shown = escaped(text)
    return shown if len(shown) <= _WIDEST else shown[:_WIDEST] + " …"

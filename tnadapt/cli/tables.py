"""Tables: of the terminal's own style on a terminal, of spaces elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    """Print a table; rows that begin with ● are bold, and the columns named in ``right`` end at one place."""
    console = Console()
    if console.is_terminal:
        table = Table(box=None, pad_edge=False)
        for index, title in enumerate(titles):
            table.add_column(title, justify="right" if index in right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == "●" else None)
        console.print(table)
        return
    widths = [max(len(row[index]) for row in [titles, *rows]) for index in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())

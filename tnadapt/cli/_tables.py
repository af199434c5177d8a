"""Tables, formatted by Rich on a terminal and aligned with spaces elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from tnadapt.errors import escaped

from ._printing import echo

__all__ = ["cell", "print_table"]

# Maximum characters of a cell: a name in a file may have thousands, and all rows would become as wide.
_WIDEST = 200


def cell(text: str) -> str:
    """Return a text as shown in a table: escaped and truncated.

    Examples
    --------
    >>> cell("q\\nk"), len(cell(1000 * "q"))
    ('q\\\\nk', 202)
    """
    shown = escaped(text)
    return shown if len(shown) <= _WIDEST else shown[:_WIDEST] + " …"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    """Print a table with rows that begin with ● in bold, and the columns ``right`` aligned to the right."""
    from rich.console import Console  # not needed where an option is refused

    rows = [[cell(text) for text in row] for row in rows]
    console = Console()
    if console.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for index, title in enumerate(titles):
            table.add_column(title, justify="right" if index in right else "left", no_wrap=True)
        for row in rows:
            # Text objects, as Rich parses [words] in a string as markup.
            table.add_row(*map(Text, row), style="bold" if row[0] == "●" else None)
        console.print(table)
        return
    widths = [max(len(row[index]) for row in [titles, *rows]) for index in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            text.rjust(width) if index in right else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        echo("  ".join(cells).rstrip())

"""How the pages of results write values, parts that are folded, and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def number(value: Any) -> str:
    """Write three digits of a float, groups of three digits in long integers, and other values as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def folded(summary: str, text: str) -> str:
    """Return Markdown that shows one line until a reader opens it, in the documentation and on GitHub."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n"


def list_table(rows: Iterable[Sequence[object]], *options: str) -> str:
    """Return a table in reStructuredText, the first row of which has the titles."""
    lines = [".. list-table::", "   :header-rows: 1", *(f"   {option}" for option in options), ""]
    lines += [f"   {' ' if place else '*'} - {cell}".rstrip() for row in rows for place, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> Iterator[str]:
    """Yield paragraphs of Markdown in lines of at most 120 columns; headings, lists and code stay as they are."""
    for paragraph in text.strip().split("\n\n"):
        kept = paragraph.startswith(("#", "```", "- "))
        yield paragraph if kept else textwrap.fill(paragraph, 120, break_on_hyphens=False)
        yield ""

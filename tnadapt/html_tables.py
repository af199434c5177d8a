"""Tables in HTML, which notebooks show for results instead of their text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .errors import escaped

__all__ = ["fact_table", "html_table"]

_LEFT, _RIGHT = "text-align:left", "text-align:right"


def html_table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = (), right: int = 0
) -> str:
    """Return a table.

    Parameters
    ----------
    caption : str
    head : sequence of str
        The titles of the columns.
    rows : iterable of sequence of str
        Cells. Everything is escaped: names may come from files.
    notes : iterable of str
        Lines below it.
    right : int
        The first of the columns that are aligned to the right, as numbers are; 0 for none.

    Returns
    -------
    str

    Examples
    --------
    >>> html_table("weights", ["name"], [["<q>"]], ["one weight"])  # doctest: +ELLIPSIS
    '<table><caption>weights</caption>...<td style="text-align:left">&lt;q&gt;</td>...<div>one weight</div>'
    """
    titles = "".join(_cell("th", text, place, right) for place, text in enumerate(head))
    body = "".join(
        f"<tr>{''.join(_cell('td', text, place, right) for place, text in enumerate(row))}</tr>" for row in rows
    )
    below = "".join(f"<div>{_text(note)}</div>" for note in notes)
    table = f"<table><caption>{_text(caption)}</caption><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    return table + below


def fact_table(caption: str, facts: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and values, one a line.

    Parameters
    ----------
    caption : str
    facts : iterable of (str, str)

    Returns
    -------
    str

    Examples
    --------
    >>> fact_table("Config", [("rank", "4")])
    '<table><caption>Config</caption><tbody><tr><th style="text-align:left">rank</th><td>4</td></tr></tbody></table>'
    """
    body = "".join(f'<tr><th style="{_LEFT}">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in facts)
    return f"<table><caption>{_text(caption)}</caption><tbody>{body}</tbody></table>"


def _cell(tag: str, text: str, place: int, right: int) -> str:
    return f'<{tag} style="{_RIGHT if right and place >= right else _LEFT}">{_text(text)}</{tag}>'


def _text(text: str) -> str:
    return html.escape(escaped(text))

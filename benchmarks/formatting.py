"""How the pages of results write values and parts that are folded."""

from __future__ import annotations

from typing import Any

__all__ = ["folded", "number"]


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

"""Words and numbers of the page of claims."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

__all__ = ["anchor", "folded", "mean_and_spread", "several"]


def several(count: int, what: str) -> str:
    """Return a count with its noun: ``"1 pair"``, ``"1,200 pairs"``."""
    return f"{count:,} {what}{'s' * (count > 1)}"


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    """Return the absolute value of the mean, and the standard deviation if there are several values."""
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{abs(statistics.fmean(values)):.{decimals}f}{spread}"


def folded(summary: str, text: str) -> str:
    """Return Markdown that shows one line until a reader opens it, in the documentation and on GitHub."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n"


def anchor(heading: str) -> str:
    """Return the anchor that GitHub and MyST give a heading.

    Examples
    --------
    >>> anchor("svhn-mnist: In miniature")
    'svhn-mnist-in-miniature'
    """
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

"""Human-readable numbers of bytes."""

from __future__ import annotations

__all__ = ["size"]


def size(count: int) -> str:
    """Format a number of bytes for humans.

    Examples
    --------
    >>> size(999), size(4_300_000_000)
    ('999 bytes', '4.3 GB')
    """
    number = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    if unit == "bytes":
        return f"{count} bytes"
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"

"""The laws of ``book.toml``: what must hold, in order. Tests are marked with their ids."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

__all__ = ["BOOK", "Law", "laws"]

BOOK = Path(__file__).with_name("book.toml")


@dataclasses.dataclass(frozen=True)
class Law:
    """One law: the title of its group, and what it says."""

    group: str
    says: str


def laws(path: Path = BOOK) -> dict[str, Law]:
    """All laws by their ids, in the order of the file.

    Raises
    ------
    ValueError
        If two laws have one id, or say the same.
    """
    found: dict[str, Law] = {}
    for group in tomllib.loads(path.read_text(encoding="utf-8"))["group"]:
        for law, says in group["laws"].items():
            if law in found:
                raise ValueError(f"{path.name} has the id {law!r} twice")
            if says in {other.says for other in found.values()}:
                raise ValueError(f"{path.name} says twice: {says}")
            found[law] = Law(group["title"], says)
    return found

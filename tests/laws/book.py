"""The laws, and which test is of which."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["BOOK", "TESTS", "Law", "laws", "of_test"]

TESTS = Path(__file__).parents[1]
BOOK = Path(__file__).with_name("book.toml")


@dataclasses.dataclass(frozen=True)
class Law:
    """One law.

    Attributes
    ----------
    number : int
        From 1, in the order of the book.
    group, says : str
    tests : tuple of str
        ``file.py::function``, the file below ``tests``.
    """

    number: int
    group: str
    says: str
    tests: tuple[str, ...]


def laws(path: Path = BOOK) -> list[Law]:
    """All laws of the book.

    Raises
    ------
    ValueError
        If a test that is named is not there, or the book says something twice.
    """
    found: list[Law] = []
    for group in tomllib.loads(path.read_text(encoding="utf-8"))["group"]:
        for law in group["law"]:
            found.append(Law(len(found) + 1, group["title"], law["says"], tuple(law["tests"])))
    said = [law.says for law in found]
    if twice := sorted({one for one in said if said.count(one) > 1}):
        raise ValueError(f"{path.name} says twice: {twice[0]}")
    functions: dict[str, set[str]] = {}
    for law in found:
        for test in law.tests:
            file, _, function = test.partition("::")
            if file not in functions:
                text = (TESTS / file).read_text(encoding="utf-8") if (TESTS / file).is_file() else ""
                functions[file] = set(re.findall(r"^ *(?:async )?def (test_\w+)", text, flags=re.MULTILINE))
            if function not in functions[file]:
                raise ValueError(f"{path.name} names {test} for {law.says!r}, which is not there")
    return found


def of_test(found: list[Law]) -> Mapping[str, list[int]]:
    """Of every test that is named, the numbers of its laws."""
    numbers: dict[str, list[int]] = {}
    for law in found:
        for test in law.tests:
            numbers.setdefault(test, []).append(law.number)
    return numbers

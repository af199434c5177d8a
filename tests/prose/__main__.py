"""Lint the prose of the README, the pages, the changelog and the docstrings: ``python -m tests.prose``.

The rules are in ``words.toml``: our own words, and the checks of proselint that suit technical prose. proselint knows
neither reStructuredText nor code, so it gets the sentences alone.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from proselint.checks import __register__
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

from .text import of_markdown, of_python, of_rst

__all__ = ["Finding", "find", "main", "sources"]

ROOT = Path(__file__).parents[2]
RULES = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))
WORDS = {re.compile(rf"\b{words}\b".replace(" ", r"\s+"), re.IGNORECASE): use for words, use in RULES["words"].items()}
REPEATED = re.compile(r"(?<![\w-])([a-z]+)(?: +| *\n *)\1\b")
READ = {".md": of_markdown, ".rst": of_rst, ".py": of_python}


class Finding(NamedTuple):
    """A place and what to change there."""

    line: int
    says: str


def find(text: str) -> list[Finding]:
    """Return what the rules find in sentences, in the order of lines."""
    found = [
        Finding(text.count("\n", 0, match.start()) + 1, f"{' '.join(match[0].split())!r}: {use}")
        for pattern, use in {**WORDS, REPEATED: "repeated"}.items()
        for match in pattern.finditer(text)
        if pattern is not REPEATED or match[1] not in RULES["repeatable"]
    ]
    if text.strip():
        config: Any = {"max_errors": 1000, "checks": dict.fromkeys(RULES["proselint"]["checks"], True)}
        for result in LintFile("", text).lint(config):
            start, end = (place - 1 for place in result.check_result.span)  # it adds a line at the start
            said = " ".join(text[max(0, start) : end].split())
            if said.lower() not in RULES["proselint"]["allowed"]:
                found.append(
                    Finding(text.count("\n", 0, max(0, start)) + 1, f"{said!r}: {result.check_result.message}")
                )
    return sorted(found)


def sources() -> Iterator[tuple[Path, str]]:
    """Yield the sentences of each file, in lines of the same numbers."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").rglob("*.rst")]
    code = [path for folder in ("tnadapt", "examples", "paper") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(pages) + sorted(code):
        if not {"generated", "auto_examples", "_build"} & set(path.parts):
            yield path, READ[path.suffix](path.read_text(encoding="utf-8"))


def main() -> None:
    """Print what is found, a line each; exit with 1 if there is something."""
    CheckRegistry().register_many(__register__)
    found = [(path, *finding) for path, text in sources() for finding in find(text)]
    for path, line, says in found:
        print(f"{path.relative_to(ROOT)}:{line}: {says}")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""The page of the laws: ``python -m tests.laws.page RUN`` makes it of what ``pytest --laws RUN`` counted.

``--check`` changes nothing, and says where a run shows less than the page does: a law that failed, that skipped cases
for a new reason, or of which fewer cases passed.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COUNTS", "PAGE", "page", "shortcomings"]

# What another machine may lack: a reason that contains one of these may keep cases from being run there.
LACKING = ("cupy is not installed", "no CUDA device", "finds no device", "by root alone", "C++ compiler", "no NVRTC")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "laws.md"
COUNTS = DOCS / "laws.json"

HEAD = """# The laws

What must hold, and how many cases of a run of the tests showed it. `python -m pytest --laws FILE` counts, `python -m
tests.laws.page FILE` makes this page of it; `tests/laws/book.toml` names the tests of every law. CI counts anew, and
does not pass if a case of a law fails, if a law has none that passes, or if cases are gone or skipped for a reason that
is neither in the table below nor the machine's.

A *case* is a test with one set of parameters. *drawn*: so many of them are not one case but a search by Hypothesis,
over up to sixty examples of configs, shapes and numbers unless the test says otherwise (`HYPOTHESIS_PROFILE=long`: six
hundred). A case can be of several laws; with those that were skipped there are {cases:,} in all. *of*: methods,
configs, models or faults by name, and the folds. A test that names no library is counted as that of its folder, or of
the library without which it cannot run, or NumPy's.
"""


def page(counted: Mapping[str, Any]) -> str:
    """The page, as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in counted["versions"].items())
    text = [HEAD.format(cases=counted["cases"])]
    text += [f"\nCounted on {counted['system']}, Python {counted['python']}: {versions}.\n"]
    group, number = None, 0
    for law in counted["laws"]:
        if law["group"] != group:
            group, number = law["group"], number + 1
            text += [f"\n## {number}. {group}\n\n", _row(["law", "cases", "drawn", "libraries", "dtypes", "of"])]
            text += [_row(["---"] * 6)]
        text += [_row(_cells(law))]
    text += ["\n## Skipped\n\n", _row(["law", "cases", "why"]), _row(["---"] * 3)]
    for law in counted["laws"]:
        text += [_row([law["says"], f"{count:,}", _plain(reason)]) for reason, count in law["skipped"].items()]
    return "".join(text)


def _cells(law: Mapping[str, Any]) -> list[str]:
    names = [textwrap.shorten(name, 40, placeholder="…") for name in law["variants"]]
    some = f"{len(names)}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else ""
    folds = f"folds {', '.join(law['folds'])}" if law["folds"] else ""
    return [
        law["says"],
        f"{law['passed']:,}",
        f"{law['drawn']:,}" if law["drawn"] else "",
        ", ".join(law["libraries"]),
        ", ".join(law["dtypes"]),
        _plain("; ".join(filter(None, (some, folds)))),
    ]


def _plain(text: str) -> str:
    """As a cell of a table holds it."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def shortcomings(counted: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """What a run lacks of what the page states.

    Another machine may have no card, or no root: so many cases more than the page's may be skipped for it. A case that
    is skipped for a reason that the page does not have is missing.

    Examples
    --------
    >>> law = {"says": "a = a", "passed": 3, "failed": 0, "skipped": {}}
    >>> shortcomings({"laws": [{**law, "passed": 2}]}, {"laws": [law]})
    ["'a = a' passed 2 cases; the page states 3"]
    """
    before = {law["says"]: law for law in stated["laws"]}
    found = []
    for law in counted["laws"]:
        says, passed, was = law["says"], law["passed"], before.pop(law["says"], {"passed": 0, "skipped": {}})
        if law["failed"]:
            found.append(f"{says!r} failed in {law['failed']} cases")
        if not passed:
            found.append(f"{says!r} had no case that passed")
        found += [
            f"{says!r} skipped {count:,} cases: {reason}"
            for reason, count in law["skipped"].items()
            if reason not in was["skipped"] and not _of_the_machine(reason)
        ]
        more = max(0, _kept_by_the_machine(law) - _kept_by_the_machine(was))
        if passed + more < was["passed"]:
            found.append(f"{says!r} passed {passed:,} cases; the page states {was['passed']:,}")
    return found + [f"{says!r} is on the page and no more in the book" for says in before]


def _of_the_machine(reason: str) -> bool:
    return any(lack in reason for lack in LACKING)


def _kept_by_the_machine(law: Mapping[str, Any]) -> int:
    return sum(count for reason, count in law["skipped"].items() if _of_the_machine(reason))


def main() -> None:
    """Make the page, or check it."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("run", type=Path, help="what pytest --laws counted")
    given.add_argument("--check", action="store_true")
    asked = given.parse_args()
    counted = json.loads(asked.run.read_text(encoding="utf-8"))
    if not asked.check:
        COUNTS.write_text(json.dumps(counted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(counted), encoding="utf-8")
        return
    lacking = shortcomings(counted, json.loads(COUNTS.read_text(encoding="utf-8")))
    total = sum(law["passed"] > 0 for law in counted["laws"])
    print(f"{total} laws held in {counted['cases']:,} cases")
    if lacking:
        raise SystemExit("the laws are not what docs/laws.md states:\n" + "\n".join(lacking))


if __name__ == "__main__":
    main()

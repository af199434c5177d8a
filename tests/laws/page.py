"""The page of the laws: ``python -m tests.laws.page FILE...`` generates it from reports of ``pytest --junitxml FILE``.

Several files are the parts of one run. ``--check`` changes nothing, and reports where a run falls short of the page:
a law that failed, that skipped cases for a new reason, or of which fewer cases passed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tnadapt.report import TextTable

from .book import laws

__all__ = ["COUNTS", "PAGE", "count", "page", "shortcomings"]

# What another machine may lack: a skip reason that contains one of these is accepted there.
LACKING = ("cupy is not installed", "no CUDA device", "finds no device", "by root alone", "C++ compiler", "no NVRTC")
PACKAGES = ("tnadapt", "numpy", "scipy", "torch", "jax", "peft", "transformers", "hypothesis", "pytest")

PAGE = Path(__file__).with_name("laws.md")
COUNTS = Path(__file__).with_name("laws.json")

HEAD = """# The laws

{laws} held in one run of the tests, with {cases:,} cases{failed}.

"""

ABOUT = """
`tests/laws/book.toml` lists the laws; the tests of each are marked with its id, `@pytest.mark.law("id")`. `python -m
pytest --junitxml FILE` reports what passed, and `python -m tests.laws.page FILE` generates this page from it. CI
repeats the count, and fails if a case of a law fails, if a law has no passing case, or if cases are missing or skipped
for a reason that is neither in the last table nor due to the machine.

A *case* is a test with one set of parameters. *drawn* counts the cases that are not single examples but a search by
Hypothesis, over up to 25 examples of configs, shapes and numbers unless the test says otherwise
(`HYPOTHESIS_PROFILE=long`: six hundred). A case can belong to several laws, and to several groups; skipped ones are
among the {cases:,}. *of* lists methods, configs, models or faults by name, and the folds. A test that names no library
counts for the library that its module imports, or else for NumPy.

Counted on {system}, Python {python}: {versions}.
"""


def count(reports: Sequence[Path]) -> dict[str, Any]:
    """Count the cases of each law in JUnit reports."""
    cases: dict[tuple[str | None, str | None], dict[str, Any]] = {}
    for path in reports:
        for case in ElementTree.parse(path).iter("testcase"):
            recorded = [(one.get("name"), one.get("value")) for one in case.iter("property")]
            if any(name == "law" for name, _ in recorded):
                key = case.get("classname"), case.get("name")
                # A test that passed has a second entry if its teardown fails.
                if cases.get(key, {}).get("outcome") != "failed":
                    cases[key] = {"recorded": recorded, **_outcome(case)}
    return {
        "cases": len(cases),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "laws": [
            {"id": law, "group": entry.group, "says": entry.says}
            | _counts([case for case in cases.values() if ("law", law) in case["recorded"]])
            for law, entry in laws().items()
        ],
    }


def _outcome(case: ElementTree.Element) -> dict[str, str]:
    if case.find("failure") is not None or case.find("error") is not None:
        return {"outcome": "failed"}
    skipped = case.find("skipped")
    return {"outcome": "passed"} if skipped is None else {"outcome": "skipped", "reason": skipped.get("message", "")}


def _counts(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    passed = [case["recorded"] for case in cases if case["outcome"] == "passed"]
    reasons = [case["reason"] for case in cases if case["outcome"] == "skipped"]
    of = {"libraries": "library", "dtypes": "dtype", "folds": "fold", "variants": "variant"}
    return {
        "passed": len(passed),
        "failed": sum(case["outcome"] == "failed" for case in cases),
        "drawn": sum(name == "drawn" for recorded in passed for name, _ in recorded),
        "skipped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **{
            key: sorted({value for recorded in passed for name, value in recorded if name == what})
            for key, what in of.items()
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def page(counted: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in counted["versions"].items())
    held = [law for law in counted["laws"] if law["passed"] and not law["failed"]]
    failed = "" if len(held) == len(counted["laws"]) else f"; {len(counted['laws']) - len(held)} did not"
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for law in counted["laws"]:
        groups.setdefault(law["group"], []).append(law)
    titles = {group: f"{number}. {group}" for number, group in enumerate(groups, 1)}
    text = [HEAD.format(laws=_several(len(held), "law"), cases=counted["cases"], failed=failed)]
    summaries = [_summary(titles[group], own) for group, own in groups.items()]
    text += [_table(summaries, ["group", "laws", "cases", "of them drawn", "libraries"], range(1, 4))]
    text += ["\n", _folded("How this is counted", ABOUT.format(**{**counted, "versions": versions}))]
    for group, own in groups.items():
        table = _table([_cells(law) for law in own], ["law", "cases", "drawn", "libraries", "dtypes", "of"])
        # The heading stays outside: links to it work, and the groups can be skimmed.
        text += [f"\n## {titles[group]}\n\n", _folded(_several(len(own), "law"), table)]
    skipped = [
        [law["says"], f"{count:,}", _plain(reason)]
        for law in counted["laws"]
        for reason, count in law["skipped"].items()
    ]
    table = _table(skipped, ["law", "cases", "why"])
    text += ["\n## Skipped\n\n", _folded(_several(len(skipped), "reason"), table)]
    return "".join(text)


def _summary(title: str, own: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of a group: its heading as a link, counts, and the libraries."""
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    cases, drawn = (sum(law[key] for law in own) for key in ("passed", "drawn"))
    libraries = sorted({name for law in own for name in law["libraries"]})
    return [f"[{title}](#{anchor})", f"{len(own):,}", f"{cases:,}", f"{drawn:,}", ", ".join(libraries)]


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _folded(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n"


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
    """Return the text escaped for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _table(rows: Sequence[Sequence[str]], head: Sequence[str], right: Collection[int] = ()) -> str:
    return TextTable(rows, head, right).markdown() + "\n"


def shortcomings(counted: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """Return where a run falls short of what the page states, one line each.

    Another machine may have no GPU, or no root access, and may skip that many more cases than the page. A case that
    is skipped for a reason that the page does not have counts as missing.

    Examples
    --------
    >>> law = {"id": "a", "says": "a = a", "passed": 3, "failed": 0, "skipped": {}}
    >>> shortcomings({"laws": [{**law, "passed": 2}]}, {"laws": [law]})
    ["'a = a' passed 2 cases; the page states 3"]
    """
    before = {law["id"]: law for law in stated["laws"]}
    found = []
    for law in counted["laws"]:
        says, passed, was = law["says"], law["passed"], before.pop(law["id"], {"passed": 0, "skipped": {}})
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
    return found + [f"{law['says']!r} is on the page and no more in the book" for law in before.values()]


def _of_the_machine(reason: str) -> bool:
    return any(lack in reason for lack in LACKING)


def _kept_by_the_machine(law: Mapping[str, Any]) -> int:
    return sum(count for reason, count in law["skipped"].items() if _of_the_machine(reason))


def main() -> None:
    """Generate the page, or check it."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("reports", type=Path, nargs="+", help="what pytest --junitxml wrote")
    given.add_argument("--check", action="store_true")
    asked = given.parse_args()
    counted = count(asked.reports)
    if not asked.check:
        COUNTS.write_text(json.dumps(counted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(counted), encoding="utf-8")
        return
    lacking = shortcomings(counted, json.loads(COUNTS.read_text(encoding="utf-8")))
    total = sum(law["passed"] > 0 for law in counted["laws"])
    print(f"{total} laws held in {counted['cases']:,} cases")
    if lacking:
        raise SystemExit("the laws are not what tests/laws/laws.md states:\n" + "\n".join(lacking))


if __name__ == "__main__":
    main()

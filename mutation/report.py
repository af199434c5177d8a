"""The report on mutants: the reasons for survivors, the table, and whether the goal is met."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .operators import OURS

__all__ = ["GOAL", "KINDS", "Rest", "failings", "page", "reasons"]

#: The share of the mutants that are not equivalent to the code which the tests have to notice.
GOAL = 0.95
#: Why a mutant may survive: it is indistinguishable from the code; it only costs time or memory; a test is missing.
KINDS = ("equivalent", "cost", "gap")

Record = Mapping[str, Any]


class Rest(NamedTuple):
    """Mutants of the operators that are left out.

    Attributes
    ----------
    records : sequence of mapping
        The mutants that were run.
    there : int
        The number of all such mutants.
    """

    records: Sequence[Record]
    there: int


def reasons(path: Path) -> dict[str, Record]:
    """Return the reasons in ``survivors.toml``, by the key of the mutant."""
    found: dict[str, Record] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("survivor", []):
        if entry["kind"] not in KINDS or not entry["reason"].strip():
            raise SystemExit(f"{path.name}: {entry['key']} needs a reason, and one of the kinds {', '.join(KINDS)}")
        if entry["key"] in found:
            raise SystemExit(f"{path.name}: {entry['key']} is there twice")
        found[entry["key"]] = entry
    return found


def _equivalent(record: Record, known: Mapping[str, Record]) -> bool:
    return record["status"] == "survived" and known.get(record["key"], {}).get("kind") == "equivalent"


def _rate(records: Sequence[Record], known: Mapping[str, Record]) -> tuple[int, int]:
    """Return how many mutants were noticed, and how many could be."""
    could = [record for record in records if not _equivalent(record, known)]
    return sum(record["status"] != "survived" for record in could), len(could)


def failings(records: Sequence[Record], known: Mapping[str, Record], goal: bool = True) -> list[str]:
    """Return the problems of a run, one line each; empty if there are none. Without a goal, any share is accepted."""
    found = [
        f"{record['key']} survived, and survivors.toml gives no reason: {record['module']}, line {record['line']}\n"
        f"{record['change']}"
        for record in records
        if record["status"] == "survived" and record["key"] not in known
    ]
    statuses = {record["key"]: record["status"] for record in records}
    found += [
        f"{key} has a reason in survivors.toml and was noticed: take the reason out"
        for key in known
        if statuses.get(key, "survived") != "survived"
    ]
    noticed, could = _rate(records, known)
    if goal and could and noticed < GOAL * could:
        found.append(f"{noticed} of {could} mutants were noticed: {noticed / could:.1%}, and {GOAL:.0%} is the goal")
    return found


def _interval(noticed: int, of: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval."""
    z, share = 1.96, noticed / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def page(
    records: Sequence[Record],
    known: Mapping[str, Record],
    there: Mapping[str, int],
    run: Mapping[str, Any],
    rest: Rest | None = None,
) -> str:
    """Return the table in Markdown.

    Parameters
    ----------
    records : sequence of mapping
        One per mutant that was run.
    known : mapping
        The reasons.
    there : mapping of str to int
        The number of mutants of each module.
    run : mapping
        The seed, the versions, the machine.
    rest : Rest, optional
        The mutants of the operators that are left out.
    """
    counts: dict[str, Counter[str]] = {module: Counter() for module in there}
    for record in records:
        counts.setdefault(record["module"], Counter())[_kind(record, known)] += 1
    lines = [
        "# Mutation testing",
        "",
        "Written by `python -m mutation`; how it works is in `CONTRIBUTING.md`. "
        + ", ".join(f"{name}: {value}" for name, value in run.items())
        + ".",
        "",
    ]
    noticed, could = _rate(records, known)
    if could:
        late = sum(record.get("first") == "survived" and record["status"] != "survived" for record in records)
        low, high = _interval(noticed - late, could)
        of = sum(there.values())
        sampled = (
            f"Of {of:,} mutants, {len(records):,} were drawn at random and run"
            if len(records) < of
            else f"All {of:,} mutants were run"
        )
        equivalent = len(records) - could
        lines += [
            f"{sampled}. {equivalent} of them are equivalent to the code. Of the other {could:,} the tests notice "
            f"{noticed:,}: **{noticed / could:.1%}**. {late} of these had survived at first, and tests were added for "
            f"them. Without these tests it was {(noticed - late) / could:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            "which is the estimate for mutants that were not run.",
            "",
        ]
        lines += [*_together(records, known, of, rest), ""] if rest is not None else []
    columns = ("killed", "timeout", "equivalent", "cost", "gap", "unexplained")
    lines += [
        "| module | mutants | run | killed | out of time | equivalent | cost only | gap | no reason yet |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for module in sorted(counts):
        if total := sum(counts[module].values()):
            cells = [there.get(module, 0), total, *(counts[module][column] for column in columns)]
            lines.append(f"| {module.removeprefix('tnadapt/')} | " + " | ".join(map(str, cells)) + " |")
    together = sum(counts.values(), Counter())
    cells = [sum(there.values()), len(records), *(together[column] for column in columns)]
    lines.append("| **all** | " + " | ".join(map(str, cells)) + " |")
    survivors = [record for record in records if record["status"] == "survived"]
    if survivors:
        lines += ["", "## Survivors", ""]
    for record in sorted(survivors, key=lambda record: (record["module"], record["line"], record["key"])):
        entry = known.get(record["key"], {"kind": "no reason yet", "reason": ""})
        where = f"`{record['module'].removeprefix('tnadapt/')}`, `{record['function'] or 'the module itself'}`"
        lines += [f"* {where} ({record['key']}), {entry['kind']}. {entry['reason']}".rstrip(), "", "  ```diff"]
        lines += [f"  {line}" for line in record["change"].splitlines()] + ["  ```"]
    return "\n".join(lines) + "\n"


def _together(records: Sequence[Record], known: Mapping[str, Record], of: int, rest: Rest) -> list[str]:
    """Return the share over all of cosmic-ray's mutants, with the two kinds weighted by their numbers."""
    noticed, could = _rate(rest.records, known)
    theirs = [record for record in records if record["operator"] not in OURS]
    share, late = _share(theirs, known), _share(theirs, known, late=False)
    some = round(of * len(theirs) / len(records))  # the number of ours is estimated from the sample

    def over_all(one: float) -> float:
        return (one * some + noticed / could * rest.there) / (some + rest.there)

    return [
        f"cosmic-ray's other operators, which mutate the same places in more ways, are left out. They make "
        f"{rest.there:,} more mutants. Of {could:,} that were drawn at random and are not equivalent, the tests notice "
        f"{noticed:,}. Over all mutants of cosmic-ray, each part weighted by its size, the share is "
        f"**{over_all(share):.1%}**. Without the tests that were added for survivors it is {over_all(late):.1%}, "
        "which is the estimate for all of them.",
    ]


def _share(records: Sequence[Record], known: Mapping[str, Record], late: bool = True) -> float:
    noticed, could = _rate(records, known)
    if not late:
        noticed -= sum(record.get("first") == "survived" and record["status"] != "survived" for record in records)
    return noticed / could


def _kind(record: Record, known: Mapping[str, Record]) -> str:
    if record["status"] != "survived":
        return str(record["status"])
    return str(known[record["key"]]["kind"]) if record["key"] in known else "unexplained"

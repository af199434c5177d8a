"""Compare the speed of this working tree with the committed results: ``python benchmarks/short.py [GROUP …]``.

Measures some cases of every part of the library as ratios to a peer or to a limit, in at most five minutes on two idle
cores, and prints each ratio, that of ``results/short.jsonl``, and their quotient; a quotient above the tolerance
(``--tolerance``, 1.25) is marked. The exit status is 0 all the same, or 1 if ``--fail-above FACTOR`` is given and a
quotient exceeds the factor.

The two of a case take turns in one process, on one thread of BLAS and torch, and the ratio is the median over the
rounds of the ratio within a round: other machines and other load change the times more than the ratios. *low* and
*high* are its quartiles. Times are of the processor (of all threads), but of the clock on the wall for merges. Measure
twice before you believe a mark: a quotient that is noise comes out differently.

``--record`` stores what was measured as the new committed results of these groups. ``--smoke`` runs each case once, on
tiny sizes, and stores nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from short_cases import CASES, GROUPS, Case, Run, one_thread

from tnadapt.report import TextTable

__all__ = ["Line", "compare", "main", "measure", "read", "table", "turns"]

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "short.jsonl"
#: Rounds of a case, at least, and its seconds, at most beyond that.
ROUNDS, SECONDS = 5, 2.0
#: Seconds of one contestant in a round, at least: shorter calls are repeated.
TURN = 0.005
TOLERANCE = 1.25

Row = dict[str, Any]


# -- Measuring -------------------------------------------------------------------------------


def turns(ours: Run, theirs: Run, clock: Callable[[], float], smoke: bool) -> Row:
    """Return the median ratio of two contestants that take turns, its quartiles, and their median seconds."""
    runs, times = (ours, theirs), ([], [])  # type: tuple[Run, Run], tuple[list[float], list[float]]
    repeats = [_repeats(run, clock, smoke) for run in runs]
    began = time.perf_counter()
    while True:
        first = len(times[0]) % 2
        for which in (first, 1 - first):
            start = clock()
            for _ in range(repeats[which]):
                runs[which]()
            times[which].append((clock() - start) / repeats[which])
        if smoke or (len(times[0]) >= ROUNDS and time.perf_counter() - began > SECONDS):
            break
    ratios = [mine / other for mine, other in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "ratio": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "seconds": float(f"{statistics.median(times[0]):.4g}"),
        "other": float(f"{statistics.median(times[1]):.4g}"),
        "rounds": len(ratios),
    }


def _repeats(run: Run, clock: Callable[[], float], smoke: bool) -> int:
    """Return how often to repeat a call in a round, after a first one that compiles and fills caches."""
    run()
    start = clock()
    run()
    return 1 if smoke else max(1, int(TURN / max(clock() - start, 1e-9)))


def measure(case: Case, smoke: bool = False) -> Row:
    """Measure one case; where a peer is not installed, the row has no ratio but says which."""
    row: Row = {"case": case.name, "over": case.over}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")  # of peers
        try:
            ours, theirs = case.build(smoke, Path(folder))
        except ImportError as missing:
            return {**row, "missing": str(missing)}
        return {**row, **turns(ours, theirs, case.clock, smoke)}


def run(group: str) -> list[Row]:
    """Measure one group in a process of its own."""
    code = (
        "import json, sys; import short, short_cases;"
        f"rows = [short.measure(case) for case in short_cases.GROUPS[{group!r}]];"
        "open(sys.argv[1], 'w', encoding='utf-8').write(json.dumps(rows))"
    )
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "rows.json"
        subprocess.run([sys.executable, "-c", code, str(made)], cwd=HERE, env=environment, check=True)
        found: list[Row] = json.loads(made.read_text(encoding="utf-8"))
    return found


# -- Comparing -------------------------------------------------------------------------------


class Line(NamedTuple):
    """A case with the committed ratio and the quotient of the two; None for what is missing."""

    case: str
    over: str
    ratio: float | None
    committed: float | None
    quotient: float | None
    mark: str


def compare(rows: Sequence[Mapping[str, Any]], committed: Sequence[Mapping[str, Any]], tolerance: float) -> list[Line]:
    """Return a line for each row; ratios are times over another's, so that a larger one is worse."""
    known = {row["case"]: row.get("ratio") for row in committed}
    lines = []
    for row in rows:
        ratio, before = row.get("ratio"), known.get(row["case"])
        quotient = None if ratio is None or before is None else ratio / before
        if quotient is None:
            mark = "not installed" if ratio is None else "new"
        else:
            mark = "WORSE" if quotient > tolerance else "better" if quotient < 1 / tolerance else ""
        lines.append(Line(row["case"], row["over"], ratio, before, quotient, mark))
    return lines


def table(lines: Sequence[Line]) -> str:
    """Render the lines for a terminal."""
    rows = []
    for line in lines:
        numbers = ["–" if one is None else f"{one:.3g}" for one in (line.ratio, line.committed, line.quotient)]
        rows.append((line.case, line.over, *numbers, line.mark))
    return str(TextTable(rows, ("case", "over", "ratio", "committed", "quotient", ""), range(2, 5)))


def read() -> list[Row]:
    """Return the stored rows, without the line of the machine; none if there is no file."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()[1:]]


def record(rows: Sequence[Row]) -> None:
    """Store rows in place of the committed ones of the same cases."""
    from machine import machine

    known = {row["case"]: row for row in [*read(), *rows]}
    lines = [{**machine(), "part": "short"}, *(known[name] for name in CASES if name in known)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    RESULTS.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"one of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="quotients above it are marked")
    parser.add_argument("--fail-above", type=float, metavar="FACTOR", help="exit with 1 if a quotient is above it")
    parser.add_argument("--record", action="store_true", help="store the ratios as the committed ones")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing stored")
    given = parser.parse_args(arguments)
    unknown = [group for group in given.groups if group not in GROUPS]
    if unknown:
        parser.error(f"no group {unknown[0]!r}; expected one of {', '.join(GROUPS)}")
    if given.smoke and (given.record or given.fail_above):
        parser.error("--smoke measures nothing that could be recorded or compared: leave out --record and --fail-above")
    committed = [] if given.smoke else read()
    began, rows = time.perf_counter(), []
    for group in given.groups or GROUPS:
        print(f"{group} …", file=sys.stderr, flush=True)
        # One process for the smoke run, in which importing the libraries takes most of the time.
        found = [measure(case, smoke=True) for case in GROUPS[group]] if given.smoke else run(group)
        if given.record:
            record(found)
        rows += found
    lines = compare(rows, committed, given.tolerance)
    print(table(lines))
    print(f"{time.perf_counter() - began:.0f} s")
    limit = given.fail_above
    return int(limit is not None and any(line.quotient is not None and line.quotient > limit for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())

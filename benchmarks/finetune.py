"""``tnadapt finetune`` on the digits with several seeds: ``python benchmarks/finetune.py FOLDER``.

Compares the usual methods at several rates with three seeds, and stores the results next to this file:
``results/digits.jsonl``, one line per training run, and derived from it ``results/digits.csv``, the table, and
``results/digits.png``, the plot. FOLDER has the run and the pretrained model. On two idle cores it takes five minutes.
An interrupted run resumes. :mod:`benchmarks.quality` compares more methods on more tasks.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

from tnadapt.errors import spreadsheet_text
from tnadapt.finetune.pareto_report import Point, columns, points_in, rows_of

RESULTS = Path(__file__).parent / "results"

# Every method is trained at these, and the best is chosen by validation samples.
RATES = (0.005, 0.01, 0.02)


def table(results: Path) -> str:
    """Return the table of a file of results as CSV, to which ``docs/finetune.rst`` links."""
    points: list[Point] = points_in(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # Without the seconds, which come from parallel runs on a machine that may have been busy.
    writer.writerow(columns(len(points[0].test))[:-1])
    writer.writerows(map(spreadsheet_text, row[:-1]) for row in rows_of(points))
    return text.getvalue()


def main() -> None:
    """Run, copy the results, and write the table."""
    parser = argparse.ArgumentParser(description="tnadapt finetune on the digits with several seeds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    out, cache = options.folder / "runs" / "digits", options.folder / "cache"
    rates = [word for rate in RATES for word in ("--lr", str(rate))]
    where = ["--seeds", str(options.seeds), "--jobs", str(options.jobs), "--out", str(out), "--cache", str(cache)]
    subprocess.run([sys.executable, "-m", "tnadapt", "finetune", *rates, *where], check=True)
    kept = RESULTS / "digits.jsonl"
    shutil.copyfile(out / "results.jsonl", kept)
    shutil.copyfile(out / "pareto.png", RESULTS / "digits.png")
    (RESULTS / "digits.csv").write_text(table(kept), encoding="utf-8")


if __name__ == "__main__":
    main()

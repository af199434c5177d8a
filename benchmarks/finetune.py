"""``tnadapt finetune`` with several seeds: ``python benchmarks/finetune.py NAME FOLDER``.

``digits``, ``reviews`` and ``cifar10`` compare the usual methods; ``few`` those of few parameters, on reviews.

Fetches missing models and data into FOLDER (see ``paper.registries``), compares methods at several rates with
three seeds, and stores the results next to this file: ``results/NAME.jsonl``, one line per training run, and derived
from it ``results/NAME.csv``, the table, and ``results/NAME.png``, the plot. On two idle cores, the digits take five
minutes and the others half an hour each. An interrupted run resumes from the existing results.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

from paper.registries import SOURCES, fetch
from tnadapt.errors import spreadsheet_text
from tnadapt.finetune.pareto_report import Point, columns, points_in, rows_of

RESULTS = Path(__file__).parent / "results"

# Every method is trained at these, and the best is chosen by validation samples.
RATES = (0.005, 0.01, 0.02)

# fmt: off
OPTIONS = {
    "digits": [],
    "reviews": ["--limit", "2000", "--epochs", "2", "--batch", "16"],
    "few": [
        "--limit", "2000", "--epochs", "2", "--batch", "16", "--preset", "tinylora", "--preset", "unilora", "--preset",
        "lora_xs", "--preset", "vera",
    ],
    "cifar10": ["--limit", "1000", "--epochs", "2", "--batch", "16", "--image-size", "56"],
}
# fmt: on


def run(name: str, folder: Path, seeds: int, jobs: int) -> Path:
    """Run the command for one of them, resuming from the stored results; return the run's folder."""
    given: list[str] = []
    if name in SOURCES:
        model, data = fetch(name, folder)
        given = ["--model", str(model), "--data", str(data)]
    out = folder / "runs" / name
    kept = RESULTS / f"{name}.jsonl"
    if kept.is_file() and not (out / "results.jsonl").is_file():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, out / "results.jsonl")
    rates = [word for rate in RATES for word in ("--lr", str(rate))]
    where = ["--seeds", str(seeds), "--jobs", str(jobs), "--out", str(out), "--cache", str(folder / "cache")]
    command = [sys.executable, "-m", "tnadapt", "finetune", *given, *OPTIONS[name], *rates, *where]
    subprocess.run(command, check=True)
    return out


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
    parser = argparse.ArgumentParser(description="tnadapt finetune with several seeds.")
    parser.add_argument("name", choices=OPTIONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    out = run(given.name, given.folder, given.seeds, given.jobs)
    kept = RESULTS / f"{given.name}.jsonl"
    shutil.copyfile(out / "results.jsonl", kept)
    shutil.copyfile(out / "pareto.png", RESULTS / f"{given.name}.png")
    (RESULTS / f"{given.name}.csv").write_text(table(kept), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compare the paper's claims with results: ``python -m paper.report``; ``--from NAME=FOLDER`` copies new results in.

``python -m paper NAME --scale mini --out FOLDER`` produces results; ``paper/results/NAME`` has those copied in. The
page ``paper/results/claims.md``, its figures, and the ``summary.rst`` in the documentation are generated from these
files alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from .claims import page, summary
from .compared_studies import ORDER, first_images, studies
from .recipe import open_recipe
from .run import redraw

__all__ = ["RESULTS", "take", "write"]

#: The results and figures in the repository.
RESULTS = Path(__file__).parent / "results"

#: The files of a run that are copied.
KEPT = ("results.jsonl", "geometry.jsonl")


def take(name: str, folder: Path) -> None:
    """Copy the results of a run, and of generated images only those that the figure shows."""
    if name not in ORDER or not (folder / KEPT[0]).is_file():
        raise SystemExit(f"--from NAME=FOLDER needs one of {', '.join(ORDER)} and a folder with {KEPT[0]}")
    place = RESULTS / name
    place.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, place / file)
    if (folder / "images").is_dir():
        shutil.rmtree(place / "images", ignore_errors=True)
        (place / "images").mkdir()
        for path in first_images(place):
            shutil.copyfile(folder / "images" / Path(path).name, place / "images" / Path(path).name)


def write(results: Path, out: Path) -> None:
    """Write ``claims.md``, its ``summary.rst``, and the figures of every study next to it."""
    found = studies(results)
    for name in (name for name, study in found.items() if study.pictured):
        (out / name).mkdir(parents=True, exist_ok=True)
        redraw(open_recipe(name, "mini"), results / name, out / name)
    (out / "claims.md").write_text(page(found), encoding="utf-8")
    (out / "summary.rst").write_text(summary(found), encoding="utf-8")


def main() -> None:
    """Copy new results, then write the page and its figures."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--from", dest="taken", action="append", default=[], metavar="NAME=FOLDER")
    for one in given.parse_args().taken:
        name, _, folder = one.partition("=")
        take(name, Path(folder))
    write(RESULTS, RESULTS)


if __name__ == "__main__":
    main()

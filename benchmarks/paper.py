"""The paper's claims, held against results: ``python benchmarks/paper.py``; ``--from NAME=FOLDER`` takes new ones in.

``tnadapt reproduce NAME --scale mini --out FOLDER`` makes results; what is taken in lies in ``results/paper/NAME``. The
page ``results/paper/claims.md`` and its figures are made of these files and of nothing else.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import claims

from tnadapt.reproduce import open_recipe, redraw

RESULTS = Path(__file__).parent / "results" / "paper"

#: What is kept of a run.
KEPT = ("results.jsonl", "geometry.jsonl")


def take(name: str, folder: Path) -> None:
    """The results of a run, and of generated images the few that the figure shows."""
    if name not in claims.ORDER or not (folder / KEPT[0]).is_file():
        raise SystemExit(f"--from NAME=FOLDER: a name of {', '.join(claims.ORDER)} and a folder with {KEPT[0]}")
    place = RESULTS / name
    place.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, place / file)
    if (folder / "images").is_dir():
        shutil.rmtree(place / "images", ignore_errors=True)
        (place / "images").mkdir()
        for path in claims.first_images(place):
            shutil.copyfile(folder / "images" / Path(path).name, place / "images" / Path(path).name)


def write(results: Path, out: Path) -> None:
    """``claims.md``, and the figures of every study beside it."""
    studies = claims.studies(results)
    for name in (name for name, study in studies.items() if study.pictured):
        (out / name).mkdir(parents=True, exist_ok=True)
        redraw(open_recipe(name, "mini"), results / name, out / name)
    (out / "claims.md").write_text(claims.page(studies), encoding="utf-8")


def main() -> None:
    """Take in, and write."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--from", dest="taken", action="append", default=[], metavar="NAME=FOLDER")
    for one in given.parse_args().taken:
        name, _, folder = one.partition("=")
        take(name, Path(folder))
    write(RESULTS, RESULTS)


if __name__ == "__main__":
    main()

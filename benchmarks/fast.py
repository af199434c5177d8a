"""Measure speed against peers: ``python benchmarks/fast.py [PART …] [--smoke]``.

Runs the parts (all of them without arguments), each in a separate process, and stores the measurements next to this
file, in ``results/fast/PART.jsonl``: a first line with the machine and the versions, then one line per case.
From these files it then generates the page ``results/speed.md``, which the documentation shows, and its picture;
``--page`` only does this. Running one part alone replaces its results and no others.

Times are medians of contestants that alternate in one process; the comparison is by their ratio. Keep the machine
otherwise idle. ``--smoke`` runs each part on tiny sizes into a temporary folder, in a minute: it checks that the parts
run, not their speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fast"

#: The title of each part, and the number of threads for its array libraries.
PARTS = {
    "steps": ("training steps against PEFT and LyCORIS", 2),
    "memory": ("peak memory of a training step", 2),
    "decoding": ("decoding with adapters that are not merged", 2),
    "strategies": ("how a layer applies its update", 2),
    "files": ("planning, extraction and merging", 1),
    "gpu": ("on a GPU", 2),
}

#: Results of scripts of their own, whose files are next to the folder of the parts', which the page shows, too.
OTHERS = ("short", "decompositions")


def run(part: str, folder: Path, smoke: bool) -> None:
    """Run one part in a separate process, so that no other part's threads, caches or memory affect it."""
    code = (
        f"import json, sys; from pathlib import Path; import machine, {part};"
        f"rows = {part}.measure({smoke});"
        f"lines = [dict(machine.machine(), part='{part}'), *rows];"
        "Path(sys.argv[1]).write_text(''.join(json.dumps(line, ensure_ascii=False) + '\\n' for line in lines))"
    )
    threads = str(PARTS[part][1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    # Some machines restrict OpenBLAS for the tests; the benchmark would then measure its older kernels.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        environment.pop(name, None)
    folder.mkdir(parents=True, exist_ok=True)
    # Written to a new file and renamed: a part that fails or is stopped leaves the old results intact.
    made = folder / f"{part}.jsonl"
    new = made.with_suffix(".new")
    subprocess.run([sys.executable, "-c", code, str(new)], cwd=HERE, env=environment, check=True)
    new.replace(made)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return a mapping of part to its lines, the first being the machine; those without results are omitted."""
    paths = [*(folder / f"{part}.jsonl" for part in PARTS), *(folder.parent / f"{part}.jsonl" for part in OTHERS)]
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in paths
        if path.is_file()
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing kept")
    parser.add_argument("--page", action="store_true", help="only generate the page from existing results")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; expected one of {', '.join(PARTS)}")
    import page

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if given.smoke else RESULTS
        for part in [] if given.page else given.parts or PARTS:
            began = time.perf_counter()
            print(f"{part}: {PARTS[part][0]} …", flush=True)
            run(part, folder, given.smoke)
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        if given.smoke:
            return 0
        page.write(read(RESULTS), HERE / "results")
    print(f"page: {(HERE / 'results' / 'speed.md')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

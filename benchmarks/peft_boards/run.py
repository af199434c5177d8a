"""Run an experiment on one of PEFT's boards, with tnadapt's plug-in: ``python run.py BOARD EXPERIMENT``.

BOARD is a folder of ``method_comparison/`` in a clone of PEFT, such as ``../peft/method_comparison/MetaMathQA``, and
EXPERIMENT one of the folders here, such as ``experiments/tnadapt/llama-3.2-3B-unilora-1000``, or one in BOARD. Options
after them are those of the board's own ``run.py``, which is run unchanged, after the plug-in has been registered::

    pip install -e ../peft -r ../peft/method_comparison/MetaMathQA/requirements.txt
    python benchmarks/peft_boards/run.py ../peft/method_comparison/MetaMathQA \\
        experiments/tnadapt/llama-3.2-3B-unilora-1000 -v --clean

The board writes its result file to its own folder. It needs a GPU, Python 3.12, and the Hub for the model and the data.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
USAGE = "usage: run.py BOARD EXPERIMENT [options of the board's run.py]"


def main(arguments: Sequence[str]) -> None:
    """Check what can be checked before a model is loaded, and run the board."""
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        raise SystemExit(f"{USAGE}\n\n{__doc__}")
    board = Path(arguments[0]).resolve()
    if not (board / "run.py").is_file():
        raise SystemExit(f"{board} has no run.py: give a folder of method_comparison/ in a clone of PEFT")
    home = home_of(board, arguments[1])
    check_python()
    check_branch(board)
    launch(board, home, arguments[1], arguments[2:])


def home_of(board: Path, experiment: str) -> Path:
    """Return the folder that an experiment's path is relative to: this board's folder here, or the board's own."""
    places = (HERE / board.name, board)
    for home in places:
        if (home / experiment).is_dir():
            return home
    there = sorted(path.name for path in (HERE / board.name).glob("experiments/tnadapt/*"))
    listed = "".join(f"\n  experiments/tnadapt/{name}" for name in there) or " none"
    where = " or ".join(map(str, places))
    raise SystemExit(f"no folder {experiment} in {where}. tnadapt's experiments on this board:{listed}")


def check_python() -> None:
    """Stop where the board would record a file size of 99999999, because its ``tempfile`` is that of Python 3.12."""
    if sys.version_info < (3, 12):
        raise SystemExit(f"PEFT's boards need Python 3.12 or newer; this is {sys.version.split()[0]}")


def check_branch(board: Path) -> None:
    """Stop where the board could not ask git for the branch of PEFT, which it records."""
    import peft

    place = Path(peft.__file__).parent
    asked = subprocess.run(["git", "rev-parse", "--abbrev-ref", "HEAD"], cwd=place, capture_output=True, check=False)
    if asked.returncode:
        raise SystemExit(
            f"the board records the git branch of PEFT, and {place} is not in a git repository: install PEFT from the "
            f"clone with\n  pip install -e {board.parents[1]}"
        )


def launch(board: Path, home: Path, experiment: str, options: Sequence[str]) -> None:
    """Register the plug-in, and run the board's script as if it had been started in ``home``."""
    import tnadapt.torch.peft

    tnadapt.torch.peft.register()
    script = str(board / "run.py")
    # Python puts a script's folder first; there the board's modules `utils` and `data` are.
    sys.path[0] = str(board)
    sys.argv = [script, experiment, *options]
    os.chdir(home)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

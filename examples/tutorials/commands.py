"""Run the command lines of ``tnadapt`` that the tutorials show."""

import contextlib
import shlex

from tnadapt.cli import app


def shell(line, folder):
    """Print a command line, and run it in a folder: within this process, which saves importing torch again."""
    print("$", line)
    program, *words = shlex.split(line)
    if program != "tnadapt":
        raise ValueError(f"only tnadapt runs here, not {program}")
    with contextlib.chdir(folder):
        app(words, standalone_mode=False)

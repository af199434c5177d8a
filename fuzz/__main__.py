"""Fuzz one target for a while: ``python -m fuzz TARGET --seconds 60``.

Needs atheris (Linux): ``pip install atheris``. Inputs that reach new code are added to the corpus; ``--shrink``
then minimizes it. An input that breaks a target is saved in the current folder as ``crash-...``: turn it into a
named test case, and fix the cause.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
#: Memory limit in MiB: bad input must be refused before anything large is allocated.
MEMORY = 1500
PR_SET_PDEATHSIG = 1  # of Linux' prctl: a signal when the parent dies
#: Time limit for one input, in seconds: the first one may compile kernels.
PATIENCE = 60


def main() -> None:
    """Parse arguments, instrument, and fuzz."""
    given = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    given.add_argument("target")
    given.add_argument("--seconds", type=int, default=60)
    given.add_argument("--corpus", type=Path, help="a folder instead of fuzz/corpus/TARGET")
    given.add_argument("--shrink", action="store_true", help="minimize the corpus, keeping its coverage")
    # libFuzzer restarts itself to shrink, with further options.
    asked, options = given.parse_known_args()
    try:
        import atheris
    except ImportError:
        raise SystemExit("fuzzing needs atheris: pip install atheris (Linux)") from None
    # On Linux a program inherits the peak memory of the process that started it, which could exceed libFuzzer's limit.
    # A fork resets it.
    if child := os.fork():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the child
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the child ends with its parent
    with atheris.instrument_imports(include=["tnadapt"], enable_loader_override=False):
        from fuzz.targets import TARGETS
    if asked.target not in TARGETS:
        raise SystemExit(f"no target {asked.target!r}; expected one of {', '.join(TARGETS)}")
    corpus = asked.corpus or CORPUS / asked.target
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = CORPUS / asked.target
    places = [str(corpus), *([str(seeds)] if seeds != corpus and seeds.is_dir() else [])]
    bounds = [f"-rss_limit_mb={MEMORY}", f"-timeout={PATIENCE}", "-max_len=4096"]
    again = f"{sys.executable} -m fuzz {asked.target}"
    if asked.shrink:
        whole = corpus.with_name(f"{corpus.name}-whole")
        corpus.rename(whole)
        corpus.mkdir()
        bounds, places = [*bounds, "-merge=1"], [str(corpus), str(whole), *places[1:]]
    elif not options:
        bounds += [f"-max_total_time={asked.seconds}", "-print_final_stats=1"]
    atheris.Setup([again, *bounds, *options, *([] if options else places)], TARGETS[asked.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

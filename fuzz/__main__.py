"""Fuzz one target for a while: ``python -m fuzz TARGET --seconds 60``.

Needs atheris (Linux): ``pip install atheris``. New inputs that reach new code are put into the corpus; ``--shrink``
then keeps the fewest that reach all of it. What breaks a target is left in the folder as ``crash-...``: make it a
named case of the tests, and mend the cause.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
#: Of memory, in MiB: what is refused must be refused before it is allocated.
MEMORY = 1500
PR_SET_PDEATHSIG = 1  # of Linux' prctl: a signal at the death of the parent
#: Of one input, in seconds: the first one may compile kernels.
PATIENCE = 60


def main() -> None:
    """Ask, instrument, run."""
    given = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    given.add_argument("target")
    given.add_argument("--seconds", type=int, default=60)
    given.add_argument("--corpus", type=Path, help="another folder than fuzz/corpus/TARGET")
    given.add_argument("--shrink", action="store_true", help="keep of the corpus the fewest that reach all of it")
    # libFuzzer starts itself anew to shrink, with options of its own.
    asked, options = given.parse_known_args()
    try:
        import atheris
    except ImportError:
        raise SystemExit("fuzzing needs atheris: pip install atheris (Linux)") from None
    # Linux goes on counting the most memory of whoever started a program as the program's own, and libFuzzer would find
    # it over its limit. For a fork it begins anew.
    if child := os.fork():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard's is for the child
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with its parent
    with atheris.instrument_imports(include=["tnadapt"], enable_loader_override=False):
        from fuzz.targets import TARGETS
    if asked.target not in TARGETS:
        raise SystemExit(f"no target {asked.target!r}; there are {', '.join(TARGETS)}")
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

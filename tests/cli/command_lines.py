"""Run command lines as a user would, each in a separate process with limits on time and memory.

``python -m tests.cli.command_lines`` imports everything that commands may need once, and forks for every line of JSON
that it reads: hundreds of commands take the time of a few dozen. It needs Linux, as memory is read from /proc.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: Bytes beyond what the imports take: as much address space, and files as large.
MEMORY, FILE = 4 << 30, 64 << 20
SECONDS = 60.0
#: Exit code of a command that ended with an exception.
RAISED = 70


class Done(NamedTuple):
    """How a command ended."""

    code: int  # negative: by a signal, -9 after its time was over
    out: str
    err: str
    seconds: float
    memory: int  # bytes that were resident at the most, beyond what a process that does nothing has


class CommandLines:
    """The process that forks; made by :func:`command_lines`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, words: Sequence[str], folder: Path) -> Done:
        """``tnadapt ARGUMENTS`` or ``paper ARGUMENTS``, which is ``python -m paper``, in a folder."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(folder), *words]), file=self.process.stdin, flush=True)
        return Done(**json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def command_lines(places: Mapping[str, str]) -> Iterator[CommandLines]:
    """A process for command lines, until the end of the block; places: more of its environment."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.cli.command_lines"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **places},
    ) as process:  # fmt: skip
        yield CommandLines(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    import paper.__main__
    from tests.support.in_process import main
    from tnadapt.cli.terminal import COMMANDS

    mains = {"tnadapt": main, "paper": paper.__main__.main}
    # Commands import what they need when they are used: here beforehand, so that it does not count as what they take.
    modules = (f"tnadapt.cli.{entry.module}" for entry in COMMANDS.values())
    lazily = [*modules, "tnadapt.torch", "tnadapt.finetune._study"]
    for name in (*lazily, "tnadapt.finetune._prediction", "paper.command", "sklearn.datasets", "matplotlib.pyplot"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # A fork has at first what of the imports' memory has been written to; the rest it shares.
    if not (child := os.fork()):
        os._exit(0)
    least = _wait(child, SECONDS)[1].ru_maxrss
    for line in sys.stdin:
        folder, *words = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            began = time.monotonic()
            if not (child := os.fork()):
                _child(mains[words[0]], folder, words, out.fileno(), err.fileno())
            status, used = _wait(child, SECONDS)
            done = Done(
                os.waitstatus_to_exitcode(status), _text(out), _text(err), time.monotonic() - began,
                (used.ru_maxrss - least) << 10,
            )  # fmt: skip
        print(json.dumps(done._asdict()), flush=True)


def _child(main: Any, folder: str, words: list[str], out: int, err: int) -> None:
    code = RAISED
    try:
        os.setsid()  # what it starts ends with it
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        sys.argv = words
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    end = time.monotonic() + seconds
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status, used
        if time.monotonic() > end:
            os.killpg(child, 9)
            _, status, used = os.wait4(child, 0)
            return status, used
        time.sleep(0.002)


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


if __name__ == "__main__":
    _serve()

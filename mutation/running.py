"""Run tests against a mutant, in a process forked from one that has imported everything except the library itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Outcome", "Tree", "preload"]

_PRELOADED = (
    "numpy", "scipy.linalg", "scipy.sparse", "scipy.stats", "hypothesis.extra.numpy", "pytest", "_pytest.doctest",
    "safetensors.numpy", "tensorly", "numba", "torch", "torch.func", "torch.nn.utils.parametrize", "safetensors.torch",
    "jax", "jax.numpy", "array_api_strict", "transformers", "peft",
)  # fmt: skip
# A mutant may request more memory than there is.
_MEMORY = 12 << 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run of tests.

    Attributes
    ----------
    status : str
        "passed", "failed" or "timeout".
    test : str
        The first that failed, or was running at the timeout; empty if the mutant cannot be imported.
    """

    status: str
    test: str = ""


def preload() -> None:
    """Import what the tests import, except the library itself, so that no mutant has to wait for it."""
    # JAX warns of a fork in a process with its threads. There are none before it computes something.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    assert "tnadapt" not in sys.modules


class Tree:
    """A copy of the repository, in which one file at a time is replaced.

    Parameters
    ----------
    root : Path
        The repository.
    folder : Path
        Where the copy goes.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        # Copy compiled kernels: numba would take a minute.
        for cache in (root / "tnadapt" / "backends").glob("_kernels/**/__pycache__"):
            shutil.copytree(cache, folder / cache.relative_to(root), dirs_exist_ok=True)
        # Python identifies the source of a compiled file by its size and modification time in seconds.
        self._moment = int(time.time()) - 10**8

    @contextlib.contextmanager
    def holding(self, path: str, code: str) -> Iterator[None]:
        """Replace the content of a file within the context."""
        place = self.folder / path
        before = place.read_text(encoding="utf-8")
        try:
            self._write(place, code)
            yield
        finally:
            self._write(place, before)

    def _write(self, place: Path, code: str) -> None:
        place.write_text(code, encoding="utf-8")
        self._moment += 1
        os.utime(place, (self._moment, self._moment))

    def run(self, tests: Sequence[str], profile: str, seconds: float) -> Outcome:
        """Run these tests in this order, up to the first that fails.

        Parameters
        ----------
        tests : sequence of str
            Their names, as in pytest.
        profile : str
            The Hypothesis profile.
        seconds : float
            The timeout.
        """
        said = self.folder / ".mutation-said"
        said.write_text("", encoding="utf-8")
        child = os.fork()
        if not child:
            self._child(tests, profile, said)
        status = _waited(child, time.monotonic() + seconds)
        lines = said.read_text(encoding="utf-8").splitlines()
        if status is None:
            return Outcome("timeout", lines[-1] if lines else "")
        if status == 0:
            return Outcome("passed")
        return Outcome("failed", lines[-1] if lines else "")

    def _child(self, tests: Sequence[str], profile: str, said: Path) -> None:
        """Run the tests in the forked process; does not return."""
        status = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
            log = os.open(self.folder / ".mutation-log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(self.folder)
            os.environ.update(PYTHONPATH=str(self.folder), HYPOTHESIS_PROFILE=profile)
            sys.path.insert(0, str(self.folder))
            import pytest

            from .order import Order

            files = list(dict.fromkeys(test.split("::")[0] for test in tests))
            options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
            # Some of pytest's plugins were already imported.
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = int(pytest.main([*files, *options], plugins=[Order(tests, said)]))
        finally:
            os._exit(status)


def _waited(child: int, until: float) -> int | None:
    """Return the exit status; None if the process had to be killed."""
    wait = 0.01
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _end(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(wait)
        wait = min(2 * wait, 0.1)
    _end(child)
    os.waitpid(child, 0)
    return None


def _end(child: int) -> None:
    """Kill the process and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)

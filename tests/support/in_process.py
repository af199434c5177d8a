"""The programs, run in this process: a test of many command lines need not start as many processes."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable

import pytest

from tnadapt.__main__ import main

__all__ = ["main", "run_here"]


def run_here(main: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program's ``main``, and return what a process of its own would have returned and printed."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(list(map(str, arguments)), code, out.getvalue(), err.getvalue())

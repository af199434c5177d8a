"""Raising KeyboardInterrupt at a chosen line of tnadapt."""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import tnadapt

EVERY = os.environ.get("HYPOTHESIS_PROFILE") == "long"
PACKAGE = str(Path(tnadapt.__file__).parent) + os.sep


class Lines:
    """A trace function: records the lines that a package executes, and raises KeyboardInterrupt before number ``stop``.

    The package's files are those below ``below``.
    """

    def __init__(self, stop: int | None = None, below: str = PACKAGE) -> None:
        self.stop, self.below = stop, below
        self.seen: list[tuple[CodeType, int]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self.below):
            return None
        before = frame.f_lineno

        def line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            nonlocal before
            if event == "line":
                at, came_from = frame.f_lineno, before
                before = at
                if not _leaves_with(frame.f_code.co_filename, at, came_from):
                    self.seen.append((frame.f_code, at))
                    if len(self.seen) - 1 == self.stop:
                        raise KeyboardInterrupt
            return line

        return line


def interrupted(action: Callable[[], object], stop: int | None, below: str = PACKAGE) -> Lines:
    """Run an action and interrupt it before one of its lines; other exceptions propagate."""
    lines, before = Lines(stop, below), sys.gettrace()
    sys.settrace(lines)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def moments(action: Callable[[], object], below: str = PACKAGE) -> list[int]:
    """Return the executions of lines to interrupt: the first and last of each line, all of them in the long profile."""
    seen = interrupted(action, None, below).seen
    assert seen
    if EVERY:
        return list(range(len(seen)))
    first = {place: number for number, place in reversed(list(enumerate(seen)))}
    last = {place: number for number, place in enumerate(seen)}
    return sorted({*first.values(), *last.values()})


def _leaves_with(file: str, line: int, before: int) -> bool:
    """Return whether the line is that of a ``with`` statement that is being exited.

    Python reports it between the body and ``__exit__``, where it delivers no signal: there is nothing to interrupt.
    """
    end = _withs(file).get(line)
    return end is not None and line < before <= end


@functools.cache
def _withs(file: str) -> dict[int, int]:
    """Return the first and last lines of the ``with`` statements of a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.lineno: node.end_lineno or node.lineno for node in ast.walk(tree) if isinstance(node, ast.With)}

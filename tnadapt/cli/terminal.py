"""What a command line is built on, here and in a program beside tnadapt: output, progress, and how errors end it.

A user's mistake is one line on stderr and exit code 2, and no file or path can send control sequences to the terminal.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from tnadapt.errors import TnadaptError, escaped

from ._printing import echo, echo_json, echo_table
from ._progress import reporter
from ._tables import print_table

__all__ = [
    "EscapingCommand",
    "EscapingGroup",
    "echo",
    "echo_json",
    "echo_table",
    "exit_on_error",
    "help_text",
    "print_table",
    "reporter",
]


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    """Typer's own errors quote words of the command line, which a shell may have taken from a folder."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = escaped(message)  # type: ignore[attr-defined]  # there it is
        raise


class EscapingCommand(TyperCommand):
    """A command whose usage errors are escaped: ``app.command(cls=EscapingCommand)``."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _escaping():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _escaping():
            return super().invoke(ctx)


class EscapingGroup(TyperGroup):
    """A group of commands whose usage errors are escaped: ``typer.Typer(cls=EscapingGroup)``."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _escaping():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _escaping():
            return super().invoke(ctx)


def help_text(command: Callable[..., None]) -> str:
    """A docstring's paragraphs, each in one line: the terminal says how wide they are."""
    # There is none under python -OO.
    return "\n\n".join(" ".join(text.split()) for text in (inspect.getdoc(command) or "").split("\n\n"))


@contextlib.contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """End the process with one line and exit code 2 where the block raises what a user can cause.

    Parameters
    ----------
    program : str
        What the line begins with.

    Raises
    ------
    SystemExit
        In place of :class:`~tnadapt.TnadaptError`, ``OSError`` and ``MemoryError``.

    Examples
    --------
    >>> from tnadapt import TnadaptError
    >>> with exit_on_error("program"):
    ...     raise TnadaptError("no such file")
    Traceback (most recent call last):
    SystemExit: 2
    """
    try:
        yield
    except (TnadaptError, OSError) as error:  # a full disk, a name that is too long
        line = str(error)
    except MemoryError as error:
        line = f"there is not enough memory for that ({str(error) or 'no more than that is known'})"
    else:
        return
    print(escaped(f"{program}: {line}"), file=sys.stderr)
    raise SystemExit(2)

"""Building blocks of command lines, for tnadapt and other programs: output, progress, and exits on errors.

A user's mistake leads to one line on stderr and exit code 2. No file or path can send control sequences to the
terminal.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from tnadapt.errors import TnadaptError, escaped

from ._engine_options import ENGINE_HELP, ENGINE_OPTION_HELP, engine_options
from ._interrupts import stoppable
from ._printing import echo, echo_json, echo_table, print_table

__all__ = [
    "ENGINE_HELP",
    "ENGINE_OPTION_HELP",
    "EscapingCommand",
    "EscapingGroup",
    "echo",
    "echo_json",
    "echo_table",
    "engine_options",
    "exit_on_error",
    "help_text",
    "print_table",
    "stoppable",
]


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    """Escape Typer's own errors, which quote the command line: a shell may have inserted names of files."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = escaped(message)  # type: ignore[attr-defined]  # checked above
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
    """Return a docstring with each paragraph on one line, to be wrapped to the width of the terminal."""
    # There are no docstrings under python -OO.
    return "\n\n".join(" ".join(text.split()) for text in (inspect.getdoc(command) or "").split("\n\n"))


@contextlib.contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """Exit with a one-line message and code 2 if the block raises an error that a user can cause.

    Parameters
    ----------
    program : str
        Prefix of the message.

    Raises
    ------
    SystemExit
        Replaces :class:`~tnadapt.TnadaptError`, ``OSError`` and ``MemoryError``.

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
        line = f"there is not enough memory ({str(error) or 'no further details'})"
    else:
        return
    print(escaped(f"{program}: {line}"), file=sys.stderr)
    raise SystemExit(2)

"""Ctrl-C: a command stops and says what is kept; a second one ends the process without waiting for its clean-up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import typer

from tnadapt.errors import escaped

__all__ = ["INTERRUPTED", "stoppable"]

#: The exit code of shells for a program that SIGINT has ended.
INTERRUPTED = 130


@contextlib.contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Run the long part of a command, which Ctrl-C ends with exit code 130 and one line on stderr.

    Parameters
    ----------
    kept : str
        What is kept and how to go on, for the line: "stopped; …".

    Notes
    -----
    Python handles a signal when its main thread is next in Python code: one call of LAPACK or torch runs to its end.

    Examples
    --------
    >>> with stoppable("nothing was written"):
    ...     print("done")
    done
    """
    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            _say_stopped(kept)
            os._exit(INTERRUPTED)
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers. A program in the background ignores the signal.
    if handled := threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGINT, on_interrupt)
    after = before
    try:
        yield
    except BaseException as error:
        # An import that is interrupted may end with an error of its own.
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        if interrupted:
            after = signal.SIG_DFL  # a second one ends the process at once, also while Python shuts down
        _say_stopped(kept)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if handled:
            signal.signal(signal.SIGINT, after)


def _say_stopped(kept: str) -> None:
    """Print the line without the buffer of stderr, which the interrupted code may be using."""
    line = escaped(f"stopped; {kept}")
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode(sys.stderr.encoding or "utf-8", "replace"))

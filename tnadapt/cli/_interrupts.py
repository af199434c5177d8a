"""Ctrl-C: a command ends within two seconds and says what is kept, whatever it computes; a second one ends it at once.

Python handles a signal when its main thread is next in Python code, and one decomposition in LAPACK may take a minute.
Therefore a thread is woken by the signal itself. It gives the main thread time to end by itself, and then ends the
process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import typer

from tnadapt.errors import escaped

__all__ = ["INTERRUPTED", "stoppable"]

#: The exit code of shells for a program that SIGINT has ended.
INTERRUPTED = 130
# Seconds for the main thread to close pools, bars and files.
_PATIENCE = 1.5


@contextlib.contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Run the long part of a command, which Ctrl-C ends with exit code 130 and one line on stderr.

    Parameters
    ----------
    kept : str
        What is kept and how to go on, for the line: "stopped; …".

    Notes
    -----
    After a real interrupt the process ends without unloading modules, which takes seconds with torch.

    Examples
    --------
    >>> with stoppable("nothing was written"):
    ...     print("done")
    done
    """
    watch = _Watch(kept)
    watch.start()
    try:
        yield
    except BaseException as error:
        # An import that is interrupted may end with an error of its own.
        if watch.interrupted():
            watch.end()
        watch.stop()
        if isinstance(error, KeyboardInterrupt):
            watch.tell()
            raise typer.Exit(INTERRUPTED) from None
        raise
    watch.stop()


class _Watch:
    """The thread that hears of the signal."""

    def __init__(self, kept: str) -> None:
        self.line = escaped(f"stopped; {kept}")
        self.heard = threading.Event()
        self._told = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to listen, where Python can: signals are those of the main thread, and pipes those of Unix."""
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def interrupted(self) -> bool:
        """Whether the signal has come."""
        return self._thread is not None and self.heard.wait(0.05)

    def stop(self) -> None:
        """Listen no longer."""
        if self._thread is not None and not self.heard.is_set():
            signal.set_wakeup_fd(self._before)
            os.write(self._write, b"\0")
            self._thread.join()
            os.close(self._read)
            os.close(self._write)
            self._thread = None

    def tell(self) -> None:
        """Print the line, once; not through Rich or buffers, which the main thread may hold."""
        if self._told.acquire(blocking=False):
            shown = "\x1b[?25h" if os.isatty(2) else ""  # a bar that was not closed has hidden the cursor
            with contextlib.suppress(OSError):
                os.write(2, f"{shown}\n{self.line}\n".encode(sys.stderr.encoding or "utf-8", "replace"))

    def end(self) -> NoReturn:
        """End the process."""
        self.tell()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(INTERRUPTED)

    def _listen(self) -> None:
        while (number := os.read(self._read, 1)) != b"\0":
            if number == bytes([signal.SIGINT]):
                break
        else:
            return
        self.heard.set()
        until = time.monotonic() + _PATIENCE
        while (left := until - time.monotonic()) > 0:
            if select.select([self._read], [], [], left)[0] and os.read(self._read, 1) == bytes([signal.SIGINT]):
                break
        self.tell()
        os._exit(INTERRUPTED)

"""Ctrl-C while an engine starts something: it waits until the engine knows what it has to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interrupts_held"]


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back. Processes that start meanwhile hear none at all: who starts them ends them.

    Notes
    -----
    The mask of signals is that of one thread, and is inherited. While it blocks the signal in the main thread, another
    thread may hear of it; Python then calls the handler in the main thread all the same. So the handler is replaced,
    too, where it can be: in the main thread.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        with _blocked():
            yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        with _blocked():
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            # Not by another signal, which whoever counts them would take for a second Ctrl-C.
            handler(*came[0])


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Delays Ctrl-C while an engine starts workers or jobs, until the engine knows which ones to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interrupts_held"]


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the block ends. Processes that are started in it ignore Ctrl-C: the engine ends them.

    Notes
    -----
    A signal mask applies to one thread, and child processes inherit it. While the main thread blocks the signal,
    another thread can receive it, and Python still calls the handler in the main thread. So the handler is replaced,
    too, which is only possible in the main thread.
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
            # Not by sending the signal again, which a handler that counts would take for a second Ctrl-C.
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

"""Work shared out over a pool of ordinary threads: kernels hold no interpreter lock while they run."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["share", "thread_count"]


def thread_count() -> int:
    """How many threads a call may use: the processors that this process may run on, or fewer.

    Fewer where ``OMP_NUM_THREADS`` says so, as it does for the libraries around us, or where torch is
    loaded and has been told so (``torch.set_num_threads``; a worker of a DataLoader has one).
    """
    count = _allowed()
    # Asked for, not imported: torch's word counts where somebody uses torch.
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        count = min(count, torch.get_num_threads())
    return count


@functools.cache
def _allowed() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # May be a list, a number for each level of nesting.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(count, int(asked)) if asked.isdecimal() and int(asked) > 0 else count


def share(work: Callable[[int], object], count: int, threads: int) -> None:
    """``work(0)`` to ``work(count - 1)``, in no order, by this thread and up to ``threads - 1`` others.

    The calling thread takes part, and whoever is free takes the next piece. So it ends also where no
    other thread is free, as in a call from within a piece of work; and several may share at once.
    """
    numbers = itertools.count()

    def pieces() -> None:
        # next() of a count is one step of the interpreter: no two threads get the same number.
        while (number := next(numbers)) < count:
            work(number)

    helpers = _helpers(pieces, min(threads, count) - 1)
    try:
        pieces()
    finally:
        # One that has not begun is not waited for: nothing is left for it to do.
        waited = [helper for helper in helpers if not helper.cancel()]
        for helper in waited:
            helper.exception()
    for helper in waited:
        helper.result()


def _helpers(pieces: Callable[[], None], count: int) -> list[Future[None]]:
    found: list[Future[None]] = []
    for _ in range(count):
        try:
            found.append(_pool().submit(pieces))
        except RuntimeError:
            break  # the interpreter is ending, or no thread can be had: the calling one does it all
    return found


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Threads are started as they are needed, and end with the interpreter.
    return ThreadPoolExecutor(max(1, _allowed() - 1), thread_name_prefix="tnadapt")


if hasattr(os, "register_at_fork"):
    # A forked process has none of the threads, and may be allowed other processors.
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_allowed.cache_clear)

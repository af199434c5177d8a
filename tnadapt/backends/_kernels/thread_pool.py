"""Parallel work on a pool of ordinary threads, which is effective because kernels release the interpreter lock."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["share", "thread_count"]


def thread_count() -> int:
    """Return how many threads a call may use: at most the number of processors available to this process.

    ``OMP_NUM_THREADS`` lowers it, as for other numerical libraries, and so does ``torch.set_num_threads`` if
    torch is loaded (a DataLoader worker has one thread).
    """
    count = _allowed()
    # Looked up, not imported: torch's setting applies only if the process uses torch.
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        count = min(count, torch.get_num_threads())
    return count


@functools.cache
def _allowed() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # May be a list with one number per nesting level.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(count, int(asked)) if asked.isdecimal() and int(asked) > 0 else count


def share(work: Callable[[int], object], count: int, threads: int) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, in any order, on this thread and up to ``threads - 1`` others.

    The calling thread takes part, and every free thread takes the next piece. This makes progress even if no other
    thread is free, so that calls may be nested (a piece of work may call this function) and concurrent.
    """
    numbers = itertools.count()

    def pieces() -> None:
        # next() of itertools.count is atomic under the interpreter lock: no two threads get the same number.
        while (number := next(numbers)) < count:
            work(number)

    helpers = _helpers(pieces, min(threads, count) - 1)
    try:
        pieces()
    finally:
        # Cancel helpers that have not started: all pieces are taken. Waiting for them could deadlock nested calls, in
        # which every thread of the pool waits for a helper in the queue.
        waited = [helper for helper in helpers if not helper.cancel()]
        for helper in waited:
            helper.exception()
    for helper in waited:
        helper.result()  # raises a helper's exception


def _helpers(pieces: Callable[[], None], count: int) -> list[Future[None]]:
    found: list[Future[None]] = []
    for _ in range(count):
        try:
            found.append(_pool().submit(pieces))
        except RuntimeError:
            break  # the interpreter is shutting down, or no thread can be started: the caller does all the work
    return found


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # The executor starts threads on demand and ends them with the interpreter.
    return ThreadPoolExecutor(max(1, _allowed() - 1), thread_name_prefix="tnadapt")


if hasattr(os, "register_at_fork"):
    # A forked process inherits none of the threads, and may have another set of processors.
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_allowed.cache_clear)

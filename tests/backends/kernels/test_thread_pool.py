"""Parallel work: every piece runs once, errors are raised, and no call waits for a thread that cannot start."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tnadapt.backends._kernels import work_space as thread_pool
from tnadapt.backends._kernels.work_space import share, thread_count


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pool of three, whatever this machine has."""
    thread_pool._pool.cache_clear()
    monkeypatch.setattr(thread_pool, "_allowed", lambda: 4)
    yield
    thread_pool._pool.cache_clear()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("team", [1, 2, 4, 50])
def test_every_piece_is_done_once(count: int, team: int) -> None:
    done: list[int] = []
    share(done.append, count, team)
    assert sorted(done) == list(range(count))


def test_others_take_part() -> None:
    meeting = threading.Barrier(3)
    share(lambda i: meeting.wait(timeout=30), 3, 3)


def test_nested_and_concurrent_calls() -> None:
    done: collections.Counter[tuple[int, int, int]] = collections.Counter()

    def outer(caller: int) -> None:
        share(lambda i: share(lambda j: done.update([(caller, i, j)]), 5, 4), 5, 4)

    callers = [threading.Thread(target=outer, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    assert len(done) == 6 * 25
    assert set(done.values()) == {1}


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_an_error_in_a_piece_is_raised(bad: int) -> None:
    def work(i: int) -> None:
        if i == bad:
            raise ZeroDivisionError(i)

    with pytest.raises(ZeroDivisionError):
        share(work, 8, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    # In a separate process: other libraries with threads in this one do not survive a fork.
    code = """
import os, threading
from tnadapt.backends._kernels import work_space as thread_pool
thread_pool._allowed = lambda: 4
def meet():
    meeting = threading.Barrier(3)
    thread_pool.share(lambda i: meeting.wait(timeout=30), 3, 3)
meet()
child = os.fork()
meet()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def count_in_a_process(code: str, **environment: str) -> int:
    code = f"{code}\nfrom tnadapt.backends._kernels.work_space import thread_count\nprint(thread_count())"
    environment = {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **environment}
    return int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)


def test_how_many_threads_there_are() -> None:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert count_in_a_process("") == here
    assert count_in_a_process("", OMP_NUM_THREADS="1") == 1
    assert count_in_a_process("", OMP_NUM_THREADS="1,4") == 1
    for nonsense in ("", "many", "0", "-3", "1000000"):
        assert count_in_a_process("", OMP_NUM_THREADS=nonsense) == here
    if hasattr(os, "sched_setaffinity"):
        assert count_in_a_process("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])") == 1


def test_the_setting_of_torch_counts() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert thread_count() == 1
    finally:
        torch.set_num_threads(before)

"""What kernels share: memory that calls reuse, threads, and compilation with a cache."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tests.support.depth import in_depth, long_only

from ..internals import kernels, work_space

CACHE_LINE, share = work_space.CACHE_LINE, work_space.share
needs_numba = pytest.mark.skipif(
    kernels("fastfood") is None, reason="numba, which compiles the kernels, is not installed"
)

# -- Memory that calls of a kernel reuse: who has it when, how much is kept, and what ends it --------------------------


def address(x: np.ndarray) -> int:
    return int(x.ctypes.data)


@needs_numba
@pytest.mark.parametrize("n_in", [100, 1 << 14])
def test_results_of_a_projection_stay_as_they_are_in_any_thread(n_in: int) -> None:
    f = tna.Projection("linear", n_in, 1 << 14)
    x, y = np.random.default_rng(0).standard_normal((2, 1 << 14), dtype=np.float32)
    expected, pulled = f(x[:n_in]), f.adjoint(y)
    wrong = []

    def work(sign: int) -> None:
        for _ in range(20):
            first = f(sign * x[:n_in])
            part = f(2 * sign * x[:n_in])[10:20]  # which holds the whole
            back = f.adjoint(sign * y)
            f(x[:n_in])
            ours, theirs = (first, part, back), (sign * expected, 2 * sign * expected[10:20], sign * pulled)
            wrong.extend(sign for pair in zip(ours, theirs, strict=True) if not np.array_equal(*pair))

    threads = [threading.Thread(target=work, args=(sign,)) for sign in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert address(f(x[:n_in])) % CACHE_LINE == 0


def test_one_vector_is_kept_and_others_are_freed() -> None:
    space = work_space.WorkSpace()
    several = [space.vector(1000) for _ in range(3)]
    del several
    assert space.nbytes == 4 * 1000 + CACHE_LINE
    assert space.vector(2000).size == 2000
    assert space.nbytes == 4 * 2000 + CACHE_LINE


# -- Parallel work: every piece runs once, errors are raised, and no call waits for a thread that cannot start ---------


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pool of three, whatever this machine has."""
    work_space._pool.cache_clear()
    monkeypatch.setattr(work_space, "_allowed", lambda: 4)
    yield
    work_space._pool.cache_clear()


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("team", [1, 2, 4, 50])
def test_every_piece_is_done_once(count: int, team: int) -> None:
    done: list[int] = []
    share(done.append, count, team)
    assert sorted(done) == list(range(count))


@pytest.mark.usefixtures("many")
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


@pytest.mark.usefixtures("many")
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
from tests.backends.internals import work_space
work_space._allowed = lambda: 4
def meet():
    meeting = threading.Barrier(3)
    work_space.share(lambda i: meeting.wait(timeout=30), 3, 3)
meet()
child = os.fork()
meet()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def count_in_a_process(code: str, **environment: str) -> int:
    code = f"{code}\nfrom tests.backends.internals import work_space\nprint(work_space.thread_count())"
    environment = {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **environment}
    return int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)


def test_how_many_threads_there_are() -> None:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert count_in_a_process("") == here
    for threads in in_depth(("1", "1,4"), ("1,4",)):
        assert count_in_a_process("", OMP_NUM_THREADS=threads) == 1
    for nonsense in in_depth(("", "many", "0", "-3", "1000000"), ("many",)):
        assert count_in_a_process("", OMP_NUM_THREADS=nonsense) == here
    if hasattr(os, "sched_setaffinity"):
        assert count_in_a_process("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])") == 1


def test_the_setting_of_torch_counts() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert work_space.thread_count() == 1
    finally:
        torch.set_num_threads(before)


# -- The first call compiles and logs it, the next process uses the cache; without a compiler, plain operations run ----

CALL = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
import numpy as np, tnadapt as tna
x = np.random.default_rng(0).normal(size=(3, 64)).astype("float32")
tna.fwht(x), tna.fwht(x)
from tests.backends.internals import kernels
"""


def run(code: str, **environment: str) -> tuple[str, list[str]]:
    """Run the call in a new process; return what it prints and logs."""
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return found.stdout.strip(), [line for line in found.stderr.splitlines() if line.startswith("tnadapt: ")]


@needs_numba
@long_only
@pytest.mark.slow
@pytest.mark.parametrize("ending", [".nbc", ".nbi"])
def test_compiled_once_and_announced_once_and_again_if_the_cache_is_damaged(ending: str, tmp_path: Path) -> None:
    code, cache = CALL + "print(kernels('walsh') is not None)", str(tmp_path)
    printed, lines = run(code, NUMBA_CACHE_DIR=cache)
    assert printed == "True"
    assert len(lines) == 1
    assert "compiling kernels" in lines[0]
    assert run(code, NUMBA_CACHE_DIR=cache) == ("True", [])
    kept = list(tmp_path.rglob("*" + ending))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:10])
    _, lines = run(CALL, NUMBA_CACHE_DIR=cache)
    assert sum("cannot be read" in line for line in lines) == 1
    assert run(CALL, NUMBA_CACHE_DIR=cache)[1] == []


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("caching.CompileResultCacheImpl._locator_classes = []", "compiled kernels are not cached"),
        ("caching.IndexDataCacheFile.save = lambda *_: open('/')", "compiled kernels could not be cached"),
    ],
    ids=["no folder", "no space"],
)
def test_without_a_writable_cache(before: str, said: str, tmp_path: Path) -> None:

    code = f"from numba.core import caching; {before}{CALL}print(kernels('walsh') is not None)"
    printed, lines = run(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == "True"
    assert [said in line for line in lines].count(True) == 1


@pytest.mark.parametrize(
    ("before", "environment"),
    [("import sys; sys.modules['numba'] = None", {}), ("", {"NUMBA_DISABLE_JIT": "1"})],
    ids=["no numba", "no compiling"],
)
def test_without_a_compiler_plain_operations_are_used(before: str, environment: dict[str, str]) -> None:
    code = CALL + "print(kernels('walsh'), abs(tna.fwht(tna.fwht(x)) - x).max() < 1e-5)"
    printed, said = run(before + code, **environment)
    assert printed == "None True"
    assert len(said) == 1
    assert "plain operations are used" in said[0]


@needs_numba
def test_functions_of_other_packages_compile_as_before() -> None:
    code = CALL + "import numba\nnames = {}\nexec('def f(x): return x + 1', names)\nprint(numba.njit(names['f'])(1))"
    assert run(code)[0] == "2"

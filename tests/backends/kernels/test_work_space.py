"""Memory that calls of a kernel reuse: who has it when, how much is kept, and what ends it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.backends._kernels import kernels
from tnadapt.backends._kernels.work_space import CACHE_LINE, WorkSpace


def address(x: np.ndarray) -> int:
    return int(x.ctypes.data)


def test_a_vector_comes_back_with_the_last_array_that_uses_it() -> None:
    space = WorkSpace()
    x = space.vector(1000)
    assert (x.shape, x.dtype, x.flags.writeable, address(x) % CACHE_LINE) == ((1000,), np.float32, True, 0)
    x[...] = np.arange(1000)
    there, view = address(x), x[10:20].reshape(2, 5)
    del x
    gc.collect()
    assert space.nbytes == 0
    assert view[1].tolist() == [15, 16, 17, 18, 19]
    other = space.vector(1000)
    assert address(other) != there
    del view
    assert space.nbytes == 4 * 1000 + CACHE_LINE
    assert address(space.vector(1000)) == there


def test_one_vector_is_kept_and_others_are_freed() -> None:
    space = WorkSpace()
    several = [space.vector(1000) for _ in range(3)]
    assert len({address(x) for x in several}) == 3
    del several
    assert space.nbytes == 4 * 1000 + CACHE_LINE
    # A vector of another size takes its place.
    assert space.vector(2000).size == 2000
    assert space.nbytes == 4 * 2000 + CACHE_LINE
    space.clear()
    assert space.nbytes == 0


def test_no_two_threads_have_one_vector() -> None:
    space, wrong = WorkSpace(), []

    def work(number: int) -> None:
        for _ in range(200):
            x = space.vector(500)
            x[...] = number
            if not (x == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert space.nbytes == 4 * 500 + CACHE_LINE


@pytest.mark.skipif(kernels("fastfood") is None, reason="numba is not installed")
@pytest.mark.parametrize("n_in", [100, 1 << 14])
def test_results_of_a_projection_stay_as_they_are(n_in: int) -> None:
    f = tna.Projection("linear", n_in, 1 << 14)
    x, y = np.random.default_rng(0).standard_normal((2, 1 << 14), dtype=np.float32)
    first, pulled = f(x[:n_in]), f.adjoint(y)
    kept = first.copy(), pulled.copy()
    second = f(-x[:n_in])
    assert f.adjoint(-y).tobytes() == (-pulled).tobytes()
    assert np.array_equal(second, -first)
    assert np.array_equal(first, kept[0])
    assert np.array_equal(pulled, kept[1])


@pytest.mark.skipif(kernels("fastfood") is None, reason="numba is not installed")
def test_the_work_space_belongs_to_a_projection() -> None:
    f = tna.Projection("linear", 100, 1 << 14)
    x = np.ones(100, np.float32)
    there = address(f(x))
    assert address(f(x)) == there
    assert f.map.draws.space.nbytes == 4 * (1 << 14) + CACHE_LINE
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert other.map.draws.space is None
        assert np.array_equal(other(x), f(x))

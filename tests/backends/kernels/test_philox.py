"""The compiled draws equal the reference implementation bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tnadapt.algebra import rng
from tnadapt.backends._kernels import kernels

compiled = kernels("philox")
pytestmark = pytest.mark.skipif(compiled is None, reason="numba is not installed")

WORD = 2**32 - 1
STREAM = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, WORD), st.integers(0, WORD))
# Near 0, at the seams of the pieces that either way works in, and far out.
START = st.one_of(st.integers(0, 9), st.integers(2**16 - 9, 2**16 + 9), st.integers(0, 2**62))
LENGTH = st.one_of(st.integers(0, 70), st.integers(1015, 1035), st.integers(2**16 - 9, 2**16 + 9))
SIZE = st.one_of(st.integers(1, 5000), st.integers(0, 62).map(lambda bits: 2**bits), st.integers(1, 2**63 - 1))


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return found.tobytes() == expected.tobytes()


@given(STREAM, START, LENGTH)
@example(stream=(0, 0, 2), start=0, length=2**18)
@example(stream=(2**64 - 1, WORD, WORD), start=2**62 + 3, length=1030)
def test_consecutive_elements(stream: tuple[int, int, int], start: int, length: int) -> None:
    for name in ("words", "normals", "signs"):
        asked = (*stream, start, start + length)
        assert same(getattr(compiled, name)(*asked), getattr(rng.NumpyStreams, name)(*asked)), name


@pytest.mark.law("equal-seeds")
@given(STREAM, st.lists(st.integers(0, 2**63 - 1), max_size=30), LENGTH)
def test_elements_anywhere(stream: tuple[int, int, int], some: list[int], length: int) -> None:
    for index in (np.array(some, np.int64), np.arange(length)[::-1] * 7, np.arange(length, dtype=np.int32)):
        for name in ("words_at", "normals_at"):
            assert same(getattr(compiled, name)(*stream, index), getattr(rng.NumpyStreams, name)(*stream, index)), name


@pytest.mark.law("equal-seeds")
def test_normals_of_extreme_words() -> None:
    # By way of the kernel's own inner function: no stream holds these words at a place that is known.
    edge = round(0.075 * 2**32)
    near = [edge + i for i in range(-40, 40)]
    word = np.array([0, 1, WORD - 1, WORD, 2**31 - 1, 2**31, *near, *(WORD - i for i in near)], np.uint32)
    word = np.resize(word, 1024)
    found = np.empty(word.size, np.float32)
    compiled._of_words(word, *np.empty((1, 1024)), np.empty(1024, np.int64), np.empty(1024), found)
    assert same(found, rng._normal_of(word))


@pytest.mark.law("equal-seeds")
@given(SIZE, STREAM, st.booleans(), st.sampled_from([0.0, 0.3, 1.0]), LENGTH)
@example(size=2**17, stream=(0, 0, 1), inverse=False, where=0.0, length=2**17)
@example(size=2**16 + 1, stream=(0, 0, 1), inverse=True, where=0.0, length=2**16 + 1)
@example(size=2**63 - 1, stream=(1, 0, 1), inverse=False, where=1.0, length=1030)
def test_permutations(size: int, stream: tuple[int, int, int], inverse: bool, where: float, length: int) -> None:
    keys = rng.NumpyStreams.words(*stream, 0, 8)
    start = int(where * max(0, size - length))
    asked = (size, keys, start, min(size, start + length), inverse)
    assert same(compiled.permutation(*asked), rng.NumpyStreams.permutation(*asked))


@given(st.integers(2, 31), STREAM, st.booleans(), st.integers(0, 2**31))
def test_images_in_32_bits(bits: int, stream: tuple[int, int, int], inverse: bool, start: int) -> None:
    from tnadapt.backends._kernels.philox import IMAGES, fill_images

    keys = rng.NumpyStreams.words(*stream, 0, 8)
    start %= 1 << bits
    found = np.empty(2 * IMAGES, np.uint32)
    fill_images(start, bits, keys, inverse, found)
    stop = min(start + found.size, 1 << bits)
    expected = rng.NumpyStreams.permutation(1 << bits, keys, start, stop, inverse)
    assert np.array_equal(found[: stop - start], expected)


def test_long_draws_ask_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(compiled, name)

    monkeypatch.setattr(rng, "kernels", lambda name: Spy())
    size = rng.WORTH
    for wanted in (size - 1, size):
        rng.words(0, 0, 1, 0, wanted)
        rng.signs(0, 0, 0, wanted)
        rng.normals(0, 0, 2, 5, wanted + 5)
        rng.permutation(size + 7, 0, 0, 0, wanted)
        rng.words_at(0, 0, 1, np.arange(wanted))
        rng.normals_at(0, 0, 1, np.arange(wanted))
    assert asked == ["words", "signs", "normals", "permutation", "words_at", "normals_at"]

"""Random streams: known answers, draws in pieces and at positions, and no use of global random state."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import ndtri

from tnadapt.algebra import rng
from tnadapt.errors import ConfigError, ShapeError

SEEDS = st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**64 - 1])


def hexes(words: np.ndarray) -> str:
    return " ".join(f"{word:08x}" for word in words.tolist())


@pytest.mark.law("known-draws")
def test_known_answers_of_random123_and_of_the_format() -> None:
    zero = rng._philox(np.zeros(1, np.uint64), 0, 0, 0)[0]
    assert hexes(zero) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    ones = rng._philox(np.array([2**64 - 1], np.uint64), 2**32 - 1, 2**32 - 1, 2**64 - 1)[0]
    assert hexes(ones) == "408f276d 41c83b0e a20bc7c6 6d5451fd"
    assert hexes(rng.words(0, 0, 1, 0, 5)) == "844515e1 f08d6eaa 0f19c053 83f875f0 ca7cf69e"
    assert hexes(rng.words(2**40 + 7, 3, 2, 6, 8)) == "63e2c124 276e314f"
    assert rng.signs(0, 0, 0, 16).tolist() == [1, 1, -1, -1, -1, -1, 1, -1, 1, -1, 1, -1, 1, 1, 1, 1]
    assert rng.permutation(16, 0, 0).tolist() == [14, 13, 7, 10, 6, 8, 3, 15, 1, 2, 9, 4, 0, 11, 12, 5]
    normals = " ".join(f"{value:.8f}" for value in rng.normals(0, 0, 2, 0, 6).tolist())
    assert normals == "-1.96115649 0.56195688 -1.04096723 -0.08592003 -0.07768124 -1.10234046"


@pytest.mark.law("draws-in-pieces")
@given(SEEDS, st.integers(0, 5), st.integers(1, 300), st.data())
def test_a_draw_in_pieces_is_the_draw_in_one_go(seed: int, group: int, length: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    index = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=9)), np.int64)
    whole = rng.words(seed, group, 7, 0, length)
    assert np.array_equal(rng.words(seed, group, 7, start, stop), whole[start:stop])
    assert np.array_equal(rng.words_at(seed, group, 7, index), whole[index])
    normal = rng.normals(seed, group, 7, 0, length)
    assert np.array_equal(rng.normals(seed, group, 7, start, stop), normal[start:stop])
    assert np.array_equal(rng.normals_at(seed, group, 7, index), normal[index])
    assert np.array_equal(rng.signs(seed, group, start, stop), rng.signs(seed, group, 0, length)[start:stop])
    perm = rng.permutation(length, seed, group)
    assert np.array_equal(rng.permutation(length, seed, group, start, stop), perm[start:stop])


@pytest.mark.law("draws-in-pieces")
@given(st.lists(SEEDS, max_size=5), st.integers(0, 2**32 - 1), st.sampled_from([7, 2**16]), st.integers(0, 300))
@example(seeds=list(range(9)), group=0, purpose=16, stop=2**14)
def test_the_draws_of_several_seeds_are_those_of_each(seeds: list[int], group: int, purpose: int, stop: int) -> None:
    drawn = rng.normals_of_seeds(np.array(seeds, np.uint64), group, purpose, stop)
    assert drawn.dtype == np.float32
    assert drawn.shape == (len(seeds), stop)
    for row, seed in zip(drawn, seeds, strict=True):
        assert row.tobytes() == rng.normals(seed, group, purpose, 0, stop).tobytes()


@pytest.mark.law("draws-in-pieces")
def test_a_draw_over_the_edge_of_a_chunk() -> None:
    edge = rng.CHUNK
    assert np.array_equal(rng.words(1, 0, 2, edge - 3, edge + 3), rng.words(1, 0, 2, 0, edge + 3)[-6:])
    assert np.array_equal(rng.signs(1, 0, edge - 3, edge + 3), rng.signs(1, 0, 0, edge + 3)[-6:])


@pytest.mark.law("distributions")
@given(SEEDS, st.integers(0, 3), st.integers(1, 2000))
@example(seed=0, group=0, size=1)
@example(seed=0, group=0, size=2)
def test_a_permutation_and_its_inverse(seed: int, group: int, size: int) -> None:
    perm = rng.permutation(size, seed, group)
    assert np.array_equal(np.sort(perm), np.arange(size))
    assert np.array_equal(rng.permutation(size, seed, group, inverse=True)[perm], np.arange(size))


@pytest.mark.law("draws-in-pieces", "beyond-2-31")
def test_far_elements_of_long_streams() -> None:
    size = 2**40 + 3
    far = rng.permutation(size, 5, 0, size - 4, size)
    assert ((far >= 0) & (far < size)).all()
    back = [int(rng.permutation(size, 5, 0, int(i), int(i) + 1, inverse=True)[0]) for i in far]
    assert back == list(range(size - 4, size))
    assert len(set(rng.words(5, 0, 2, 2**40, 2**40 + 8).tolist())) == 8


@pytest.mark.law("distributions")
def test_normals_are_the_inverse_normal_distribution() -> None:
    word = rng.words(3, 0, 2, 0, 200_000)
    expected = ndtri((word + 0.5) / 2**32)
    # Rounded to float32: half a unit of its last place, and AS 241's own 1e-16.
    assert np.max(np.abs(rng.normals(3, 0, 2, 0, 200_000) / expected - 1)) < 6.0e-8
    extreme = rng._inverse_normal(np.array([0.5 * 2.0**-32, 1 - 0.5 * 2.0**-32]))
    np.testing.assert_allclose(extreme, ndtri([0.5 * 2.0**-32, 1 - 0.5 * 2.0**-32]), rtol=1e-13)


@pytest.mark.law("equal-seeds")
def test_the_logarithm_without_libm() -> None:
    x = np.concatenate([np.geomspace(2.0**-34, 0.5, 10_001), 2.0 ** -np.arange(1.0, 34.0)])
    np.testing.assert_allclose(rng._log(x), np.log(x), rtol=1e-15)


@pytest.mark.law("no-global-random-state")
def test_no_global_random_state_is_read_or_moved() -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    first = rng.normals(0, 0, 2, 0, 100), rng.permutation(100, 0, 0), rng.signs(0, 0, 0, 100)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])
    np.random.seed(2)
    again = rng.normals(0, 0, 2, 0, 100), rng.permutation(100, 0, 0), rng.signs(0, 0, 0, 100)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.law("distributions")
def test_streams_of_other_seeds_groups_and_purposes_differ() -> None:
    drawn = [hexes(rng.words(*stream, 0, 4)) for stream in ((0, 0, 1), (1, 0, 1), (2**32, 0, 1), (0, 1, 1), (0, 0, 2))]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ConfigError, lambda: rng.words(-1, 0, 0, 0, 1)),
        (ConfigError, lambda: rng.words(2**64, 0, 0, 0, 1)),
        (ConfigError, lambda: rng.words(0, 2**32, 0, 0, 1)),
        (ShapeError, lambda: rng.words(0, 0, 0, 2, 1)),
        (ConfigError, lambda: rng.words("a", 0, 0, 0, 1)),
        (ShapeError, lambda: rng.permutation("a", 0, 0)),
        (ShapeError, lambda: rng.permutation(0, 0, 0)),
        (ShapeError, lambda: rng.permutation(5, 0, 0, 0, 6)),
        (ShapeError, lambda: rng.normals(0, 0, 2, -1, 1)),
        (ShapeError, lambda: rng.normals_of_seeds(np.zeros(1, np.uint64), 0, 2, -1)),
        (ConfigError, lambda: rng.normals_of_seeds(np.zeros(1, np.uint64), 2**32, 2, 1)),
    ],
)
def test_bad_input(error: type[Exception], call: object) -> None:
    with pytest.raises(error, match="got"):
        call()  # type: ignore[operator]

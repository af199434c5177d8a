"""The draws of torch's generator, made without torch, equal torch's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import DEFAULT_SEED, TorchStream, permutation_head
from tnadapt import ConfigError

torch = pytest.importorskip("torch")

SEEDS = st.integers(-(1 << 63), (1 << 64) - 1)


def generator(seed: int) -> object:
    return torch.Generator().manual_seed(seed)


@given(SEEDS, st.integers(1, 700), st.data())
@example(777, 1, None)
def test_permutations(seed: int, length: int, data: st.DataObject | None) -> None:
    count = 1 if data is None else data.draw(st.integers(1, length))
    theirs = torch.randperm(length, generator=generator(seed))[:count].numpy()
    assert np.array_equal(permutation_head(length, count, seed), theirs)


def test_the_head_of_a_long_permutation() -> None:
    theirs = torch.randperm(1 << 22, generator=generator(777))[:100].numpy()
    assert np.array_equal(permutation_head(1 << 22, 100, 777), theirs)
    with pytest.raises(ConfigError, match=r"more than 214748364 elements differently, and 214748365 are asked for"):
        permutation_head(214748365, 1, 0)


def test_the_seed_of_a_generator_that_nobody_has_seeded() -> None:
    assert torch.Generator().initial_seed() == DEFAULT_SEED
    assert np.array_equal(permutation_head(50, 50, DEFAULT_SEED), torch.randperm(50, generator=torch.Generator()))


@given(SEEDS, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.floats(0.001, 8.0))
def test_uniform_numbers(seed: int, shape: list[int], bound: float) -> None:
    ours, theirs = TorchStream(seed), generator(seed)
    for _ in range(2):  # each call continues where the last one ended
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=theirs)
        assert np.array_equal(ours.uniforms(shape, -bound, bound), drawn.numpy())


def test_a_map_has_the_positions_of_a_torch_seed() -> None:
    f = tna.Projection.on_weights(tna.maps.TorchScatter(7, seed=777), [(6, 4), (3, 8)])
    places = torch.randperm(24, generator=generator(777))[:7].numpy()
    x = np.arange(1.0, 15.0)
    whole = f(x).reshape(2, 24)
    assert np.array_equal(whole[0, places], x[:7])
    assert np.array_equal(whole[1, places], x[7:])
    assert np.count_nonzero(whole) == 14
    for wrong in (0, 2.0, True):
        with pytest.raises(ConfigError, match="TorchScatter's size must be"):
            tna.maps.TorchScatter(wrong)  # type: ignore[arg-type]
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(ConfigError, match="TorchScatter's seed must be"):
            tna.maps.TorchScatter(3, seed)

"""Adapters whose updates other maps than the paper's make: converted where ΔW has the form, else as near as allowed."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt as tna

from .conversions import SHAPES, TOLERANCE, made, updates

P = tna.presets


@pytest.mark.parametrize(
    "config",
    [P.shira(30), P.fourierft(30), P.loca(30), P.waveft(30, family="db3"), P.c3a(2), P.miss(3)],
    ids=["shira", "fourierft", "loca", "waveft", "c3a", "miss"],
)
def test_the_whole_difference_is_exact(config: tna.Config) -> None:
    file = made(config)
    found = tna.convert(file, to="lycoris-full")
    assert found.exact
    assert found.error < TOLERANCE
    for delta, tensor in zip(file.deltas(), found.tensors.values(), strict=True):
        np.testing.assert_allclose(tensor, delta, atol=TOLERANCE * np.max(np.abs(delta)))


def test_a_repeated_matrix_is_lora_of_its_rank() -> None:
    file = made(P.miss(3))
    found = tna.convert(file, to="peft-lora")
    assert found.error < TOLERANCE
    assert {min(tensor.shape) for tensor in found.tensors.values()} == {3}


def test_a_sparse_update_is_lora_only_within_an_error() -> None:
    file = made(P.shira(60))
    with pytest.raises(tna.ConfigError, match="error"):
        tna.convert(file, to="peft-lora", rank=2)
    found = tna.convert(file, to="peft-lora", rank=2, max_error=1.0)
    assert 0.1 < found.error < 1.0
    assert updates(file).keys() == set(SHAPES)

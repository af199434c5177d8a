"""Launch plans for GPUs: passes transform every digit once in tiles that fit, and read the draws of a map."""

from __future__ import annotations

import math

import pytest

import tnadapt as tna
from tnadapt.algebra.maps import Linear
from tnadapt.backends._kernels.gpu.launch_plans import Drawn, passes


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("tile_bytes", [1 << 15, 1 << 16])
def test_every_digit_is_done_once(itemsize: int, tile_bytes: int) -> None:
    for bits in range(35):
        found = passes(bits, itemsize, tile_bytes)
        assert math.prod(1 << step.bits for step in found) == 1 << bits
        assert [step.stride for step in found] == [1 << sum(s.bits for s in found[:k]) for k in range(len(found))]
        for step in found:
            assert step.rows * step.columns * itemsize <= tile_bytes
            assert step.columns <= 128
            if step.stride > 1:
                assert step.rows == 1 << step.bits
                assert step.stride % step.columns == 0
                assert step.columns * itemsize >= 64


def test_number_of_passes() -> None:
    assert [len(passes(bits, 4, 1 << 16)) for bits in (14, 24, 30)] == [1, 2, 3]
    assert [len(passes(bits, 4, 1 << 15)) for bits in (13, 22, 30)] == [1, 2, 3]
    assert [len(passes(bits, 8, 1 << 15)) for bits in (12, 21, 30)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["linear", "linear_v2", "nonlinear", "nonlinear_v2"])
def test_launch_plans_read_the_draws_of_a_map(kind: str) -> None:
    f = tna.Projection(kind, 5, 100, seed=7, group=3).map
    assert isinstance(f, Linear)
    expected = Drawn(n_in=5, n_out=100, length=128, period=8, seed=7, group=3, signs=not kind.endswith("_v2"))
    assert Drawn.of(f.draws, f.n_in) == expected

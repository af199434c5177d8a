"""Sums of merging in memory are the same on a device and on the host."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tnadapt.algebra.rounding import add_in_place
from tnadapt.torch import _merging as merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.sampled_from([0, -20, 12, 60, 1000]), bad=st.sampled_from([0, 1, 2]))
def test_the_sum_on_a_device_is_that_of_the_host(dtype: torch.dtype, seed: int, exponent: int, bad: int) -> None:
    """A weight on a device is summed there; the code for devices is compared with the host's, on the host."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=12)).to(dtype)
    update = np.ldexp(rng.normal(size=9), exponent)
    if bad:
        update[rng.integers(9)] = np.inf
        weight[rng.integers(12) if bad == 2 else slice(0, 0)] = torch.inf
    ours, plain = weight.clone(), weight.clone()
    cut = int(rng.integers(1, 9))
    pieces = [(2, update[:cut]), (2 + cut, update[cut:])]
    found = merging._add_in_place(ours, ((start, torch.from_numpy(piece)) for start, piece in pieces))
    bits = merging._bits(plain)
    expected = add_in_place(bits, str(dtype).removeprefix("torch."), pieces)
    assert found == expected
    if found is None:
        assert torch.equal(ours, plain)

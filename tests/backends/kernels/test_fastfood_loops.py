"""The last stages of F with signs and scale in their last sweep, against multiplying afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.algebra import rng
from tnadapt.backends._kernels import kernels

loops = kernels("fastfood_loops")
pytestmark = pytest.mark.skipif(loops is None, reason="numba is not installed")

NO_WORDS, NO_NUMBERS = np.empty(0, np.uint32), np.empty(0, np.float32)
APART_BITS = 8


@pytest.mark.law("kernels-agree")
@given(st.sampled_from(["float32", "float64"]), st.integers(0, 9), st.integers(6, APART_BITS), st.data())
def test_signs_and_scale_of_the_last_sweep(dtype: str, bits: int, width_bits: int, data: st.DataObject) -> None:
    apart, width = 1 << APART_BITS, 1 << width_bits
    groups = data.draw(st.integers(1, 3))
    size = groups * apart << bits
    seed = data.draw(st.integers(0, 2**64 - 1))
    count = data.draw(st.sampled_from([1, size - 1, size]))
    scale = data.draw(st.sampled_from([1.0, 2.0**-12]))
    found = np.random.default_rng(seed % 1000).normal(size=size).astype(dtype)
    words = rng.words(seed, 0, rng.PURPOSE["signs"], 0, size // 32)
    expected = found.copy()
    loops.end(0, size // (width << bits), expected, apart, bits, width, NO_WORDS, NO_NUMBERS, 0, 1.0)
    expected *= rng.signs(seed, 0, 0, size) * expected.dtype.type(scale)
    loops.end(0, size // (width << bits), found, apart, bits, width, words, NO_NUMBERS, count, scale)
    assert found[:count].tobytes() == expected[:count].tobytes()

"""Gathering and scattering at images that are drawn in the meantime, against the drawn permutation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.algebra import rng
from tnadapt.backends._kernels import kernels

compiled = kernels("gathering")
pytestmark = pytest.mark.skipif(compiled is None, reason="numba is not installed")

SHORT = 1024
SEED = st.integers(0, 2**64 - 1)


@pytest.mark.law("kernels-agree")
@given(SEED, st.integers(14, 31), st.integers(12, 18), st.data())
def test_gathers_and_scatters_at_the_images(seed: int, bits: int, table_bits: int, data: st.DataObject) -> None:
    """Two parts in turn, whose images the first part draws for the second, also past the last number."""
    start = SHORT * data.draw(st.integers(0, (1 << bits) // SHORT - 2))
    index = rng.permutation(1 << bits, seed, 0, start, start + 2 * SHORT) & ((1 << table_bits) - 1)
    draws = np.random.default_rng(seed % 1000)
    table, x, gain = (draws.normal(size=size).astype(np.float32) for size in (1 << table_bits, 2 * SHORT, 2 * SHORT))
    changes = compiled.round_keys(rng.words(seed, 0, rng.PURPOSE["permutation"], 0, 8))
    gathered, sums = np.empty_like(x), table.copy()
    for run, vectors in ((compiled.gather_part, (table, gain, gathered)), (compiled.scatter_part, (x, gain, sums))):
        images = compiled.first_images(start, bits, changes, table)
        for part in (slice(0, SHORT), slice(SHORT, None)):
            parts = [vector if vector is table or vector is sums else vector[part] for vector in vectors]
            run(start + part.start, bits, changes, images, *parts)
    np.testing.assert_array_equal(gathered, table[index] * gain)
    expected = table.copy()
    np.add.at(expected, index, x * gain)
    np.testing.assert_array_equal(sums, expected)

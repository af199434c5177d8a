"""Bit-exact ``W + ΔW``: updates in float64, in pieces, and two roundings to nearest."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra import rounding
from tnadapt.algebra.rounding import Float64Deltas, add_in_place
from tnadapt.backends.stored_floats import rounded, widened
from tnadapt.testing.strategies import parameters, plans

# Explicit mantissa bits, least exponent of a normal number, and the largest number.
PRECISION = {"float32": (23, -126, 2.0**128 - 2.0**104), "float16": (10, -14, 65504.0), "bfloat16": (7, -126, 0.0)}
PRECISION["bfloat16"] = (7, -126, (2.0 - 2.0**-7) * 2.0**127)


def nearest(number: Fraction, dtype: str) -> Fraction | None:
    """Return the number of a dtype nearest to a given one, ties to even, in integers; None beyond the largest."""
    if number == 0:
        return number
    bits, least, largest = PRECISION[dtype]
    size = abs(number)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    step = Fraction(2) ** (max(exponent, least) - bits)
    below = size // step * step
    rest = size - below
    up = rest * 2 > step or (rest * 2 == step and (below / step) % 2 == 1)
    found = below + step * up
    return None if found > Fraction(largest) else (found if number > 0 else -found)


def by_hand(number: float, dtype: str) -> float:
    found = nearest(Fraction(number), "float32")
    if found is not None and dtype != "float32":
        found = nearest(found, dtype)
    return float("inf") if found is None else float(found)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(number=st.floats(allow_nan=False, allow_infinity=False))
@example(number=1.0 + 2.0**-8)  # ties of bfloat16
@example(number=1.0 + 3 * 2.0**-8)
@example(number=1.0 + 2.0**-8 + 2.0**-40)  # a tie once it is a float32: two roundings are not one
@example(number=65519.999)
@example(number=65520.0)
@example(number=2.0**-25)
@example(number=3.39e38)
@example(number=1e-45)
def test_rounding_is_to_nearest_twice(dtype: str, number: float) -> None:
    with np.errstate(over="ignore"):
        found = widened(rounded(np.array([number]), dtype), dtype)
    assert abs(float(found[0])) == abs(by_hand(number, dtype))
    assert np.signbit(found[0]) == np.signbit(number)


@pytest.mark.law("not-finite-shows")
def test_float64_nan_and_infinity_are_unchanged() -> None:
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.1, -0.0])
    assert rounded(odd, "float64").tobytes() == odd.tobytes()
    for dtype in ("float32", "float16", "bfloat16"):
        found = widened(rounded(odd, dtype), dtype)
        assert np.isnan(found[:2]).all()
        assert found[2:4].tolist() == [np.inf, -np.inf]
        assert np.signbit(found[5])
    with pytest.raises(tna.BackendError, match="float8"):
        rounded(odd, "float8")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_widening_and_rounding_changes_nothing(dtype: str) -> None:
    if dtype in ("float16", "bfloat16"):
        every = np.arange(1 << 16, dtype=np.uint16)
        stored = every if dtype == "bfloat16" else every.view(np.float16)
        stored = stored[np.isfinite(widened(stored, dtype))]
    else:
        stored = np.random.default_rng(0).normal(size=1000).astype(dtype)
    assert rounded(widened(stored, dtype).astype(np.float64), dtype).tobytes() == stored.tobytes()


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    assert widened(np.array([0x4049], np.uint16), "bfloat16")[0] == struct.unpack("<f", b"\0\0\x49\x40")[0]


# -- Updates ------------------------------------------------------------------------------------


@given(st.data())
def test_updates_in_pieces_are_the_deltas(data: st.DataObject) -> None:
    plan = data.draw(plans())
    params = data.draw(parameters(plan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "SPAN", data.draw(st.sampled_from([1, 2, 7, 64, 1 << 24])))
        updates = Float64Deltas(plan, params, "float64", piece=data.draw(st.sampled_from([1, 3, 10, 1 << 17])))
        order = data.draw(st.permutations(range(len(plan.shapes))))
        whole = plan.deltas(params)
        scale = max(float(np.abs(delta).max()) for delta in whole) or 1.0
        for index in order:
            made = list(updates.of(index))
            # Every element once, in order.
            assert [start for start, _ in made] == np.cumsum([0, *(part.size for _, part in made)]).tolist()[:-1]
            found = np.concatenate([part for _, part in made])
            assert found.dtype == np.float64
            assert np.abs(found - whole[index].reshape(-1)).max(initial=0.0) < 1e-12 * scale


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("projection", ["linear", "nonlinear"])
def test_a_fresh_adapter_of_any_dtype_changes_nothing(dtype: str, projection: str) -> None:
    plan = tna.UpdatePlan(tna.presets.superlora(2, groups=2, projection=projection, ratio=0.5), [(6, 5), (5, 7)])
    start = plan.init(dtype="float32" if dtype == "bfloat16" else dtype)
    if dtype == "bfloat16":
        start = {name: widened(rounded(array.astype("f8"), dtype), dtype) for name, array in start.items()}
    updates = Float64Deltas(plan, start, dtype)
    assert not any(part.any() for index in range(2) for _, part in updates.of(index))


# -- Sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@given(data=st.data())
def test_the_sum_is_that_of_the_numbers(dtype: str, data: st.DataObject) -> None:
    numbers = st.floats(-1e4, 1e4)
    size = data.draw(st.integers(1, 6))
    drawn = data.draw(st.lists(numbers, min_size=size, max_size=size))
    weight = rounded(np.array(drawn), dtype)
    update = np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)))
    cut = data.draw(st.integers(0, size - 1))
    before = widened(weight, dtype).astype(np.float64)
    expected = [x + y if dtype == "float64" else by_hand(x + y, dtype) for x, y in zip(before, update, strict=True)]
    pieces = [(0, update[:cut]), (cut, update[cut:])] if cut else [(0, update)]
    assert add_in_place(weight, dtype, pieces) is None
    assert widened(weight, dtype).tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float64", 1.7e308), ("float32", 3e38), ("float16", 65519.0), ("bfloat16", 3.38e38)]
)
def test_overflow_is_distinguished_from_an_update_that_is_not_finite(dtype: str, largest: float) -> None:
    def refusal(number: float, update: float) -> str | None:
        weight = rounded(np.array([1.0, number, -1.0]), dtype)
        with np.errstate(over="ignore"):
            return add_in_place(weight, dtype, [(1, np.array([update]))])

    assert refusal(0.0, largest) is None
    assert refusal(-largest, -0.2 * largest) == refusal(largest, 0.2 * largest) == "range"
    assert refusal(1.0, np.nan) == refusal(1.0, -np.inf) == "update"
    # What is not finite in the base stays as it is: it is no fault of the update.
    for odd in (np.inf, -np.inf, np.nan):
        assert refusal(odd, 1.0) is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("start", [0, 3, rounding.PIECE])
def test_a_piece_longer_than_the_scratch_is_added_in_its_place_and_nowhere_else(dtype: str, start: int) -> None:
    size = 2 * rounding.PIECE + 5
    # Sums of small integers are exact in every dtype.
    piece = (np.arange(size) % 7).astype(np.float64)
    expected = (np.arange(start + size + 4) % 5).astype(np.float64)
    expected[:start] = -0.0
    weight = rounded(expected, dtype).copy()
    assert add_in_place(weight, dtype, [(start, piece)]) is None
    expected[start : start + size] += piece
    assert weight.tobytes() == rounded(expected, dtype).tobytes()

"""Fingerprints of base models: exact in the same dtype, and robust to rounding to another."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import peak_of
from tests.support.checkpoint_files import from_bfloat16, to_bfloat16
from tnadapt import BackendError, ConfigError, ShapeError
from tnadapt.algebra.rng import signs
from tnadapt.checkpoints.fingerprint import TOLERANCE, Fingerprint, fingerprint

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16}


def apart(one: Fingerprint, other: Fingerprint) -> float:
    return math.dist(one.sketch, other.sketch) / math.sqrt(8)


def defined(weights: list[np.ndarray]) -> np.ndarray:
    """The sketch, by its definition."""
    w = np.concatenate([weight.reshape(-1) for weight in weights]).astype(np.float64)
    signed = w * signs(0, 2**32 - 1, 0, w.size)
    return np.array([signed[j::8].sum() for j in range(8)]) / math.sqrt(np.sum(w * w) / 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_is_defined(rng: np.random.Generator, dtype: str) -> None:
    weights = [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((3, 5), (7, 2), (1, 1), (20, 30))]
    found = fingerprint(weights, dtype)
    total = hashlib.sha256()
    for weight in weights:
        little = weight.astype(weight.dtype.newbyteorder("<"))
        total.update(f"{weight.shape[0]},{weight.shape[1]};".encode() + little.tobytes())
    assert (found.sha256, found.dtype) == (total.hexdigest(), dtype)
    assert np.allclose(found.sketch, defined(weights), rtol=0, atol=5.001e-5)  # rounded to four decimals
    assert all(number == round(number, 4) for number in found.sketch)


def test_its_bits_are_known() -> None:
    weights = [np.arange(12.0, dtype=np.float32).reshape(3, 4), np.ones((2, 5), np.float32)]
    assert fingerprint(weights, "float32") == Fingerprint(
        "c6e490e0cc2d772536d10fb23306fa240f60d219c9d0aaf304efc4e60a99e533",
        "float32",
        (-1.1206, 0.8716, 1.1206, 1.1206, -0.4981, 0.3735, -0.8716, -0.7471),
    )


def test_bfloat16_is_given_as_its_bits(rng: np.random.Generator) -> None:
    bits = to_bfloat16(rng.standard_normal((9, 11)))
    found = fingerprint([bits], "bfloat16")
    assert found.sha256 == hashlib.sha256(b"9,11;" + bits.astype("<u2").tobytes()).hexdigest()
    assert found.sketch == fingerprint([from_bfloat16(bits)], "float32").sketch
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert fingerprint([bits.view(ml_dtypes.bfloat16)], "bfloat16") == found
    assert fingerprint([bits.T.view(ml_dtypes.bfloat16).T], "bfloat16") == found


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.sampled_from([1, 3, 8, 20])
)
def test_pieces_do_not_show(shapes: list[tuple[int, int]], piece: int) -> None:
    rng = np.random.default_rng(len(shapes))
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    whole = fingerprint(weights, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnadapt.checkpoints.fingerprint._PIECE", piece)
        assert fingerprint(weights, "float32") == whole


def test_strides_and_byte_order_do_not_show(rng: np.random.Generator) -> None:
    stored = rng.standard_normal((6, 10)).astype(np.float32)
    whole = fingerprint([np.ascontiguousarray(stored.T[::2])], "float32")
    assert fingerprint([stored.T[::2]], "float32") == whole
    assert fingerprint([stored.astype(">f4").T[::2]], "float32") == whole
    assert fingerprint(iter([stored.T[::2]]), "float32") == whole


def test_zeros_have_one(rng: np.random.Generator) -> None:
    zeros = fingerprint([np.zeros((4, 4), np.float32)], "float32")
    assert zeros.sketch == (0.0,) * 8
    almost = -1e-9 * signs(0, 2**32 - 1, 0, 8).astype(np.float64)
    almost[0] = 1.0
    assert str(fingerprint([almost.reshape(2, 4)], "float64").sketch[1:]) == str((0.0,) * 7)  # and no -0.0
    assert zeros.matches(fingerprint([np.zeros((4, 4), np.float16)], "float16"))
    assert not zeros.matches(fingerprint([rng.standard_normal((4, 4)).astype(np.float16)], "float16"))
    few = fingerprint([np.array([[-2.0, 0.0]])], "float64")  # fewer elements than sketches
    assert few.sketch[1:] == (0.0,) * 7
    assert abs(few.sketch[0]) == round(math.sqrt(8), 4)


def test_one_dtype_must_agree_to_the_bit(rng: np.random.Generator) -> None:
    weights = [rng.standard_normal((8, 8)).astype(np.float32), rng.standard_normal((4, 16)).astype(np.float32)]
    found = fingerprint(weights, "float32")
    assert found.matches(fingerprint([weight.copy() for weight in weights], "float32"))
    weights[1][3, 3] = np.nextafter(weights[1][3, 3], np.float32(9))
    changed = fingerprint(weights, "float32")
    assert apart(found, changed) < 1e-3
    assert not found.matches(changed)
    assert "both are float32, and their SHA-256 differ" in str(found.difference(changed))
    # Nor do other shapes with the same numbers match.
    assert not found.matches(fingerprint([weights[0].reshape(4, 16), weights[1]], "float32"))


def models(count: int) -> Iterator[np.ndarray]:
    """Weights of many sizes and spreads: normal, uniform, heavy-tailed, and of one layer far larger than the other."""
    rng = np.random.default_rng(11)
    for number in range(count):
        size = int(rng.integers(1, 5000))
        kind = number % 4
        if kind == 0:
            weight = rng.standard_normal((1, size)) * 0.02
        elif kind == 1:
            weight = rng.uniform(-1, 1, (1, size)) / 30
        elif kind == 2:
            weight = rng.standard_t(3, (1, size)) * 0.1
        else:
            weight = rng.standard_normal((1, size)) * np.where(np.arange(size) < size // 2, 1.0, 0.001)
        yield weight.astype(np.float32)


@pytest.mark.law("base-dtype")
def test_rounding_is_forgiven_with_a_wide_margin() -> None:
    to_half, to_bf16 = [], []
    for weight in models(400):
        full = fingerprint([weight], "float32")
        half = fingerprint([weight.astype(np.float16)], "float16")
        bf16 = fingerprint([to_bfloat16(weight)], "bfloat16")
        for one in (full, half, bf16):
            assert all(one.matches(other) for other in (full, half, bf16))
        to_half.append(apart(full, half))
        to_bf16.append(apart(full, bf16))
    # What is derived: 0.0015 of each sketch in root mean square; and float16 has three bits more.
    assert 0.001 < math.sqrt(np.mean(np.square(to_bf16))) < 0.002
    assert max(to_bf16) < 0.65 * TOLERANCE
    assert max(to_half) < 0.1 * TOLERANCE


@pytest.mark.law("wrong-base")
def test_other_models_are_told_apart() -> None:
    found = [fingerprint([weight], "float32") for weight in models(60) if weight.size > 8]
    cast = [dataclasses.replace(one, dtype="float16") for one in found]
    assert [
        (i, j) for i, one in enumerate(found) for j, other in enumerate(cast) if i != j and one.matches(other)
    ] == []
    assert "and rounding between float32 and float16 explains no more than 0.005" in str(found[0].difference(cast[1]))


@pytest.mark.law("wrong-base")
@pytest.mark.parametrize(("change", "least", "most"), [(0.005, 0.44, 0.56), (0.01, 0.97, 1.0), (0.02, 1.0, 1.0)])
def test_a_small_change_is_noticed_as_often_as_is_said(change: float, least: float, most: float) -> None:
    # The table of the docstring: 50 %, 98.2 % and 99.99 % of the time.
    rng, noticed, tries = np.random.default_rng(13), 0, 400
    for _ in range(tries):
        weight = rng.standard_normal((1, 4000)).astype(np.float32)
        moved = rng.standard_normal((1, 4000))
        moved *= change * np.linalg.norm(weight) / np.linalg.norm(moved)
        tuned = to_bfloat16(weight + moved.astype(np.float32))
        noticed += not fingerprint([weight], "float32").matches(fingerprint([tuned], "bfloat16"))
    assert least <= noticed / tries <= most


@pytest.mark.parametrize(
    ("weights", "dtype", "error", "why"),
    [
        *(
            ([np.ones((2, 2)), np.array([[1.0, bad]])], "float64", ShapeError, "weight 1 holds NaN, infinity")
            for bad in (np.nan, np.inf, -np.inf, 1e300)
        ),
        ([np.ones((2, 2))], "float32", BackendError, "weight 0 has dtype float64; expected float32"),
        ([np.ones((2, 2), np.float32)], "bfloat16", BackendError, "expected uint16 or bfloat16"),
        ([np.ones((2, 2), np.int8)], "int8", BackendError, "dtype must be one of"),
        ([np.ones(2)], "float64", ShapeError, r"must be a NumPy array of shape \(rows, cols\); got shape \(2,\)"),
        ([[[1.0]]], "float64", ShapeError, "got a list"),
        ([], "float64", ShapeError, "no weight"),
    ],
)
def test_weights_that_have_no_fingerprint(weights: Any, dtype: str, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        fingerprint(weights, dtype)


GOOD = {"sha256": "0" * 64, "dtype": "float32", "sketch": (0.5,) * 8}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("sha256", ["0" * 63, "0" * 64 + "\n", "A" * 64, None]),
        ("dtype", ["int8", ["float32"]]),
        ("sketch", [(0.5,) * 7, *((0.5,) * 7 + (bad,) for bad in (math.nan, math.inf, 10**400, True, "0")), 0.5]),
    ],
)
def test_a_field_of_another_kind_is_refused(field: str, values: list[object]) -> None:
    assert Fingerprint(**GOOD).sketch == (0.5,) * 8  # type: ignore[arg-type]
    for value in values:
        with pytest.raises(ConfigError, match=f"a fingerprint's {field} must be"):
            Fingerprint(**{**GOOD, field: value})  # type: ignore[arg-type]


def test_memory_is_that_of_a_piece() -> None:
    weights = (np.ones((1024, 2048), np.float32) for _ in range(3))
    fingerprint([np.ones((1024, 2048), np.float32)], "float32")  # imports a compiler, if there is one
    assert peak_of(lambda: fingerprint(weights, "float32")) < 48 << 20  # of which two of the weights take 16

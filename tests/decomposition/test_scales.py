"""Errors, bounds and ranks do not depend on the scale of the numbers, in any dtype and library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.decomposition.internals import Algebra, lower_bound
from tnadapt import presets
from tnadapt.algebra.norms import norm, norm_of_difference, relative_difference
from tnadapt.backends import Backend, get_backend, load_backend
from tnadapt.decomposition import FitReport, GroupReport
from tnadapt.errors import BackendError, ShapeError

from .test_decompose import EACH

SHAPES = [(12, 8), (6, 8)]
CONFIGS = {name: config for name, config in EACH.items() if name != "nonlinear"} | {
    "lora, scaled": presets.lora(2, alpha=3.0),
    "krona of two terms": presets.krona(terms=2),
    "superlora": presets.superlora(2),
    "shuffled": presets.superlora(2, projection="shuffle"),
    "dense": presets.dense(),
}
# Where one array is the update itself, its numbers leave the dtype's normal range as the update's do.
ONE_ARRAY = ("fastfood", "dense")
# dtype -> exponents of powers of two with which integers below 2**3 are exact, subnormal numbers among them.
EXPONENTS = {"float64": (-1074, 1016), "float32": (-149, 124), "bfloat16": (-133, 124), "float16": (-24, 12)}
KINDS = [
    (library, dtype)
    for library in ("numpy", "torch", "jax")
    for dtype in sorted(EXPONENTS)
    if (library, dtype) != ("numpy", "bfloat16")
]


def integers(seed: int, shapes: list[tuple[int, int]] = SHAPES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(-7, 8, size=shape).astype(np.float64) for shape in shapes]


def error_of(plan: tna.UpdatePlan, params: dict[str, Any], exponent: int, given: list[np.ndarray]) -> float:
    """Relative error of LoRA, written out in extended precision, which holds squares of all these numbers."""
    host = {
        name: np.asarray(get_backend(array).to_numpy(array)).astype(np.longdouble) for name, array in params.items()
    }
    off = whole = np.longdouble(0)
    for i, plain in enumerate(given):
        made = host[f"group{i}.split0.factor0"] @ host[f"group{i}.split0.factor1"].T * np.longdouble(plan.config.scale)
        wanted = np.ldexp(plain.astype(np.longdouble), exponent)
        off += np.sum((made - wanted) ** 2)
        whole += np.sum(wanted**2)
    return float(np.sqrt(off / whole))


# Libraries that compile, and methods that iterate: an eighth of the usual examples is enough for a default run.
@pytest.mark.slow
@pytest.mark.law("scale-invariance")
@settings(max_examples=settings.default.max_examples // 8)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    kind_of=st.sampled_from(KINDS),
    where=st.floats(0, 1),
    seed=st.integers(0, 5),
)
@example("lora", ("numpy", "float64"), 0.0, 0)
@example("lora", ("jax", "float64"), 0.0, 0)  # XLA computes as if subnormal numbers were zero
@example("lora", ("jax", "float32"), 0.0, 0)
@example("lora", ("torch", "float32"), 1.0, 0)
@example("lokr", ("numpy", "float64"), 1.0, 1)
def test_a_power_of_two_changes_no_error(name: str, kind_of: tuple[str, str], where: float, seed: int) -> None:
    library, dtype = kind_of
    pytest.importorskip(library)
    backend, config = load_backend(library), CONFIGS[name]
    least, most = EXPONENTS[dtype]
    exponent = round(least + where * (most - least))
    if name in ONE_ARRAY:
        # The arrays are the updates, or their images by F, in the normal range: of halves, float32's.
        exponent = max(exponent, {"float64": -1000, "float16": -24}.get(dtype, -100))
    kind = np.float64 if dtype == "float64" else np.float32

    def decomposed(power: int) -> FitReport:
        own = [backend.asarray(np.ldexp(one.astype(kind), power), dtype) for one in integers(seed)]
        params, report = tna.decompose(own, config, max_iterations=3)
        assert all(np.isfinite(backend.to_numpy(array)).all() for array in params.values())
        return report

    there, here = decomposed(exponent), decomposed(0)
    for scaled, plain in zip(there.groups, here.groups, strict=True):
        assert scaled.error == pytest.approx(plain.error, rel=1e-12, abs=0.0)
        assert scaled.bound == pytest.approx(plain.bound, rel=1e-9, abs=1e-15)
        assert scaled.certified == plain.certified
        assert scaled.norm == math.ldexp(plain.norm, exponent)
    # Of all groups together: a subnormal norm has few digits of the weight that its group has.
    few = 5e-324 / max(group.norm for group in there.groups)
    assert there.error == pytest.approx(here.error, rel=1e-12 + 4 * few, abs=0.0)
    assert 0.0 <= there.bound <= there.error


@pytest.mark.law("scale-invariance")
@pytest.mark.parametrize("dtype", sorted(EXPONENTS))
@pytest.mark.parametrize("where", [0.0, 0.03, 0.25, 0.5, 0.75, 1.0])
def test_the_error_is_that_of_the_arrays_that_are_returned(backend: Backend, dtype: str, where: float) -> None:
    try:
        backend.dtype(dtype)
    except BackendError as error:
        pytest.skip(str(error))
    least, most = EXPONENTS[dtype]
    exponent, given = round(least + where * (most - least)), integers(3)
    kind = np.float64 if dtype == "float64" else np.float32
    own = [backend.asarray(np.ldexp(one.astype(kind), exponent), dtype) for one in given]
    params, report = tna.decompose(own, presets.lora(2))
    few = 1e-9 + 4 * 5e-324 / max(group.norm for group in report.groups)
    assert report.error == pytest.approx(error_of(report.plan, params, exponent, given), rel=few)
    best = math.hypot(*(norm(np.linalg.svd(one, compute_uv=False)[2:]) for one in given)) / math.hypot(
        *map(norm, given)
    )
    # Rounding to float32 costs a part in 1e7 of the update: of the error, far less than that.
    assert report.error == pytest.approx(best, rel=few)
    assert report.bound == pytest.approx(best, rel=few)
    assert report.bound <= report.error
    assert report.certified


@pytest.mark.law("scale-invariance")
@given(exponent=st.integers(-1060, 1015), error=st.floats(1e-3, 0.9), seed=st.integers(0, 3))
@example(-1060, 0.3, 0)
def test_a_rank_for_an_error_is_the_same_at_any_scale(exponent: int, error: float, seed: int) -> None:
    given = integers(seed, [(8, 6)] * 2)
    scaled = [np.ldexp(one, exponent) for one in given]
    for config in (presets.lora(), presets.lotr(weights=2, rows=8, cols=6)):
        ranks = [tna.search_rank(own, config, max_error=error, max_iterations=5).rank for own in (given, scaled)]
        assert ranks[0] == ranks[1]


@pytest.mark.law("scale-invariance")
@given(
    exponents=st.lists(st.integers(-1040, 1000), min_size=1, max_size=4),
    errors=st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
)
def test_groups_of_very_different_sizes_together(exponents: list[int], errors: list[float]) -> None:
    plan = tna.UpdatePlan(presets.lora(1), [(2, 2)] * len(exponents))
    norms = [math.ldexp(1.5, exponent) for exponent in exponents]
    known: dict[str, Any] = {"size": 4, "bound": 0.0, "certified": False, "iterations": 0, "method": ""}
    groups = tuple(GroupReport(norm=size, error=error, **known) for size, error in zip(norms, errors, strict=False))
    wide = [np.longdouble(1.5) * np.longdouble(2) ** exponent for exponent in exponents]
    off = np.sqrt(sum((size * np.longdouble(error)) ** 2 for size, error in zip(wide, errors, strict=False)))
    expected = float(off / np.sqrt(sum(size**2 for size in wide)))
    assert FitReport(plan, groups).error == pytest.approx(expected, rel=1e-12, abs=1e-320)


def test_updates_of_zeros_beside_others_and_a_norm_that_float64_cannot_hold() -> None:
    given = [np.zeros((6, 4)), np.random.default_rng(0).normal(size=(6, 4)) * 1e-200]
    _, report = tna.decompose(given, presets.lora(1))
    assert report.groups[0].error == 0.0
    assert report.error == pytest.approx(report.groups[1].error, rel=1e-12)
    with pytest.raises(ShapeError, match="Frobenius norm exceeds float64"):
        tna.decompose([np.full((12, 8), 1.7e308)], presets.lora(1))


@pytest.mark.parametrize("exponent", [-1000, -500, 0, 300, 1000])
def test_a_nonlinear_f_of_any_size_is_fitted_or_left_alone(exponent: int) -> None:
    given = [np.ldexp(one, exponent) for one in integers(0)]
    params, report = tna.decompose(given, presets.superlora(2, projection="nonlinear"), max_iterations=20)
    made = report.plan.deltas(params)
    off = math.hypot(*(norm_of_difference(a, b) / math.ldexp(1, exponent) for a, b in zip(given, made, strict=True)))
    whole = math.hypot(*(norm(one) / math.ldexp(1, exponent) for one in given))
    assert report.error == pytest.approx(off / whole, rel=1e-9)
    # What is small beside F(x_start) is out of reach, and the start is returned; what is not is fitted.
    assert report.error == 1.0 if exponent < 0 else report.error < 0.8
    assert not report.certified


# -- Float32 and half inputs in float64 --------------------------------------------------------------


@pytest.mark.law("scale-invariance")
@given(scale=st.sampled_from([1.0, 1e-2, 1e-4, 1e-6]), seed=st.integers(0, 20), columns=st.sampled_from([7, 900, 5000]))
def test_bounds_of_single_precision_are_those_of_double(scale: float, seed: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(6, 1)) @ rng.normal(size=(1, columns)) + scale * rng.normal(size=(6, columns))
    delta = made.astype(np.float32)
    network = tna.UpdatePlan(presets.lora(2), [delta.shape]).groups[0].network
    bound, wide = (
        lower_bound(Algebra(get_backend(x), x), network, x.reshape(-1)) for x in (delta, delta.astype(np.float64))
    )
    assert bound == wide
    true = norm(np.linalg.svd(delta.astype(np.float64), compute_uv=False)[2:])
    # Of a Gram matrix in float64 the square root of its rounding is left.
    assert true - 1e-6 * norm(delta) <= bound <= true * (1 + 1e-12)


@given(seed=st.integers(0, 20), large=st.integers(10, 30), count=st.sampled_from([4, 10_000, 200_004]))
def test_norms_of_single_precision_add_up_in_double(seed: int, large: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count).astype(np.float32) * np.float32(2.0**large)
    algebra = Algebra(get_backend(x), x)
    exact = math.sqrt(math.fsum((x.astype(np.float64) ** 2).tolist()))
    assert algebra.norm(x) == pytest.approx(exact, rel=1e-14)
    columns = x.reshape(-1, 4)
    assert algebra.columns(columns) == pytest.approx(np.linalg.norm(columns.astype(np.float64), axis=0), rel=1e-14)


@pytest.mark.slow
def test_without_64_bit_numbers_jax_is_measured_on_the_host() -> None:
    jax = pytest.importorskip("jax")
    given = integers(1)
    expected = tna.decompose([one.astype(np.float32) for one in given], presets.lora(2))[1]
    with jax.enable_x64(False):
        own = [jax.numpy.asarray(one, "float32") for one in given]
        params, report = tna.decompose(own, presets.lora(2))
        assert Algebra(get_backend(own[0]), own[0]).double.backend.name == "numpy"
    assert report.error == pytest.approx(expected.error, rel=1e-10)
    assert report.bound == pytest.approx(expected.bound, rel=1e-10)
    assert all(get_backend(array).name == "jax" for array in params.values())


# -- Norms, and what else is measured by them --------------------------------------------------------

NUMBERS = st.lists(st.integers(-8, 8), min_size=1, max_size=12)


@pytest.mark.law("scale-invariance")
@given(numbers=NUMBERS, exponent=st.integers(-1074, 1018))
def test_norms_of_any_size(numbers: list[int], exponent: int) -> None:
    array = np.array(numbers, np.float64)
    scaled = np.ldexp(array, exponent)
    expected = np.ldexp(np.sqrt(np.sum(array.astype(np.longdouble) ** 2)), exponent)
    assert norm(scaled) == pytest.approx(float(expected), rel=1e-15, abs=5e-324)
    assert norm_of_difference(scaled, np.zeros_like(scaled)) == norm(scaled)
    assert relative_difference(scaled, -scaled) == (2.0 if array.any() else 0.0)
    assert relative_difference(scaled, scaled) == 0.0


@pytest.mark.law("scale-invariance")
@given(one=st.integers(-1060, 1010), other=st.integers(-1060, 1010), seed=st.integers(0, 5))
def test_the_geometry_of_updates_of_any_size(one: int, other: int, seed: int) -> None:
    dense, variant = integers(seed, [(6, 5), (6, 5)])
    plain = tna.geometry(dense, variant, k=2)
    same = tna.geometry(np.ldexp(dense, one), np.ldexp(variant, one), k=2)
    assert same == plain
    apart = tna.geometry(np.ldexp(dense, one), np.ldexp(variant, other), k=2)
    assert apart[:2] == plain[:2]
    assert apart.d_euclid >= 0.0
    if one - other > 60:
        assert apart.d_euclid == pytest.approx(1.0)

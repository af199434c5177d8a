"""Laws of ΔW, over every way to make a group, fold and projection, on every array library, and of their files."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import relative_error
from tests.support.depth import in_depth
from tests.support.references import reference
from tnadapt.algebra.folding import FOLDS
from tnadapt.algebra.maps import KINDS
from tnadapt.backends import Backend

from .grid import KINDS_OF_GROUP, SHAPES, SORTS, config_of, everything

# Relative to the largest element: of float64 as everywhere, of float32 some hundred of its last digits.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}
TARGETS = tuple(tna.Target(f"block{number}.q", shape, "q") for number, shape in enumerate(SHAPES))


def in_libraries(jax: Iterable[tuple[str, str, str]] = ()) -> pytest.MarkDecorator:
    """Every kind of group, fold and projection on NumPy.

    Where every operation is a call of another library's, one fold and an F of each sort; on JAX, which compiles every
    operation anew, what is given.
    """
    cases = [pytest.param("numpy", *case) for case in itertools.product(KINDS_OF_GROUP, FOLDS, KINDS)]
    for library in ("torch", "cupy"):
        cases += [pytest.param(library, *case) for case in itertools.product(KINDS_OF_GROUP, ["hypercube"], SORTS)]
    cases += [pytest.param("jax", *case, marks=pytest.mark.slow) for case in jax]
    return pytest.mark.parametrize(("backend", "kind", "fold", "projection"), cases, indirect=["backend"])


def numbers(plan: tna.UpdatePlan, dtype: str = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in plan.param_shapes.items()}


def textbook(config: tna.Config, plan: tna.UpdatePlan, arrays: dict[str, np.ndarray]) -> np.ndarray:
    start = {name: array.astype(np.float64) for name, array in plan.init().items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    return np.concatenate([delta.reshape(-1) for delta in reference.deltas(config, SHAPES, exact, None, start)])


@pytest.mark.law("update-formula")
@everything
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "backend", ["numpy", pytest.param("array_api_strict", marks=pytest.mark.slow), "torch", "cupy"], indirect=True
)
def test_the_update_is_the_textbook_formula(
    backend: Backend, kind: str, fold: str, projection: str, dtype: str
) -> None:
    assert error_of(backend, config_of(kind, fold, projection), dtype) < TOLERANCES[dtype]


@pytest.mark.slow
@pytest.mark.law("update-formula")
@pytest.mark.parametrize("projection", in_depth(KINDS, SORTS))
@pytest.mark.parametrize("kind", KINDS_OF_GROUP)
@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_the_update_is_the_textbook_formula_on_jax(backend: Backend, kind: str, projection: str) -> None:
    """In one fold, and the dtype that JAX is used with: it compiles every operation anew."""
    assert error_of(backend, config_of(kind, "hypercube", projection), "float32") < TOLERANCES["float32"]


def error_of(backend: Backend, config: tna.Config, dtype: str) -> float:
    plan = tna.UpdatePlan(config, SHAPES)
    arrays = numbers(plan, dtype)
    found = backend.to_numpy(plan.vector({name: backend.asarray(array, dtype) for name, array in arrays.items()}))
    assert found.dtype == dtype
    return relative_error(found, textbook(config, plan, arrays))


@pytest.mark.law("update-slice")
@in_libraries()
def test_a_slice_is_the_whole_cut(backend: Backend, kind: str, fold: str, projection: str) -> None:
    plan = tna.UpdatePlan(config_of(kind, fold, projection), SHAPES)
    arrays = {name: backend.asarray(array) for name, array in numbers(plan).items()}
    whole = backend.to_numpy(plan.vector(arrays))
    scale = np.abs(whole).max()
    edges = np.cumsum([0, *(math.prod(shape) for shape in SHAPES)])
    for weight, (lo, hi) in enumerate(itertools.pairwise(edges)):
        found = backend.to_numpy(plan.delta(arrays, weight))
        assert np.abs(found.reshape(-1) - whole[lo:hi]).max() <= 1e-12 * scale
    # Over the edge of a group, single elements, and all.
    for lo, hi in ((50, 64), (52, 53), (53, 54), (0, 1), (105, 106), (0, 106)):
        found = backend.to_numpy(plan.vector(arrays, lo, hi))
        assert np.abs(found - whole[lo:hi]).max(initial=0.0) <= 1e-12 * scale


@pytest.mark.law("parameter-count")
@everything
def test_the_elements_counted_are_those_made_and_the_formula_s(kind: str, fold: str, projection: str) -> None:
    config = config_of(kind, fold, projection)
    plan = tna.UpdatePlan(config, SHAPES)
    made = sum(array.size for array in plan.init().values())
    assert plan.num_parameters == made == reference.count(config, SHAPES) == tna.parameter_count(config, SHAPES)


@pytest.mark.law("fresh-is-zero")
@everything
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("numpy", "float64"), ("numpy", "float32"), ("numpy", "float16"), ("torch", "bfloat16")],
    indirect=["backend"],
)
def test_a_fresh_update_is_exactly_zero(backend: Backend, kind: str, fold: str, projection: str, dtype: str) -> None:
    plan = tna.UpdatePlan(config_of(kind, fold, projection), SHAPES)
    fresh = plan.init(backend.name, dtype)
    assert not bool(plan.vector(fresh).any())
    assert not bool(plan.vector(fresh, 41, 73).any())


@pytest.mark.slow
@pytest.mark.law("file-round-trip", "file-bytes")
@everything
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_a_file_is_read_to_the_bit_and_written_to_the_same_bytes(
    tmp_path: Path, kind: str, fold: str, projection: str, dtype: str
) -> None:
    config = config_of(kind, fold, projection)
    arrays = numbers(tna.UpdatePlan(config, SHAPES), dtype)
    tna.save(tmp_path / "one", tna.AdapterFile(config=config, targets=TARGETS, arrays=arrays))
    found = tna.load(tmp_path / "one")
    assert found.config == config
    assert {name: (array.dtype, array.tobytes()) for name, array in found.arrays.items()} == {
        name: (array.dtype, array.tobytes()) for name, array in arrays.items()
    }
    tna.save(tmp_path / "two", found)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again, before = found.deltas(), tna.UpdatePlan(config, SHAPES).deltas(arrays)
    assert all(np.array_equal(a, b) for a, b in zip(again, before, strict=True))


@pytest.mark.law("copies")
@everything
def test_copies_and_pickles_compute_the_same_bits(kind: str, fold: str, projection: str) -> None:
    plan = tna.UpdatePlan(config_of(kind, fold, projection), SHAPES)
    arrays = numbers(plan)
    want = plan.vector(arrays).tobytes()
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other.vector(arrays).tobytes() == want


@pytest.mark.law("not-finite-shows")
@in_libraries()
def test_one_number_that_is_not_finite_spoils_all_that_f_mixes_it_with(
    backend: Backend, kind: str, fold: str, projection: str
) -> None:
    """By a linear or nonlinear F the whole group; by itself or shuffled, what the products bring it to."""
    plan = tna.UpdatePlan(config_of(kind, fold, projection), SHAPES)
    arrays = numbers(plan)
    clean, first = vector(backend, plan, arrays), plan.groups[0].size
    for name in (name for name in arrays if name.startswith("group0.")):
        for index, value in itertools.product((0, arrays[name].size - 1), (np.nan, np.inf)):
            spoilt = arrays[name].copy()
            spoilt.flat[index] = value
            found = vector(backend, plan, {**arrays, name: spoilt})
            if projection in ("identity", "shuffle"):
                finite = np.isfinite(found)
                assert np.array_equal(found[finite], clean[finite])
                # The last element may be one that only padding would hold; the first is not.
                assert index or not finite[:first].all()
            else:
                assert not np.isfinite(found[:first]).any()


@pytest.mark.law("not-finite-shows")
@in_libraries(jax=[("cp", "hypercube", projection) for projection in KINDS])
def test_what_is_not_finite_does_not_hide(backend: Backend, kind: str, fold: str, projection: str) -> None:
    """NaN or infinity in an array is seen in the update of its own group, and in no other group's."""
    plan = tna.UpdatePlan(config_of(kind, fold, projection), SHAPES)
    arrays = numbers(plan)
    want = vector(backend, plan, arrays)
    own = [name for name in arrays if name.startswith("group0.")]
    for name, value in itertools.product(own, (np.nan, np.inf, -np.inf)):
        found = vector(backend, plan, {**arrays, name: np.full_like(arrays[name], value)})
        first = plan.groups[0].size
        assert not np.isfinite(found[:first]).all()
        assert np.array_equal(found[first:], want[first:])


def vector(backend: Backend, plan: tna.UpdatePlan, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The update, by a library; infinity less infinity is no number, as it should be."""
    with np.errstate(invalid="ignore"):
        return backend.to_numpy(plan.vector({name: backend.asarray(array) for name, array in arrays.items()}))

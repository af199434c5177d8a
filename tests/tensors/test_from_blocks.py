"""Tensors that are read block by block: memory maps and dask arrays give what NumPy's arrays give, in little memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.tensors as tt
from tests.conftest import peak_of, relative_error
from tests.decomposition.internals import ArrayPasses, BlockPasses, DaskPasses
from tnadapt.errors import BackendError, ConfigError, ShapeError

from .test_modes import error_of, numbers

SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)


def mapped(path: Path, tensor: np.ndarray) -> np.memmap:
    found = np.memmap(path / "tensor", tensor.dtype, "w+", shape=tensor.shape)
    found[:] = tensor
    return found


def dasked(path: Path, tensor: np.ndarray) -> Any:
    return pytest.importorskip("dask.array").from_array(tensor, chunks=tuple(max(1, d // 2) for d in tensor.shape))


SOURCES: dict[str, Callable[[Path, np.ndarray], Any]] = {"memory map": mapped, "dask": dasked}
sources = pytest.mark.parametrize("source", SOURCES)


def check_passes(passes: BlockPasses, tensor: np.ndarray, width: int) -> None:
    """Compare every pass with the formula on the whole tensor."""
    rng = np.random.default_rng(1)
    order, shape = tensor.ndim, tensor.shape
    tests = [rng.normal(size=(d, width)) for d in shape]
    modes = range(order)
    sketches, square = passes.sketches(dict.fromkeys(modes, tests))
    grams, again = passes.grams(modes)
    assert square == pytest.approx(float(np.vdot(tensor, tensor).real))
    assert again == pytest.approx(square)
    for mode in modes:
        rows = np.moveaxis(tensor, mode, 0).reshape(shape[mode], -1)
        kr = tt.khatri_rao([one for m, one in enumerate(tests) if m != mode])
        assert relative_error(sketches[mode], rows @ kr) < 1e-10
        assert relative_error(grams[mode], rows @ rows.conj().T) < 1e-10
    factors = {mode: rng.normal(size=(shape[mode], 2)) for mode in modes if mode != 1}
    expected = tensorly.tenalg.multi_mode_dot(tensor, list(factors.values()), modes=list(factors), transpose=True)
    assert relative_error(passes.projected(factors), expected) < 1e-10
    for mode, found in passes.all_but_one(factors).items():
        others = [m for m in factors if m != mode]
        expected = tensorly.tenalg.multi_mode_dot(tensor, [factors[m] for m in others], modes=others, transpose=True)
        assert relative_error(found, expected) < 1e-10
    core, whole = rng.normal(size=(2,) * order), [rng.normal(size=(d, 2)) for d in shape]
    far = float(np.linalg.norm(tensor - tensorly.tucker_to_tensor((core, whole))))
    assert passes.distance(core, whole) == pytest.approx(far)


@pytest.mark.law("decompositions")
@given(SHAPES, st.integers(1, 300), st.sampled_from(["float64", "complex128"]))
def test_passes_over_blocks_of_any_size(shape: tuple[int, ...], elements: int, kind: str) -> None:
    tensor = numbers(shape, 1, kind)
    check_passes(ArrayPasses(tensor, elements * tensor.itemsize), tensor, 3)


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6), (2, 3, 4, 3)])
def test_passes_over_dask(shape: tuple[int, ...], tmp_path: Path) -> None:
    for kind in ("float64", "complex128"):
        tensor = numbers(shape, 2, kind)
        check_passes(DaskPasses(dasked(tmp_path, tensor)), tensor, 3)


def noisy(kind: str = "float64") -> np.ndarray:
    tensor = tt.random_tucker((20, 21, 22), (4, 5, 3), random_state=1, dtype=kind).to_tensor()
    return tensor + 0.01 * np.abs(tensor).std() * numbers(tensor.shape, 3, kind)


@sources
@pytest.mark.parametrize("kind", ["float64", "complex128"])
@pytest.mark.parametrize("request_", [{"rank": (4, 5, 3)}, {"max_error": 0.03}], ids=["rank", "error"])
def test_tucker_is_that_of_memory_and_a_train_nearly(
    source: str, kind: str, request_: dict[str, Any], tmp_path: Path
) -> None:
    tensor = noisy(kind)
    found = tna.tucker(SOURCES[source](tmp_path, tensor), memory=1 << 14, **request_)
    expected = tna.tucker(tensor, **request_)
    assert found.rank == expected.rank
    made = error_of(found, tensor)
    assert found.error == pytest.approx(made, rel=1e-6)
    assert made <= expected.error * 1.001
    assert found.bound <= found.error
    if kind == "float64":
        request_ = {"rank": (4, 3)} if "rank" in request_ else request_
        train = tna.tensor_train(SOURCES[source](tmp_path, tensor), memory=1 << 14, **request_)
        made = error_of(train, tensor)
        assert train.error == pytest.approx(made, rel=1e-6)
        assert made <= (0.03 if "max_error" in request_ else tna.tensor_train(tensor, **request_).error * 1.01)


@sources
def test_an_exact_rank_is_found(source: str, tmp_path: Path) -> None:
    tensor = tt.random_tt((9, 8, 7, 6), 2, random_state=1).to_tensor()
    for found in (
        tna.tensor_train(SOURCES[source](tmp_path, tensor), 2, memory=1 << 12),
        tna.tucker(SOURCES[source](tmp_path, tensor), (2, 4, 4, 2), memory=1 << 12),
    ):
        assert relative_error(found.to_tensor(), tensor) < 1e-10
        assert found.certified


@sources
@pytest.mark.parametrize(("kind", "result"), [("float32", "float32"), ("float16", "float32"), ("int16", "float64")])
def test_the_dtype_of_the_result(source: str, kind: str, result: str, tmp_path: Path) -> None:
    tensor = (10 * numbers((6, 5, 4))).astype(kind)
    found = tna.tucker(SOURCES[source](tmp_path, tensor), 2)
    assert {array.dtype.name for array in found.arrays} == {result}
    assert found.error == pytest.approx(tna.tucker(tensor.astype("float64"), 2).error, rel=1e-3)


def test_memory_is_some_blocks(tmp_path: Path) -> None:
    # 8 MB in float32, read in blocks of 128 kB in float64.
    array = np.memmap(tmp_path / "tensor", np.float32, "w+", shape=(128, 128, 128))
    array[:] = np.sin(np.arange(128))[:, None, None] * np.cos(np.arange(128))[:, None]
    block = 1 << 17
    # From 2.5, NumPy counts the workspace of LAPACK, too, about 1 MB here.
    most = array.nbytes / (4 if np.lib.NumpyVersion(np.__version__) < "2.5.0" else 3)
    assert peak_of(lambda: tna.tucker(array, 2, memory=block)) < most
    assert peak_of(lambda: tna.tensor_train(array, 2, memory=block)) < most
    assert math.prod(array.shape) * 4 == array.nbytes


@sources
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of products with infinity, in dask's threads
@pytest.mark.parametrize("words", [{"rank": 2}, {"max_error": 0.1}])
@pytest.mark.parametrize("function", [tna.tucker, tna.tensor_train])
def test_what_is_not_finite_is_refused(source: str, function: Any, words: dict[str, Any], tmp_path: Path) -> None:
    for value, place in ((np.nan, (0, 0, 0)), (np.inf, (3, 4, 5))):
        wrong = numbers((4, 5, 6))
        wrong[place] = value
        with pytest.raises(ShapeError, match="NaN or infinity"):
            function(SOURCES[source](tmp_path, wrong), **words)


@sources
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: tna.tucker(x), ShapeError, "either rank= or max_error="),
        (lambda x: tna.tensor_train(x, max_error=1e-9), ShapeError, "least for a tensor read in blocks"),
        (lambda x: tna.tucker(x, (5, 2, 2)), ShapeError, "rank 5 of mode 0 is above its size 4"),
        (lambda x: tna.tucker(x, 2, memory=0), ShapeError, "memory must be"),
        (lambda x: tna.tucker(x, 2, init="random"), ConfigError, "leave init, fixed, mask and weights out"),
        (lambda x: tna.tucker(x.astype("S1"), 1), BackendError, "numbers"),
    ],
)
def test_what_cannot_be_is_refused(source: str, call: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        call(SOURCES[source](tmp_path, numbers((4, 5, 6))))


def test_other_functions_say_that_they_need_memory(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"a dask array.*x\.compute\(\)"):
        tna.cp(dasked(tmp_path, np.ones((3, 3, 3))), 1)

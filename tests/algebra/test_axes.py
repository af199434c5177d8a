"""Networks whose modes index the fold in another order, or several of its sizes in one mode."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.formats import FORMATS
from tnadapt.backends import load_backend
from tnadapt.testing import _reference as reference

P = tna.presets


def drawn(plan: tna.SuperLoRA, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}


def rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix, rtol=1e-9)) if matrix.any() else 0


@st.composite
def reordered(draw: st.DrawFn) -> tna.SuperLoRA:
    """A plan of any axes: some single sizes, some several in one mode."""
    weights, row, rows, col, cols = (draw(st.integers(1, 3)) for _ in range(5))
    order = draw(st.permutations(range(5)))
    cuts = sorted(draw(st.sets(st.integers(1, 4))))
    axes = [tuple(order[lo:hi]) for lo, hi in zip([0, *cuts], [*cuts, 5], strict=True)]
    name = draw(st.sampled_from(sorted(FORMATS.built_in)))
    given: Any = draw(st.integers(1, 3))
    if name == "tucker" and draw(st.booleans()):
        given = tuple(draw(st.none() | st.integers(1, 3)) for _ in axes)
    shape = (row * rows, col * cols)
    fold: Any = (weights, row, rows, col, cols)
    if draw(st.booleans()):
        fold = ("weights", f"rows/{rows}", rows, f"cols/{cols}", cols)
    config = tna.Config(
        given, order=len(axes), groups=1, fold=fold, axes=axes, format=name,
        terms=draw(st.integers(1, 2)),
        splits=2 if draw(st.booleans()) else 1, combine="hadamard", leading="same",
        alpha=draw(st.none() | st.just(2.0)),
        projection=draw(st.sampled_from(["identity", "identity", "linear"])),
    )  # fmt: skip
    return tna.SuperLoRA(config, [shape] * weights)


@pytest.mark.law("update-formula", "update-slice", "parameter-count", "largest-rank")
@given(plan=reordered(), data=st.data())
def test_updates_are_the_textbooks_and_slices_are_parts_of_them(plan: tna.SuperLoRA, data: st.DataObject) -> None:
    params = drawn(plan)
    expected = reference.deltas(plan.config, plan.shapes, params)
    for weight, (found, own) in enumerate(zip(plan.deltas(params), expected, strict=True)):
        assert relative_error(found, own) < 1e-12
        assert relative_error(plan.delta(params, weight), own) < 1e-12
        assert rank(own) <= plan.largest_rank(weight)
        how = factoring(plan, weight)
        if how is not None:
            numpy = load_backend("numpy")
            assert relative_error(how(numpy, params).dense(numpy), own) < 1e-12
    whole = np.concatenate([delta.reshape(-1) for delta in expected])
    start = data.draw(st.integers(0, plan.size - 1))
    stop = data.draw(st.integers(start + 1, plan.size))
    scale = float(np.max(np.abs(whole))) or 1.0
    assert np.max(np.abs(plan.vector(params, start, stop) - whole[start:stop])) < 1e-12 * scale
    assert plan.num_parameters == reference.count(plan.config, plan.shapes) == sum(a.size for a in params.values())
    assert not any(delta.any() for delta in plan.deltas(plan.init()))


@given(plan=reordered())
def test_the_adjoint_of_each_array_is_that_of_a_linear_map(plan: tna.SuperLoRA) -> None:
    network, numpy = plan.groups[0].network, load_backend("numpy")
    arrays = {name: drawn(plan)[full] for name, full in plan.groups[0].names.items()}
    vec = np.random.default_rng(1).normal(size=network.size)
    whole = float(vec @ network.whole(numpy, arrays))
    scale = float(np.linalg.norm(vec) * np.linalg.norm(network.whole(numpy, arrays))) or 1.0
    for prefixes in network.prefixes:
        for prefix, split in zip(prefixes, network.splits, strict=True):
            # Without this term's array, what is left is the other terms.
            name = prefix + next(iter(split.shapes))
            rest = float(vec @ network.whole(numpy, {**arrays, name: 0.0 * arrays[name]}))
            found = network.adjoint(numpy, arrays, vec)[name]
            assert abs(float(np.sum(found * arrays[name])) - (whole - rest)) < 1e-12 * scale


@pytest.mark.law("special-cases")
@given(sizes=st.tuples(*[st.integers(1, 4)] * 3), name=st.sampled_from(sorted(FORMATS.built_in)), r=st.integers(1, 3))
def test_the_folds_own_order_is_no_change(sizes: tuple[int, int, int], name: str, r: int) -> None:
    plain = tna.Config(r, order=3, groups=1, fold=sizes, format=name)
    one, other = (tna.SuperLoRA(c, [sizes[1:]] * sizes[0]) for c in (plain, plain.replace(axes=(0, 1, 2))))
    assert one.param_shapes == other.param_shapes
    params = drawn(one)
    for mine, theirs in zip(one.deltas(params), other.deltas(params), strict=True):
        assert relative_error(theirs, mine) < 1e-12
    for mine, theirs in zip(one.init().values(), other.init().values(), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_tensor_train_matrix_pairs_digits_of_rows_and_columns() -> None:
    config = tna.Config(3, order=3, fold=(2, 3, 4, 5, 2, 3), axes=((0, 3), (1, 4), (2, 5)), format="tt")
    plan = tna.SuperLoRA(config, [(24, 30)])
    assert plan.param_shapes == {
        "group0.split0.core0": (1, 10, 3), "group0.split0.core1": (3, 6, 3), "group0.split0.core2": (3, 12, 1)
    }  # fmt: skip
    params = drawn(plan)
    cores = [params[f"group0.split0.core{m}"] for m in range(3)]
    digits = zip(cores, (2, 3, 4), strict=True)
    one, two, three = (core.reshape(core.shape[0], rows, -1, core.shape[2]) for core, rows in digits)
    expected = np.einsum("apxb,bqyc,crzd->pqrxyz", one, two, three).reshape(24, 30)
    assert relative_error(plan.deltas(params)[0], expected) < 1e-12


@pytest.mark.parametrize("name", sorted(FORMATS.built_in))
def test_the_laws_hold(name: str) -> None:
    config = tna.Config(2, order=3, groups=1, fold=("weights", "rows", "cols"), axes=(1, 0, 2), format=name)
    assert tna.verify(config, [(6, 5)] * 3, backends=["numpy"]).holds


@pytest.mark.parametrize("name", ["cp", "tt"])
def test_a_slice_forms_no_other_weight(name: str) -> None:
    config = tna.Config(2, order=3, groups=1, fold=("weights", "rows", "cols"), axes=(1, 0, 2), format=name)
    plan = tna.SuperLoRA(config, [(24, 20)] * 5)
    how = factoring(plan, 3)
    assert how is not None
    assert [(size.rows, size.cols, size.width) for size in how.sizes] == [(24, 20, 2)]
    assert plan.lora_rank == 2


def test_updates_in_another_order_are_fitted() -> None:
    config = tna.Config(2, order=3, groups=1, fold=("weights", "rows", "cols"), axes=(1, 0, 2), format="tt")
    plan = tna.SuperLoRA(config, [(6, 5)] * 3)
    deltas = plan.deltas(drawn(plan))
    params, report = tna.decompose(deltas, config)
    assert report.error < 1e-6
    assert report.bound <= report.error
    for found, delta in zip(plan.deltas(params), deltas, strict=True):
        assert relative_error(found, delta) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": (0, 1)}, "axes must name each of the positions 0 to 2 of fold=(4, 6, 5) once, in the order"),
        ({"axes": (0, 1, 1)}, "axes must name each of the positions 0 to 2"),
        ({"axes": ((0, 1, 2), ())}, "axes must name each of the positions 0 to 2"),
        ({"axes": (0, 1, 3)}, "axes[2] must be from 0 to 2"),
        ({"axes": "rows"}, "the positions 0 to 2 of fold=(4, 6, 5) once, such as (0, 1, 2); got 'rows'"),
        ({"axes": ((0, 1), 2)}, "are 2 modes and order is 3; set order=2"),
        ({"axes": (0, 1, 2), "fold": "hypercube"}, "are positions in a fold of explicit sizes, and fold='hypercube'"),
        ({"axes": (1, 0, 2), "splits": 2}, "Kronecker splits have several: leave axes out, or use splits=1"),
    ],
)
def test_axes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        tna.Config(**{"order": 3, "groups": 1, "fold": (4, 6, 5), "format": "tt", **changes})


def test_a_fold_with_more_elements_than_the_group_is_refused() -> None:
    config = tna.Config(2, order=3, groups=1, fold=(4, 6, 5), axes=(1, 0, 2), format="tt")
    with pytest.raises(tna.ShapeError, match=re.escape("all 120 elements of fold=(4, 6, 5), and a group has 90")):
        tna.SuperLoRA(config, [(6, 5)] * 3)


def test_axes_are_part_of_a_config_and_left_out_where_there_are_none() -> None:
    config = tna.Config(2, order=2, groups=1, fold=(4, 6, 5), axes=((1, 0), 2))
    assert config.axes == ((1, 0), (2,))
    assert config.to_dict()["axes"] == [[1, 0], [2]]
    assert tna.Config.from_dict(config.to_dict()) == config
    assert "axes" not in tna.Config(2).to_dict()


def test_blocks_are_fitted_each_by_itself_to_the_optimum() -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(8, 6)), np.zeros((8, 6))]
    deltas[1][:4, :3] = 1.0  # the other blocks are zero
    _, report = tna.decompose(deltas, P.gralora(2, blocks=2))
    left = 0.0
    for delta in deltas:
        for block in (delta[:4, :3], delta[:4, 3:], delta[4:, :3], delta[4:, 3:]):
            left += float(np.sum(np.linalg.svd(block, compute_uv=False)[1:] ** 2))
    whole = sum(float(np.sum(delta**2)) for delta in deltas)
    assert report.error == pytest.approx(np.sqrt(left / whole))
    assert report.certified

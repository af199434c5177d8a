"""Arrays that are given, tied, scaled, or made of the base: what they compute, how they start, what is refused."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import dominant_basis
from tests.algebra.random_parameters import drawn
from tests.conftest import NUMPY_AND_TORCH, relative_error
from tests.support.references import reference
from tnadapt.algebra.sources import (
    BaseCore,
    FromBase,
    Given,
    Mixed,
    Scaled,
    Seeded,
    Source,
    Tied,
    Trained,
    source_from_dict,
)

SHAPES = [(6, 4)] * 3
BASE = list(np.random.default_rng(7).normal(size=(3, 6, 4)))

# What every array of every group may be, and the settings of the networks that have them.
NETWORKS: dict[str, tna.Config] = {
    "lora": tna.Config(rank=2, alpha=3.0),
    "weighted": tna.Config(rank=2, format="cp-weighted"),
    "tucker": tna.Config(rank=2, format="tucker"),
    "train": tna.Config(rank=2, order=3, format="tt", fold=(2, 3, 4)),
    "lokr": tna.presets.lokr(2, leading="same"),
    "loha": tna.presets.loha(2),
    "terms": tna.Config(rank=2, terms=2),
    "projected": tna.Config(rank=2, order=3, fold="balanced", projection="linear", ratio=0.5),
    "balanced": tna.Config(rank=2, splits=2, fold="balanced"),
}


@st.composite
def configs(draw: st.DrawFn, names: tuple[str, ...] = tuple(NETWORKS)) -> tna.Config:
    """A network with a source for each of its arrays."""
    config = NETWORKS[draw(st.sampled_from(names))].replace(seed=draw(st.integers(0, 2**64 - 1)))
    network = tna.UpdatePlan(config, SHAPES).groups[0].network
    sources: dict[str, Source] = {}
    for name, shape in network.shapes.items():
        frozen = Seeded("normal", shared=draw(st.booleans()))
        choices: list[Source] = [Trained(), Trained(), frozen, Tied(f"group{draw(st.integers(0, 2))}.{name}")]
        if len(shape) == 2:
            diagonals = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
            for source in (frozen, Trained(), choices[3]):
                choices += [Scaled(source, *diagonals), Mixed(source)]
        sources[name] = draw(st.sampled_from(choices))
    return config.replace(sources=sources)


def plan_of(config: tna.Config) -> tna.UpdatePlan:
    """The plan of a config, unless nothing of a term is trained."""
    try:
        return tna.UpdatePlan(config, SHAPES)
    except tna.ConfigError as error:
        if "nothing is left to train" not in str(error) and "can be zero at the start" not in str(error):
            raise
        assume(False)
        raise


@pytest.mark.law("sources")
@given(configs())
def test_the_laws_hold_for_any_sources_of_all_arrays(config: tna.Config) -> None:
    plan = plan_of(config)
    report = tna.verify(config, SHAPES, backends=NUMPY_AND_TORCH)
    assert report.holds, str(report)
    assert plan.param_shapes == reference.trained_shapes(config, [dict(group.network.shapes) for group in plan.groups])
    assert tna.Config.from_dict(config.to_dict()) == config
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), copy.copy(plan)):
        assert other.param_shapes == plan.param_shapes
        for ours, theirs in zip(other.init().values(), plan.init().values(), strict=True):
            assert ours.tobytes() == theirs.tobytes()


# -- What is refused --------------------------------------------------------------------------------


TRAINED: dict[str, Any] = {"source": "trained"}
UNBOUND = tna.UpdatePlan(tna.presets.lora_xs(2), SHAPES)


def made(
    sources: dict[str, Source], shapes: list[tuple[int, int]] = SHAPES, given: Any = None, **settings: Any
) -> dict[str, np.ndarray]:
    return tna.UpdatePlan(tna.Config(**{"rank": 2, **settings}, sources=sources), shapes, given=given).init()


def brought(array: Any, name: str = "group0.split0.factor1") -> dict[str, np.ndarray]:
    return made({"factor1": Given()}, given={name: array})


def of_core(changes: dict[str, Source]) -> tna.UpdatePlan:
    config = tna.presets.craft(2, groups=1)
    return tna.UpdatePlan(config.replace(sources={**config.sources, **changes}), SHAPES)


ZERO, ROWS, TRAIN = Scaled(Seeded("normal"), start=0), FromBase("rows"), NETWORKS["train"]


REFUSED: list[tuple[Callable[[], object], str]] = [
    *((lambda to=to: Tied(to), r"Tied needs the full name of an array, such as 'split0.factor0'") for to in (
        "", "factor0", "group0.factor0", "split0.factor0.size", "group01.split0.core", 3, None)),
    (lambda: made({"factor0": Tied("group5.split0.factor0")}),
     r"to 'group5.split0.factor0', which is not there: there are groups 0 to 2 with the arrays 'split0.f"),
    (lambda: made({"factor0": Tied("split0.core")}), r"which is not there"),
    (lambda: made({"factor0": Tied("split0.factor1")}),
     r"of shape \(6, 2\), to 'group0.split0.factor1', of shape \(4, 2\): only arrays of one shape can"),
    (lambda: made({"factor0": Tied("group0.split0.factor0")}, [(6, 4), (5, 4)]),
     r"'group1.split0.factor0', of shape \(5, 2\), to 'group0.split0.factor0', of"),
    (lambda: made({"factor0": Tied("split0.factor1"), "factor1": Tied("split0.factor0")}, [(4, 4)]),
     r"ties 'split0.factor0', 'split0.factor1' in a circle"),
    (lambda: made({"factor0": Scaled(Tied("split0.factor1")), "factor1": Scaled(Tied("split0.factor0"))}, [(4, 4)]),
     r"ties 'split0.factor0', 'split0.factor1' in a circle"),
    (lambda: made({"factor0": Tied("split0.factor1")}, [(4, 4)]),
     r"none of split0.factor0, split0.factor1 can be zero .* occurs twice in the product"),
    (lambda: made({"factor9": Tied("split0.factor1")}), r"sources names 'factor9', which fits no array"),
    (lambda: made({"factor0": ZERO, "factor1": ZERO}), r"makes split0.factor0, split0.factor1 of group 0 all zero"),
    (lambda: Scaled("seeded"),
     r"of must be a source, for Scaled one without trained diagonals or matrices; got .seeded."),
    (lambda: Scaled(Scaled(Trained())), r"without trained diagonals or matrices; got Scaled"),
    (lambda: Scaled(Trained(), size=1), r"size must be True or False; got 1"),
    (lambda: Scaled(Trained(), size=False), r"needs a diagonal: size=True, rank=True, or both"),
    (lambda: Scaled(Trained(), start=math.nan), r"start must be a finite number .*; got nan"),
    (lambda: Scaled(Trained(), start=(0.0, 1.0)), r"must have one number for each of size, at most one of them 0"),
    (lambda: Scaled(Trained(), rank=True, start=(0, 0)), r"at most one of them 0"),
    (lambda: Scaled(Trained(), start="one"), r"start must be a finite number"),
    (lambda: tna.UpdatePlan(TRAIN.replace(sources={"core1": Scaled(Trained())}), [(6, 4)]),
     r"Scaled is for factors, .*; 'split0.core1' has the shape \(2, 3, 2\)"),
    (lambda: made({"factor0": ZERO}, projection="nonlinear"),
     r"start=0 of 'split0.factor0' leaves a nonlinear F without a gradient"),
    (lambda: brought(np.ones((6, 2)), "group0.split0.factor0"),
     r"names 'group0.split0.factor0'; the arrays that a caller can give are 'group0"),
    (lambda: brought(np.full((4, 2), np.nan)), r"must hold finite floating-point"),
    (lambda: brought(np.full((4, 2), 1e300)), r"that float32 can represent"),
    (lambda: brought(np.ones((4, 2), int)), r"floating-point"),
    (lambda: brought([[1.0, 2.0]]), r"'group0.split0.factor1'\] must be an array"),
    (lambda: Given(shared=1), r"shared must be True or False; got 1"),
    (lambda: made({"factor1": Given()}, given=[1]), r"given must be a mapping of names to arrays; got list"),
    (lambda: of_core({"factor0": Trained()}),
     r"BaseCore computes 'split0.core' from the base .* 'split0.factor0' is not computed"),
    (lambda: of_core({"factor1": Seeded("normal")}),
     r"'split0.factor1' is not computed from the base: give it FromBase\('mode'\)"),
    (lambda: of_core({"factor2": BaseCore()}), r"BaseCore is for the core of format='tucker'; 'split0.factor2' has"),
    (lambda: made({"factor0": ROWS}, rank=5),
     r"needs 5 singular vectors for 'split0.factor0', .* has 4 at most along that mode: use rank=4"),
    (lambda: made({"factor0": FromBase("cols")}),
     r"gives vectors of 4 elements, and 'split0.factor0' has 6 rows: use the other side"),
    (lambda: made({"factor0": ROWS}, splits=2), r"'split1.factor0' of shape \(\d, 2\) is none: use format='cp'"),
    (lambda: made({"core": ROWS}, format="tucker"),
     r"\(size of a mode, rank\), and 'split0.core' of shape \(2, 2\) is none"),
    (lambda: tna.UpdatePlan(TRAIN.replace(sources={"core0": FromBase("mode")}), [(6, 4)]), r"is none"),
    (lambda: made({"factor0": ROWS}, [(6, 4)], order=4, fold=(2, 3, 2, 2)),
     r"needs matrices, or a stack .*use FromBase\('mode'\)"),
    (lambda: made({"factor0": ROWS}, groups=1, fold="hypercube", projection="shuffle"),
     r"a projection follows the network, .*use projection='identity'"),
    (lambda: made({"core": BaseCore()}, format="tucker", groups=1, projection="shuffle"),
     r"BaseCore makes 'split0.core' of the base weights, and a projection"),
    (lambda: FromBase("left"), r"side must be one of 'rows', 'cols', 'mode'"),
    (lambda: FromBase(None), r"side must be one of 'rows', 'cols', 'mode'"),
    (lambda: FromBase("rows", 1), r"vectors must be True"),
    (lambda: UNBOUND.deltas(UNBOUND.init()), r"from the base weights: .*plan.with_base\(weights\).*reset\(\)"),
    (lambda: UNBOUND.with_base([np.full((6, 4), np.nan)] * 3), r"holds NaN or infinity"),
    (lambda: UNBOUND.with_base([np.ones((6, 4))] * 3),
     r"has only 1 singular values above rounding errors: use a smaller rank"),
    (lambda: UNBOUND.with_base([np.zeros((6, 4))] * 3), r"has only 0 singular values"),
    (lambda: source_from_dict(functools.reduce(lambda of, _: {"source": "scaled", "of": of}, range(6), TRAINED)),
     r"nested more than 4 deep"),
    (lambda: tna.decompose([BASE[0]], tna.Config(2, projection="nonlinear", sources={"factor1": Seeded("normal")})),
     r"through linear maps F only; got projection='nonlinear'"),
]  # fmt: skip
MISSHAPED: list[tuple[Callable[[], object], str]] = [
    (lambda: brought(np.ones((2, 4))), r"has shape \(2, 4\); expected \(4, 2\)"),
    (lambda: UNBOUND.with_base(BASE[:2]), r"with_base needs the 3 base weights; got 2"),
    (lambda: UNBOUND.with_base([base.T for base in BASE]), r"base weight 0 has shape \(4, 6\); expected \(6, 4\)"),
]


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [*((tna.ConfigError, *row) for row in REFUSED), *((tna.ShapeError, *row) for row in MISSHAPED)],
)
def test_what_cannot_be_is_refused(error: type[Exception], make: Callable[[], object], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# -- Tied, scaled and given -------------------------------------------------------------------------


def test_a_tied_array_may_be_frozen() -> None:
    frozen = [f"term{term}.split0.factor1" for term in range(2)]
    sources = {frozen[0]: Seeded("signs"), frozen[1]: Tied(frozen[0])}
    plan = tna.UpdatePlan(tna.Config(rank=2, terms=2, sources=sources), SHAPES)
    assert [name for name in plan.frozen_shapes if name.startswith("group1")] == [f"group1.{name}" for name in frozen]
    first, second = (plan.groups[1].frozen.host(name) for name in frozen)
    assert first.tobytes() == second.tobytes()


def test_diagonals_start_as_they_say() -> None:
    both = Scaled(Seeded("normal"), rank=True, start=(2.0, 0.0))
    plan = tna.UpdatePlan(tna.Config(rank=2, sources={"factor1": both, "factor0": Scaled(Seeded("normal"))}), SHAPES)
    fresh = plan.init()
    assert (fresh["group1.split0.factor1.size"] == 2.0).all()
    assert not fresh["group1.split0.factor1.rank"].any()
    assert (fresh["group1.split0.factor0.size"] == 1.0).all()
    config = tna.Config(rank=2, sources={"factor0": Scaled(Seeded("normal"))})
    usual = tna.UpdatePlan(config, SHAPES).init()
    assert not usual["group0.split0.factor0.size"].any()
    assert usual["group0.split0.factor1"].any()
    assert tna.verify(config.replace(projection="nonlinear"), SHAPES, backends=["numpy"]).holds


def test_given_arrays_are_used_as_they_are() -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    config = tna.Config(rank=2, sources={"factor1": Given()})
    plan = tna.UpdatePlan(config, SHAPES)
    assert plan.given_shapes == {f"group{g}.split0.factor1": (4, 2) for g in range(3)}
    with pytest.raises(tna.ConfigError, match=r"'group0.split0.factor1' is an array that the caller brings: .*given="):
        plan.deltas(plan.init())
    plan = tna.UpdatePlan(config, SHAPES, given={f"group{g}.split0.factor1": numbers[g] for g in range(3)})
    params = drawn(plan, 1)
    for group, delta in enumerate(plan.deltas(params)):
        np.testing.assert_allclose(delta, params[f"group{group}.split0.factor0"] @ numbers[group].T, rtol=1e-12)
    assert pickle.loads(pickle.dumps(plan)).given.keys() == plan.given.keys()


def test_one_given_array_for_groups_of_several_sizes() -> None:
    shapes = [(6, 4), (5, 3), (6, 2)]
    plan = tna.UpdatePlan(tna.Config(rank=2, sources={"factor1": Given(shared=True)}), shapes)
    assert plan.given_shapes == {"group0.split0.factor1": (4, 2)}
    whole = np.random.default_rng(0).normal(size=(4, 2))
    plan = tna.UpdatePlan(plan.config, shapes, given={"group0.split0.factor1": whole})
    params = {name: np.ones(shape) for name, shape in plan.param_shapes.items()}
    for (rows, cols), delta in zip(shapes, plan.deltas(params), strict=True):
        np.testing.assert_allclose(delta, np.ones((rows, 2)) @ np.float32(whole)[:cols].T, rtol=1e-6)


# -- FromBase ---------------------------------------------------------------------------------------


@st.composite
def separated(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A matrix, and a rank at which its singular values are well separated."""
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rank = draw(st.integers(1, min(rows, cols)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(cols, cols)))
    values = np.concatenate([rng.uniform(2.0, 4.0, rank), rng.uniform(0.01, 0.4, min(rows, cols) - rank)])
    size = len(values)
    scale = 10.0 ** draw(st.integers(-30, 30))
    return (left[:, :size] * values) @ right[:, :size].T * scale, rank


@pytest.mark.law("base-arrays")
@given(separated(), st.integers(0, 99))
def test_a_basis_spans_the_dominant_subspace(case: tuple[np.ndarray, int], seed: int) -> None:
    matrix, rank = case
    normals = np.random.default_rng(seed).normal(size=(len(matrix), min(rank + 8, len(matrix))))
    basis = dominant_basis(matrix, normals, rank, False, "x")
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)
    exact = np.linalg.svd(matrix)[0][:, :rank]
    np.testing.assert_allclose(basis @ basis.T, exact @ exact.T, atol=1e-6)
    # The basis depends on the subspace alone: the same weight with its right side turned has the same one.
    turn, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(matrix.shape[1],) * 2))
    np.testing.assert_allclose(dominant_basis(matrix @ turn, normals, rank, False, "x"), basis, atol=1e-9)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_single_vectors_are_those_of_the_svd_with_the_largest_entry_positive(rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(cols, cols)))
    size = min(rows, cols)
    matrix = (left[:, :size] * np.arange(size, 0, -1)) @ right[:, :size].T
    found = dominant_basis(matrix, rng.normal(size=(rows, min(size + 8, rows))), size, True, "x")
    assert (found[np.abs(found).argmax(axis=0), np.arange(size)] > 0).all()
    np.testing.assert_allclose(np.abs(np.sum(found * left[:, :size], axis=0)), 1.0, atol=1e-9)


def test_a_subspace_that_ends_between_equal_values_is_warned_about(recwarn: pytest.WarningsRecorder) -> None:
    normals = np.random.default_rng(0).normal(size=(6, 6))
    equal = np.diag([3.0, 2.0, 2.0, 1.0, 1.0, 0.5])
    for rank in (1, 3, 5, 6):
        dominant_basis(equal, normals, rank, False, "factor0")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"factor0 takes .* nearer than 1e-08 to the next one: .* use another rank"):
        dominant_basis(equal, normals, 2, False, "factor0")
    with pytest.warns(UserWarning, match=r"two of whose singular values are nearer than 0.0001: another machine"):
        dominant_basis(np.eye(5), normals[:5, :5], 2, True, "x")
    with pytest.warns(UserWarning, match="another machine may take another part"):
        tna.UpdatePlan(tna.presets.lora_xs(2), [(6, 4)]).with_base([np.eye(6)[:, :4]])


@pytest.mark.parametrize("side", ["rows", "cols", "mode"])
def test_a_factor_of_the_base(side: str) -> None:
    name = "factor1" if side == "cols" else "factor0"
    plan = tna.UpdatePlan(tna.Config(rank=2, sources={name: FromBase(side)}), SHAPES)
    assert plan.num_parameters == 3 * 2 * (6 if name == "factor1" else 4)
    assert list(plan.base_shapes) == [f"group{g}.split0.{name}" for g in range(3)]
    seen: list[tuple[int, int]] = []
    plan = plan.with_base(BASE, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    again = plan.with_base(lambda index: BASE[index].astype(np.float32))
    for group in range(3):
        array = plan.given[f"group{group}.split0.{name}"]
        left, _, right = np.linalg.svd(BASE[group])
        exact = right[:2].T if name == "factor1" else left[:, :2]
        assert relative_error(array @ array.T, exact @ exact.T) < 1e-5
        np.testing.assert_allclose(again.given[f"group{group}.split0.{name}"], array, atol=1e-5)


@pytest.mark.law("sources")
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_core_of_the_base_is_that_of_its_higher_order_svd(rank: int, weights: int, seed: int) -> None:
    base = list(np.random.default_rng(seed).normal(size=(weights, 6, 4)))
    plan = tna.UpdatePlan(tna.presets.craft(rank, groups=1), [(6, 4)] * weights).with_base(base)
    found = {name.removeprefix("group0.split0."): array.astype(np.float64) for name, array in plan.given.items()}
    bases = [found[f"factor{mode}"] for mode in range(3)]
    core = np.einsum("abc,ai,bj,ck->ijk", np.stack(base), *bases)
    assert relative_error(found["core"], core) < 1e-6
    # The projection of the base to the dominant subspace of each mode, whatever bases these have.
    projected = np.stack(base)
    for mode, own in enumerate(bases):
        matrix = np.moveaxis(np.stack(base), mode, 0).reshape(projected.shape[mode], -1)
        exact = np.linalg.svd(matrix)[0][:, : own.shape[1]]
        projected = np.moveaxis(np.tensordot(exact @ exact.T, projected, axes=(1, mode)), 0, mode)
    whole = np.einsum("ijk,ai,bj,ck->abc", found["core"], *bases)
    assert relative_error(whole, projected) < 1e-3


@pytest.mark.law("sources")
@pytest.mark.parametrize("several", [{"terms": 2}, {"splits": 2, "combine": "hadamard", "leading": "same"}])
def test_a_core_of_the_base_uses_the_factors_of_its_own_split(several: dict[str, Any]) -> None:
    sources = {"core": BaseCore(), "factor0": FromBase("mode"), "factor1": Mixed(FromBase("mode"))}
    config = tna.Config(rank=2, format="tucker", start="random", sources=sources, **several)
    found = tna.UpdatePlan(config, SHAPES).with_base(BASE).given
    cores = [name for name in found if name.endswith(".core")]
    assert len(cores) == 6
    for name in cores:
        group, split = int(name[5]), name.rpartition(".")[0]
        left, right = (found[f"{split}.factor{mode}"].astype(np.float64) for mode in (0, 1))
        assert relative_error(found[name], left.T @ BASE[group] @ right) < 1e-6
    if "terms" in several:  # a core next to terms that need none of the base
        own = {"term0.split0.core": BaseCore(), "factor0": FromBase("mode"), "factor1": Mixed(FromBase("mode"))}
        for name, other in (("factor0", Seeded("normal")), ("core", Tied("group0.term0.split0.core"))):
            changed = config.replace(sources={**own, f"term1.split0.{name}": other})
            assert "group0.term0.split0.core" in tna.UpdatePlan(changed, SHAPES).with_base(BASE).given


def test_factors_of_a_stack_are_those_of_its_modes() -> None:
    config = tna.presets.fact_tk(2, weights=3, rows=6, cols=4).replace(
        sources={"factor0": FromBase("mode"), "factor1": FromBase("rows"), "factor2": FromBase("cols")}
    )
    plan = tna.UpdatePlan(config, SHAPES).with_base(BASE)
    tensor = np.stack(BASE)
    for mode in range(3):
        exact = np.linalg.svd(np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1))[0][:, :2]
        array = plan.given[f"group0.split0.factor{mode}"]
        assert relative_error(array @ array.T, exact @ exact.T) < 1e-5


# -- Fits -------------------------------------------------------------------------------------------


FITTED: dict[str, tna.Config] = {
    "from base": tna.presets.lora_xs(2),
    "svft": tna.presets.svft(4),
    "vera": tna.presets.vera(3),
    "shared": tna.presets.share_lora(2),
    "theta": tna.presets.tinylora(5),
    "one-hot": tna.presets.unilora(9, 2),
    "seeded": tna.presets.lora_fa(2),
    "projected": tna.presets.superlora(2, projection="linear", ratio=0.5, sources={"factor1": Seeded("normal")}),
}


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_finds_updates_that_the_config_made(name: str) -> None:
    config = FITTED[name]
    plan = tna.UpdatePlan(config, SHAPES).with_base(BASE)
    params = drawn(plan, 1)
    deltas = plan.deltas(params)
    fitted, report = tna.decompose(deltas, config, base=BASE if plan.base_shapes else None, max_iterations=300)
    assert fitted.keys() == plan.param_shapes.keys()
    assert report.error < 1e-7
    # Frozen arrays are held: what is left is the residual of the report.
    made = report.plan.deltas(fitted)
    whole = np.linalg.norm([np.linalg.norm(delta) for delta in deltas])
    wrong = np.linalg.norm([np.linalg.norm(a - b) for a, b in zip(made, deltas, strict=True)])
    assert math.isclose(wrong / whole, report.error, rel_tol=1e-6, abs_tol=1e-14)


def test_a_linear_fit_is_the_optimum() -> None:
    assert (UNBOUND.num_parameters, len(UNBOUND.init())) == (12, 3)
    plan = UNBOUND.with_base(BASE)
    wanted = list(np.random.default_rng(5).normal(size=(3, 6, 4)))
    params, report = tna.decompose(wanted, plan.config, base=BASE)
    assert report.certified
    for group, delta in enumerate(wanted):
        u, v = (plan.given[f"group{group}.split0.factor{mode}"].astype(np.float64) for mode in range(2))
        exact = np.linalg.pinv(u) @ delta @ np.linalg.pinv(v).T
        np.testing.assert_allclose(params[f"group{group}.split0.core"], exact, rtol=1e-8, atol=1e-10)
    assert tna.UpdatePlan(tna.Config(), SHAPES).with_base(BASE).given == {}


SIX = [(12, 8)] * 6
COMBINED: dict[str, tna.Config] = {
    "TinyLoRA over SuperLoRA's groups": tna.presets.superlora(4, groups=4, before="normal", parameters=13),
    "VeRA through LoNKr": tna.presets.lonkr(
        3, groups=2, split_size=2,
        sources={
            "dense": Seeded("normal"),
            "factor0": Scaled(Seeded("uniform"), start=0.0),
            "factor1": Scaled(Seeded("uniform"), size=False, rank=True, start=0.1),
        },
    ),
    "one core over depth between bases of each weight": tna.presets.lora_xs(
        3,
        sources={
            "factor0": FromBase("rows"),
            "factor1": FromBase("cols"),
            "core": Tied("group0.split0.core"),
        },
    ),
    **{
        f"one θ for {form}": tna.Config(
            rank=2, order=order, groups=2, fold="balanced", format=form, before="one-hot", parameters=7
        )
        for form, order in (("dense", 1), ("cp", 3), ("cp-weighted", 3), ("tucker", 3), ("tt", 4))
    },
}  # fmt: skip


@pytest.mark.law("combinations")
@pytest.mark.parametrize("name", COMBINED)
def test_combinations_that_no_other_library_has(name: str) -> None:
    report = tna.verify(COMBINED[name], SIX, backends=["numpy"])
    assert report.holds, report


VIT = [(768, 768)] * 24


@pytest.mark.parametrize(
    ("config", "count"),
    [
        *((tna.presets.lora_fa(r), 18_432 * r) for r in (1, 8)),
        *((tna.presets.lora_xs(r), 24 * r**2) for r in (2, 16)),
        (tna.presets.svft(768), 18_432),
        (tna.presets.vera(256), 24 * (768 + 256)),
        (tna.presets.randlora(32, rows=768, cols=768), 460_800),
        (tna.presets.nola(100), 2 * 24 * 100),
        (tna.presets.unilora(256), 256),
        (tna.presets.tinylora(13), 13),
        (tna.presets.tied_lora(8), 8 * 1536 + 24 * (768 + 8)),
        (tna.presets.share_lora(8), 8 * 768 + 24 * 8 * 768),
        (tna.presets.craft(16), 2 * (12**2 + 2 * 16**2)),
        (tna.presets.craft(64, weights=8), 2 * (8**2 + 2 * 64**2)),
    ],
)
def test_counts_on_query_and_value_of_a_vit(config: tna.Config, count: int) -> None:
    assert tna.parameter_count(config, VIT, roles="qv" * 12) == count

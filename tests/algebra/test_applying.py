"""How ΔW meets W: the formulas, the start to the bit, gradients, counts, what is refused."""

from __future__ import annotations

import math
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import NUMPY_AND_TORCH, relative_error
from tnadapt.algebra.applying import APPLYING, Add, Applying, Hadamard, Magnitude, applying_of, norms
from tnadapt.algebra.rounding import change_in_place
from tnadapt.backends import load_backend
from tnadapt.backends.stored_floats import rounded, widened
from tnadapt.testing import verification as laws

P, NUMPY = tna.presets, load_backend("numpy")
SIDES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31 - 1)
WAYS = [Add(), Hadamard(), Magnitude(), Magnitude("cols")]
IDS = ["add", "hadamard", "magnitude", "magnitude by columns"]


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def own_shapes(way: Applying, shape: tuple[int, int]) -> list[tuple[int, ...]]:
    return list(way.param_shapes(0, shape).values())


# -- Formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "axis"), [("hadamard", "rows"), ("magnitude", "rows"), ("magnitude", "cols")])
@pytest.mark.parametrize(
    "settings",
    [
        {"groups": 1, "fold": "hypercube"},
        {"groups": 1, "fold": "hypercube", "projection": "nonlinear", "ratio": 0.5},
        {"groups": 2, "fold": "hypercube", "order": 3, "format": "tucker"},
        {"before": "one-hot", "parameters": 7},
        {"sources": {"factor1": tna.sources.FromBase("cols")}},
    ],
    ids=["one group", "nonlinear", "cut weights", "theta", "from the base"],
)
def test_any_update(kind: str, axis: str, settings: dict[str, Any]) -> None:
    config = tna.Config(rank=2, apply=kind, magnitude_axis=axis, **settings)
    report = tna.verify(config, [(6, 4), (4, 4), (6, 4)], backends=NUMPY_AND_TORCH)
    assert report.holds, str(report)
    names = {law.name for law in report.laws}
    assert {"W' = the textbook formula", "at the start W' is W to the bit"} <= names
    assert ("the gradient of W' = a central difference" in names) == ("torch" in NUMPY_AND_TORCH)


def test_a_wrong_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = norms
    monkeypatch.setattr("tnadapt.algebra.applying.norms", lambda *a: true(*a) * (1 + 1e-9))
    monkeypatch.setattr(sys.modules[tna.verify.__module__], "examples", lambda: {"dora": (P.dora(2), [(4, 3)])})
    report = tna.verify(backends=["numpy"])
    assert {law.name for law in report.laws if not law.holds} == {
        "W' = the textbook formula", "W' = the method's own formula",
    }  # fmt: skip


# -- The start -----------------------------------------------------------------------------------


@pytest.mark.law("fresh-is-zero")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS, ids=IDS)
@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 700), SEEDS)
def test_a_fresh_adapter_changes_nothing(way: Applying, dtype: str, rows: int, cols: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    (host,) = drawn(seed, (rows, cols))
    host[0, cols // 2 :] = 0.0
    host[rows // 2] = 0.0  # a row of zeros
    weight = torch.tensor(host).to(kind)
    config = tna.Config(rank=1, apply=way.kind, magnitude_axis=way.axis)
    for trained in {dtype, "float32"} - ({"float32"} if dtype == "float64" else set()):
        plan = tna.UpdatePlan(config, [(rows, cols)]).with_base([weight])
        params = plan.init("torch", trained)
        (found,) = plan.merged(params, [weight])
        assert torch.equal(found.to(kind), weight)
        assert torch.equal(found, weight.to(found.dtype))
        # The same in NumPy, whose parameters are cast.
        arrays = {name: array.double().numpy() for name, array in params.items()}
        (again,) = plan.merged(arrays, [weight.double().numpy()], dtype=trained)
        assert np.array_equal(again, weight.double().numpy())


@given(st.integers(1, 600), st.integers(1, 30), SEEDS)
@settings(max_examples=30)
def test_norms_have_the_same_bits_in_every_library(cols: int, rows: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    (host,) = drawn(seed, (rows, cols))
    for axis in (0, 1):
        found = norms(NUMPY, host, axis)
        assert np.array_equal(found, norms(load_backend("torch"), torch.tensor(host), axis).numpy())
        # However the matrix is stored, and whichever rows are computed with it.
        assert np.array_equal(found, norms(NUMPY, np.asfortranarray(host), axis))
        assert relative_error(found, np.linalg.norm(host, axis=axis)) < 1e-14
    assert np.array_equal(norms(NUMPY, host[rows // 2 :], 1), norms(NUMPY, host, 1)[rows // 2 :])


def test_large_matrices_are_summed_in_pieces_with_the_same_bits() -> None:
    (host,) = drawn(0, (70, 1 << 13))
    one = np.concatenate([norms(NUMPY, host[row : row + 1], 1) for row in range(70)])
    assert np.array_equal(norms(NUMPY, host, 1), one)
    assert np.array_equal(norms(NUMPY, host.T, 0), one)
    assert np.array_equal(norms(NUMPY, np.ascontiguousarray(host.T), 0), one)


def test_zero_rows_stay_zero_until_they_move() -> None:
    way, weight = Magnitude(), np.array([[0.0, 0.0], [3.0, 4.0]])
    own = [np.array([0.0, 5.0])]
    assert np.array_equal(way.merged(NUMPY, weight, np.zeros((2, 2)), own), weight)
    moved = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert np.array_equal(way.merged(NUMPY, weight, moved, [np.array([10.0, 5.0])])[0], [6.0, 8.0])
    of_weight, of_delta, (of_own,) = way.pulled(NUMPY, weight, np.zeros((2, 2)), own, np.ones((2, 2)))
    assert np.isfinite(of_delta).all()
    assert np.isfinite(of_weight).all()
    assert np.array_equal(of_own, [0.0, 1.4])


# -- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True], ids=["exact", "detached norm"])
@pytest.mark.parametrize("way", WAYS, ids=IDS)
@settings(max_examples=20)
@given(SIDES, SIDES, SEEDS)
def test_gradients_by_hand_equal_autograd(way: Applying, detach: bool, rows: int, cols: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    backend = load_backend("torch")
    shapes = [(rows, cols), (rows, cols), (rows, cols), *own_shapes(way, (rows, cols))]
    gradient, *given_arrays = (torch.tensor(array) for array in drawn(seed, *shapes))
    weight, delta, *own = (array.requires_grad_() for array in given_arrays)
    out = way.merged(backend, weight, delta, own, detach=detach)
    expected = torch.autograd.grad(out, [weight, delta, *own], gradient)
    of_weight, of_delta, of_own = way.pulled(backend, weight, delta, own, gradient, detach)
    for found, exact in zip([of_weight, of_delta, *of_own], expected, strict=True):
        # Not relative: where rows have one element, the gradients cancel.
        assert float((found - exact).detach().abs().max()) < 1e-9 * (1.0 + float(gradient.abs().max()))
    if isinstance(way, Magnitude) and detach:
        # With the norm as a constant, the direction's gradient is scaled and nothing else.
        total = (weight + delta).detach()
        factor = own[0].detach() / total.norm(dim=1 if way.axis == "rows" else 0)
        assert (
            relative_error(of_delta.detach(), gradient * factor.view((-1, 1) if way.axis == "rows" else (1, -1)))
            < 1e-12
        )


@pytest.mark.slow
@pytest.mark.parametrize("config", [P.dora(2), P.hira(2)], ids=["dora", "hira"])
def test_jax_gives_the_same_and_detaches(config: tna.Config) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        report = tna.verify(config, [(6, 4), (4, 5)], backends=["jax"])
        assert report.holds, str(report)
        plan = tna.UpdatePlan(config, [(6, 4)]).with_base([np.ones((6, 4))])
        params = {
            n: jax.numpy.asarray(a)
            for n, a in zip(plan.param_shapes, drawn(0, *plan.param_shapes.values()), strict=True)
        }
        weight = jax.numpy.asarray(drawn(1, (6, 4))[0])

        def loss(params: Any, detach: bool) -> Any:
            return (plan.merged(params, [weight], detach_norm=detach)[0] ** 3).sum()

        exact, detached = (jax.grad(loss)(params, detach)["group0.split0.factor0"] for detach in (False, True))
        assert bool((exact == detached).all()) == (config.apply == "hadamard")


def test_jax_without_float64_is_told() -> None:
    jax = pytest.importorskip("jax")
    plan = tna.UpdatePlan(P.dora(1), [(2, 2)]).with_base([np.ones((2, 2))])
    with jax.enable_x64(False), pytest.raises(tna.BackendError, match=r"jax_enable_x64"):
        plan.merged(plan.init("jax"), [jax.numpy.ones((2, 2))])


# -- Plans ---------------------------------------------------------------------------------------


@pytest.mark.law("parameter-count")
def test_counts_need_no_base() -> None:
    vit = [(768, 768)] * 24
    assert tna.parameter_count(P.dora(8), vit) == 313_344
    assert tna.parameter_count(P.hira(8), vit) == 2 * 768 * 8 * 24
    plan = tna.UpdatePlan(P.dora(2, magnitude_axis="cols"), [(6, 4), (3, 5)])
    assert plan.weight_param_shapes == {"weight0.magnitude": (4,), "weight1.magnitude": (5,)}
    assert list(plan.param_shapes)[-2:] == ["weight0.magnitude", "weight1.magnitude"]
    assert plan.num_parameters == sum(math.prod(shape) for shape in plan.param_shapes.values())
    # θ makes the arrays of the update; the magnitudes are parameters of their own.
    theta = tna.UpdatePlan(P.unilora(7, 2, apply="magnitude"), [(6, 4)])
    assert theta.param_shapes == {"theta": (7,), "weight0.magnitude": (6,)}
    assert theta.num_parameters == 13


def test_the_start_needs_the_base() -> None:
    plan = tna.UpdatePlan(P.dora(1), [(2, 2)])
    assert plan.needs_base
    assert not tna.UpdatePlan(P.hira(1), [(2, 2)]).needs_base
    bound = plan.with_base([np.array([[3.0, 4.0], [0.0, 2.0]])])
    assert not bound.needs_base
    assert plan.needs_base
    assert bound.init()["weight0.magnitude"].tolist() == [5.0, 2.0]
    assert pickle.loads(pickle.dumps(bound)).init()["weight0.magnitude"].tolist() == [5.0, 2.0]
    # Updates and changed weights do not need it.
    params = {name: np.ones(shape) for name, shape in plan.param_shapes.items()}
    assert plan.deltas(params)[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert relative_error(plan.merged(params, [np.zeros((2, 2))])[0], np.full((2, 2), 0.5**0.5)) < 1e-15
    assert plan.lora_rank is None
    assert plan.largest_rank(0) == 1


DORA, HIRA = P.dora(1), P.hira(1)
TWICE: Any = types.SimpleNamespace(apply="twice")  # as no config can be
REFUSED: list[tuple[type[Exception], Callable[[], object], str]] = [
    (tna.ConfigError, lambda: tna.Config(apply="divide"), r"apply must be one of 'add', 'hadamard', 'magnitude'"),
    (tna.ConfigError, lambda: tna.Config(apply=None), r"apply must be one of"),
    (tna.ConfigError, lambda: tna.Config(apply="magnitude", magnitude_axis="columns"),
     r"magnitude_axis must be one of 'rows', 'cols'; got 'columns'"),
    (tna.ConfigError, lambda: tna.Config(magnitude_axis="cols"),
     r"magnitude_axis='cols' is about the trained magnitude, and apply='add' has none: use apply='magnitude'"),
    (tna.ShapeError, lambda: tna.UpdatePlan(DORA, [(2, 2)]).with_base([]),
     r"with_base needs the 1 base weights; got 0"),
    (tna.ShapeError, lambda: tna.UpdatePlan(DORA, [(2, 2)]).with_base([np.ones((3, 2))]),
     r"base weight 0 has shape \(3, 2\); expected \(2, 2\)"),
    (tna.ConfigError, lambda: tna.UpdatePlan(DORA, [(1, 2)]).with_base([np.array([[1.0, np.nan]])]),
     r"weight0.magnitude would start at the norms of a base weight that holds NaN or infinity"),
    (tna.ConfigError, lambda: tna.UpdatePlan(DORA, [(1, 1)]).with_base([np.array([[8e4]])]).init("numpy", "float16"),
     r"weight0.magnitude starts at norms of up to 8.0e\+04, which float16 cannot"),
    (tna.ConfigError, lambda: tna.UpdatePlan(DORA, [(2, 2)]).init(),
     r"weight0.magnitude starts at the norms .* call plan.with_base\(weights\)"),
    (tna.ShapeError, lambda: tna.UpdatePlan(HIRA, [(2, 2)]).merged({}, []),
     r"weights must be the 1 base weights; got 0"),
    (tna.BackendError, lambda: tna.UpdatePlan(HIRA, [(1, 1)]).merged(tna.UpdatePlan(HIRA, [(1, 1)]).init(), [[[1.0]]]),
     r"base weight 0 is list, and the parameters are arrays of numpy: convert it"),
    (tna.BackendError, lambda: Magnitude().rescaling(NUMPY, np.ones((1, 1)), [np.ones(1)], "float8"),
     r"dtype must be one of float64, float32, float16, bfloat16; got 'float8'"),
    (tna.ConfigError, lambda: tna.decompose([np.ones((3, 3))], HIRA),
     r"a fit needs updates that are added to the weights, and apply='hadamard'"),
    (tna.ConfigError, lambda: laws.formula(TWICE, np.ones((1, 1)), np.ones((1, 1)), None),
     "there is no reference for apply='twice'"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "make", "message"), REFUSED)
def test_what_cannot_be_is_refused(error: type[Exception], make: Callable[[], object], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_configs_leave_out_the_default_and_every_way_knows_its_name() -> None:
    assert "apply" not in tna.Config().to_dict()
    assert "magnitude_axis" not in tna.Config(apply="magnitude").to_dict()
    config = P.dora(2, magnitude_axis="cols")
    assert config.to_dict()["apply"] == "magnitude"
    assert tna.Config.from_dict(config.to_dict()) == config
    assert [applying_of(kind).kind for kind in APPLYING] == list(APPLYING) == ["add", "hadamard", "magnitude"]


# -- Merging -------------------------------------------------------------------------------------


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS, ids=IDS)
@settings(max_examples=20)
@given(SIDES, SIDES, SEEDS, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_merge_in_any_pieces_is_the_rounded_formula(
    way: Applying, dtype: str, rows: int, cols: int, seed: int, sizes: list[int]
) -> None:
    host, delta, *own = drawn(seed, (rows, cols), (rows, cols), *own_shapes(way, (rows, cols)))
    stored = rounded(host, dtype).reshape(-1)
    expected = way.merged(NUMPY, widened(stored, dtype).astype(np.float64).reshape(rows, cols), delta, own, "float32")
    pieces, start = [], 0
    for size in [*sizes, rows * cols]:
        pieces.append((start, delta.reshape(-1)[start : start + size]))
        start += size
    pieces = [piece for piece in pieces if piece[1].size]
    assert change_in_place(way, stored, (rows, cols), dtype, pieces, own, "float32") is None
    assert np.array_equal(stored, rounded(expected, dtype).reshape(-1))


def test_a_merge_that_is_not_finite_is_told() -> None:
    weight, pieces = np.ones(4, np.float16), [(0, np.zeros(4))]
    for size, problem in ((1e6, "range"), (np.inf, "update")):
        own = [np.array([1.0, size])]
        assert change_in_place(Magnitude(), weight.copy(), (2, 2), "float16", pieces, own, "float32") == problem
    assert change_in_place(Hadamard(), weight.copy(), (2, 2), "float16", [(0, np.full(4, np.nan))], [], "x") == "update"

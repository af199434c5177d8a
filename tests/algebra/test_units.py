"""Units of the parameters: the plan in units computes the same updates, and Adam steps move ΔW equally."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra import presets
from tnadapt.algebra.units import (
    RATE,
    RELATIVE_NORM,
    SPREAD,
    STEP_NORM,
    STEPS,
    WEIGHTS,
)
from tnadapt.backends import Backend
from tnadapt.testing import strategies

SHAPES = [(24, 24)] * 6
LAYERS, ROLES = [0, 0, 1, 1, 2, 2], ["q", "v"] * 3

# Arguments of presets that need some on these weights.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cara": {"heads": 4}, "lorta_cp": {"heads": 4}, "lonkr": {"splits": 3, "split_size": 2}, "quanta": {"digits": (4,)},
    "randlora": {"rank": 2, "rows": 24, "cols": 24}, "svft": {"rank": 4}, "c3a": {"block": 8}, "fourierft": {"n": 30},
    "loca": {"n": 30}, "waveft": {"n": 30}, "shira": {"n": 30}, "unilora": {"parameters": 40},
    "nola": {"parameters": 20}, "tinylora": {"parameters": 5}, "fastfood": {"ratio": 0.05}, "metatt": {"rank": 3},
    "vera": {"rank": 8}, "miss": {"r": 4}, "gralora": {"rank": 4, "blocks": 2},
}  # fmt: skip


def preset(name: str, **changes: Any) -> tna.Config:
    return getattr(presets, name)(**ARGUMENTS.get(name, {}), **changes)


def plan_of(config: tna.Config) -> tna.UpdatePlan:
    plan = tna.UpdatePlan(config, SHAPES, LAYERS, ROLES)
    rng = np.random.default_rng(0)
    return plan.with_base([rng.normal(size=shape) / 5 for shape in SHAPES])


NAMES = sorted(set(presets.__all__))


def signs(plan: tna.UpdatePlan, rate: float, seed: int = 1) -> dict[str, np.ndarray]:
    """The parameters after one step of Adam for a gradient of random signs, which moves each by the rate."""
    rng = np.random.default_rng(seed)
    start = plan.init(dtype="float64")
    return {name: array + rate * rng.choice([-1.0, 1.0], array.shape) for name, array in start.items()}


def norm(deltas: list[np.ndarray]) -> float:
    return math.sqrt(sum(float((delta**2).sum()) for delta in deltas))


def bits(arrays: Iterable[np.ndarray]) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def in_adam(plan: tna.UpdatePlan) -> tna.UpdatePlan:
    return tna.UpdatePlan(plan.config.replace(rate="adam"), plan.shapes, plan._layers, plan._roles, given=plan.given)


@pytest.mark.law("training-units")
@given(st.data())
def test_the_training_plan_computes_the_same_updates(data: st.DataObject) -> None:
    plan = in_adam(data.draw(strategies.plans()))
    training = plan.training_plan
    arrays = data.draw(strategies.parameters(plan))
    params = training.from_arrays(arrays)
    assert training.param_shapes == plan.param_shapes
    assert bits(training.to_arrays(params).values()) == bits(arrays.values())
    assert bits(training.deltas(params)) == bits(plan.deltas(arrays))


@pytest.mark.law("training-units", "one-rate")
@pytest.mark.parametrize("name", NAMES)
def test_the_training_plan_of_presets_its_copies_and_steps(name: str) -> None:
    plan = plan_of(preset(name))
    training = plan.training_plan
    assert plan.config.rate == "adam"
    assert all(unit == 2.0 ** round(math.log2(unit)) for unit in plan.units.values())
    start, arrays = training.init(dtype="float64"), plan.init(dtype="float64")
    assert bits(training.to_arrays(start).values()) == bits(arrays.values())
    assert norm(training.deltas(start)) == 0.0
    moved = signs(training, 1e-2)
    expected = training.deltas(moved)
    assert bits(plan.deltas(training.to_arrays(moved))) == bits(expected)
    assert training.training_plan is training
    assert training.file_plan is plan
    assert bits(training.arrays_plan.deltas(training.arrays(moved))) == bits(expected)
    for whole in (training, training.arrays_plan):
        params = signs(whole, 1e-3)
        for other in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
            assert bits(other.deltas(params)) == bits(whole.deltas(params))
            assert other.file_plan.config == whole.file_plan.config
    check_steps(plan)


def factor_of(plan: tna.UpdatePlan) -> float:
    """By which maps make the norm of a step larger: the number of their outputs over that of inputs, to a power."""
    inputs = sum(group.projection.map.n_in for group in plan.groups)
    outputs = sum(group.projection.map.n_out for group in plan.groups)
    factor = (outputs / inputs) ** SPREAD
    if plan.theta is not None:
        arrays = sum(math.prod(shape) for shape in plan.arrays_plan.param_shapes.values())
        factor *= (arrays / plan.num_parameters) ** SPREAD
    return factor


def check_steps(plan: tna.UpdatePlan) -> None:
    training = plan.training_plan
    moved = [norm(training.deltas(signs(training, STEPS * RATE, seed))) for seed in range(8)]
    expected = STEPS * STEP_NORM * math.sqrt(WEIGHTS / len(plan.shapes)) * factor_of(plan)
    found = math.sqrt(sum(one**2 for one in moved) / len(moved)) / expected
    # Units are rounded to powers of two, so that a product of k arrays is up to a factor of 2 ** (k / 2) off.
    most = max(len(prefixes) for prefixes in (training.groups[0].network.shapes, [1]))
    assert 2.0 ** (-most / 2) / 1.5 < found < 2.0 ** (most / 2) * 1.5


@pytest.mark.law("one-rate")
@pytest.mark.parametrize("changes", [
    {"rank": 1}, {"rank": 8}, {"order": 3, "fold": "hypercube", "format": "tucker", "rank": 2},
    {"order": 5, "fold": "hypercube", "format": "cp", "rank": 2}, {"order": 4, "fold": "balanced", "format": "tt"},
    {"splits": 2}, {"splits": 3, "split_size": 2}, {"splits": 2, "combine": "hadamard"}, {"terms": 3, "splits": 2},
    {"projection": "linear", "ratio": 0.1, "groups": 2, "fold": "hypercube"}, {"projection": "linear_v2"},
    {"projection": "gather", "ratio": 0.25, "fold": "hypercube"}, {"groups": 1, "fold": "hypercube"},
    {"format": "cp-weighted"}, {"leading": "same", "splits": 2}, {"alpha": 32.0}, {"alpha": 0.01},
    {"start": "pissa"}, {"start": "random"}, {"start": "given"},
])  # fmt: skip
def test_steps_of_adam_move_all_settings_equally(changes: dict[str, Any]) -> None:
    check_steps(plan_of(tna.Config(rate="adam", **{"rank": 4, **changes})))


@pytest.mark.law("one-rate")
@pytest.mark.parametrize("name", ["dense", "lora", "unilora"])
def test_weights_take_smaller_steps_the_more_there_are(name: str) -> None:
    """A step of n weights has a norm in proportion to n ** -1/2, and that of each weight to 1 / n."""
    one, many = (tna.UpdatePlan(preset(name), [(24, 24)] * count) for count in (4, 64))
    norms = [norm(plan.training_plan.deltas(signs(plan.training_plan, STEPS * RATE))) for plan in (one, many)]
    spreads = factor_of(one) / factor_of(many)
    assert 4.0 / 2.1 < norms[0] / norms[1] / spreads < 4.0 * 2.1


def test_parts_of_a_composite_take_the_step_of_one() -> None:
    config = tna.CompositeConfig([(presets.lora(4), 4), (presets.lokr(2), 2)])
    plan = tna.UpdatePlan(config, SHAPES)
    training = plan.training_plan
    moved = signs(training, 1e-2)
    assert bits(training.deltas(moved)) == bits(plan.deltas(training.to_arrays(moved)))
    alone = tna.UpdatePlan(presets.lora(4), SHAPES[:4])
    # The same step of all elements: of more of them, each moves less.
    assert plan.units["group0.split0.factor0"] <= alone.units["group0.split0.factor0"]
    assert [part.config.rate for part in config.parts] == ["adam", "adam"]


def test_sgd_trains_the_arrays_themselves() -> None:
    plan = tna.UpdatePlan(tna.Config(rank=2), SHAPES)
    assert plan.training_plan is plan
    assert set(plan.units.values()) == {1.0}
    assert plan.to_arrays(plan.init()).keys() == plan.init().keys()
    assert "rate" not in tna.Config().to_dict()
    assert presets.lora(2).to_dict()["rate"] == "adam"
    assert tna.Config.from_dict({}).rate == "sgd"


def test_terms_of_different_sources_all_learn_by_sgd() -> None:
    config = tna.Config(terms=2, sources={"term0.split0.factor1": tna.sources.Seeded("normal")})
    with pytest.raises(tna.ConfigError, match=r"rate='adam' needs terms with the same sources, .* or use rate='sgd'"):
        _ = tna.UpdatePlan(config.replace(rate="adam"), SHAPES).training_plan
    start = tna.UpdatePlan(config, SHAPES).init()
    # The one random array of the second term is what it would be without the frozen one of the first.
    usual = tna.UpdatePlan(tna.Config(terms=2), SHAPES).init()["group0.term1.split0.factor1"]
    assert start["group0.term1.split0.factor1"].std() == pytest.approx(usual.std(), rel=0.01)


def test_other_trained_arrays_keep_their_units_and_a_given_start_is_one_of_arrays() -> None:
    plan = plan_of(preset("lora"))
    training, chosen = plan.training_plan, ["group0.split0.factor1"]
    arrays = plan.init(trained=chosen)
    assert bits(training.to_arrays(training.init(trained=chosen)).values()) == bits(arrays.values())
    name, start = "group0.split0.factor0", np.full((24, 4), 0.5, np.float32)
    training = tna.UpdatePlan(presets.lora(4, start="given"), SHAPES).with_start({name: start}).training_plan
    params = training.init()
    assert training.to_arrays(params)[name].tobytes() == start.tobytes()
    assert norm(training.deltas(params)) == 0.0


# -- The learning rate that suits a base -------------------------------------------------------------------------------


@pytest.mark.law("one-rate")
@given(
    st.lists(st.sampled_from([(3, 5), (8, 2), (4, 3, 2), (1,)]), min_size=1, max_size=9),
    st.integers(-12, 12),
    st.integers(0, 1 << 30),
)
def test_the_norm_of_a_step_is_in_proportion_to_the_base(shapes: list[tuple[int, ...]], power: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=shape) for shape in shapes]
    rate = tna.learning_rate(weights)
    size = math.sqrt(np.mean(np.concatenate([weight.reshape(-1) for weight in weights]) ** 2))
    step = rate / RATE * STEP_NORM * math.sqrt(WEIGHTS / len(weights))
    # The rate is rounded to a power of two times 1e-2.
    assert 2**-0.5001 < step / (RELATIVE_NORM * size) < 2**0.5001
    assert math.log2(rate / RATE).is_integer()
    # It does not matter how a weight is folded, and a base twice as large takes twice the rate.
    assert tna.learning_rate(weight.reshape(1, -1) for weight in weights) == rate
    assert tna.learning_rate(2.0**power * weight for weight in weights) == 2.0**power * rate


def test_the_rate_is_that_of_a_plan_that_moves_so(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    base = [0.1 * rng.normal(size=shape) for shape in SHAPES]
    rate = tna.learning_rate([backend.asarray(weight, "float32") for weight in base])
    training = tna.UpdatePlan(presets.dense(), SHAPES).training_plan
    step = norm(training.deltas(signs(training, rate)))
    size = math.sqrt(sum(float((weight**2).sum()) for weight in base) / sum(weight.size for weight in base))
    # The units and the rate are both rounded to powers of two.
    assert 0.5 < step / (RELATIVE_NORM * size) < 2.0


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], tna.ConfigError, r"and there are none: choose one yourself$"),
        (np.ones((2, 3)), tna.ConfigError, r"^weights must be a list of arrays; got one array: give \[array\]$"),
        ([np.zeros((2, 3))], tna.ConfigError, r"depends on the size of the base weights, and these 1 are zero: choose"),
        ([np.ones(3), np.array([1.0, np.nan])], tna.ConfigError, r"these 2 hold NaN or infinity: choose one yourself"),
        ([np.array([np.inf])], tna.ConfigError, r"these 1 hold NaN or infinity: choose one yourself"),
        ([np.ones(3), np.ones(3, int)], tna.BackendError, r"^weights\[1\] must have a real floating dtype .* int64"),
        ([[1.0]], tna.BackendError, r"^weights\[0\]: expected an array of one of numpy, .* got list: convert it first"),
        (3.0, tna.ConfigError, r"^weights must be an iterable; got 3\.0$"),
    ],
)
def test_a_base_without_a_size(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tna.learning_rate(weights)


def test_a_base_without_values() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(
        tna.ConfigError, match=r"^weights\[0\] has no values: it is on the meta device, traced or sparse; call"
    ):
        jax.jit(lambda weight: tna.learning_rate([weight]))(jax.numpy.ones(3))

"""Initialization: the first SGD step changes ΔW by the same amount for any rank, order, splits and ρ."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import sums_of_squares
from tests.support.depth import LONG
from tnadapt.algebra import rng
from tnadapt.algebra.init import STEP
from tnadapt.algebra.sources import Tied
from tnadapt.backends import load_backend
from tnadapt.testing.verification import examples

SHAPES = [(96, 96)] * 8
FOUR = {"weights": 8, "rows": 96, "cols": 96}
P = tna.presets

# The first 16 hex digits of SHA-256 of all arrays of a start, as little-endian float32.
KNOWN = {
    "lora 64": "6d05941819848a49",
    "nonlinear": "1543c7b9d44d2067",
    "nonlinear_v2, lorta 5": "344ddcaa0aa314e7",
    "cara": "f136bd0e0b9ba4a4",
}

CONFIGS = {
    "lora 1": P.lora(1),
    "lora 64": P.lora(64),
    "lokr": P.lokr(4),
    "lokr, both low rank": P.lokr(4, leading="same"),
    "krona": P.krona(),
    "loha": P.loha(4),
    "lonkr 3": P.lonkr(4, splits=3),
    "lonkr 4": P.lonkr(4, splits=4, split_size=4),
    "lotr": P.lotr(4, **FOUR),
    "lotr, train": P.lotr(4, train=True, **FOUR),
    "lorta 3": P.lorta(4, order=3),
    "lorta 5, rank 1": P.lorta(1, order=5),
    "lorta 5": P.lorta(4, order=5),
    "cara": P.cara(4, heads=4, **FOUR),
    "fact_tk": P.fact_tk(4, **FOUR),
    "superlora": P.superlora(4),
    "linear, 0.1": P.superlora(4, projection="linear", ratio=0.1),
    "linear_v2, 0.01": P.superlora(4, projection="linear_v2", ratio=0.01),
    "nonlinear": P.superlora(4, projection="nonlinear"),
    "nonlinear, 0.1": P.superlora(4, projection="nonlinear", ratio=0.1),
    "nonlinear_v2, lorta 5": P.lorta(4, order=5, projection="nonlinear_v2", ratio=0.1),
    "compacter": P.compacter(2, terms=4),
    "low rank, dct2": P.lora(4, projection="dct2", on="weight"),
    "low rank, tiled": tna.Config(rank=4, fold="hypercube", projection=tna.maps.Tile(cols=8), on="weight"),
    "chain": P.superlora(4, projection=["sign-gather", "linear"], ratio=0.2),
    "nonlinear chain": P.superlora(4, projection=["gather", "nonlinear"], ratio=0.5),
}


def first_step(plan: tna.UpdatePlan, seed: int = 0, trained: list[str] | None = None) -> float:
    """Root mean square of ΔW after one SGD step of rate 1 on a white gradient, over dense fine-tuning's."""
    torch = pytest.importorskip("torch")
    gradient = torch.tensor(np.random.default_rng(seed).normal(size=plan.size))
    params = {
        name: array.requires_grad_(trained is None or name in trained)
        for name, array in plan.init("torch", "float64", trained=trained).items()
    }
    (plan.vector(params) * gradient).sum().backward()
    rate = 1e-3  # small: of the step's first order
    moved = {name: (a - rate * a.grad).detach() if a.requires_grad else a for name, a in params.items()}
    return float(plan.vector(moved).square().mean().sqrt() / gradient.square().mean().sqrt()) / rate


def step_of(config: tna.Config, shapes: list[tuple[int, int]] = SHAPES) -> float:
    return first_step(tna.UpdatePlan(config, shapes))


@pytest.mark.slow
@pytest.mark.law("first-step")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_step_does_not_depend_on_the_method(name: str) -> None:
    steps = [step_of(CONFIGS[name].replace(seed=seed)) for seed in range(5)]
    assert STEP / 5 < np.median(steps) < STEP * 5
    # One draw of few products, through a nonlinear F that takes their fourth power, is off by more.
    linear = "nonlinear" not in str(CONFIGS[name].projection)
    assert max(max(steps) / STEP, STEP / min(steps)) < (5 if linear else 25)


@pytest.mark.slow
@pytest.mark.law("first-step")
@pytest.mark.parametrize("order", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("projection", ["identity", "nonlinear"])
def test_small_adapters_of_high_order_are_no_exception(order: int, projection: str) -> None:
    steps = [
        step_of(P.superlora(1, order=order, format="cp", projection=projection, seed=seed), [(64, 64)] * 4)
        for seed in range(4)
    ]
    assert STEP / 10 < np.median(steps) < STEP * 10
    assert min(steps) > STEP / 50


@pytest.mark.law("first-step")
@pytest.mark.parametrize("alpha", [0.5, 4.0, 64.0])
@pytest.mark.parametrize("name", ["lora 64", "lonkr 3", "linear, 0.1"])
def test_alpha_acts_as_in_lora(name: str, alpha: float) -> None:
    config = CONFIGS[name].replace(alpha=alpha)
    assert abs(step_of(config) / (config.scale**2 * step_of(CONFIGS[name])) - 1) < 1e-3


@pytest.mark.law("first-step")
@pytest.mark.parametrize(
    ("config", "expected", "error"),
    [
        *((P.lora(rank), STEP, 0.05) for rank in (1, 2, 8, 32, 96)),
        # Nothing is random here, and the step is dense fine-tuning's.
        (P.dense(), 1.0, 1e-9),
        *((tna.Config(rank=rank, order=1), rank, 1e-9) for rank in (1, 4)),
    ],
)
def test_where_the_size_of_the_first_step_is_known_it_is_exact(
    config: tna.Config, expected: float, error: float
) -> None:
    assert abs(step_of(config) / expected - 1) < error
    assert (tna.UpdatePlan(config, SHAPES).groups[0].start.std == 0.0) == (expected != STEP)


@pytest.mark.law("first-gradients")
def test_no_group_of_many_small_ones_is_dead() -> None:
    torch = pytest.importorskip("torch")
    for config in (
        P.lorta(1, order=5, groups="weight", projection="nonlinear", ratio=0.1),
        # Found by review: the gradient of a whole group was zero in single precision.
        tna.Config(rank=2, order=5, splits=2, fold="hypercube", format="tucker", leading="same",
                   projection="nonlinear_v2", seed=9, shared=False),
    ):  # fmt: skip
        plan = tna.UpdatePlan(config, [(2, 4)] * 2 + [(16, 16)] * 20)
        params = {name: array.requires_grad_() for name, array in plan.init("torch").items()}
        weights = torch.tensor(np.random.default_rng(0).normal(size=plan.size), dtype=torch.float32)
        (plan.vector(params) * weights).sum().backward()
        largest = [max(float(params[full].grad.abs().max()) for full in group.names.values()) for group in plan.groups]
        assert min(largest) > 1e-6


def test_lora_of_rank_8_starts_like_pefts() -> None:
    plan = tna.UpdatePlan(P.lora(8), [(768, 768)])
    params = plan.init()
    # Kaiming's uniform distribution with a = sqrt(5), PEFT's choice, has this standard deviation.
    assert abs(params["group0.split0.factor1"].std() * np.sqrt(3 * 768) - 1) < 0.1
    assert not params["group0.split0.factor0"].any()


@pytest.mark.law("known-draws")
def test_what_is_drawn_is_the_specs_stream() -> None:
    config = P.loha(2, seed=2**40 + 7)
    plan = tna.UpdatePlan(config, [(5, 4), (3, 2)])
    params = plan.init()
    for group in range(2):
        names = [name for name in plan.param_shapes if name.startswith(f"group{group}.")]
        std = plan.groups[group].start.std
        for j, name in enumerate(names):
            if name.endswith("split1.factor0"):
                assert not params[name].any()
                continue
            shape = plan.param_shapes[name]
            drawn = rng.normals(2**40 + 7, group, 16 + j, 0, shape[0] * shape[1])
            scaled = drawn.reshape(shape) * (std / np.sqrt(np.mean(drawn.astype(np.float64) ** 2)))
            np.testing.assert_allclose(params[name], scaled, rtol=1e-6)


def test_cp_weights_start_at_one_and_every_term_has_its_zero_of_what_is_trained() -> None:
    plan = tna.UpdatePlan(tna.Config(rank=3, format="cp-weighted", terms=2), [(5, 4)])
    params = plan.init()
    for term in range(2):
        assert (params[f"group0.term{term}.split0.weights"] == 1).all()
        assert not params[f"group0.term{term}.split0.factor0"].any()
        assert params[f"group0.term{term}.split0.factor1"].all()
    one, two = (params[f"group0.term{term}.split0.factor1"] for term in range(2))
    assert not np.array_equal(one, two)
    trained = ["group0.term0.split0.weights", "group0.term1.split0.factor1", "group0.term1.split0.weights"]
    (start,) = plan.starts(trained)
    assert start.zeros == {"term0.split0.weights", "term1.split0.factor1"}
    params = plan.init(trained=trained)
    assert not plan.deltas(params)[0].any()
    assert (params["group0.term1.split0.weights"] == 1).all()
    # What is trained occurs twice: something else is zero, and not the weights.
    config = tna.Config(2, order=3, fold=(4, 4, 2), format="cp-weighted", sources={"factor0": Tied("split0.factor1")})
    (start,) = tna.UpdatePlan(config, [(8, 4)]).starts(["group0.split0.factor1"])
    assert start.zeros == {"split0.factor2"}


@pytest.mark.law("first-gradients")
def test_a_nonlinear_start_is_alive_and_small() -> None:
    plan = tna.UpdatePlan(P.superlora(4, projection="nonlinear", ratio=0.1), SHAPES)
    params, group = plan.init(dtype="float64"), plan.groups[0]
    begun = {name: params[full] for name, full in group.names.items()}
    t = tna.Projection("linear", group.network.size, plan.size)(group.network.whole(load_backend("numpy"), begun))
    # The derivative tanh(t)² is far from zero, and t - tanh(t) is far from t.
    assert 0.05 < np.sqrt(np.mean(t**2)) < 0.6


@pytest.mark.slow
def test_thousands_of_terms_start_in_time_that_grows_with_their_number() -> None:
    # Looking each array's number up in a list would take a billion steps.
    params = tna.UpdatePlan(tna.Config(rank=1, terms=1 << 14), [(2, 2)]).init()
    assert len(params) == 2 << 14


def test_arrays_have_the_scale_exactly_and_one_number_is_never_small() -> None:
    plan = tna.UpdatePlan(P.lorta(3, order=3, projection="nonlinear"), [(20, 21)])
    for array in plan.init().values():
        rms = np.sqrt(np.mean(array.astype(np.float64) ** 2))
        assert abs(rms / plan.groups[0].start.std - 1) < 1e-6
    one = tna.UpdatePlan(P.superlora(1, projection="nonlinear"), [(1, 1)])
    assert abs(abs(one.init()["group0.split0.factor0"].item()) / one.groups[0].start.std - 1) < 1e-6


def test_halves_are_rounded_as_libraries_round_them() -> None:
    from tnadapt.backends.stored_floats import rounded_to

    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    normals = rng.normal(size=10_000).astype(np.float32)
    ties = [(rng.normal(size=1000).astype(np.float32).view(np.uint32) >> cut << cut) | 1 << cut - 1 for cut in (13, 16)]
    numbers = np.concatenate([normals, *(bits.view(np.float32) for bits in ties)])
    for dtype in ("bfloat16", "float16", "float32"):
        expected = torch.tensor(numbers).to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(rounded_to(numbers, dtype), expected)


# -- Where some arrays are frozen --------------------------------------------------------------------

SMALL = [(12, 8)] * 4
BASE = list(np.random.default_rng(0).normal(size=(4, 12, 8)))
FROZEN = {
    # θ has no parts to choose.
    **{name: config for name, (config, _) in examples().items() if config.before is None},
    "lokr, both low rank": P.lokr(2, leading="same"),
    "lotr, train": P.lotr(2, train=True, weights=4, rows=12, cols=8),
    "linear": P.superlora(2, projection="linear", ratio=0.5),
    "nonlinear": P.superlora(2, projection="nonlinear", ratio=0.5),
    "weighted, nonlinear": P.cara(2, heads=3, projection="nonlinear_v2", weights=4, rows=12, cols=8),
    "weights of an order of one": tna.Config(rank=2, order=1, format="cp-weighted"),
}


def choices(plan: tna.UpdatePlan) -> list[tuple[list[int], tuple[str, ...]]]:
    """Every subset of the last parts of names, in all groups and in the first."""
    words = sorted({name.rpartition(".")[2] for name in plan.param_shapes if name not in plan.weight_param_shapes})
    subsets = [some for count in range(1, len(words) + 1) for some in itertools.combinations(words, count)]
    return [(groups, some) for groups in (list(range(plan.num_groups)), [0]) for some in subsets]


def chosen(plan: tna.UpdatePlan, groups: list[int], words: tuple[str, ...]) -> list[str]:
    return [
        full
        for number, group in enumerate(plan.groups)
        for full in group.names.values()
        if number in groups and full.rpartition(".")[2] in words
    ]


@pytest.mark.law("frozen-arrays")
@pytest.mark.parametrize("name", FROZEN)
def test_whatever_is_trained_changes_nothing_at_first_and_has_a_gradient(name: str) -> None:
    torch = pytest.importorskip("torch")
    plan = tna.UpdatePlan(FROZEN[name], SMALL).with_base(BASE)
    usual = plan.init()
    for groups, words in choices(plan):
        trained = chosen(plan, groups, words)
        zero = {f"group{number}.{name}" for number in groups for name in plan.groups[number].start.zeros}
        if zero <= set(trained):  # the usual zero stays where it is trained
            started = plan.init(trained=trained)
            assert all(np.array_equal(started[key], usual[key]) for key in usual)
        params = {
            key: array.requires_grad_(key in trained) for key, array in plan.init("torch", trained=trained).items()
        }
        vec = plan.vector(params)
        assert not vec.any()
        weights = torch.tensor(np.random.default_rng(0).normal(size=plan.size), dtype=torch.float32)
        (vec * weights).sum().backward()
        for number in groups:
            own = [full for full in plan.groups[number].names.values() if full in trained]
            assert any(params[key].grad.any() for key in own), (groups, words)
            if not plan.groups[number].projection.linear:
                # Nothing is zero there, and everything learns at once.
                assert all(params[key].grad.any() for key in own), (groups, words)
        # What is not trained has no zero, so that what is trained learns all along.
        for number, group in enumerate(plan.groups):
            if number in groups:
                assert all(params[full].any() for full in group.names.values() if full not in trained)


@pytest.mark.slow
@pytest.mark.law("first-step")
@pytest.mark.parametrize("name", FROZEN)
def test_the_first_step_does_not_depend_on_what_is_frozen(name: str) -> None:
    steps: dict[tuple[str, ...], list[float]] = {}
    for seed in range(5):
        plan = tna.UpdatePlan(FROZEN[name].replace(seed=seed), SMALL).with_base(BASE)
        for groups, words in choices(plan):
            trained = chosen(plan, groups, words)
            if len(groups) == plan.num_groups and plan.groups[0].projection.linear and plan.starts(trained)[0].std != 0:
                steps.setdefault(words, []).append(first_step(plan, seed, trained))
    for words, sizes in steps.items():
        assert STEP / 10 < np.median(sizes) < STEP * 10, words


# -- The starts of a population's members ------------------------------------------------------------

SEED = st.sampled_from([0, 1, 2**32 - 1, 2**40 + 7, 2**64 - 1])
ALONE: dict[str, tna.Config] = {
    **{name: config for name, (config, _) in examples().items()},
    **FROZEN,
    "terms": tna.Config(rank=2, terms=2, format="tt", order=3, fold="hypercube", alpha=3.0),
    "adam": P.lora(2, rate="adam"),
}


def base_of(plan: tna.UpdatePlan) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(len(plan.shapes), *plan.shapes[0])))


def check_members(
    config: tna.Config, shapes: list[tuple[int, int]], members: Sequence[int], words: tuple[str, ...] | None = None
) -> None:
    """Compare what is drawn of members with the starts of plans with their seeds, of some 50 of them."""

    def started(seed: int) -> tuple[tna.UpdatePlan, list[str] | None]:
        plan = tna.UpdatePlan(dataclasses.replace(config, seed=seed % 2**64), shapes, roles="qv" * (len(shapes) // 2))
        plan = plan.with_base(base_of(plan)).training_plan
        return plan, words and chosen(plan, list(range(plan.num_groups)), words)

    plan, trained = started(config.seed)
    drawn = dict(plan.drawn_for(members, trained))
    usual = plan.init(trained=trained)
    assert drawn.keys() <= usual.keys()
    for name, arrays in drawn.items():
        assert (arrays.dtype, arrays.shape) == (np.float32, (len(members), *plan.param_shapes[name]))
    for place in range(0, len(members), 1 + len(members) // 50):
        alone, trained = started(config.seed + members[place])
        expected = alone.init(trained=trained)
        for name, array in expected.items():
            member = drawn[name][place] if name in drawn else usual[name]
            assert member.tobytes() == array.tobytes(), name


@pytest.mark.law("member-starts")
@pytest.mark.parametrize("name", ALONE)
@settings(max_examples=600 if LONG else 4)
@given(seed=SEED, members=st.lists(st.integers(0, 2**65), max_size=3), data=st.data())
def test_members_start_as_plans_with_their_seeds(name: str, seed: int, members: list[int], data: st.DataObject) -> None:
    config = dataclasses.replace(ALONE[name], seed=seed)
    plan = tna.UpdatePlan(config, SMALL, roles="qvqv").with_base(BASE)
    if plan.theta is None and any(group.subtracts for group in plan.groups):
        with pytest.raises(tna.ConfigError, match="so all members share them: use seeds='one'"):
            list(plan.drawn_for(members))
        return
    words = [None] if plan.theta is not None else [None, *dict.fromkeys(some for _, some in choices(plan))]
    check_members(config, SMALL, members, data.draw(st.sampled_from(words)))


@pytest.mark.law("member-starts")
@pytest.mark.parametrize(
    ("rank", "cols", "count"),
    # At the longest array whose scale is exact, beyond it, and longer than a piece; and members in several pieces.
    [(8, 2**11, 2), (8, 2**11 + 1, 2), (8, 10_000, 2), (1, 30, 5000), (1, 3000, 130), (8, 2**11, 0)],
)
def test_long_arrays_and_many_members(rank: int, cols: int, count: int) -> None:
    check_members(P.lora(rank), [(4, cols)] * 2, range(1, 1 + count))


# The extreme words, the middle ones, and those where the inverse distribution changes its formula.
WORDS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 2**32 - 1, 2**31 - 1, 2**31, round(0.075 * 2**32), round(0.925 * 2**32)]),
)


@given(st.lists(WORDS, min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 2**14))
@example(words=[0], rows=1, length=2**14)
@example(words=list(range(40)), rows=3, length=2**14)
def test_sums_of_squares_are_correctly_rounded(words: list[int], rows: int, length: int) -> None:
    """Of any normal numbers, up to the longest row."""
    normals = rng._normal_of(np.array(words, np.uint32))
    wide = np.resize(normals, (rows, length)).astype(np.float64)
    assert sums_of_squares(wide).tolist() == [math.fsum((row * row).tolist()) for row in wide]


# -- The bits of the start ---------------------------------------------------------------------------


def test_the_bits_of_starts_are_known_and_their_scales_of_single_precision() -> None:
    """x_start is regenerated wherever an adapter is loaded: a change of one bit changes every update."""
    digests = {}
    for name, config in CONFIGS.items():
        plan = tna.UpdatePlan(config, SHAPES)
        # A power's last bit differs between machines, and what is drawn must not.
        assert all(group.start.std == float(np.float32(group.start.std)) for group in plan.groups)
        if name in KNOWN:
            arrays = plan.init().values()
            assert all(array.dtype == np.float32 for array in arrays)
            whole = b"".join(array.astype("<f4").tobytes() for array in arrays)
            digests[name] = hashlib.sha256(whole).hexdigest()[:16]
    assert digests == KNOWN


TINY = tna.UpdatePlan(P.fastfood(0.5, projection="nonlinear", alpha=1e-6), [(8, 8)])
HUGE = tna.UpdatePlan(
    tna.Config(rank=1 << 20, splits=32, combine="hadamard", leading="same", projection="nonlinear"),
    [(1 << 20, 1 << 20)],
)


@pytest.mark.law("dtype-overflow")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TINY.init(dtype="float16"), "float16"),
        (lambda: HUGE.groups[0].start.std, "out of floating-point range"),
        (
            lambda: TINY.init(trained=["group0.split0.core"]),
            r"trained must name some of the parameters.*group0\.split0\.dense",
        ),
        (lambda: TINY.init(trained=[]), r"trained must name some of the parameters.*group0\.split0\.dense"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], message: str) -> None:
    assert not TINY.deltas(TINY.init())[0].any()
    with pytest.raises(tna.ConfigError, match=message):
        call()

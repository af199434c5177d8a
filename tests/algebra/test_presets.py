"""Presets against the formulas of their methods, the reductions in table 1, and cases where two methods coincide."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.random_parameters import drawn
from tests.conftest import relative_error
from tnadapt.testing.verification import examples


@pytest.mark.law("presets")
@pytest.mark.parametrize("name", tna.presets.__all__)
def test_every_preset_has_a_formula_an_example_and_a_reference_and_says_what_it_sets(name: str) -> None:
    assert tna.presets.__all__ == list(tna.presets.PRESETS) == list(examples())
    preset = tna.presets.PRESETS[name]
    assert preset.formula is not None
    assert (preset.changed is None) == (preset.config(**preset.example).apply == "add")
    assert preset.make is getattr(tna.presets, name)
    doc = inspect.getdoc(preset.make) or ""
    assert "Settings:" in doc
    of_the_paper = name in ("dense", "superlora", "lonkr", "lorta") and ("paper" in doc or "table 1" in doc)
    assert of_the_paper or preset.reference.rpartition(", ")[2] in doc


@pytest.mark.parametrize("name", tna.presets.__all__)
def test_larger_sizes_have_more_parameters_up_to_the_largest(name: str) -> None:
    weights = tna.presets.AdaptedWeights([(24, 16)] * 4, [0, 0, 1, 1], "qvqv", 8)
    on = weights.shapes, weights.layers, weights.roles
    ladders = tna.presets.PRESETS[name].ladders(weights)
    assert ladders
    for ladder in ladders:
        most = ladder.most(tna.UpdatePlan(ladder.config(1), *on))
        counts = [tna.parameter_count(ladder.config(size), *on) for size in range(1, min(most, 6) + 1)]
        assert counts == sorted(counts)
        assert (counts[0] < counts[-1]) == (most > 1)


def test_fastfood_takes_a_ratio_or_a_number_of_parameters() -> None:
    call = tna.planning.preset_call(tna.presets.fastfood(parameters=5))
    assert str(call) == "fastfood(parameters=5)"
    assert str(tna.planning.known_as(tna.presets.fastfood(parameters=5))) == "fastfood p = 5"
    with pytest.raises(tna.ConfigError, match=r"ratio must be at most 1, .*; got 100: use parameters=100"):
        tna.presets.fastfood(100)
    mixed = tna.presets.fastfood(0.5, before="one-hot", parameters=5)
    assert (mixed.projection, mixed.ratio, mixed.before, mixed.parameters) == ("linear", 0.5, "one-hot", 5)
    with pytest.raises(tna.ConfigError, match=r"takes ratio or parameters; got ratio=0.5 and parameters=5"):
        tna.presets.fastfood(0.5, parameters=5)


def test_the_largest_size_is_that_beyond_which_nothing_is_gained() -> None:
    weights = tna.presets.AdaptedWeights([(24, 16), (8, 40)])
    largest = {"nola": [4 * 8, 8 * 8], "unilora": [4 * 88, 8 * 88], "tinylora": [2 * 2**2, 2 * 4**2, 2 * 8**2]}
    largest["compacter"] = [8 // 2, 8 // 4, 8 // 8]
    largest |= {name: [8 * 40] for name in ("shira", "fourierft", "loca", "waveft")}
    largest |= {name: [4 * 8] for name in ("lotr", "fact_tt", "fact_tk", "metatt")}
    largest |= {"lora": [8], "randlora": [8], "gralora": [8 // 2], "vera": [4 * 40], "fastfood": [24 * 16 + 8 * 40]}
    largest |= {"dense": [1], "krona": [1], "c3a": [1] * 4, "miss": [1] * 4, "quanta": [1] * 6}
    for name, expected in largest.items():
        assert [ladder.most(None) for ladder in tna.presets.PRESETS[name].ladders(weights)] == expected  # type: ignore[arg-type]


def test_vera_s_b_has_the_variance_of_the_paper() -> None:
    b = tna.UpdatePlan(tna.presets.vera(256), [(768, 512)]).groups[0].frozen.host("split0.factor0")
    assert abs(256 * b.var() - 2) < 0.02


def test_names_in_peft_are_those_of_its_methods() -> None:
    peft = pytest.importorskip("peft")
    names = {preset.peers["PEFT"] for preset in tna.presets.PRESETS.values() if "PEFT" in preset.peers}
    assert names <= {str(method.value) for method in peft.PeftType}


SIDES = st.integers(1, 12)
WEIGHTS = st.integers(1, 3)
RANKS = st.integers(1, 5)
ALPHAS = st.none() | st.sampled_from([1.0, 8.0])


P = tna.presets
Cases = dict[str, tuple[tna.Config, list[tuple[int, int]]]]


@st.composite
def cases(draw: st.DrawFn) -> Cases:
    """A config of every preset, and weights that it fits."""
    r, alpha, weights, seed = draw(RANKS), draw(ALPHAS), draw(WEIGHTS), draw(st.sampled_from([0, 1, 2**40 + 7]))
    rows, cols, heads, block, down, across = draw(SIDES), draw(SIDES), *(draw(st.integers(1, 4)) for _ in range(4))
    mixed = draw(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3))
    large = [(r + more, r + wider) for more, wider in mixed]  # sides of at least the rank
    sizes, split = {"rows": rows, "cols": cols}, {"rows": heads * block, "cols": cols, "heads": heads}
    ratio, linear = draw(st.sampled_from([1.0, 0.5, 0.07])), draw(st.sampled_from(["linear", "linear_v2"]))
    smallest = min(rows * cols for rows, cols in mixed)
    n = draw(st.integers(1, smallest))
    positions = draw(st.sampled_from([None, np.random.default_rng(seed).permutation(smallest)[:n]]))
    few: dict[str, Any] = {"seed": seed, "alpha": alpha}
    family = draw(st.sampled_from(["haar", "db1", "db2", "db3"]))
    mini = draw(st.none() | st.integers(1, rows))
    return {
        "dense": (P.dense(), mixed),
        "krona": (P.krona(alpha=alpha), mixed),
        **{name: (getattr(P, name)(r, alpha=alpha), mixed) for name in ("lora", "lokr", "loha", "dora", "hira")},
        **{name: (getattr(P, name)(r, seed=seed), large) for name in ("lora_fa", "lora_xs", "svft", "vera")},
        "nola": (P.nola(1, r, seed=seed), large),
        "unilora": (P.unilora(2, r, seed=seed), large),
        **{name: (getattr(P, name)(r, seed=seed), large[:1] * weights) for name in ("share_lora", "tied_lora")},
        "randlora": (P.randlora(r, rows=large[0][0], cols=large[0][1], seed=seed), large[:1] * weights),
        "craft": (P.craft(r, groups=1), large[:1] * weights),
        "quanta": (P.quanta((2, r), seed=seed), [(6 * r, 4 * r)] * weights),
        **{
            name: (getattr(P, name)(r, weights=weights, **sizes), [(rows, cols)] * weights)
            for name in ("lotr", "fact_tt", "fact_tk")
        },
        "lotr as a train": (P.lotr(r, weights=weights, train=True, **sizes), [(rows, cols)] * weights),
        "lorta_cp": (P.lorta_cp(r, layers=weights, **split), [(heads * block, cols)] * (2 * weights)),
        "cara": (P.cara(r, weights=weights, **split), [(heads * block, cols)] * weights),
        "lorta": (P.lorta(r, order=draw(st.integers(3, 5))), mixed),
        "lonkr": (P.lonkr(r, splits=draw(st.integers(3, 4)), split_size=draw(st.integers(1, 3))), mixed),
        "fastfood": (P.fastfood(ratio, projection=linear), mixed),
        "fastfood of parameters": (P.fastfood(parameters=n, seed=seed), mixed),
        "superlora": (P.superlora(r, projection=linear, ratio=ratio), mixed),
        "superlora of its length": (P.superlora(r, projection=draw(st.sampled_from(["identity", "shuffle"]))), mixed),
        **{name: (getattr(P, name)(n, positions, **few), mixed) for name in ("shira", "fourierft", "loca")},
        "waveft": (P.waveft(n, positions, family=family, **few), mixed),
        "compacter": (P.compacter(r, terms=block), [(down * block, across * block)] * weights),
        "c3a": (P.c3a(block), [(block * down, block * across)] * weights),
        "gralora": (P.gralora(r * block, block, alpha=alpha), [(block * down, block * across)] * weights),
        **{
            f"metatt {len(given)}": (
                P.metatt(r, matrices=2, alpha=alpha, **given),
                [(heads * block, cols)] * 2 * weights,
            )
            for given in ({}, {"layers": weights, "rows": heads * block, "cols": cols}, {"heads": heads})
        },
        **{
            f"{name} of any weights": (getattr(P, name)(r, **own), [(heads * block, cols)] * (2 * weights))
            for name, own in (
                ("lotr", {}),
                ("fact_tt", {}),
                ("fact_tk", {}),
                ("cara", {"heads": heads}),
                ("cara", {"head_size": block}),
                ("lorta_cp", {"head_size": block}),
            )
        },
        "miss": (P.miss(draw(st.integers(1, cols)), mini), [(rows, cols)] * weights),
    }


@pytest.mark.law("presets")
@given(cases())
def test_the_update_is_the_methods_own_formula(methods_of: Cases) -> None:
    """The formula is given what is frozen and where training begins."""
    for name, (config, shapes) in methods_of.items():
        rng = np.random.default_rng(0)
        plan = tna.UpdatePlan(config, shapes)
        weights = [rng.normal(size=shape) for shape in shapes]
        plan, preset = plan.with_base(weights), P.PRESETS[name.partition(" ")[0]]
        params = {key: rng.normal(size=shape) for key, shape in plan.param_shapes.items()}
        arrays = dict(params)
        for index, group in enumerate(plan.groups):
            arrays |= {full: group.frozen.host(key).astype(np.float64) for key, full in group.frozen_names.items()}
            arrays |= {f"begun.group{index}.{key}": group.start.host(key).astype(np.float64) for key in group.names}
        pairs = zip(plan.deltas(params), preset.formula(arrays, config, shapes), strict=True)  # type: ignore[misc]
        if preset.changed is not None:
            changed = zip(plan.merged(params, weights), preset.changed(params, config, weights), strict=True)
            pairs = itertools.chain(pairs, changed)
        for found, own in pairs:
            assert relative_error(found, own) < 1e-12


@pytest.mark.parametrize(("make", "message"), [
    *((functools.partial(getattr(P, name), 7, (1, 2, 3)),
       r"^n must be the number of positions; got n=7 and 3 positions$")
      for name in ("fourierft", "loca", "shira", "waveft")),
    (lambda: P.gralora(5, 2), r"blocks must divide the rank, .*; got rank=5, blocks=2"),
    (lambda: tna.UpdatePlan(P.gralora(4, 2), [(5, 4)]),
     "divides the rows of each group by 2, and group 0 has 5 rows"),
    *((functools.partial(P.lorta_cp, layers=1, rows=10, cols=4, heads=heads), "heads must") for heads in (3, 0, 2.5)),
    *((functools.partial(P.cara, weights=2, rows=10, cols=4, heads=heads), "heads must") for heads in (3, 0, 2.5)),
    (lambda: P.lotr(2, weights=2, rows=96, cols=96).replace(fold="hypercube"), "weight_shape=None"),
])  # fmt: skip
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        make()


# -- Table 1: where the settings meet ---------------------------------------------------------------


Params = dict[str, np.ndarray]


def of_names(old: str, new: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Params], Params]:
    """What changes the arrays of one name, and the name."""
    return lambda params: {n.replace(old, new): change(a) if n.endswith(old) else a for n, a in params.items()}


def identity_cores(params: Params) -> Params:
    cores = {n.replace("factor0", "core"): np.eye(a.shape[1]) for n, a in params.items() if n.endswith("factor0")}
    return params | cores


def diagonal(weights: np.ndarray) -> np.ndarray:
    core = np.zeros((len(weights),) * 3)
    core[(range(len(weights)),) * 3] = weights
    return core


@pytest.mark.law("special-cases")
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), RANKS)
def test_settings_of_one_method_give_one_update(shapes: list[tuple[int, int]], rank: int) -> None:
    small = min(rank, *(min(shape) for shape in shapes))
    count, side = len(shapes), shapes[0][0]
    cubes: dict[str, Any] = {"rank": 1 if side == 1 else 2, "order": 3, "groups": "weight", "fold": "hypercube"}
    kronecker = P.lonkr(rank, splits=2, groups="weight", split_size="balanced", fold="stack")
    for one, other, change, alike in (
        # Table 1's first row to the letter: M = r = 1, C = I, A of d_in d_out × 1.
        (P.dense(), tna.Config(1, 1, format="cp"), of_names("dense", "factor0", lambda a: a.reshape(-1, 1)), shapes),
        (P.lora(small), tna.Config(small, format="tucker"), identity_cores, shapes),
        (tna.Config(format="cp-weighted", **cubes), tna.Config(format="tucker", **cubes),
         of_names("weights", "core", diagonal), [(side, side * side)] * count),
        (P.lokr(rank), kronecker, dict, shapes),
        # A group of each weight: listed, as layers, or as many groups as there are equal squares (section 3.2).
        (P.lora(rank), P.lora(rank, groups=[[i] for i in range(count)]), dict, shapes),
        (P.lora(rank), P.lora(rank, groups="layer"), dict, shapes),
        (P.lora(rank), P.superlora(rank, groups=count), dict, [(side, side)] * count),
    ):  # fmt: skip
        plan, another = (tna.UpdatePlan(config, alike, layers=range(count)) for config in (one, other))
        params = drawn(plan)
        for expected, found in zip(plan.deltas(params), another.deltas(change(params)), strict=True):
            assert relative_error(found, expected) <= (1e-12 if other.format == "tucker" else 0.0)


# -- Presets with a fold of their own are of weights of one shape ------------------------------------


def stacked(rows: int, cols: int, weights: int, heads: int) -> dict[str, tna.Config]:
    own = {"weights": weights, "rows": rows, "cols": cols}
    return {
        "lotr": tna.presets.lotr(2, **own),
        "lotr, train": tna.presets.lotr(2, train=True, **own),
        "fact_tt": tna.presets.fact_tt(2, **own),
        "fact_tk": tna.presets.fact_tk(2, **own),
        "cara": tna.presets.cara(2, heads=heads, **own),
        "lorta_cp": tna.presets.lorta_cp(2, layers=1, matrices=weights, rows=rows, cols=cols, heads=heads),
    }


STACKED = sorted(stacked(2, 2, 1, 1))


@pytest.mark.law("fold-shape")
@pytest.mark.parametrize("name", STACKED)
@given(
    heads=st.integers(1, 3), head=st.integers(1, 4), cols=SIDES,
    shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4), weights=st.integers(1, 4),
)  # fmt: skip
def test_only_the_weights_that_a_fold_stands_for_fit(
    name: str, heads: int, head: int, cols: int, shapes: list[tuple[int, int]], weights: int
) -> None:
    config = stacked(heads * head, cols, weights, heads)[name]
    assert tna.UpdatePlan(config, [(heads * head, cols)] * weights).num_groups == 1
    if shapes == [(heads * head, cols)] * weights:
        return
    with pytest.raises(tna.ConfigError, match=f"stands for {weights} weights? of {heads * head}×{cols}"):
        tna.UpdatePlan(config, shapes)


@pytest.mark.law("fold-shape")
@pytest.mark.parametrize("name", STACKED)
def test_grouped_query_attention_is_refused_with_the_way_out(name: str) -> None:
    # The fold has as many elements as these, or more: it used to cut through them.
    config = stacked(96, 96, 4, 6)[name]
    with pytest.raises(tna.ConfigError) as caught:
        tna.UpdatePlan(config, [(96, 96), (32, 96)] * 2)
    message = str(caught.value)
    for part in ("2 of 96×96, 2 of 32×96", "cut through weights", 'groups="role"', "superlora or lora"):
        assert part in message
    with pytest.raises(tna.ConfigError, match="a group has 3 of them: give the preset the number of adapted weights"):
        tna.UpdatePlan(config, [(96, 96)] * 3)
    with pytest.raises(tna.ConfigError, match="a group has 1 of them and 4608 elements of another"):
        tna.UpdatePlan(config.replace(groups=2), [(96, 96)] * 3)
    assert tna.UpdatePlan(config.replace(groups=2), [(96, 96)] * 8).num_groups == 2


@pytest.mark.parametrize(
    ("name", "takes"),
    [("lora", "rank"), ("superlora", "rank"), ("vera", "rank"), ("fourierft", "n, the number for each weight")],
)
def test_a_number_of_parameters_is_that_of_other_presets(name: str, takes: str) -> None:
    words = (
        f"parameters=1000: this preset takes {takes}; unilora, tinylora, fastfood and nola take a number of parameters"
    )
    with pytest.raises(tna.ConfigError, match=words):
        getattr(tna.presets, name)(parameters=1000)
    # With a map before the network, it is that of the map.
    config = getattr(tna.presets, name)(parameters=10, before="one-hot")
    assert tna.UpdatePlan(config, [(96, 96)] * 4).num_parameters >= 10


def test_a_fold_of_the_callers_own_is_of_any_weights() -> None:
    shapes = [(96, 96), (32, 96)]
    assert tna.UpdatePlan(tna.Config(order=3, groups=1, fold=(8, 16, 96)), shapes).num_groups == 1
    own = tna.presets.lotr(2, weights=2, rows=96, cols=96, fold=(2, 64, 96))
    assert own.weight_shape is None
    assert tna.UpdatePlan(own, shapes).num_groups == 1
    config = tna.presets.lotr(2, weights=2, rows=96, cols=96)
    assert tna.UpdatePlan(config.replace(fold="hypercube", weight_shape=None), shapes).num_groups == 1


def test_the_shape_of_weights_is_a_condition_and_no_part_of_what_is_computed() -> None:
    config = tna.presets.cara(2, weights=3, rows=4, cols=5, heads=2)
    assert config.weight_shape == (4, 5)
    assert tna.Config.from_dict(config.to_dict()).weight_shape == (4, 5)
    assert config == config.replace(weight_shape=None)
    assert hash(config) == hash(config.replace(weight_shape=None))
    assert "weight_shape" not in config.replace(weight_shape=None).to_dict()

"""Configs by the name of a preset, and groups and folds by the names of roles."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import config_of, named_config
from tests.algebra.random_parameters import drawn
from tests.conftest import relative_error
from tnadapt import errors
from tnadapt.testing.strategies import base_weights, plans

# -- A config by the name of its preset --------------------------------------------------------------------------------


# What presets need to know of the weights.
SIZES: dict[str, dict[str, Any]] = {
    "randlora": {"rows": 8, "cols": 4},
    "cara": {"heads": 2},
    "lorta_cp": {"heads": 2},
    "svft": {"rank": 2},
}


@pytest.mark.parametrize("name", tna.presets.__all__)
def test_a_name_is_its_preset(name: str) -> None:
    settings = {"seed": 7, **SIZES.get(name, {})}
    assert config_of(name, settings) == getattr(tna.presets, name)(**settings)


def test_all_of_a_presets_own_settings_are_taken() -> None:
    assert named_config("lonkr", {"rank": 1, "splits": 4, "groups": 2, "split_size": 6}) == tna.presets.lonkr(
        1, 4, 2, 6
    )
    # PEFT's word, where a preset has it itself.
    assert named_config("miss", {"r": 4}) == tna.presets.miss(r=4)


def test_without_a_name() -> None:
    config = tna.presets.lokr(2)
    assert config_of(config, {}) is config
    assert config_of(None, {}) == tna.presets.superlora(rank=8)


@pytest.mark.parametrize(
    ("cfg", "settings", "text"),
    [
        ("lroa", {}, "no preset 'lroa'; did you mean 'lora'? The presets are c3a, cara,"),
        ("qv", {}, "no preset 'qv'; to adapt these weights write attach(…, targets='qv'). The presets are"),
        ("conv", {}, "to adapt these weights write attach(…, targets='conv'). "),
        ("AdaLoRA", {}, "no preset 'AdaLoRA'; adalora is not available here; 'From PEFT' in the documentation lists"),
        ("pissa", {}, "pissa is 'lora' with another start: give start='pissa' with a preset of low rank. The presets"),
        ("qlora", {}, "no preset 'qlora'; QLoRA is 'lora' on a quantized model: load the model quantized and attach"),
        ("LoRA+", {}, "LoRA+ is 'lora' with two learning rates; with rate='adam', which presets have, one rate does."),
        ("nothing like it", {}, "no preset 'nothing like it'; the presets are"),
        (tna.presets.lora, {}, "got the preset lora itself: give its name, 'lora', or what it returns, "),
        ("LoRA", {}, "no preset 'LoRA'; did you mean 'lora'?"),
        (3, {}, "expected a tnadapt.Config, the name of a preset such as 'lora', or None; got int"),
        (
            "randlora",
            {"rows": 4},
            "preset 'randlora' needs cols, which depend on the weights of the model: give cols=…",
        ),
        ("lora", {"rank": 0}, "rank must be from 1"),
    ],
)
def test_refused(cfg: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(text)):
        config_of(cfg, settings)


@pytest.mark.parametrize(
    ("cfg", "settings", "text"),
    [
        (
            "lora",
            {"rnak": 2},
            "preset 'lora' has no setting 'rnak'; did you mean 'rank'? It takes rank, and any field of",
        ),
        ("dense", {"zzz": 2}, "preset 'dense' has no setting 'zzz'; it takes any field of tnadapt.Config"),
        ("lora", {"stratgy": 2}, "preset 'lora' has no setting 'stratgy'; did you mean 'strategy'? It takes"),
        ("lora", {"r": 2}, "preset 'lora' has no setting 'r'; PEFT's 'r' is 'rank' here, a setting of"),
        (None, {"r": 2}, "attach() got an unexpected keyword argument 'r': PEFT's 'r' is 'rank' here, a setting of"),
        (
            None,
            {"rank": 2},
            "argument 'rank': settings belong to a preset, so name one: attach(…, 'superlora', rank=…)",
        ),
        (None, {"blocks": 2}, "argument 'blocks': settings belong to a preset, so name one:"),
        (None, {"stratgy": 2}, "attach() got an unexpected keyword argument 'stratgy': did you mean 'strategy'?"),
        (None, {"zzzz": 2}, "argument 'zzzz': it has targets, strategy"),
        ("lora", {"network_dim": 4}, "no setting 'network_dim'; kohya-ss's 'network_dim' is 'rank' here, a setting of"),
        ("lora", {"linear_alpha": 4}, "LyCORIS's 'linear_alpha' is 'alpha' here, a setting of"),
        ("lora", {"task_type": "CAUSAL_LM"}, "PEFT's 'task_type' has no equivalent: attach takes any model, so leave"),
        (tna.Config(), {"rank": 2}, "a config has its settings already: use config.replace(rank=…), or the name of"),
    ],
)
def test_unexpected_keywords(cfg: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)) as error:
        config_of(cfg, settings, "attach", ["targets", "strategy"])
    assert isinstance(error.value, tna.ConfigError)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_what_a_preset_needs_is_said(name: str) -> None:
    with pytest.raises(tna.ConfigError, match=r"give (rows=…, cols=…|heads, or head_size|rank=r, or rows= and cols=)"):
        config_of(name, {})


def test_no_other_preset_needs_anything() -> None:
    for name in set(tna.presets.__all__) - SIZES.keys():
        assert isinstance(config_of(name, {}), tna.Config)


def test_every_setting_of_peft_has_an_answer() -> None:
    peft = pytest.importorskip("peft")
    # What PEFT keeps about a file, rather than a setting of LoRA.
    about = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - about
    assert {name for name in fields if errors.keyword_hint(name) is None} == set()
    with pytest.raises(
        tna.ConfigError, match=r"got LoraConfig\. PEFT's LoraConfig\(r=8\) is attach\(…, 'lora', rank=8\)"
    ):
        config_of(peft.LoraConfig(r=8), {})


def test_what_hints_name_exists() -> None:
    pytest.importorskip("torch")
    fields = [field.name for field in dataclasses.fields(tna.Config)]
    accepted = {*inspect.signature(tna.torch.attach).parameters, *fields}
    for library in errors._OTHER_KEYWORDS.values():
        for ours, _ in library.values():
            assert ours in accepted or ours in tna.presets.__all__
    places = [where for library in errors._OTHER_KEYWORDS.values() for _, where in library.values()]
    words = " ".join([*places, *errors._NOT_NEEDED.values()])
    named = set(re.findall(r"\btnadapt(?:\.\w+)+", words))
    assert {"tnadapt.torch.starts.eva", "tnadapt.torch.token_targets", "tnadapt.torch.mix"} <= named
    for name in named:
        assert functools.reduce(getattr, name.split(".")[1:], tna) is not None
    assert {"targets", "biases", "keep_trainable"} <= set(re.findall(r"\b(\w+)=", words)) <= accepted
    for method in re.findall(r"\badapter\.(\w+)", words):
        assert callable(getattr(tna.torch.Adapter, method))


# -- Groups by role, and folds in names: equal to the bit to layers and to integers, and the refusals in words ---------


P = tna.presets
# Grouped-query attention, as in a small Llama: four query heads and one key and value head of 16 rows.
GROUPED = [(64, 32), (16, 32)] * 3
ROLES = ["q", "v"] * 3

BY_ROLE: dict[str, tna.Config] = {
    "lotr": P.lotr(2, groups="role"),
    "fact_tt": P.fact_tt(3, groups="role"),
    "fact_tk": P.fact_tk(2, groups="role", alpha=4),
    "cara": P.cara(2, head_size=16, groups="role"),
    "lorta_cp": P.lorta_cp(2, head_size=16, groups="role"),
    "metatt": P.metatt(2, groups="role", alpha=3),
}


# -- groups="role" ----------------------------------------------------------------------------------


@pytest.mark.law("special-cases")
@given(plans().filter(lambda plan: plan.config.groups == "layer"), st.data())
def test_roles_group_as_layers_do(one: tna.SuperLoRA, data: st.DataObject) -> None:
    roles, base = one._layers, data.draw(base_weights(one.shapes))
    other = tna.SuperLoRA(one.config.replace(groups="role"), one.shapes, roles=roles, given=one.given)
    one, other = one.with_base(base), other.with_base(base)
    assert one.param_shapes == other.param_shapes
    assert one.num_parameters == tna.parameter_count(other.config, one.shapes, roles=roles)
    params = drawn(one)
    for mine, theirs in (
        (one.deltas(params), other.deltas(params)),
        (one.merged(params, base), other.merged(params, base)),
        (one.init().values(), other.init().values()),
    ):
        assert all(map(np.array_equal, mine, theirs))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (None, 'groups="role" needs roles=[…], one key per weight, to know which weights share a role'),
        (["q"], "roles has 1 keys for 2 weights; give one key per weight"),
        ([["q"], ["v"]], "roles must be a list of hashable keys, one per weight; got [['q'], ['v']]"),
    ],
)
def test_roles_that_do_not_fit_are_refused(roles: Any, message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        tna.SuperLoRA(tna.Config(groups="role"), [(2, 2)] * 2, roles=roles)


# -- Presets with a fold of their own ---------------------------------------------------------------


@pytest.mark.law("presets")
@pytest.mark.parametrize("name", BY_ROLE)
def test_grouped_query_attention_is_the_methods_formula_for_each_role(name: str) -> None:
    config = BY_ROLE[name]
    plan = tna.SuperLoRA(config, GROUPED, roles=ROLES)
    assert plan.num_groups == 2
    params = drawn(plan)
    found = plan.deltas(params)
    for group, role in enumerate("qv"):
        own = [weight for weight, key in enumerate(ROLES) if key == role]
        prefix = f"group{group}."
        arrays = {f"group0.{n.removeprefix(prefix)}": a for n, a in params.items() if n.startswith(prefix)}
        expected = tna.presets.PRESETS[name].formula(arrays, config, [GROUPED[weight] for weight in own])  # type: ignore[misc]
        for weight, delta in zip(own, expected, strict=True):
            # The formulas of Tucker leave the scale out.
            assert relative_error(found[weight], delta * (config.scale if name == "fact_tk" else 1)) < 1e-12
            assert relative_error(plan.delta(params, weight), found[weight]) < 1e-12


@pytest.mark.law("presets")
@given(
    name=st.sampled_from(sorted(BY_ROLE)), rank=st.integers(1, 4), heads=st.integers(1, 3), head=st.integers(1, 4),
    cols=st.integers(1, 8), layers=st.integers(1, 3), by_size=st.booleans(), seed=st.integers(0, 3),
)  # fmt: skip
def test_a_fold_in_names_is_the_fold_in_integers(
    name: str, rank: int, heads: int, head: int, cols: int, layers: int, by_size: bool, seed: int
) -> None:
    weights, rows = 2 * layers, heads * head
    own: dict[str, Any] = {"weights": weights, "rows": rows, "cols": cols}
    if name in ("lorta_cp", "metatt"):
        own = {"layers": layers, "rows": rows, "cols": cols}
    split: dict[str, Any] = {}
    if name in ("cara", "lorta_cp"):
        split = {"head_size": head} if by_size else {"heads": heads}
    preset = getattr(P, name)
    numbers, names = preset(rank, seed=seed, **own, **split), preset(rank, seed=seed, **split)
    assert numbers.weight_shape == (rows, cols)
    assert names.weight_shape is None
    one, other = (tna.SuperLoRA(config, [(rows, cols)] * weights) for config in (numbers, names))
    assert one.groups[0].network.sizes == other.groups[0].network.sizes == numbers.fold
    assert one.param_shapes == other.param_shapes
    params = drawn(one)
    for mine, theirs in zip(one.deltas(params), other.deltas(params), strict=True):
        assert np.array_equal(mine, theirs)
    for mine, theirs in zip(one.init().values(), other.init().values(), strict=True):
        assert np.array_equal(mine, theirs)


def test_some_sizes_without_the_others_are_refused() -> None:
    with pytest.raises(
        tna.ConfigError, match=r"weights, cols given without rows: give all of weights, rows, cols, or none"
    ):
        P.lotr(2, weights=2, cols=3)
    with pytest.raises(
        tna.ConfigError, match=r"layers given without rows, cols: give all of layers, rows, cols, or none"
    ):
        P.lorta_cp(2, layers=2, heads=2)
    for heads in ({}, {"heads": 2, "head_size": 2}):
        with pytest.raises(
            tna.ConfigError, match="give heads, or head_size where weights have different numbers of heads"
        ):
            P.cara(2, **heads)


def test_matrices_of_a_layer_are_two_unless_roles_are_apart() -> None:
    assert P.lorta_cp(1, heads=2).fold == ("weights/2", 2, 2, "rows/2", "cols")
    assert P.lorta_cp(1, heads=2, groups="role").fold == ("weights/1", 1, 2, "rows/2", "cols")
    with pytest.raises(tna.ConfigError, match="divides the weights of each group by 2, and group 0 has 3 weights"):
        tna.SuperLoRA(P.lorta_cp(1, heads=2), [(4, 4)] * 3)


# -- Folds in names ---------------------------------------------------------------------------------

MIXED = r"needs groups of weights of one shape, and group 0 has 3 of 64×32, 3 of 16×32: use groups=\"role\", which"
NAMED: dict[str, Any] = {"order": 3, "fold": ("weights", "rows", "cols"), "format": "tucker", "groups": 1}


@pytest.mark.parametrize("name", BY_ROLE)
def test_a_group_of_different_shapes_is_refused_and_told_of_roles(name: str) -> None:
    split = {"head_size": 16} if name in ("cara", "lorta_cp") else {}
    with pytest.raises(tna.ConfigError, match=MIXED):
        tna.SuperLoRA(getattr(P, name)(2, **split), GROUPED, roles=ROLES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fold": ("weights", "cols", "rows")},
            "must give the number of weights, then their rows, and then their columns",
        ),
        ({"fold": ("weights", "rows", 2)}, "must give the number of weights"),
        ({"fold": ("weights", 2, "rows", "cols"), "order": 4}, "must give the number of weights"),
        ({"fold": ("weights", "weights", "rows", "cols"), "order": 4}, "must give the number of weights"),
        ({"fold": (2, "weights", "rows", "cols"), "order": 4}, "must give the number of weights"),
        (
            {"fold": ("weights", "rows", "columns")},
            "fold[2] must be an integer, one of 'weights', 'rows', 'cols', or",
        ),
        ({"fold": ("weights", "rows/0", "cols")}, "such as 'rows/12'; got 'rows/0'"),
        ({"order": 2}, "has 3 sizes and order is 2; set order=3"),
        ({"weight_shape": (2, 2)}, "takes the shapes that the weights have, and weight_shape=(2, 2) demands one"),
        ({"projection": "linear", "ratio": 0.5}, "has the sizes of the weights, and ratio=0.5 folds a shorter vector"),
    ],
)
def test_folds_in_names_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        tna.Config(**{**NAMED, **changes})


def test_weights_that_a_fold_in_names_does_not_fit_are_refused() -> None:
    with pytest.raises(tna.ConfigError, match="needs groups of whole weights, and group 0 has 20 of the 24 elements"):
        tna.SuperLoRA(tna.Config(**{**NAMED, "groups": 6}), [(4, 6)] * 5)
    config = tna.Config(**{**NAMED, "order": 4, "fold": ("weights", "rows/3", 3, "cols")})
    with pytest.raises(
        tna.ConfigError, match="divides the rows of each group by 3, and group 0 has 4 rows: give a div"
    ):
        tna.SuperLoRA(config, [(4, 6)] * 2)


def test_groups_of_one_size_may_have_weights_of_different_shapes() -> None:
    config = tna.Config(**{**NAMED, "groups": "weight", "rank": 2})
    plan = tna.SuperLoRA(config, [(4, 6), (6, 4), (2, 12)])
    assert [group.network.sizes for group in plan.groups] == [(1, 4, 6), (1, 6, 4), (1, 2, 12)]
    assert plan.num_parameters == sum(array.size for array in plan.init().values())
    pieces = tna.SuperLoRA(config.replace(groups=3), [(4, 6), (6, 4), (2, 12)])
    assert pieces.param_shapes == plan.param_shapes


def test_a_fold_in_names_is_part_of_a_config() -> None:
    config = tna.Config(**NAMED)
    assert config.to_dict()["fold"] == ["weights", "rows", "cols"]
    assert tna.Config.from_dict(config.to_dict()) == config
    assert hash(config) == hash(tna.Config.from_dict(config.to_dict()))


@pytest.mark.parametrize("name", BY_ROLE)
def test_the_laws_hold_and_pickles_keep_the_roles(name: str) -> None:
    assert tna.verify(BY_ROLE[name], GROUPED, roles=ROLES, backends=["numpy"]).holds
    plan = tna.SuperLoRA(BY_ROLE[name], GROUPED, roles=ROLES)
    assert pickle.loads(pickle.dumps(plan)).param_shapes == plan.param_shapes

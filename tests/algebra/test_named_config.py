"""Configs by the name of a preset, and groups and folds by the names of roles."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pickle
import re
from collections.abc import Callable
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
def test_a_name_is_its_preset_and_says_what_it_needs(name: str) -> None:
    settings = {"seed": 7, **SIZES.get(name, {})}
    assert config_of(name, settings) == getattr(tna.presets, name)(**settings)
    if name not in SIZES:
        assert isinstance(config_of(name, {}), tna.Config)
        return
    with pytest.raises(tna.ConfigError, match=r"give (rows=…, cols=…|heads, or head_size|rank=r, or rows= and cols=)"):
        config_of(name, {})


def test_all_of_a_presets_own_settings_are_taken_and_none_without_a_name() -> None:
    settings = {"rank": 1, "splits": 4, "groups": 2, "split_size": 6}
    assert named_config("lonkr", settings) == tna.presets.lonkr(1, 4, 2, 6)
    # PEFT's word, where a preset has it itself.
    assert named_config("miss", {"r": 4}) == tna.presets.miss(r=4)
    config = tna.presets.lokr(2)
    assert config_of(config, {}) is config
    assert config_of(None, {}) == tna.presets.superlora(rank=8)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("lroa", {}, "no preset 'lroa'; did you mean 'lora'? The presets are c3a, cara,"),
    ("qv", {}, "no preset 'qv'; to adapt these weights write attach(…, targets='qv'). The presets are"),
    ("conv", {}, "to adapt these weights write attach(…, targets='conv'). "),
    ("AdaLoRA", {}, "no preset 'AdaLoRA'; adalora is not available here; the page 'PEFT' in the documentation"),
    ("pissa", {}, "pissa is 'lora' with another start: give start='pissa' with a preset of low rank. The presets"),
    ("qlora", {}, "no preset 'qlora'; QLoRA is 'lora' on a quantized model: load the model quantized and attach"),
    ("LoRA+", {}, "LoRA+ is 'lora' with two learning rates; with rate='adam', which presets have, one rate does."),
    ("nothing like it", {}, "no preset 'nothing like it'; the presets are"),
    (tna.presets.lora, {}, "got the preset lora itself: give its name, 'lora', or what it returns, "),
    ("LoRA", {}, "no preset 'LoRA'; did you mean 'lora'?"),
    (
        "SuperLoRA + F",
        {},
        "no preset 'SuperLoRA + F'; this is 'superlora' with projection='linear' and a ratio, such as ratio=0.1. The",
    ),
    (
        ["q", "v"],
        {},
        "such as 'lora', or None; got list; to adapt weights of these names write attach(…, targets=['q', ",
    ),
    (3, {}, "expected a tnadapt.Config, the name of a preset such as 'lora', or None; got int"),
    ("randlora", {"rows": 4}, "preset 'randlora' needs cols, which depend on the weights of the model: give cols=…"),
    ("lora", {"rank": 0}, "rank must be at least 1"),
]
UNEXPECTED: list[tuple[Any, dict[str, Any], str]] = [
    ("lora", {"rnak": 2}, "preset 'lora' has no setting 'rnak'; did you mean 'rank'? It takes rank, and any field of"),
    ("dense", {"zzz": 2}, "preset 'dense' has no setting 'zzz'; it takes any field of tnadapt.Config"),
    ("lora", {"stratgy": 2}, "preset 'lora' has no setting 'stratgy'; did you mean 'strategy'? It takes"),
    ("lora", {"r": 2}, "preset 'lora' has no setting 'r'; PEFT's 'r' is 'rank' here, a setting of"),
    (None, {"r": 2}, "attach() got an unexpected keyword argument 'r': PEFT's 'r' is 'rank' here, a setting of"),
    (None, {"rank": 2}, "argument 'rank': settings belong to a preset, so name one: attach(…, 'superlora', rank=…)"),
    (None, {"blocks": 2}, "argument 'blocks': settings belong to a preset, so name one:"),
    (None, {"stratgy": 2}, "attach() got an unexpected keyword argument 'stratgy': did you mean 'strategy'?"),
    (None, {"zzzz": 2}, "argument 'zzzz': it has targets, strategy"),
    ("lora", {"network_dim": 4}, "no setting 'network_dim'; kohya-ss's 'network_dim' is 'rank' here, a setting of"),
    ("lora", {"linear_alpha": 4}, "LyCORIS's 'linear_alpha' is 'alpha' here, a setting of"),
    ("lora", {"task_type": "CAUSAL_LM"}, "PEFT's 'task_type' has no equivalent: attach takes any model, so leave"),
    (tna.Config(), {"rank": 2}, "a config has its settings already: use config.replace(rank=…), or the name of"),
]


@pytest.mark.parametrize(
    ("error", "cfg", "settings", "text"),
    [*((tna.ConfigError, *row) for row in REFUSED), *((TypeError, *row) for row in UNEXPECTED)],
)
def test_what_is_no_preset_or_no_setting_of_it_is_refused(
    error: type[Exception], cfg: Any, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        config_of(cfg, settings, "attach", ["targets", "strategy"])
    assert isinstance(caught.value, tna.ConfigError)


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


@pytest.mark.law("special-cases")
@given(plans().filter(lambda plan: plan.config.groups == "layer"), st.data())
def test_roles_group_as_layers_do(one: tna.UpdatePlan, data: st.DataObject) -> None:
    roles, base = one._layers, data.draw(base_weights(one.shapes))
    other = tna.UpdatePlan(one.config.replace(groups="role"), one.shapes, roles=roles, given=one.given)
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


def in_names(**changes: Any) -> tna.Config:
    return tna.Config(**{"order": 3, "fold": ("weights", "rows", "cols"), "format": "tucker", "groups": 1, **changes})


HEADS = {"cara": {"head_size": 16}, "lorta_cp": {"head_size": 16}}
FOLDS_REFUSED: list[tuple[Callable[[], object], str]] = [
    *((functools.partial(tna.UpdatePlan, tna.Config(groups="role"), [(2, 2)] * 2, roles=roles), message)
      for roles, message in (
        (None, 'groups="role" needs roles=[…], one key per weight, to know which weights share a role'),
        (["q"], "roles has 1 keys for 2 weights; give one key per weight"),
        ([["q"], ["v"]], "roles must be a list of hashable keys, one per weight; got [['q'], ['v']]"))),
    (lambda: P.lotr(2, weights=2, cols=3),
     "weights, cols given without rows: give all of weights, rows, cols, or none"),
    (lambda: P.lorta_cp(2, layers=2, heads=2),
     "layers given without rows, cols: give all of layers, rows, cols, or none"),
    *((functools.partial(P.cara, 2, **heads),
       "give heads, or head_size where weights have different numbers of heads")
      for heads in ({}, {"heads": 2, "head_size": 2})),
    (lambda: tna.UpdatePlan(P.lorta_cp(1, heads=2), [(4, 4)] * 3),
     "divides the weights of each group by 2, and group 0 has 3 weights"),
    # A group of different shapes is told of roles.
    *((lambda name=name: tna.UpdatePlan(getattr(P, name)(2, **HEADS.get(name, {})), GROUPED, roles=ROLES),
       'needs groups of weights of one shape, and group 0 has 3 of 64×32, 3 of 16×32: use groups="role", which')
      for name in BY_ROLE),
    *((functools.partial(in_names, fold=fold, order=len(fold)), "must give the number of weights")
      for fold in (("weights", "rows", 2), ("weights", 2, "rows", "cols"), ("weights", "weights", "rows", "cols"),
                   (2, "weights", "rows", "cols"))),
    (lambda: in_names(fold=("weights", "cols", "rows")),
     "must give the number of weights, then their rows, and then their columns"),
    (lambda: in_names(fold=("weights", "rows", "columns")),
     "fold[2] must be an integer, one of 'weights', 'rows', 'cols', or"),
    (lambda: in_names(fold=("weights", "rows/0", "cols")), "such as 'rows/12'; got 'rows/0'"),
    (lambda: in_names(order=2), "has 3 sizes and order is 2; set order=3"),
    (lambda: in_names(weight_shape=(2, 2)),
     "takes the shapes that the weights have, and weight_shape=(2, 2) demands one"),
    (lambda: in_names(projection="linear", ratio=0.5),
     "has the sizes of the weights, and ratio=0.5 folds a shorter vector"),
    (lambda: tna.UpdatePlan(in_names(groups=6), [(4, 6)] * 5),
     "needs groups of whole weights, and group 0 has 20 of the 24 elements"),
    (lambda: tna.UpdatePlan(in_names(order=4, fold=("weights", "rows/3", 3, "cols")), [(4, 6)] * 2),
     "divides the rows of each group by 3, and group 0 has 4 rows: give a div"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FOLDS_REFUSED)
def test_roles_and_folds_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        make()


# -- Presets with a fold of their own ---------------------------------------------------------------


@pytest.mark.law("presets")
@pytest.mark.parametrize("name", BY_ROLE)
def test_grouped_query_attention_is_the_methods_formula_for_each_role(name: str) -> None:
    config = BY_ROLE[name]
    assert tna.verify(config, GROUPED, roles=ROLES, backends=["numpy"]).holds
    plan = tna.UpdatePlan(config, GROUPED, roles=ROLES)
    assert plan.num_groups == 2
    assert pickle.loads(pickle.dumps(plan)).param_shapes == plan.param_shapes
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


@pytest.mark.parametrize("name", BY_ROLE)
def test_a_fold_in_names_is_the_fold_in_integers(name: str) -> None:
    own = {"layers": 3} if name in ("lorta_cp", "metatt") else {"weights": 6}
    heads = {"heads": 2} if name in HEADS else {}
    numbers, names = (getattr(P, name)(2, **sizes, **heads) for sizes in ({**own, "rows": 8, "cols": 5}, {}))
    assert (numbers.weight_shape, names.weight_shape) == ((8, 5), None)
    one, other = (tna.UpdatePlan(config, [(8, 5)] * 6) for config in (numbers, names))
    assert one.groups[0].network.sizes == other.groups[0].network.sizes == numbers.fold
    assert all(map(np.array_equal, one.init().values(), other.init().values()))
    stored = names.to_dict()
    assert stored["fold"] == list(names.fold)
    assert tna.Config.from_dict(stored) == names
    assert hash(tna.Config.from_dict(stored)) == hash(names)


def test_matrices_of_a_layer_are_two_unless_roles_are_apart() -> None:
    assert P.lorta_cp(1, heads=2).fold == ("weights/2", 2, 2, "rows/2", "cols")
    assert P.lorta_cp(1, heads=2, groups="role").fold == ("weights/1", 1, 2, "rows/2", "cols")


# -- Folds in names ---------------------------------------------------------------------------------


def test_groups_of_one_size_may_have_weights_of_different_shapes() -> None:
    config = in_names(groups="weight", rank=2)
    plan = tna.UpdatePlan(config, [(4, 6), (6, 4), (2, 12)])
    assert [group.network.sizes for group in plan.groups] == [(1, 4, 6), (1, 6, 4), (1, 2, 12)]
    assert plan.num_parameters == sum(array.size for array in plan.init().values())
    pieces = tna.UpdatePlan(config.replace(groups=3), [(4, 6), (6, 4), (2, 12)])
    assert pieces.param_shapes == plan.param_shapes

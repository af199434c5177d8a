"""The grid: every setting is within its budget and trains what was counted; shards partition it; keys are stable."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

import torch
from torch import nn

import tnadapt as tna
from benchmarks.quality import methods, tasks
from benchmarks.quality.facts import Facts, facts_of
from benchmarks.quality.grid import BUDGETS, Trial, grid_of, shard_of
from tnadapt.errors import TnadaptError


@pytest.mark.slow
def test_settings_of_all_methods_are_within_their_budgets_and_have_keys_of_their_own() -> None:
    grid = grid_of(tasks.find("digits"))
    assert set(tna.presets.__all__) <= {*methods.names(["tnadapt"]), "dense"}
    assert "dense" in methods.names(["control"])
    for one in grid.settings:
        if methods.find(one.method).library != "control":
            assert one.budget / 2 <= one.parameters <= one.budget, one
    named = {(one.method, one.budget) for one in grid.settings if one.budget}
    without = {(one.method, one.budget) for one in grid.absent}
    used = [budget for budget in BUDGETS if budget <= grid.facts.size]
    assert used == [13, 100, 1_000, 10_000]
    assert named.isdisjoint(without)
    assert named | without == set(itertools.product(methods.names(), used))
    # At the largest budget of these weights, only those that cannot reach half of it are absent.
    assert {"lora", "superlora", "unilora", "peft-lora", "peft-boft"} <= {one[0] for one in named if one[1] == 10_000}
    keys = [
        Trial("digits", scale, setting, seed, rate).key
        for setting in grid.settings
        for scale, seed, rate in itertools.product(("small", "full"), (0, 1), (0.1, 1.0))
    ]
    assert len(set(keys)) == len(keys)


def test_keys_are_stable_and_settings_at_other_budgets_are_others() -> None:
    # A change of these keys would orphan published results.
    lora = methods.Setting("lora", 10_000, "r = 9", 9_216, '{"rank": 9}')
    assert Trial("digits", "small", lora, 0, 0.1).key == "00400fb4207f9555"
    wide = grid_of(tasks.find("digits"), ["lora"], (1_100, 2_201))  # by more than a factor of two
    assert len({(setting.method, setting.spec) for setting in wide.settings}) == len(wide.settings)


@given(of=st.integers(1, 200))
def test_shards_partition_the_settings(of: int) -> None:
    settings = list(range(143))
    shards = [shard_of(settings, (number, of)) for number in range(1, of + 1)]  # type: ignore[type-var]
    assert sorted(itertools.chain(*shards)) == settings
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def without_questions() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        tasks.find("number-sequence").open("smoke", Path(), "cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.find("lara"), "no method 'lara'; expected one of base, fitted-head, few-shot"),
        (lambda: tasks.find("digit"), "no task 'digit'; expected one of digits, reviews"),
        (lambda: grid_of(tasks.find("digits"), budgets=[0]), "a budget must be at least 1 parameter; got 0"),
        (
            lambda: methods.register(methods.find("lora")),
            "there is a method 'lora' already; give this one another name",
        ),
        (
            lambda: grid_of(tasks.find("digits"), ["peft-vera", "lora"], (1_100, 1_500)),
            "lora r = 1 is the largest setting at budgets of 1,100 and 1,500 parameters; give budgets that differ more",
        ),
        (
            lambda: facts_of(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), "qv"),
            "only a part of 0.self_attn.in_proj_weight is a target; PEFT adapts whole layers, so cut it up",
        ),
        (without_questions, "task number-sequence needs the package reasoning-gym: pip install reasoning-gym"),
        (lambda: shard_of([], (3, 2)), "a shard is I/N with I from 1 to N; got 3/2"),
    ],
)
def test_what_is_wrong_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TnadaptError, match=re.escape(message)):
        call()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))


def small() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(Attention() for _ in range(2))
    model.head = nn.Linear(16, 3)
    return model


FACTS: Facts = facts_of(small(), "qv", 8)


def fitting(name: str) -> methods.Setting:
    with torch.device("meta"):
        sketch = small()
    for budget in (1000, 600, 300, 100, 13):
        with contextlib.suppress(methods.UnfitError):
            return methods.find(name).largest(FACTS, sketch, budget)
    raise AssertionError(name)


FEW = ("lora", "unilora", "peft-lora", "peft-boft", "peft-tinylora")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in methods.names()],
)
def test_a_method_trains_as_many_parameters_as_were_counted(name: str) -> None:
    setting, model = fitting(name), small()
    attached = methods.find(name).attach(model, setting, FACTS, "qv", seed=3)
    assert methods.trained(attached) == setting.parameters
    assert not model.get_submodule("head").weight.requires_grad


def test_biases_alone_are_those_that_are_there_and_new_ones_at_zero() -> None:
    model = small()
    model.layers[0].query.bias = None
    inputs = torch.randn(3, 16)
    before = model.layers[0].query(inputs)
    setting = methods.find("biases").largest(FACTS, model, 0)
    attached = methods.find("biases").attach(model, setting, FACTS, "qv", seed=3)
    assert methods.trained(attached) == setting.parameters == 6 * 16 + 3
    assert {name for name, one in attached.named_parameters() if one.requires_grad} == {
        name for name, _ in small().named_parameters() if name.endswith("bias")
    }
    torch.testing.assert_close(model.layers[0].query(inputs), before)

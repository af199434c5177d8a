"""Common names of configs; and ``preset_call``: what is written is the config, in Python and on the command line."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import installed
from tests.planning.internals import chosen_config
from tnadapt.planning import known_as, preset_call
from tnadapt.testing import configs, plans
from tnadapt.testing.verification import examples

from .test_plan import VIT, weights

#: Presets whose arguments are not settings of the config, so that another preset returns it.
NOT_SETTINGS = ("gralora",)


def evaluated(written: str) -> Any:
    return eval(f"presets.{written}", {"presets": tna.presets})


def parsed(options: str) -> Any:
    words = shlex.split(options)
    assert words[0] == "--preset"
    assert set(words[2::2]) <= {"--set"}
    return chosen_config(words[1], words[3::2])


@settings(max_examples=settings.default.max_examples // 4)
@given(weights, st.integers(1, 3000))
def test_every_row_of_a_plan_can_be_written_and_given_as_options(shapes: list[tuple[int, int]], budget: int) -> None:
    for row in tna.plan(shapes, budget).rows:
        assert row.call is not None
        assert evaluated(str(row.call)) == row.config
        options = row.call.options()
        assert options is None or not installed("typer") or parsed(options) == row.config


@given(configs(((8, 8), (8, 12))))
def test_any_config_is_that_of_its_call(config: tna.Config) -> None:
    call = preset_call(config)
    assert call is not None
    assert getattr(tna.presets, call.preset)(**call.settings) == config


@pytest.mark.parametrize("name", tna.presets.__all__)
def test_a_preset_is_called_with_its_rank_and_what_is_not_its_default(name: str) -> None:
    preset = getattr(tna.presets, name)
    needed = {"heads": 2, "rows": 8, "cols": 8, "layers": 2, "matrices": 2, "weights": 2}
    arguments = inspect.signature(preset).parameters.values()
    try:
        config = preset()
    except (tna.ConfigError, TypeError):
        config = preset(**{one.name: needed[one.name] for one in arguments if one.name in needed})
    call = preset_call(config)
    assert call is not None
    assert getattr(tna.presets, call.preset)(**call.settings) == config
    if name not in NOT_SETTINGS and not any(one.name in needed for one in arguments):
        assert call.preset == name
        # fastfood takes one of two arguments, and so neither has a default.
        assert call.settings.keys() <= ({"ratio"} if name == "fastfood" else {"rank"})


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (tna.presets.lonkr(2, splits=2), "lonkr(rank=2, splits=2)"),
        (tna.presets.lorta(3, order=5, projection="linear", ratio=0.01),
         "lorta(rank=3, order=5, projection='linear', ratio=0.01)"),
        (tna.presets.lotr(5, weights=24, rows=768, cols=768), "lotr(rank=5, weights=24, rows=768, cols=768)"),
        (tna.presets.fourierft(50), "fourierft(n=50)"),
        (tna.presets.lora(4, start="pissa", seed=3), "lora(rank=4, seed=3, start='pissa')"),
    ],
)  # fmt: skip
def test_calls(config: tna.Config, written: str) -> None:
    assert str(preset_call(config)) == written


def test_how_a_call_is_attached_and_given_as_options() -> None:
    call = preset_call(tna.presets.superlora(4, split_size=(2, 3), splits=2))
    assert call is not None
    assert call.options() is None, "a command line cannot hold it"
    assert call.attach() == "tna.torch.attach(model, 'lonkr', rank=4, splits=2, split_size=(2, 3))"
    call = preset_call(tna.presets.lora(8))
    assert call is not None
    # Other weights than queries and values are named.
    for targets, words in (("", ""), ("all-linear", ", targets='all-linear'"), (["a.b"], ", targets=['a.b']"),
                           (["a.b", "c"], ", targets=['a.b', 'c']")):  # fmt: skip
        assert call.attach(targets) == f"tna.torch.attach(model, 'lora', rank=8{words})"
    for targets, words in (("", ""), ("conv", " --targets conv"), (["a.b", "c|d"], " --targets a.b --targets 'c|d'")):
        assert call.options(targets) == f"--preset lora --set rank=8{words}"
    assert (call.attach(), call.options()) == (call.attach(""), call.options(""))
    assert tna.plan(VIT, 1000).notes("all-linear")[-2].endswith(", targets='all-linear')")


def test_a_plan_says_how_to_use_its_first_row() -> None:
    plan = tna.plan(VIT, 1000)
    call = preset_call(plan.rows[0].config)
    assert call is not None
    assert call.attach().startswith("tna.torch.attach(model, ")
    assert str(plan).splitlines()[-2:] == [f"first row: {call.attach()}", f"  or tnadapt finetune {call.options()}"]


# What a mode of a fold means to a model is not in a config; and FacT-TT is LoTR.
FAMILIES = {"lorta_cp": "SuperLoRA", "fact_tk": "SuperLoRA", "cara": "SuperLoRA", "metatt": "SuperLoRA"}
FAMILIES |= {"gralora": "SuperLoRA", "fact_tt": "LoTR", "superlora": "SuperLoRA + F"}


@pytest.mark.parametrize("name", examples())
def test_presets(name: str) -> None:
    assert known_as(examples()[name][0]).family == FAMILIES.get(name, tna.presets.PRESETS[name].title)


@given(plans())
def test_every_config_has_a_name(plan: tna.UpdatePlan) -> None:
    name = known_as(plan.config)
    assert name.family
    assert known_as(plan.config.replace(seed=3, alpha=2.0)) == name
    assert str(name) == f"{name.family} {name.label}".strip()


def test_labels() -> None:
    told = {
        "SuperLoRA r = 4": tna.presets.superlora(4),
        "SuperLoRA G = layer, r = 4": tna.presets.superlora(4, groups="layer"),
        "LoTR G = role, r = 4": tna.presets.lotr(4, groups="role"),
        "LoTR r = 5": tna.presets.lotr(5),
        "SuperLoRA + F r = 4, ρ = 0.1": tna.presets.superlora(4, projection="linear", ratio=0.1),
        "SuperLoRA + F r = 4, nonlinear, ρ = 1": tna.presets.superlora(4, projection="nonlinear"),
        "SuperLoRA + F r = 4, shuffle": tna.presets.superlora(4, projection="shuffle"),
        "LoRTA M = 3, G = 2, r = 2": tna.presets.lorta(2, groups=[[0], [1]]),
        "SuperLoRA weighted CP, M = 3, T = 2, 2 × 3 × 4, r = 1": tna.Config(
            1, 3, groups=1, fold=(2, 3, 4), format="cp-weighted", terms=2
        ),
        "SuperLoRA Tucker, M = 3, 2 × 3 × 4, r = 1, –, 2": tna.Config(
            (1, None, 2), 3, groups=1, fold=(2, 3, 4), format="tucker"
        ),
        "SuperLoRA Hadamard, K = 2, balanced, r = 3": tna.Config(
            3, splits=2, groups=1, fold="balanced", combine="hadamard"
        ),
        "DoRA r = 4": tna.presets.dora(4),
        "SuperLoRA r = 2, magnitude by cols": tna.presets.superlora(2, apply="magnitude", magnitude_axis="cols"),
        "SuperLoRA K = 2, f = 4, same, G = weight, stack, r = 3": tna.presets.lokr(3, split_size=4, leading="same"),
    }  # fmt: skip
    for name, config in told.items():
        assert str(known_as(config)) == name


def test_a_method_keeps_its_name_when_a_file_of_peft_brings_its_fixed_numbers() -> None:
    brought, presets, maps = tna.sources.Given(shared=True), tna.presets, tna.maps
    vera = presets.vera(8).sources
    tied = {"offset": False, "parameters": 9}
    told = {
        "VeRA r = 8": presets.vera(8, sources={name: dataclasses.replace(vera[name], of=brought) for name in vera}),
        "RandLoRA r = 2": presets.randlora(
            2, rows=4, cols=6, sources={
                "term0.split0.factor0": tna.sources.Scaled(brought, rank=True, start=(0.5, 0.0)),
                "factor0": tna.sources.Scaled(tna.sources.Tied("term0.split0.factor0"), rank=True, start=(0.5, 0.0)),
                "factor1": brought,
            },
        ),
        "FourierFT n = 20": presets.fourierft(1).replace(projection=(maps.TorchScatter(20, seed=777), "dft2")),
        "WaveFT n = 20": presets.waveft(1).replace(projection=(maps.TorchScatter(20), maps.CenteredWavelet())),
        "WaveFT n = 20, db3": presets.waveft(1).replace(
            projection=(maps.TorchScatter(20), maps.CenteredWavelet("db3"))
        ),
        "SHiRA n = 20": presets.shira(1).replace(projection=maps.TorchScatter(20)),
        "Uni-LoRA p = 9, r = 4": presets.lora(4, before=maps.TiedElements(normalized=True), **tied),
        "KronA": presets.krona(rank=1),
        "dense": presets.dense(rank=1),
    }  # fmt: skip
    for name, config in told.items():
        assert str(known_as(config)) == name
    # Other settings than those of the methods keep a name of their own.
    others = [
        presets.vera(8, sources={"factor0": brought, "factor1": brought}),
        presets.vera(8, sources={**vera, "factor1": dataclasses.replace(vera["factor1"], of=tna.sources.Given())}),
        presets.lora(4, before=maps.TiedElements(), **tied),
    ]
    for config in others:
        assert known_as(config).family == "SuperLoRA"

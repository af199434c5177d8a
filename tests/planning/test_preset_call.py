"""``preset_call``: what is written is the config, in Python and on the command line."""

from __future__ import annotations

import inspect
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import installed
from tests.planning.internals import chosen_config
from tnadapt.planning import preset_call
from tnadapt.testing import configs

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
        if options is not None and installed("typer"):
            assert parsed(options) == row.config


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
        assert call.settings.keys() <= {"rank"}


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


def test_what_a_command_line_cannot_hold_has_no_options() -> None:
    call = preset_call(tna.presets.superlora(4, split_size=(2, 3), splits=2))
    assert call is not None
    assert call.options() is None
    assert call.attach() == "tna.torch.attach(model, 'lonkr', rank=4, splits=2, split_size=(2, 3))"


def test_a_plan_says_how_to_use_its_first_row() -> None:
    assert str(tna.plan(VIT, 1000)).splitlines()[-2:] == [
        "first row: tna.torch.attach(model, 'unilora', parameters=1000, rank=4)",
        "  or tnadapt finetune --preset unilora --set parameters=1000 --set rank=4",
    ]


def test_other_weights_than_queries_and_values_are_named() -> None:
    call = preset_call(tna.presets.lora(8))
    assert call is not None
    assert call.attach("all-linear") == "tna.torch.attach(model, 'lora', rank=8, targets='all-linear')"
    assert call.attach(["a.b", "c"]) == "tna.torch.attach(model, 'lora', rank=8, targets=['a.b', 'c'])"
    assert call.attach(["a.b"]) == "tna.torch.attach(model, 'lora', rank=8, targets=['a.b'])"
    assert call.attach("") == call.attach() == "tna.torch.attach(model, 'lora', rank=8)"
    assert call.options("") == call.options() == "--preset lora --set rank=8"
    assert call.options("conv") == "--preset lora --set rank=8 --targets conv"
    assert call.options(["a.b", "c|d"]) == "--preset lora --set rank=8 --targets a.b --targets 'c|d'"
    assert tna.plan(VIT, 1000).notes("all-linear")[-2].endswith(", targets='all-linear')")

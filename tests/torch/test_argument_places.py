"""Settings in the place of other arguments of attach(), and dropout that drops nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tnadapt.torch as tt  # noqa: E402
from tnadapt.errors import ConfigError, TargetError  # noqa: E402

THIRD = "the third argument is the targets, such as 'qv'; got "


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("lora", 8), TargetError, f"{THIRD}the number 8: settings are keywords, as in attach(model, 'lora', rank=8)"),
        ((None, 8), TargetError, f"{THIRD}the number 8: settings are keywords, as in attach(model, 'lora', rank=8)"),
        (
            ("lokr", {"rank": 8, "alpha": 2.0}),
            TargetError,
            f"{THIRD}{{'rank': 8, 'alpha': 2.0}}: settings are keywords, and a mapping of patterns to configs is the "
            "second argument: attach(model, 'lokr', rank=8, alpha=2.0)",
        ),
        (
            ("lora", {"qv": "lora"}),
            TargetError,
            f"{THIRD}{{'qv': 'lora'}}: settings are keywords, and a mapping of patterns to configs is the second "
            "argument: attach(model, {'qv': 'lora'})",
        ),
        (
            ({"rank": 8},),
            ConfigError,
            "a mapping has a config for each pattern of weights; got settings, {'rank': 8}: give them as keywords, "
            "with the name of a preset: attach(model, 'lora', rank=8)",
        ),
    ],
)
def test_settings_in_another_place(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    before = list(model.state_dict())
    with pytest.raises(error) as caught:
        tt.attach(model, *given)
    assert str(caught.value) == message
    assert list(model.state_dict()) == before


def test_a_module_that_has_the_name_of_a_setting_is_a_pattern() -> None:
    model = nn.ModuleDict({"rank": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    assert [target.module for target in tt.attach(model, {"rank": "lora"}).targets] == ["rank"]


def test_dropout_of_embeddings_alone_is_warned_of_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="drops nothing") as caught:
        tt.attach(model, "lora", "embeddings", dropout=0.5)
    assert [str(one.message) for one in caught] == [
        "dropout=0.5 drops nothing here: all targets are embeddings, whose inputs are indices. Leave it out, or adapt "
        "other weights as well"
    ]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.attach(model, "lora", "embeddings", "second")
        tt.attach(model, "lora", ["0", "1"], "third", dropout=0.5)
        model(torch.tensor([1, 2]))

"""Settings in the place of other arguments of attach(), dropout that drops nothing, and ranks that add nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.errors import ConfigError, TargetError

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


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (tna.presets.lora(9), 8),
        (tna.presets.dora(10_000), 8),
        (tna.presets.lokr(5), 4),  # both factors are 4 × 2 or smaller
        (tna.presets.superlora(13), 12),  # 8 * 16 elements, in a square
    ],
)
def test_a_rank_beyond_the_largest_useful_one_warns(config: tna.Config, most: int) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tt.attach(nn.Sequential(nn.Linear(16, 8)), config, "all-linear")
        tt.attach(nn.Sequential(nn.Linear(16, 8)), config.replace(rank=most), "all-linear")
    (warning,) = found
    assert str(warning.message) == (
        f"rank={config.rank} is beyond {most}, the largest useful rank for these weights: more parameters add nothing "
        f"to what their updates can be. Give rank={most} or less"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "config",
    [
        tna.presets.vera(1024),  # frozen factors: each further component is another direction
        tna.presets.unilora(5, rank=64),
        tna.Config(rank=(None, 64), format="tucker"),
        tna.presets.dense(),
        # The ranks between two modes are cut to what is possible.
        *(tna.Config(rank=rank, format="tt", groups="weight", fold="stack", order=2) for rank in (9, 12, 16, 100)),
    ],
)
def test_of_other_ranks_nothing_is_said(config: tna.Config) -> None:
    tt.attach(nn.Sequential(nn.Linear(16, 8)), config, "all-linear")


@pytest.mark.parametrize("preset", ["lora", "dora", "hira", "loha", "superlora"])
def test_of_a_rank_that_nobody_gave_nothing_is_said(preset: str) -> None:
    call = getattr(tna.presets, preset)
    changed = {"alpha": 3.0, "seed": 1}
    for cfg, settings in ((preset, {}), (preset, changed), (call(), {}), (call(**changed), {}), (None, {})):
        tt.attach(nn.Sequential(nn.Linear(3, 3)), cfg, "all-linear", **settings)
    for cfg, settings in ((preset, {"rank": 33}), (call(33), {})):
        with pytest.warns(UserWarning, match="rank=33 is beyond 3, the largest useful rank"):
            tt.attach(nn.Sequential(nn.Linear(3, 3)), cfg, "all-linear", **settings)

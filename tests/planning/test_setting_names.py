"""Common names of configs."""

from __future__ import annotations

import pytest
from hypothesis import given

import tnadapt as tna
from tnadapt.planning import known_as
from tnadapt.testing.strategies import plans
from tnadapt.testing.verification import examples

FAMILIES = {
    "dense": "dense", "lora": "LoRA", "lokr": "LoKr", "krona": "KronA", "loha": "LoHa", "lonkr": "LoNKr",
    "lotr": "LoTR", "lorta": "LoRTA", "fastfood": "fastfood", "superlora": "SuperLoRA + F", "fact_tt": "LoTR",
    "compacter": "Compacter", "shira": "SHiRA", "fourierft": "FourierFT", "loca": "LoCA", "waveft": "WaveFT",
    "c3a": "C3A", "miss": "MiSS", "lora_fa": "LoRA-FA", "lora_xs": "LoRA-XS", "nola": "NOLA", "randlora": "RandLoRA",
    "share_lora": "ShareLoRA", "svft": "SVFT", "tied_lora": "Tied-LoRA", "tinylora": "TinyLoRA", "unilora": "Uni-LoRA",
    "vera": "VeRA", "craft": "CRAFT", "quanta": "QuanTA", "dora": "DoRA", "hira": "HiRA",
    # What a mode of a fold means to a model is not in a config.
    "lorta_cp": "SuperLoRA", "fact_tk": "SuperLoRA", "cara": "SuperLoRA", "metatt": "SuperLoRA",
    "gralora": "SuperLoRA",
}  # fmt: skip


@pytest.mark.parametrize("name", examples())
def test_presets(name: str) -> None:
    assert known_as(examples()[name][0]).family == FAMILIES[name]


@given(plans())
def test_every_config_has_a_name(plan: tna.SuperLoRA) -> None:
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

"""What a conversion is asked for: names of forms, and a format alone."""

from __future__ import annotations

import pytest

import tnadapt as tna
from tnadapt import ConfigError
from tnadapt.convert import FORMS

from .conversions import made


def test_every_format_has_its_name_and_its_methods() -> None:
    named = {"peft", "lycoris", "kohya", "diffusers", "gguf", "vllm"}
    assert named <= set(FORMS)
    assert {f"{name}-lora" for name in named} <= set(FORMS)


@pytest.mark.parametrize(
    ("to", "meant"), [("khoya", "'kohya'"), ("peft_lora", "'peft-lora'"), ("gguf-lore", "'gguf-lora'")]
)
def test_a_name_that_is_nearly_one_is_suggested(to: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"to \(--to\) must be one of tnadapt, .*; got '{to}'; did you mean {meant}"):
        tna.convert(made(tna.presets.lora(2)), to=to)


def test_a_format_alone_takes_the_adapters_own_method_or_lora() -> None:
    for config, kind in (
        (tna.presets.lora(2), "lora"),
        (tna.presets.lokr(2), "lokr"),
        (tna.presets.loha(2), "loha"),
        (tna.presets.vera(rank=3), "lora"),
    ):
        for name in ("peft", "lycoris"):
            found = tna.convert(made(config), to=name)
            assert (found.kind, found.exact) == (f"{name}-{kind}", True)
    found = tna.convert(made(tna.presets.lokr(2)), to="diffusers", part="transformer", rank=2, max_error=1)
    assert found.kind == "diffusers-lora"

"""LoRA of embeddings, to PEFT and back, compared with PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import tnadapt.torch as tt

from .conversions import fill

IDS = torch.tensor([[3, 0, 11, 3], [7, 2, 3, 9]])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(12, 6)
        self.fc = torch.nn.Linear(6, 8)

    def forward(self, ids: Any) -> Any:
        return self.fc(self.embed(ids))


@pytest.mark.parametrize("to", ["peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full"])
def test_other_forms_have_no_embeddings(to: str) -> None:
    file = tna.AdapterFile(*_own(tna.presets.lora(2)))
    with pytest.raises(tna.ConfigError, match=r"'embed' is an embedding, and .* has no .* of such a layer: convert to"):
        tna.convert(file, to=to)


def test_what_cannot_be_written_is_named() -> None:
    for cfg in (tna.presets.dora(2), tna.presets.hira(2)):
        with pytest.raises(
            tna.ConfigError, match=r"'embed' is an embedding, and apply=.* of it is not written for PEFT"
        ):
            tna.convert(tna.AdapterFile(*_own(cfg)), to="peft-lora")
    file = tna.AdapterFile(*_own(tna.presets.lora(2), tied=("head.table",)))
    with pytest.raises(
        tna.ConfigError, match=r"embed\.weight .* updated together with head\.table, to which it is tied"
    ):
        tna.convert(file, to="peft-lora")


def _own(cfg: tna.Config, **settings: Any) -> tuple[tna.Config, list[tna.Target], dict[str, Any]]:
    plan = tna.SuperLoRA(cfg, [(12, 6)])
    plan = plan.with_base(lambda _: torch.randn(12, 6).numpy())
    return cfg, [tna.Target("embed", (12, 6), "embedding", **settings)], plan.init()


def test_settings_that_peft_would_misread(tmp_path: Path) -> None:
    """A Conv1D next to an embedding: PEFT's one setting is that of the Conv1D."""
    cfg = tna.presets.lora(2)
    plan = tna.SuperLoRA(cfg, [(12, 6), (8, 6)])
    targets = [tna.Target("embed", (12, 6), "embedding"), tna.Target("fc", (6, 8), transposed=True)]
    tna.convert(tna.AdapterFile(cfg, targets, plan.init()), tmp_path / "theirs", to="peft-lora")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again = tna.convert(tmp_path / "theirs").file
    assert [(target.stored, target.transposed) for target in again.targets] == [((12, 6), False), ((6, 8), True)]


def test_fan_in_fan_out_is_not_said_of_embeddings_and_convolutions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(12, 6), transformers.pytorch_utils.Conv1D(8, 6)
            self.conv = torch.nn.Conv1d(8, 8, 2)

        def forward(self, ids: Any) -> Any:
            return self.conv(self.fc(self.embed(ids)).mT)

    config = peft.LoraConfig(r=3, target_modules=["embed", "fc", "conv"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(Mixed(), config).eval()
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    base = {"embed": (12, 6), "fc": (6, 8), "conv": (8, 8, 2)}
    for known in (None, base):
        found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=known, overwrite=True)
        assert found.file is not None
        assert {target.module: target.transposed for target in found.file.targets} == {
            "embed": False, "fc": True, "conv": False,
        }  # fmt: skip
        model = Mixed()
        tt.load(model, tmp_path / "ours.safetensors")
        torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)

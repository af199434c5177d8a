"""Conversion from and to PEFT on a real model leaves its outputs the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna

from .conversions import fill

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


# What PEFT reads of transformers 5 is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def vit(folder: Path | None = None) -> Any:
    """A ViT, whose modules transformers renames on loading; with names and weights of a folder, if there is one."""
    if folder is not None:
        return transformers.ViTForImageClassification.from_pretrained(folder).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config)


def seen(model: Any) -> Any:
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()
    with torch.no_grad():
        return model(pixels).logits.double()


@pytest.mark.law("renamed-modules")
@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow),
        pytest.param(["fc1", "fc2"], marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_under_other_names_than_the_modules(targets: Any, tmp_path: Path) -> None:
    import tnadapt.torch
    from tnadapt.checkpoints.checkpoint import open_checkpoint

    base, merged = tmp_path / "base", tmp_path / "merged"
    vit().save_pretrained(base)
    theirs = peft.get_peft_model(
        vit(base), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
    )
    fill((p for p in theirs.parameters() if p.requires_grad), scale=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, plain = seen(theirs.eval()), seen(vit(base))

    def check(model: Any) -> None:
        assert torch.linalg.norm(seen(model) - expected) <= 1e-5 * torch.linalg.norm(expected - plain)

    assert tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=base).exact
    ours = vit(base)
    tnadapt.torch.load(ours, tmp_path / "ours.safetensors")
    check(ours)
    assert tna.convert(tmp_path / "ours.safetensors", tmp_path / "back", to="peft-lora", base=base).exact
    check(peft.PeftModel.from_pretrained(vit(base), tmp_path / "back").eval())
    report = tna.merge(base, tmp_path / "ours.safetensors", merged)
    assert report.names == "weights under the names that transformers gives them on disk"
    check(vit(merged))
    # Extraction finds the weights under the names of the checkpoints, and the file loads under those of the modules.
    stored = open_checkpoint(base).entries
    matrices = [
        name.removesuffix(".weight") for name, entry in stored.items() if ".layer." in name and len(entry.shape) > 1
    ]
    found = tna.extract(base, merged, "lora", matrices, rank=2, keep_trainable="classifier")
    assert (len(matrices), found.others) == (12, ())
    tna.save(tmp_path / "extracted.safetensors", found.file)
    again = vit(base)
    tnadapt.torch.load(again, tmp_path / "extracted.safetensors")
    check(again)

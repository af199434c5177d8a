"""Regression tests for errors found in a review."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import presets


def _file(config: tna.Config, targets: list[tna.Target], sizes: tuple[float, ...] = ()) -> tna.AdapterFile:
    plan = tna.SuperLoRA(config, [target.shape for target in targets])
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    for group, size in enumerate(sizes):
        arrays = {n: (a * np.float32(size) if n.startswith(f"group{group}.") else a) for n, a in arrays.items()}
    return tna.AdapterFile(config, targets, arrays)


def test_lora_on_an_attention_of_torch_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(16, 2)

    peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["attn"])).save_pretrained(tmp_path)
    with pytest.raises(tna.FileError, match=r"PEFT's LoRA on nn\.MultiheadAttention"):
        tna.convert(tmp_path)


def test_square_weights_stay_as_they_are_stored_beside_others(tmp_path: Path) -> None:
    square, plain = tna.Target("h.c_proj", (8, 8), transposed=True), tna.Target("h.fc", (6, 8))
    for targets in ([square, plain], [square, tna.Target("h.c_wide", (8, 24), transposed=True), plain]):
        file = _file(presets.lora(2), targets)
        theirs = tna.convert(file, tmp_path / "peft", to="peft-lora", overwrite=True)
        assert theirs.config is not None
        # PEFT's one word for all layers; what it sets for each of the others itself is recorded.
        assert theirs.config["fan_in_fan_out"] is False
        for base in (None, {target.module: target.stored for target in targets}):
            back = tna.convert(tmp_path / "peft", base=base).file
            assert back is not None
            assert {target.module: target.transposed for target in back.targets} == {
                target.module: target.transposed for target in targets
            }


def test_one_word_for_weights_of_two_kinds_is_not_believed_of_square_ones(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square, self.wide, self.head = conv(8, 8), conv(24, 8), torch.nn.Linear(8, 5)

    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["square", "wide", "head"]))
    model.save_pretrained(tmp_path)
    base = {"square": (8, 8), "wide": (8, 24), "head": (5, 8)}
    with pytest.raises(tna.FileError, match="unknown how the square 'square' is stored"):
        tna.convert(tmp_path, base=base)


def test_exact_is_so_of_every_weight() -> None:
    targets = [tna.Target("a.q", (24, 36)), tna.Target("b.q", (24, 36))]
    file = _file(presets.krona(), targets, (1.0, 1e-4))
    with pytest.raises(tna.ConfigError, match=r"that of b\.q\.weight by 0\.9"):
        tna.convert(file, to="lycoris-full", dtype="float16")
    found = tna.convert(file, to="lycoris-full", dtype="float16", max_error=0.01)
    assert not found.exact
    assert "b.q.weight" in str(found)


def test_lokr_of_a_rank_is_no_worse_than_lora_of_it() -> None:
    targets = [tna.Target(f"l.{layer}.q", (24, 36)) for layer in range(2)]
    file = _file(presets.superlora(3), targets)
    lora, lokr = (tna.convert(file, to=form, rank=2, max_error=1).error for form in ("peft-lora", "peft-lokr"))
    assert lokr <= lora + 1e-6


def test_alpha_may_be_an_integer(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {
        "lora_unet_q.lora_down.weight": rng.normal(size=(4, 6)).astype("f4"),
        "lora_unet_q.lora_up.weight": rng.normal(size=(5, 4)).astype("f4"),
        "lora_unet_q.alpha": np.array(2, np.int64),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    file = tna.convert(tmp_path / "kohya.safetensors", base=["q"]).file
    assert file is not None
    expected = 0.5 * tensors["lora_unet_q.lora_up.weight"] @ tensors["lora_unet_q.lora_down.weight"]
    np.testing.assert_allclose(file.deltas()[0], expected, rtol=1e-5)

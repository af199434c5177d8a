"""PEFT's trained rows of single tokens, and its LoRA of tied embeddings, compared with PEFT's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import tnadapt.torch as tt

from .conversions import fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

P = tna.presets
IDS = torch.tensor([[3, 0, 5, 3], [7, 2, 3, 5]])


def made(tie: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def saved_by_peft(folder: Path, model: Any, **settings: Any) -> Any:
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).eval()
    fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(folder, save_embedding_layers=False)
    return theirs


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("indices", [[5, 2], {"model.embed_tokens": [5, 2]}])
def test_trained_tokens_give_peft_s_outputs(indices: Any, tie: bool, tmp_path: Path) -> None:
    made(tie).save_pretrained(tmp_path / "base")
    theirs = saved_by_peft(tmp_path / "theirs", made(tie), target_modules=["q_proj"], trainable_token_indices=indices)
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=tmp_path / "base")
    assert found.exact
    model = made(tie)
    base = model(IDS).logits
    adapter = tt.load(model, tmp_path / "ours.safetensors", keep_tied=tie)
    assert [target.rows for target in adapter.targets] == [None, tna.RowIndices((2, 5))]
    assert not torch.allclose(model(IDS).logits, base, atol=1e-2)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_tokens_alone_in_half_precision_are_the_stored_rows(tmp_path: Path) -> None:
    made(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = made(dtype=torch.bfloat16)
    saved_by_peft(tmp_path / "theirs", model, target_modules=["q_proj"], trainable_token_indices=[7, 3, 39])
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = load_file(path)[name].bfloat16()
    save_file({name: rows}, path)
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=tmp_path / "base")
    assert found.parameters == (48, 48)
    ours = made(dtype=torch.bfloat16)
    tt.load(ours, tmp_path / "ours.safetensors").merge()
    assert torch.equal(ours.model.embed_tokens.weight[[7, 3, 39]], rows)


@pytest.mark.parametrize("tie", [False, True])
def test_the_method_for_tokens_alone(tie: bool, tmp_path: Path) -> None:
    made(tie).save_pretrained(tmp_path / "base")
    config = peft.TrainableTokensConfig(token_indices=[9, 5, 2], target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(made(tie), config).eval()
    fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=tmp_path / "base")
    assert (found.origin, found.exact, found.parameters) == ("peft-trainable_tokens", True, (96 if tie else 48, 48))
    model = made(tie)
    tt.load(model, tmp_path / "ours.safetensors", keep_tied=tie)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(tna.FileError, match="replace those of the base"):
        tna.convert(tmp_path / "theirs")


def test_tokens_that_do_not_fit_are_named(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "base")
    theirs = tmp_path / "theirs"
    saved_by_peft(theirs, made(), target_modules=["q_proj"], trainable_token_indices=[5, 2])
    with pytest.raises(
        tna.FileError, match=r"the rows of tokens of .* replace those of the base, .* give base= \(--base\), a"
    ):
        tna.convert(theirs)
    shapes = {name: tuple(module.weight.shape) for name, module in made().named_modules() if hasattr(module, "weight")}
    with pytest.raises(tna.FileError, match=r"the values of 'model.embed_tokens' are needed, and base has shapes"):
        tna.convert(theirs, base=shapes)
    settings = theirs / "adapter_config.json"
    text = settings.read_text()
    for wrong, match in (
        ('{"other": [5, 2]}', "have no list of different tokens for 'model.embed_tokens'"),
        ("[5, 5]", "have no list of different tokens"),
        ("[1, 2, 3]", r"has rows of shape \(2, 16\) for 3 tokens"),
        ("[1, 400]", r"row 400 of a floating-point matrix is wanted: this is another model"),
    ):
        before, _, after = text.partition('"trainable_token_indices": ')
        settings.write_text(f'{before}"trainable_token_indices": {wrong}{after[after.index("]") + 1 :]}')
        with pytest.raises(tna.FileError, match=match):
            tna.convert(theirs, base=tmp_path / "base")


def test_trained_rows_are_written_as_lora_of_their_number(tmp_path: Path) -> None:
    model = made()
    adapter = tt.attach(model, P.dense(), tt.token_targets(model, [5, 2, 7]))
    fill(adapter.parameters())
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    assert found.config is not None
    assert found.config["r"] == 3
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path / "theirs").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


# -- Tied embeddings ---------------------------------------------------------------------------------------------


def test_peft_s_update_of_a_tied_embedding_is_one(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path / "theirs", made(True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert [target.tied for target in found.file.targets] == [("lm_head.weight",)]
    model = made(True)
    tt.load(model, tmp_path / "ours.safetensors", keep_tied=True)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [None, [2, 5]])
def test_a_tied_embedding_is_written_for_both_modules(rows: list[int] | None, tmp_path: Path) -> None:
    model = made(True)
    targets = "embeddings" if rows is None else tt.token_targets(model, rows)
    adapter = tt.attach(model, P.lora(3, alpha=5) if rows is None else P.dense(), targets, keep_tied=True)
    fill(adapter.parameters())
    adapter.save(tmp_path / "ours.safetensors")
    assert str(adapter.summary().export).endswith("and only PEFT has one LoRA of both, so merge it for others)")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    theirs = peft.PeftModel.from_pretrained(made(True), tmp_path / "theirs").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    again = tna.convert(tmp_path / "theirs").file
    assert [(one.name, one.tied) for one in again.targets] == [("model.embed_tokens.weight", ("lm_head.weight",))]
    with pytest.raises(tna.ConfigError, match=r"updated together with lm_head.weight, to which it is tied, and vLLM"):
        tna.convert(tmp_path / "ours.safetensors", to="vllm")


def test_equal_factors_of_other_layers_stay_apart() -> None:
    cfg = P.lora(2)
    plan = tna.SuperLoRA(cfg, [(12, 6), (12, 6)])
    arrays = plan.init()
    for name in arrays:
        arrays[name] = np.ones_like(arrays[name])
    targets = [tna.Target("embed", (12, 6), "embedding"), tna.Target("fc", (12, 6))]
    found = tna.convert(tna.AdapterFile(cfg, targets, arrays), to="peft-lora")
    assert found.config is not None
    assert "ensure_weight_tying" not in found.config
    assert found.parameters[0] == found.parameters[1]

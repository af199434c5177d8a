"""Rows of some tokens: trained alone, in the embedding and in a tied head, as PEFT trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file
from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .small import stir

IDS = torch.tensor([[3, 0, 11, 9], [7, 9, 3, 5]])


def llama(tie: bool = True) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_key_value_heads=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        vocab_size=50, tie_word_embeddings=tie, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("strategy", ["auto", "weight"])
@pytest.mark.parametrize(
    "cfg", [P.dense(), P.lora(1), P.superlora(1), P.dora(1)], ids=["dense", "lora", "super", "dora"]
)
def test_only_these_rows_change(cfg: tna.Config, strategy: str) -> None:
    model = nn.Sequential(nn.Embedding(12, 6))
    base = model(IDS)
    adapter = tt.attach(model, cfg, tt.token_targets(model, [9, 5, 9]), strategy=strategy)
    assert torch.equal(model(IDS), base)
    stir(adapter, 0.3)
    found = model(IDS)
    hit = (IDS == 5) | (IDS == 9)
    assert torch.equal(found[~hit], base[~hit])
    assert not torch.isclose(found[hit], base[hit]).any(-1).all()
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    before = model[0].weight.detach().clone()
    adapter.merge()
    torch.testing.assert_close(model(IDS), found.detach(), rtol=1e-5, atol=1e-6)
    others = [row for row in range(12) if row not in (5, 9)]
    assert torch.equal(model[0].weight[others], before[others])
    adapter.unmerge()
    assert torch.equal(model[0].weight, before)


def test_a_tied_head_has_them_too(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(tna.TargetError, match=r"are one tensor \(tied weights\).*keep_tied=True.*untie=True"):
        tt.attach(model, P.dense(), tt.token_targets(model, [9, 5]))
    adapter = tt.attach(model, P.dense(), tt.token_targets(model, [9, 5]), keep_tied=True)
    assert adapter.num_parameters == 2 * 16
    stir(adapter, 0.3)
    found = model(IDS).logits
    plain = llama()
    with torch.no_grad():
        plain.model.embed_tokens.weight[[5, 9]] += adapter.deltas()[0]
    torch.testing.assert_close(found, plain(IDS).logits, rtol=1e-5, atol=1e-5)
    adapter.save(tmp_path / "a.safetensors")
    fresh = llama()
    tt.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(IDS).logits, found)
    llama().save_pretrained(tmp_path / "base")
    tna.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    adapter.merge()
    assert torch.equal(merged, model.model.embed_tokens.weight)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_dense_preset_is_peft_s_trainable_tokens() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    theirs = peft.get_peft_model(llama(), config)
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(rows)
    model = llama()
    adapter = tt.attach(model, P.dense(), tt.token_targets(model, [5, 9]), keep_tied=True)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_((rows - model.model.embed_tokens.weight[[5, 9]]).view(parameter.shape))
    y, expected = model(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    (ours,) = adapter.parameters()
    (other,) = [p for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    torch.testing.assert_close(ours.grad.view(2, 16), other.grad, rtol=1e-4, atol=1e-5)


def test_other_targets_and_a_list_of_rows_of_a_layer() -> None:
    model = llama(tie=False)
    targets = [*tt.find_targets(model, "qv"), *tt.token_targets(model, [5], "model.embed_tokens")]
    adapter = tt.attach(model, P.lora(1), targets)
    assert [target.role for target in adapter.targets] == ["q", "v", "embedding"]
    head = tt.attach(
        model, P.lora(1), [tna.Target("lm_head", (50, 16), rows=tna.RowIndices((0, 3, 49)))], "head"
    )  # fmt: skip
    assert head.strategy == ("additive",)


def test_rows_of_a_batch_have_their_own_rows_of_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12))
    x, expected = torch.randn(3, 4, 6), []
    targets = [tna.Target("0", (12, 6), rows=tna.RowIndices((1, 5, 11)))]
    for name in ("a", "b"):
        stir(tt.attach(model, P.lora(1), targets, name, strategy="factored" if name == "a" else "additive"), 0.3)
    for row, name in zip(x, ("a", "b", None), strict=True):
        tt.mix(model, {} if name is None else {name: 1.0})
        expected.append(model(row))
    tt.mix(model, {"a": 1.0, "b": 1.0})
    with tt.rows(model, ["a", "b", None]):
        torch.testing.assert_close(model(x), torch.stack(expected))
        with torch.no_grad():
            torch.testing.assert_close(model(x), torch.stack(expected))


def test_adapters_of_other_tokens_are_swapped_only_for_each_other(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(12, 6))
    tt.attach(model, P.dense(), tt.token_targets(model, [1, 2])).save(tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Embedding(12, 6))
    adapter = tt.attach(other, P.dense(), tt.token_targets(other, [1, 3]))
    with pytest.raises(tna.FileError, match="its list of targets differs"):
        adapter.swap(tmp_path / "a.safetensors")


def test_tokens_of_a_larger_vocabulary_are_refused_with_its_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(14, 6))
    tt.attach(model, P.dense(), tt.token_targets(model, [12, 13])).save(tmp_path / "a.safetensors")
    with pytest.raises(tna.FileError) as caught:
        tt.load(nn.Sequential(nn.Embedding(12, 6)), tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: this Sequential does not have its weights: 0.weight is stored as (12, 6), and "
        "was stored as (14, 6) when it was trained: call resize_token_embeddings() as before training"
    )


@pytest.mark.parametrize(
    ("tokens", "settings", "why"),
    [
        ([], {}, "at least one index of a vocabulary; got none"),
        (5, {}, "must be indices of a vocabulary; got 5"),
        (["a"], {}, "a token must be an integer; got 'a'"),
        ([-1], {}, "a token must be from 0"),
        ([3, 12], {"module": "0"}, r"token 12 is not among the 12 of 0\.weight: resize the embedding first"),
        ([3], {"module": "1"}, "'1' is not an embedding of Sequential; it has 0, 2"),
        ([3], {}, r"which embedding of Sequential has the tokens is unclear; it has 0, 2: give module='path'"),
    ],
)
def test_wrong_tokens_are_refused(tokens: Any, settings: Any, why: str) -> None:
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 6), nn.Embedding(5, 3))
    with pytest.raises(tna.TargetError, match=why):
        tt.token_targets(model, tokens, **settings)


def test_the_model_tells_which_embedding_has_the_tokens() -> None:
    class Model(nn.Sequential):
        def get_input_embeddings(self) -> nn.Module:
            return self[1]

    (target,) = tt.token_targets(Model(nn.Embedding(12, 6), nn.Embedding(5, 3)), [3])
    assert target.name == "1.weight"


def test_an_embedding_is_extracted_from_checkpoints_for_a_tied_model(tmp_path: Path) -> None:
    base, tuned = llama(), llama()
    with torch.no_grad():
        tuned.model.embed_tokens.weight += torch.outer(torch.arange(50.0), torch.arange(16.0)) / 100
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", P.lora(1), "embeddings")
    tna.save(tmp_path / "a.safetensors", found.file)
    model = llama()
    adapter = tt.load(model, tmp_path / "a.safetensors", keep_tied=True)
    assert (adapter.targets[0].role, adapter.targets[0].tied) == ("embedding", ("lm_head.weight",))
    torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits, rtol=1e-3, atol=1e-3)

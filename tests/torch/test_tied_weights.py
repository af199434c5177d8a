"""Tied weights: one update that acts in all modules that hold the tensor, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .life import assert_near, by_formula, passes
from .small import stir

IDS = torch.tensor([[3, 0, 11, 3], [7, 2, 3, 9]])
CONFIGS = {"lora": P.lora(2), "dense": P.dense(), "superlora": P.superlora(2), "dora": P.dora(2), "hira": P.hira(2)}


class Tied(nn.Module):
    def __init__(self, tie: bool = True, third: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=True)
        if tie:
            self.head.weight = self.embed.weight
        if third:
            self.other = nn.Linear(6, 12, bias=False)
            self.other.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


def changed(adapter: tt.Adapter, model: Tied) -> Tensor:
    """The output of a model whose one tensor is the changed weight in float64."""
    arrays = {name: array.detach().double() for name, array in adapter.arrays().items()}
    (weight,) = adapter.plan.merged(arrays, [model.embed.weight.detach().double()])
    plain = Tied().double()
    with torch.no_grad():
        plain.embed.weight.copy_(weight)
        return plain(IDS)


@pytest.mark.law("tied-weights")
@pytest.mark.parametrize("strategy", ["auto", "weight"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", [["embed"], ["head"], ["head", "embed"]])
def test_one_update_acts_in_both(name: str, targets: list[str], strategy: str, tmp_path: Path) -> None:
    model = Tied()
    base = model(IDS)
    adapter = tt.attach(model, CONFIGS[name], targets, keep_tied=True, strategy=strategy)
    (target,) = adapter.targets
    assert (target.name, target.tied, len(adapter.strategy)) == ("embed.weight", ("head.weight",), 1)
    assert torch.equal(model(IDS), base)
    stir(adapter, 0.3)
    y = model(IDS)
    torch.testing.assert_close(y.double(), changed(adapter, model), rtol=1e-5, atol=1e-5)
    adapter.save(tmp_path / "a.safetensors")
    fresh = Tied()
    loaded = tt.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(IDS), y, rtol=1e-5, atol=1e-6)
    adapter.merge()
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), y, rtol=1e-5, atol=1e-6)
    adapter.unmerge()
    adapter.detach()
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(IDS), base)
    loaded.bake()
    assert fresh.head.weight is fresh.embed.weight
    torch.testing.assert_close(fresh(IDS), y, rtol=1e-5, atol=1e-6)


def test_gradients_come_from_both() -> None:
    model = Tied().double()
    adapter = tt.attach(model, P.lora(2), ["embed"], keep_tied=True, dtype=torch.float64)
    stir(adapter, 0.3)
    assert_near(passes(model, adapter, IDS), by_formula(adapter, Tied().double(), IDS), 1e-10)


def test_the_errors_name_the_ways(tmp_path: Path) -> None:
    tied = tmp_path / "tied.safetensors"
    tt.attach(Tied(), P.lora(2), ["embed"], keep_tied=True).save(tied)
    kept = tmp_path / "kept.safetensors"
    tt.attach(Tied(third=True), targets=["inner"], keep_trainable=["embed"]).save(kept)
    given = tt.attach(Tied(), P.lora(2, start="given"), ["head"], keep_tied=True)
    ways = r"are one tensor.*: give keep_tied=True, .*, or untie=True, which"
    both = "untie=True gives tied weights their own copies, and keep_tied=True"
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: tt.attach(Tied(), P.lora(2), ["embed"]), tna.TargetError, ways),
        (lambda: tt.attach(Tied(), P.lora(2), ["head"]), tna.TargetError, ways),
        (lambda: tt.attach(Tied(), P.lora(2), "embeddings"), tna.TargetError, ways),
        (lambda: tt.attach(Tied(), {"head": "lora", "inner": P.lokr(1)}), tna.TargetError, "keep_tied=True"),
        (lambda: tt.extract(Tied(), Tied(), P.lora(1), ["embed"]), tna.TargetError, "keep_tied=True"),
        (lambda: tt.attach(Tied(), P.lora(2), ["embed"], untie=True, keep_tied=True), tna.TargetError, both),
        (
            lambda: tt.load(Tied(tie=False), tied), tna.TnadaptError,
            r"together with head\.weight, as one tensor, and in this Tied it is not",
        ),
        (
            lambda: tt.load(Tied(third=True), tied), tna.TnadaptError,
            r"in this Tied it is tied to head\.weight, other\.weight: tie the",
        ),
        (
            lambda: tt.load(Tied(), kept), tna.FileError,
            r"keeps embed\.weight, which is tied to head\.weight, other\.weight, and in this Tied it is tied to "
            r"head\.weight: tie the weights of the model as they were",
        ),
        (lambda: tt.load(Tied(tie=False), kept), tna.FileError, "and in this Tied it is not: tie the weights"),
        (
            lambda: tt.starts.eva(given, [IDS]), tna.ConfigError,
            r"embed\.weight is tied to head\.weight: leave it out of the targets",
        ),
    ]  # fmt: skip
    for call, error, text in calls:
        with pytest.raises(error, match=text):
            call()


def test_keep_tied_of_a_mapping_of_a_kept_head_and_where_nothing_is_tied() -> None:
    adapter = tt.attach(Tied(), {"head": P.lora(1), "inner": P.lokr(1)}, keep_tied=True)
    assert [(target.name, target.tied) for target in adapter.targets] == [
        ("embed.weight", ("head.weight",)), ("inner.weight", ()),
    ]  # fmt: skip
    model = Tied(tie=False)
    assert tt.find_targets(model, ["embed", "head"], keep_tied=True) == tt.find_targets(model, ["embed", "head"])
    given = [tna.Target("embed", (12, 6))]  # not of the role that it would be found with
    assert tt.find_targets(model, given, keep_tied=True) == given
    assert tt.find_targets(Tied(), ["inner"], keep_tied=True)[0].tied == ()
    for name in ("embed.weight", "head.weight"):
        assert tt.attach(Tied(), targets=["inner"], keep_trainable=name).kept == ("embed.weight",)


def test_three_modules_share_one_update() -> None:
    model = Tied(third=True)
    adapter = tt.attach(model, P.lora(2), ["head"], keep_tied=True)
    assert adapter.targets[0].tied == ("head.weight", "other.weight")
    assert adapter.targets[0].role == "embedding"
    stir(adapter, 0.3)
    x = torch.randn(3, 6)
    expected = x @ (model.embed.weight + adapter.deltas()[0]).T
    torch.testing.assert_close(model.other(x), expected, rtol=1e-5, atol=1e-5)
    assert all(name in str(adapter.summary()) for name in ("embed.weight", "factored"))
    assert "embed.weight is tied to head.weight, other.weight, and only PEFT has one LoRA of both" in str(
        adapter.summary()
    )


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_kept_parameter_is_swapped_under_any_of_its_names(kept: str, tmp_path: Path) -> None:
    names, config, targets = {"embed.weight", "head.weight"}, P.lora(2), [tna.Target("inner", (6, 6))]
    arrays = tna.UpdatePlan(config, [(6, 6)]).init()
    for name, ties in (("one", names - {kept}), ("alone", ())):
        file = tna.AdapterFile(config, targets, arrays, kept={kept: np.ones((12, 6), "f4")}, ties={kept: tuple(ties)})
        tna.save(tmp_path / f"{name}.safetensors", file)
    model = Tied()
    adapter = tt.load(model, tmp_path / "one.safetensors")
    with torch.no_grad():
        model.embed.weight.zero_()
    adapter.swap(tmp_path / "one.safetensors")
    assert (model.head.weight == 1).all()
    with pytest.raises(tna.FileError, match=rf"it has {kept} of that module alone"):
        adapter.swap(tmp_path / "alone.safetensors")


def test_a_file_that_does_not_say_so_can_be_loaded_into_a_tied_model(tmp_path: Path) -> None:
    single = Tied(tie=False)
    adapter = tt.attach(single, P.lora(2), ["embed"])
    stir(adapter, 0.3)
    adapter.save(tmp_path / "a.safetensors")
    model = Tied()
    with pytest.raises(tna.TargetError, match=r"keep_tied=True"):
        tt.load(model, tmp_path / "a.safetensors")
    loaded = tt.load(model, tmp_path / "a.safetensors", keep_tied=True)
    torch.testing.assert_close(model(IDS).double(), changed(loaded, model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("embed",), ("head",), ("embed", "head"), ("model.embed",), ("model.head",)])
def test_a_checkpoint_is_merged_under_any_name_that_it_has(names: tuple[str, ...], tmp_path: Path) -> None:
    model = Tied()
    adapter = tt.attach(model, P.lora(2), ["embed"], keep_tied=True)
    stir(adapter, 0.3)
    adapter.save(tmp_path / "a.safetensors")
    weight = model.embed.weight.detach()
    save_file({f"{name}.weight": weight.clone() for name in names}, tmp_path / "base.safetensors")
    tna.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    adapter.merge()
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {f"{name}.weight" for name in names}
    for tensor in found.values():
        assert torch.equal(tensor, model.embed.weight)


@pytest.mark.law("tied-weights")
@pytest.mark.parametrize("read", [tt.load, tt.from_pretrained])
def test_an_untied_adapter_is_loaded_untied_and_tied_again_when_it_goes(read: Any, tmp_path: Path) -> None:
    """By default tied weights stay tied and another base is rejected, also by a folder."""
    model = Tied()
    base = model(IDS)
    adapter = tt.attach(model, targets=["head", "inner"], untie=True)
    stir(adapter)
    adapter.save_pretrained(tmp_path)
    path = tmp_path / "adapter.safetensors" if read is tt.load else tmp_path
    fresh, other = Tied(), Tied()
    with torch.no_grad():
        other.inner.weight.add_(1.0)
    with pytest.raises(
        tna.FileError, match=r"are one tensor .* it has head\.weight of that module alone: .*untie=True"
    ):
        read(fresh, path)
    with pytest.raises(tna.FileError, match="another base model"):
        read(other, path, untie=True)
    assert not tt.adapters(fresh)
    read(other, path, untie=True, check_base=False)
    loaded = read(fresh, path, untie=True)
    assert fresh.head.weight is not fresh.embed.weight
    assert torch.equal(fresh(IDS), model(IDS))
    loaded.detach()
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh(IDS), base)
    attached = model(IDS)
    adapter.bake()
    assert model.head.weight is not model.embed.weight
    assert torch.allclose(model(IDS), attached, atol=1e-5)


# -- Rows of some tokens, as PEFT trains them -------------------------------------------------------


TOKENS = torch.tensor([[3, 0, 11, 9], [7, 9, 3, 5]])


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
    base = model(TOKENS)
    adapter = tt.attach(model, cfg, tt.token_targets(model, [9, 5, 9]), strategy=strategy)
    assert torch.equal(model(TOKENS), base)
    stir(adapter, 0.3)
    found = model(TOKENS)
    hit = (TOKENS == 5) | (TOKENS == 9)
    assert torch.equal(found[~hit], base[~hit])
    assert not torch.isclose(found[hit], base[hit]).any(-1).all()
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    before = model[0].weight.detach().clone()
    adapter.merge()
    torch.testing.assert_close(model(TOKENS), found.detach(), rtol=1e-5, atol=1e-6)
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
    found = model(TOKENS).logits
    plain = llama()
    with torch.no_grad():
        plain.model.embed_tokens.weight[[5, 9]] += adapter.deltas()[0]
    torch.testing.assert_close(found, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)
    adapter.save(tmp_path / "a.safetensors")
    fresh = llama()
    tt.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(TOKENS).logits, found)
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
    y, expected = model(TOKENS).logits, theirs(TOKENS).logits
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    (ours,) = adapter.parameters()
    (other,) = [p for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    torch.testing.assert_close(ours.grad.view(2, 16), other.grad, rtol=1e-4, atol=1e-5)


def test_other_tokens_and_those_of_a_larger_vocabulary_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", nn.Sequential(nn.Embedding(14, 6))
    tt.attach(model, P.dense(), tt.token_targets(model, [12, 13])).save(path)
    adapter = tt.attach(model, P.dense(), tt.token_targets(model, [1, 3]), "other")
    with pytest.raises(tna.FileError, match="its list of targets differs"):
        adapter.swap(path)
    with pytest.raises(tna.FileError) as caught:
        tt.load(nn.Sequential(nn.Embedding(12, 6)), path)
    assert str(caught.value) == (
        f"{path}: this Sequential does not have its weights: 0.weight is stored as (12, 6), and was stored as (14, 6) "
        "when it was trained"
    )


@pytest.mark.parametrize(
    ("tokens", "settings", "why"),
    [
        ([], {}, "at least one index of a vocabulary; got none"),
        (5, {}, "must be indices of a vocabulary; got 5"),
        (["a"], {}, "a token must be an integer; got 'a'"),
        ([-1], {}, "a token must be at least 0"),
        ([3, 12], {"module": "0"}, r"token 12 is not among the 12 of 0\.weight: resize the embedding first"),
        ([3], {"module": "1"}, "'1' is no embedding: this Sequential has 0, 2; give one as"),
        ([3], {}, "which embedding has the tokens is unclear: this Sequential has 0, 2; give one as module='path'"),
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


def test_the_change_of_a_tied_weight_is_extracted_from_checkpoints_and_from_models(tmp_path: Path) -> None:
    base, tuned, model = llama(), llama(), llama()
    with torch.no_grad():
        tuned.model.embed_tokens.weight += torch.outer(torch.arange(50.0), torch.arange(16.0)) / 100
    for name, saved in (("base", base), ("tuned", tuned)):
        saved.save_pretrained(tmp_path / name)
    extracted = tna.extract(tmp_path / "base", tmp_path / "tuned", P.lora(1), "embeddings")
    tna.save(tmp_path / "a.safetensors", extracted.file)
    adapter = tt.load(model, tmp_path / "a.safetensors", keep_tied=True)
    assert (adapter.targets[0].role, adapter.targets[0].tied) == ("embedding", ("lm_head.weight",))
    # No warning of other parameters.
    assert tt.extract(base, tuned, P.lora(1), ["embed_tokens"], keep_tied=True).report.error < 1e-5
    assert tt.extract(llama(), tuned, {"lm_head": P.lora(1)}, keep_tied=True).report.error < 1e-5
    for changed_model in (model, base):
        torch.testing.assert_close(changed_model(TOKENS).logits, tuned(TOKENS).logits, rtol=1e-4, atol=1e-4)

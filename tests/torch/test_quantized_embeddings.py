"""Quantized embeddings of each library: looked up with updates, trained, saved, loaded, merged, and the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .quantized_models import (
    EMBEDDINGS,
    KINDS,
    OUT,
    SIZE,
    embedding,
    equal,
    library,
    numbers,
    quantized_type,
    tensors_in,
)
from .small import stir

# The libraries' own calls of torch.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Deprecation. TorchAODType:UserWarning"
)
IDS = torch.tensor([[0, 3, 3, 7], [OUT - 1, 1, 0, 2]])
kinds = pytest.mark.parametrize("kind", EMBEDDINGS)


def moved(adapter: Any, size: float = 0.3) -> Any:
    stir(adapter, size, 1)
    return adapter


def stored(made: Any) -> dict[str, Any]:
    """Return copies of what stores the weight: bitsandbytes' embeddings have no state dict."""
    kind = quantized_type(made)
    assert kind is not None
    found = {}
    for name, value in kind.state(made).items():
        found.update(tensors_in(name, value))
        for part in ("SCB", "absmax"):
            held = getattr(value, part, getattr(getattr(value, "quant_state", None), part, None))
            if isinstance(held, Tensor):
                found[f"{name}.{part}"] = held
    return {name: value.detach().clone() for name, value in found.items()}


@kinds
@pytest.mark.parametrize("strategy", ["factored", "additive"])
def test_rows_of_the_update_are_added(kind: str, strategy: str) -> None:
    model = nn.Sequential(embedding(kind))
    base = numbers(model[0])
    assert torch.equal(base, model[0](torch.arange(OUT)))
    # Dropout leaves indices alone.
    with pytest.warns(UserWarning, match="drops nothing"):
        adapter = moved(tt.attach(model, P.lora(2), "embeddings", strategy=strategy, dropout=0.5))
    assert (adapter.strategy, adapter.targets[0].shape) == ((strategy,), (OUT, SIZE))
    for mode in (True, False):
        y = model.train(mode)(IDS)
        torch.testing.assert_close(y, (base + adapter.deltas()[0])[IDS], rtol=1e-5, atol=1e-5)
    with pytest.raises(tna.TargetError, match="all-linear"):
        tt.find_targets(model, "all-linear")


@kinds
def test_trained_saved_loaded_merged_and_the_same_bytes(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(embedding(kind), nn.Linear(SIZE, 4))
    torch.nn.init.ones_(model[1].weight)
    before = stored(model[0])
    adapter = tt.attach(model, P.lora(4), "embeddings")
    start = (model(torch.arange(OUT)) - 1.0).square().mean()
    optimizer = torch.optim.Adam(adapter.parameters(), 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.arange(OUT)) - 1.0).square().mean().backward()
        optimizer.step()
    assert (model(torch.arange(OUT)) - 1.0).square().mean() < 0.5 * start
    assert equal(stored(model[0]), before)
    adapter.save(tmp_path / "a.safetensors")
    trained = model[0](IDS).detach()

    again = nn.Sequential(embedding(kind), model[1])
    second = tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again[0](IDS), trained)
    base, update = numbers(again[0]).double(), second.deltas()[0].detach().double()
    second.merge()
    assert second.merge_report is not None
    (row,) = second.merge_report
    off = numbers(again[0]).double() - base - update
    assert row.update_error == pytest.approx(float(off.norm() / update.norm()), rel=1e-4)
    assert row.update_error < (0.25 if "8" in kind else 1.0)
    assert torch.equal(again[0](IDS), numbers(again[0])[IDS])
    assert not equal(stored(again[0]), before)
    second.unmerge()
    assert equal(stored(again[0]), before)
    assert torch.equal(again[0](IDS), trained)


@kinds
def test_rows_of_a_few_tokens(kind: str) -> None:
    model = nn.Sequential(embedding(kind))
    base = model(IDS)
    adapter = moved(tt.attach(model, P.dense(), tt.token_targets(model, [3, 7])))
    changed = (model(IDS) != base).any(-1)
    assert torch.equal(changed, (IDS == 3) | (IDS == 7))
    before = stored(model[0])
    adapter.merge()
    # The other rows have the same codes: they are kept, or rounded again to the same, but for a scale's last bits.
    others = numbers(model[0])[IDS[~changed]]
    exact = "torchao" in kind and "float8" not in kind
    torch.testing.assert_close(others, base[~changed], rtol=0.0 if exact else 1e-6, atol=0.0)
    adapter.unmerge()
    assert equal(stored(model[0]), before)


def test_other_layers_of_a_model_with_a_quantized_embedding_are_adapted(tmp_path: Path) -> None:
    # bitsandbytes' embeddings refuse to be in a state dict.
    model = nn.Sequential(embedding("bitsandbytes nf4 embedding"), nn.Linear(SIZE, 4), nn.LayerNorm(4))
    adapter = moved(tt.attach(model, P.lora(2), "all-linear", keep_trainable=["2"]))
    assert [target.name for target in adapter.targets] == ["1.weight"]
    adapter.save(tmp_path / "a.safetensors")
    again = nn.Sequential(embedding("bitsandbytes nf4 embedding"), nn.Linear(SIZE, 4), nn.LayerNorm(4))
    again[1].load_state_dict({name: value for name, value in model[1].state_dict().items() if "tnadapt" not in name})
    tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(IDS), model(IDS))


def test_what_is_no_sum_and_no_lookup_is_refused() -> None:
    model = nn.Sequential(embedding("torchao int8 embedding"))
    with pytest.raises(tna.ConfigError, match=r"apply='magnitude' of 0\.weight does more than add rows .* quantized"):
        tt.attach(model, P.dora(2), "embeddings")
    with pytest.raises(tna.ConfigError, match=r"strategy='weight' cannot add to 0\.weight, which is quantized"):
        tt.attach(model, P.lora(2), "embeddings", strategy="weight")

    class Normed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.normalize(super().forward(ids), dim=-1)

    other = nn.Sequential(Normed(OUT, SIZE))
    other[0].weight = model[0].weight
    with pytest.raises(
        tna.TargetError, match=r"a quantized embedding, Normed, whose forward .* tnadapt\.torch\.register_quantized"
    ):
        tt.attach(other, P.lora(2), "embeddings")


def test_a_scaled_embedding_scales_the_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 8.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    model = nn.Sequential(Scaled(OUT, SIZE))
    model[0].weight = embedding("torchao int8 embedding").weight
    base = numbers(model[0])
    adapter = moved(tt.attach(model, P.lora(2), "embeddings"))
    torch.testing.assert_close(model(IDS), 8.0 * (base + adapter.deltas()[0])[IDS], rtol=1e-5, atol=1e-4)


@pytest.mark.slow  # transformers is imported
def test_gguf_layers_that_permute_their_input() -> None:
    model = nn.Sequential(KINDS["gguf q8_0"].quantize(library(KINDS["gguf q8_0"].library), nn.Linear(SIZE, OUT)))
    model[0].input_permutation = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    x = torch.randn(16, SIZE, requires_grad=True)
    weight = numbers(model[0])
    torch.testing.assert_close(model(x), x @ weight.T + model[0].bias, rtol=1e-4, atol=1e-4)
    before = model[0].weight.clone()
    adapter = moved(tt.attach(model, P.lora(2), "all-linear"), 0.1)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    changed = weight + adapter.deltas()[0].detach()
    torch.testing.assert_close(gradient, changed.sum(0).expand(16, -1), rtol=1e-4, atol=1e-4)
    adapter.merge()
    assert adapter.merge_report is not None
    assert adapter.merge_report.update_error < 0.1
    torch.testing.assert_close(numbers(model[0]), changed, rtol=0.0, atol=0.02)
    adapter.unmerge()
    assert torch.equal(model[0].weight, before)


@pytest.mark.slow
def test_a_merge_into_blocks_that_gguf_cannot_make_is_refused() -> None:
    own, gguf = library(KINDS["gguf q8_0"].library), library("gguf")
    model = nn.Sequential(own.GgufLinear(256, OUT, int(gguf.GGMLQuantizationType.Q4_K)))
    model[0].weight.data = torch.zeros_like(model[0].weight)
    adapter = tt.attach(model, P.lora(2), "all-linear")
    with pytest.raises(tna.TargetError, match=r"0\.weight is quantized: the package gguf cannot quantize to Q4_K"):
        adapter.merge()

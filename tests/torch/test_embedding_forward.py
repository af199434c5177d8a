"""Updates of embeddings: rows looked up next to the weight's, in every strategy, with the gradients of the formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .life import by_formula
from .small import stir

CONFIGS = {
    "lora": P.lora(2, alpha=4),
    "pissa": P.lora(2, start="pissa"),
    "lokr": P.lokr(2),
    "dense": P.dense(),
    "superlora": P.superlora(2),
    "loha": P.loha(2),
}
IDS = torch.tensor([[3, 0, 11, 3], [7, 2, 3, 9]])


class Scaled(nn.Embedding):
    """As in Gemma."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class Normed(nn.Embedding):
    """A forward that is not just a lookup."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) / self.weight.norm()


def embedding(cls: type[nn.Embedding] = nn.Embedding, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(cls(12, 6, **settings))


@pytest.mark.parametrize("strategy", ["auto", "weight", "additive", "factored"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_strategy_is_the_formula(name: str, strategy: str) -> None:
    """Of a lookup that is scaled, and has padding; ``test_forward_laws.py`` has the plain ones."""
    model, cfg = embedding(Scaled, padding_idx=0), CONFIGS[name]
    base, large = model(IDS), name in ("dense", "superlora")
    if strategy == "factored" and large:
        with pytest.raises(tna.ConfigError, match=r"looks up rows of a factor.*0\.weight has"):
            tt.attach(model, cfg, "embeddings", strategy=strategy)
        return
    adapter = tt.attach(model, cfg, "embeddings", strategy=strategy)
    assert adapter.strategy == (strategy if strategy != "auto" else "additive" if large else "factored",)
    assert torch.equal(model(IDS), base)
    stir(adapter, 0.3)
    adapter.set_weight(0.5)
    expected = by_formula(adapter, embedding(Scaled, padding_idx=0).double(), IDS)
    found = model(IDS)
    torch.testing.assert_close(found.double(), expected["output"], rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for array, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected[array], rtol=1e-4, atol=1e-4)
    assert model(IDS[:, :0]).shape == (2, 0, 6)
    adapter.merge()
    torch.testing.assert_close(model(IDS), found.detach(), rtol=1e-5, atol=1e-6)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_rounded_once_as_the_sum_is(dtype: torch.dtype) -> None:
    model = embedding(Scaled).to(dtype)
    found = []
    for strategy in ("weight", "additive"):
        adapter = tt.attach(model, P.dense(), "embeddings", strategy=strategy)
        stir(adapter, 0.3)
        found.append(model(IDS).detach())
        adapter.detach()
    assert found[0].dtype == dtype
    assert torch.equal(*found)


def test_only_the_batch_s_rows_are_computed() -> None:
    model = nn.Sequential(nn.Embedding(100_000, 64))
    adapter = tt.attach(model, P.lora(2), "embeddings")
    stir(adapter)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        model(IDS)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # The left factor itself is 100,000 × 2; the sum would have 6.4 million elements.
    assert largest <= 4 * 100_000 * 2


def test_a_quantized_embedding_is_refused() -> None:
    class Packed(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(12, 6)
            self.weight = nn.Parameter(torch.zeros(12, 6, dtype=torch.int8), requires_grad=False)
            self.in_features, self.out_features = 6, 12

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).float()

    with pytest.raises(tna.TargetError, match=r"0\.weight belongs to a quantized embedding, Packed, whose"):
        tt.attach(nn.Sequential(Packed()), P.lora(2), ["0"])


def test_lookups_are_recognized_by_their_source() -> None:
    for cls in (nn.Embedding, Scaled):
        assert tt.attach(embedding(cls), P.lora(2), "embeddings").strategy == ("factored",)
    for cls in (nn.Embedding, Normed):
        settings = {"scale_grad_by_freq": True} if cls is nn.Embedding else {}
        model = embedding(cls, **settings)
        adapter = tt.attach(model, P.lora(2), "embeddings")
        assert adapter.strategy == ("weight",)
        stir(adapter, 0.3)
        y = by_formula(adapter, embedding(cls, **settings).double(), IDS)["output"]
        torch.testing.assert_close(model(IDS).double(), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(tna.ConfigError, match=r"looks up rows of ΔW, and apply='magnitude' of 0\.weight does more"):
        tt.attach(embedding(), P.dora(2), "embeddings", strategy="factored")
    assert tt.attach(embedding(), P.dora(2), "embeddings").strategy == ("weight",)


@pytest.mark.parametrize(("library", "name"), [("gemma3", "Gemma3Text"), ("bart", "Bart")])
def test_models_of_transformers_scale_their_embeddings_in_a_known_way(library: str, name: str) -> None:
    modeling = pytest.importorskip(f"transformers.models.{library}.modeling_{library}")
    model = nn.Sequential(getattr(modeling, f"{name}ScaledWordEmbedding")(12, 6, 0, embed_scale=2.0))
    assert tt.attach(model, P.lora(2), "embeddings").strategy == ("factored",)


def test_a_copied_and_a_compiled_model_look_up_the_same() -> None:
    model = embedding(padding_idx=3)
    adapter = tt.attach(model, P.lora(2), "embeddings")
    stir(adapter, 0.3)
    expected = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(IDS), expected, rtol=1e-6, atol=1e-6)


def test_embeddings_are_a_word_and_a_role(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 6), nn.Embedding(5, 3))
    found = tt.find_targets(model, "embeddings")
    assert [(target.name, target.role) for target in found] == [("0.weight", "embedding"), ("2.weight", "embedding")]
    assert [target.role for target in tt.find_targets(model, ["0", "1"])] == ["embedding", "linear"]
    assert [t.name for t in tt.find_targets(model, "embeddings", exclude=["2"])] == ["0.weight"]
    with pytest.raises(tna.TargetError, match=r"no target in Sequential for 'embeddings'"):
        tt.find_targets(nn.Sequential(nn.Linear(2, 2)), "embeddings")
    adapter = tt.attach(model[:1], P.lora(2), "embeddings")
    stir(adapter, 0.3)
    adapter.save(tmp_path / "a.safetensors")
    fresh = embedding()
    model[0].weight.data.copy_(fresh[0].weight)
    tt.load(fresh, tmp_path / "a.safetensors", check_base=False)
    assert torch.equal(fresh(IDS), model[:1](IDS))

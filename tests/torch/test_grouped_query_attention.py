"""Methods that share factors among weights on grouped-query attention, whose queries and values differ in shape."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth

BY_ROLE: dict[str, tna.Config] = {
    "lotr": P.lotr(2, groups="role"),
    "lotr, train": P.lotr(2, train=True, groups="role"),
    "fact_tt": P.fact_tt(2, groups="role"),
    "fact_tk": P.fact_tk(2, groups="role"),
    "cara": P.cara(2, head_size=16, groups="role"),
    "lorta_cp": P.lorta_cp(2, head_size=16, groups="role"),
    "metatt": P.metatt(2, groups="role"),
    "metatt, heads": P.metatt(2, head_size=16, groups="role"),
    "superlora": P.superlora(2, groups="role", projection="linear", ratio=0.5),
}


def llama() -> Any:
    """A Llama of three layers: queries are 64×32, values 16×32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def trained(config: tna.Config) -> tuple[Any, tt.Adapter]:
    model = llama()
    adapter = tt.attach(model, config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) / 8)
    return model, adapter


def run(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state


@pytest.mark.law("fresh-is-zero", "first-gradients", "file-round-trip", "fold-shape")
@pytest.mark.parametrize("name", BY_ROLE)
def test_from_the_first_step_to_a_merged_model(name: str, tmp_path: Path) -> None:
    model = llama()
    adapter = tt.attach(model, BY_ROLE[name])
    assert torch.equal(run(model), run(llama()))
    assert [target.shape for target in adapter.targets] == [(64, 32), (16, 32)] * 3
    assert adapter.plan.num_groups == 2
    summary = adapter.summary()
    assert [row.slices[0][0] for row in summary.rows] == [0, 1] * 3
    if name == "superlora":
        assert summary.lora_rank is None
        assert str(summary).endswith("merge only: its updates may have matrix rank 32")
    else:
        assert summary.lora_rank == 2
        assert [row.rank for row in summary.rows] == [2] * 6
        assert str(summary).endswith("exports exactly as LoRA of rank 2 (padded to 8 for vLLM)")
    model(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state.square().sum().backward()
    for group in range(2):
        assert any(p.grad.any() for n, p in adapter.named_parameters() if f"group{group}" in n)

    model, adapter = trained(BY_ROLE[name])
    on, path, fresh = run(model), tmp_path / "adapter.safetensors", llama()
    assert not torch.allclose(on, run(fresh))
    adapter.save(path)
    assert tt.load(fresh, path).config == BY_ROLE[name]
    assert torch.equal(run(fresh), on)
    if summary.lora_rank is not None:
        found = tna.convert(path, to="peft-lora")
        assert found.exact
        assert found.config is not None
        assert (found.config["r"], found.config["rank_pattern"]) == (2, {})
    adapter.merge()
    assert torch.allclose(run(model), on, atol=1e-5)


def test_groups_by_role_are_fitted_to_a_tuned_model(tmp_path: Path) -> None:
    config = P.lotr(2, groups="role")
    _, adapter = trained(config)
    tuned = llama()
    with torch.no_grad():
        for target, delta in zip(adapter.targets, adapter.deltas(), strict=True):
            tuned.get_submodule(target.module).weight.add_(delta)
    result = tt.extract(llama(), tuned, config)
    assert result.report.error < 1e-4
    llama().save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", config)
    assert found.report.error < 1e-4
    for mine, theirs in zip(found.file.deltas(), adapter.deltas(), strict=True):
        assert np.allclose(mine, theirs.detach().numpy(), atol=1e-4)


def test_a_summary_says_why_there_is_no_lora() -> None:
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    line = str(tt.attach(torch.nn.ModuleDict({"attn": attention}), P.lora(2)).summary()).rpartition("\n")[2]
    assert line == "merge only: attn.in_proj_weight is not the weight of a layer"
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapter = tt.attach(model, P.lora(2), targets="all-linear", activation="relu")
    line = str(adapter.summary()).rpartition("\n")[2]
    assert line == "neither LoRA nor merged: an activation acts between its factors"
    assert adapter.summary().lora_rank is None


def test_rows_of_one_fused_weight_export_with_the_sum_of_their_ranks(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=100)
    adapter = tt.attach(transformers.GPT2LMHeadModel(config), P.lora(3))
    assert adapter.summary().lora_rank == 6
    adapter.save(tmp_path / "a.safetensors")
    found = tna.convert(tmp_path / "a.safetensors", to="peft-lora")
    assert found.config is not None
    assert (found.exact, found.config["r"]) == (True, 6)


class Layers(torch.nn.Module):
    """Queries of 64×32 and values of 16×32, which a compiler traces whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = torch.nn.ModuleList(torch.nn.Linear(32, 64) for _ in range(2))
        self.v = torch.nn.ModuleList(torch.nn.Linear(32, 16) for _ in range(2))

    def forward(self, x: Any) -> Any:
        return sum(q(x)[..., :16] + v(x) for q, v in zip(self.q, self.v, strict=True))


@pytest.mark.parametrize(
    ("name", "strategy"),
    in_depth(
        itertools.product(["lotr", "metatt", "metatt, heads", "gralora"], ["weight", "factored"]),
        [("metatt", "weight"), ("metatt, heads", "factored"), ("gralora", "factored")],
    ),
)
def test_a_compiler_traces_slices_in_any_order_of_axes(name: str, strategy: str) -> None:
    model = Layers()
    targets = [tna.Target(f"{r}.{i}", (rows, 32), r) for i in range(2) for r, rows in (("q", 64), ("v", 16))]
    adapter = tt.attach(model, {**BY_ROLE, "gralora": P.gralora(4, 2)}[name], targets, strategy=strategy)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    x = torch.randn(3, 32)
    found = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert torch.allclose(found, model(x), atol=1e-5)

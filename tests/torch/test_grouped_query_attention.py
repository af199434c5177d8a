"""Methods that share factors among weights on grouped-query attention, whose queries and values differ in shape."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth

from . import life
from .small import stir

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


class Layers(nn.Module):
    """Three layers with queries of 64×32 and values of 16×32, which a compiler traces whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.ModuleList(nn.Linear(32, 64) for _ in range(3))
        self.v_proj = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(q(x)[..., :16] + v(x) for q, v in zip(self.q_proj, self.v_proj, strict=True))


TARGETS = [
    tna.Target(f"{role}_proj.{layer}", (rows, 32), role, layer=str(layer))
    for layer in range(3)
    for role, rows in (("q", 64), ("v", 16))
]
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.law("fresh-is-zero", "first-gradients", "file-round-trip", "fold-shape")
@pytest.mark.parametrize("name", BY_ROLE)
def test_from_the_first_step_to_a_merged_model(name: str, tmp_path: Path) -> None:
    life.check_life(Layers, lambda model: tt.attach(model, BY_ROLE[name], TARGETS), X, tmp_path)
    model = Layers()
    adapter = tt.attach(model, BY_ROLE[name], TARGETS)
    assert adapter.plan.num_groups == 2
    model(X).square().sum().backward()
    for group in range(2):
        assert any(p.grad.any() for n, p in adapter.named_parameters() if f"group{group}" in n)
    summary = adapter.summary()
    assert [row.slices[0][0] for row in summary.rows] == [0, 1] * 3
    if name == "superlora":
        assert summary.export.rank is None
        assert str(summary).endswith("merge only: its updates may have matrix rank 32")
        return
    assert summary.export.rank == 2
    assert [row.rank for row in summary.rows] == [2] * 6
    assert str(summary).endswith("exports exactly as LoRA of rank 2 (padded to 8 for vLLM)")
    exported = tna.convert(tmp_path / "adapter.safetensors", to="peft-lora")
    assert exported.exact
    assert exported.config is not None
    assert (exported.config["r"], exported.config["rank_pattern"]) == (2, {})


def test_groups_by_role_are_fitted_to_a_tuned_model(tmp_path: Path) -> None:
    config = P.lotr(2, groups="role")
    base, tuned = Layers(), Layers()
    adapter = tt.attach(tuned, config, TARGETS)
    stir(adapter, 0.3)
    expected = [delta.detach().numpy() for delta in adapter.deltas()]
    tuned = adapter.bake()
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    assert tt.extract(copy.deepcopy(base), tuned, config, TARGETS).report.error < 1e-4
    found = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", config, TARGETS)
    assert found.report.error < 1e-4
    for ours, theirs in zip(found.file.deltas(), expected, strict=True):
        assert np.allclose(ours, theirs, atol=1e-4)


def test_an_activation_between_the_factors_is_no_lora() -> None:
    summary = tt.attach(nn.Sequential(nn.Linear(8, 8)), P.lora(2), "all-linear", activation="relu").summary()
    assert str(summary).endswith("\nneither LoRA nor merged: an activation acts between its factors")
    assert summary.export.rank is None


def test_rows_of_one_fused_weight_export_with_the_sum_of_their_ranks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=100)
    adapter = tt.attach(transformers.GPT2LMHeadModel(config), P.lora(3))
    assert adapter.summary().export.rank == 6
    adapter.save(tmp_path / "a.safetensors")
    exported = tna.convert(tmp_path / "a.safetensors", to="peft-lora")
    assert exported.config is not None
    assert (exported.exact, exported.config["r"]) == (True, 6)


@pytest.mark.parametrize(
    ("name", "strategy"),
    in_depth(
        itertools.product(["lotr", "metatt", "metatt, heads", "gralora"], ["weight", "factored"]),
        [("metatt, heads", "weight"), ("gralora", "factored")],
    ),
)
def test_a_compiler_traces_slices_in_any_order_of_axes(name: str, strategy: str) -> None:
    model = Layers()
    stir(tt.attach(model, {**BY_ROLE, "gralora": P.gralora(4, 2)}[name], TARGETS, strategy=strategy), 0.3)
    found = torch.compile(model, fullgraph=True, backend="eager")(X)
    assert torch.allclose(found, model(X), atol=1e-5)

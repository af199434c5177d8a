"""Adapters whose parameters are in training units: files, arrays and other adapters have the arrays themselves."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

import tnadapt as tna
from tnadapt import presets
from tnadapt.torch import attach, load

CONFIGS = {
    "lora": presets.lora(4),
    "alpha": presets.lora(4, alpha=6.0),
    "superlora": presets.superlora(4, projection="linear", ratio=0.1),
    "nonlinear": presets.superlora(4, projection="nonlinear"),
    "lokr": presets.lokr(2),
    "dense": presets.dense(),
    "vera": presets.vera(4),
    "tied": presets.tied_lora(2),
    "theta": presets.unilora(20),
    "tinylora": presets.tinylora(5),
    "magnitude": presets.dora(2),
    "factor": presets.hira(2),
    "pissa": presets.lora(2, start="pissa"),
    "given": presets.lora(2, start="given"),
}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))


def loss_of(model: nn.Sequential) -> Tensor:
    x = torch.linspace(-1.0, 1.0, 60, dtype=model[0].weight.dtype).view(5, 12)
    return model(x).square().sum()


def trained(model: nn.Sequential, groups: object, steps: int = 4) -> nn.Sequential:
    optimizer = torch.optim.Adam(groups, 1e-2, eps=1e-30)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


@pytest.mark.law("training-units")
@pytest.mark.parametrize("name", CONFIGS)
def test_adam_in_units_is_adam_with_a_rate_for_each_array(name: str) -> None:
    model, other = base().double(), base().double()
    adapter = attach(model, CONFIGS[name], "all-linear", dtype=torch.float64)
    alike = attach(other, CONFIGS[name].replace(rate="sgd"), "all-linear", dtype=torch.float64)
    assert max(adapter.plan.units.values()) > 1.0
    assert set(alike.plan.units.values()) == {1.0}
    trained(model, adapter.parameters())
    trained(other, alike.adam_groups(1e-2))
    for array, own in alike.arrays().items():
        torch.testing.assert_close(adapter.arrays()[array], own, rtol=1e-7, atol=1e-10)


@pytest.mark.law("training-units")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_have_the_arrays(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, CONFIGS[name], "all-linear", dtype=dtype)
    trained(model, adapter.parameters())
    adapter.save(tmp_path / "a.safetensors")
    file = tna.load(tmp_path / "a.safetensors")
    assert file.config.rate == "adam"
    arrays = adapter.arrays()
    for array, own in file.arrays.items():
        assert torch.equal(torch.from_numpy(own), arrays[array].detach().float())
    # What the file's plan computes is what the adapter does.
    for one, delta in zip(adapter.deltas(), adapter.plan.deltas(arrays), strict=True):
        assert torch.equal(one, delta)
    again = base()
    loaded = load(again, tmp_path / "a.safetensors", dtype=dtype)
    for (_, one), (_, other) in zip(adapter.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loss_of(again), loss_of(model))


@pytest.mark.law("copies")
@pytest.mark.parametrize("name", CONFIGS)
def test_arrays_reset_swap_and_copies(name: str, tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, CONFIGS[name], "all-linear")
    fresh = {array: parameter.detach().clone() for array, parameter in adapter.named_parameters()}
    trained(model, adapter.parameters())
    copies, output = (copy.deepcopy(model), pickle.loads(pickle.dumps(model))), loss_of(model)
    adapter.save(tmp_path / "a.safetensors")
    arrays = {array: own.detach().clone() for array, own in adapter.arrays().items()}
    adapter.reset()
    for array, parameter in adapter.named_parameters():
        assert torch.equal(parameter, fresh[array])
    adapter.load_arrays(arrays)
    assert torch.equal(loss_of(model), output)
    adapter.reset()
    adapter.swap(tmp_path / "a.safetensors")
    # The same also after another step, from the same gradients.
    for _ in range(2):
        for one in copies:
            assert torch.equal(loss_of(one), loss_of(model))
        for one in (model, *copies):
            trained(one, [parameter for parameter in one.parameters() if parameter.requires_grad], 1)


def test_start_from_takes_arrays_and_groups_have_one_rate() -> None:
    adapter = attach(base(), presets.lora(1, start="given"), "all-linear")
    start = torch.full((12, 1), 0.25)
    adapter.start_from({"group0.split0.factor0": start})
    assert torch.equal(adapter.arrays()["group0.split0.factor0"], start)
    assert not any(delta.any() for delta in adapter.deltas())
    (group,) = adapter.adam_groups(2e-3)
    assert group["lr"] == 2e-3
    assert len(group["params"]) == len(list(adapter.parameters()))


def test_a_file_of_the_other_rate_can_be_swapped_in(tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, presets.lora(2, rate="sgd"), "all-linear")
    trained(model, adapter.adam_groups(1e-2))
    adapter.save(tmp_path / "a.safetensors")
    assert tna.load(tmp_path / "a.safetensors").config.rate == "sgd"
    other = base()
    attach(other, presets.lora(2), "all-linear").swap(tmp_path / "a.safetensors")
    assert torch.equal(loss_of(other), loss_of(model))

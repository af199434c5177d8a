"""Torch models with adapters whose maps have settings, are chains, or work on each weight."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .small import batch, small, stir

CONFIGS = {
    "shira": P.shira(9),
    "fourierft": P.fourierft(9),
    "loca, own draws": P.loca(9, shared=False),
    "waveft": P.waveft(9, family="db2"),
    "c3a, one group": P.c3a(8, groups=1),
    "miss": P.miss(3),
    "low rank, dct2": P.lora(2, projection="dct2", on="weight"),
    "chain": P.superlora(2, projection=["sign-gather", "linear"], ratio=0.3),
    "nonlinear, per weight": P.superlora(2, projection=["gather", "nonlinear"], ratio=0.5, on="weight"),
}


@pytest.mark.law("merge-is-attached")
@pytest.mark.parametrize("name", CONFIGS)
def test_trained_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    model = small()
    adapter = tt.attach(model, CONFIGS[name])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch()), torch.tensor([0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(batch())
        adapter.save(tmp_path / "adapter.safetensors")
        other = small()
        tt.load(other, tmp_path / "adapter.safetensors")
        assert torch.equal(other(batch()), trained)
        adapter.merge()
        torch.testing.assert_close(model(batch()), trained, rtol=1e-4, atol=1e-5)
        adapter.unmerge()
        assert torch.equal(model(batch()), trained)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_plan(name: str) -> None:
    """The graph of a group's update, which takes the adjoint of F, against autograd through F."""
    model = small().double()
    adapter = tt.attach(model, CONFIGS[name])
    stir(adapter)
    weights = [torch.randn(target.shape, dtype=torch.float64) for target in adapter.targets]
    arrays = {key: value.detach().clone().requires_grad_() for key, value in adapter.named_parameters()}
    through = sum((d * w).sum() for d, w in zip(adapter.plan.training_plan.deltas(arrays), weights, strict=True))
    expected = torch.autograd.grad(through, list(arrays.values()))
    ours = sum((d * w).sum() for d, w in zip(adapter.deltas(), weights, strict=True))
    found = torch.autograd.grad(ours, [value for _, value in adapter.named_parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_is_eager(name: str) -> None:
    plan = tna.SuperLoRA(CONFIGS[name], [(16, 16), (8, 16), (16, 16)])
    params = {key: torch.randn(shape, requires_grad=True) for key, shape in plan.param_shapes.items()}
    torch.compiler.reset()
    program = torch.compile(lambda given: plan.vector(given), backend="aot_eager", fullgraph=True)
    found, expected = program(params), plan.vector(params)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(found.square().sum(), list(params.values()))
    for one, other in zip(ours, torch.autograd.grad(expected.square().sum(), list(params.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)

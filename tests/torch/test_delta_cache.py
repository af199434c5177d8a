"""Cached updates are reused exactly while the arrays behind them are unchanged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.torch._delta import DeltaCache

from .small import batch, compiles_whole, small, stir
from .test_delta import moved

P = tna.presets


class Reused:
    """A cache with a record of whether it returns the same object as before."""

    def __init__(self, config: tna.Config, shapes: list[tuple[int, int]]) -> None:
        self.plan = tna.SuperLoRA(config, shapes)
        self.arrays, self.updates = moved(self.plan), DeltaCache(self.plan)

    def get(self, index: int = 0) -> torch.Tensor:
        found = self.updates.get(lambda names: [self.arrays[name] for name in names], index)
        arrays = {name: array.detach() for name, array in self.arrays.items()}
        assert torch.allclose(found, self.plan.delta(arrays, index), rtol=1e-12, atol=1e-14)
        return found


SHARED = P.superlora(2, projection="linear", ratio=0.5)  # all updates are computed at once


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("config", [P.superlora(2), SHARED], ids=["alone", "at once"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_update_is_cached_while_its_arrays_are_equal(config: tna.Config, mode: Callable[[], Any]) -> None:
    case = Reused(config, [(8, 8), (8, 8)])
    name = next(iter(case.arrays))
    with mode():
        first = case.get()
        assert case.get() is first
        assert case.get(1) is case.get(1)
        case.arrays[name].data.copy_(case.arrays[name].data * 2)  # no version counter sees this
        second = case.get()
        assert second is not first
        assert case.get() is second
        case.arrays[name].detach().numpy()[0] = 7.0
        assert case.get() is not second
        case.arrays[name] = case.arrays[name].detach().clone()
        case.get()
        case.arrays[name] = case.arrays[name].float().double().to(torch.float64)
        case.get()


@pytest.mark.law("array-changes")
def test_an_update_with_a_graph_is_cached_while_its_leaves_are_the_same() -> None:
    case = Reused(SHARED, [(8, 8), (8, 8)])
    name = next(iter(case.arrays))
    first = case.get()
    assert case.get() is first
    assert first.requires_grad
    with torch.no_grad():
        assert not case.get().requires_grad
    assert case.get() is first
    case.arrays[name] = case.arrays[name].detach().clone().requires_grad_()
    second = case.get()
    assert second is not first  # equal, but gradients must go to the new leaf
    second.sum().backward()
    assert case.arrays[name].grad is not None
    case.arrays[name].data.add_(1.0)
    third = case.get()
    assert third is not second
    with torch.no_grad():
        case.arrays[name].add_(1.0)
    assert case.get() is not third
    for array in case.arrays.values():
        array.requires_grad_(False)
    assert not case.get().requires_grad


@pytest.mark.parametrize("config", [P.superlora(2), SHARED], ids=["alone", "at once"])
def test_cached_updates_are_dropped_when_a_pass_with_gradients_begins(config: tna.Config) -> None:
    case = Reused(config, [(8, 8), (8, 8)])
    with torch.no_grad():
        kept = weakref.ref(case.get())
        case.updates.begin()
        assert kept() is not None
        case.updates.end()
        assert case.get() is kept()
    case.updates.begin()
    gc.collect()
    assert kept() is None


@pytest.mark.slow
@compiles_whole
def test_a_compiled_program_computes_the_updates_of_its_layers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    stir(tt.attach(model, SHARED, "all-linear", strategy="weight"))
    x = torch.randn(2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_only_the_arrays_of_a_weight_decide_about_its_update() -> None:
    case = Reused(P.lora(2), [(8, 8), (8, 8)])
    with torch.no_grad():
        first, second = case.get(0), case.get(1)
        case.arrays["group1.split0.factor0"].data.mul_(2.0)
        assert case.get(0) is first
        assert case.get(1) is not second


def test_averaged_weights_swapped_in_by_data_are_seen() -> None:
    model = small()
    adapter = tt.attach(model)
    with torch.no_grad():
        before = model(batch())
        for parameter in adapter.parameters():
            parameter.data.add_(0.05)
        assert not torch.equal(model(batch()), before)
    stir(adapter)

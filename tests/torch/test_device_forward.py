"""Forward and backward passes on an accelerator: nothing waits for the device, and captured graphs compute updates."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.torch import _delta

from .pretended_device import PretendedDevice
from .small import batch, compiles_whole, small, stir

F = {"projection": "linear", "ratio": 0.5}
CONFIGS = {
    "lora": P.lora(2), "lokr": P.lokr(2), "superlora": P.superlora(2), "superlora with F": P.superlora(2, **F),
    "lorta": P.lorta(2), "dense": P.dense(), "fastfood": P.fastfood(0.1), "compacter": P.compacter(2),
    "dora": P.dora(2), "hira": P.hira(2), "unilora": P.unilora(40, 2), "fourierft": P.fourierft(5),
    "dct2": P.superlora(2, projection="dct2", on="weight"), "c3a": P.c3a(8),
}  # fmt: skip


def passes(model: Any) -> list[Any]:
    """Return outputs without gradients, twice, and gradients."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            found.append(model(batch()).clone())
    model.zero_grad()
    model(batch()).square().sum().backward()
    return found + [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_pass_waits_for_the_device(name: str) -> None:
    model = small()
    stir(tt.attach(model, CONFIGS[name]))
    expected = passes(copy.deepcopy(model))
    with PretendedDevice():
        passes(model)  # draws are copied to the device in the first pass
        found = passes(model)
    for ours, host in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, host, rtol=1e-4, atol=1e-6)


def test_a_write_between_passes_is_seen() -> None:
    model = small()
    adapter = tt.attach(model, CONFIGS["superlora with F"])
    stir(adapter)
    with PretendedDevice(), torch.no_grad():
        before = model(batch())
        assert torch.allclose(model(batch()), before, rtol=0, atol=0)
        for parameter in adapter.parameters():
            parameter.mul_(2.0)
        found = model(batch())
    with torch.no_grad():
        torch.testing.assert_close(found, copy.deepcopy(model)(batch()))


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("name", ["superlora with F", "unilora", "nola"])
@pytest.mark.parametrize("evaluated", ["after forward", "after backward", "after step", "after zeroing"])
@pytest.mark.parametrize("hooked", [True, False])
def test_a_step_of_a_fused_optimizer_is_seen(name: str, evaluated: str, hooked: bool) -> None:
    """Such a step changes no version counter; nor does a call of a part of the model tell that a pass begins."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), torch.randn(2, 8)
    adapter = tt.attach(model, {"nola": P.nola(3, 2)}.get(name) or CONFIGS[name], "all-linear")
    stir(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)

    def outputs(model: Any = model) -> Any:
        return model(x) if hooked else model[1](model[0](x))

    def evaluate(when: str) -> None:
        if when == evaluated:
            with torch.no_grad():
                outputs()

    for _ in range(2):
        with PretendedDevice():
            loss = outputs().square().mean()
            evaluate("after forward")
            loss.backward()
            evaluate("after backward")
        optimizer.step()
        with PretendedDevice():
            evaluate("after step")
        optimizer.zero_grad()
        with PretendedDevice():
            evaluate("after zeroing")
            found = outputs()
            with torch.no_grad():
                without = outputs()
        expected = outputs(copy.deepcopy(model)).detach()
        torch.testing.assert_close(found.detach(), expected)
        torch.testing.assert_close(without, expected)


@compiles_whole
@pytest.mark.parametrize("name", ["superlora with F", "unilora"])
def test_a_step_of_a_compiled_program_is_seen(name: str) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), torch.randn(2, 8)
    adapter = tt.attach(model, CONFIGS[name], "all-linear", strategy="weight")
    stir(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        with PretendedDevice(), torch.no_grad():
            found = model(x)
        torch.testing.assert_close(found, copy.deepcopy(model)(x).detach())
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch._dynamo.reset()


def test_an_update_is_computed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    adapter = tt.attach(model, CONFIGS["superlora with F"])
    stir(adapter)
    counts: list[int] = []
    forward = type(adapter.plan.groups[0].projection.map).forward
    monkeypatch.setattr(
        type(adapter.plan.groups[0].projection.map), "forward", lambda *args: counts.append(1) or forward(*args)
    )

    def computed() -> int:
        counts.clear()
        model(batch())
        return len(counts)

    groups = len(adapter.plan.groups)
    with PretendedDevice():
        with torch.no_grad():
            assert (computed(), computed()) == (groups, 0)
        assert (computed(), computed()) == (groups, groups)
        model(batch()).sum().backward()
        with torch.no_grad():
            assert (computed(), computed()) == (groups, groups)  # an optimizer could take a step in between
            model.zero_grad()
            assert (computed(), computed()) == (groups, 0)
            adapter.clear_cache()
            assert (computed(), computed()) == (groups, 0)
            monkeypatch.setattr(_delta, "is_captured", lambda: True)
            assert (computed(), computed()) == (groups, groups)  # each graph contains the computation


@compiles_whole
def test_a_compiled_program_reads_the_mixing_weight_on_its_device() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).to("meta")
    adapter = tt.attach(model, P.superlora(2), "all-linear", strategy="weight")
    devices: set[str] = set()

    def backend(graph: Any, inputs: list[Any]) -> Any:
        devices.update(x.device.type for x in inputs if isinstance(x, torch.Tensor))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(torch.ones(2, 8, device="meta"))
    assert devices == {"meta"}  # a scalar on the CPU keeps the compiler from CUDA graphs
    adapter.set_weight(0.5)
    torch._dynamo.reset()

"""What trains is what was chosen: groups, factors, learning rates, a nonlinearity between the factors."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tnadapt.torch  # noqa: E402
from tnadapt import presets  # noqa: E402
from tnadapt.errors import ConfigError  # noqa: E402
from tnadapt.torch import Adapter, attach  # noqa: E402

from .distributed_jobs import Block  # noqa: E402
from .loops import batch, loss_of, make, move  # noqa: E402


def moved(model: nn.Module, adapter: Adapter, groups: list[dict[str, Any]] | None = None) -> dict[str, float]:
    """How far one step of gradient descent takes every array; the base must stay."""
    own = {id(p) for _, p in adapter.named_parameters()}
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    base = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in own}
    optimizer = torch.optim.SGD(groups or adapter.parameters(), lr=0.1)
    loss_of(model, batch().to(next(model.parameters()).dtype)).backward()
    optimizer.step()
    model.zero_grad()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    return {name: float((p.detach() - before[name]).norm()) for name, p in adapter.named_parameters()}


def test_groups_one_after_another() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(True), Block(False))
    adapter = attach(model, presets.superlora(2, groups=3))
    move(adapter)
    for group in range(3):
        adapter.set_trainable(groups=group)
        for name, distance in moved(model, adapter).items():
            assert (distance > 0) == name.startswith(f"group{group}."), name
    adapter.set_trainable()
    assert all(distance > 0 for distance in moved(model, adapter).values())


def test_one_optimizer_for_groups_one_after_another() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(True), Block(False))
    adapter = attach(model, presets.superlora(2, groups=2))
    move(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0)
    for group in range(2):
        adapter.set_trainable(groups=[group])
        before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        loss_of(model, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in adapter.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith(f"group{group}."), name


@pytest.mark.parametrize("config", ["default", "lora"])
@pytest.mark.parametrize("factor", ["factor0", "factor1"])
def test_frozen_factors(config: str, factor: str) -> None:
    model, adapter = make(config)
    adapter.set_trainable(arrays=factor)
    for name, distance in moved(model, adapter).items():
        assert (distance > 0) == name.endswith(factor), name


@pytest.mark.parametrize("config", ["default", "lora"])
def test_lora_plus(config: str) -> None:
    # In float64: how far a step goes is a difference of numbers that are almost equal.
    (model, adapter), (other, alike) = make(config), make(config)
    plain = moved(other.double(), alike)
    model.double()
    slow, fast = adapter.parameter_groups(lr=0.1, ratio=4.0)
    assert (slow["lr"], fast["lr"]) == (0.1, 0.4)
    for name, distance in moved(model, adapter, [slow, fast]).items():
        assert distance == pytest.approx((4.0 if name.endswith("factor0") else 1.0) * plain[name], rel=1e-9), name


def test_a_nonlinearity_between_the_factors_trains_and_does_not_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(True), Block(False))
    adapter = attach(model, presets.lora(4), activation="relu")
    linear = nn.Sequential(Block(True), Block(False))
    linear.load_state_dict({name: p for name, p in model.state_dict().items() if "tnadapt" not in name})
    attach(linear, presets.lora(4)).load_arrays(adapter.arrays())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = loss_of(model, batch())
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    state = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapter.merge()
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    next(iter(tnadapt.torch.adapters(linear).values())).load_arrays(adapter.arrays())
    with torch.no_grad():
        assert not torch.allclose(model(batch()), linear(batch()), rtol=1e-3)

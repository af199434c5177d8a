"""References that share the base's tensors."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt.torch as tt
from tnadapt import presets
from tnadapt.errors import TargetError

from .interrupts import interrupted, moments


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6), nn.Linear(6, 3))


def move(parameters) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.5)


def trained_pair(**how: bool) -> tuple[nn.Module, nn.Module, tt.Adapter]:
    model = perceptron().eval()
    adapter = tt.attach(model, presets.superlora(2), ["0", "3"], keep_trainable="4")
    move(adapter.parameters())
    return model, tt.reference_model(model, **how), adapter


x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_reference_stays_as_it_is(with_adapters: bool) -> None:
    model, reference, adapter = trained_pair(with_adapters=with_adapters)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Only what is trained is copied, and nothing changes in the model that is trained.
    other = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert name not in other or (other[name] is parameter) == (name not in trainable)
    assert trainable == {"4.weight", "4.bias", *(n for n, _ in model.named_parameters() if n.startswith("tnadapt_"))}
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    if not with_adapters:
        assert tt.adapters(reference) == {}
        assert list(reference.state_dict()) == list(perceptron().state_dict())
    with torch.no_grad(), contextlib.nullcontext() if with_adapters else adapter.disabled():
        expected = model(x)
    move(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert torch.equal(reference(x), expected)
    assert not torch.equal(model(x), expected)
    # Each has its own mode and buffers.
    before = reference[1].running_mean.clone()  # type: ignore[index]
    model.train()(x)
    assert not any(module.training for module in reference.modules())
    assert torch.equal(reference[1].running_mean, before)  # type: ignore[index]


def test_refused() -> None:
    model = perceptron()
    text = (
        "Sequential has no adapter, so that all of its parameters may be trained: for a reference, copy.deepcopy() it"
    )
    with pytest.raises(TargetError, match=f"^{re.escape(text)}$"):
        tt.reference_model(model)
    adapter = tt.attach(model, targets="all-linear")
    move(adapter.parameters())
    adapter.merge()
    text = "adapter 'default' is merged into the weights that the reference shares: unmerge() it"
    with pytest.raises(TargetError, match=f"^{re.escape(text)}$"):
        tt.reference_model(model)


def test_a_reference_is_not_merged_and_leaves_no_trace_when_detached() -> None:
    model, reference, _ = trained_pair(with_adapters=True)
    (adapter,) = tt.adapters(reference).values()
    expected, flags = model(x), [parameter.requires_grad for parameter in model.parameters()]
    for call in (adapter.merge, adapter.bake):
        with pytest.raises(TargetError) as caught:
            call()
        assert str(caught.value) == (
            "adapter 'default' is on a reference model, whose weights are those of the model in training: a merge "
            "would change both; leave it attached"
        )
    adapter.detach()
    assert torch.equal(model(x), expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_interrupted_it_leaves_the_model_frozen() -> None:
    model, below = perceptron(), str(Path(tt.__file__).parent)
    tt.attach(model, targets="all-linear")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for stop in moments(lambda: tt.reference_model(model), below):
        interrupted(lambda: tt.reference_model(model), stop, below)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags, stop

"""However an adapter's arrays are changed, no layer uses an update computed from the old values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from tests.support.depth import in_depth
from tnadapt.torch import Adapter, attach

from .distributed_jobs import Block
from .loops import CONFIGS, batch, gradients, loss_of, make, move
from .small import compiles_whole


def by_optimizer(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[..., None]:
    def change(model: nn.Module, adapter: Adapter) -> None:
        optimizer = kind(adapter.parameters(), lr=0.1, **settings)
        loss_of(model, batch()).backward()
        optimizer.step()

    return change


def to_each(change: Callable[[nn.Parameter], object]) -> Callable[..., None]:
    def apply(model: nn.Module, adapter: Adapter) -> None:
        for parameter in adapter.parameters():
            change(parameter)

    return apply


def by_one_element(model: nn.Module, adapter: Adapter) -> None:
    next(adapter.parameters()).data.view(-1)[0] += 1.0


def by_state_dict(**settings: bool) -> Callable[..., None]:
    def change(model: nn.Module, adapter: Adapter) -> None:
        state = {name: value + 0.1 if "tnadapt" in name else value for name, value in model.state_dict().items()}
        model.load_state_dict(state, **settings)

    return change


def by_new_parameters(model: nn.Module, adapter: Adapter) -> None:
    names = [name for name, _ in model.named_parameters() if "tnadapt" in name]
    for name in names:
        setattr(model, name, nn.Parameter(getattr(model, name).detach() + 0.1))


def by_arrays(model: nn.Module, adapter: Adapter) -> None:
    adapter.load_arrays({name: array.detach() + 0.1 for name, array in adapter.arrays().items()})


CHANGES: dict[str, Callable[[nn.Module, Adapter], None]] = {
    "sgd": by_optimizer(torch.optim.SGD, momentum=0.9),
    "adamw": by_optimizer(torch.optim.AdamW),
    "adamw-foreach": by_optimizer(torch.optim.AdamW, foreach=True),
    "adamw-fused": by_optimizer(torch.optim.AdamW, fused=True),
    "data": to_each(lambda p: p.data.copy_(p.data + 0.1)),
    "other data": to_each(lambda p: setattr(p, "data", p.data + 0.1)),
    "numpy": to_each(lambda p: np.add(p.detach(), 0.1, out=p.detach().numpy())),
    "inference mode": to_each(torch.inference_mode()(lambda p: p.data.add_(0.1))),
    "one element": by_one_element,
    "state dict": by_state_dict(),
    "assigned state dict": by_state_dict(assign=True),
    "new parameters": by_new_parameters,
    "arrays": by_arrays,
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
CALLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "whole": lambda model: model,
    "forward": lambda model: model.forward,
    "part": lambda model: model[0],
}


@pytest.mark.law("array-changes", "between-passes")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_adapter_acts_at_once(change: str, mode: str, call: str) -> None:
    model, adapter = make()
    x = batch()
    with MODES[mode]():
        before = CALLS[call](model)(x)
    CHANGES[change](model, adapter)
    with MODES[mode]():
        after = CALLS[call](model)(x)
        # A copy keeps no update of the original's.
        expected = CALLS[call](copy.deepcopy(model))(x)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.law("between-passes")
def test_changed_between_forward_and_backward_is_refused() -> None:
    model, adapter = make()
    loss = loss_of(model, batch())
    with torch.no_grad():
        next(adapter.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_forward_that_turns_gradients_on_itself() -> None:
    class Guided(nn.Module):
        """Computes a gradient with respect to its input during inference, as guided sampling does."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Block(True)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.inner(x)

    torch.manual_seed(0)
    model = Guided()
    adapter = attach(model)
    move(adapter)
    with torch.no_grad():
        y = model(batch())
    y.square().mean().backward()
    assert len(gradients(adapter)) == len(adapter.plan.param_shapes)


@pytest.mark.slow
@pytest.mark.law("array-changes")
@compiles_whole
@pytest.mark.parametrize("config", in_depth(["default", "linear"], ["default"]))
def test_a_compiled_pass_that_was_interrupted_leaves_no_old_update(config: str) -> None:
    class Stop(nn.Module):
        interrupted = False

        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            if self.interrupted:
                raise KeyboardInterrupt
            return x

    torch.manual_seed(0)
    model = nn.Sequential(Block(True), Stop(), Block(False))
    adapter = attach(model, CONFIGS[config])
    move(adapter)
    torch._dynamo.reset()
    program = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        program(batch())
        model[1].interrupted = True
        with pytest.raises(KeyboardInterrupt):
            program(batch())
        move(adapter, 5)
        model[1].interrupted = False
        expected = copy.deepcopy(model)[0](batch())
        assert torch.equal(model[0](batch()), expected)
        part = torch.compile(model[0], backend="aot_eager")
        torch.testing.assert_close(part(batch()), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(program(batch()), model(batch()), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_on_the_meta_device_nothing_is_compared() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Block(True), Block(False))
    attach(model)
    with torch.no_grad():
        for _ in range(2):
            assert model(batch().to("meta")).device.type == "meta"

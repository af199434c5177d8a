"""What looks at single operations, or runs backward otherwise than forward, meets every strategy."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402

import tnadapt as tna  # noqa: E402
import tnadapt.torch  # noqa: E402

P = tna.presets
CASES = [
    (P.lora(3), "weight"), (P.lora(3), "factored"), (P.lora(3), "beside"),
    (P.lokr(2), "weight"), (P.lokr(2), "factored"), (P.superlora(3), "weight"), (P.superlora(3), "beside"),
]  # fmt: skip
each = pytest.mark.parametrize(("config", "strategy"), CASES)


def adapted(config: tna.Config, strategy: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    adapter = tnadapt.torch.attach(model, config, "all-linear", strategy=strategy)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model, list(adapter.parameters())


@each
def test_backward_under_autocast_of_a_pass_without(config: tna.Config, strategy: str) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(5, 24, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), [x, *parameters])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = model(x)
        found = torch.autograd.grad(y.sum(), [x, *parameters])
    for one, two in zip(found, expected, strict=True):
        # Strategies that form the sum take backward's products in the precision of the region that they are in.
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * float(two.abs().max()))


@each
@pytest.mark.parametrize("mutable", [False, True])
def test_selective_checkpointing(config: tna.Config, strategy: str, mutable: bool) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(4, 24, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(
        create_selective_checkpoint_contexts, kept, **({"allow_cache_entry_mutation": True} if mutable else {})
    )
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@each
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_batch_of_gradients_at_once(config: tna.Config, strategy: str) -> None:
    model, parameters = adapted(config, strategy)
    x = torch.randn(5, 24, requires_grad=True)
    y, several = model(x), torch.randn(3, 5, 24)
    found = torch.autograd.grad(y, [x, *parameters], several, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, [x, *parameters], one, retain_graph=True) for one in several]
    for batch, rows in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batch, torch.stack(rows), rtol=1e-4, atol=1e-4 * float(batch.abs().max()))


@each
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode(config: tna.Config, strategy: str) -> None:
    model, _ = adapted(config, strategy)
    x, tangent = torch.randn(2, 24), torch.randn(2, 24)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    expected = torch.func.jvp(model, (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

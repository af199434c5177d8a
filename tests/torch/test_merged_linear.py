"""A linear layer on the sum of its weight and updates, and the modes in which it must not be used.

Modes that intercept single operations, or change how backward runs, are tested with every strategy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tnadapt as tna
import tnadapt.torch
from tests.support.array_presets import P
from tnadapt.torch._linear import DeltaSource, MergedWeightLinear, summed

CASES = [
    (P.lora(3), "weight"), (P.lora(3), "factored"), (P.lora(3), "additive"),
    (P.lokr(2), "weight"), (P.lokr(2), "factored"), (P.superlora(3), "weight"), (P.superlora(3), "additive"),
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


@pytest.mark.law("activation-checkpointing")
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


@pytest.mark.law("functional-transforms")
@each
# torch's own: forward_ad registers its decompositions by torch.jit.script. From torch 2.15 on it is a FutureWarning.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_forward_mode(config: tna.Config, strategy: str) -> None:
    model, _ = adapted(config, strategy)
    x, tangent = torch.randn(2, 24), torch.randn(2, 24)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    expected = torch.func.jvp(model, (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- The layer itself ---------------------------------------------------------------------------


FORMS = {
    "lora": P.lora(2), "lora alpha": P.lora(2, alpha=8.0), "loha": P.loha(2), "lokr": P.lokr(2), "lorta": P.lorta(2),
    "superlora": P.superlora(3), "groups": P.superlora(2, groups=3), "dense": P.dense(),
    "linear": P.superlora(2, projection="linear", ratio=0.5), "compacter": P.compacter(1, terms=2),
}  # fmt: skip


def test_derivatives_of_a_linear_layer_on_the_sum() -> None:
    made = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=made).double().requires_grad_() for s in ((2, 3, 4), (6, 4), (6,)))
    targets = (
        tna.Target("a", (6, 4), "q", rows=tna.Rows(0, 1, 3, 2)),
        tna.Target("a", (6, 4), "v", rows=tna.Rows(2, 1, 3, 2)),
    )
    q, v = (torch.randn(2, 4, generator=made).double().requires_grad_() for _ in range(2))

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *deltas: torch.Tensor) -> torch.Tensor:
        return MergedWeightLinear.apply(x, w, b, tuple(map(DeltaSource, targets)), *deltas)

    assert torch.autograd.gradcheck(function, (x, weight, bias, q, v))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, q, v))
    plain = torch.nn.functional.linear(x, summed(weight, list(zip(targets, (q, v), strict=True))), bias)
    assert torch.equal(function(x, weight, bias, q, v), plain)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_the_plain_sum(config: tna.Config, weight: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 6)).double()
    adapter = tnadapt.torch.attach(model, config, "all-linear", strategy="weight", dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    adapter.set_weight(weight)
    x = torch.randn(2, 5, 12).double().requires_grad_()
    of = [x, *adapter.parameters()]
    first, second = (weight * delta for delta in adapter.deltas())
    hidden = torch.tanh(x @ (model[0].weight + first).T + model[0].bias)
    plain = hidden @ (model[2].weight + second).T + model[2].bias
    y = model(x)
    torch.testing.assert_close(y, plain)
    expected = torch.autograd.grad(plain.square().sum(), of, retain_graph=True)
    for found, one in zip(torch.autograd.grad(y.square().sum(), of, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(found, one)
    seconds = []
    for made in (y, plain):
        first_order = torch.autograd.grad(made.square().sum(), of, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in first_order), of))
    for found, one in zip(*seconds, strict=True):
        torch.testing.assert_close(found, one)


def peak_of(call: Callable[[], Any]) -> int:
    """Return the peak of bytes that torch allocated on the CPU, beyond those allocated before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("name", ["lora", "lora alpha", "superlora", "loha", "lorta", "dense"])
def test_a_linear_layer_needs_the_memory_of_one_weight(name: str) -> None:
    """The update and the sum share one array in turn; backward also writes the weight's gradient into it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    tnadapt.torch.attach(model, FORMS[name], "all-linear", strategy="weight")
    x = torch.randn(2, 256, requires_grad=True)
    kept = [model(x).sum()]
    kept[0].backward()
    weight = 4 * 256 * 256
    assert peak_of(lambda: kept.append(model(x).sum())) < 1.5 * weight
    assert peak_of(kept[-1].backward) < 1.5 * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_several_parts_of_a_weight_share_one_sum(dtype: torch.dtype) -> None:
    stored = torch.randn(3 * 128, 128).to(dtype)
    targets = [tna.Target("a", (384, 128), role, rows=tna.Rows(128 * at, 128, 384)) for at, role in enumerate("qkv")]
    deltas = [torch.randn(128, 128) for _ in targets]
    found: list[torch.Tensor] = []
    peak = peak_of(lambda: found.append(summed(stored, list(zip(targets, deltas, strict=True)))))
    assert torch.equal(found[0], (stored.float() + torch.cat(deltas)).to(dtype))
    wide, narrow = 4 * stored.numel(), dtype.itemsize * stored.numel()
    assert peak < 1.2 * wide + (narrow if dtype is not torch.float32 else 0)

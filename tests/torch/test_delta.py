"""The update with autograd: one node that keeps nothing, and what is kept between passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import tnadapt as tna  # noqa: E402
import tnadapt.torch as tt  # noqa: E402
from tnadapt.testing import plans  # noqa: E402
from tnadapt.torch.delta import pieces, vector  # noqa: E402
from tnadapt.torch.kept import Updates  # noqa: E402
from tnadapt.torch.summed import Source, SummedLinear, summed  # noqa: E402

P = tna.presets


def moved(plan: tna.SuperLoRA, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    arrays = plan.init("torch", "float64")
    return {n: (a + 0.3 * torch.randn(a.shape, generator=made).double()).requires_grad_() for n, a in arrays.items()}


@given(plans(), st.integers(0, 100))
def test_the_node_is_its_plain_twin(plan: tna.SuperLoRA, seed: int) -> None:
    arrays = moved(plan, seed)
    weights = torch.randn(plan.size, generator=torch.Generator().manual_seed(seed)).double()
    twin = {name: array.detach().clone().requires_grad_() for name, array in arrays.items()}
    found, plain = vector(plan, arrays), torch.cat([d.reshape(-1) for d in plan.deltas(twin)])
    assert torch.allclose(found, plain, rtol=1e-12, atol=1e-12)
    for _ in range(2):  # the same node twice, without retain_graph
        (found * weights).sum().backward()
    (plain * weights).sum().backward()
    for name, array in arrays.items():
        scale = float(twin[name].grad.abs().max()) + 1.0
        assert float((array.grad - 2 * twin[name].grad).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("config", [P.superlora(2), P.dense(), P.superlora(2, projection="nonlinear", ratio=0.5)])
def test_first_and_second_derivatives(config: tna.Config) -> None:
    plan = tna.SuperLoRA(config, [(3, 2), (2, 2)])
    arrays = moved(plan)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return vector(plan, dict(zip(arrays, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(arrays.values()))
    assert torch.autograd.gradgradcheck(function, tuple(arrays.values()))


@pytest.mark.parametrize("config", [None, P.lora(2)])
def test_the_transforms_of_torch_func(config: tna.Config | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    adapter = tt.attach(model, config, "all-linear", dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(4, 6, dtype=torch.float64)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def function(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (x,))

    given = tuple(p.detach() for p in named.values())
    rows = [torch.autograd.grad(y, list(named.values()), retain_graph=True) for y in model(x).flatten()]
    found = torch.func.jacrev(function, argnums=tuple(range(len(given))))(*given)
    for index, jacobian in enumerate(found):
        expected = torch.stack([row[index] for row in rows]).view(jacobian.shape)
        assert torch.allclose(jacobian, expected, rtol=1e-10, atol=1e-12)
    seed = torch.randn(4, 3, dtype=torch.float64)
    pulled = torch.func.vjp(function, *given)[1](seed)
    for one, jacobian in zip(pulled, found, strict=True):
        assert torch.allclose(one, torch.tensordot(seed, jacobian, 2), rtol=1e-10, atol=1e-12)


def test_derivatives_of_a_linear_layer_on_the_sum() -> None:
    made = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=made).double().requires_grad_() for s in ((2, 3, 4), (6, 4), (6,)))
    targets = (
        tna.Target("a", (6, 4), "q", rows=tna.Rows(0, 1, 3, 2)),
        tna.Target("a", (6, 4), "v", rows=tna.Rows(2, 1, 3, 2)),
    )
    q, v = (torch.randn(2, 4, generator=made).double().requires_grad_() for _ in range(2))

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *deltas: torch.Tensor) -> torch.Tensor:
        return SummedLinear.apply(x, w, b, tuple(map(Source, targets)), *deltas)

    assert torch.autograd.gradcheck(function, (x, weight, bias, q, v))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, q, v))
    plain = torch.nn.functional.linear(x, summed(weight, list(zip(targets, (q, v), strict=True))), bias)
    assert torch.equal(function(x, weight, bias, q, v), plain)


def test_a_checkpointed_region_saves_nothing_for_the_update() -> None:
    plan = tna.SuperLoRA(P.superlora(2), [(8, 8)])
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = pieces(plan, vector(plan, moved(plan)))
    assert saved == []
    assert found[0].requires_grad


class Reused:
    """Whether a cache gives the very object again that it gave before."""

    def __init__(self, config: tna.Config, shapes: list[tuple[int, int]]) -> None:
        self.plan = tna.SuperLoRA(config, shapes)
        self.arrays, self.updates = moved(self.plan), Updates(self.plan)

    def get(self, index: int = 0) -> torch.Tensor:
        found = self.updates.get(lambda names: [self.arrays[name] for name in names], index)
        arrays = {name: array.detach() for name, array in self.arrays.items()}
        assert torch.allclose(found, self.plan.delta(arrays, index), rtol=1e-12, atol=1e-14)
        return found


SHARED = P.superlora(2, projection="linear", ratio=0.5)  # all updates are computed at once


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


def test_only_the_arrays_of_a_weight_decide_about_its_update() -> None:
    case = Reused(P.lora(2), [(8, 8), (8, 8)])
    with torch.no_grad():
        first, second = case.get(0), case.get(1)
        case.arrays["group1.split0.factor0"].data.mul_(2.0)
        assert case.get(0) is first
        assert case.get(1) is not second


def test_averaged_weights_swapped_in_by_data_are_seen() -> None:
    from .small import batch, small, stir

    model = small()
    adapter = tt.attach(model)
    with torch.no_grad():
        before = model(batch())
        for parameter in adapter.parameters():
            parameter.data.add_(0.05)
        assert not torch.equal(model(batch()), before)
    stir(adapter)

"""Hand-written training loops: gradient accumulation, copies, dtypes, compilers and functional calls."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from pathlib import Path

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth

from . import life
from .loops import CONFIGS, batch, gradients, loss_of, make, relative
from .small import batch as small_batch
from .small import compiles_whole, small, stir


@pytest.mark.law("accumulation")
@pytest.mark.parametrize("config", CONFIGS)
def test_two_backward_passes_of_one_forward_pass_add_up(config: str) -> None:
    model, adapter = make(config)
    loss = loss_of(model, batch(8))
    loss.backward(retain_graph=True)
    expected = gradients(adapter)
    assert len(expected) == len(adapter.plan.param_shapes)
    loss.backward()
    for name, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_converted_with_its_adapter(config: str, dtype: Any) -> None:
    model, adapter = make(config)
    x = batch()
    with torch.no_grad():
        before = model(x)
    model.to(dtype)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    after = model(x.to(dtype))
    assert after.dtype == dtype
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}[dtype]
    assert relative(after.detach().float(), before) < tolerance
    after.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapter.parameters())


# Of inductor itself.
@pytest.mark.slow
@pytest.mark.law("compile")
@compiles_whole
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("config", "backend"),
    [*((config, "aot_eager") for config in in_depth(CONFIGS, [*CONFIGS][::3])), ("default", "inductor")],
)
def test_compiled_training(config: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    losses: list[list[float]] = []
    for compiled in (False, True):
        model, adapter = make(config, 1 if backend == "inductor" else 3)  # it compiles for seconds a layer
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.02)
        program = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        losses.append([])
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                loss = loss_of(program, batch())
                losses[-1].append(float(loss.detach()))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    eager, found = losses
    assert eager[2] < eager[1] < eager[0]
    assert found == pytest.approx(eager, rel=1e-6)


def arrays_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "tnadapt" in name}


@pytest.mark.parametrize("config", CONFIGS)
def test_functional_call_with_other_parameters(config: str) -> None:
    model, adapter = make(config)
    x = batch()
    with torch.no_grad():
        before = model(x)
    swapped = {name: array.mul(1.5).requires_grad_() for name, array in arrays_of(model).items()}
    y = functional_call(model, swapped, (x,))
    y.square().mean().backward()
    assert all(p.grad is None for p in adapter.parameters())
    assert all(bool(p.grad.any()) for p in swapped.values())
    with torch.no_grad():
        assert torch.equal(model(x), before)
        for name, array in swapped.items():
            model.get_parameter(name).copy_(array)
        assert torch.equal(model(x), y)


# Of torch, which has no rule yet to take its attention over samples, and none for rows of a fused weight.
@pytest.mark.law("functional-transforms")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_of_samples_and_several_adapters_at_once(config: str) -> None:
    model = make(config)[0].double()
    x, parameters = batch().double(), arrays_of(model)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(lambda x: functional_call(model, values, (x,)), x)

    samples = vmap(grad(lambda values, sample: loss(values, sample[None])), in_dims=(None, 0))(parameters, x)
    each = [{name: several[index] for name, several in samples.items()} for index in range(len(x))]
    for found, inputs in ((grad(loss)(parameters, x), x), *zip(each, x.split(1), strict=True)):
        model.zero_grad()
        loss_of(model, inputs).backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    torch.manual_seed(1)
    stacked = {name: array + 1e-3 * torch.randn(3, *array.shape).double() for name, array in parameters.items()}
    outputs = vmap(lambda values: functional_call(model, values, (x,)))(stacked)
    for index, output in enumerate(outputs):
        alone = {name: values[index] for name, values in stacked.items()}
        torch.testing.assert_close(output, functional_call(model, alone, (x,)), rtol=1e-9, atol=1e-12)


MAPS = {
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
@pytest.mark.parametrize("name", MAPS)
def test_the_life_of_an_adapter_whose_gradients_are_those_of_the_plan(name: str, tmp_path: Path) -> None:
    """The graph of a group's update takes the adjoint of F, the plan's own gradients are autograd's through F."""
    life.check_life(small, lambda model: tt.attach(model, MAPS[name]), small_batch(), tmp_path)
    model, x = small(), small_batch().double()
    adapter = tt.attach(model, MAPS[name])
    model.double()
    stir(adapter)
    life.assert_near(life.passes(model, adapter, x), life.by_formula(adapter, small().double(), x), 1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAPS)
def test_compiled_is_eager(name: str) -> None:
    plan = tna.UpdatePlan(MAPS[name], [(16, 16), (8, 16), (16, 16)])
    params = {key: torch.randn(shape, requires_grad=True) for key, shape in plan.param_shapes.items()}
    torch.compiler.reset()
    program = torch.compile(lambda given: plan.vector(given), backend="aot_eager", fullgraph=True)
    found, expected = program(params), plan.vector(params)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(found.square().sum(), list(params.values()))
    for one, other in zip(ours, torch.autograd.grad(expected.square().sum(), list(params.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)

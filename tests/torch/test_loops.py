"""Hand-written training loops: gradient accumulation, copies, dtypes, compilers and functional calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tests.support.depth import in_depth

from .loops import CONFIGS, batch, gradients, loss_of, make, relative
from .small import compiles_whole

# -- Gradients accumulated over batches ------------------------------------------------------


@pytest.mark.law("accumulation")
@pytest.mark.parametrize("config", CONFIGS)
def test_accumulated_gradients_are_those_of_one_big_batch(config: str) -> None:
    model, adapter = make(config)
    x = batch(8)
    loss = loss_of(model, x)
    loss.backward(retain_graph=True)
    expected = gradients(adapter)
    loss.backward()  # one forward pass and two backward
    for name, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-6, atol=0)
    model.zero_grad()
    for part in x.chunk(4):
        (loss_of(model, part) / 4).backward()
    found = gradients(adapter)
    assert len(expected) == len(adapter.plan.param_shapes)
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-6, name


# -- Copies and dtypes -----------------------------------------------------------------------


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


# -- Compiled --------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def three_losses(config: str, parts: int, compiled_by: Callable[[nn.Module], Any] | None) -> list[float]:
    model, adapter = make(config, parts)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.02)
    running = model if compiled_by is None else compiled_by(model)
    losses = []
    for _ in range(3):
        loss = loss_of(running, batch())
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if compiled_by is not None:
            torch.compiler.set_stance("fail_on_recompile")
    return losses


# Of inductor itself.
@pytest.mark.slow
@pytest.mark.law("compile")
@compiles_whole
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("config", "backend"),
    [*((config, "aot_eager") for config in in_depth(CONFIGS, [*CONFIGS][::3])), ("default", "inductor")],
)
def test_compiled_training(config: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    # inductor compiles for seconds a layer.
    parts = 1 if backend == "inductor" else 3
    eager = three_losses(config, parts, None)
    compiled = three_losses(config, parts, lambda model: torch.compile(model, fullgraph=True, backend=backend))
    assert eager[2] < eager[1] < eager[0]
    assert compiled == pytest.approx(eager, rel=1e-6)


# -- torch.func ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_functional_call_with_other_parameters(config: str) -> None:
    model, adapter = make(config)
    x = batch()
    with torch.no_grad():
        before = model(x)
    names = [name for name, _ in model.named_parameters() if "tnadapt" in name]
    swapped = {name: model.get_parameter(name).detach().mul(1.5).requires_grad_() for name in names}
    y = functional_call(model, swapped, (x,))
    y.square().mean().backward()
    assert all(p.grad is None for p in adapter.parameters())
    assert all(bool(p.grad.any()) for p in swapped.values())
    with torch.no_grad():
        assert torch.equal(model(x), before)
        for name in names:
            model.get_parameter(name).copy_(swapped[name])
        assert torch.equal(model(x), y)


# Of torch, which has no rule yet to take its attention over samples.
@pytest.mark.law("functional-transforms")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_by_torch_func(config: str) -> None:
    model, _ = make(config)
    x = batch()
    names = [name for name, _ in model.named_parameters() if "tnadapt" in name]
    parameters = {name: model.get_parameter(name).detach() for name in names}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(lambda x: functional_call(model, values, (x,)), x)

    samples = vmap(grad(lambda values, sample: loss(values, sample[None])), in_dims=(None, 0))(parameters, x)
    whole = grad(loss)(parameters, x)
    for found, given, tolerance in (
        (whole, x, {"rtol": 1e-5, "atol": 1e-8}),
        *(
            ({name: several[index] for name, several in samples.items()}, x[index : index + 1],
             {"rtol": 1e-4, "atol": 1e-7}) for index in range(len(x))
        ),
    ):  # fmt: skip
        model.zero_grad()
        loss_of(model, given).backward()
        for name in names:
            torch.testing.assert_close(found[name], model.get_parameter(name).grad, **tolerance)


# A fused weight, whose rows get updates, has no batch dimension of its own.
@pytest.mark.law("functional-transforms")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("config", CONFIGS)
def test_several_adapters_at_once(config: str) -> None:
    model = make(config)[0].double()
    x = batch().double()
    names = [name for name, _ in model.named_parameters() if "tnadapt" in name]
    torch.manual_seed(1)
    parameters = {
        name: model.get_parameter(name).detach() + 1e-3 * torch.randn(3, *model.get_parameter(name).shape).double()
        for name in names
    }
    outputs = vmap(lambda values: functional_call(model, values, (x,)))(parameters)
    for index, output in enumerate(outputs):
        one = {name: values[index] for name, values in parameters.items()}
        torch.testing.assert_close(output, functional_call(model, one, (x,)), rtol=1e-9, atol=1e-12)

"""Hand-written training loops: gradient accumulation, copies, dtypes, compilers and functional calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
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

from .loops import CONFIGS, batch, gradients, loss_of, make, relative
from .small import batch as small_batch
from .small import compiles_whole, small, stir

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


# -- Maps that have settings, are chains, or work on each weight ------------------------------------


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
def test_trained_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    model = small()
    adapter = tt.attach(model, MAPS[name])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(small_batch()), torch.tensor([0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(small_batch())
        adapter.save(tmp_path / "adapter.safetensors")
        other = small()
        tt.load(other, tmp_path / "adapter.safetensors")
        assert torch.equal(other(small_batch()), trained)
        adapter.merge()
        torch.testing.assert_close(model(small_batch()), trained, rtol=1e-4, atol=1e-5)
        adapter.unmerge()
        assert torch.equal(model(small_batch()), trained)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_those_of_the_plan(name: str) -> None:
    """The graph of a group's update, which takes the adjoint of F, against autograd through F."""
    model = small().double()
    adapter = tt.attach(model, MAPS[name])
    stir(adapter)
    weights = [torch.randn(target.shape, dtype=torch.float64) for target in adapter.targets]
    arrays = {key: value.detach().clone().requires_grad_() for key, value in adapter.named_parameters()}
    through = sum((d * w).sum() for d, w in zip(adapter.plan.training_plan.deltas(arrays), weights, strict=True))
    expected = torch.autograd.grad(through, list(arrays.values()))
    ours = sum((d * w).sum() for d, w in zip(adapter.deltas(), weights, strict=True))
    found = torch.autograd.grad(ours, [value for _, value in adapter.named_parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAPS)
def test_compiled_is_eager(name: str) -> None:
    plan = tna.SuperLoRA(MAPS[name], [(16, 16), (8, 16), (16, 16)])
    params = {key: torch.randn(shape, requires_grad=True) for key, shape in plan.param_shapes.items()}
    torch.compiler.reset()
    program = torch.compile(lambda given: plan.vector(given), backend="aot_eager", fullgraph=True)
    found, expected = program(params), plan.vector(params)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(found.square().sum(), list(params.values()))
    for one, other in zip(ours, torch.autograd.grad(expected.square().sum(), list(params.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)

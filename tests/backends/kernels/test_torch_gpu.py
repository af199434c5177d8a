"""The Triton kernels called through torch: derivatives of every order, vmap, strides, and a step of a plan.

As in test_triton.py: on a device, or under the interpreter in a separate process, where CPU tensors are treated as
tensors on a device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.algebra.maps.fastfood import fwht_plain

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.5")

from tnadapt.backends import get_backend

from ..internals import torch_gpu, torch_maps, vector

# torch's own forward derivatives compile some of theirs with what torch calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; done by test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this is the interpreter, or there is a device")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record every run of a kernel, so that no test passes without one."""
    made: list[Any] = []
    by_rows, launcher = torch_gpu._by_rows, torch_maps._launcher

    def counted(kernel: Any, x: Any) -> Any:
        made.append(kernel)
        return by_rows(kernel, x)

    def launched(x: Any) -> Any:
        made.append(launcher)
        return launcher(x)

    monkeypatch.setattr(torch_gpu, "_by_rows", counted)
    monkeypatch.setattr(torch_maps, "_launcher", launched)
    if INTERPRETED:
        monkeypatch.setattr(torch_gpu, "is_supported", lambda x: True)
    yield made
    if INTERPRETED or torch.cuda.is_available():
        assert made


@kernels
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fwht_along_any_axis(axis: int) -> None:
    x = torch.randn(4, 8, 2, dtype=torch.float64, device=DEVICE)[:, ::2].requires_grad_()
    found = tna.fwht(x, axis=axis)
    expected = fwht_plain(get_backend(x), x.movedim(axis, -1), normalize=True).movedim(-1, axis)
    assert torch.allclose(found, expected, atol=1e-14)
    assert torch.autograd.gradcheck(lambda t: tna.fwht(t, axis=axis), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: tna.fwht(t, axis=axis), (x,), fast_mode=True)


@kernels
@pytest.mark.parametrize("kind", ["linear", "nonlinear_v2", "shuffle"])
def test_derivatives_of_f(kind: str) -> None:
    f = tna.Projection(kind, 7 if kind == "shuffle" else 3, 7, seed=1)
    x = torch.randn(2, f.n_in, dtype=torch.float64, device=DEVICE, requires_grad=True)
    # Along one random direction: each call takes the interpreter a tenth of a second.
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(f.linear_part.adjoint, (torch.randn_like(f(x)).requires_grad_(),), fast_mode=True)


@kernels
@pytest.mark.parametrize("kind", ["shuffle", "linear", "linear_v2"])
def test_f_keeps_nothing(kind: str, rng: np.random.Generator) -> None:
    f = tna.Projection(kind, 9, 9, seed=2**63 + 5, group=1)
    x = rng.normal(size=(2, 9))
    found = f(torch.tensor(x, device=DEVICE)), f.adjoint(torch.tensor(x, device=DEVICE))
    draws = f.map if kind == "shuffle" else f.map.draws
    assert not draws.kept
    assert not draws.placed
    for ours, plain in zip(found, (f(x), f.adjoint(x)), strict=True):
        assert np.allclose(ours.cpu().numpy(), plain, rtol=1e-13, atol=1e-13)


@kernels
@pytest.mark.parametrize(("n_in", "n_out"), [(9, 9), (3, 600), (300, 500)])
def test_kept_normal_numbers_change_no_bit(n_in: int, n_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    f = tna.Projection("linear", n_in, n_out, seed=2**63 + 5, group=1)
    x, y = torch.randn(2, n_in, device=DEVICE), torch.randn(2, n_out, device=DEVICE)
    monkeypatch.setattr(torch_gpu, "_draws_fast", lambda device: True)
    drawn = f(x), f.adjoint(y)
    assert not f.map.draws.placed
    monkeypatch.setattr(torch_gpu, "_draws_fast", lambda device: False)
    assert all(map(torch.equal, (f(x), f.adjoint(y)), drawn))
    assert [key for _, _, key in f.map.draws.placed] == ["gain"]


@kernels
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_batch_of_gradients_at_once() -> None:
    f = tna.Projection("linear", 5, 12, seed=2**64 - 1)
    x = torch.randn(2, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.randn(3, 2, 12, dtype=torch.float64, device=DEVICE)
    (found,) = torch.autograd.grad(f(x), x, y, is_grads_batched=True)
    assert torch.allclose(found, f.adjoint(y))
    shuffle = tna.Projection("shuffle", 5, 5, seed=2**64 - 1)
    (found,) = torch.autograd.grad(shuffle(x), x, y[..., :5], is_grads_batched=True)
    assert torch.equal(found, shuffle.adjoint(y[..., :5]))
    (found,) = torch.autograd.grad(tna.fwht(x, axis=0), x, y[..., :5], is_grads_batched=True)
    assert torch.allclose(found, tna.fwht(y[..., :5], axis=1))


@kernels
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_single(kind: str) -> None:
    f = tna.Projection("linear", 50, 200, seed=1)
    x = torch.randn(50, dtype=getattr(torch, kind), device=DEVICE)
    found = f(x)
    assert found.dtype == x.dtype
    assert torch.equal(found, f(x.float()).to(x.dtype))
    assert torch.equal(tna.fwht(found[:128]), tna.fwht(found[:128].float()).to(x.dtype))


@kernels
def test_numbers_that_are_not_in_memory_yet() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    assert torch.equal(tna.fwht(torch._neg_view(x)), tna.fwht(-x))
    assert not tna.fwht(torch._efficientzerotensor(3, 8, dtype=torch.float64, device=DEVICE)).any()
    assert torch.equal(tna.fwht(x[:1].expand(3, 8)), tna.fwht(x[:1].repeat(3, 1)))


def arrays_of(plan: tna.SuperLoRA) -> dict[str, Any]:
    host = plan.init(dtype="float64")
    return {name: torch.tensor(array + 0.1, device=DEVICE, requires_grad=True) for name, array in host.items()}


def step(plan: tna.SuperLoRA, arrays: dict[str, Any]) -> list[Any]:
    update = vector(plan, arrays)
    return [update, *torch.autograd.grad(update.square().sum(), list(arrays.values()))]


@kernels
@pytest.mark.parametrize("projection", ["linear", "nonlinear_v2"])
def test_a_step_of_a_plan(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection=projection, ratio=0.3), [(12, 10), (10, 10)])
    arrays = arrays_of(plan)
    found = step(plan, arrays)
    monkeypatch.setattr(torch_gpu, "there_are_kernels", lambda x: False)
    for ours, plain in zip(found, step(plan, arrays), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


@kernels
def test_groups_that_share_f_are_launched_together(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tna.presets.superlora(2, projection="linear", ratio=0.3, groups="weight")
    plan = tna.SuperLoRA(config, [(12, 10)] * 6)
    arrays = arrays_of(plan)
    found = step(plan, arrays)
    assert len(calls) == 2  # forward and backward
    calls.clear()
    monkeypatch.setattr(get_backend(arrays["group0.split0.factor0"]), "at_once", lambda x: 0)
    assert all(map(torch.equal, found, step(plan, arrays)))
    assert len(calls) == 12


RECIPE = f"16 8 {2**64 - 59} 3 1"
CALLS: dict[str, tuple[Any, int, tuple[Any, ...]]] = {
    "fwht": (torch_maps.fwht, 8, (0.5,)),
    "fastfood": (torch_maps.fastfood, 7, (None, RECIPE, 7, 13, False)),
    "its adjoint": (torch_maps.fastfood, 13, (None, RECIPE, 7, 13, True)),
    "shuffle": (torch_maps.shuffle, 7, (f"{2**64 - 59} 3", False)),
    "back": (torch_maps.shuffle, 7, (f"{2**64 - 59} 3", True)),
}

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*CHECKS, "test_aot_dispatch_dynamic")


@kernels
@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    operator, n, settings = CALLS[name]
    x = torch.randn(3, n, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.library.opcheck(operator, (x, *settings), test_utils=CHECKS if name != "fastfood" else ALL_CHECKS)
    torch.library.opcheck(operator, (x.detach().T.contiguous().T, *settings), test_utils=CHECKS)
    assert torch.autograd.gradcheck(lambda x: operator(x, *settings), (x,), fast_mode=True)
    many = torch.randn(3, 2, n, dtype=torch.float64, device=DEVICE)
    found = torch.func.vmap(lambda x: operator(x, *settings), in_dims=1)(many)
    assert torch.equal(found, torch.stack([operator(one, *settings) for one in many.unbind(1)]))


@kernels
@pytest.mark.parametrize("kind", ["shuffle", "linear", "nonlinear_v2"])
def test_compiled_programs_compute_the_same(kind: str, rng: np.random.Generator) -> None:
    f = tna.Projection(kind, 9, 9, seed=2**63 + 5, group=1)
    x = torch.tensor(rng.normal(size=(2, 9)), device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), f(x)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
    pulled = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(*pulled, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()

"""What JAX adds: jit, vmap, grad, and numbers of 32 bits by default."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import relative_error
from tests.support.depth import in_depth
from tnadapt.backends import load_backend

from .test_torch import DFT, LARGER, NONLINEAR, PRESETS, SHAPES, with_fft  # noqa: F401

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")


def drawn(plan: tna.UpdatePlan) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}


@pytest.mark.slow
@pytest.mark.law("torch-jax-gradients")
@pytest.mark.parametrize("name", PRESETS)
def test_jit_and_gradients_agree_with_torch(name: str) -> None:
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)
    host = drawn(plan)
    target = np.random.default_rng(1).normal(size=plan.size)

    def loss(params):
        return (plan.vector(params) ** 2 * target).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))({k: jax.numpy.asarray(a) for k, a in host.items()})
    tensors = {k: torch.tensor(a, requires_grad=True) for k, a in host.items()}
    expected = (plan.vector(tensors) ** 2 * torch.tensor(target)).sum()
    expected.backward()
    assert abs(float(value) - expected.item()) < 1e-12 * max(1.0, abs(expected.item()))
    for key, tensor in tensors.items():
        assert relative_error(grads[key], tensor.grad.numpy()) < 1e-11


@pytest.mark.law("functional-transforms")
@pytest.mark.parametrize("name", ["lora", "lonkr", "F shuffle", "F nonlinear"])
def test_vmap_and_slices_under_jit(name: str) -> None:
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)
    host = drawn(plan)
    stacked = {k: jax.numpy.stack([a, 2 * a]) for k, a in host.items()}
    found = jax.jit(jax.vmap(lambda p: plan.vector(p, 3, 30)))(stacked)
    for i in range(2):
        assert relative_error(found[i], plan.vector({k: np.asarray(a[i]) for k, a in stacked.items()}, 3, 30)) < 1e-12


def test_draws_first_met_under_jit_are_not_kept_as_tracers() -> None:
    plan = tna.UpdatePlan(PRESETS["F nonlinear"], SHAPES)
    params = plan.init("jax", "float64")
    jax.jit(plan.vector)(params)
    jax.jit(lambda p: plan.delta(p, 1))(params)
    assert relative_error(plan.vector(params), np.zeros(plan.size)) == 0.0
    assert relative_error(jax.jit(plan.vector)({k: a + 0.1 for k, a in params.items()}),
                          plan.vector({k: np.asarray(a) + 0.1 for k, a in params.items()})) < 1e-12  # fmt: skip


@pytest.mark.law("dtype-overflow")
def test_without_64_bits_float64_is_refused_and_float32_works() -> None:
    plan = tna.UpdatePlan(PRESETS["F linear"], SHAPES)
    with jax.enable_x64(False):
        with pytest.raises(tna.BackendError, match="jax_enable_x64"):
            plan.init("jax", "float64")
        params = {k: jax.numpy.asarray(a, dtype="float32") for k, a in drawn(plan).items()}
        found = np.asarray(plan.vector(params))
    assert found.dtype == np.float32
    assert relative_error(found, plan.vector({k: np.asarray(a, np.float64) for k, a in params.items()})) < 1e-5


def test_some_parameters_may_be_constants_of_the_program() -> None:
    plan = tna.UpdatePlan(PRESETS["F linear"], SHAPES)
    params = {k: jax.numpy.asarray(a) for k, a in drawn(plan).items()}
    first, *rest = params
    fixed = {k: params[k] for k in rest}
    found = jax.jit(lambda a: plan.vector({first: a} | fixed))(params[first])
    assert relative_error(found, plan.vector(params)) < 1e-12


@pytest.mark.parametrize(
    ("name", "dtype"),
    in_depth(
        [*itertools.product(NONLINEAR, ["float64", "float32", "bfloat16", "float16"])],
        [*itertools.product(NONLINEAR, ["float32"]), ("tucker", "bfloat16"), ("cp", "float64")],
    ),
)
def test_a_larger_start_under_jit(name: str, dtype: str) -> None:
    plan = tna.UpdatePlan(NONLINEAR[name], LARGER)
    params = plan.init("jax", dtype)
    assert not any(np.asarray(delta, np.float64).any() for delta in jax.jit(plan.deltas)(params))
    assert not np.asarray(jax.jit(lambda p: plan.delta(p, 2))(params), np.float64).any()


@pytest.mark.law("beyond-2-31")
def test_positions_past_2_31_are_not_truncated() -> None:
    backend = load_backend("jax")
    with jax.enable_x64(False):
        with pytest.raises(tna.BackendError, match="positions past 2"):
            backend.constant(np.array([2**31 + 5]), None)
        assert int(backend.constant(np.array([2**31 - 1]), None)[0]) == 2**31 - 1
    assert int(backend.constant(np.array([2**31 + 5]), None)[0]) == 2**31 + 5


@pytest.mark.usefixtures("with_fft")
class TestDft2:
    def f(self, x: Any) -> Any:
        return DFT.forward(load_backend("jax"), x)

    @pytest.mark.law("functional-transforms", "derivatives-of-projections")
    def test_under_jit_vmap_and_grad(self) -> None:
        x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(3, DFT.n_in)))
        expected = np.asarray(x) @ DFT.matrix().T
        assert relative_error(jax.jit(jax.vmap(self.f))(x), expected) < 1e-13
        assert relative_error(jax.jvp(self.f, (x,), (2.0 * x,))[1], 2.0 * expected) < 1e-13
        grad = jax.jit(jax.grad(lambda x: (self.f(x) ** 2).sum()))(x)
        assert relative_error(grad, 2.0 * expected @ DFT.matrix()) < 1e-13

    @pytest.mark.law("precision")
    def test_single_precision_with_64_bits_switched_off(self) -> None:
        with jax.enable_x64(False):
            x = jax.numpy.asarray(np.random.default_rng(0).normal(size=DFT.n_in), "float32")
            found = self.f(x)
        assert found.dtype == np.float32
        assert relative_error(found, DFT.matrix() @ np.asarray(x, np.float64)) < 2.0**-20

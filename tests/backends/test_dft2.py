"""The FFT of torch and JAX under what transforms programs: derivatives, batches, compilers, export."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import relative_error
from tnadapt.algebra.maps import Dft2
from tnadapt.backends import load_backend

F = Dft2(42, 42, shape=(6, 7))
MATRIX = F.matrix()


@pytest.fixture(autouse=True)
def with_fft(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these short sides, the products are faster."""
    monkeypatch.setattr("tnadapt.algebra.maps._transforms._PRODUCTS_PER_STEP", 0)


class TestTorch:
    torch = pytest.importorskip("torch")
    backend = load_backend("torch")

    def f(self, x: Any) -> Any:
        return F.forward(self.backend, x)

    def drawn(self, *batch: int) -> Any:
        return self.torch.from_numpy(np.random.default_rng(0).normal(size=(*batch, F.n_in)))

    @pytest.mark.law("derivatives-of-projections")
    # torch's own forward derivatives compile some of theirs with what torch calls deprecated.
    @pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
    def test_derivatives_in_both_modes(self) -> None:
        x = self.drawn(2).requires_grad_()
        assert self.torch.autograd.gradcheck(self.f, x, check_forward_ad=True, check_batched_grad=True)
        assert self.torch.autograd.gradgradcheck(lambda x: self.f(x).square(), x)

    @pytest.mark.law("functional-transforms")
    @pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
    def test_functional_transforms(self) -> None:
        func, x = self.torch.func, self.drawn(3)
        assert relative_error(func.vmap(self.f, in_dims=1, out_dims=1)(x.T), self.f(x).T) < 1e-14
        assert relative_error(func.jvp(self.f, (x,), (2.0 * x,))[1], 2.0 * self.f(x)) < 1e-14
        each = func.vmap(func.grad(lambda x: self.f(x).square().sum()))(x)
        assert relative_error(each, 2.0 * self.f(self.f(x))) < 1e-14
        assert relative_error(func.functionalize(self.f)(x), self.f(x)) < 1e-14

    def test_autocast_does_not_round(self) -> None:
        for x in (self.drawn(2), self.drawn(2).float()):
            expected = self.f(x)
            with self.torch.autocast("cpu"):
                found = self.f(x)
            assert found.dtype is x.dtype
            assert self.torch.equal(found, expected)

    def test_shapes_without_numbers(self) -> None:
        assert self.f(self.torch.empty(2, F.n_in, device="meta")).shape == (2, F.n_out)

    @pytest.mark.slow
    @pytest.mark.law("compile")
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    @pytest.mark.parametrize("derivative", [False, True])
    def test_compiled_in_one_graph(self, derivative: bool) -> None:
        way = self.torch.func.grad(lambda x: self.f(x).square().sum()) if derivative else self.f
        x = self.drawn(2).requires_grad_()
        self.torch.compiler.reset()
        found = self.torch.compile(way, fullgraph=True)(x)
        assert relative_error(found.detach(), way(x).detach()) < 1e-14
        if not derivative:
            (grad,) = self.torch.autograd.grad(found.square().sum(), x)
            assert relative_error(grad, 2.0 * self.f(self.f(x.detach()))) < 1e-14

    def test_an_exported_program_has_no_complex_numbers(self) -> None:
        class Module(self.torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(module, x: Any) -> Any:  # noqa: N805
                return self.f(x)

        x = self.drawn(2)
        program = self.torch.export.export(Module(), (x,))
        assert not any("fft" in str(node.target) for node in program.graph.nodes)
        assert relative_error(program.module()(x), self.f(x)) < 1e-14


class TestJax:
    jax = pytest.importorskip("jax")
    backend = load_backend("jax")

    def f(self, x: Any) -> Any:
        return F.forward(self.backend, x)

    @pytest.mark.law("functional-transforms", "derivatives-of-projections")
    def test_under_jit_vmap_and_grad(self) -> None:
        x = self.jax.numpy.asarray(np.random.default_rng(0).normal(size=(3, F.n_in)))
        expected = np.asarray(x) @ MATRIX.T
        assert relative_error(self.jax.jit(self.jax.vmap(self.f))(x), expected) < 1e-13
        assert relative_error(self.jax.jvp(self.f, (x,), (2.0 * x,))[1], 2.0 * expected) < 1e-13
        grad = self.jax.jit(self.jax.grad(lambda x: (self.f(x) ** 2).sum()))(x)
        assert relative_error(grad, 2.0 * expected @ MATRIX) < 1e-13

    @pytest.mark.law("precision")
    def test_single_precision_with_64_bits_switched_off(self) -> None:
        with self.jax.enable_x64(False):
            x = self.jax.numpy.asarray(np.random.default_rng(0).normal(size=F.n_in), "float32")
            found = self.f(x)
        assert found.dtype == np.float32
        assert relative_error(found, MATRIX @ np.asarray(x, np.float64)) < 2.0**-20

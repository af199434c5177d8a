"""Decompositions under autograd: the same values, and the derivative of what they represent, or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.support.depth import LONG
from tnadapt.errors import BackendError

torch = pytest.importorskip("torch")

Fit = Callable[[Any], Any]

_TIGHT: dict[str, Any] = {"tol": 1e-15, "max_iterations": 500}
CLOSED: dict[str, Fit] = {
    "tensor_train": lambda x: tna.tensor_train(x, 2),
    "tucker": lambda x: tna.tucker(x, 2, max_iterations=0),
    "tucker of one mode": lambda x: tna.tucker(x, (2, 4, 3)),
    "tensor_ring": lambda x: tna.tensor_ring(x, (1, 2, 2), max_iterations=0),
    "tensor_ring of closed rank 2": lambda x: tna.tensor_ring(x, (2, 2, 2), max_iterations=0),
    "tt_matrix": lambda x: tna.tt_matrix(x.reshape(12, 4), 2, rows=(3, 4), cols=(2, 2)),
    "cp of a matrix": lambda x: tna.cp(x.reshape(8, 6), 2),
    "cp of a vector": lambda x: tna.cp(x.reshape(-1), 1),
    "cp of a matrix with a penalty": lambda x: tna.cp(x.reshape(8, 6), 2, ridge=0.1),
    "kronecker_decomposition": lambda x: tna.kronecker_decomposition(x.reshape(8, 6), [(2, 3), (4, 2)], 2),
}
_PRODUCT = [(2, 3), (2, 2), (2, 1)]
_NOISE = np.random.default_rng(0).normal(size=(60, 50))
ITERATED: dict[str, Fit] = {
    "tensor_train": lambda x: tna.tensor_train(x, 2, sweeps=500, tol=1e-15),
    "tensor_train from a start": lambda x: tna.tensor_train(x, 2, init=_fixed("tensor_train", x), **_TIGHT),
    "tucker": lambda x: tna.tucker(x, 2, **_TIGHT),
    "tucker, a factor fixed": lambda x: tna.tucker(x, 2, init=_fixed("tucker", x), fixed=[0], **_TIGHT),
    "tensor_ring": lambda x: tna.tensor_ring(x, (1, 2, 2), **_TIGHT),
    "cp": lambda x: tna.cp(x, 2, **_TIGHT),
    "cp with a penalty": lambda x: tna.cp(x, 2, ridge=0.02, **_TIGHT),
    "cp with a penalty, a factor fixed": lambda x: tna.cp(x, 2, init=_fixed("cp", x), fixed=[2], ridge=0.02, **_TIGHT),
    "cp, a factor fixed": lambda x: tna.cp(x, 2, init=_fixed("cp", x), fixed=[2], **_TIGHT),
    "kronecker_decomposition": lambda x: tna.kronecker_decomposition(x.reshape(8, 6), _PRODUCT, **_TIGHT),
    "hadamard_decomposition": lambda x: tna.hadamard_decomposition(x[:, :3, 0], 1, **_TIGHT),
}


def _tensor(seed: int = 0, shape: Sequence[int] = (4, 4, 3), noise: float = 0.1, dtype: Any = np.float64) -> Any:
    """Return a tensor near one of CP rank 2, of which iterations soon converge to an isolated optimum."""
    rng = np.random.default_rng(seed)
    factors = [np.linalg.qr(rng.normal(size=(size, 2)))[0] for size in shape]
    found = np.einsum("r,ar,br,cr->abc", [3.0, 2.0], *factors) + noise * rng.normal(size=shape)
    return torch.tensor(found.astype(dtype))


_STARTS: dict[str, Fit] = {
    "tensor_train": lambda x: tna.tensor_train(x, 2),
    "tucker": lambda x: tna.tucker(x, 2, max_iterations=0),
    "cp": lambda x: tna.cp(x, 2),
}


def _fixed(name: str, x: Any) -> Any:
    """A start that does not depend on the tensor that is decomposed."""
    return _STARTS[name](_tensor().to(x.dtype))


def _all_arrays(found: Any) -> Any:
    return torch.cat([array.reshape(-1) for array in found.arrays])


def _tensor_of(found: Any) -> Any:
    return found.to_tensor().reshape(-1)


def _check(fit: Fit, x: Any, of: Fit, step: float, tol: float) -> None:
    """Compare values with those of a detached tensor, and a gradient with differences of fourth order."""
    leaf = x.clone().requires_grad_()
    plain, found = fit(x), fit(leaf)
    assert all(torch.equal(a, b.detach()) for a, b in zip(plain.arrays, found.arrays, strict=True))
    assert found.outcome == plain.outcome
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(of(plain).shape, generator=generator, dtype=x.dtype)
    way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    (gradient,) = torch.autograd.grad((of(found) * cotangent.conj()).sum().real, leaf)

    def at(distance: float) -> float:
        return float((of(fit(x + distance * way)) * cotangent.conj()).sum().real)

    numeric = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    assert float((gradient * way.conj()).sum().real) == pytest.approx(numeric, rel=tol, abs=tol)


@pytest.mark.parametrize("of", [_tensor_of, _all_arrays])
@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_form_has_its_derivative(name: str, of: Fit) -> None:
    _check(CLOSED[name], _tensor(noise=0.5), of, step=1e-4, tol=1e-7)
    if of is _tensor_of and name in ("tensor_train", "tucker", "tensor_ring", "cp of a matrix"):
        rng = np.random.default_rng(3)
        x = torch.tensor(rng.normal(size=(4, 4, 3)) + 1j * rng.normal(size=(4, 4, 3)))
        _check(CLOSED[name], x, _tensor_of, step=1e-4, tol=1e-7)


@pytest.mark.parametrize(("name", "of"), [*((name, _tensor_of) for name in ITERATED), ("cp", _all_arrays)])
def test_an_iteration_has_the_derivative_of_its_optimum(name: str, of: Fit) -> None:
    # The results are an iteration's, exact to about 1e-9: differences over shorter steps are less exact than 1e-6.
    _check(ITERATED[name], _tensor(), of, step=4e-3, tol=1e-6)


@pytest.mark.parametrize(("name", "rank"), [("tucker", 2), ("cp", 2), ("tensor_ring", (1, 2, 2))])
def test_the_gradient_is_as_exact_as_the_result(name: str, rank: Any) -> None:
    gradients = []
    for fit in (lambda x: getattr(tna, name)(x, rank), ITERATED[name]):
        leaf = _tensor(noise=0.3).requires_grad_()
        _backward(fit(leaf))
        gradients.append(leaf.grad)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-3


def _differs_from_optimum(name: str, seed: int, dtype: Any, tol: float, iterations: int) -> float:
    """How far the gradient of a decomposition of noise, whose error is flat, is from that of the optimum in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, way = (torch.randn(6, 7, 5, generator=generator, dtype=dtype) for _ in range(2))
    gradients = []
    for leaf, least, most in ((x, tol, iterations), (x.double(), 1e-13, 5000)):
        words: dict[str, Any] = {"sweeps" if name == "tensor_train" else "max_iterations": most, "tol": least}
        words |= {"starts": 1} if name == "cp" else {}
        found = getattr(tna, name)(leaf.requires_grad_(), 2, **words)
        assert found.converged
        gradients.append(torch.autograd.grad((found.to_tensor() * way).sum(), leaf)[0].double())
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


@pytest.mark.parametrize(
    ("name", "seeds"),
    # In single precision the others of cp and tensor_ring have arrays that grow without end.
    [("cp", (0, 2, 3, 4, 5, 6, 7)), ("tensor_ring", (1, 2, 3, 6)), ("tensor_train", range(8)), ("tucker", range(8))],
)
def test_the_settings_that_are_advised_give_gradients_of_noise(name: str, seeds: Sequence[int]) -> None:
    for seed in range(8 if LONG else 1):
        assert _differs_from_optimum(name, seed, torch.float64, 1e-10, 2000) < 3e-2, seed
    for seed in seeds if LONG else seeds[:1]:
        assert _differs_from_optimum(name, seed, torch.float32, 0.0, 2000) < 3e-2, seed


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.sampled_from(["tensor_train", "tucker"]),
)
@example([3, 1], 2, 0, "tucker")
def test_the_derivative_of_truncations(shape: list[int], rank: int, seed: int, name: str) -> None:
    words = {"max_iterations": 0} if name == "tucker" else {}
    x = torch.tensor(np.random.default_rng(seed).normal(size=shape))
    _check(lambda y: getattr(tna, name)(y, rank, **words), x, _tensor_of, step=1e-6, tol=1e-4)


def test_single_precision_and_half() -> None:
    wide, gradients = _tensor(), []
    # Both begin at the minimum: else rounding decides how near to it they stop.
    best = tna.cp(wide, 2, max_iterations=100, tol=0.0)
    for x, init in ((wide, best), (wide.float(), best.to(dtype="float32")), (wide.bfloat16(), "svd")):
        leaf = x.clone().requires_grad_()
        tna.cp(leaf, 2, init=init).to_tensor().pow(3).sum().backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0.1, atol=0.2)


def test_equal_singular_values_in_the_span_matter_to_the_vectors_alone() -> None:
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    x = (q * torch.tensor([2.0, 2.0, 1.0, 0.5, 0.25])).requires_grad_()
    way = torch.arange(25.0, dtype=torch.float64).reshape(5, 5).sin()
    (gradient,) = torch.autograd.grad((tna.tensor_train(x, 2).to_tensor() * way).sum(), x)
    step = 1e-5 * way.cos()

    def at(x: Any) -> float:
        u, s, vh = torch.linalg.svd(x)
        return float(((u[:, :2] * s[:2]) @ vh[:2] * way).sum())

    with torch.no_grad():
        assert float((gradient * step).sum()) == pytest.approx((at(x + step) - at(x - step)) / 2, rel=1e-6)
    with pytest.raises(BackendError, match="singular vectors of equal singular values, so that it has no derivative"):
        tna.tensor_train(x, 2)[0].square().mul(way[:, :2]).sum().backward()


def test_single_precision_truncates_small_singular_values_that_are_distinct() -> None:
    (u, _), (v, _) = (np.linalg.qr(np.random.default_rng(seed).normal(size=(20, 20))) for seed in range(2))
    values = 2.0 ** -np.arange(20)
    for rank in (3, 6, 8, 10):
        x = torch.tensor((u * values @ v.T).astype(np.float32), requires_grad=True)
        (gradient,) = torch.autograd.grad(tna.tensor_train(x, rank).to_tensor().square().sum(), x)
        np.testing.assert_allclose(gradient.numpy(), 2 * (u * values)[:, :rank] @ v.T[:rank], atol=1e-6)


def test_small_terms_of_a_gradient_are_kept() -> None:
    (u, _), (v, _) = (np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8))) for seed in range(2))
    x = torch.tensor(u * [3.0, 2.9, 2.8, 1.0, 0.5, 0.4, 0.3, 0.2] @ v.T)
    way = torch.tensor(np.random.default_rng(2).normal(size=(8, 8)))

    def part(dtype: Any, share: float) -> Any:
        """The part that a small function of the singular vectors has in the gradient."""
        gradients = []
        for factor in (share, 0.0):
            leaf = x.to(dtype).requires_grad_()
            found = tna.cp(leaf, 3)
            of_vectors = (found.factors[0].square() * way[:, :3].to(dtype)).sum()
            total = (found.to_tensor() * way.to(dtype)).sum() + factor * of_vectors
            gradients.append(torch.autograd.grad(total, leaf)[0].double())
        return (gradients[0] - gradients[1]) / share

    for share in (1.0, 1e-2, 1e-3, 1e-4):
        torch.testing.assert_close(part(torch.float32, share), part(torch.float64, share), rtol=0.05, atol=1e-2)


def _backward(found: Any) -> None:
    found.to_tensor().sin().sum().backward()


def _recorded(x: Any) -> Any:
    return torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_()


def _second_derivative(fit: Fit, x: Any) -> None:
    (gradient,) = torch.autograd.grad(fit(x).to_tensor().sin().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: _backward(tna.tucker(x, 2, max_iterations=1, tol=0.0)), "has not converged.*larger max_iterations"),
        (lambda x: _backward(tna.cp(x, 2, max_iterations=1)), "has not converged"),
        (lambda x: tna.tucker(x, 2).core.sin().sum().backward(), r"which of the arrays .* differentiate .*to_tensor"),
        (lambda x: _backward(tna.cp(_recorded(torch.zeros(3, 4, 5)), 1)), "as of a tensor of zeros"),
        (lambda x: _backward(tna.cp(_recorded(torch.eye(40)[:, :, None] * torch.rand(30)), 20, max_iterations=500)),
         "of its 2220 parameters; at most 2048"),
        (lambda x: _backward(tna.tensor_train(_recorded(torch.eye(4)), 2)), "singular values 2 and 3 .* are equal"),
        (lambda x: _backward(tna.tensor_train(_recorded(torch.ones(4, 4)), 2)), "singular values 2 and 3 .* are equal"),
        (lambda x: _backward(tna.cp(_recorded(torch.ones(2, 4)), 2)), "singular values 2 and 3 .* are equal"),
        (lambda x: _backward(tna.tensor_train(_recorded(_NOISE), 5, svd="randomized")), "projections have not found"),
        (lambda x: tna.cp(x, 2, mask=np.arange(48).reshape(4, 4, 3) != 7),
         "with mask= or weights=, the tensor is not differentiated: detach the tensor"),
        (lambda x: tna.cp(x, 2, nonnegative=True), "with nonnegative=, the tensor is not differentiated"),
        (lambda x: tna.cp(x.detach(), 2, init=tna.cp(x, 2)), "init is not"),
        (lambda x: tna.tucker(x.detach(), 2, init=tna.tucker(x, 2)), "init is not differentiated: detach"),
        (lambda x: tna.tensor_ring(x.detach(), (1, 2, 2), init=tna.tensor_ring(x, (1, 2, 2))), "init is not"),
        (lambda x: tna.tensor_train(x, 2, init=tna.tensor_train(x, 2)), "init is not differentiated"),
        (lambda x: tna.cp(x, max_error=0.1), "give rank= instead, or detach the tensor"),
        (lambda x: tna.cp(x + 0.1j * _tensor(1), 2, max_iterations=500).to_tensor().abs().sum().backward(),
         "complex numbers that iterates is not differentiated"),
        (lambda x: _backward(tna.cp(_recorded(torch.ones(3, 3, 3)), 2, max_iterations=500)), "not an isolated minimum"),
        *((lambda x, fit=fit: _second_derivative(fit, x), "second derivatives of decompositions are not computed")
          for fit in (CLOSED["tensor_train"], ITERATED["cp"])),
    ],
)  # fmt: skip
def test_what_has_no_derivative_says_so(call: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(tna.TnadaptError, match=text):
        call(_tensor().requires_grad_())


def test_a_tensor_that_changed_before_the_backward_pass_is_noticed() -> None:
    moved = _tensor().requires_grad_() * 1.0
    found = tna.cp(moved, 2, max_iterations=500)
    with torch.no_grad():
        assert not any(array.requires_grad for array in tna.cp(moved, 2).arrays), "nothing is recorded"
        moved.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _backward(found)


# -- JAX -------------------------------------------------------------------------------------------------

_TRACED = {
    "cp": lambda x: tna.cp(x, 2),
    "tucker": lambda x: tna.tucker(x, 2),
    "tensor_ring": lambda x: tna.tensor_ring(x, 2),
    "tensor_train": lambda x: tna.tensor_train(x, 2, sweeps=3),
    "kronecker_decomposition": lambda x: tna.kronecker_decomposition(x, [(2, 2, 1), (2, 2, 3)]),
    "hadamard_decomposition": lambda x: tna.hadamard_decomposition(x, 2),
}


@pytest.mark.parametrize("name", _TRACED)
def test_what_iterates_is_refused_inside_a_trace(name: str) -> None:
    with pytest.raises(BackendError, match=r"iterates until it converges, which takes the values .* \(jax.jit"):
        torch.func.grad(lambda x: _TRACED[name](x))(_tensor())
    jax = pytest.importorskip("jax")
    for transform in (jax.jit, jax.grad):
        with pytest.raises(BackendError, match="iterates until it converges, which takes the values of the tensor"):
            transform(_TRACED[name])(_tensor().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor_train", "tucker", "tensor_ring of closed rank 2"])
def test_closed_forms_have_the_same_value_inside_of_traces(name: str) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        x, fit = _tensor(noise=0.5), CLOSED[name]
        plain = np.asarray(fit(x).to_tensor())
        host = jax.numpy.asarray(x.numpy())
        for found in (
            fit(host).to_tensor(),
            jax.jit(lambda y: fit(y).to_tensor())(host),
            jax.value_and_grad(lambda y: fit(y).to_tensor().sum())(host)[0] / plain.size,
            torch.func.vmap(lambda y: fit(y).to_tensor())(x[None])[0],
        ):
            expected = plain if np.ndim(found) else plain.mean()
            np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12)
        gradient = jax.grad(lambda y: jax.numpy.sin(fit(y).to_tensor()).sum())(host)
        leaf = x.clone().requires_grad_()
        fit(leaf).to_tensor().sin().sum().backward()
        np.testing.assert_allclose(np.asarray(gradient), leaf.grad.numpy(), atol=1e-8)

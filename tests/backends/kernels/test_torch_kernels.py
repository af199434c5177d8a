"""The kernels on tensors against the reference implementation: values, derivatives, and all torch transformations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.maps.fastfood import fwht_plain
from tnadapt.backends import load_backend

torch = pytest.importorskip("torch")
pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, within jvp


def plain(x: torch.Tensor, axis: int = -1, normalize: bool = True) -> torch.Tensor:
    backend = load_backend("torch")
    return backend.moveaxis(fwht_plain(backend, backend.moveaxis(x, axis, -1), normalize), -1, axis)


def compiled(x: torch.Tensor, axis: int = -1) -> bool:
    """Return whether the kernel accepts the tensor."""
    return load_backend("torch").fwht(x, 1.0, axis, torch.clone) is not None


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.law("kernels-agree")
@given(
    st.sampled_from(["float32", "float64"]),
    st.integers(1, 10),
    st.sampled_from(["C", "turned", "strided", "expanded", "Parameter"]),
    st.booleans(),
)
def test_it_equals_the_reference_implementation(dtype: str, bits: int, how: str, normalize: bool) -> None:
    x = torch.randn(4, 1 << bits, 3, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    x = {
        "C": lambda: x,
        "turned": lambda: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "strided": lambda: torch.stack((x, x), -1).flatten(-2)[..., ::2],
        "expanded": lambda: x[:1].expand(4, -1, -1),
        "Parameter": lambda: torch.nn.Parameter(x),
    }[how]()
    assert compiled(x, 1)
    found = tna.fwht(x, axis=1, normalize=normalize)
    tolerance = {"float32": 1e-5, "float64": 1e-13}[dtype]
    torch.testing.assert_close(found, plain(x, 1, normalize), rtol=tolerance, atol=tolerance * 2 ** (bits / 2))
    assert found.dtype is x.dtype
    assert found.requires_grad == x.requires_grad
    host = x.detach().numpy().copy()
    assert np.array_equal(found.detach().numpy(), tna.fwht(host, axis=1, normalize=normalize))


@pytest.mark.law("derivatives-of-projections")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_derivatives(axis: int) -> None:
    x = torch.randn(4, 8, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda t: tna.fwht(t, axis), x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: tna.fwht(t, axis).square(), x, check_fwd_over_rev=True)


@pytest.mark.law("functional-transforms")
@pytest.mark.parametrize("batched", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(x: torch.Tensor, batched: int, axis: int) -> None:
    x = torch.nn.functional.pad(x, (0, 3, 0, 0, 0, 1))  # (4, 8, 8)
    others = [size for i, size in enumerate(x.shape) if i != batched]
    found = torch.func.vmap(lambda t: tna.fwht(t, axis), in_dims=batched)(x)
    expected = torch.stack([plain(t, axis) for t in x.unbind(batched)])
    assert list(found.shape[1:]) == others
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.law("functional-transforms")
def test_transformations_within_each_other(x: torch.Tensor) -> None:
    one = torch.ones_like(x)
    ways = [
        lambda f: torch.func.vjp(f, x)[1](one)[0],
        lambda f: torch.func.jvp(f, (x,), (one,))[1],
        lambda f: torch.func.grad(lambda t: torch.func.grad(lambda s: f(s).sum())(t).sum())(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda t: f(t[None])[0].sum()))(x),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.jacfwd(f)(x),
        lambda f: torch.func.vmap(torch.func.vmap(lambda t: f(t[None, :, None])[0, :, 0], 1, 1))(x),
        lambda f: torch.func.functionalize(f)(x),
        lambda f: torch.func.functionalize(torch.func.grad(lambda t: f(t).sum()))(x),
        lambda f: torch.func.functionalize(torch.func.vmap(lambda t: f(t[None])[0]))(x),
        lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
        lambda f: torch.autograd.functional.hvp(lambda t: f(t).sum(), x, one)[1],
    ]
    for way in ways:
        found, expected = (
            way(lambda t, transform=transform: transform(t, 1).square()) for transform in (tna.fwht, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.law("autocast")
def test_inference_mode_and_autocast(x: torch.Tensor) -> None:
    with torch.inference_mode():
        found = tna.fwht(x, 1)
    torch.testing.assert_close(found, plain(x, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tna.fwht(x.float(), 1).dtype is torch.float32


def test_unsupported_tensors_use_plain_operations(x: torch.Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert not compiled(x.to("meta"), 1)
    assert tna.fwht(x.to("meta"), 1).device.type == "meta"
    with FakeTensorMode() as mode:
        assert not compiled(mode.from_tensor(x), 1)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        tna.fwht(x, 1)
    assert counter.get_total_flops() > 0

    class Mine(torch.Tensor):
        pass

    assert type(tna.fwht(x.as_subclass(Mine), 1)) is Mine


@pytest.mark.filterwarnings("ignore")  # of tracing itself
def test_dispatch_modes_record_operations(x: torch.Tensor) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    other = 2 * x
    for pre_dispatch in (False, True):
        graph = make_fx(lambda t: tna.fwht(t, 1), pre_dispatch=pre_dispatch)(x)
        torch.testing.assert_close(graph(other), plain(other, 1))
    whole = torch.compile(lambda t: tna.fwht(t, 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(other), plain(other, 1))
    x.requires_grad_()
    whole(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_zeros_that_have_no_memory(x: torch.Tensor) -> None:
    assert not tna.fwht(torch._efficientzerotensor((4, 8))).any()
    opposite = torch.complex(x, x).conj().imag
    assert opposite.is_neg()
    torch.testing.assert_close(tna.fwht(opposite, 1), plain(-x, 1))


def test_memory_that_was_freed_is_not_read() -> None:
    x = torch.randn(1 << 16)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory any more"):
        tna.fwht(x)


@pytest.mark.parametrize("how", ["C", "turned", "negated", "itself", "overlapping"])
def test_a_result_in_a_given_tensor(how: str) -> None:
    memory = torch.randn(2, 64)
    x = memory[0].reshape(8, 8)
    out = {
        "C": lambda: torch.empty(8, 8),
        "turned": lambda: torch.empty(8, 8).T,
        "negated": lambda: torch._neg_view(torch.empty(8, 8)),
        "itself": lambda: x,
        "overlapping": lambda: memory.view(-1)[5:69].reshape(8, 8),
    }[how]()
    expected, before = tna.fwht(x.clone()), out._version
    assert tna.fwht(x, out=out) is out
    assert torch.equal(out, expected)
    assert out._version > before


def test_a_given_tensor_and_derivatives() -> None:
    x, out = torch.randn(8, requires_grad=True), torch.zeros(8)
    for source, target in ((x, out), (x.detach(), torch.zeros(8, requires_grad=True))):
        with pytest.raises(tna.BackendError, match=r"no derivatives are recorded .* compute under torch.no_grad"):
            tna.fwht(source, out=target)
    with torch.no_grad():
        assert torch.equal(tna.fwht(x, out=out), tna.fwht(x))
    # What autograd saved of a tensor that is then written to is refused, as with torch's own operations.
    saved = torch.ones(8)
    y = (x * saved).sum()
    tna.fwht(torch.ones(8), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_given_tensor_in_transformations() -> None:
    x = torch.randn(3, 8)

    def into(t: torch.Tensor) -> torch.Tensor:
        return tna.fwht(t, out=torch.empty_like(t))

    assert torch.allclose(torch.func.vmap(into)(x), tna.fwht(x))
    assert torch.allclose(torch.func.functionalize(into)(x), tna.fwht(x))
    out = torch.empty(3, 8)
    torch.compile(lambda t, o: tna.fwht(t, out=o), backend="eager", fullgraph=True)(x, out)
    assert torch.allclose(out, tna.fwht(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_vectors(dtype: torch.dtype) -> None:
    """They skip checks, but not derivatives and transformations."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, tolerance = plain(x.double()), {"atol": 1e-5, "rtol": 1e-2 if dtype is torch.bfloat16 else 1e-5}
    found = tna.fwht(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, **tolerance)
    assert torch.equal(tna.fwht(torch.stack((x, x)))[1], found)
    assert torch.equal(tna.fwht(torch.stack((x, x), -1)[:, 0]), found)
    assert torch.equal(torch.func.vmap(tna.fwht)(torch.stack((x, x)))[0], found)
    x.requires_grad_()
    y = tna.fwht(x)
    assert torch.equal(torch.autograd.grad(y, x, y.detach())[0], tna.fwht(found))
    with torch.no_grad():
        assert not tna.fwht(x).requires_grad

"""F is computed in full precision where a setting allows less for products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.algebra.maps.fastfood import fwht_plain
from tnadapt.backends import get_backend

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "mv", "linear"}


def projections() -> dict[str, tna.Projection]:
    on_weights = {kind: tna.Projection.on_weights(kind, [(6, 4)], 0.5) for kind in ("dct2", "dft2")}
    return {**{kind: tna.Projection(kind, 5, 40) for kind in ("linear", "linear_v2", "normal")}, **on_weights}


class Products(TorchDispatchMode):
    """Record the dtypes in which products of matrices are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def allow_all() -> None:
    torch.set_float32_matmul_precision("high")


def allow_on_cpu() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.fixture(params=[allow_all, allow_on_cpu], ids=["high", "bf16 on the CPU"])
def reduced(request: pytest.FixtureRequest) -> Iterator[None]:
    cuda, host = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    request.param()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = cuda, host


@pytest.mark.parametrize("name", projections())
def test_no_product_is_in_single_precision(name: str, reduced: None, rng: np.random.Generator) -> None:
    f = projections()[name]
    x, y = rng.normal(size=f.n_in), rng.normal(size=f.n_out)
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    with Products() as products:  # no kernel runs under such a mode
        found = f(given)
        (pulled,) = torch.autograd.grad(found, given, torch.tensor(y, dtype=torch.float32))
        part = f.slice(given, 3, 17)
    if name != "dft2":  # by an FFT
        assert products.dtypes
    assert torch.float32 not in products.dtypes
    assert found.dtype == pulled.dtype == part.dtype == torch.float32
    for ours, exact in ((found, f(x)), (pulled, f.adjoint(y)), (part, f(x)[3:17])):
        assert np.allclose(ours.detach().numpy(), exact, rtol=1e-5, atol=1e-6)


def test_products_are_in_single_precision_by_default(rng: np.random.Generator) -> None:
    x = torch.tensor(rng.normal(size=64), dtype=torch.float32)
    with Products() as products:
        tna.fwht(x)
    assert set(products.dtypes) == {torch.float32}


def test_compiled(reduced: None) -> None:
    kinds: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        with Products() as products:
            graph(*inputs)
        kinds.extend(products.dtypes)
        return graph

    torch._dynamo.reset()
    x = torch.ones(2, 64)
    found = torch.compile(tna.fwht, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    assert set(kinds) == {torch.float64}
    assert torch.equal(found, tna.fwht(x))


def test_no_setting_is_changed(reduced: None) -> None:
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    seen: list[Any] = []

    class Settings(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
            return func(*args, **(kwargs or {}))

    with Settings():
        fwht_plain(get_backend(torch.ones(1)), torch.ones(64))
    assert set(seen) == {before}


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    program = " ".join(str(jax.make_jaxpr(tna.fwht)(jax.numpy.ones(256, dtype="float32"))).split())
    assert program.count("dot_general") == program.count("Precision.HIGHEST, Precision.HIGHEST") == 2

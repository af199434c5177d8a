"""What torch adds: second derivatives, compile, vmap, inference mode, half precision; and full precision of F."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

import tnadapt as tna
from tests.conftest import relative_error
from tests.support.depth import in_depth
from tnadapt.algebra.maps import KINDS, SQUARE, Dft2
from tnadapt.backends import get_backend

# -- What torch adds: second derivatives, compile, vmap, inference mode, half precision --------------------------------

P = tna.presets
SHAPES = [(4, 3)] * 4
FOUR = {"weights": 4, "rows": 4, "cols": 3}
PRESETS = {
    "dense": P.dense(),
    "lora": P.lora(2),
    "lokr": P.lokr(2),
    "krona": P.krona(),
    "loha": P.loha(2),
    "lonkr": P.lonkr(1, splits=3, split_size=2),
    "lotr": P.lotr(2, **FOUR),
    "lorta": P.lorta(2, order=3),
    "lorta_cp": P.lorta_cp(2, layers=2, rows=4, cols=3, heads=2),
    "fastfood": P.fastfood(0.3),
    "superlora": P.superlora(2),
    "fact_tt": P.fact_tt(2, **FOUR),
    "fact_tk": P.fact_tk(2, **FOUR),
    "cara": P.cara(2, heads=2, **FOUR),
    "compacter": P.compacter(1, terms=1),
    "fourierft": P.fourierft(5),
    **{f"F {kind}": P.superlora(1, projection=kind, ratio=1.0 if kind in SQUARE else 0.3) for kind in KINDS},
}


def drawn(plan: tna.UpdatePlan, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for name, shape in plan.param_shapes.items()
    }


@pytest.mark.law("derivatives-of-presets", "derivatives-of-projections")
@pytest.mark.parametrize("name", PRESETS)
def test_gradients_of_first_and_second_order(name: str) -> None:
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)
    params = drawn(plan)

    def function(*arrays: torch.Tensor) -> torch.Tensor:
        return plan.vector(dict(zip(params, arrays, strict=True)))

    arrays = tuple(params.values())
    assert torch.autograd.gradcheck(function, arrays)
    assert torch.autograd.gradgradcheck(lambda *a: function(*a).square(), arrays, atol=1e-4, fast_mode=True)


@pytest.mark.slow
@pytest.mark.law("compile")
@pytest.mark.parametrize(
    "name",
    in_depth(
        ["lora", "lonkr", "lorta", "cara", "F shuffle", "F linear", "F nonlinear_v2", "compacter"],
        ["F linear"],
    ),
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compile_in_one_graph_from_cold(name: str) -> None:
    torch._dynamo.reset()
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)  # fresh: the compiler meets every draw for the first time
    params = {
        name: (array + 0.1 * torch.ones_like(array)).requires_grad_()
        for name, array in plan.init("torch", "float64").items()
    }
    compiled = torch.compile(lambda p: (plan.deltas(p), plan.delta(p, 1), plan.vector(p, 5, 20)), fullgraph=True)
    deltas, delta, vector = compiled(params)
    plain = plan.deltas(params)
    for found, expected in zip([*deltas, delta, vector], [*plain, plain[1], plan.vector(params, 5, 20)], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    vector.sum().backward()
    assert all(array.grad is not None for array in params.values())
    # Other numbers of the same shapes: the same program.
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = {name: array.detach() * 2.0 for name, array in params.items()}
        with torch.no_grad():
            plan.deltas(other)
        compiled({name: (array.detach() * 2.0).requires_grad_() for name, array in params.items()})


COLD = """
import torch, tnadapt as tna
plan = tna.UpdatePlan(tna.presets.superlora(2, projection="nonlinear", ratio=0.5), [(8, 8)])
params = {name: torch.randn(shape, requires_grad=True) for name, shape in plan.param_shapes.items()}
"""

EXPORT = """
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.arrays = torch.nn.ParameterList(array.detach() for array in params.values())
    def forward(self, x):
        return plan.vector(dict(zip(params, self.arrays))) * x
model, x = Model(), torch.ones(1)
exported = torch.export.export(model, (x,), strict=False).module()
torch.testing.assert_close(exported(x), model(x))
"""

COMPILE = """
found = torch.compile(lambda given: plan.vector(given), backend="aot_eager", fullgraph=True)(params)
assert type(found) is torch.Tensor, type(found)
torch.testing.assert_close(found, plan.vector(params), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.law("compile")
@pytest.mark.parametrize("script", [COLD + COMPILE, COLD + EXPORT + COMPILE], ids=["compile", "export, then compile"])
def test_the_first_thing_that_a_process_does_may_be_compiling(script: str) -> None:
    # The compiler must not be the first to see a tensor: it would trace how its backend is loaded. An export without
    # Dynamo must not leave its placeholders in caches that the compiler reads next.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.law("functional-transforms")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, within jvp
@pytest.mark.parametrize("name", list(PRESETS))
def test_vmap_grad_and_jvp(name: str) -> None:
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)
    params = {key: array.detach() for key, array in drawn(plan).items()}
    stacked = {key: torch.stack([array, 2.0 * array]) for key, array in params.items()}
    found = torch.func.vmap(lambda p: plan.vector(p))(stacked)
    for i in range(2):
        alone = plan.vector({key: array[i] for key, array in stacked.items()})
        torch.testing.assert_close(found[i], alone, rtol=1e-12, atol=1e-12)
    if name == "F nonlinear":
        grads = torch.func.grad(lambda p: plan.vector(p).square().sum())(params)
        way = {key: torch.ones_like(array) for key, array in params.items()}
        _, slope = torch.func.jvp(lambda p: plan.vector(p).square().sum(), (params,), (way,))
        torch.testing.assert_close(slope, sum(grad.sum() for grad in grads.values()))


@pytest.mark.law("no-global-random-state")
def test_draws_first_met_in_inference_mode_can_be_trained_through() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plan = tna.UpdatePlan(P.superlora(2, projection="nonlinear", ratio=0.5), SHAPES)
    params = drawn(plan, torch.float32)
    with torch.inference_mode():
        plan.deltas({key: array.detach() for key, array in params.items()})
        plan.delta({key: array.detach() for key, array in params.items()}, 1)
    plan.vector(params).sum().backward()
    assert all(bool(array.grad.any()) for array in params.values())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.law("precision", "fresh-is-zero")
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 5e-3)])
def test_lower_precision(name: str, dtype: str, tolerance: float) -> None:
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)
    params = {key: array.detach().to(getattr(torch, dtype)) for key, array in drawn(plan).items()}
    found = plan.vector(params)
    assert found.dtype is getattr(torch, dtype)
    exact = plan.vector({key: array.double() for key, array in params.items()})
    assert float((found.double() - exact).abs().max()) < tolerance * float(exact.abs().max())
    assert not any(bool(delta.any()) for delta in plan.deltas(plan.init("torch", dtype)))


LARGER = [(48, 32)] * 3
NONLINEAR = {
    "cp": tna.Config(rank=4, groups=1, fold="hypercube", projection="nonlinear", ratio=0.3),
    "dense": P.fastfood(0.3, projection="nonlinear"),
    "tucker": tna.Config(rank=2, groups=1, fold="hypercube", format="tucker", splits=2, terms=2, ratio=0.3,
                         projection="nonlinear_v2"),
}  # fmt: skip


# The compiler may round otherwise than the operations alone do.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    in_depth(
        [*itertools.product(NONLINEAR, ["float32", "bfloat16", "float16"])],
        [("tucker", "bfloat16")],
    ),
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_start_is_exactly_zero(name: str, dtype: str) -> None:
    torch._dynamo.reset()
    plan = tna.UpdatePlan(NONLINEAR[name], LARGER)
    params = plan.init("torch", dtype)
    for delta in torch.compile(lambda p: plan.deltas(p), fullgraph=True)(params):
        assert delta.dtype is getattr(torch, dtype)
        assert not bool(delta.any())


@pytest.mark.law("precision")
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 4e-3), ("float16", 2e-3)])
@pytest.mark.parametrize("move", [1e-1, 1e-2, 1e-3])
def test_a_small_nonlinear_update_in_half_precision_is_not_noise(dtype: str, tolerance: float, move: float) -> None:
    plan = tna.UpdatePlan(NONLINEAR["cp"], LARGER)
    generator = torch.Generator().manual_seed(0)
    begun = plan.init("torch", dtype)
    params = {}
    for key, array in begun.items():
        way = torch.randn(array.shape, generator=generator)
        params[key] = array + (move * array.float().abs().mean() * way).to(array.dtype)
    exact = plan.vector({key: array.double() for key, array in params.items()})
    # In double precision the start is that of double precision: subtract what rounding the start made of it.
    exact = exact - plan.vector({key: array.double() for key, array in begun.items()})
    error = (plan.vector(params).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert float(error) < tolerance


@pytest.mark.law("autocast")
@pytest.mark.parametrize("name", PRESETS)
def test_autocast_does_not_reach_into_an_update(name: str) -> None:
    plan = tna.UpdatePlan(PRESETS[name], SHAPES)
    params = drawn(plan, torch.float32)
    expected = plan.vector(params)
    with torch.autocast("cpu", torch.bfloat16):
        found = plan.vector(params)
        whole = plan.deltas(params)
    assert torch.equal(found, expected)
    assert torch.equal(torch.cat([delta.reshape(-1) for delta in whole]), expected)
    found.sum().backward()
    assert all(array.grad.dtype is torch.float32 for array in params.values())


# -- F is computed in full precision where a setting allows less for products of matrices ------------------------------

PRODUCTS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "mv", "linear"}


def projections() -> dict[str, tna.Projection]:
    on_weights = {kind: tna.Projection.on_weights(kind, [(6, 4)], 0.5) for kind in ("dct2", "dft2")}
    return {**{kind: tna.Projection(kind, 5, 40) for kind in ("linear", "linear_v2", "normal")}, **on_weights}


def precisions() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


class Products(TorchDispatchMode):
    """Record the dtypes in which products of matrices are computed, and the settings of their precision."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[Any] = []
        self.settings = set[tuple[str, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes.append(args[-1].dtype)
            self.settings.add(precisions())
        return func(*args, **(kwargs or {}))


def allow_all() -> None:
    torch.set_float32_matmul_precision("high")


def allow_on_cpu() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.fixture(params=[allow_all, allow_on_cpu], ids=["high", "bf16 on the CPU"])
def reduced(request: pytest.FixtureRequest) -> Iterator[None]:
    cuda, host = precisions()
    request.param()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = cuda, host


@pytest.mark.parametrize("name", projections())
def test_no_product_is_in_single_precision(name: str, reduced: None, rng: np.random.Generator) -> None:
    f = projections()[name]
    x, y = rng.normal(size=f.n_in), rng.normal(size=f.n_out)
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    settings = precisions()
    with Products() as products:  # no kernel runs under such a mode
        found = f(given)
        (pulled,) = torch.autograd.grad(found, given, torch.tensor(y, dtype=torch.float32))
        part = f.slice(given, 3, 17)
    if name != "dft2":  # by an FFT
        assert products.dtypes
    assert torch.float32 not in products.dtypes
    assert products.settings <= {settings}
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


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    program = " ".join(str(jax.make_jaxpr(tna.fwht)(jax.numpy.ones(256, dtype="float32"))).split())
    assert program.count("dot_general") == program.count("Precision.HIGHEST, Precision.HIGHEST") == 2


# ----------------------------------------------------------------------------------------------------------------------
# Importing and attaching does not import torch's compiler, and what it reads of this package is marked as it does


def test_torchs_compiler_is_imported_when_it_is_needed() -> None:
    code = """
import sys, torch, tnadapt as tna
model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "v_proj": torch.nn.Linear(4, 4)})
adapter = tna.torch.attach(model, "lora", rank=1)
model["q_proj"](torch.ones(2, 4)).sum().backward()
with torch.no_grad():
    model["q_proj"](torch.ones(2, 4))
adapter.merge()
adapter.unmerge()
print("torch._dynamo" in sys.modules)
with tna.torch.rows(model, ["default", None]):
    model["q_proj"](torch.ones(2, 4))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


# -- The FFT of torch and JAX ----------------------------------------------------------------------------------------

DFT = Dft2(42, 42, shape=(6, 7))


@pytest.fixture
def with_fft(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these short sides, the products are faster."""
    monkeypatch.setattr("tnadapt.algebra.maps._transforms._PRODUCTS_PER_STEP", 0)


@pytest.mark.usefixtures("with_fft")
class TestDft2:
    """The FFT under what transforms programs: derivatives, batches, compilers, export."""

    def f(self, x: Any) -> Any:
        return DFT.forward(get_backend(x), x)

    def drawn(self, *batch: int) -> Any:
        return torch.from_numpy(np.random.default_rng(0).normal(size=(*batch, DFT.n_in)))

    @pytest.mark.law("derivatives-of-projections")
    # torch's own forward derivatives compile some of theirs with what torch calls deprecated.
    @pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
    def test_derivatives_in_both_modes(self) -> None:
        x = self.drawn(2).requires_grad_()
        assert torch.autograd.gradcheck(self.f, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: self.f(x).square(), x)

    @pytest.mark.law("functional-transforms")
    @pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
    def test_functional_transforms(self) -> None:
        func, x = torch.func, self.drawn(3)
        assert relative_error(func.vmap(self.f, in_dims=1, out_dims=1)(x.T), self.f(x).T) < 1e-14
        assert relative_error(func.jvp(self.f, (x,), (2.0 * x,))[1], 2.0 * self.f(x)) < 1e-14
        each = func.vmap(func.grad(lambda x: self.f(x).square().sum()))(x)
        assert relative_error(each, 2.0 * self.f(self.f(x))) < 1e-14
        assert relative_error(func.functionalize(self.f)(x), self.f(x)) < 1e-14

    def test_autocast_does_not_round(self) -> None:
        for x in (self.drawn(2), self.drawn(2).float()):
            expected = self.f(x)
            with torch.autocast("cpu"):
                found = self.f(x)
            assert found.dtype is x.dtype
            assert torch.equal(found, expected)

    def test_shapes_without_numbers(self) -> None:
        assert self.f(torch.empty(2, DFT.n_in, device="meta")).shape == (2, DFT.n_out)

    @pytest.mark.slow
    @pytest.mark.law("compile")
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    @pytest.mark.parametrize("derivative", [False, True])
    def test_compiled_in_one_graph(self, derivative: bool) -> None:
        way = torch.func.grad(lambda x: self.f(x).square().sum()) if derivative else self.f
        x = self.drawn(2).requires_grad_()
        torch.compiler.reset()
        found = torch.compile(way, fullgraph=True)(x)
        assert relative_error(found.detach(), way(x).detach()) < 1e-14
        if not derivative:
            (grad,) = torch.autograd.grad(found.square().sum(), x)
            assert relative_error(grad, 2.0 * self.f(self.f(x.detach()))) < 1e-14

    def test_an_exported_program_has_no_complex_numbers(self) -> None:
        class Module(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(module, x: Any) -> Any:  # noqa: N805
                return self.f(x)

        x = self.drawn(2)
        program = torch.export.export(Module(), (x,))
        assert not any("fft" in str(node.target) for node in program.graph.nodes)
        assert relative_error(program.module()(x), self.f(x)) < 1e-14

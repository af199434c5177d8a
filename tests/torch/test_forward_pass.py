"""The ways through a layer: each gives what the general one gives, and takes only the cases that it is for."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .internals import LowRankLayer, forms, forward_pass
from .small import stir

# ----------------------------------------------------------------------------------------------------------------------
# The shortest way through a layer gives the bits of the general one, and leaves it whatever is out of the ordinary


def layers(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5))


def adapted(model: nn.Module, name: str = "default", **how: Any) -> tt.Adapter:
    settings = {"cfg": P.lora(2, alpha=3), "targets": "all-linear", **how}
    adapter = tt.attach(model, name=name, strategy="factored", **settings)
    stir(adapter, 0.5)
    return adapter


@contextlib.contextmanager
def general(model: nn.Module) -> Iterator[None]:
    """Without the shortest way."""
    before = [(module.forward, module.forward.short) for module in model.modules() if "forward" in vars(module)]
    for patch, _ in before:
        patch.short = None
    try:
        yield
    finally:
        for patch, short in before:
            patch.short = short


@contextlib.contextmanager
def taken() -> Iterator[list[bool]]:
    """Collect for each call whether the shortest way was taken."""
    found: list[bool] = []
    original = LowRankLayer.__call__

    def call(self: LowRankLayer, x: Any) -> Tensor | None:
        y = original(self, x)
        found.append(y is not None)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankLayer, "__call__", call)
        yield found


def passed(model: nn.Module, x: Tensor, gradients: bool) -> list[Tensor | None]:
    """Return the output and all gradients; None is one that is not computed."""
    model.zero_grad()
    x = x.detach().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        y = model(x)
    if not gradients:
        return [y]
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.law("attached-is-update", "half-precision-base")
@given(
    shape=st.sampled_from([(6,), (3, 6), (2, 3, 6), (0, 6)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    of_base=st.booleans(),
    weights=st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=1, max_size=3),
    bias=st.booleans(),
    gradients=st.booleans(),
    frozen=st.booleans(),
    large=st.booleans(),
)
@example((3, 6), torch.float32, True, [1.0], True, True, False, True)
@example((3, 6), torch.float32, True, [1.0], True, False, False, True)
def test_it_gives_the_bits_of_the_general_way(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    of_base: bool,
    weights: list[float],
    bias: bool,
    gradients: bool,
    frozen: bool,
    large: bool,
) -> None:
    """Also where the factors have another dtype than the base; it is not for large layers with gradients."""
    model = layers(bias).to(dtype)
    for index, weight in enumerate(weights):
        adapter = adapted(model, f"a{index}", **({"dtype": dtype} if of_base else {}))
        adapter.set_weight(weight)
        if frozen and index == 0:
            adapter.set_trainable(arrays="factor1")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = gradients and any(weights)
    is_alike = of_base or dtype == torch.float32
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(forms, "MOST_ELEMENTS", -1)
        with taken() as short:
            found = passed(model, x, gradients)
        assert short == [any(weights) and not (large and gradients and is_alike)] * 2
        with general(model):
            expected = passed(model, x, gradients)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if one is not None and other is not None else one is other


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def within(*contexts: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a call of the model within contexts, each made anew from the model."""

    def call(model: nn.Module, x: Tensor) -> Tensor:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(model))
            return model(x)

    return call


#: Calls that need the general way.
CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "rows": within(lambda model: tt.rows(model, ["default", None, "default", None])),
    "autocast": within(lambda model: torch.autocast("cpu", dtype=torch.bfloat16)),
    "dispatch mode": within(lambda model: Watching()),
    "vmap": lambda model, x: torch.vmap(model)(x),
    "forward mode": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "strides": lambda model, x: model[0](x.T.contiguous().T),
    "jagged": lambda model, x: model(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)).values(),
}


# torch's own: forward_ad registers its decompositions by torch.jit.script. From torch 2.15 on it is a FutureWarning.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CALLS)
def test_other_calls_take_the_general_way(name: str) -> None:
    model = layers()
    adapted(model)
    x = torch.randn(4, 6)
    with torch.no_grad(), taken() as short:
        found = CALLS[name](model, x)
    assert short
    assert not any(short)
    with torch.no_grad(), general(model):
        assert torch.equal(found, CALLS[name](model, x))


def test_factors_of_several_dtypes_and_dropout_in_training_take_the_general_way() -> None:
    model = layers().to(torch.bfloat16)
    adapted(model, "one")
    adapted(model, "two", dtype=torch.bfloat16)
    x = torch.randn(4, 6).to(torch.bfloat16)
    with taken() as short:
        y = model(x)
    assert short == [False] * 2
    with general(model):
        assert torch.equal(y, model(x))
    model, x = layers(), torch.randn(4, 6)
    adapted(model, dropout=0.5)
    with taken() as short:
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert short == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    "how",
    [
        {"cfg": P.lokr(2)}, {"cfg": P.dora(2)}, {"cfg": P.loha(2)}, {"cfg": P.lora(2, start="random")},
        {"activation": "gelu"}, {"targets": [tna.Target("0", (8, 6), rows=tna.Rows(0, 4, 8))]},
    ],
    ids=["Kronecker", "magnitude", "computed factors", "subtracted start", "activation", "rows"],
)  # fmt: skip
def test_other_updates_have_no_short_way(how: dict[str, Any]) -> None:
    model, x = layers(), torch.randn(4, 6)
    adapter = adapted(model, **how)
    with taken() as short:
        model(x)
        if how.keys() == {"cfg"} and adapter.config.apply == "add":
            adapted(model, "ordinary")
            model(x)
            assert not short
            adapter.detach()
            model(x)
            assert short == [True, True]
            return
    assert not short


# -- Linear layers on few rows without gradients: the update is multiplied by them instead of added to the weight ------


CONFIGS = {
    "superlora": P.superlora(3),
    "lorta": P.lorta(3),
    "dense": P.dense(),
    "F": P.superlora(2, projection="linear", ratio=0.1),
    "nonlinear": P.superlora(2, projection="nonlinear", ratio=0.1),
    "unilora": P.unilora(50),
    "loha": P.loha(2),
}
SIZE = 256
assert SIZE**2 >= forward_pass.LEAST_ELEMENTS


def square_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)).to(dtype)


def attached(model: nn.Module, config: Any, **how: Any) -> tt.Adapter:
    adapter = tt.attach(model, config, "all-linear", strategy="weight", **how)
    stir(adapter)
    return adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, forms.BLOCK), (4, forms.BLOCK // 3 + 5)])
def test_a_half_precision_sum_has_the_bits_of_the_plain_one_and_needs_no_wide_copy(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype)
    adapter = attached(model, P.lora(1))
    x = torch.randn(33, shape[1], dtype=dtype)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        found = model(x)
    wide = [event for event in profile.events() if event.self_cpu_memory_usage >= 4 * shape[0] * shape[1]]
    assert len(wide) == 1  # the update
    weight = (model[0].weight.float() + adapter.deltas()[0]).to(dtype)
    assert torch.equal(found, nn.functional.linear(x, weight, model[0].bias))
    assert torch.equal(model(x), found)  # with gradients


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the numbers of elements of sums of the weight's size."""
    formed: list[int] = []
    plain = forms.summed
    monkeypatch.setattr(forms, "summed", lambda w, *rest: formed.append(w.numel()) or plain(w, *rest))
    return formed


@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_formula(name: str, dtype: torch.dtype, sums: list[int]) -> None:
    model = square_layers(dtype)
    adapter = attached(model, CONFIGS[name])
    for shape in ((SIZE,), (1, SIZE), (1, 1, SIZE), (2, 2, SIZE), (0, SIZE)):
        x = torch.randn(shape, dtype=dtype)
        expected = x.double()
        for layer, delta in zip(model, adapter.deltas(), strict=True):
            total = layer.weight.detach().double() + delta.detach().double()
            expected = expected @ total.T + (0 if layer.bias is None else layer.bias.detach().double())
        with torch.no_grad():
            found = model(x)
        assert found.dtype == dtype
        assert found.shape == x.shape
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        error = float((found.double() - expected).abs().max()) / scale if expected.numel() else 0.0
        # A layer rounds W x, ΔW, ΔW x and their sum: four half units each.
        assert error <= 8 * torch.finfo(dtype).eps
    assert not sums


def test_many_rows_and_small_weights_form_the_sum(sums: list[int]) -> None:
    small = nn.Sequential(nn.Linear(8, 8))
    for model, rows in ((square_layers(), 5), (small, 1)):
        attached(model, CONFIGS["superlora"])
        with torch.no_grad():
            model(torch.randn(rows, model[0].in_features))
    assert sums == [SIZE**2, SIZE**2, 64]


def compiled(model: nn.Module, seen: list[str]) -> Any:
    def keep(graph: Any, inputs: object) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=keep)


@pytest.mark.slow
@pytest.mark.law("compile")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["superlora", "F", "unilora"])
def test_a_compiled_program_reads_the_cache(name: str) -> None:
    torch._dynamo.reset()
    model, seen = square_layers(), list[str]()
    adapter = attached(model, CONFIGS[name])
    program, x = compiled(model, seen), torch.randn(1, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
        assert sum("update_product" in name for name in seen) == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            for parameter in adapter.parameters():
                parameter.data.mul_(1.25)
            torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
            adapter.set_weight(0.0)
            assert torch.equal(program(x), model(x))
            adapter.set_weight(1.0)
        other = copy.deepcopy(model)
        for parameter in adapter.parameters():
            parameter.mul_(2.0)
        for whole in (other, model):  # a copy has a cache of its own
            torch.testing.assert_close(torch.compile(whole, backend="aot_eager")(x), whole(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_program_computes_the_update_itself_on_a_device() -> None:
    torch._dynamo.reset()
    model, seen = square_layers(), list[str]()
    attached(model, CONFIGS["superlora"])
    program = compiled(model.to("meta"), seen)
    with torch.no_grad():
        for shape in ((SIZE,), (1, SIZE), (1, 1, SIZE)):
            assert program(torch.empty(shape, device="meta")).shape == shape
    assert seen
    assert not any("update_product" in name for name in seen)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_computes_the_update_itself(strict: bool) -> None:
    model = square_layers()
    attached(model, CONFIGS["superlora"])
    x = torch.randn(1, SIZE)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        assert "update_product" not in str(program.graph)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_operator_is_one_of_torch() -> None:
    model = square_layers()
    adapter = attached(model, CONFIGS["superlora"])
    cache = model._tnadapt_adapters[adapter.name].cache
    arrays = [dict(adapter.named_parameters())[name].detach() for name in cache.names(0)]
    torch.library.opcheck(
        torch.ops.tnadapt.update_product.default,
        (torch.randn(2, 3, SIZE), arrays, cache.number, 0, SIZE),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_program_is_compiled_again_for_another_cache() -> None:
    torch._dynamo.reset()
    model = square_layers()
    adapter = attached(model, CONFIGS["superlora"].replace(start="given"))
    x = torch.randn(1, SIZE)
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = program(x)
        # Another plan, whose updates are differences from other arrays, takes the place of the adapter's.
        adapter.reset()
        adapter.start_from({name: torch.ones(shape) for name, shape in adapter.plan.param_shapes.items()})
        stir(adapter)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(program(x), before)

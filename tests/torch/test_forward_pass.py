"""The ways through a layer: each gives what the general one gives, and takes only the cases that it is for."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.targets.target import Rows, Target
from tnadapt.torch import _forward_pass as _few_rows
from tnadapt.torch import _forward_patch
from tnadapt.torch import _linear as _low_rank_linear
from tnadapt.torch._forward_pass import LowRankLayer
from tnadapt.torch._forward_patch import ForwardPatch
from tnadapt.torch._linear import BLOCK, can_sum_in_blocks, sum_in_blocks

from .small import stir

# ----------------------------------------------------------------------------------------------------------------------
# The shortest way through a layer gives the bits of the general one, and leaves it whatever is out of the ordinary


def layers(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5))


def adapted(model: nn.Module, name: str = "default", config: tna.Config | None = None, **how: Any) -> tt.Adapter:
    adapter = tt.attach(model, config or P.lora(2, alpha=3), "all-linear", name, strategy="factored", **how)
    stir(adapter, 0.5)
    return adapter


def patches(model: nn.Module) -> list[ForwardPatch]:
    return [patch for module in model.modules() if (patch := ForwardPatch.of(module)) is not None]


@contextlib.contextmanager
def general(model: nn.Module) -> Iterator[None]:
    """Without the shortest way."""
    before = [(patch, patch.short) for patch in patches(model)]
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
    """Return the output and all gradients."""
    model.zero_grad()
    x = x.detach().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        y = model(x)
    if not gradients:
        return [y]
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Compare outputs and gradients; None is a gradient that is not computed."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.law("attached-is-update")
@given(
    shape=st.sampled_from([(6,), (3, 6), (2, 3, 6), (0, 6)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    weights=st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=1, max_size=3),
    bias=st.booleans(),
    gradients=st.booleans(),
    frozen=st.booleans(),
)
def test_it_gives_the_bits_of_the_general_way(
    shape: tuple[int, ...], dtype: torch.dtype, weights: list[float], bias: bool, gradients: bool, frozen: bool
) -> None:
    model = layers(bias).to(dtype)
    for index, weight in enumerate(weights):
        adapter = adapted(model, f"a{index}", dtype=dtype)
        adapter.set_weight(weight)
        if frozen and index == 0:
            adapter.set_trainable(arrays="factor1")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = gradients and any(weights)
    with taken() as short:
        found = passed(model, x, gradients)
    assert short == [any(weights)] * 2
    with general(model):
        expected = passed(model, x, gradients)
    assert_same_bits(found, expected)


class Sees(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_rows(model: nn.Module, x: Tensor) -> Tensor:
    with tt.rows(model, ["default", None, "default", None]):
        return model(x)


def in_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def watched(model: nn.Module, x: Tensor) -> Tensor:
    with Sees():
        return model(x)


def pushed(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


#: Calls that need the general way.
CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "rows": in_rows,
    "autocast": in_autocast,
    "dispatch mode": watched,
    "vmap": lambda model, x: torch.vmap(model)(x),
    "forward mode": pushed,
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


@pytest.mark.law("half-precision-base")
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]),
    weights=st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=1, max_size=3),
    shape=st.sampled_from([(6,), (3, 6), (2, 3, 6)]),
    gradients=st.booleans(),
    large=st.booleans(),
)
def test_factors_of_another_dtype_give_the_bits_of_the_general_way(
    dtype: torch.dtype, weights: list[float], shape: tuple[int, ...], gradients: bool, large: bool
) -> None:
    model = layers().to(dtype)
    for index, weight in enumerate(weights):
        adapted(model, f"a{index}").set_weight(weight)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = gradients and any(weights)
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(_low_rank_linear, "MOST_ELEMENTS", -1)
        with taken() as short:
            found = passed(model, x, gradients)
        assert short == [any(weights)] * 2
        with general(model):
            expected = passed(model, x, gradients)
    assert_same_bits(found, expected)


def test_factors_of_several_dtypes_take_the_general_way() -> None:
    model = layers().to(torch.bfloat16)
    adapted(model, "one")
    adapted(model, "two", dtype=torch.bfloat16)
    x = torch.randn(4, 6).to(torch.bfloat16)
    with taken() as short:
        y = model(x)
    assert short == [False] * 2
    with general(model):
        assert torch.equal(y, model(x))


def test_factors_are_computed_once_where_they_cannot_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers().to(torch.bfloat16)
    adapted(model, config=P.loha(2))
    calls: list[object] = []
    original = _forward_patch.factors

    def counted(slot: Any) -> Any:
        calls.append(slot)
        return original(slot)

    monkeypatch.setattr(_forward_patch, "factors", counted)
    model(torch.randn(4, 6).to(torch.bfloat16))
    assert len(calls) == 2  # one for each layer


def test_large_layers_with_gradients_take_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    adapted(model)
    monkeypatch.setattr(_low_rank_linear, "MOST_ELEMENTS", 4)
    with taken() as short:
        model(torch.randn(4, 6))
        with torch.no_grad():
            model(torch.randn(4, 6))
    assert short == [False, False, True, True]


def test_dropout_acts_in_training_alone() -> None:
    model = layers()
    adapted(model, dropout=0.5)
    x = torch.randn(4, 6)
    with taken() as short:
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert short == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    "how",
    [
        {"config": P.lokr(2)}, {"config": P.dora(2)}, {"config": P.loha(2)}, {"config": P.lora(2, start="random")},
        {"activation": "gelu"},
    ],
    ids=["Kronecker", "magnitude", "computed factors", "subtracted start", "activation"],
)  # fmt: skip
def test_other_updates_have_no_short_way(how: dict[str, Any]) -> None:
    model = layers()
    adapted(model, **how)
    assert [patch.short for patch in patches(model)] == [None, None]
    # Neither has an ordinary one next to it, until it is alone.
    if "activation" not in how and how["config"].apply == "add":
        adapted(model, "other")
        assert [patch.short for patch in patches(model)] == [None, None]
        tt.adapters(model)["default"].detach()
        assert all(patch.short is not None for patch in patches(model))


def test_rows_of_a_weight_have_no_short_way() -> None:
    model = nn.Sequential(nn.Linear(6, 12))
    tt.attach(model, P.lora(2), [tna.Target("0", (12, 6), rows=tna.Rows(0, 6, 12))], strategy="factored")
    assert [patch.short for patch in patches(model)] == [None]


def test_it_reads_what_the_model_has_at_each_call() -> None:
    model = layers()
    adapter = adapted(model)
    x = torch.randn(4, 6)
    first = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    assert not torch.equal(model(x), first)
    state = {name: value * 2 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with taken() as short:
        found = model(x)
        inside = torch.func.functional_call(model, {name: value * 0.5 for name, value in state.items()}, (x,))
        adapter.merge()
        merged = model(x)
        adapter.unmerge()
        with adapter.disabled():
            base = model(x)
    assert short == [True] * 4 + [False] * 4
    with general(model):
        assert torch.equal(found, model(x))
    assert not torch.equal(inside, found)
    assert not torch.equal(base, found)
    torch.testing.assert_close(merged, found)


@pytest.mark.law("activation-checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    found = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=reentrant)):
        model = layers()
        adapter = adapted(model)
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        run(model, x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in adapter.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_recomputation_with_other_settings_is_an_error(stepped: bool) -> None:
    model = nn.Sequential(layers())
    adapter = tt.attach(model, P.lora(2), "all-linear", strategy="factored")
    stir(adapter, 0.5)
    inner = model[0].forward
    model[0].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    x = torch.randn(4, 6, requires_grad=True)
    if stepped:  # settings are forgotten once the arrays change
        adapter.set_weight(0.5)
        model(x).sum().backward()
        stir(adapter, 0.5)
        adapter.set_weight(1.0)
    y = model(x)
    adapter.set_weight(0.5)
    with pytest.raises(RuntimeError, match="was activated, mixed, merged or disabled, or rows"):
        y.sum().backward()


def test_the_pass_counts_as_one_that_used_the_adapter() -> None:
    model = layers()
    adapted(model)
    with taken() as short:
        model(torch.randn(4, 6))  # a warning would be an error
    assert short == [True, True]
    state = patches(model)[0].weights[0].slots[0].adapter
    assert state.threads == {threading.get_ident()}


def test_copies_have_a_short_way_of_their_own() -> None:
    model = layers()
    adapter = adapted(model)
    other = copy.deepcopy(model)
    x = torch.randn(4, 6)
    assert torch.equal(other(x), model(x))
    before = other(x)
    for parameter in adapter.parameters():
        parameter.data.zero_()
    assert torch.equal(other(x), before)
    assert not torch.equal(model(x), before)
    own, others = patches(model)[0].short, patches(other)[0].short
    assert own is not None
    assert others is not None
    assert others.host is other[0]
    assert own.host is model[0]


@pytest.mark.slow
def test_a_compiled_program_has_the_general_way() -> None:
    model = layers()
    adapter = adapted(model)
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with taken() as short:
        found = compiled(x)
    assert short == []
    torch.testing.assert_close(found, model(x))
    adapter.set_weight(0.25)
    torch.testing.assert_close(compiled(x), model(x))


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
assert SIZE**2 >= _few_rows.LEAST_ELEMENTS


def square_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)).to(dtype)


def attached(model: nn.Module, config: Any, **how: Any) -> tt.Adapter:
    adapter = tt.attach(model, config, "all-linear", strategy="weight", **how)
    stir(adapter)
    return adapter


def in_float64(model: nn.Sequential, adapters: list[tt.Adapter], x: Tensor) -> Tensor:
    """The formula: each weight plus every update times its weight."""
    y = x.double()
    for index, layer in enumerate(model):
        total = layer.weight.detach().double()
        for adapter in adapters:
            total = total + adapter.weight * adapter.deltas()[index].detach().double()
        y = y @ total.T + (0 if layer.bias is None else layer.bias.detach().double())
    return y


@pytest.fixture
def no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a sum of the weight's size was formed")

    monkeypatch.setattr(_forward_patch, "summed", refuse)


@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_formula(name: str, dtype: torch.dtype, no_sums: None) -> None:
    model = square_layers(dtype)
    adapter = attached(model, CONFIGS[name])
    for shape in ((SIZE,), (1, SIZE), (1, 1, SIZE), (2, 2, SIZE), (0, SIZE)):
        x = torch.randn(shape, dtype=dtype)
        expected = in_float64(model, [adapter], x)
        with torch.no_grad():
            found = model(x)
        assert found.dtype == dtype
        assert found.shape == x.shape
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        error = float((found.double() - expected).abs().max()) / scale if expected.numel() else 0.0
        # A layer rounds W x, ΔW, ΔW x and their sum: four half units each.
        assert error <= 8 * torch.finfo(dtype).eps


def test_weights_of_a_mix_and_two_adapters(no_sums: None) -> None:
    model = square_layers()
    one, other = attached(model, CONFIGS["superlora"], name="one"), attached(model, CONFIGS["F"], name="other")
    x = torch.randn(3, SIZE)
    for weights in ({"one": 1.0}, {"one": 0.5, "other": -2.0}, {"other": 1.0}):
        tt.mix(model, weights)
        with torch.inference_mode():
            found = model(x)
        torch.testing.assert_close(found.double(), in_float64(model, [one, other], x), rtol=1e-4, atol=1e-4)


def test_some_rows_of_a_fused_weight(no_sums: None) -> None:
    model = square_layers()
    target = Target("0", (SIZE, SIZE), "linear", rows=Rows(SIZE // 2, SIZE // 2, SIZE))
    adapter = tt.attach(model, CONFIGS["dense"], [target], strategy="weight")
    stir(adapter)
    x = torch.randn(1, SIZE)
    with torch.no_grad(), adapter.disabled():
        base = model[0](x)
    with torch.no_grad():
        found = model[0](x)
        assert torch.equal(found[:, : SIZE // 2], base[:, : SIZE // 2])
        expected = base[:, SIZE // 2 :] + x @ adapter.deltas()[0].T
        torch.testing.assert_close(found[:, SIZE // 2 :], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["superlora", "F"])
def test_numbers_that_change_behind_torch_s_back_are_seen(name: str, dtype: torch.dtype, no_sums: None) -> None:
    model = square_layers(dtype)
    adapter = attached(model, CONFIGS[name])
    x = torch.randn(1, SIZE, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        for parameter in adapter.parameters():
            parameter.data.mul_(1.25)
        after = model(x)
        fresh = copy.deepcopy(model)(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh)


def test_many_rows_small_weights_and_gradients_form_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    plain = _forward_patch.summed
    monkeypatch.setattr(_forward_patch, "summed", lambda *args: formed.append(1) or plain(*args))
    model = square_layers()
    attached(model, CONFIGS["superlora"])
    with torch.no_grad():
        model(torch.randn(5, SIZE))
    assert len(formed) == 2
    small = nn.Sequential(nn.Linear(8, 8))
    attached(small, CONFIGS["superlora"])
    with torch.no_grad():
        small(torch.randn(1, 8))
    assert len(formed) == 3
    y = model(torch.randn(1, SIZE))
    assert y.requires_grad


@given(
    rows=st.integers(1, 9),
    more=st.integers(0, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_a_sum_in_blocks_has_the_bits_of_the_plain_one(rows: int, more: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows + 1, BLOCK // rows + more)
    weight = torch.randn(shape, generator=generator).to(dtype)
    delta = torch.randn(shape, generator=generator) * 1e-2
    assert can_sum_in_blocks(weight, Target("w", shape, "linear"), delta)
    assert torch.equal(sum_in_blocks(weight, delta), (weight.float() + delta).to(dtype))


def test_what_is_not_summed_in_blocks() -> None:
    shape = (2, BLOCK)
    target, weight, delta = Target("w", shape, "linear"), torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape)
    assert can_sum_in_blocks(weight, target, delta)
    assert not can_sum_in_blocks(weight.float(), target, delta)
    assert not can_sum_in_blocks(weight, target, delta.bfloat16())
    assert not can_sum_in_blocks(weight, target, delta.requires_grad_())
    assert not can_sum_in_blocks(weight.view(BLOCK, 2).T, target, delta)
    assert not can_sum_in_blocks(weight.to("meta"), target, delta)


# -- In compiled programs ----------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_copy_has_a_cache_of_its_own() -> None:
    torch._dynamo.reset()
    model = square_layers()
    adapter = attached(model, CONFIGS["superlora"])
    other, x = copy.deepcopy(model), torch.randn(1, SIZE)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2.0)
        for one in (model, other, model):
            torch.testing.assert_close(torch.compile(one, backend="aot_eager")(x), one(x), rtol=1e-5, atol=1e-5)


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
@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["superlora", "F"])
def test_generating_token_by_token_is_the_merged_model(name: str, cache: str, no_sums: None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    adapter = tt.attach(model, CONFIGS[name], strategy="weight")
    stir(adapter)
    prompt = torch.tensor([[5, 7, 11]])
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "cache_implementation": cache,
        "do_sample": False,
        "max_new_tokens": 6,
        "output_logits": True,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    attached = model.generate(prompt, **settings)
    adapter.merge()
    merged = model.generate(prompt, **settings)
    assert torch.equal(attached.sequences, merged.sequences)
    torch.testing.assert_close(attached.logits, merged.logits, rtol=1e-4, atol=1e-4)


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

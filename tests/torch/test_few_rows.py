"""Linear layers on few rows without gradients: the update is multiplied by them instead of added to the weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.targets.target import Rows, Target
from tnadapt.torch import _forward_pass as _few_rows
from tnadapt.torch import _forward_patch
from tnadapt.torch._linear import BLOCK, can_sum_in_blocks, sum_in_blocks

from .small import stir

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


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
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
    model = layers(dtype)
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
    model = layers()
    one, other = attached(model, CONFIGS["superlora"], name="one"), attached(model, CONFIGS["F"], name="other")
    x = torch.randn(3, SIZE)
    for weights in ({"one": 1.0}, {"one": 0.5, "other": -2.0}, {"other": 1.0}):
        tt.mix(model, weights)
        with torch.inference_mode():
            found = model(x)
        torch.testing.assert_close(found.double(), in_float64(model, [one, other], x), rtol=1e-4, atol=1e-4)


def test_some_rows_of_a_fused_weight(no_sums: None) -> None:
    model = layers()
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
    model = layers(dtype)
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
    model = layers()
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
    model, seen = layers(), list[str]()
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
    model = layers()
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
    model = layers()
    attached(model, CONFIGS["superlora"])
    x = torch.randn(1, SIZE)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        assert "update_product" not in str(program.graph)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_operator_is_one_of_torch() -> None:
    model = layers()
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
    model = layers()
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

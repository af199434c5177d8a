"""Experts that a model keeps in parameters of three axes: found, updated, saved and merged one by one."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.torch import _forward_patch as _parameter_sums
from tnadapt.torch._forward_pass import ColumnDropout, delta
from tnadapt.torch._forward_patch import LazyStack, stacked_sum, summed_matrices
from tnadapt.torch._linear import overlap

from .small import stir

IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 24}


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(intermediate_size=24, num_local_experts=4, **SIZES)
    )


def qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(shared_expert_intermediate_size=8, **SPARSE, **SIZES)
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(head_dim=8, **SPARSE, **SIZES))


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8, **SIZES
    )
    return transformers.GptOssForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
EXPERTS = r".*\.mlp\.experts"


def made(name: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_experts_implementation(implementation)
    return model


def by_formula(adapter: tt.Adapter, model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits of a model whose parameters are changed in float64, and the gradients of the sum of their squares."""
    model = model.double()
    arrays = {name: array.detach().double().requires_grad_() for name, array in adapter.arrays().items()}
    weights = [target.select(model.get_parameter(target.name).detach()) for target in adapter.targets]
    changed: dict[str, torch.Tensor] = {}
    for target, weight in zip(adapter.targets, adapter.plan.training_plan.merged(arrays, weights), strict=True):
        whole = changed.get(target.name, model.get_parameter(target.name).detach())
        own = weight.T if target.transposed else weight
        if target.index is not None:
            own = torch.cat([whole[: target.index], own[None], whole[target.index + 1 :]])
        changed[target.name] = own
    y = torch.func.functional_call(model, changed, (IDS,)).logits
    return y.detach(), list(torch.autograd.grad(y.square().sum(), list(arrays.values())))


def check(name: str, cfg: tna.Config, implementation: str, strategy: str = "weight") -> None:
    model = made(name, implementation)
    base = model(IDS).logits
    adapter = tt.attach(model, cfg, EXPERTS, strategy=strategy)
    assert len(adapter.targets) == 2 * 2 * 4
    assert set(adapter.strategy) == {strategy}
    assert torch.equal(model(IDS).logits, base)
    stir(adapter, 0.2)
    found = model(IDS).logits
    y, gradients = by_formula(adapter, made(name))
    torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-3, atol=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapter.merge()
    torch.testing.assert_close(model(IDS).logits, found, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    adapter.detach()
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("strategy", ["weight", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_adapter_is_the_formula(name: str, strategy: str) -> None:
    check(name, P.lora(2), "grouped_mm", strategy)


def test_adapters_that_do_not_add_up_may_be_on_different_experts() -> None:
    model = made("mixtral")
    targets = tt.find_targets(model, EXPERTS)
    both = [[target for target in targets if target.index == index] for index in (0, 1)]
    adapters = [tt.attach(model, P.dora(2), own, f"of {own[0].index}") for own in both]
    for number, adapter in enumerate(adapters):
        stir(adapter, 0.2, seed=number)
    found = model(IDS).logits
    for adapter in adapters:
        adapter.merge()
    torch.testing.assert_close(model(IDS).logits, found, rtol=1e-4, atol=1e-5)
    for adapter in reversed(adapters):
        adapter.unmerge()
    tt.attach(model, P.dora(2), both[1], "again")
    with pytest.raises(tna.TargetError, match="adapters 'of 1' and 'again' both act on"):
        model(IDS)


STRATEGIES = [
    (cfg, strategy)
    for cfg in ("superlora", "dora", "hira", "lokr")
    for strategy in ("weight", "factored", "additive")
    if (cfg, strategy) not in {("superlora", "factored"), ("hira", "factored"), ("lokr", "weight")}
]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("cfg", "strategy"), STRATEGIES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_any_config_in_any_implementation_and_strategy_is_the_formula(
    name: str, cfg: str, strategy: str, implementation: str
) -> None:
    check(name, getattr(P, cfg)(2), implementation, strategy)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_used_without_the_sum_of_a_stack(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name, implementation)
    adapter = tt.attach(model, P.lora(2), EXPERTS)
    assert set(adapter.strategy) == {"factored"}
    stir(adapter, 0.2)
    monkeypatch.setattr(_parameter_sums, "parameter_sum", None)
    model(IDS).logits.sum().backward()


def test_unknown_implementations_get_the_sum() -> None:
    model = made("mixtral")
    adapter = tt.attach(model, P.lora(2), EXPERTS, strategy="factored")
    stir(adapter, 0.2)
    expected = model(IDS).logits
    kernel = functools.partial(_with_addresses, [])
    for layer in model.model.layers:
        layer.mlp.experts.config._experts_implementation = "a_kernel"
    ALL_EXPERTS_FUNCTIONS = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    ALL_EXPERTS_FUNCTIONS.register("a_kernel", kernel)
    try:
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("a_kernel", None)
    assert kernel.args[0]


def _with_addresses(seen: list[int], module: Any, *args: Any) -> Any:
    assert type(module.up_proj if hasattr(module, "up_proj") else module.gate_up_proj) is torch.Tensor
    seen.append(module.down_proj.data_ptr())
    return type(module).forward.__wrapped__(module, *args)


def test_all_linear_finds_them() -> None:
    model = made("qwen2_moe")
    found = tt.find_targets(model, "all-linear")
    experts = [target for target in found if target.index is not None]
    assert len(experts) == 16
    assert [(one.label, one.shape, one.layer) for one in experts[3:5]] == [
        ("model.layers.0.mlp.experts.gate_up_proj[3]", (24, 16), experts[0].layer),
        ("model.layers.0.mlp.experts.down_proj[0]", (16, 12), experts[0].layer),
    ]
    assert len({target.layer for target in experts}) == 2
    assert {target.role for target in experts} == {"linear"}
    assert tt.find_targets(model, ["experts.down_proj"]) == [one for one in experts if one.parameter == "down_proj"]
    assert tt.find_targets(model, "all-linear", exclude=[f"layers.{i}.mlp.experts" for i in (0, 1)]) == [
        target for target in found if target.index is None
    ]
    assert len(tt.find_targets(model, EXPERTS, layers=1)) == 8
    gpt = [target for target in tt.find_targets(made("gpt_oss"), "all-linear") if target.index is not None]
    assert gpt[0].transposed
    assert (gpt[0].stored, gpt[0].shape) == ((4, 16, 48), (48, 16))


def test_one_group_for_the_experts_of_a_layer_and_one_half_of_a_fused_matrix() -> None:
    model = made("mixtral")
    adapter = tt.attach(model, tna.Config(groups="layer", rank=2, fold="hypercube"), EXPERTS)
    assert adapter.plan.num_groups == 2
    adapter.detach()
    whole = tt.find_targets(model, ["experts.gate_up_proj"])
    gates = [
        tna.Target(one.module, one.stored, parameter=one.parameter, rows=tna.Rows(0, 24, 48), index=one.index)
        for one in whole
    ]
    adapter = tt.attach(model, P.lora(1), gates)
    stir(adapter, 0.3)
    y, _ = by_rows(adapter, made("mixtral"))
    torch.testing.assert_close(model(IDS).logits.double(), y, rtol=1e-5, atol=1e-5)


def by_rows(adapter: tt.Adapter, model: Any) -> tuple[torch.Tensor, None]:
    model = model.double()
    with torch.no_grad():
        for target, update in zip(adapter.targets, adapter.deltas(), strict=True):
            stored = model.get_parameter(target.name)
            target.write(stored, target.select(stored) + update.double())
        return model(IDS).logits, None


def test_rows_of_a_batch_have_their_own_adapter() -> None:
    model, expected = made("mixtral", "grouped_mm"), []
    for name, ids in zip(("first", "second"), IDS, strict=True):
        adapter = tt.attach(model, {"experts": P.lora(1)}, name=name)
        stir(adapter, 0.2, len(expected))
        adapter.activate()
        expected.append(model(ids[None]).logits)
    with tt.rows(model, ["first", "second"]):
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = made("gpt_oss")
    adapter = tt.attach(model, P.lora(2), "all-linear")
    stir(adapter, 0.2)
    adapter.save(tmp_path / "a.safetensors")
    fresh = made("gpt_oss")
    loaded = tt.load(fresh, tmp_path / "a.safetensors")
    assert [target.label for target in loaded.targets] == [target.label for target in adapter.targets]
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        fresh.model.layers[0].mlp.experts.down_proj[2] += 1.0
    with pytest.raises(tna.FileError, match="trained on another base"):
        tt.load(fresh, tmp_path / "a.safetensors", "second")
    again = tt.extract(made("gpt_oss"), merged(model, adapter), P.lora(2), "all-linear")
    assert again.report.error < 1e-4


def merged(model: Any, adapter: tt.Adapter) -> Any:
    adapter.bake()
    return model


def on_disk(name: str, cfg: tna.Config, dtype: torch.dtype, folder: Path) -> None:
    model = made(name).to(dtype)
    model.save_pretrained(folder / "base")
    adapter = tt.attach(model, cfg, "all-linear", exclude=["shared_expert_gate"] if name == "qwen2_moe" else None)
    stir(adapter, 0.2)
    adapter.save(folder / "a.safetensors")
    report = tna.merge(folder / "base", folder / "a.safetensors", folder / "out")
    assert report.base_checked
    adapter.bake()
    model.save_pretrained(folder / "memory")
    found, expected = (load_file(folder / which / "model.safetensors") for which in ("out", "memory"))
    assert found.keys() == expected.keys()
    assert report.changed == sum("experts." in key or "_proj" in key for key in found if "bias" not in key)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_merged_to_the_bits_of_the_model(name: str, tmp_path: Path) -> None:
    on_disk(name, P.lora(2), torch.bfloat16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg",
    [P.superlora(2, projection="linear"), P.dora(2), P.lora(2, start="pissa")],
    ids=["superlora", "dora", "pissa"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_is_merged_for_any_config(name: str, cfg: tna.Config, tmp_path: Path) -> None:
    on_disk(name, cfg, torch.float32, tmp_path)


def tuned_pair(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Save a model, and the model with updates of its experts, which are returned by their labels."""
    model = made(name).to(dtype)
    model.save_pretrained(folder / "base")
    adapter = tt.attach(model, P.lora(2), EXPERTS)
    stir(adapter, 0.2)
    updates = dict(zip([target.label for target in adapter.targets], adapter.deltas(), strict=True))
    adapter.bake()
    model.save_pretrained(folder / "tuned")
    return updates


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_extracted_from_checkpoints(name: str, tmp_path: Path) -> None:
    expected = tuned_pair(name, tmp_path)
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", P.lora(2), EXPERTS)
    stored = open_checkpoint(tmp_path / "tuned")
    shapes = {key: entry.shape for key, entry in stored.entries.items()}
    assert find_stored(shapes, EXPERTS, stored.config) == tt.find_targets(made(name), EXPERTS)
    assert found.report.error < 1e-4
    assert found.others == ()
    tna.save(tmp_path / "a.safetensors", found.file)
    loaded = tt.load(made(name), tmp_path / "a.safetensors")  # the fingerprint is that of the model in memory
    for target, update in zip(loaded.targets, loaded.deltas(), strict=True):
        torch.testing.assert_close(update, expected[target.label], rtol=1e-3, atol=1e-4)
    assert tna.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged").base_checked
    merged, tuned = (load_file(tmp_path / which / "model.safetensors") for which in ("merged", "tuned"))
    for key, tensor in tuned.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-4, atol=1e-4)


def test_one_parameter_of_half_precision_is_extracted_and_the_rest_is_named(tmp_path: Path) -> None:
    tuned_pair("mixtral", tmp_path, torch.bfloat16)
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", P.lora(2), ["experts.down_proj"])
    assert {target.parameter for target in found.file.targets} == {"down_proj"}
    assert found.file.base is not None
    assert found.file.base.dtype == "bfloat16"
    assert set(found.others) == {
        f"model.layers.{layer}.block_sparse_moe.experts.{index}.{one}.weight"
        for layer in (0, 1) for index in range(4) for one in ("w1", "w3")
    }  # fmt: skip
    tuned_pair("gpt_oss", tmp_path / "gpt")
    found = tna.extract(tmp_path / "gpt" / "base", tmp_path / "gpt" / "tuned", P.lora(2), ["layers.0.mlp.experts"])
    assert found.others == tuple(f"model.layers.1.mlp.experts.{one}" for one in ("down_proj", "gate_up_proj"))


def test_single_tensors_of_experts_are_extracted_by_their_own_names(tmp_path: Path) -> None:
    tuned_pair("mixtral", tmp_path)
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", P.lora(2), r".*\.experts\.\d+\.w1")
    assert found.file.targets[0].name == "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def test_a_target_has_an_index_where_its_parameter_is_a_stack() -> None:
    model = made("mixtral")
    name = "model.layers.0.mlp.experts"
    with pytest.raises(
        tna.TargetError, match=r"is 4 matrices, of which an index selects one; the target .* index=None"
    ):
        tt.find_targets(model, [tna.Target(name, (4, 16, 24), parameter="down_proj")])
    with pytest.raises(tna.TargetError, match=r"is one matrix; the target given for it has index=1"):
        tt.find_targets(nn.Sequential(nn.Conv1d(4, 6, 3)), [tna.Target("0", (6, 4, 3), index=1)])
    with pytest.raises(tna.TargetError, match=r"is stored as \(4, 16, 24\); the target given for it says .* which is"):
        tt.find_targets(model, [tna.Target(name, (4, 16, 24), parameter="down_proj", index=1, transposed=True)])


def test_a_parameter_of_three_axes_that_says_nothing_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eoi->bo", x, self.weight)

    model = nn.Sequential(nn.Linear(5, 5), Odd())
    assert [target.name for target in tt.find_targets(model, "all-linear")] == ["0.weight"]
    adapter = tt.attach(model, P.lora(1), [tna.Target("1", (3, 4, 5), index=2)])
    stir(adapter, 0.3)
    x = torch.randn(2, 5)
    expected = torch.einsum("bi,oi->bo", model[0](x), model[1].weight.sum(0) + adapter.deltas()[0])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_classes_that_store_them_transposed_are_known() -> None:
    config = transformers.Llama4TextConfig(num_local_experts=3, hidden_size=8, intermediate_size=6)
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    experts = modeling.Llama4TextExperts(config)
    nn.init.normal_(experts.gate_up_proj)
    nn.init.normal_(experts.down_proj)
    adapter = tt.attach(experts, P.lora(1), "all-linear")
    assert [target.shape for target in adapter.targets[::3]] == [(12, 8), (8, 6)]
    stir(adapter, 0.3)
    x = torch.randn(6, 8)
    found = experts(x)
    adapter.merge()
    torch.testing.assert_close(experts(x), found, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for on in (False, True):
        model = made("mixtral", "grouped_mm").train()
        if on:
            for layer in model.model.layers:
                layer.mlp.forward = functools.partial(checkpoint, layer.mlp.forward, use_reentrant=False)
        adapter = tt.attach(model, P.lora(1), EXPERTS)
        stir(adapter, 0.2)
        model(IDS, use_cache=False).logits.square().sum().backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_of_tokens_in_order_take_rows(name: str) -> None:
    model = made(name)
    for one in "ab":
        tt.attach(model, tna.presets.lora(1), r".*\.experts", one)
    with tt.rows(model, ["a", "b"]):
        pass


def test_experts_of_sorted_tokens_take_no_rows() -> None:
    config = transformers.Llama4TextConfig(num_local_experts=3, hidden_size=8, intermediate_size=6)
    modeling = importlib.import_module("transformers.models.llama4.modeling_llama4")
    model = nn.ModuleDict({"feed_forward": modeling.Llama4TextExperts(config)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for one in "ab":
        tt.attach(model, tna.presets.lora(1), "feed_forward", one)
    with (
        pytest.raises(tna.TargetError, match="belongs to experts, which see selected tokens of all rows"),
        tt.rows(model, ["a", "b"]),
    ):
        pass


def test_the_parameters_of_experts_have_one_order() -> None:
    model = mixtral()
    names = ["experts.down_proj", "experts.gate_up_proj"]
    targets = tt.find_targets(model, names)
    assert [target.parameter for target in targets[::4]] == ["gate_up_proj", "down_proj"] * 2
    assert tt.find_targets(model, names[::-1]) == targets
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert find_stored(shapes, names, model.config.to_dict()) == targets


# -- Experts' products with updates added to them: equal to products with the changed weight, which is not formed ------


CONFIGS = [
    (P.lora(1), "factored"), (P.lokr(2), "factored"), (P.superlora(2), "additive"), (P.dora(1), "factored"),
    (P.dora(2), "additive"), (P.hira(1), "additive"), (P.lora(1), "weight"), (P.dora(1), "weight"),
]  # fmt: skip
COUNT, OUT, COLS = 3, 8, 4


def _eager(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    parts = x.new_zeros(len(x), OUT)
    for number in ids.unique():
        chosen = ids == number
        one = x[chosen] @ weight[number] if transposed else functional.linear(x[chosen], weight[number])
        parts = parts.index_add(0, chosen.nonzero()[:, 0], one)
    return parts


def _grouped(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    order = torch.argsort(ids)
    ends = torch.bincount(ids, minlength=COUNT).cumsum(0).to(torch.int32)
    y = functional.grouped_mm(x[order], weight if transposed else weight.transpose(-2, -1), offs=ends)
    return y[torch.argsort(order)]


def _batched(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    if transposed:
        return torch.bmm(x[:, None], weight[ids])[:, 0]
    return torch.bmm(weight[ids], x[:, :, None])[:, :, 0]


def _of_all(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    """Every expert on all rows, as Llama 4 does with sorted ones."""
    every = x.expand(COUNT, *x.shape)
    y = torch.bmm(every, weight if transposed else weight.mT)
    return y[ids, torch.arange(len(x))]


def _unknown(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
    matrix = weight if transposed else weight.permute(0, 2, 1)
    return torch.einsum("ni,nio->no", x, matrix[ids] * 1.0)


PRODUCTS: list[Callable[..., Tensor]] = [_eager, _grouped, _batched, _of_all, _unknown]


class Experts(nn.Module):
    def __init__(self, product: Callable[..., Tensor], transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        sizes = (COUNT, COLS, OUT) if transposed else (COUNT, OUT, COLS)
        self.up_proj = nn.Parameter(torch.randn(sizes, generator=made).to(dtype))
        self.is_transposed, self.is_concatenated, self.product = transposed, True, product

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.product(x, self.up_proj, ids, self.is_transposed)


def changed(module: Experts, adapters: list[tt.Adapter]) -> Tensor:
    """W' by the plan's own formula, with gradients to the adapters' parameters."""
    total = module.up_proj.detach().clone()
    for adapter in adapters:
        weights = [target.select(module.up_proj.detach()) for target in adapter.targets]
        arrays = dict(adapter.arrays())
        for target, weight, new in zip(adapter.targets, weights, adapter.plan.merged(arrays, weights), strict=True):
            place = torch.zeros_like(total)
            target.write(place, torch.ones(target.shape))
            whole = torch.zeros_like(total)
            target.write(whole, (new - weight) * adapter.weight)
            total = total + place * whole
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[Experts, list[tt.Adapter], Tensor, Tensor]:
    module = Experts(draw(st.sampled_from(PRODUCTS)), draw(st.booleans()))
    every, adapters = tt.find_targets(module, "all-linear"), list[tt.Adapter]()
    for number in range(draw(st.integers(1, 2))):
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        if draw(st.booleans()):
            fields = ("module", "stored", "parameter", "transposed", "index")
            chosen = [
                tna.Target(**{name: getattr(one, name) for name in fields}, rows=tna.Rows(1, 2, 4, 2)) for one in chosen
            ]
        cfg, strategy = draw(st.sampled_from(CONFIGS))
        sums = cfg.apply == "add" and all(adapter.config.apply == "add" for adapter in adapters)
        if not sums and any(overlap(a, b) for one in adapters for a in one.targets for b in chosen):
            break
        adapters.append(tt.attach(module, cfg, chosen, f"a{number}", strategy=strategy))
        stir(adapters[-1], 0.3, number)
        if cfg.apply == "add":
            adapters[-1].set_weight(draw(st.sampled_from([1.0, 0.5])))
    rows = draw(st.integers(1, 5))
    x = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ids = torch.tensor(draw(st.lists(st.integers(0, COUNT - 1), min_size=rows, max_size=rows)))
    return module, adapters, x, ids


@given(cases())
def test_products_are_those_with_the_changed_weight(given: tuple[Experts, list[tt.Adapter], Tensor, Tensor]) -> None:
    module, adapters, x, ids = given
    found = module(x, ids)
    expected = module.product(x, changed(module, adapters), ids, module.is_transposed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x, ids), found, rtol=1e-5, atol=1e-5)
    arrays = [x, *(parameter for adapter in adapters for parameter in adapter.parameters())]
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(found, arrays, gradient, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, arrays, gradient, allow_unused=True, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


X, LAZY_IDS = torch.randn(5, COLS, generator=torch.Generator().manual_seed(3)), torch.tensor([2, 0, 0, 2, 2])


def adapted(
    product: Callable[..., Tensor], cfg: tna.Config | str = "lora", **settings: Any
) -> tuple[Experts, tt.Adapter]:
    module = Experts(product, False)
    adapter = tt.attach(module, cfg, "all-linear", **({"rank": 1} if cfg == "lora" else {}), **settings)
    stir(adapter, 0.3)
    return module, adapter


@pytest.mark.parametrize("strategy", ["factored", "additive"])
@pytest.mark.parametrize("product", PRODUCTS[:4])
def test_the_changed_weight_is_not_formed(
    product: Callable[..., Tensor], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = adapted(product, strategy=strategy)
    monkeypatch.setattr(_parameter_sums, "parameter_sum", None)
    module(X, LAZY_IDS).sum().backward()


def test_of_what_is_no_product_it_is_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = adapted(_unknown, strategy="factored")
    sums, plain = [], _parameter_sums.parameter_sum
    monkeypatch.setattr(_parameter_sums, "parameter_sum", lambda *args: sums.append(args) or plain(*args))
    module(X, LAZY_IDS)
    assert len(sums) == 1


@pytest.mark.parametrize("product", PRODUCTS[:3])
def test_experts_without_tokens_compute_nothing(
    product: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = adapted(product, strategy="factored")
    called, patch = set(), module.forward
    output = patch.output
    monkeypatch.setattr(patch, "output", lambda slot, x: called.add(slot.target.index) or output(slot, x))
    module(X, LAZY_IDS)
    assert called == {0, 2}


def test_the_best_strategy_is_chosen_by_the_tokens_of_one_expert() -> None:
    assert set(adapted(_grouped)[1].strategy) == {"factored"}
    assert set(adapted(_grouped, P.superlora(1))[1].strategy) == {"weight"}
    module = Experts(_grouped, False)
    assert set(tt.attach(module, P.dora(1, magnitude_axis="cols"), "all-linear").strategy) == {"weight"}


def test_strategies_that_cannot_be_are_refused() -> None:
    module = Experts(_grouped, False)
    with pytest.raises(tna.ConfigError, match=r"strategy='factored' needs .*; up_proj has .*: use strategy='auto'"):
        tt.attach(module, P.superlora(1), "all-linear", strategy="factored")
    with pytest.raises(tna.ConfigError, match=r"magnitude_axis='cols' scales the input of up_proj: use 'weight'"):
        tt.attach(module, P.dora(1, magnitude_axis="cols"), "all-linear", strategy="additive")
    with pytest.raises(tna.ConfigError, match=r"activation='relu' acts between the two factors"):
        tt.attach(module, P.lora(1), "all-linear", activation="relu")


@pytest.mark.parametrize("cfg", [P.lora(1), P.dora(1)], ids=["lora", "dora"])
def test_dropout_acts_on_the_input_of_each_expert(cfg: tna.Config) -> None:
    module, _ = adapted(_grouped, cfg, strategy="factored", dropout=0.5)
    x, ids = X[:1].expand(4000, COLS), torch.arange(4000) % 2
    with torch.no_grad():
        base = _grouped(x, module.up_proj, ids, False)
        whole, found = module.eval()(x, ids) - base, module.train()(x, ids) - base
    for number in (0, 1):
        of_one, expected = found[number::2], whole[number]
        torch.testing.assert_close(of_one.mean(0), expected, rtol=0.05, atol=0.05)
        # Each row has its own mask: there are 2^COLS.
        assert len(torch.unique(of_one.mul(1e3).round(), dim=0)) == 2**COLS


def test_a_compiled_module_multiplies_by_the_sum() -> None:
    module, _ = adapted(_of_all, strategy="factored")
    found = torch.compile(module, backend="eager", fullgraph=True)(X, LAZY_IDS)
    torch.testing.assert_close(found, module(X, LAZY_IDS), rtol=1e-5, atol=1e-6)


def test_a_copy_and_a_switched_off_adapter() -> None:
    module, adapter = adapted(_grouped, strategy="factored")
    y = module(X, LAZY_IDS)
    assert torch.equal(copy.deepcopy(module)(X, LAZY_IDS), y)
    with adapter.disabled():
        assert torch.equal(module(X, LAZY_IDS), _grouped(X, module.up_proj.detach(), LAZY_IDS, False))
    assert type(module.up_proj) is nn.Parameter


def test_it_tells_its_shape_and_hides_its_numbers() -> None:
    def looks(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
        assert isinstance(weight, LazyStack)
        assert weight.shape == (COUNT, OUT, COLS)
        assert (weight.dtype, weight.device, weight.ndim, len(weight)) == (x.dtype, x.device, 3, COUNT)
        with (
            torch._C.DisableTorchFunctionSubclass(),
            pytest.raises(RuntimeError, match=r"add.* reached the matrices of experts past .* strategy='weight'"),
        ):
            torch.add(weight, 1.0)
        return _grouped(x, weight, ids, transposed)

    module, _ = adapted(looks, strategy="factored")
    module(X, LAZY_IDS)


def test_half_precision_is_rounded_like_a_linear_layer() -> None:
    module = Experts(_eager, False, torch.bfloat16)
    layer = nn.Linear(COLS, OUT, bias=False)
    layer.weight = nn.Parameter(module.up_proj[1].detach().clone())
    x, ids = X.bfloat16(), torch.ones(len(X), dtype=torch.int64)
    found = []
    for one, args in ((module, (x, ids)), (layer, (x,))):
        targets = tt.find_targets(one, "all-linear")
        adapter = tt.attach(one, P.lora(2), targets[1:2] or targets, strategy="factored")
        stir(adapter, 0.3)
        found.append(one(*args))
    assert torch.equal(*found)


# ----------------------------------------------------------------------------------------------------------------------
# The sum of stacked matrices and their updates: one copy of the stack, equal to the operations on the whole stack


SUMMED_CONFIGS = [tna.presets.lora(1), tna.presets.superlora(2), tna.presets.dense(), tna.presets.lokr(1)]


class SummedExperts(nn.Module):
    """Every row of x goes through every expert."""

    def __init__(self, count: int, out: int, cols: int, transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        sizes = (count, cols, out) if transposed else (count, out, cols)
        self.down_proj = nn.Parameter(torch.randn(sizes, generator=made).to(dtype))
        self.is_transposed, self.is_concatenated = transposed, True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.down_proj if self.is_transposed else self.down_proj.mT
        return torch.matmul(x, weight).sum(0)


@st.composite
def summed_adapted(draw: st.DrawFn) -> tuple[SummedExperts, list[tt.Adapter]]:
    count, out, cols = draw(st.integers(1, 5)), draw(st.integers(2, 6)), draw(st.integers(2, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    module = SummedExperts(count, out, cols, draw(st.booleans()), dtype)
    every = tt.find_targets(module, "all-linear")
    assert len(every) == count
    adapters = []
    for number in range(draw(st.integers(1, 2))):
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        if draw(st.booleans()):
            half = tna.Rows(0, 1, out)
            chosen = [tna.Target(**{**_fields(target), "rows": half}) for target in chosen]
        adapters.append(tt.attach(module, draw(st.sampled_from(SUMMED_CONFIGS)), chosen, f"a{number}"))
        stir(adapters[-1], 0.3, number)
        adapters[-1].set_weight(draw(st.sampled_from([1.0, 0.5])))
    return module, adapters


def _fields(target: tna.Target) -> dict[str, object]:
    return {name: getattr(target, name) for name in ("module", "stored", "role", "parameter", "transposed", "index")}


@given(summed_adapted())
def test_it_is_the_sum_of_the_whole_stack(given: tuple[SummedExperts, list[tt.Adapter]]) -> None:
    module, adapters = given
    slots = [slot for adapter in adapters for slot in adapter._state.slots]
    found = summed_matrices(module.down_proj, slots, ColumnDropout(module))
    plain = stacked_sum(module.down_proj, [(slot.target, delta(slot)) for slot in slots])
    assert found.dtype == plain.dtype == module.down_proj.dtype
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(summed_matrices(module.down_proj, slots, ColumnDropout(module)), found)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    arrays = [parameter for adapter in adapters for parameter in adapter.parameters()]
    ours = torch.autograd.grad(found, arrays, gradient)
    for one, other in zip(ours, torch.autograd.grad(plain, arrays, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_other_matrices_keep_their_bits_and_the_parameter_too() -> None:
    module = SummedExperts(4, 6, 3, False)
    before = module.down_proj.detach().clone()
    targets = tt.find_targets(module, "all-linear")
    adapter = tt.attach(module, tna.presets.dense(), [targets[2]])
    stir(adapter, 0.3)
    found = summed_matrices(module.down_proj, adapter._state.slots, ColumnDropout(module))
    assert torch.equal(found[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(found[2], before[2])
    assert torch.equal(module.down_proj, before)
    assert set(module.__dict__).isdisjoint({"down_proj"})


def test_one_copy_of_the_stack_is_made_however_many_experts_there_are() -> None:
    module = SummedExperts(32, 64, 64, False)
    adapter = tt.attach(module, tna.presets.lora(1), "all-linear")
    stir(adapter)
    x = torch.randn(2, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        module(x).sum().backward()
    size = module.down_proj.numel() * 4
    large = [event for event in profile.events() if event.self_cpu_memory_usage >= size]
    # The copy, and in backward the gradients of the product and of the sum; none of them once for each expert.
    assert 1 <= len(large) <= 6


def test_a_compiled_module_computes_the_same() -> None:
    module = SummedExperts(3, 4, 5, True)
    adapter = tt.attach(module, tna.presets.lora(1), "all-linear")
    stir(adapter, 0.3)
    x = torch.randn(2, 5)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_and_dropout() -> None:
    module = SummedExperts(3, 4, 3, True)
    adapter = tt.attach(module, tna.presets.lora(1), "all-linear", dropout=0.5)
    stir(adapter, 0.3)
    x = torch.randn(2, 3)
    module.eval()
    arrays = list(adapter.parameters())
    first = torch.autograd.grad(module(x).square().sum(), arrays, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), arrays)
    assert all(torch.isfinite(one).all() and one.abs().sum() > 0 for one in second)
    torch.manual_seed(0)
    module.train()
    outputs = torch.stack([module(x).detach() for _ in range(400)])
    expected = module.eval()(x).detach()
    torch.testing.assert_close(outputs.mean(0), expected, rtol=0, atol=6 * float(outputs.std(0).max()) / 400**0.5)
    assert outputs.std(0).min() > 0

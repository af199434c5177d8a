"""Experts that a model keeps in parameters of three axes: found, updated, saved and merged one by one."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.torch import _forward_patch

from .small import stir

transformers = pytest.importorskip("transformers")

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
    monkeypatch.setattr(_forward_patch, "parameter_sum", None)
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

"""Experts that a model keeps in parameters of three axes: found, updated, saved and merged one by one."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
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

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.checkpoints.checkpoint import open_checkpoint

from .internals import find_stored, forward_patch
from .life import by_formula, replaced
from .small import stir

IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 24}


#: The prefix of the classes of a model and of its config, and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 8, **SPARSE}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, **SPARSE}),
    "gpt_oss": (
        "GptOss", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
}  # fmt: skip
EXPERTS = r".*\.mlp\.experts"


def made(name: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    prefix, settings = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**settings, **SIZES)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    model.set_experts_implementation(implementation)
    return model


def llama4() -> Any:
    """Experts that are stored transposed, of sorted tokens."""
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = transformers.Llama4TextConfig(num_local_experts=3, hidden_size=8, intermediate_size=6)
    experts = modeling.Llama4TextExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def with_rows(target: tna.Target, rows: tna.Rows) -> tna.Target:
    fields = ("module", "stored", "role", "parameter", "transposed", "index")
    return tna.Target(**{name: getattr(target, name) for name in fields}, rows=rows)


@contextlib.contextmanager
def forming_no_sum() -> Iterator[None]:
    """Fail where a changed weight is formed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_patch, "updated_parameter", None)
        yield


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
WAYS = [
    ("superlora", "weight"), ("superlora", "additive"), ("dora", "weight"), ("dora", "factored"), ("dora", "additive"),
    ("hira", "weight"), ("hira", "additive"), ("lokr", "factored"), ("lokr", "additive"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cfg", "strategy", "implementation"),
    [
        *((name, "lora", "weight", "grouped_mm") for name in MODELS),
        *((name, "lora", "factored", how) for name in MODELS for how in IMPLEMENTATIONS),
        *(
            pytest.param(name, *way, how, marks=pytest.mark.slow)
            for name in ("qwen3_moe", "gpt_oss") for way in WAYS for how in IMPLEMENTATIONS
        ),
    ],
)  # fmt: skip
def test_a_trained_adapter_is_the_formula(name: str, cfg: str, strategy: str, implementation: str) -> None:
    model = made(name, implementation)
    base = model(IDS).logits
    adapter = tt.attach(model, getattr(P, cfg)(2), EXPERTS, strategy=strategy)
    assert len(adapter.targets) == 2 * 2 * 4
    assert set(adapter.strategy) == {strategy}
    assert torch.equal(model(IDS).logits, base)
    stir(adapter, 0.2)
    with contextlib.nullcontext() if strategy == "weight" else forming_no_sum():
        found = model(IDS).logits
        found.square().sum().backward()
    expected = by_formula(adapter, made(name).double(), IDS)
    torch.testing.assert_close(found.double(), expected["output"], rtol=1e-5, atol=1e-5)
    for array, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected[array], rtol=1e-3, atol=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapter.merge()
    torch.testing.assert_close(model(IDS).logits, found, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    adapter.detach()
    assert torch.equal(model(IDS).logits, base)


def test_unknown_implementations_get_the_sum() -> None:
    model, addresses = made("mixtral"), list[int]()
    adapter = tt.attach(model, P.lora(2), EXPERTS, strategy="factored")
    stir(adapter, 0.2)
    expected = model(IDS).logits

    def kernel(module: Any, *args: Any) -> Any:
        assert type(module.gate_up_proj) is Tensor
        addresses.append(module.down_proj.data_ptr())
        return type(module).forward.__wrapped__(module, *args)

    for layer in model.model.layers:
        layer.mlp.experts.config._experts_implementation = "a_kernel"
    functions = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    functions.register("a_kernel", kernel)
    try:
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    finally:
        functions._global_mapping.pop("a_kernel", None)
    assert addresses


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
    # Their order is that of the model, on disk as well.
    names = ["experts.down_proj", "experts.gate_up_proj"]
    model = made("mixtral")
    targets = tt.find_targets(model, names)
    assert [target.parameter for target in targets[::4]] == ["gate_up_proj", "down_proj"] * 2
    assert tt.find_targets(model, names[::-1]) == targets
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert find_stored(shapes, names, model.config.to_dict()) == targets
    # One group for the experts of a layer.
    groups = tna.Config(groups="layer", rank=2, fold="hypercube")
    assert tt.attach(model, groups, EXPERTS).plan.num_groups == 2


@pytest.mark.parametrize("model_name", ["mixtral", "gpt_oss"])
def test_rows_of_a_batch_have_their_own_adapter(model_name: str) -> None:
    model, expected = made(model_name, "grouped_mm"), []
    for name, ids in zip(("first", "second"), IDS, strict=True):
        adapter = tt.attach(model, {"experts": P.lora(1)}, name=name)
        stir(adapter, 0.2, len(expected))
        adapter.activate()
        expected.append(model(ids[None]).logits)
    with tt.rows(model, ["first", "second"]):
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize(
    ("name", "cfg", "dtype"),
    [
        *((name, P.lora(2), torch.bfloat16) for name in MODELS),
        *(
            pytest.param(name, cfg, torch.float32, marks=pytest.mark.slow)
            for name in ("mixtral", "qwen3_moe")
            for cfg in (P.superlora(2, projection="linear"), P.dora(2), P.lora(2, start="pissa"))
        ),
    ],
)
def test_a_checkpoint_is_merged_to_the_bits_of_the_model(
    name: str, cfg: tna.Config, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(name).to(dtype)
    model.save_pretrained(tmp_path / "base")
    adapter = tt.attach(model, cfg, "all-linear", exclude=["shared_expert_gate"] if name == "qwen2_moe" else None)
    stir(adapter, 0.2)
    adapter.save(tmp_path / "a.safetensors")
    loaded = made(name).to(dtype)
    labels = [target.label for target in tt.load(loaded, tmp_path / "a.safetensors").targets]
    assert labels == [target.label for target in adapter.targets]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    report = tna.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert report.base_checked
    adapter.bake()
    model.save_pretrained(tmp_path / "memory")
    found, expected = (load_file(tmp_path / which / "model.safetensors") for which in ("out", "memory"))
    assert found.keys() == expected.keys()
    assert report.changed == sum("experts." in key or "_proj" in key for key in found if "bias" not in key)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def tuned_pair(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    """Save a model, and the model with updates of its experts; return the latter, and the updates by their labels."""
    model = made(name).to(dtype)
    model.save_pretrained(folder / "base")
    adapter = tt.attach(model, P.lora(2), EXPERTS)
    stir(adapter, 0.2)
    updates = dict(zip([target.label for target in adapter.targets], adapter.deltas(), strict=True))
    adapter.bake()
    model.save_pretrained(folder / "tuned")
    return model, updates


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_extracted_from_checkpoints(name: str, tmp_path: Path) -> None:
    tuned, expected = tuned_pair(name, tmp_path)
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", P.lora(2), EXPERTS)
    stored = open_checkpoint(tmp_path / "tuned")
    shapes = {key: entry.shape for key, entry in stored.entries.items()}
    assert find_stored(shapes, EXPERTS, stored.config) == tt.find_targets(made(name), EXPERTS)
    assert found.report.error < 1e-4
    assert tt.extract(made(name), tuned, P.lora(2), EXPERTS).report.error < 1e-4
    assert found.others == ()
    tna.save(tmp_path / "a.safetensors", found.file)
    loaded = tt.load(made(name), tmp_path / "a.safetensors")  # the fingerprint is that of the model in memory
    for target, update in zip(loaded.targets, loaded.deltas(), strict=True):
        torch.testing.assert_close(update, expected[target.label], rtol=1e-3, atol=1e-4)
    assert tna.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged").base_checked
    merged, expected = (load_file(tmp_path / which / "model.safetensors") for which in ("merged", "tuned"))
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.0.mlp.experts.down_proj")[2] += 1.0
    with pytest.raises(tna.FileError, match="trained on another base"):
        tt.load(loaded.model, tmp_path / "a.safetensors", "second")


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
    # By the names of single tensors.
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
    experts = llama4()
    adapter = tt.attach(experts, P.lora(1), "all-linear")
    assert [target.shape for target in adapter.targets[::3]] == [(12, 8), (8, 6)]
    stir(adapter, 0.3)
    x = torch.randn(6, 8)
    found = experts(x)
    tt.attach(experts, P.lora(1), "all-linear", "second")
    with (
        pytest.raises(tna.TargetError, match="belongs to experts, which see selected tokens of all rows"),
        tt.rows(experts, ["default", "second"]),
    ):
        pass
    adapter.merge()
    torch.testing.assert_close(experts(x), found, rtol=1e-4, atol=1e-5)


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
    stored = module.up_proj.detach()
    total = stored.clone()
    for adapter in adapters:
        weights = [target.select(stored) for target in adapter.targets]
        merged = adapter.plan.merged(dict(adapter.arrays()), weights)
        for target, weight, new in zip(adapter.targets, weights, merged, strict=True):
            total = total + replaced(torch.zeros_like(stored), target, adapter.weight * (new - weight))
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[Experts, list[tt.Adapter], Tensor, Tensor]:
    module = Experts(draw(st.sampled_from(PRODUCTS)), draw(st.booleans()))
    every, adapters = tt.find_targets(module, "all-linear"), list[tt.Adapter]()
    for number in range(draw(st.integers(1, 2))):
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        if draw(st.booleans()):
            chosen = [with_rows(target, tna.Rows(1, 2, 4, 2)) for target in chosen]
        cfg, strategy = draw(st.sampled_from(CONFIGS))
        sums = cfg.apply == "add" and all(adapter.config.apply == "add" for adapter in adapters)
        if not sums and any(a.index == b.index for one in adapters for a in one.targets for b in chosen):
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
def test_products_form_no_changed_weight_and_use_the_experts_with_tokens(
    product: Callable[..., Tensor], strategy: str
) -> None:
    module, adapter = adapted(product, strategy=strategy)
    with forming_no_sum():
        y = module(X, LAZY_IDS)
        y.sum().backward()
    assert torch.equal(copy.deepcopy(module)(X, LAZY_IDS), y)
    with adapter.disabled():
        assert torch.equal(module(X, LAZY_IDS), product(X, module.up_proj.detach(), LAZY_IDS, False))
    if product is not _of_all:
        trained = [name for name, parameter in adapter.named_parameters() if parameter.grad is not None]
        assert {name.split(".")[0] for name in trained} == {"group0", "group2"}


def test_the_best_strategy_is_chosen_by_the_tokens_of_one_expert() -> None:
    assert set(adapted(_grouped)[1].strategy) == {"factored"}
    assert set(adapted(_grouped, P.superlora(1))[1].strategy) == {"weight"}
    module = Experts(_grouped, False)
    columns = P.dora(1, magnitude_axis="cols")
    assert set(tt.attach(module, columns, "all-linear").strategy) == {"weight"}
    for cfg, settings, message in (
        (P.superlora(1), {"strategy": "factored"}, r"='factored' needs .*; up_proj has .*: use strategy='auto'"),
        (columns, {"strategy": "additive"}, r"magnitude_axis='cols' scales the input of up_proj: use 'weight'"),
        (P.lora(1), {"activation": "relu"}, r"activation='relu' acts between the two factors"),
    ):
        with pytest.raises(tna.ConfigError, match=message):
            tt.attach(Experts(_grouped, False), cfg, "all-linear", **settings)


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


def _whole(x: Tensor, weight: Tensor, ids: Tensor, transposed: bool) -> Tensor:
    return weight * 1.0


@pytest.mark.parametrize(
    ("product", "strategy", "dtype"),
    [(_of_all, "factored", torch.float32), (_unknown, "weight", torch.float32), (_whole, "weight", torch.bfloat16)],
)
def test_a_compiled_module_multiplies_by_the_sum(
    product: Callable[..., Tensor], strategy: str, dtype: torch.dtype
) -> None:
    module = Experts(product, True, dtype)
    first, *_, last = tt.find_targets(module, "all-linear")
    for name, targets in (("a", [with_rows(first, tna.Rows(1, 2, 4, 2)), last]), ("b", [first])):
        stir(tt.attach(module, P.lora(1), targets, name, strategy=strategy), 0.3)
    found, expected = torch.compile(module, backend="eager", fullgraph=True)(X, LAZY_IDS), module(X, LAZY_IDS)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_it_tells_its_shape_and_hides_its_numbers() -> None:
    def looks(x: Tensor, weight: Any, ids: Tensor, transposed: bool) -> Tensor:
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


@pytest.mark.parametrize("strategy", ["factored", "weight"])
def test_half_precision_is_rounded_like_a_linear_layer(strategy: str) -> None:
    module = Experts(_eager, False, torch.bfloat16)
    layer = nn.Linear(COLS, OUT, bias=False)
    layer.weight = nn.Parameter(module.up_proj[1].detach().clone())
    x, ids = X.bfloat16(), torch.ones(len(X), dtype=torch.int64)
    outputs = []
    for host, args in ((module, (x, ids)), (layer, (x,))):
        targets = tt.find_targets(host, "all-linear")
        adapter = tt.attach(host, P.lora(2), targets[1:2] or targets, strategy=strategy)
        stir(adapter, 0.3)
        outputs.append(host(*args))
        with torch.no_grad():
            outputs.append(host(*args))
    assert all(torch.equal(outputs[0], y) for y in outputs)


def test_other_matrices_keep_their_bits_and_the_parameter_too() -> None:
    module = Experts(_whole, False)
    before = module.up_proj.detach().clone()
    adapter = tt.attach(module, tna.presets.dense(), [tt.find_targets(module, "all-linear")[1]], strategy="weight")
    stir(adapter, 0.3)
    found = module(X, LAZY_IDS)
    assert torch.equal(found[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(found[1], before[1] + adapter.deltas()[0])
    assert torch.equal(module.up_proj, before)
    assert set(module.__dict__).isdisjoint({"up_proj"})


def test_one_copy_of_the_stack_is_made_however_many_experts_there_are() -> None:
    module = Experts(lambda x, weight, ids, transposed: torch.matmul(x, weight.mT).sum(0), False)
    module.up_proj = nn.Parameter(torch.randn(32, 64, 64))
    stir(tt.attach(module, tna.presets.lora(1), "all-linear"))
    with torch.profiler.profile(profile_memory=True) as profile:
        module(torch.randn(2, 64), LAZY_IDS).sum().backward()
    size = module.up_proj.numel() * 4
    large = [event for event in profile.events() if event.self_cpu_memory_usage >= size]
    # The copy, and in backward the gradients of the product and of the sum; none of them once for each expert.
    assert 1 <= len(large) <= 6


def test_with_the_weight_strategy_dropout_and_second_derivatives_are_those_of_the_sum() -> None:
    module, adapter = adapted(_unknown, dropout=0.5, strategy="weight")
    module.eval()
    arrays, ids = list(adapter.parameters()), torch.arange(len(X)) % COUNT
    first = torch.autograd.grad(module(X, ids).square().sum(), arrays, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), arrays)
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in second)
    expected = module(X, ids).detach()
    torch.manual_seed(0)
    module.train()
    outputs = torch.stack([module(X, ids).detach() for _ in range(400)])
    torch.testing.assert_close(outputs.mean(0), expected, rtol=0, atol=6 * float(outputs.std(0).max()) / 400**0.5)
    assert outputs.std(0).min() > 0

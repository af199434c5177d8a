"""Dropout of an adapter: on the input of what it adds, and only in training.

``test_forward_laws.py`` compares outputs and gradients of every kind of layer with the formula.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .small import compiles_whole, stir
from .test_requantizing import Packed, model

CONFIGS = {
    "lora": P.lora(2), "lokr": P.lokr(2), "superlora": P.superlora(2), "theta": P.unilora(9, 2),
    "behind F": P.superlora(2, projection="linear", ratio=0.5), "pissa": P.lora(2, start="pissa"),
    "dora": P.dora(2), "columns": P.dora(2, magnitude_axis="cols"), "hira": P.hira(2),
}  # fmt: skip
WAYS = [
    (config, strategy)
    for config in CONFIGS
    for strategy in ("weight", "factored", "additive")
    if (strategy != "factored" or config in ("lora", "lokr", "pissa", "dora"))
    and (strategy != "additive" or config != "columns")
]


def layer(kind: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4).to(kind))


def adapted(config: str, strategy: str = "auto", dropout: float = 0.4, **settings: Any) -> tuple[Any, tt.Adapter]:
    made = layer()
    settings = {"dtype": torch.float64, "targets": "all-linear", **settings}
    adapter = tt.attach(made, CONFIGS[config], strategy=strategy, dropout=dropout, **settings)
    stir(adapter, 0.3)
    return made.train(), adapter


@pytest.mark.parametrize(("config", "strategy"), WAYS)
def test_evaluation_zero_and_a_fresh_adapter_change_no_bit(config: str, strategy: str) -> None:
    for kind in (torch.float64, torch.bfloat16):
        made, x = layer(kind), torch.randn(3, 6).to(kind)
        before = made(x)
        dtype = torch.promote_types(kind, torch.float32)
        adapter = tt.attach(made, CONFIGS[config], "all-linear", strategy=strategy, dropout=0.4, dtype=dtype)
        # The base's part sees the whole x.
        assert torch.equal(made.train()(x), before)
        stir(adapter, 0.3)
        same = copy.deepcopy(made)
        tt.adapters(same)["default"]._state.dropout = 0.0
        assert torch.equal(made.eval()(x), same.eval()(x))
        with torch.no_grad():
            assert torch.equal(made(x), same(x))
        state = torch.get_rng_state()
        assert torch.equal(same.train()(x), same.eval()(x))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(made.train()(x), same(x))


def test_loda_drops_the_input_before_its_nonlinearity() -> None:
    made, adapter = adapted("lora", "factored", activation="gelu")
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.manual_seed(7)
    found = made(x)
    torch.manual_seed(7)
    dropped = functional.dropout(x, 0.4, training=True)
    left, right = (adapter.arrays()[f"group0.split0.factor{index}"] for index in (0, 1))
    expected = functional.linear(x, made[0].weight, made[0].bias) + functional.gelu(dropped @ right) @ left.T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", ["lora", "superlora", "dora"])
def test_quantized_layers(config: str) -> None:
    tt.register_quantized("packed", Packed)
    made, x = model().train(), torch.randn(5, 8)
    base = made(x)
    adapter = tt.attach(made, CONFIGS[config], "all-linear", dropout=0.4)
    assert torch.equal(made(x), base)
    stir(adapter, 0.3)
    torch.manual_seed(0)
    with torch.no_grad():
        several = made[0](x[:1].expand(4000, 8))
        expected = made.eval()[0](x[:1])[0]
    error = several.std(0) / 4000**0.5
    assert ((several.mean(0) - expected).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("config", ["superlora", "dora", "hira"])
def test_where_a_module_reads_its_child_s_weight_features_are_dropped_for_the_batch(config: str) -> None:
    """nn.MultiheadAttention: zeros in columns of W' - W, the same for q and v, and the expectation is the update's."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, batch_first=True).double()
    adapter = tt.attach(made, CONFIGS[config], "qv", dtype=torch.float64, dropout=0.4)
    stir(adapter, 0.3)
    base, original = made.in_proj_weight.detach(), nn.MultiheadAttention.forward
    seen: list[Any] = []

    def look(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.in_proj_weight.detach() - base)
        return original(module, *args, **kwargs)

    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.MultiheadAttention, "forward", look)
        for number in range(61):
            made.train(number > 0)(x, x, x, need_weights=False)
    whole, *dropped = seen
    assert not whole[8:16].any()
    for one in dropped[:20]:
        # Either gone, in q and in v, or scaled.
        gone = (one[:8] == 0).all(0)
        assert torch.equal(gone, (one[16:] == 0).all(0))
        torch.testing.assert_close(one[:, ~gone], whole[:, ~gone] / 0.6, rtol=1e-10, atol=1e-12)
    # The factor of a column is 0 or 1 / 0.6, with the mean 1 and the standard deviation 0.82.
    kept = (torch.stack(dropped)[:, 0] != 0).double().mean()
    assert abs(kept - 0.6) < 5 * (0.6 * 0.4 / (8 * 60)) ** 0.5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
def test_checkpointing_recomputes_with_the_same_zeros(strategy: str, reentrant: bool) -> None:
    made, adapter = adapted("lora", strategy)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (lambda x: made(x), lambda x: checkpoint(made, x, use_reentrant=reentrant)):
        adapter._state.model.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("config", ["superlora", "dora", "hira"])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(48, 40), lambda: nn.Conv2d(48, 40, 1)], ids=["linear", "conv"])
def test_the_weight_strategy_keeps_no_matrix_for_backward(kind: Any, config: str, dropout: float) -> None:
    """Neither the update nor a sum is saved; gradients are those of ordinary operations."""
    torch.manual_seed(0)
    made = nn.Sequential(kind())
    stir(tt.attach(made, CONFIGS[config], ["0"], strategy="weight", dropout=dropout))
    shape = (2, 48) if made[0].weight.ndim == 2 else (1, 48, 2, 1)
    sizes = list[int]()

    def pack(saved: Any) -> Any:
        if saved.data_ptr() != made[0].weight.data_ptr():
            sizes.append(saved.untyped_storage().nbytes() // 4)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        made.train()(torch.randn(shape, requires_grad=True)).sum().backward()
    assert max(sizes) < 48 * 40 // 2


@pytest.mark.slow
@compiles_whole
@pytest.mark.parametrize("config", ["lora", "superlora", "dora"])
def test_compiled(config: str) -> None:
    torch._dynamo.reset()
    made, adapter = adapted(config)
    program = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for run in (made, program):
        made.zero_grad()
        torch.manual_seed(0)
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in adapter.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    made.eval()
    torch.testing.assert_close(program(x), made(x))
    assert not torch.allclose(made(x), found[0][0])


def test_it_is_no_part_of_a_file(tmp_path: Path) -> None:
    made, adapter = adapted("lora", dropout=0.25)
    assert adapter.dropout == 0.25
    adapter.save(tmp_path / "with.safetensors")
    adapter._state.dropout = 0.0
    adapter.save(tmp_path / "without.safetensors")
    assert (tmp_path / "with.safetensors").read_bytes() == (tmp_path / "without.safetensors").read_bytes()
    assert tt.load(layer(), tmp_path / "with.safetensors").dropout == 0.0
    assert tt.load(layer(), tmp_path / "with.safetensors", dropout=0.5).dropout == 0.5
    adapter.save_pretrained(tmp_path / "folder")
    assert tt.from_pretrained(layer(), tmp_path / "folder", dropout=0.5).dropout == 0.5
    assert copy.deepcopy(made)[0].training


@pytest.mark.parametrize("wrong", [1.0, -0.1, float("nan"), True, "0.1", None])
def test_no_probability(wrong: Any) -> None:
    with pytest.raises(tna.ConfigError, match="dropout must be a probability from 0 to below 1; got"):
        tt.attach(layer(), dropout=wrong, targets="all-linear")


def test_the_choice_of_a_strategy_counts_the_second_product() -> None:
    """A Kronecker product of full matrices, which is used as factors for fewer rows of x without dropout."""
    for dropout, strategy in ((0.0, "weight"), (0.1, "factored")):
        large = nn.Sequential(nn.Linear(768, 768, device="meta"))
        assert tt.attach(large, P.krona(), "all-linear", tokens=8192, dropout=dropout).strategy == (strategy,)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_it_is_the_dropout_of_peft(dora: bool) -> None:
    """The same arrays and seed give the output of PEFT's own layer with ``lora_dropout``."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.4, target_modules=["0"], use_dora=dora)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    own = theirs.base_model.model[0]
    with torch.no_grad():
        own.lora_B["default"].weight.normal_()
    made = nn.Sequential(nn.Linear(6, 4))
    made.load_state_dict({"0.weight": own.base_layer.weight, "0.bias": own.base_layer.bias})
    adapter = tt.attach(made, P.dora(2) if dora else P.lora(2), "all-linear", dropout=0.4)
    arrays = {
        "group0.split0.factor0": own.lora_B["default"].weight,
        "group0.split0.factor1": own.lora_A["default"].weight.T,
    }
    if dora:
        arrays["weight0.magnitude"] = own.lora_magnitude_vector["default"].weight
    adapter.load_arrays(
        {name: array.detach().reshape(adapter.plan.param_shapes[name]) for name, array in arrays.items()}
    )
    x = torch.randn(3, 6)
    found = []
    for run in (made.train(), theirs.train()):
        torch.manual_seed(7)
        found.append(run(x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_the_plug_in_of_peft_keeps_it_in_its_config(tmp_path: Path) -> None:
    peft, plugin = pytest.importorskip("peft"), pytest.importorskip("tnadapt.torch.peft")
    plugin.register()
    with pytest.raises(TypeError, match="'lora_dropout': use dropout"):
        plugin.TnadaptConfig(lora_dropout=0.1)
    with pytest.raises(tna.ConfigError, match="dropout must be a probability from 0 to below 1; got 2"):
        plugin.TnadaptConfig(dropout=2)
    for settings, dropout in (({"dropout": 0.25}, 0.25), ({}, 0.0)):
        config = plugin.TnadaptConfig(target_modules="all-linear", settings={"rank": 4}, **settings)
        made = peft.get_peft_model(layer(torch.float32), config)
        made.save_pretrained(tmp_path)
        assert ('"dropout": 0.25' in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")) == bool(settings)
        again = peft.PeftModel.from_pretrained(layer(torch.float32), tmp_path)
        assert tt.adapters(made)["default"].dropout == tt.adapters(again)["default"].dropout == dropout

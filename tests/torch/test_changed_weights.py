"""Torch models with updates that are multiplied with the weight (HiRA) or change its direction (DoRA)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth

from . import life
from .life import assert_near, passes, run
from .small import batch, small, stir
from .test_requantizing import Packed
from .test_requantizing import model as packed

COLUMNS = P.dora(2, magnitude_axis="cols")
#: Every way to apply W' with every strategy that it has.
WAYS = [
    (P.dora(2), "weight"), (P.dora(2), "factored"), (P.dora(2), "additive"), (COLUMNS, "weight"),
    (P.hira(2), "weight"), (P.hira(2), "additive"),
]  # fmt: skip
IDS = ["dora, weight", "dora, factored", "dora, additive", "columns, weight", "hira, weight", "hira, additive"]
CONFIGS = {
    "dora": P.dora(2), "columns": COLUMNS, "hira": P.hira(2), "theta": P.unilora(9, 2, apply="magnitude"),
    "behind F": P.superlora(2, projection="linear", ratio=0.5, apply="magnitude"),
    "nonlinear": P.superlora(2, projection="nonlinear", ratio=0.5, apply="hadamard"),
    "from the base": P.lora_xs(2, apply="magnitude"),
}  # fmt: skip


def layers(kind: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(kind)


def stirred(adapter: tt.Adapter, size: float = 0.3) -> tt.Adapter:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter += size / adapter.plan.units[name] * torch.randn_like(parameter)
    return adapter


def plain(model: Any, x: Any, adapter: tt.Adapter, detach: bool) -> tuple[Any, dict[str, Any]]:
    """The same by ordinary operations: the output, and the parameters that it is computed from."""
    leaves = {name: array.detach().clone().requires_grad_() for name, array in adapter.arrays().items()}
    config = adapter.config
    for index, place in enumerate((0, 2)):
        layer = model[place]
        weight = layer.weight.detach()
        delta = leaves[f"group{index}.split0.factor0"] @ leaves[f"group{index}.split0.factor1"].T
        if config.apply == "hadamard":
            changed = weight * (1 + delta)
        else:
            axis = 1 if config.magnitude_axis == "rows" else 0
            norm = (weight + delta).norm(dim=axis, keepdim=True)
            size = leaves[f"weight{index}.magnitude"].view(norm.shape)
            changed = size * (weight + delta) / (norm.detach() if detach else norm)
        x = functional.linear(x, changed, layer.bias)
        x = torch.tanh(x) if index == 0 else x
    return x, leaves


@pytest.mark.law("fresh-is-zero")
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_a_fresh_adapter_changes_no_bit(config: tna.Config, strategy: str, kind: Any) -> None:
    model, x = layers(kind), torch.randn(3, 6).to(kind)
    quiet, expected, before = run(model, x), model(x), life.bits(model)
    for dtype in {kind, torch.float64 if kind == torch.float64 else torch.float32}:
        adapter = tt.attach(model, config, "all-linear", strategy=strategy, dtype=dtype)
        assert adapter.strategy == (strategy,) * 2
        assert torch.equal(model(x), expected)
        assert torch.equal(run(model, x), quiet)
        adapter.merge()
        assert life.bits(model) == before
        adapter.unmerge()
        adapter.detach()


@pytest.mark.law("merge-is-attached")
@pytest.mark.parametrize("detach", [False, True], ids=["exact", "detached norm"])
@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_outputs_and_gradients_are_the_plain_formula_s(config: tna.Config, strategy: str, detach: bool) -> None:
    model, x = layers(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    adapter = stirred(
        tt.attach(model, config, "all-linear", strategy=strategy, dtype=torch.float64, detach_norm=detach)
    )
    expected, leaves = plain(model, x, adapter, detach)
    of_x, *of_leaves = torch.autograd.grad(expected.square().sum(), [x, *leaves.values()])
    formula = {"output": expected.detach(), **dict(zip(leaves, of_leaves, strict=True))}
    assert_near(passes(model, adapter, x), formula, 1e-11)
    torch.testing.assert_close(x.grad, of_x, rtol=1e-11, atol=1e-12)
    checkpointed = functools.partial(checkpoint, model, use_reentrant=False)
    assert_near(passes(checkpointed, adapter, x), formula, 1e-11)
    torch.testing.assert_close(run(model, x), formula["output"], rtol=1e-12, atol=1e-12)
    adapter.merge()
    torch.testing.assert_close(run(model, x), formula["output"], rtol=1e-12, atol=1e-12)
    adapter.unmerge()


@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_derivatives_of_the_layer(config: tna.Config, strategy: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    model = nn.Sequential(layer)
    adapter = stirred(tt.attach(model, config, "all-linear", strategy=strategy, dtype=torch.float64))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    own = list(adapter.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *own))
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *own))
    layer.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, layer.weight, layer.bias, *own))

    def loss(parameters: Any, x: Any) -> Any:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(loss)(parameters, x.detach())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach().unsqueeze(1))
    loss(dict(model.named_parameters()), x).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("way", in_depth(IDS, IDS[::2]))
def test_compiled(way: str) -> None:
    config, strategy = WAYS[IDS.index(way)]
    torch._dynamo.reset()
    model, x = layers(torch.float32), torch.randn(3, 6)
    adapter = tt.attach(model, config, "all-linear", strategy=strategy)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    stirred(adapter)
    for weight in (1.0, 0.5, 0.0):
        adapter.set_weight(weight)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(run(compiled, x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.law("merge-is-attached", "merge-disk-is-memory")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    """On weights of every sort: fused, separate, convolutions, those of nn.MultiheadAttention."""
    life.check_life(small, functools.partial(tt.attach, cfg=CONFIGS[name]), batch(), tmp_path)


@pytest.mark.law("merge-disk-is-memory")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dora", "columns", "hira", "behind F", "from the base"])
def test_merged_on_disk_to_the_byte(name: str, kind: Any, tmp_path: Path) -> None:
    model = small().to(kind)
    adapter = tt.attach(model, CONFIGS[name])
    stir(adapter)
    life.check_merged(lambda: small().to(kind), model, adapter, tmp_path)


def test_a_merge_that_leaves_the_range_changes_nothing() -> None:
    model = layers(torch.float16)
    before = life.bits(model)
    adapter = tt.attach(model, P.dora(2), "all-linear")
    for bad, message in (
        (1e6, r"2.weight plus its update exceeds the range of torch.float16"),
        (float("nan"), r"the update of 2.weight is not finite"),
    ):
        with torch.no_grad():
            dict(adapter.named_parameters())["weight1.magnitude"].fill_(bad)
        with pytest.raises(tna.BackendError, match=message):
            adapter.merge()
        assert life.bits(model) == before


# -- Parameters ----------------------------------------------------------------------------------


def test_magnitudes_are_trained_by_choice(tmp_path: Path) -> None:
    model, x = layers(torch.float32), torch.randn(2, 6)
    adapter = tt.attach(model, P.dora(2), "all-linear")
    adapter.set_trainable(arrays="magnitude")
    assert adapter.trained == ("weight0.magnitude", "weight1.magnitude")
    assert adapter.num_parameters == 5 + 4
    adapter.set_trainable(groups=1)
    assert adapter.trained == ("group1.split0.factor0", "group1.split0.factor1", "weight1.magnitude")
    adapter.set_trainable(arrays=["factor0", "factor1"])
    model(x).sum().backward()
    assert dict(adapter.named_parameters())["weight0.magnitude"].grad is None
    fast, slow = adapter.parameter_groups(1.0)[1]["params"], adapter.parameter_groups(1.0)[0]["params"]
    assert len(fast) == len(slow) == 2
    # Frozen, they are in the file.
    adapter.save(tmp_path / "adapter.safetensors")
    assert {"weight0.magnitude", "weight1.magnitude"} <= load_file(tmp_path / "adapter.safetensors").keys()
    other = layers(torch.float32)
    assert tt.load(other, tmp_path / "adapter.safetensors").trained == adapter.trained
    assert torch.equal(run(other, x), run(model, x))
    # A weight in several groups is in each.
    adapter = tt.attach(layers(), tna.Config(rank=1, groups=3, fold="hypercube", apply="magnitude"), "all-linear")
    adapter.set_trainable(groups=1)
    assert adapter.trained is not None
    assert adapter.trained[-2:] == ("weight0.magnitude", "weight1.magnitude")


def test_the_gradient_can_be_chosen_when_loading(tmp_path: Path) -> None:
    x = torch.linspace(-1.0, 1.0, 18).reshape(3, 6)
    stirred(tt.attach(layers(torch.float32), P.dora(2), "all-linear")).save_pretrained(tmp_path)
    gradients = []
    for detach in (False, True):
        model = layers(torch.float32)
        adapter = tt.from_pretrained(model, tmp_path, detach_norm=detach)
        gradients.append(passes(model, adapter, x)["group0.split0.factor0"])
    assert not torch.allclose(*gradients)


def test_on_the_meta_device_reset_fills_them(tmp_path: Path) -> None:
    attach = functools.partial(tt.attach, cfg=P.dora(2), targets="all-linear")
    life.check_from_meta(lambda: layers(torch.float32), attach, torch.randn(2, 6), tmp_path)


# -- Several adapters and mixing weights -----------------------------------------------------------


@pytest.mark.parametrize("name", ["dora", "hira"])
def test_it_acts_alone_on_its_rows(name: str) -> None:
    model, x = layers(torch.float32), torch.randn(2, 6)
    with torch.no_grad():
        base = model(x)
    one = tt.attach(model, CONFIGS[name], "all-linear", name="one")
    other = tt.attach(model, P.lora(2), ["2"], name="other")
    message = (
        rf"adapters 'one' and 'other' both act on 2.weight, and apply='{CONFIGS[name].apply}' of adapter 'one' is "
        r"not a sum that others could be added to: activate\(\) one of them, or detach the other"
    )
    with pytest.raises(tna.TargetError, match=message):
        model(x)
    with torch.no_grad():
        for adapter in (one, other):
            adapter.activate()
            assert torch.equal(model(x), base)
    other.merge()
    one.set_weight(1.0)
    with pytest.raises(tna.TargetError, match=r"both act on 2.weight"):
        model(x)
    with pytest.raises(
        tna.TargetError, match=r"adapter 'other' is merged into a weight of adapter 'one', .* unmerge 'other'"
    ):
        one.merge()
    other.unmerge()
    other.detach()
    assert torch.equal(model(x), base.requires_grad_(False))


def test_other_rows_of_a_fused_weight_are_free() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 3, 16)
    expected = model(x)
    q = tt.attach(model, P.dora(2), "q", name="q")
    v = tt.attach(model, P.lora(2), "v", name="v")
    assert torch.equal(model(x), expected)
    stirred(q), stirred(v)
    changed = model(x)
    q.merge()
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-5)
    v.merge()
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_a_mixing_weight_scales_the_update_and_zero_is_off(config: tna.Config, strategy: str) -> None:
    model, x = layers(), torch.randn(2, 6, dtype=torch.float64)
    base = model(x)
    adapter = stirred(tt.attach(model, config, "all-linear", strategy=strategy, dtype=torch.float64))
    adapter.set_weight(0.5)
    weighted = model(x)
    halved = {n: a * 0.5 if n.endswith("factor0") else a for n, a in adapter.arrays().items()}
    adapter.set_weight(1.0)
    adapter.load_arrays(halved)
    torch.testing.assert_close(weighted, model(x), rtol=1e-12, atol=1e-12)
    adapter.set_weight(0.0)
    assert torch.equal(model(x), base)


# -- Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [P.dora(2), COLUMNS, P.hira(2)], ids=["dora", "columns", "hira"])
def test_convolutions(config: tna.Config) -> None:
    torch.manual_seed(0)
    for conv, x in ((nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)), (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9))):
        model = nn.Sequential(conv)
        expected = model(x)
        adapter = tt.attach(model, config, "conv")
        assert torch.equal(model(x), expected)
        stirred(adapter)
        (changed,) = adapter.plan.merged(adapter.arrays(), [conv.weight.detach().reshape(6, -1)])
        torch.testing.assert_close(model(x), conv._conv_forward(x, changed.view_as(conv.weight), conv.bias))
        adapter.detach()


class Conv1D(nn.Module):
    """As in transformers: a linear layer that stores its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Any) -> Any:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("name", ["dora", "hira", "behind F"])
def test_quantized_weights(name: str) -> None:
    tt.register_quantized("packed", Packed)
    model, x = packed(), torch.randn(5, 8)
    expected = model(x)
    adapter = tt.attach(model, CONFIGS[name], "all-linear")
    assert "weight" not in adapter.strategy
    assert torch.equal(model(x), expected)
    stirred(adapter)
    leaves = {key: array.detach().clone().requires_grad_() for key, array in adapter.arrays().items()}
    one, two = adapter.plan.training_plan.merged(leaves, [model[0].numbers(), model[2].numbers()])
    reference = torch.tanh(x @ one.T) @ two.T
    reference.sum().backward()
    found = model(x)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    for key, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[key].grad, rtol=1e-4, atol=1e-4)


class Codes(nn.Module):
    """A quantized layer of a type that nobody registered."""

    in_features, out_features = 8, 12

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(12, 8, dtype=torch.int8))

    def forward(self, x: Any) -> Any:
        return x @ self.weight.float().T


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (
            lambda: packed(), {"cfg": COLUMNS}, tna.ConfigError,
            r"magnitude_axis='cols' changes the weight itself, and 0.weight is",
        ),
        (
            lambda: nn.Sequential(Codes()), {"cfg": P.hira(2)}, tna.ConfigError,
            r"apply='hadamard' needs the values of 0.weight, which is quantized, and they cannot be read: register",
        ),
        (
            lambda: nn.Sequential(Codes()), {"cfg": P.dora(2)}, tna.TargetError,
            r"\(apply='magnitude'\), and the values of 0.weight cannot be read: register",
        ),
        (
            layers, {"cfg": P.dora(2), "activation": "gelu"}, tna.ConfigError,
            r"activation='gelu' acts on the input of one",
        ),
        (
            layers, {"cfg": P.hira(2), "strategy": "factored"}, tna.ConfigError,
            r"strategy='factored' needs a linear layer",
        ),
        (
            layers, {"cfg": COLUMNS, "strategy": "additive"}, tna.ConfigError,
            r"magnitude_axis='cols' scales the input of 0.weight",
        ),
        (layers, {"cfg": P.dora(2), "detach_norm": 2}, tna.ConfigError, r"detach_norm must be True or False; got 2"),
    ],
)  # fmt: skip
def test_refused(make: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    tt.register_quantized("packed", Packed)
    model = make()
    with pytest.raises(error, match=message):
        tt.attach(model, targets="all-linear", **settings)
    assert not tt.adapters(model)


@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_half_precision_and_autocast(config: tna.Config, strategy: str) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16)
    model, x = layers(torch.float32), torch.randn(4, 6)
    adapter = tt.attach(model, config, "all-linear", strategy=strategy)
    with autocast:
        with adapter.disabled():
            expected = model(x)
        assert torch.equal(model(x), expected)
    stirred(adapter)
    with autocast:
        output = model(x)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), model(x), rtol=0.1, atol=0.1)
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


# -- Costs ---------------------------------------------------------------------------------------


def test_the_summary_says_that_it_is_no_lora() -> None:
    summary = tt.attach(layers(), P.dora(2), "all-linear").summary()
    assert summary.lora_rank is None
    assert summary.parameters == 49
    assert str(summary).endswith("merge only: apply='magnitude' does more than add its updates")


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])
@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_rows_of_a_fused_weight(config: tna.Config, strategy: str, whole: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    layer = (Conv1D(18, 4) if transposed else nn.Linear(4, 18)).double()
    model, x = nn.Sequential(layer), torch.randn(3, 4, dtype=torch.float64)
    stored = tuple(layer.weight.shape)
    # q, and v in two heads.
    rows = [None] if whole else [tna.Rows(0, 6, 18), tna.Rows(7, 2, 9, 2)]
    targets = [tna.Target("0", stored, "linear", rows=part, transposed=transposed) for part in rows]
    expected = model(x)
    adapter = tt.attach(model, config, targets, strategy=strategy, dtype=torch.float64)
    assert adapter.strategy == (strategy,) * len(rows)
    assert torch.equal(model(x), expected)
    stirred(adapter)
    leaves = {name: array.detach().clone().requires_grad_() for name, array in adapter.arrays().items()}
    weight = layer.weight.detach().T if transposed else layer.weight.detach()
    changed = weight.clone()
    parts = [list(range(18)) if part is None else part.indices() for part in rows]
    merged = adapter.plan.merged(leaves, [weight[index] for index in parts])
    for index, part in zip(parts, merged, strict=True):
        changed = changed.index_copy(0, torch.tensor(index), part)
    reference = functional.linear(x, changed, layer.bias)
    reference.square().sum().backward()
    formula = {"output": reference.detach(), **{name: array.grad for name, array in leaves.items()}}
    assert_near(passes(model, adapter, x), formula, 1e-11)
    torch.testing.assert_close(run(model, x), reference, rtol=1e-12, atol=1e-12)
    adapter.merge()
    torch.testing.assert_close(model(x), reference, rtol=1e-12, atol=1e-12)

"""Torch models with updates that are multiplied with the weight (HiRA) or change its direction (DoRA)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from . import life
from .life import assert_near, by_formula, passes, run
from .small import stir

COLUMNS = P.dora(2, magnitude_axis="cols")
#: Every way to apply W' with every strategy that it has.
WAYS = [
    (P.dora(2), "weight"), (P.dora(2), "factored"), (P.dora(2), "additive"), (COLUMNS, "weight"),
    (P.hira(2), "weight"), (P.hira(2), "additive"),
]  # fmt: skip
IDS = ["dora, weight", "dora, factored", "dora, additive", "columns, weight", "hira, weight", "hira, additive"]


def layers(kind: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(kind)


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


def assert_gradients_by_torch_func(model: Any, x: Any) -> None:
    def loss(parameters: Any, x: Any) -> Any:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    model.zero_grad()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    loss(dict(model.named_parameters()), x).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad)
            torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.law("merge-is-attached")
@pytest.mark.parametrize("detach", [False, True], ids=["exact", "detached norm"])
@pytest.mark.parametrize(("config", "strategy"), WAYS, ids=IDS)
def test_outputs_and_gradients_are_the_formula_s(
    config: tna.Config, strategy: str, detach: bool, tmp_path: Path
) -> None:
    model, x = layers(), torch.randn(3, 6, dtype=torch.float64)
    adapter = tt.attach(model, config, "all-linear", strategy=strategy, dtype=torch.float64, detach_norm=detach)
    stir(adapter, 0.3)
    formula = by_formula(adapter, layers(), x, detach)
    assert_near(passes(model, adapter, x), formula, 1e-11)
    checkpointed = functools.partial(checkpoint, model, use_reentrant=False)
    assert_near(passes(checkpointed, adapter, x), formula, 1e-11)
    torch.testing.assert_close(run(model, x), formula["output"], rtol=1e-12, atol=1e-12)
    adapter.save_pretrained(tmp_path)
    other = layers()
    again = tt.from_pretrained(other, tmp_path, dtype=torch.float64, detach_norm=detach)
    assert_near(passes(other, again, x), formula, 1e-11)
    assert_gradients_by_torch_func(model, x[:2])
    adapter.merge()
    torch.testing.assert_close(run(model, x), formula["output"], rtol=1e-12, atol=1e-12)


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


# -- Several adapters and mixing weights -----------------------------------------------------------


@pytest.mark.parametrize("config", [P.dora(2), P.hira(2)], ids=["dora", "hira"])
def test_it_acts_alone_on_its_rows(config: tna.Config) -> None:
    model, x = layers(torch.float32), torch.randn(2, 6)
    with torch.no_grad():
        base = model(x)
    one = tt.attach(model, config, "all-linear", name="one")
    other = tt.attach(model, P.lora(2), ["2"], name="other")
    message = (
        rf"adapters 'one' and 'other' both act on 2.weight, and apply='{config.apply}' of adapter 'one' is "
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
    stir(q, 0.3), stir(v, 0.3)
    changed = model(x)
    q.merge()
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-5)
    v.merge()
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-5)


def test_the_summary_says_that_it_is_no_lora() -> None:
    summary = tt.attach(layers(), P.dora(2), "all-linear").summary()
    assert summary.export.rank is None
    assert summary.parameters == 49
    assert str(summary).endswith("merge only: apply='magnitude' does more than add its updates")


@pytest.mark.law("attached-is-update")
def test_two_sums_next_to_one_that_rests() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)
    one, two, rests = (
        tt.attach(model, config, "all-linear", name, strategy="weight", dtype=torch.float64)
        for name, config in (("one", P.lora(2)), ("two", P.lora(2)), ("rests", P.dora(2)))
    )
    for adapter in (one, two, rests):
        stir(adapter)
    rests.set_weight(0.0)
    expected = x @ (model[0].weight + one.deltas()[0] + two.deltas()[0]).T + model[0].bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(run(model, x), expected)

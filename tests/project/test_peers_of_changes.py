"""DoRA and HiRA against PEFT's and LyCORIS's own modules, with their own numbers.

They compute in float32. Their faults and conventions are pinned as in ``test_peers``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt import presets

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import tnadapt.torch as tt

TOLERANCE = 1e-6
SIDES = st.integers(2, 24)
SEEDS = st.integers(0, 2**31 - 1)
ALPHAS = st.sampled_from([1.0, 3.0, 16.0])


def peft_layer(config: Any, rows: int, cols: int, seed: int) -> tuple[Any, Any]:
    """PEFT's model of one weight with random parameters, and its layer."""
    torch.manual_seed(seed % 1000)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(cols, rows)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # A magnitude stays near the norm, where it starts.
                parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.ndim == 1 else 1.0))
    return model, model.base_model.model[0]


def numbers(array: Any) -> np.ndarray:
    return np.asarray(array.detach(), np.float64)


def check_equal(found: np.ndarray, theirs: Any) -> None:
    theirs = numbers(theirs)
    assert found.shape == theirs.shape
    assert np.max(np.abs(found - theirs)) < TOLERANCE * max(1.0, np.max(np.abs(theirs)))


def of_dora(layer: Any) -> dict[str, np.ndarray]:
    return {
        "group0.split0.factor0": numbers(layer.lora_B["default"].weight),
        "group0.split0.factor1": numbers(layer.lora_A["default"].weight.T),
        "weight0.magnitude": numbers(layer.lora_magnitude_vector["default"].weight),
    }


def of_hira(layer: Any) -> dict[str, np.ndarray]:
    return {
        "group0.split0.factor0": numbers(layer.hira_B["default"]),
        "group0.split0.factor1": numbers(layer.hira_A["default"].T),
    }


@pytest.mark.law("presets", "peft-agrees")
@settings(max_examples=15, deadline=None)
@given(SIDES, SIDES, st.integers(1, 6), ALPHAS, SEEDS)
def test_dora_is_peft_s(rows: int, cols: int, rank: int, alpha: float, seed: int) -> None:
    model, layer = peft_layer(
        peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=True, target_modules=["0"]), rows, cols, seed
    )
    weight, bias = numbers(layer.base_layer.weight), numbers(layer.base_layer.bias)
    plan = tna.SuperLoRA(presets.dora(rank, alpha=alpha), [(rows, cols)])
    (found,) = plan.merged(of_dora(layer), [weight])
    x = torch.randn(3, cols)
    check_equal(numbers(x) @ found.T + bias, model(x))
    model.merge_adapter()
    check_equal(found, layer.base_layer.weight)


@pytest.mark.law("presets", "peft-agrees")
@settings(max_examples=15, deadline=None)
@given(SIDES, SIDES, st.integers(1, 6), SEEDS)
def test_hira_is_peft_s(rows: int, cols: int, rank: int, seed: int) -> None:
    model, layer = peft_layer(peft.HiraConfig(r=rank, target_modules=["0"]), rows, cols, seed)
    weight, bias = numbers(layer.base_layer.weight), numbers(layer.base_layer.bias)
    (found,) = tna.SuperLoRA(presets.hira(rank), [(rows, cols)]).merged(of_hira(layer), [weight])
    x = torch.randn(3, cols)
    check_equal(numbers(x) @ found.T + bias, model(x))
    model.merge_adapter()
    check_equal(found, layer.base_layer.weight)


@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
def test_gradients_are_peft_s_with_a_detached_norm(strategy: str) -> None:
    model, layer = peft_layer(peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"]), 12, 8, 0)
    own = torch.nn.Sequential(torch.nn.Linear(8, 12))
    own[0].load_state_dict(layer.base_layer.state_dict())
    adapter = tt.attach(own, P.dora(3, alpha=6), "all-linear", strategy=strategy, detach_norm=True)
    adapter.load_arrays(of_dora(layer))
    x = torch.randn(5, 8)
    torch.testing.assert_close(own(x), model(x), rtol=1e-5, atol=1e-5)
    own(x).square().sum().backward()
    model(x).square().sum().backward()
    theirs = {
        "group0.split0.factor0": layer.lora_B["default"].weight.grad,
        "group0.split0.factor1": layer.lora_A["default"].weight.grad.T,
        "weight0.magnitude": layer.lora_magnitude_vector["default"].weight.grad,
    }
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-4)


def test_counts_are_peft_s() -> None:
    for config, ours in (
        (peft.LoraConfig(r=8, use_dora=True, target_modules=["0"]), presets.dora(8)),
        (peft.HiraConfig(r=8, target_modules=["0"]), presets.hira(8)),
    ):
        model, _ = peft_layer(config, 768, 768, 0)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trained == tna.parameter_count(ours, [(768, 768)])


def test_fault_a_fresh_dora_of_peft_s_changes_the_output_in_half_precision() -> None:
    """PEFT divides norms that it computes again: in bfloat16 the output moves before anything is trained."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(64, 48)).bfloat16()
    x = torch.randn(9, 64).bfloat16()
    expected = base(x)
    adapter = tt.attach(base, presets.dora(4), "all-linear")
    assert torch.equal(base(x), expected)
    adapter.detach()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, use_dora=True, target_modules=["0"]))
    assert not torch.equal(model(x), expected)


def test_fault_peft_s_hira_ignores_its_rank_pattern() -> None:
    _, layer = peft_layer(peft.HiraConfig(r=3, rank_pattern={"0": 2}, target_modules=["0"]), 6, 4, 0)
    assert layer.hira_A["default"].shape == (3, 4)


@pytest.mark.law("lycoris-agrees")
@settings(max_examples=10, deadline=None)
@given(SIDES, SIDES, st.integers(1, 4), st.booleans(), SEEDS)
def test_dora_is_lycoris_s_by_rows_and_by_columns(rows: int, cols: int, rank: int, on_out: bool, seed: int) -> None:
    lycoris = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(seed % 1000)
    base = torch.nn.Linear(cols, rows, bias=False)
    layer = lycoris.LoConModule(
        "x", base, lora_dim=rank, alpha=3.0, weight_decompose=True, wd_on_out=on_out
    )  # fmt: skip
    with torch.no_grad():
        layer.lora_up.weight.normal_()
        layer.dora_scale.add_(0.1 * torch.randn(layer.dora_scale.shape))
    config = presets.dora(rank, alpha=3.0, magnitude_axis="rows" if on_out else "cols")
    params = {
        "group0.split0.factor0": numbers(layer.lora_up.weight),
        "group0.split0.factor1": numbers(layer.lora_down.weight.T),
        "weight0.magnitude": numbers(layer.dora_scale).reshape(-1),
    }
    plan = tna.SuperLoRA(config, [(rows, cols)]).with_base([numbers(base.weight)])
    (found,) = plan.merged(params, [numbers(base.weight)])
    check_equal(found, layer.get_merged_weight()[0])

"""FourierFT, WaveFT, C3A, SHiRA, MiSS, DoRA and HiRA against PEFT's own modules, with PEFT's numbers and positions.

PEFT, and LyCORIS for DoRA, compute in float32. (PEFT has no LoCA.)
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

few = settings(max_examples=15, deadline=None)


def peft_layer(method: str, rows: int, cols: int, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """PEFT's model of one weight with random parameters, and its layer."""
    torch.manual_seed(seed % 1000)
    config = getattr(peft, f"{method}Config")(target_modules=["0"], **options)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(cols, rows)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # A magnitude stays near the norm, where it starts.
                parameter.add_(torch.randn(parameter.shape) * (0.1 if "magnitude" in name else 1.0))
    return model, model.base_model.model[0]


def numbers(array: Any) -> np.ndarray:
    return np.asarray(array.detach(), np.float64)


def check_equal(ours: np.ndarray, theirs: Any, least: float = 0.0) -> None:
    """The largest difference is small relative to the largest of their elements, or to ``least`` if that is larger."""
    theirs = numbers(theirs)
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) < TOLERANCE * max(least, np.max(np.abs(theirs)))


# -- Updates that PEFT computes from one array ----------------------------------------------------


def delta(config: tna.Config, values: Any, shape: tuple[int, int]) -> np.ndarray:
    """Our ΔW of one array."""
    plan = tna.SuperLoRA(config, [shape])
    flat = numbers(values).reshape(-1)
    assert plan.param_shapes == {"group0.split0.dense": flat.shape}
    return np.asarray(plan.deltas({"group0.split0.dense": flat})[0])


def check_output(ours: np.ndarray, layer: Any, atol: float) -> None:
    x = torch.randn(5, ours.shape[1])
    theirs = (layer(x) - layer.base_layer(x)).detach().numpy()
    np.testing.assert_allclose(x.numpy() @ ours.T, theirs, atol=atol)


def places(indices: Any, cols: int) -> tuple[int, ...]:
    return tuple((indices[0].long() * cols + indices[1].long()).tolist())


@pytest.mark.law("presets")
@few
@given(SIDES, SIDES, SEEDS, st.data())
def test_fourierft(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, rows * cols))
    scale = data.draw(st.sampled_from([150.0, 3.0]))
    _, theirs = peft_layer("FourierFT", rows, cols, seed, n_frequency=n, scaling=scale, random_loc_seed=seed)
    config = presets.fourierft(n, places(theirs.indices["default"], cols), alpha=scale)
    check_equal(delta(config, theirs.fourierft_spectrum["default"], (rows, cols)), theirs.get_delta_weight("default"))


@pytest.mark.law("presets")
@few
@given(SIDES, SIDES, SEEDS, st.sampled_from(["db1", "db2", "db3", "db4", "db8", "db10"]), st.data())
def test_waveft(rows: int, cols: int, seed: int, family: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, min(50, rows * cols)))
    _, theirs = peft_layer("WaveFT", rows, cols, seed, n_frequency=n, wavelet_family=family, random_loc_seed=seed)
    wavelet = tna.maps.Wavelet(family)
    shape = wavelet.coefficients(rows), wavelet.coefficients(cols)
    # PEFT leaves coefficients at the edges out, and has two quarters the other way round: its upper right one is
    # high-pass along rows.
    place = [
        index.long() + (longer - size) // 2
        for index, longer, size in zip(theirs.waveft_indices["default"], shape, (rows, cols), strict=True)
    ]
    halves = [longer // 2 for longer in shape]
    high = [index >= half for index, half in zip(place, halves, strict=True)]
    swapped = [
        index - own.long() * half + other.long() * half
        for index, half, own, other in zip(place, halves, high, high[::-1], strict=True)
    ]
    config = presets.waveft(n, places(swapped, shape[1]), family)
    assert config.alpha == 25.0  # as PEFT's scaling
    check_equal(delta(config, theirs.waveft_spectrum["default"], (rows, cols)), theirs.get_delta_weight("default"))


@pytest.mark.law("presets")
@few
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_c3a(block: int, down: int, across: int, seed: int) -> None:
    shape = down * block, across * block
    _, theirs = peft_layer("C3A", *shape, seed, block_size=block)
    ours = delta(presets.c3a(block), theirs.c3a_kernel["default"], shape)
    check_equal(ours, theirs.get_delta_weight("default"))
    check_output(ours, theirs, atol=1e-5)


@pytest.mark.law("presets")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@few
@given(st.integers(4, 24), st.integers(4, 24), SEEDS)
def test_shira(rows: int, cols: int, seed: int) -> None:
    r = rows * cols // (2 * (rows + cols))
    if r == 0:
        return
    _, theirs = peft_layer("Shira", rows, cols, seed, r=r, random_seed=seed % 1000)
    config = presets.shira(r * (rows + cols), places(theirs.shira_indices["default"], cols))
    ours = delta(config, theirs.shira_weight["default"], (rows, cols))
    check_equal(ours, theirs.get_delta_weight("default").to_dense())


def check_miss(layer: Any, ours: np.ndarray) -> None:
    base = layer.base_layer.weight.detach().clone()
    change = layer.get_delta_weight_miss("default", base.clone()) - base  # it returns the whole weight
    np.testing.assert_allclose(ours, change.detach().numpy(), atol=1e-5)


@pytest.mark.law("presets")
@few
@given(SIDES, SIDES, SEEDS, st.data())
def test_miss(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, cols))
    _, theirs = peft_layer("Miss", rows, cols, seed, r=r)
    ours = delta(presets.miss(r), theirs.miss_block["default"].T, (rows, cols))
    check_miss(theirs, ours)
    check_output(ours, theirs, atol=1e-4)


@pytest.mark.law("presets")
@pytest.mark.parametrize(("rows", "cols", "r", "mini"), [(12, 8, 4, 3), (12, 9, 4, 6), (6, 5, 5, 1)])
def test_miss_mini(rows: int, cols: int, r: int, mini: int) -> None:
    _, theirs = peft_layer("Miss", rows, cols, r=r, mini_r=mini, init_weights="mini")
    check_miss(theirs, delta(presets.miss(r, mini), theirs.miss_block["default"].T, (rows, cols)))


# -- DoRA and HiRA ----------------------------------------------------------------------------------


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
@pytest.mark.parametrize("method", ["dora", "hira"])
@few
@given(SIDES, SIDES, st.integers(1, 6), ALPHAS, SEEDS)
def test_a_weight_changed_by_its_norm_or_elements_is_peft_s(
    method: str, rows: int, cols: int, rank: int, alpha: float, seed: int
) -> None:
    if method == "dora":
        model, layer = peft_layer("Lora", rows, cols, seed, r=rank, lora_alpha=alpha, use_dora=True)
        config, params = presets.dora(rank, alpha=alpha), of_dora(layer)
    else:
        model, layer = peft_layer("Hira", rows, cols, seed, r=rank)
        config, params = presets.hira(rank), of_hira(layer)
    weight, bias = numbers(layer.base_layer.weight), numbers(layer.base_layer.bias)
    (ours,) = tna.SuperLoRA(config, [(rows, cols)]).merged(params, [weight])
    x = torch.randn(3, cols)
    check_equal(numbers(x) @ ours.T + bias, model(x), least=1.0)
    model.merge_adapter()
    check_equal(ours, layer.base_layer.weight, least=1.0)


@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
def test_gradients_are_peft_s_with_a_detached_norm(strategy: str) -> None:
    model, layer = peft_layer("Lora", 12, 8, r=3, lora_alpha=6, use_dora=True)
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


@pytest.mark.law("lycoris-agrees")
@settings(max_examples=10, deadline=None)
@given(SIDES, SIDES, st.integers(1, 4), st.booleans(), SEEDS)
def test_dora_is_lycoris_s_by_rows_and_by_columns(rows: int, cols: int, rank: int, on_out: bool, seed: int) -> None:
    lycoris = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(seed % 1000)
    base = torch.nn.Linear(cols, rows, bias=False)
    layer = lycoris.LoConModule("x", base, lora_dim=rank, alpha=3.0, weight_decompose=True, wd_on_out=on_out)
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
    (ours,) = plan.merged(params, [numbers(base.weight)])
    check_equal(ours, layer.get_merged_weight()[0], least=1.0)

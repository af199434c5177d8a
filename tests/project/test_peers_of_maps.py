"""FourierFT, WaveFT, C3A, SHiRA and MiSS against PEFT's own modules, with PEFT's own numbers and positions.

PEFT computes in float32. Its faults and conventions are pinned as in ``test_peers``: a ``test_fault_…`` that fails
means that PEFT was repaired. (PEFT has no LoCA.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt import presets

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-6
SIDES = st.integers(2, 24)
SEEDS = st.integers(0, 2**31 - 1)


def layer(config: Any, rows: int, cols: int, seed: int = 0) -> Any:
    """PEFT's module of one weight, with random parameters."""
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=False)), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.base_model.model[0]


def ours(config: tna.Config, values: Any, shape: tuple[int, int]) -> np.ndarray:
    plan = tna.SuperLoRA(config, [shape])
    given_values = np.asarray(values.detach(), np.float64).reshape(-1)
    assert plan.param_shapes == {"group0.split0.dense": given_values.shape}
    return np.asarray(plan.deltas({"group0.split0.dense": given_values})[0])


def check_equal(found: np.ndarray, theirs: Any) -> None:
    theirs = theirs.detach().numpy()
    assert found.shape == theirs.shape
    assert np.max(np.abs(found - theirs)) < TOLERANCE * np.max(np.abs(theirs))


def places(indices: Any, cols: int) -> tuple[int, ...]:
    return tuple((indices[0].long() * cols + indices[1].long()).tolist())


@pytest.mark.law("presets")
@settings(max_examples=15)
@given(SIDES, SIDES, SEEDS, st.data())
def test_fourierft(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, rows * cols))
    scale = data.draw(st.sampled_from([150.0, 3.0]))
    theirs = layer(
        peft.FourierFTConfig(n_frequency=n, scaling=scale, target_modules=["0"], random_loc_seed=seed), rows, cols, seed
    )
    config = presets.fourierft(n, places(theirs.indices["default"], cols), alpha=scale)
    check_equal(ours(config, theirs.fourierft_spectrum["default"], (rows, cols)), theirs.get_delta_weight("default"))


@pytest.mark.law("presets")
@settings(max_examples=15)
@given(SIDES, SIDES, SEEDS, st.sampled_from(["db1", "db2", "db3", "db4", "db8", "db10"]), st.data())
def test_waveft(rows: int, cols: int, seed: int, family: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, min(50, rows * cols)))
    theirs = layer(
        peft.WaveFTConfig(n_frequency=n, wavelet_family=family, target_modules=["0"], random_loc_seed=seed),
        rows, cols, seed,
    )  # fmt: skip
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
    check_equal(ours(config, theirs.waveft_spectrum["default"], (rows, cols)), theirs.get_delta_weight("default"))


@pytest.mark.law("presets")
@settings(max_examples=15)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_c3a(block: int, down: int, across: int, seed: int) -> None:
    theirs = layer(peft.C3AConfig(block_size=block, target_modules=["0"]), down * block, across * block, seed)
    found = ours(presets.c3a(block), theirs.c3a_kernel["default"], (down * block, across * block))
    check_equal(found, theirs.get_delta_weight("default"))
    x = torch.randn(5, across * block)
    np.testing.assert_allclose(x.numpy() @ found.T, (theirs(x) - theirs.base_layer(x)).detach().numpy(), atol=1e-5)


@pytest.mark.law("presets")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@settings(max_examples=15)
@given(st.integers(4, 24), st.integers(4, 24), SEEDS)
def test_shira(rows: int, cols: int, seed: int) -> None:
    r = rows * cols // (2 * (rows + cols))
    if r == 0:
        return
    theirs = layer(peft.ShiraConfig(r=r, target_modules=["0"], random_seed=seed % 1000), rows, cols, seed)
    config = presets.shira(r * (rows + cols), places(theirs.shira_indices["default"], cols))
    check_equal(
        ours(config, theirs.shira_weight["default"], (rows, cols)), theirs.get_delta_weight("default").to_dense()
    )


@pytest.mark.law("presets")
@settings(max_examples=15)
@given(SIDES, SIDES, SEEDS, st.data())
def test_miss(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, cols))
    theirs = layer(peft.MissConfig(r=r, target_modules=["0"]), rows, cols, seed)
    base = theirs.base_layer.weight.detach().clone()
    change = theirs.get_delta_weight_miss("default", base.clone()) - base  # it returns the whole weight
    found = ours(presets.miss(r), theirs.miss_block["default"].T, (rows, cols))
    np.testing.assert_allclose(found, change.detach().numpy(), atol=1e-5)
    x = torch.randn(5, cols)
    np.testing.assert_allclose(x.numpy() @ found.T, (theirs(x) - theirs.base_layer(x)).detach().numpy(), atol=1e-4)


@pytest.mark.law("presets")
@pytest.mark.parametrize(("rows", "cols", "r", "mini"), [(12, 8, 4, 3), (12, 9, 4, 6), (6, 5, 5, 1)])
def test_miss_mini(rows: int, cols: int, r: int, mini: int) -> None:
    config = peft.MissConfig(r=r, mini_r=mini, init_weights="mini", target_modules=["0"])
    theirs = layer(config, rows, cols)
    base = theirs.base_layer.weight.detach().clone()
    change = theirs.get_delta_weight_miss("default", base.clone()) - base
    found = ours(presets.miss(r, mini), theirs.miss_block["default"].T, (rows, cols))
    np.testing.assert_allclose(found, change.detach().numpy(), atol=1e-5)


COUNTS: dict[str, tuple[Callable[[], Any], tna.Config, int]] = {
    "fourierft": (
        lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=["0"]), presets.fourierft(1000), 1000
    ),
    "waveft": (lambda: peft.WaveFTConfig(n_frequency=1000, target_modules=["0"]), presets.waveft(1000), 1000),
    "c3a": (lambda: peft.C3AConfig(block_size=768, target_modules=["0"]), presets.c3a(768), 768),
    "shira": (lambda: peft.ShiraConfig(r=2, target_modules=["0"]), presets.shira(2 * 2 * 768), 3072),
    "miss": (lambda: peft.MissConfig(r=64, target_modules=["0"]), presets.miss(64), 64 * 768),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    make, config, count = COUNTS[name]
    theirs = layer(make(), 768, 768)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == count
    assert tna.parameter_count(config, [(768, 768)] * 24) == 24 * count


# -- Where PEFT errs, or has a convention of its own -----------------------------------------------


def test_fault_the_second_of_two_c3a_adapters_gets_the_output_of_the_first() -> None:
    theirs = layer(peft.C3AConfig(block_size=4, target_modules=["0"]), 8, 8)
    theirs.update_layer("second", 4, peft.C3AConfig(block_size=4, target_modules=["0"]))
    with torch.no_grad():
        theirs.c3a_kernel["second"].normal_()
    theirs.set_adapter(["default", "second"])
    one, two = (theirs.get_delta_weight(name).detach() for name in ("default", "second"))
    x = torch.randn(3, 8)
    found = (theirs(x) - theirs.base_layer(x)).detach()
    torch.testing.assert_close(found, x @ one.T + (x @ one.T) @ two.T)
    assert not torch.allclose(found, x @ (one + two).T, atol=1e-3)  # which merge() adds


def test_fault_merging_a_half_precision_mini_miss_replaces_its_parameter() -> None:
    config = peft.MissConfig(r=4, mini_r=3, init_weights="mini", target_modules=["0"])
    theirs = layer(config, 12, 8).to(torch.bfloat16)
    assert theirs.miss_block["default"].shape == (4, 3)
    theirs.merge()
    assert theirs.miss_block["default"].shape == (4, 12)  # as repeated for the merge
    theirs.miss_block["default"].data = theirs.miss_block["default"].data[:, :3]


def test_convention_waveft_interchanges_two_quarters_of_the_coefficients() -> None:
    """A coefficient in the upper right is high-pass along columns to PyWavelets, and along rows to PEFT."""
    pywt = pytest.importorskip("pywt")
    theirs = layer(peft.WaveFTConfig(n_frequency=16, target_modules=["0"], scaling=1.0), 4, 4)
    spectrum = torch.zeros(4, 4)
    row, col = theirs.waveft_indices["default"]
    spectrum[row, col] = theirs.waveft_spectrum["default"].detach()
    quarters = pywt.array_to_coeffs(
        spectrum.numpy(), pywt.coeffs_to_array(pywt.wavedec2(np.zeros((4, 4)), "db1", level=1))[1], "wavedec2"
    )
    change = theirs.get_delta_weight("default").detach().numpy()
    assert np.max(np.abs(pywt.waverec2(quarters, "db1") - change)) > 0.1
    low, (rows, cols, both) = quarters
    np.testing.assert_allclose(pywt.waverec2([low, (cols, rows, both)], "db1"), change, atol=1e-5)


def test_convention_fourierft_computes_in_single_precision() -> None:
    theirs = layer(peft.FourierFTConfig(n_frequency=9, target_modules=["0"]), 6, 6).double()
    config = presets.fourierft(9, places(theirs.indices["default"], 6))
    found = ours(config, theirs.fourierft_spectrum["default"], (6, 6))
    change = theirs.get_delta_weight("default").detach().numpy()
    assert 1e-9 < np.max(np.abs(found - change)) / np.max(np.abs(found)) < TOLERANCE

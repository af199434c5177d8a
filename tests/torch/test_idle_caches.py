"""What inactive adapters keep: no more than a model's limit, and equal draws only once."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.algebra.maps.fastfood import Linear
from tnadapt.backends.backend import FixedArrays
from tnadapt.torch._registry import _bytes_held as _held
from tnadapt.torch._registry import drawn, held_by_draws

from .small import stir

SIZE = 64
UPDATES = 2 * SIZE * SIZE * 4  # bytes of ΔW of both layers
CONFIGS = {
    "superlora": tna.presets.superlora(2),
    "F": tna.presets.superlora(2, projection="linear", ratio=0.1),
    "unilora": tna.presets.unilora(50),
    "dora": tna.presets.dora(2),
    "fourierft": tna.presets.fourierft(20),
}


def model_with(config: tna.Config, number: int, **how: object) -> tuple[nn.Module, list[tt.Adapter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)).eval()
    adapters = [tt.attach(model, config, "all-linear", f"a{i}", strategy="weight", **how) for i in range(number)]
    for adapter in adapters:
        stir(adapter)
    return model, adapters


def held(adapters: list[tt.Adapter]) -> list[int]:
    """Bytes of each adapter's updates, without draws."""
    return [adapter._state.cache.held() for adapter in adapters]


def outputs(model: nn.Module, adapters: list[tt.Adapter], x: Tensor) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for adapter in adapters:
            adapter.activate()
            found.append(model(x))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_that_were_active_once_keep_no_more_than_the_limit(name: str) -> None:
    model, adapters = model_with(CONFIGS[name], 8)
    tt.set_cache_limit(model, UPDATES * 3)
    x = torch.randn(5, SIZE)
    first = outputs(model, adapters, x)
    idle = [adapter._state for adapter in adapters[:-1]]
    shared = {id(one) for one in drawn(adapters[-1]._state.plan)}
    own = [held_by_draws(one for one in drawn(state.plan) if id(one) not in shared) for state in idle]
    assert sum(state.cache.held() + state.quotients.held() for state in idle) + sum(own) <= UPDATES * 3
    # What was freed is computed again, with the same bits.
    for before, after in zip(first, outputs(model, adapters, x), strict=True):
        assert torch.equal(before, after)


def test_the_longest_idle_goes_first_and_the_active_one_keeps_all() -> None:
    model, adapters = model_with(CONFIGS["superlora"], 4)
    x = torch.randn(5, SIZE)
    outputs(model, adapters[:1], x)
    one = _held(adapters[0]._state)
    assert one >= UPDATES
    tt.set_cache_limit(model, 2 * one)
    outputs(model, adapters, x)
    assert [bool(number) for number in held(adapters)] == [False, True, True, True]
    outputs(model, [adapters[1]], x)  # it comes back; 2, 3 and nothing else are idle
    assert [bool(number) for number in held(adapters)] == [False, True, True, True]
    outputs(model, [adapters[0]], x)
    assert [bool(number) for number in held(adapters)] == [True, True, False, True]


def test_nothing_is_kept_with_a_limit_of_zero() -> None:
    model, adapters = model_with(CONFIGS["F"], 2)
    tt.set_cache_limit(model, 0)
    with torch.no_grad():
        model(torch.randn(5, SIZE))
        assert _held(adapters[0]._state) > 0
        tt.mix(model, {})
    assert [_held(adapter._state) for adapter in adapters] == [0, 0]


def test_a_weight_of_zero_and_the_end_of_rows_count_as_idle() -> None:
    model, adapters = model_with(CONFIGS["superlora"], 2)
    tt.set_cache_limit(model, 0)
    x = torch.randn(2, SIZE)
    with torch.no_grad():
        model(x)
        adapters[0].set_weight(0.0)
        assert [bool(number) for number in held(adapters)] == [False, True]
        adapters[1].set_weight(0.0)
        with tt.rows(model, ["a0", "a1"]):
            model(x)
            assert all(held(adapters))
    assert not any(held(adapters))


def test_adapters_that_fit_are_all_kept_by_default() -> None:
    model, adapters = model_with(CONFIGS["superlora"], 5)
    outputs(model, adapters, torch.randn(5, SIZE))
    assert all(held(adapters))
    assert sum(map(_held, (adapter._state for adapter in adapters))) < 32 * 2**20


@pytest.mark.parametrize("name", ["F", "fourierft"])
def test_equal_draws_exist_once(name: str) -> None:
    model, (one, other) = model_with(CONFIGS[name], 2)
    mine, yours = (adapter.plan.groups[0].projection.map for adapter in (one, other))
    assert mine is yours
    third = tt.attach(model, CONFIGS[name].replace(seed=1), "all-linear", "third", strategy="weight")
    assert third.plan.groups[0].projection.map is not mine
    x = torch.randn(5, SIZE)
    tt.set_cache_limit(model, 0)
    outputs(model, [one, other], x)
    # One of two that use them is idle, so they stay.
    assert held_by_draws(mine.components()) > 0
    outputs(model, [third], x)
    assert held_by_draws(mine.components()) == 0


def test_arrays_on_a_device_count_where_they_have_memory_of_their_own() -> None:
    draws = FixedArrays()
    draws.kept["a"] = np.zeros(10)
    draws.placed["torch", "cpu", "a"] = torch.from_numpy(draws.kept["a"])
    assert held_by_draws([draws, draws]) == 80
    draws.placed["torch", "cuda:0", "a"] = torch.zeros(10, dtype=torch.float64)
    assert held_by_draws([draws, draws]) == 160


def test_a_copy_has_the_limit_and_caches_of_its_own() -> None:
    model, adapters = model_with(CONFIGS["superlora"], 2)
    tt.set_cache_limit(model, 0)
    x = torch.randn(5, SIZE)
    (found,) = outputs(model, adapters[:1], x)
    other = copy.deepcopy(model)
    theirs = tt.adapters(other)
    assert torch.equal(outputs(other, [theirs["a0"]], x)[0], found)
    theirs["a1"].activate()
    assert [bool(number) for number in held(list(theirs.values()))] == [False, False]
    assert held(adapters)[0] > 0


@pytest.mark.parametrize("limit", [-1, 1.5, "32MB", None, True])
def test_a_limit_is_a_number_of_bytes(limit: object) -> None:
    model, _ = model_with(CONFIGS["superlora"], 1)
    with pytest.raises(tna.ConfigError, match=r"^limit must be (an integer; got|from 0 to)"):
        tt.set_cache_limit(model, limit)  # type: ignore[arg-type]


def test_swapped_files_are_checked_without_drawing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (adapter,) = model_with(CONFIGS["F"], 1)
    digested = []
    plain = Linear.digest
    monkeypatch.setattr(Linear, "digest", lambda self: digested.append(1) or plain(self))
    for number in (1.0, 2.0):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(number)
        adapter.save(tmp_path / f"{number}.safetensors")
    digested.clear()
    for number in (1.0, 2.0, 1.0):
        adapter.swap(tmp_path / f"{number}.safetensors")
        assert all(bool((parameter == number).all()) for parameter in adapter.parameters())
    assert len(digested) <= 1
    _, (foreign,) = model_with(CONFIGS["F"].replace(seed=1), 1)
    foreign.save(tmp_path / "other.safetensors")
    with pytest.raises(tna.TnadaptError, match="seed"):
        adapter.swap(tmp_path / "other.safetensors")


def test_the_memory_that_kernels_reuse_is_freed_too() -> None:
    pytest.importorskip("numba")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 192)).eval()  # long enough for the compiled kernels
    adapter = tt.attach(model, CONFIGS["F"], "all-linear", strategy="weight")
    stir(adapter)
    tt.set_cache_limit(model, 0)
    with torch.no_grad():
        model(torch.randn(5, 192))
    spaces = [one for one in drawn(adapter._state.plan) if getattr(one, "space", None) is not None]
    assert spaces
    adapter.set_weight(0.0)
    assert all(one.space is None for one in spaces)
    assert _held(adapter._state) == 0

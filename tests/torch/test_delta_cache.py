"""Cached updates are reused exactly while the arrays behind them are unchanged; inactive adapters keep few."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.algebra.maps.fastfood import Linear
from tnadapt.backends import FixedArrays

from .internals import Snapshot, bytes_held, delta, drawn, held_by_draws
from .pretended_device import PretendedDevice
from .small import batch, compiles_whole, small, stir
from .test_changed_weights import layers

# -- Snapshots see every change on the CPU, and elsewhere every change that torch records, without waiting -------------


def _new_memory(array: Any) -> None:
    array.data = array.detach().clone()


SEEN: dict[str, Callable[[Any], Any]] = {
    "in place": lambda array: array.detach().add_(1.0),
    "a part": lambda array: array.detach()[0].zero_(),
    "foreach": lambda array: torch._foreach_mul_([array.detach()], 2.0),
    "new memory": _new_memory,
}


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SEEN)
def test_changes_are_seen_without_waiting(name: str, mode: Any) -> None:
    array = torch.ones(3, requires_grad=True)
    with PretendedDevice(), mode():
        before = Snapshot.of(array)
        assert before.array.data_ptr() == array.data_ptr()
        assert before.is_of(array)
        SEEN[name](array)
        assert not before.is_of(array)
        assert Snapshot.of(array).is_of(array)


def test_what_a_snapshot_is_not_of() -> None:
    array = torch.ones(4)
    before = Snapshot.of(array)
    assert not any(before.is_of(other) for other in (array.double(), array.view(2, 2), array.to("meta")))
    with PretendedDevice():
        before = Snapshot.of(array)
        assert not before.is_of(array.view(2, 2).T.contiguous().view(4))
        assert not Snapshot.of(array.view(2, 2)).is_of(array.view(2, 2).T)
        array.data.zero_()
        assert before.is_of(array)  # torch does not record such a write, and on a device it is not seen
        # Memory that was freed is not taken for its successor.
        before = Snapshot.of(torch.ones(1000))
        assert not any(before.is_of(torch.ones(1000)) for _ in range(20))
    before = Snapshot.of(array)
    array.data.add_(1.0)
    assert not before.is_of(array)


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward passes on an accelerator: nothing waits for the device, and captured graphs compute updates


F = {"projection": "linear", "ratio": 0.5}
CONFIGS = {
    "lora": P.lora(2), "lokr": P.lokr(2), "superlora": P.superlora(2), "superlora with F": P.superlora(2, **F),
    "lorta": P.lorta(2), "dense": P.dense(), "fastfood": P.fastfood(0.1), "compacter": P.compacter(2),
    "dora": P.dora(2), "hira": P.hira(2), "unilora": P.unilora(40, 2), "fourierft": P.fourierft(5),
    "dct2": P.superlora(2, projection="dct2", on="weight"), "c3a": P.c3a(8),
}  # fmt: skip


def passes(model: Any) -> list[Any]:
    """Return outputs without gradients, twice, and gradients."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            found.append(model(batch()).clone())
    model.zero_grad()
    model(batch()).square().sum().backward()
    return found + [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_pass_waits_for_the_device(name: str) -> None:
    model = small()
    stir(tt.attach(model, CONFIGS[name]))
    expected = passes(copy.deepcopy(model))
    with PretendedDevice():
        passes(model)  # draws are copied to the device in the first pass
        found = passes(model)
    for ours, host in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, host, rtol=1e-4, atol=1e-6)


def two_layers(config: tna.Config, **how: Any) -> tuple[nn.Sequential, tt.Adapter, Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    adapter = tt.attach(model, config, "all-linear", **how)
    stir(adapter)
    return model, adapter, x, torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("name", ["superlora with F", "unilora", "nola"])
@pytest.mark.parametrize("evaluated", ["after forward", "after backward", "after step", "after zeroing"])
@pytest.mark.parametrize("hooked", [True, False])
def test_a_step_of_a_fused_optimizer_is_seen(name: str, evaluated: str, hooked: bool) -> None:
    """Such a step changes no version counter; nor does a call of a part of the model tell that a pass begins."""
    model, _, x, optimizer = two_layers({"nola": P.nola(3, 2)}.get(name) or CONFIGS[name])

    def outputs(model: Any = model) -> Any:
        return model(x) if hooked else model[1](model[0](x))

    def evaluate(when: str) -> None:
        if when == evaluated:
            with torch.no_grad():
                outputs()

    for _ in range(2):
        with PretendedDevice():
            loss = outputs().square().mean()
            evaluate("after forward")
            loss.backward()
            evaluate("after backward")
        optimizer.step()
        with PretendedDevice():
            evaluate("after step")
        optimizer.zero_grad()
        with PretendedDevice():
            evaluate("after zeroing")
            found = outputs()
            with torch.no_grad():
                without = outputs()
        expected = outputs(copy.deepcopy(model)).detach()
        torch.testing.assert_close(found.detach(), expected)
        torch.testing.assert_close(without, expected)


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("name", ["superlora with F", "unilora"])
def test_a_step_of_a_fused_optimizer_is_seen_by_members_that_do_not_act(name: str) -> None:
    model, adapters, x, optimizer = two_layers(CONFIGS[name], population=2, strategy="weight")
    assert isinstance(adapters, tt.Population)
    first, second = adapters  # both are kept, and what they cache with them

    def output(member: tt.Member) -> Tensor:
        member.activate()
        with PretendedDevice(), torch.no_grad():
            return model(x)

    output(first)
    output(second)
    with adapters.members([0, 0]):
        model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    for member in adapters:
        torch.testing.assert_close(output(member), copy.deepcopy(model)(x).detach())
    for parameter in adapters.parameters():
        parameter.data.mul_(0.5)
    adapters.clear_cache()
    torch.testing.assert_close(output(second), copy.deepcopy(model)(x).detach())


@compiles_whole
@pytest.mark.parametrize("name", ["superlora with F", "unilora"])
def test_a_step_of_a_compiled_program_is_seen(name: str) -> None:
    model, _, x, optimizer = two_layers(CONFIGS[name], strategy="weight")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        with PretendedDevice(), torch.no_grad():
            found = model(x)
        torch.testing.assert_close(found, copy.deepcopy(model)(x).detach())
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch._dynamo.reset()


def test_an_update_is_computed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    adapter = tt.attach(model, CONFIGS["superlora with F"])
    stir(adapter)
    counts: list[int] = []
    map_type = type(adapter.plan.groups[0].projection.map)
    forward = map_type.forward
    monkeypatch.setattr(map_type, "forward", lambda *args: counts.append(1) or forward(*args))

    def computed() -> int:
        counts.clear()
        model(batch())
        return len(counts)

    groups = len(adapter.plan.groups)
    with PretendedDevice():
        with torch.no_grad():
            assert (computed(), computed()) == (groups, 0)
        assert (computed(), computed()) == (groups, groups)
        model(batch()).sum().backward()
        with torch.no_grad():
            assert (computed(), computed()) == (groups, groups)  # an optimizer could take a step in between
            model.zero_grad()
            assert (computed(), computed()) == (groups, 0)
            adapter.clear_cache()
            assert (computed(), computed()) == (groups, 0)
            monkeypatch.setattr(delta, "is_captured", lambda: True)
            assert (computed(), computed()) == (groups, groups)  # each graph contains the computation


@compiles_whole
def test_a_compiled_program_reads_the_mixing_weight_on_its_device() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).to("meta")
    adapter = tt.attach(model, P.superlora(2), "all-linear", strategy="weight")
    devices: set[str] = set()

    def backend(graph: Any, inputs: list[Any]) -> Any:
        devices.update(x.device.type for x in inputs if isinstance(x, torch.Tensor))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(torch.ones(2, 8, device="meta"))
    assert devices == {"meta"}  # a scalar on the CPU keeps the compiler from CUDA graphs
    adapter.set_weight(0.5)
    torch._dynamo.reset()


# -- What inactive adapters keep: no more than a model's limit, and equal draws only once ------------------------------


SIZE = 64
UPDATES = 2 * SIZE * SIZE * 4  # bytes of ΔW of both layers
IDLE_CONFIGS = {
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


@pytest.mark.parametrize("name", IDLE_CONFIGS)
def test_adapters_that_were_active_once_keep_no_more_than_the_limit(name: str) -> None:
    model, adapters = model_with(IDLE_CONFIGS[name], 8)
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


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("name", ["superlora", "F"])
def test_a_pass_with_gradients_keeps_no_update_and_reaches_the_parameters_that_are_there(name: str) -> None:
    model, (adapter,) = model_with(IDLE_CONFIGS[name], 1)
    x = torch.randn(5, SIZE)
    expected = model(x)
    outputs(model, [adapter], x)
    assert held([adapter])[0] > 0
    assert torch.equal(model(x), expected)
    assert name == "F" or held([adapter]) == [0]
    for key in [key for key, _ in model.named_parameters() if "tnadapt" in key]:  # equal numbers, but other leaves
        setattr(model, key, nn.Parameter(getattr(model, key).detach().clone()))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def are_kept(adapters: list[tt.Adapter]) -> list[bool]:
    return [bool(number) for number in held(adapters)]


def test_the_longest_idle_goes_first_and_the_active_one_keeps_all() -> None:
    model, adapters = model_with(IDLE_CONFIGS["superlora"], 4)
    x = torch.randn(5, SIZE)
    outputs(model, adapters, x)
    assert all(held(adapters))  # they fit into the default
    assert sum(bytes_held(adapter._state) for adapter in adapters) < 32 * 2**20
    model, adapters = model_with(IDLE_CONFIGS["superlora"], 4)
    outputs(model, adapters[:1], x)
    one = bytes_held(adapters[0]._state)
    assert one >= UPDATES
    tt.set_cache_limit(model, 2 * one)
    outputs(model, adapters, x)
    assert are_kept(adapters) == [False, True, True, True]
    outputs(model, [adapters[1]], x)  # it comes back; 2, 3 and nothing else are idle
    assert are_kept(adapters) == [False, True, True, True]
    (found,) = outputs(model, [adapters[0]], x)
    assert are_kept(adapters) == [True, True, False, True]
    # A copy has the limit, and caches of its own.
    other = copy.deepcopy(model)
    theirs = list(tt.adapters(other).values())
    assert torch.equal(outputs(other, theirs[:1], x)[0], found)
    outputs(other, theirs, x)
    assert are_kept(theirs) == [False, True, True, True]
    assert are_kept(adapters) == [True, True, False, True]
    for limit in (-1, 1.5, "32MB", None, True):
        with pytest.raises(tna.ConfigError, match=r"^limit must be (an integer; got|at least 0; got)"):
            tt.set_cache_limit(model, limit)  # type: ignore[arg-type]


def test_with_a_limit_of_zero_nothing_is_kept_of_what_is_mixed_out_has_no_weight_or_had_rows() -> None:
    model, adapters = model_with(IDLE_CONFIGS["F"], 2)
    tt.set_cache_limit(model, 0)
    x = torch.randn(2, SIZE)
    with torch.no_grad():
        model(x)
        assert bytes_held(adapters[0]._state) > 0
        adapters[0].set_weight(0.0)
        assert are_kept(adapters) == [False, True]
        with tt.rows(model, ["a0", "a1"]):
            model(x)
            assert all(held(adapters))
        assert are_kept(adapters) == [False, True]
        tt.mix(model, {})
    assert [bytes_held(adapter._state) for adapter in adapters] == [0, 0]


@pytest.mark.parametrize("name", ["F", "fourierft"])
def test_equal_draws_exist_once(name: str) -> None:
    model, (one, other) = model_with(IDLE_CONFIGS[name], 2)
    mine, yours = (adapter.plan.groups[0].projection.map for adapter in (one, other))
    assert mine is yours
    third = tt.attach(model, IDLE_CONFIGS[name].replace(seed=1), "all-linear", "third", strategy="weight")
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


def test_the_memory_that_kernels_reuse_is_freed_too() -> None:
    pytest.importorskip("numba")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 192)).eval()  # long enough for the compiled kernels
    adapter = tt.attach(model, IDLE_CONFIGS["F"], "all-linear", strategy="weight")
    stir(adapter)
    tt.set_cache_limit(model, 0)
    with torch.no_grad():
        model(torch.randn(5, 192))
    spaces = [one for one in drawn(adapter._state.plan) if getattr(one, "space", None) is not None]
    assert spaces
    adapter.set_weight(0.0)
    assert all(one.space is None for one in spaces)
    assert bytes_held(adapter._state) == 0


def test_swapped_files_are_checked_without_drawing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (adapter,) = model_with(IDLE_CONFIGS["F"], 1)
    digested = []
    plain = Linear.digest
    monkeypatch.setattr(Linear, "digest", lambda self: digested.append(1) or plain(self))
    for name in ("first", "second"):
        stir(adapter)
        adapter.save(tmp_path / f"{name}.safetensors")
    digested.clear()
    for name in ("first", "second", "first"):
        adapter.swap(tmp_path / f"{name}.safetensors")
    assert len(digested) <= 1


def test_without_gradients_the_norm_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true = delta.Quotient.__call__
    monkeypatch.setattr(delta.Quotient, "__call__", lambda self, *a: calls.append(1) or true(self, *a))
    model, x = layers(torch.float32), torch.randn(2, 6)
    for strategy in ("factored", "weight"):
        adapter = tt.attach(model, P.dora(2), "all-linear", strategy=strategy)
        stir(adapter)
        changes: list[tuple[Callable[[], Any], int]] = [  # and of how many weights the norms are computed then
            (lambda: None, 2),
            (lambda: None, 0),
            (lambda: model[0].weight.mul_(2.0), 1),
            (lambda adapter=adapter: adapter.set_weight(0.5), 2),
            # A write that has no version.
            (lambda adapter=adapter: dict(adapter.named_parameters())["weight0.magnitude"].data.zero_(), 1),
        ]
        with torch.no_grad():
            for change, number in changes:
                change()
                calls.clear()
                model(x)
                assert len(calls) == number
        adapter.detach()

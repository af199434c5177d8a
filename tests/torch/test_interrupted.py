"""After an interruption before any line of tnadapt, the next call of the model or any part of it is correct."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .interrupts import EVERY, PACKAGE, interrupted, moments

pytestmark = pytest.mark.slow

CONFIGS = {
    "alone": P.superlora(2),  # each weight computes its own update
    "at once": P.superlora(2, projection="linear", ratio=0.5),  # all are computed at once
    "nonlinear": P.superlora(2, projection="nonlinear", ratio=0.5),
    "factored": P.lora(2),
    "dense": P.dense(),
}
TORCH = PACKAGE + "torch/"


class Net(nn.Module):
    """A model of attention that reads its fused weight directly, a linear layer, a convolution, and a head."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.head = nn.Linear(8, 3)
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.conv(self.lin(x).mT).mT

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None or not x.requires_grad:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


TARGETS = [
    tna.Target("attn", (24, 8), "q", rows=tna.Rows(0, 8, 24), parameter="in_proj_weight"),
    tna.Target("attn", (24, 8), "v", rows=tna.Rows(16, 8, 24), parameter="in_proj_weight"),
    tna.Target("lin", (8, 8)),
    tna.Target("conv", (8, 8, 1), "conv"),
]


def batch() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))


# The next call: of all or of a part, by everything that a cache tells apart.
def whole(model: Net) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch())]


def attention(model: Net) -> list[Tensor]:
    with torch.no_grad():
        return [model.attn(batch(), batch(), batch(), need_weights=False)[0]]


def linear(model: Net) -> list[Tensor]:
    with torch.no_grad():
        return [model.lin(batch())]


def convolution(model: Net) -> list[Tensor]:
    with torch.inference_mode():
        return [model.conv(batch().mT).clone()]


def gradients(model: Net, part: nn.Module | None = None) -> list[Tensor]:
    model.zero_grad()
    y = model(batch().requires_grad_()) if part is None else part(batch())
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def gradients_of_a_part(model: Net) -> list[Tensor]:
    return gradients(model, model.lin)


CALLS = (whole, attention, linear, convolution, gradients, gradients_of_a_part)


class Case:
    """A model with an adapter, two sets of arrays for it, and the expected results of each call with either."""

    def __init__(self, config: str, reentrant: bool | None = None) -> None:
        self.model, self.adapter = self.made(config, reentrant)
        made = torch.Generator().manual_seed(1)
        self.arrays = [
            {name: p.detach() + 0.3 * torch.randn(p.shape, generator=made) for name, p in self.named()}
            for _ in range(2)
        ]
        self.expected: list[dict[Callable[..., Any], list[Tensor]]] = []
        for arrays in self.arrays:
            duplicate, adapter = self.made(config, reentrant)
            adapter.load_arrays(arrays)
            self.expected.append({call: call(duplicate) for call in CALLS})
        self.base = {name: t.clone() for name, t in self.model.state_dict().items() if "tnadapt" not in name}
        self.put(0)

    @staticmethod
    def made(config: str, reentrant: bool | None) -> tuple[Net, tt.Adapter]:
        torch.manual_seed(0)
        model = Net(reentrant)
        return model, tt.attach(model, CONFIGS[config], TARGETS, keep_trainable="head")

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.adapter.named_parameters()

    def put(self, which: int) -> None:
        """Write these arrays into the adapter without changing a version counter."""
        for name, parameter in self.named():
            parameter.data.copy_(self.arrays[which][name])

    def has(self) -> int:
        """Return which arrays it has; an assertion fails if it has neither."""
        (found,) = [
            which
            for which, arrays in enumerate(self.arrays)
            if all(torch.equal(p, arrays[name]) for name, p in self.named())
        ]
        return found

    def check(self, call: Callable[[Net], list[Tensor]], which: int) -> None:
        found, expected = call(self.model), self.expected[which][call]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), f"{call.__name__}: off by {float((one - other).abs().max()):g}"

    def has_base_bits(self) -> bool:
        now = self.model.state_dict()
        return all(torch.equal(now[name], tensor) for name, tensor in self.base.items())

    def check_nothing_is_left(self) -> None:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        for module in self.model.modules():
            assert not {"weight", "in_proj_weight"} & module.__dict__.keys(), "a sum stands for a weight"
            site = module.__dict__.get("forward")
            if site is not None:
                with ThreadPoolExecutor(1) as other:
                    assert other.submit(site._lock.acquire, blocking=False).result(), "a lock is held"
                    other.submit(site._lock.release).result()


def interruptions(
    action: Callable[[], object],
    prepare: Callable[[], object] = lambda: None,
    where: str = TORCH,
    step: int = 1,
) -> Iterator[None]:
    """Prepare and interrupt an action at one moment after another; the caller checks what is left each time."""
    for stop in moments(action, where)[:: 1 if EVERY else step]:
        prepare()
        interrupted(action, stop, where)
        yield


#: Everything else that a pass executes computes numbers and keeps none but the draws of F.
WHERE = PACKAGE if EVERY else TORCH
# What has gradients begins like a pass without.
ACTIONS = CALLS if EVERY else (gradients,)


@pytest.mark.law("interrupted-pass")
@pytest.mark.parametrize(
    ("config", "action", "reentrant"),
    [
        *itertools.product(CONFIGS if EVERY else ["alone", "at once", "factored"], ACTIONS, [None]),
        *itertools.product(CONFIGS if EVERY else ["at once"], [gradients], [False, True]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_interrupted_pass(config: str, action: Callable[[Net], list[Tensor]], reentrant: bool | None) -> None:
    case = Case(config, reentrant)
    case.adapter._state.cache.forget()
    turns = itertools.cycle(itertools.product(CALLS, (0, 1), (False, True)))

    def prepare() -> None:
        # With an empty cache, as at the first time, and with one of other arrays.
        case.adapter._state.cache.forget()
        if filled:
            case.put(1)
            whole(case.model)
        case.put(0)

    call, after, filled = next(turns)
    # With checkpointing forward again in backward: twice as many lines, mostly the same.
    for _ in interruptions(lambda: action(case.model), prepare, WHERE, 3 if reentrant is None else 8):
        for which in (after, 1 - after):
            case.put(which)
            case.check(call, which)
        assert case.has_base_bits()
        case.check_nothing_is_left()
        call, after, filled = next(turns)


@pytest.mark.law("interrupted-pass")
def test_an_interrupted_first_use_of_the_draws_of_f() -> None:
    """The draws are computed at the first call and kept with the plan."""
    reference = Case("at once")

    def fresh() -> Net:
        model, adapter = Case.made("at once", None)
        adapter.load_arrays(reference.arrays[0])
        return model

    model = fresh()
    count = len(interrupted(lambda: whole(model), None).seen)
    for stop in range(0, count, 1 if EVERY else 1 + count // 40):
        model = fresh()
        interrupted(lambda model=model: whole(model), stop)
        assert torch.equal(whole(model)[0], reference.expected[0][whole][0])


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("call", [whole, gradients], ids=lambda call: call.__name__)
def test_a_hook_that_edits_the_arrays_acts_on_the_layers_that_follow(config: str, call: Callable[..., Any]) -> None:
    case = Case(config)
    whole(case.model)
    seen: dict[str, Tensor] = {}

    def edit(module: nn.Module, args: Any, output: Any) -> None:
        case.put(1)

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["in"], seen["out"] = args[0].detach(), output.detach()

    hooks = [case.model.attn.register_forward_hook(edit), case.model.lin.register_forward_hook(watch)]
    call(case.model)
    for hook in hooks:
        hook.remove()
    duplicate = Case(config)
    duplicate.put(1)
    with torch.no_grad() if call is whole else contextlib.nullcontext():
        assert torch.equal(seen["out"], duplicate.model.lin(seen["in"]))
    case.check(whole, 1)


@pytest.mark.law("interrupted-change")
@pytest.mark.parametrize("config", ["alone", "at once"])
def test_an_interrupted_merge_is_whole_or_undone(config: str) -> None:
    case = Case(config)
    attached = case.expected[0][whole][0]
    case.adapter.merge()
    merged = {name: t.clone() for name, t in case.model.state_dict().items() if "tnadapt" not in name}
    case.adapter.unmerge()

    def is_merged() -> bool:
        """Return what the weights say; the adapter says the same."""
        now = case.model.state_dict()
        found = all(torch.equal(now[name], tensor) for name, tensor in merged.items())
        assert found or case.has_base_bits()
        assert case.adapter.merged == found
        return found

    for action, back in ((case.adapter.merge, case.adapter.unmerge), (case.adapter.unmerge, case.adapter.merge)):
        merges = action == case.adapter.merge
        for _ in interruptions(action, lambda back=back, merges=merges: back() if is_merged() == merges else None):
            is_merged()
            assert torch.allclose(whole(case.model)[0], attached, atol=1e-5)
        if not is_merged():
            case.adapter.merge()
    case.adapter.unmerge()
    assert case.has_base_bits()


class AnyOf(frozenset[int]):
    """Equal to each of several numbers."""

    def __eq__(self, other: object) -> bool:
        return other in self

    __hash__ = frozenset.__hash__


@pytest.mark.law("interrupted-change")
def test_an_unmerge_after_two_interrupts_gives_the_bits_back() -> None:
    """Check a second interruption while the original bits are being restored."""
    case = Case("alone")
    lines = interrupted(case.adapter.merge, None, TORCH).seen
    case.adapter.unmerge()
    loop = [number for number, (code, _) in enumerate(lines) if code.co_name == "_write"]
    for stop, again in itertools.product(loop[:: 1 if EVERY else 2], range(0, 12, 1 if EVERY else 3)):
        both: Any = AnyOf({stop, stop + again})
        interrupted(case.adapter.merge, both, TORCH)
        if case.adapter.merged:
            case.adapter.unmerge()
        assert case.has_base_bits()


@pytest.mark.law("interrupted-change")
@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupted_disabled_block_ends_enabled(merged: bool) -> None:
    case = Case("alone")

    def block() -> None:
        with case.adapter.disabled():
            assert case.has_base_bits()

    if merged:
        case.adapter.merge()
    for _ in interruptions(block):
        assert case.adapter.enabled
        assert case.adapter.merged == merged
        if not merged:
            case.check(linear, 0)
    if merged:
        case.adapter.unmerge()
        assert case.has_base_bits()
    case.check(whole, 0)


@pytest.mark.law("interrupted-change")
def test_interrupted_loading_of_arrays_is_whole_or_undone(tmp_path: Path) -> None:
    case, path = Case("at once"), tmp_path / "other.safetensors"
    other, adapter = Case.made("at once", None)
    adapter.load_arrays(case.arrays[1])
    with torch.no_grad():
        other.head.weight.add_(1.0)
    adapter.save(path)
    mine, theirs = case.model.head.weight.detach().clone(), other.head.weight.detach().clone()

    def back() -> None:
        with torch.no_grad():
            case.model.head.weight.copy_(mine)
        case.put(0)

    for _ in interruptions(lambda: case.adapter.swap(path), back):
        assert torch.equal(case.model.head.weight, theirs if case.has() else mine)
    for _ in interruptions(lambda: case.adapter.load_arrays(case.arrays[1]), back):
        assert torch.equal(case.model.head.weight, mine)
        case.check(linear, case.has())


@pytest.mark.law("interrupted-change")
def test_an_interrupted_load_leaves_the_model_as_it_was_or_loaded(tmp_path: Path) -> None:
    case, path = Case("alone"), tmp_path / "a.safetensors"
    case.adapter.save(path)
    case.adapter.detach()

    def back() -> None:
        for adapter in tt.adapters(case.model).values():
            adapter.detach()

    for _ in interruptions(lambda: tt.load(case.model, path), back, step=3):
        adapters = tt.adapters(case.model)
        if adapters:
            assert all(torch.equal(p, case.arrays[0][name]) for name, p in adapters["default"].named_parameters())
            case.check(whole, 0)
            continue
        assert case.model.state_dict().keys() == case.base.keys()
        assert all("forward" not in module.__dict__ for module in case.model.modules())
        assert not case.model._forward_hooks
        assert not case.model._forward_pre_hooks
        assert all(p.requires_grad for p in case.model.parameters())


@pytest.mark.law("interrupted-change")
def test_an_interrupted_choice_of_what_acts_or_is_trained_is_whole_or_undone() -> None:
    case = Case("alone")
    second = tt.attach(case.model, CONFIGS["factored"], TARGETS, "second", keep_trainable="head")
    adapters = (case.adapter, second)

    def weights() -> tuple[float, ...]:
        assert all(float(adapter._state.weight_tensor) == pytest.approx(adapter.weight) for adapter in adapters)
        return tuple(adapter.weight for adapter in adapters)

    def trained() -> tuple[bool, ...]:
        return tuple(p.requires_grad for _, p in case.named())

    for action, state, back in (
        (lambda: tt.mix(case.model, {"default": 0.5, "second": 0.25}), weights, case.adapter.activate),
        (second.activate, weights, case.adapter.activate),
        (lambda: case.adapter.set_trainable(arrays="factor0"), trained, case.adapter.set_trainable),
    ):
        back()
        old = state()
        action()
        new = state()
        assert old != new
        for _ in interruptions(action, back):
            assert state() in (old, new)
        back()
        assert state() == old


# Where the exception comes into a destructor, or ends the thread, Python says so and goes on.
@pytest.mark.law("interrupted-pass")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("config", ["alone", "at once"])
def test_asynchronous_exceptions_at_random_moments(config: str) -> None:
    case, drawn = Case(config), random.Random(0)
    turns = itertools.cycle(itertools.product(CALLS, (0, 1)))
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            call, which = next(turns)
            case.put(which)
            call(case.model)

    interrupts, end = 0, time.monotonic() + (60.0 if EVERY else 2.0)
    while time.monotonic() < end:
        interrupts += 1
        done.clear()
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(drawn.uniform(0.0, 0.02))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
        thread.join(0.01)
        done.set()  # an exception in a destructor does not end it
        thread.join()
        call, which = next(turns)
        case.put(which)
        case.check(call, which)
    assert interrupts > 10
    for call in CALLS:
        case.put(0)
        case.check(call, 0)
    case.check_nothing_is_left()

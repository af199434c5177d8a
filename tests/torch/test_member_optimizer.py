"""MemberAdamW: each member of a population is trained as by an AdamW of its own."""

from __future__ import annotations

import copy
import importlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import hypothesis.strategies as st
from hypothesis import example, given
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tnadapt import presets
from tnadapt.errors import ConfigError, ShapeError
from tnadapt.torch import MemberAdamW, Population, attach

from .small import compiles_whole, stir

WIDTH, COUNT = 4, 3
CONFIGS = {
    "lora": presets.lora(2),
    "unilora": presets.unilora(9, 2),
    "superlora": presets.superlora(3),
    "dora": presets.dora(2),
}
#: For each step, for each backward pass before it, the member of each row.
Schedule = list[list[list[int | None]]]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def population(
    config: str = "lora",
    dtype: torch.dtype = torch.float64,
    count: int = COUNT,
    targets: Any = "all-linear",
    **options: Any,
) -> tuple[nn.Sequential, Population]:
    model = network().to(dtype)
    options = {"seeds": "each", "dtype": dtype, **options}
    return model, attach(model, CONFIGS[config], targets, population=count, **options)


def rows_of(step: int, number: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(100 * step + number)).to(dtype)


def backward(model: nn.Module, adapter: Population, members: Sequence[int | None], x: Tensor) -> None:
    with adapter.members(members):
        model(x).square().sum().backward()


def reached(step: list[list[int | None]]) -> set[int]:
    return {member for members in step for member in members if member is not None}


def parameters(adapter: Any) -> list[Tensor]:
    return [parameter for _, parameter in adapter.named_parameters()]


def bits(adapter: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters(adapter)]


def equal(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


def trained(model: nn.Module, adapter: Population, optimizer: MemberAdamW, schedule: Schedule, first: int = 0) -> None:
    for step, passes in enumerate(schedule, first):
        for number, members in enumerate(passes):
            backward(model, adapter, members, rows_of(step, number, len(members), parameters(adapter)[0].dtype))
        optimizer.step()
        optimizer.zero_grad()


members_of_rows = st.lists(st.none() | st.integers(0, COUNT - 1), min_size=1, max_size=5).filter(
    lambda members: any(member is not None for member in members)
)
schedules = st.lists(st.lists(members_of_rows, min_size=1, max_size=3), min_size=1, max_size=5)
rates = st.floats(1e-4, 0.1) | st.lists(st.floats(1e-4, 0.1), min_size=COUNT, max_size=COUNT)
decays = st.sampled_from([0.0, 0.1]) | st.lists(st.sampled_from([0.0, 0.01, 0.5]), min_size=COUNT, max_size=COUNT)
settings_of_adam = st.fixed_dictionaries({
    "lr": rates, "weight_decay": decays,
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
    "eps": st.sampled_from([1e-8, 1e-3]),
})  # fmt: skip


def of_member(settings: dict[str, Any], member: int) -> dict[str, Any]:
    return {
        name: value[member] if name in ("lr", "weight_decay") and isinstance(value, list) else value
        for name, value in settings.items()
    }


@given(st.sampled_from(list(CONFIGS)), schedules, settings_of_adam, st.booleans())
@example("lora", [[[0, None, 0]], [[1]], [[0, 1], [2]]], {"lr": [0.1, 0.01, 0.05], "weight_decay": 0.1}, True)
@example("lora", [[[0, None, 0]], [[1]], [[0, 1], [2]]], {"lr": [0.1, 0.01, 0.05], "weight_decay": 0.1}, False)
def test_each_member_is_trained_as_by_its_own_optimizer(
    config: str, schedule: Schedule, settings: dict[str, Any], sparse: bool
) -> None:
    model, adapter = population(config, sparse=sparse)
    alone = []
    for member in range(COUNT):
        other_model = network().double()
        other = attach(other_model, CONFIGS[config], "all-linear", dtype=torch.float64)
        with torch.no_grad():
            for parameter, start in zip(parameters(other), parameters(adapter), strict=True):
                parameter.copy_(start[member])
        optimizer = AdamW(other.parameters(), **of_member(settings, member))
        for step, passes in enumerate(schedule):
            for number, members in enumerate(passes):
                x = rows_of(step, number, len(members), torch.float64)
                rows = [row for row, row_member in enumerate(members) if row_member == member]
                if rows:
                    other_model(x[rows]).square().sum().backward()
            if member in reached(passes):
                optimizer.step()
                optimizer.zero_grad()
        alone.append(other)
    trained(model, adapter, MemberAdamW(adapter, **settings), schedule)
    for member, other in enumerate(alone):
        for parameter, expected in zip(parameters(adapter), parameters(other), strict=True):
            torch.testing.assert_close(parameter[member], expected, rtol=1e-10, atol=1e-12)


def arrays_of_each(adapter: Population) -> list[list[nn.Parameter]]:
    arrays = bits(adapter)
    return [[nn.Parameter(array[member].clone()) for array in arrays] for member in range(COUNT)]


# Ratios of the rates that are exact: those of others are rounded, in double precision.
exact_rates = st.lists(st.sampled_from([0.03, 0.015, 0.03 / 64]), min_size=COUNT, max_size=COUNT)


@given(
    schedules, settings_of_adam, exact_rates, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_given_the_same_gradients_the_bits_are_those_of_torch(
    schedule: Schedule, settings: dict[str, Any], lr: list[float], dtype: torch.dtype, sparse: bool, drops: bool
) -> None:
    """Also of gradients that are not dropped after a step."""
    model, adapter, settings = *population(dtype=dtype, sparse=sparse), {**settings, "lr": lr}
    alone = arrays_of_each(adapter)
    optimizers = [AdamW(arrays, **of_member(settings, member), foreach=False) for member, arrays in enumerate(alone)]
    optimizer, with_gradients = MemberAdamW(adapter, **settings), set[int]()
    for step, passes in enumerate(schedule):
        for number, members in enumerate(passes):
            backward(model, adapter, members, rows_of(step, number, len(members), dtype))
        with_gradients |= reached(passes)
        for member in with_gradients:
            for array, parameter in zip(alone[member], parameters(adapter), strict=True):
                array.grad = parameter.grad[member].clone()
            optimizers[member].step()
        optimizer.step()
        if drops:
            optimizer.zero_grad()
            with_gradients.clear()
        for member, arrays in enumerate(alone):
            assert equal(arrays, [parameter[member] for parameter in parameters(adapter)])


@given(schedules, st.floats(1e-3, 10.0), st.booleans())
def test_clipping_is_that_of_each_member_alone(schedule: Schedule, max_norm: float, sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    alone = arrays_of_each(adapter)
    optimizers = [AdamW(arrays, lr=1e-2, eps=1e-3) for arrays in alone]
    optimizer = MemberAdamW(adapter, lr=1e-2, eps=1e-3, weight_decay=1e-2, max_norm=max_norm)
    for step, passes in enumerate(schedule):
        for number, members in enumerate(passes):
            backward(model, adapter, members, rows_of(step, number, len(members), torch.float64))
        for member in reached(passes):
            for array, parameter in zip(alone[member], parameters(adapter), strict=True):
                array.grad = parameter.grad[member].clone()
            nn.utils.clip_grad_norm_(alone[member], max_norm)
            optimizers[member].step()
        gradients = [parameter.grad.clone() for parameter in parameters(adapter)]
        optimizer.step()
        for parameter, before in zip(parameters(adapter), gradients, strict=True):
            assert torch.equal(parameter.grad.to_dense(), before.to_dense())
        optimizer.zero_grad()
    for member, arrays in enumerate(alone):
        for array, parameter in zip(arrays, parameters(adapter), strict=True):
            torch.testing.assert_close(parameter[member], array, rtol=1e-12, atol=1e-14)


# -- Which members take a step -----------------------------------------------------------------------------------------


def changed(before: Sequence[Tensor], adapter: Population) -> list[set[int]]:
    """Return the members of which each array has changed."""
    return [
        set((old != new).flatten(1).any(1).nonzero().flatten().tolist())
        for old, new in zip(before, parameters(adapter), strict=True)
    ]


both = pytest.mark.parametrize("sparse", [False, True])


@both
def test_an_array_whose_gradient_is_zero_takes_a_step(sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    before = bits(adapter)
    optimizer = MemberAdamW(adapter, weight_decay=0.1)
    backward(model, adapter, [1], rows_of(0, 0, 1, torch.float64))
    zero = [not bool(parameter.grad[1].any()) for parameter in parameters(adapter)]
    assert set(zero) == {False, True}  # that of the array next to the one that starts at zero is
    optimizer.step()
    assert changed(before, adapter) == [{1}] * len(zero)
    assert [optimizer.state[parameter]["step"].tolist() for parameter in parameters(adapter)] == [[1]] * len(zero)


@both
def test_a_member_takes_a_step_with_sparse_gradients_that_are_all_zero(sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    stir(adapter, 0.3)
    before = bits(adapter)
    with adapter.members([0, 1]):
        model(rows_of(0, 0, 2, torch.float64))[0].square().sum().backward()
    MemberAdamW(adapter, weight_decay=0.1).step()
    assert changed(before, adapter) == [{0, 1} if sparse else {0}] * 4


@pytest.mark.parametrize("number", range(4))
def test_an_array_whose_gradient_is_dense_and_zero_takes_a_step_with_the_sparse_ones(number: int) -> None:
    model, adapter = population(sparse=True)
    before = bits(adapter)
    backward(model, adapter, [1], rows_of(0, 0, 1, torch.float64))
    dense = parameters(adapter)[number]
    dense.grad = dense.grad.to_dense()
    MemberAdamW(adapter, weight_decay=0.1).step()
    assert changed(before, adapter) == [{1}] * 4


@both
def test_a_member_steps_the_arrays_that_it_has_reached(sparse: bool) -> None:
    """Of dense gradients, only the member is known."""
    model, adapter = population(sparse=sparse)
    stir(adapter, 0.3)
    before = bits(adapter)
    backward(model, adapter, [0], rows_of(0, 0, 1, torch.float64))
    with adapter.members([1]):
        model[2](rows_of(0, 1, 1, torch.float64)).square().sum().backward()
    MemberAdamW(adapter, weight_decay=0.1).step()
    first = {0} if sparse else {0, 1}
    assert changed(before, adapter) == [first, first, {0, 1}, {0, 1}]


@both
def test_the_active_member_takes_a_step(sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    adapter[2].activate()
    before, optimizer = bits(adapter), MemberAdamW(adapter, weight_decay=0.1)
    model(rows_of(0, 0, 2, torch.float64)).square().sum().backward()
    optimizer.step()
    assert changed(before, adapter) == [{2}] * 4


@both
def test_the_active_member_takes_its_steps_with_members_of_batches(sparse: bool) -> None:
    """Each step writes to the parameters, of which the active member's arrays are views."""
    model, adapter = population(sparse=sparse)
    adapter[2].activate()
    optimizer = MemberAdamW(adapter, weight_decay=0.1)
    for step in range(3):
        before = bits(adapter)
        model(rows_of(step, 0, 2, torch.float64)).square().sum().backward()
        backward(model, adapter, [0], rows_of(step, 1, 1, torch.float64))
        optimizer.step()
        optimizer.zero_grad()
        assert changed(before, adapter) == [{0, 2}] * 4


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_members_of_checkpointed_passes_take_a_step(reentrant: bool, sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    before, losses = bits(adapter), []
    for step, members in enumerate(([0, 1], [2, 2])):
        x = rows_of(step, 0, 2, torch.float64).requires_grad_()
        with adapter.members(members):
            losses.append(checkpoint(model, x, use_reentrant=reentrant).square().sum())
            if reentrant:  # recomputes with the members of the moment
                losses.pop().backward()
    if losses:
        with adapter.members([0, 1]):
            losses[0].backward()
        with adapter.members([2, 2]):
            losses[1].backward()
    MemberAdamW(adapter, weight_decay=0.1).step()
    assert changed(before, adapter) == [{0, 1, 2}] * 4


@both
@pytest.mark.parametrize("drop", ["optimizer", "model", "zeros"])
def test_members_whose_gradients_were_dropped_take_no_step(drop: str, sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    optimizer = MemberAdamW(adapter, weight_decay=0.1)
    backward(model, adapter, [0, 1], rows_of(0, 0, 2, torch.float64))
    model.zero_grad() if drop == "model" else optimizer.zero_grad(set_to_none=drop != "zeros")
    before = bits(adapter)
    backward(model, adapter, [1, 2], rows_of(1, 0, 2, torch.float64))
    optimizer.step()
    assert changed(before, adapter) == [{1, 2}] * 4


@both
def test_gradients_that_were_set_to_zero_change_nothing(sparse: bool) -> None:
    model, adapter = population(sparse=sparse)
    optimizer = MemberAdamW(adapter, weight_decay=0.1, max_norm=1.0)
    backward(model, adapter, [0, 1], rows_of(0, 0, 2, torch.float64))
    optimizer.zero_grad(set_to_none=False)
    before = bits(adapter)
    optimizer.step()
    assert changed(before, adapter) == [set()] * 4
    assert not optimizer.state


def test_members_with_gradients_of_any_program_take_a_step() -> None:
    _, adapter = population()
    for parameter in parameters(adapter):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[1] = 1.0
    before = bits(adapter)
    MemberAdamW(adapter, weight_decay=0.1).step()
    assert changed(before, adapter) == [{1}] * 4


@pytest.mark.slow
@compiles_whole
@both
def test_members_of_compiled_and_of_other_passes_take_a_step(sparse: bool) -> None:
    """A program has dense gradients."""
    torch._dynamo.reset()
    model, adapter = population(sparse=sparse)
    running, optimizer = torch.compile(model, backend="aot_eager", fullgraph=True), MemberAdamW(adapter)
    for first in ("program", "pass"):
        before = bits(adapter)
        for how in ("program", "pass") if first == "program" else ("pass", "program"):
            if how == "pass":
                backward(model, adapter, [0], rows_of(0, 1, 1, torch.float64))
            else:
                adapter[2].activate()
                running(rows_of(0, 0, 2, torch.float64)).square().sum().backward()
        assert {parameter.grad.layout for parameter in parameters(adapter)} == {torch.strided}
        optimizer.step()
        optimizer.zero_grad()
        steps = changed(before, adapter)
        assert {0, 2} in steps
        assert all(members <= {0, 2} for members in steps)
    counts = [optimizer.state[parameter]["step"].tolist() for parameter in parameters(adapter)]
    assert counts == [[2, 2]] * 4


# -- State -------------------------------------------------------------------------------------------------------------


def test_only_members_in_use_have_a_state() -> None:
    model, adapter = population(count=1000)
    optimizer = MemberAdamW(adapter)
    numbers = sum(parameter[0].numel() for parameter in parameters(adapter))
    used = set[int]()
    for step, members in enumerate([[7, 999], [7, 3, 20], [500, 501, 3, 20, 999], *[[member] for member in range(40)]]):
        backward(model, adapter, members, rows_of(step, 0, len(members), torch.float64))
        optimizer.step()
        optimizer.zero_grad()
        used |= set(members)
        held = sum(tensor.untyped_storage().nbytes() for state in optimizer.state.values() for tensor in state.values())
        one = 2 * 8 * numbers + 8 * len(parameters(adapter))  # two averages, and a count for each array
        assert one * len(used) <= held < one * 2 * len(used)
    assert sorted(optimizer.param_groups[0]["members"].tolist()) == sorted(used)


class Recorder(TorchDispatchMode):
    """Records the operations on dense tensors of many rows, and those that return one."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.operations, self.returned = rows, set[str](), set[str]()

    def _is_large(self, value: Any) -> bool:
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.ndim > 0
        return dense and len(value) >= self.rows

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if any(map(self._is_large, args)):
            self.operations.add(name)
        if self._is_large(result):
            self.returned.add(name)
        return result


def test_backward_and_step_read_and_write_rows_of_their_members_alone() -> None:
    model, adapter = population(count=1000, sparse=True)
    optimizer = MemberAdamW(adapter, lr=[0.1] * 1000, weight_decay=0.1, max_norm=1.0)
    for step in range(2):
        with Recorder(1000) as recorder:
            for number in range(2):
                backward(model, adapter, [5, 700], rows_of(step, number, 2, torch.float64))
            optimizer.step()
            optimizer.zero_grad()
        assert {"index_select", "index_copy_"} <= recorder.operations
        assert recorder.operations <= {"index_select", "index_copy_", "detach", "new_zeros"}  # those copy no numbers
        assert recorder.returned <= {"index_copy_", "detach"}


SCHEDULE: Schedule = [[[0, 1]], [[1]], [[2, 0], [1]], [[2]], [[0, 1, 2]], [[0]]]
SEVERAL = {"lr": [0.1, 0.01, 0.05], "weight_decay": [0.0, 0.1, 0.5], "max_norm": 1.0}


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_training_resumes_from_its_state(way: str) -> None:
    model, adapter = population()
    optimizer = MemberAdamW(adapter, **SEVERAL)
    trained(model, adapter, optimizer, SCHEDULE[:3])
    if way == "deepcopy":
        other_model, other_adapter, other = copy.deepcopy((model, adapter, optimizer))
    elif way == "pickle":
        memory = io.BytesIO()
        torch.save((model, adapter, optimizer), memory)
        memory.seek(0)
        other_model, other_adapter, other = torch.load(memory, weights_only=False)
    else:
        other_model, other_adapter = population()
        other_model.load_state_dict(model.state_dict())
        other = MemberAdamW(other_adapter, max_norm=1.0)
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            memory = io.BytesIO()
            torch.save(state, memory)
            memory.seek(0)
            state = torch.load(memory)
        other.load_state_dict(state)
    trained(model, adapter, optimizer, SCHEDULE[3:], 3)
    trained(other_model, other_adapter, other, SCHEDULE[3:], 3)
    assert equal(parameters(other_adapter), parameters(adapter))
    for parameter, other_parameter in zip(parameters(adapter), parameters(other_adapter), strict=True):
        assert equal(list(optimizer.state[parameter].values()), list(other.state[other_parameter].values()))


def test_members_are_not_rounded_to_the_dtype_of_the_parameters() -> None:
    model, adapter = population(dtype=torch.bfloat16, count=1000)
    optimizer = MemberAdamW(adapter)
    trained(model, adapter, optimizer, [[[997, 998, 999]]])
    other = MemberAdamW(adapter)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["members"].tolist() == [997, 998, 999]
    assert {state["step"].dtype for state in other.state.values()} == {torch.int64}


# -- With the rest of torch --------------------------------------------------------------------------------------------


def test_schedulers_scale_the_rate_of_every_member() -> None:
    (model, adapter), (other_model, other_adapter) = population(), population()
    optimizer = MemberAdamW(adapter, lr=[0.1, 0.01, 0.05])
    alone = [MemberAdamW(other_adapter, lr=rate) for rate in (0.1, 0.01, 0.05)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=8) for each in (optimizer, *alone)]
    for step in range(6):
        x = rows_of(step, 0, COUNT, torch.float64)
        backward(model, adapter, range(COUNT), x)
        optimizer.step()
        optimizer.zero_grad()
        for member, other in enumerate(alone):
            backward(other_model, other_adapter, [member], x[member : member + 1])
            other.step()
            other.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.02
    for parameter, expected in zip(parameters(adapter), parameters(other_adapter), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-14)


@both
def test_a_skipped_step_of_the_gradient_scaler_leaves_no_trace(sparse: bool) -> None:
    model, adapter = population(dtype=torch.float32, sparse=sparse)
    optimizer = MemberAdamW(adapter, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(members: list[int], size: float) -> None:
        with adapter.members(members):
            loss = size * model(rows_of(0, 0, len(members), torch.float32)).square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()

    before = bits(adapter)
    step([0, 1], float("inf"))
    assert changed(before, adapter) == [set()] * 4
    step([1, 2], 1.0)
    assert changed(before, adapter) == [{1, 2}] * 4


def test_a_closure_computes_the_gradients() -> None:
    (model, adapter), (other_model, other_adapter) = population(), population()
    optimizer = MemberAdamW(adapter)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with adapter.members([0, 2]):
            loss = model(rows_of(0, 0, 2, torch.float64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0.0
    trained(other_model, other_adapter, MemberAdamW(other_adapter), [[[0, 2]]])
    assert equal(parameters(adapter), parameters(other_adapter))


def test_what_is_trained_beside_takes_the_steps_of_torch() -> None:
    model, adapter = population(targets=["0"], keep_trainable=["2"])
    head = [copy.deepcopy(parameter) for parameter in model[2].parameters()]
    optimizer = MemberAdamW(
        adapter, [{"params": adapter.parameters(), "lr": [0.1, 0.01, 0.0]}, {"params": model[2].parameters()}],
        lr=0.03, weight_decay=0.1,
    )  # fmt: skip
    reference = AdamW(head, lr=0.03, weight_decay=0.1)
    before = bits(adapter)
    for step, members in enumerate(([0], [None, 2])):
        backward(model, adapter, members, rows_of(step, 0, len(members), torch.float64))
        for parameter, kept in zip(head, model[2].parameters(), strict=True):
            parameter.grad = kept.grad.clone()
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(head, list(model[2].parameters()))
    assert changed(before, adapter) == [{0}, {0}]  # the rate of member 2 is zero


@pytest.mark.parametrize("method", ["parameter_groups", "adam_groups"])
def test_groups_of_the_adapter_are_groups_of_the_optimizer(method: str) -> None:
    """LoRA+ with rates of the members."""
    config = presets.lora(2, rate="sgd") if method == "adam_groups" else presets.lora(2)
    factors, model = [1.0, 0.1, 0.5], network().double()
    several = attach(model, config, "all-linear", population=COUNT, dtype=torch.float64)
    groups = getattr(several, method)(1e-2)
    assert len({group["lr"] for group in groups}) == len(groups) > 0
    optimizer = MemberAdamW(
        several, [{**group, "lr": [group["lr"] * factor for factor in factors]} for group in groups]
    )
    trained(model, several, optimizer, SCHEDULE)
    for member, factor in enumerate(factors):
        model = network().double()
        whole = attach(model, config, "all-linear", population=COUNT, dtype=torch.float64)
        trained(model, whole, MemberAdamW(whole, getattr(whole, method)(1e-2 * factor)), SCHEDULE)
        for parameter, expected in zip(parameters(several), parameters(whole), strict=True):
            torch.testing.assert_close(parameter[member], expected[member], rtol=1e-12, atol=1e-14)


def test_trainer_takes_it(tmp_path: Path) -> None:
    for needed in ("accelerate", "transformers"):
        pytest.importorskip(needed)
    hf = importlib.import_module(".hugging_face", __package__)
    transformers = hf.transformers

    def start() -> tuple[Any, Population, MemberAdamW]:
        model = hf.bert()
        adapter = attach(model, "lora", rank=2, population=4, seeds="each", keep_trainable=["classifier"])
        groups = [
            {"params": adapter.parameters(), "lr": [0.02, 0.01, 0.04, 0.08], "weight_decay": 0.1},
            {"params": model.classifier.parameters(), "lr": 1e-3},
        ]
        return model, adapter, MemberAdamW(adapter, groups, max_norm=0.5)

    model, adapter, optimizer = start()
    batches: list[dict[str, Tensor]] = []

    class MemberTrainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            batches.append({name: tensor.clone() for name, tensor in inputs.items()})
            torch.manual_seed(len(batches))  # of dropout
            with adapter.members(inputs.pop("member")):
                return model(**inputs).loss

    data = [{**sentence, "member": number % 3} for number, sentence in enumerate(hf.sentences(12))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=0.0,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = MemberTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()

    other_model, other, alone = start()
    other_model.train()
    scheduler = transformers.get_scheduler("linear", alone, 0, 6)
    for number, batch in enumerate(batches):
        torch.manual_seed(number + 1)
        with other.members(batch.pop("member")):
            (other_model(**batch).loss / 2).backward()
        if number % 2:
            alone.step()
            alone.zero_grad()
            scheduler.step()
    assert len(batches) == 12
    fresh = start()[1]
    for parameter, expected, before in zip(parameters(adapter), parameters(other), parameters(fresh), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(parameter[3], before[3])
        assert not torch.equal(parameter[2], before[2])


# -- Bad input ---------------------------------------------------------------------------------------------------------


PARAMS = "params must be parameters of the model, or dicts with 'params', as for an optimizer of torch; got"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": [0.1, 0.2]}, ShapeError, "lr must be a number, or 3 numbers, one for each member; got shape (2,)"),
        ({"lr": -0.1}, ConfigError, "lr must be finite and not negative; got -0.1"),
        ({"lr": [0.1, float("nan"), 0.1]}, ConfigError, "lr must be finite and not negative; got [0.1, nan, 0.1]"),
        ({"weight_decay": "much"}, ConfigError, "weight_decay must be a number, or one for each member; got 'much'"),
        ({"betas": (0.9, 1.0)}, ConfigError, "betas must be from 0 to below 1; got (0.9, 1.0)"),
        ({"eps": -1e-8}, ConfigError, "eps must be a number from 0; got -1e-08"),
        ({"params": []}, ConfigError, f"{PARAMS} none"),
        ({"params": [{"lr": 0.1}]}, ConfigError, f"{PARAMS} [{{'lr': 0.1}}]"),
        ({"max_norm": 0.0}, ConfigError, "max_norm must be a positive number, or None; got 0.0"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    _, adapter = population()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        MemberAdamW(adapter, **settings)


def test_a_single_adapter_is_refused() -> None:
    adapter = attach(network(), "lora", "all-linear", rank=2)
    with pytest.raises(ConfigError, match=r"^MemberAdamW trains a population, .*; got .* use torch\.optim\.AdamW$"):
        MemberAdamW(adapter)
    with pytest.raises(
        ConfigError, match=r"got <tnadapt member 1 of .*\. For a member, give its population, of which the"
    ):
        MemberAdamW(population()[1][1])


def test_rates_of_members_are_refused_for_other_parameters() -> None:
    model, adapter = population(targets=["0"], keep_trainable=["2"])
    optimizer = MemberAdamW(adapter)
    wrong = {"params": model[2].parameters(), "lr": [0.1, 0.2, 0.3]}
    message = "lr is one for each member, and some of its parameters are not of population 'default': put those into a "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}group with a number, {{'params': …, 'lr': 0.3}}$"):
        optimizer.add_param_group(wrong)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    trained(model, adapter, optimizer, SCHEDULE)


def test_states_of_others_are_refused() -> None:
    model, adapter = population()
    optimizer = MemberAdamW(adapter)
    with pytest.raises(ConfigError, match=r"^this is the state of another optimizer; MemberAdamW loads that of Mem"):
        optimizer.load_state_dict(AdamW(adapter.parameters()).state_dict())
    larger_model, larger = population(count=5)
    other = MemberAdamW(larger)
    trained(larger_model, larger, other, [[[4]]])
    message = "population 'default' has 3 members, and this is the state of an optimizer for another number of them"
    for state in (other.state_dict(), MemberAdamW(larger, lr=[0.1] * 5).state_dict()):
        with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
            optimizer.load_state_dict(state)
    trained(model, adapter, optimizer, SCHEDULE)

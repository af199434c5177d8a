"""Checks of distributed models: what they must allow or refuse. Every process runs each check."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import tnadapt.torch
from tnadapt import presets
from tnadapt.errors import ConfigError, ShapeError, TargetError

from .distributed_jobs import BATCH, CONFIGS, TOKENS, Job, Model, batches, build, spread, whole
from .internals import register_in

SHARDED = Job("fsdp2")


def stirred(job: Job) -> tuple[Model, tnadapt.torch.Adapter]:
    model, adapter = build(job)
    adapter.load_arrays(other_arrays(adapter, 1))
    return model, adapter


def other_arrays(adapter: tnadapt.torch.Adapter, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=random) for name, shape in adapter.plan.param_shapes.items()}


def sample() -> Tensor:
    return torch.randn(BATCH, TOKENS, 6, generator=torch.Generator().manual_seed(3))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(sample())


def a_sharded_adapter_acts_as_a_whole_one() -> None:
    model, adapter = stirred(SHARDED)
    second = tnadapt.torch.attach(model, presets.lora(2), name="second")
    second.load_arrays(other_arrays(second, 2))
    weights: tuple[dict[str, float], ...] = ({"default": 1.0}, {"second": 1.0}, {"default": 0.3, "second": 0.7})

    def mixed(model: nn.Module) -> list[Tensor]:
        found = []
        for mix in weights:
            tnadapt.torch.mix(model, mix)
            found.append(outputs(model))
        return found

    def disabled(model: nn.Module) -> Tensor:
        with adapter.disabled(), second.disabled():
            return outputs(model)

    expected, base = mixed(model), disabled(model)
    running = spread(SHARDED, model)
    for one, other in zip(mixed(running), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert not torch.equal(one, base), "the adapter does nothing"
    assert torch.equal(disabled(running), base), "disabled, it is not the base"
    adapter.activate()
    running(sample()).square().mean().backward()
    torch.optim.SGD(adapter.parameters(), lr=0.5).step()
    after = outputs(running)
    alone, other = build(SHARDED)
    other.load_arrays(adapter.arrays())
    torch.testing.assert_close(after, outputs(alone), rtol=1e-6, atol=1e-6)
    with pytest.raises(TargetError, match="sharded"):
        adapter.merge()
    assert torch.equal(outputs(running), after), "a refused merge changed the model"
    fresh = spread(SHARDED, Model())
    with pytest.raises(TargetError, match="attach first"):
        tnadapt.torch.attach(fresh)


def same_arrays(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, array in wanted.items():
        assert torch.equal(found[name], array), f"{name} is not what was wanted"


def from_the_meta_device() -> None:
    """Build a model on the meta device, shard it and fill it, so that no process ever has the whole model."""
    with torch.device("meta"):
        model = Model()
    adapter = tnadapt.torch.attach(model, keep_trainable="head")
    running = spread(SHARDED, model)
    model.to_empty(device="cpu")
    alone, fresh = build(SHARDED)
    options = StateDictOptions(full_state_dict=True, strict=False)
    base = {name: value for name, value in alone.state_dict().items() if "tnadapt" not in name}
    set_model_state_dict(model, base, options=options)
    adapter.reset()
    same_arrays(adapter.arrays(), fresh.arrays())
    torch.testing.assert_close(outputs(running), outputs(alone), rtol=1e-6, atol=1e-6)


def process_zero_may_save_alone(folder: Path) -> None:
    """As many scripts do; where every process holds the whole model there is nothing to gather."""
    job, path = Job("ddp"), folder / "alone.safetensors"
    source, alone = stirred(job)
    spread(job, source)(sample()).square().mean().backward()
    with torch.no_grad():
        source.head.bias += 1.0
    if dist.get_rank() == 0:
        alone.save(path)
    dist.barrier()
    model, adapter = build(SHARDED)
    running = spread(SHARDED, model)
    adapter.swap(path)
    same_arrays(adapter.arrays(), alone.arrays())
    torch.testing.assert_close(outputs(running), outputs(source), rtol=1e-6, atol=1e-6)


def half_precision_blocks() -> None:
    """The blocks compute in bfloat16; the root, with the adapter, does not."""
    model, adapter = stirred(SHARDED)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    running = fully_shard(model)
    seen = []
    host = adapter._state.patches[0].host
    host.register_forward_pre_hook(lambda *_: seen.extend(p.dtype for p in adapter.parameters()))
    y = running(sample())
    y.square().mean().backward()
    assert set(seen) == {torch.float32}, f"the adapter computed with was {seen}"
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
        assert whole(parameter.grad).any(), f"{name} has no gradient"


def state_saved_and_resumed() -> None:
    """By torch's own state dicts of sharded models and optimizers."""

    def steps(running: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for ((x, y),) in batches(SHARDED):
            loss = functional.cross_entropy(running(x), y)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = build(SHARDED)
        running = spread(SHARDED, model)
        return running, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    running, optimizer = start()
    steps(running, optimizer)
    saved = copy.deepcopy(get_state_dict(running, optimizer))
    expected = steps(running, optimizer)
    again, fresh = start()
    set_state_dict(again, fresh, model_state_dict=saved[0], optim_state_dict=saved[1])
    found = steps(again, fresh)
    assert found == expected, f"{found} instead of {expected}"


class Around(nn.Module):
    """A module around the adapted model, which may also hold the arrays next to it."""

    def __init__(self, inner: Model) -> None:
        super().__init__()
        self.inner = inner
        self.beside = nn.ParameterDict()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def new_arrays_stay() -> None:
    """Load arrays after a forward pass, when torch still has gathered parameters that the next pass reshards.

    The sharded root is the model, or contains it, and may hold the arrays next to it.
    """
    for root in ("model", "around", "beside"):
        model, adapter = stirred(SHARDED)
        around = Around(model)
        if root == "beside":
            register_in(adapter._state, around.beside, "let_go()")
        running = spread(SHARDED, model) if root == "model" else fully_shard(around)
        before = outputs(running)
        wanted = other_arrays(adapter, 2)
        adapter.load_arrays(wanted)
        assert not torch.equal(outputs(running), before), "the arrays do not act"
        running(sample()).square().mean().backward()
        same_arrays(adapter.arrays(), wanted)
        # Choose while torch still has the gathered parameters, and no assignment of values makes it drop them.
        for word in ("factor1", None, "factor0"):
            outputs(running)
            adapter.set_trainable(arrays=word)
            running.zero_grad()
            running(sample()).square().mean().backward()
            for name, parameter in adapter.named_parameters():
                chosen = word is None or name.endswith(word)
                assert parameter.requires_grad == chosen, f"{name} requires_grad, with {word} chosen"
                assert (parameter.grad is not None) == chosen, f"{name} has a gradient, with {word} chosen"


def arrays_stay_readable(folder: Path) -> None:
    """Those that were read or saved after a forward pass, when torch still has gathered parameters."""
    job = Job("fsdp2", "lora")
    model, adapter = stirred(job)
    expected = {name: array.detach().clone() for name, array in adapter.arrays().items()}
    running = spread(job, model)
    outputs(running)
    arrays = adapter.arrays()
    adapter.load_arrays(other_arrays(adapter, 2))
    same_arrays(arrays, expected)
    outputs(running)
    adapter.save(folder / "other")
    dist.barrier()
    adapter.load_arrays(arrays)
    same_arrays(adapter.arrays(), expected)
    adapter.swap(folder / "other")
    outputs(running)
    same_arrays(adapter.arrays(), other_arrays(adapter, 2))


def compiled() -> None:
    for how in ("ddp", "fsdp2"):
        job = Job(how)
        model, adapter = stirred(job)
        expected = outputs(model)
        running = torch.compile(spread(job, model), backend="aot_eager")
        torch.testing.assert_close(outputs(running), expected, rtol=1e-6, atol=1e-6)
        running(sample()).square().mean().backward()
        assert all(bool(whole(p.grad).any()) for p in adapter.parameters()), f"{how}: no gradient"


class Members(NamedTuple):
    """A population with its optimizer, on a model that is spread over the processes, or on one of this process."""

    how: str | None
    running: nn.Module
    adapter: tnadapt.torch.Population
    groups: list[dict[str, Any]]

    @classmethod
    def on(cls, how: str | None) -> Members:
        torch.manual_seed(0)
        model = Model().double()  # Adam magnifies the rounding of small gradients
        adapter = tnadapt.torch.attach(
            model, "lora", rank=2, keep_trainable="head", population=5, seeds="each", dtype=torch.float64
        )
        assert isinstance(adapter, tnadapt.torch.Population)
        running: nn.Module = model
        if how == "ddp":
            running = DistributedDataParallel(model, find_unused_parameters=True)
        elif how is not None:
            running = spread(Job(how), model)
        several = {"params": list(adapter.parameters()), "lr": [0.1, 0.2, 0.3, 0.4, 0.5]}
        return cls(how, running, adapter, [several, {"params": list(model.head.parameters())}])

    def optimizer(self) -> tnadapt.torch.MemberAdamW:
        return tnadapt.torch.MemberAdamW(self.adapter, self.groups, weight_decay=0.1, max_norm=0.01)

    def train(self, optimizer: tnadapt.torch.MemberAdamW, steps: Sequence[Sequence[list[int | None]]]) -> None:
        """Take steps with this process's share of the rows; each step has the members of each process."""
        for number, shares in enumerate(steps):
            x = torch.randn(4, TOKENS, 6, generator=torch.Generator().manual_seed(number)).double()
            members = [member for share in shares for member in share]
            mine = slice(None) if self.how is None else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            with self.adapter.members(members[mine]):
                self.running(x[mine]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def members_of_any_process_take_a_step() -> None:
    """Each process has rows of other members, and under DDP one of them has none in a step."""
    for how in ("ddp", "fsdp2"):
        steps: list[list[list[int | None]]] = [[[0, 1], [1, 2]], [[2, 2], [4, None]]]
        steps += [[[1, 0], [None, None]]] if how == "ddp" else [[[1, None], [0, 0]]]
        several, alone = Members.on(how), Members.on(None)
        before = {name: array.detach().clone() for name, array in alone.adapter.arrays().items()}
        optimizer, expected = several.optimizer(), alone.optimizer()
        several.train(optimizer, steps)
        alone.train(expected, steps)
        for name, array in several.adapter.arrays().items():
            torch.testing.assert_close(array, alone.adapter.arrays()[name], rtol=1e-9, atol=1e-12)
            assert torch.equal(array[3], before[name][3]), f"{how}: {name}: member 3 was in no batch"
        # FSDP2 gives the first process the first three members.
        here = range(5) if how == "ddp" else (range(3), range(3, 5))[dist.get_rank()]
        for each, members in ((optimizer, here), (expected, range(5))):
            for parameter in each.param_groups[0]["params"]:
                numbers, state = each.param_groups[0]["members"].tolist(), each.state[parameter]
                counts = dict(zip(numbers, state["step"].tolist(), strict=False))
                assert counts == {k: n for k, n in {0: 2, 1: 2, 2: 2, 4: 1}.items() if k in members}, f"{how}: {counts}"
                assert len(state["exp_avg"]) <= 2 * len(numbers), f"{how}: a state of {len(state['exp_avg'])} members"
        states: list[Any] = [None, None]
        dist.all_gather_object(states, optimizer.state_dict())
        resumed = several.optimizer()
        if how == "fsdp2":
            text = f"^this process has members {here[0]} to {here[-1]} of population 'default', and this is the state"
            with pytest.raises(ShapeError, match=text):
                resumed.load_state_dict(states[1 - dist.get_rank()])
        resumed.load_state_dict(states[dist.get_rank()])
        several.train(resumed, steps[:1])
        alone.train(expected, steps[:1])
        for name, array in several.adapter.arrays().items():
            torch.testing.assert_close(array, alone.adapter.arrays()[name], rtol=1e-9, atol=1e-12)


def shards_that_split_members_are_refused() -> None:
    model, adapter = populated("lora")
    fully_shard(model, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    with pytest.raises(
        ConfigError, match=r"^the population's arrays are sharded by \(Shard\(dim=2\),\), and MemberAdamW"
    ):
        tnadapt.torch.MemberAdamW(adapter)
    model, adapter = populated("lora")
    fully_shard(model, ignored_params={next(iter(adapter.parameters()))})
    with pytest.raises(ConfigError, match=r"^some arrays of population 'default' are sharded and others not, and Mem"):
        tnadapt.torch.MemberAdamW(adapter)


def sparse_gradients_are_refused() -> None:
    """In forward passes, with what to do; without gradients, models run."""
    for how, name in (("ddp", "DistributedDataParallel"), ("fsdp2", "FSDP2")):
        model, adapter = populated("lora")
        adapter[0].activate()
        expected, running = outputs(model), spread(Job(how), model)
        text = f"^population 'default' has sparse gradients, which {name} cannot reduce over its processes: set "
        for act in (contextlib.nullcontext(), adapter.members([0] * BATCH)):
            adapter.sparse = True
            with act:
                torch.testing.assert_close(outputs(running), expected)
                with pytest.raises(ConfigError, match=rf"{text}population\.sparse = False, or leave out sparse=True$"):
                    running(sample())
                adapter.sparse = False
                running(sample()).square().mean().backward()


def populated(config: str) -> tuple[Model, tnadapt.torch.Population]:
    torch.manual_seed(0)
    model = Model()
    population = tnadapt.torch.attach(model, CONFIGS[config], population=3, keep_trainable="head")
    assert isinstance(population, tnadapt.torch.Population)
    with torch.no_grad():
        random = torch.Generator().manual_seed(4)
        for parameter in population.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model, population


def trained_members(job: Job, rank: int, world: int) -> tuple[Model, tnadapt.torch.Population]:
    """Train on this share of the rows, each with its member; member 1 has no rows."""
    model, population = populated(job.config)
    running = model if world == 1 else spread(job, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    index = [2, 2, None, 0, 0, 2, 0, 0]
    for ((x, y),) in batches(job):
        with population.members(index[rank::world]):
            functional.cross_entropy(running(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, population


def members_of_a_population(folder: Path) -> None:
    """Several processes train like one, each with members of its own; members are read and changed afterwards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for how in ("ddp", "fsdp2"):
        for config in ("lora", "default", "linear"):
            job = Job(how, config)
            model, population = trained_members(job, rank, world)
            alone, expected = trained_members(job, 0, 1)
            untouched = populated(config)[1].arrays()
            for name, array in population.arrays().items():
                torch.testing.assert_close(array, expected.arrays()[name], rtol=1e-5, atol=1e-6)
                assert torch.equal(array[1], untouched[name][1]), f"{how}: {name} of the member without rows moved"
            for number in range(3):
                same_arrays(population[number].arrays(), {n: a[number] for n, a in population.arrays().items()})
                population[number].activate()
                expected[number].activate()
                torch.testing.assert_close(outputs(model), outputs(alone), rtol=1e-5, atol=1e-5)
            before = population.arrays()
            path = folder / f"{how}-{config}-member"
            population[2].save(path)
            dist.barrier()
            population[0].swap(path)
            same_arrays(population[0].arrays(), {name: array[2] for name, array in before.items()})
            population[2].reset()
            fresh = tnadapt.torch.attach(Model(), CONFIGS[config])
            same_arrays(population[2].arrays(), fresh.arrays())
            same_arrays(population[1].arrays(), {name: array[1] for name, array in before.items()})
            population.load_arrays(before)
            same_arrays(population.arrays(), before)


CHECKS: dict[str, Callable[..., None]] = {
    check.__name__: check
    for check in (
        a_sharded_adapter_acts_as_a_whole_one, from_the_meta_device, process_zero_may_save_alone, half_precision_blocks,
        state_saved_and_resumed, new_arrays_stay, arrays_stay_readable, compiled, members_of_any_process_take_a_step,
        shards_that_split_members_are_refused, sparse_gradients_are_refused,
        members_of_a_population,
    )
}  # fmt: skip

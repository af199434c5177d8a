"""Trainings in one run, as members of one population, whose passes serve all of them: each gets what it gets alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tnadapt import torch as tnt
from tnadapt.errors import TargetError

from .engines import Do
from .loop import Learner, OwnRates, Schedule, TrainingStep, fit, order_of, set_training, steps_of, take_steps
from .problem import Problem

# -- Tasks of one call of an engine ------------------------------------------------------------------------------------


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Together:
    """Tasks that one call runs together: the task of :func:`~tnadapt.finetune.run_tasks` that stands for them."""

    tasks: tuple[Any, ...]

    @property
    def key(self) -> str:
        """The key of its line, which has the tasks' own as ``lines``."""
        return hashlib.sha256(repr([task.key for task in self.tasks]).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What messages call it."""
        return "; ".join(task.name for task in self.tasks)


def grouped(tasks: Sequence[T], most: int, alike: Callable[[T], Hashable]) -> list[T | Together]:
    """Return the calls for tasks: those that are alike together, at most so many; 0 for no limit.

    Examples
    --------
    >>> [call.tasks if isinstance(call, Together) else call for call in grouped("abaacb", 2, ord)]
    [('a', 'a'), 'a', ('b', 'b'), 'c']
    """
    groups: dict[Hashable, list[T]] = {}
    for task in tasks:
        groups.setdefault(alike(task), []).append(task)
    parts = [
        several[first : first + (most or len(several))]
        for several in groups.values()
        for first in range(0, len(several), most or len(several))
    ]
    return [Together(tuple(part)) if len(part) > 1 else part[0] for part in parts]


def tasks_of(call: Any) -> tuple[Any, ...]:
    """Return the tasks of a call."""
    return call.tasks if isinstance(call, Together) else (call,)


def lines_of(call: Any, line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the result lines of the tasks of a call, given its own."""
    return cast("list[dict[str, Any]]", line["lines"]) if isinstance(call, Together) else [line]


def doing(
    do_all: Callable[[Sequence[Any], Callable[[float], None]], list[dict[str, Any]]],
    halving: tuple[type[Exception], ...] = (MemoryError, torch.OutOfMemoryError),
) -> Do:
    """Return what runs a call, given what runs several tasks; with an error of these types, they are run in halves."""

    def lines(tasks: Sequence[Any], progress: Callable[[float], None]) -> list[dict[str, Any]]:
        try:
            return do_all(tasks, progress)
        except halving:
            if len(tasks) == 1:
                raise
        # Here the error is gone, and with it the tensors that its traceback holds; models are in cycles of references.
        gc.collect()
        half = len(tasks) // 2
        return [*lines(tasks[:half], progress), *lines(tasks[half:], progress)]

    def do(call: Any, progress: Callable[[float], None]) -> dict[str, Any]:
        told = -1.0

        def tell(done: float) -> None:
            nonlocal told
            if abs(done - told) >= 0.001:  # each of many tasks takes steps, and each time all are told
                told = done
                progress(done)

        ended = lines(tasks_of(call), tell)
        return {"lines": ended} if isinstance(call, Together) else ended[0]

    return do


# -- What is trained ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A model that is to be trained.

    Attributes
    ----------
    model : nn.Module
        A copy of the base with its adapter.
    adapter : Adapter, optional
        None if it has none of tnadapt.
    parameters : sequence of nn.Parameter
        All that are trained.
    head : OwnRates
    schedule : Schedule
    seed : int
        Of the order of the samples, and of dropout.
    """

    model: nn.Module
    adapter: tnt.Adapter | None
    parameters: Sequence[nn.Parameter]
    head: OwnRates
    schedule: Schedule
    seed: int

    def kept(self) -> dict[str, nn.Module]:
        """Return the modules with parameters that are trained and not of the adapter, by their paths."""
        own = {id(parameter) for parameter in (self.adapter.parameters() if self.adapter else ())}
        trained = {id(parameter) for parameter in self.parameters} - own
        return {
            path: module
            for path, module in self.model.named_modules(remove_duplicate=False)
            if any(id(parameter) in trained for parameter in module.parameters(recurse=False))
        }


def share_base(model: nn.Module, other: nn.Module) -> None:
    """Let another copy of a model have its memory for what is trained in neither."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in other.named_parameters():
        if not parameter.requires_grad and name in frozen:
            parameter.data = frozen[name].data


# -- Training ----------------------------------------------------------------------------------------------------------


def fit_each(
    problem: Problem,
    trainees: Sequence[Trainee],
    epochs: int,
    batch: int,
    device: torch.device,
    steps: int | None = None,
) -> Iterator[tuple[int, TrainingStep]]:
    """Train models, and yield each step with the number of the model: together where they can be members of one run.

    Parameters
    ----------
    problem : Problem
    trainees : sequence of Trainee
        Of one method, but for the seed.
    epochs, batch : int
    device : torch.device
    steps : int, optional
        Instead of epochs.

    Yields
    ------
    int, TrainingStep

    Notes
    -----
    Each gets what it gets alone: the same batches in the same order, its own mean loss, clipping and optimizer.
    They are trained one after another

    - if the base draws random numbers in training, as for dropout, normalizes over the batch, changes its buffers, or
      has layers in which the rows of a batch cannot be told apart;
    - if something else is trained with them than linear layers and layer norms, such as embeddings, or the base reads
      the weights of those instead of calling them;
    - if their seeds differ, and the seed determines more than the order of the samples, the new head, and where the
      arrays of the adapter start: F, frozen arrays, or, for texts, how a batch is padded. Those of one seed stay
      together;
    - on devices other than the CPU and CUDA.
    """
    part = problem.parts["training"]
    groups: dict[Hashable, list[int]] = {}
    by_seed = part.lengths is not None or any(_draws(trainee) for trainee in trainees)
    for place, trainee in enumerate(trainees):
        if trainee.parameters:  # else there is nothing to train
            groups.setdefault(trainee.seed if by_seed else None, []).append(place)
    for places in groups.values():
        several = [trainees[place] for place in places]
        members = _Members.of(problem, several, device) if len(several) > 1 else None
        if members is not None:
            for number, step in members.fit(epochs, batch, steps):
                yield places[number], step
            continue
        for place, trainee in zip(places, several, strict=True):
            torch.manual_seed(trainee.seed)
            for step in fit(
                trainee.model, problem.logits, problem.task, part, trainee.parameters, trainee.schedule, epochs, batch,
                device, steps, trainee.head,
            ):  # fmt: skip
                yield place, step


def _draws(trainee: Trainee) -> bool:
    """Return whether the seed determines more of an adapter than where its arrays start."""
    if trainee.adapter is None:
        return False
    plan = trainee.adapter.plan
    drawn = any(group.subtracts or not group.projection.map.identity for group in plan.groups)
    return drawn or bool(plan.frozen_shapes) or plan.theta is not None


class _Copies(nn.Module):
    """The same module of each member, which gets the member's rows."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(modules)
        #: The number of rows of each member in the batch.
        self.rows: Mapping[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for all rows; if there are more than the batch has, each entry stands for several."""
        times, left = divmod(len(x), sum(self.rows.values()))
        if left:
            raise TargetError(f"the rows of a batch cannot be told apart in an input of shape {tuple(x.shape)}")
        parts = torch.split(x, [times * count for count in self.rows.values()])
        return torch.cat([self.copies[place](part) for place, part in zip(self.rows, parts, strict=True)])


class _Members:
    """Models that are trained as the members of one population, on one more copy of the base."""

    # In place of each module of a head, the copy has those of all models. Optimizers get views of the population's
    # arrays, which share their memory and version, so that the loop is that of single trainings.

    def __init__(self, problem: Problem, trainees: Sequence[Trainee], device: torch.device) -> None:
        first = trainees[0]
        self.problem, self.trainees, self.device = problem, trainees, device
        self.model = problem.build(first.seed).requires_grad_(False).to(device)
        share_base(first.model, self.model)
        self.population: tnt.Population | None = None
        self.arrays: list[tuple[list[nn.Parameter], list[Tensor]]] = [([], []) for _ in trainees]
        if first.adapter is not None:
            self.population = cast(
                tnt.Population,
                tnt.attach(self.model, first.adapter.config, list(first.adapter.targets), population=len(trainees)),
            )
            several = list(self.population.parameters())
            for place, trainee in enumerate(trainees):
                own = list(cast(tnt.Adapter, trainee.adapter).parameters())
                views = [
                    array.detach()[place].copy_(start.detach()).requires_grad_()
                    for array, start in zip(several, own, strict=True)
                ]
                self.arrays[place] = own, views
            for number, array in enumerate(several):
                divide = functools.partial(self._divide, number)
                array.register_post_accumulate_grad_hook(divide)  # type: ignore[no-untyped-call]
        self.copies: list[_Copies] = []
        for path in first.kept():
            parent, _, name = path.rpartition(".")
            self.copies.append(_Copies([trainee.model.get_submodule(path) for trainee in trainees]))
            setattr(self.model.get_submodule(parent), name, self.copies[-1])
        set_training(self.model)

    @classmethod
    def of(cls, problem: Problem, trainees: Sequence[Trainee], device: torch.device) -> _Members | None:
        """Return the members, or None if they would not get what they get alone: see :func:`fit_each`."""
        first = trainees[0]
        kept, targets = first.kept(), () if first.adapter is None else first.adapter.targets
        if (
            device.type not in ("cpu", "cuda")
            or any(isinstance(module, _BatchNorm) and module.running_mean is None for module in first.model.modules())
            or any(type(module) not in (nn.Linear, nn.LayerNorm) for module in kept.values())
            or any(target.module in kept for target in targets)
        ):
            return None
        members = cls(problem, trainees, device)
        return members if members._try() else None

    def _try(self) -> bool:
        """Return whether a pass tells rows apart, calls what is trained, and draws and changes nothing."""
        before = self._state()
        sample = torch.zeros(len(self.trainees), dtype=torch.int64)
        try:
            with torch.no_grad(), self._acting(dict.fromkeys(range(len(self.trainees)), 1)):
                self.problem.logits(self.model, self.problem.parts["training"].batch(sample, self.device))
        except (TargetError, AttributeError):  # copies have no weight that could be read
            return False
        now = self._state()
        return len(now) == len(before) and all(map(torch.equal, before, now))

    def _state(self) -> list[Tensor]:
        """Return the states of the random generators, and copies of the buffers."""
        on_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device, *(buffer.clone() for buffer in self.model.buffers())]

    def _divide(self, number: int, array: Tensor) -> None:
        """Give the members their parts of a gradient."""
        for (_, views), gradient in zip(self.arrays, cast(Tensor, array.grad), strict=True):
            views[number].grad = gradient
        array.grad = None

    @contextlib.contextmanager
    def _acting(self, rows: Mapping[int, int]) -> Iterator[None]:
        """Let the members act on consecutive rows of the batch, in this order, each on so many."""
        for copies in self.copies:
            copies.rows = rows
        entries = [place for place, count in rows.items() for _ in range(count)]
        with contextlib.nullcontext() if self.population is None else self.population.members(entries):
            yield

    def fit(self, epochs: int, batch: int, steps: int | None) -> Iterator[tuple[int, TrainingStep]]:
        """Train all, and yield each step with the number of the member; in the end the models have its arrays."""
        problem, part = self.problem, self.problem.parts["training"]
        steps = steps_of(part, epochs, batch, steps)
        # Nothing else draws from these, as nothing else draws from the global one if a model is trained alone.
        orders = [order_of(part, batch, torch.Generator().manual_seed(trainee.seed)) for trainee in self.trainees]
        learners = []
        for trainee, (own, views) in zip(self.trainees, self.arrays, strict=True):
            view_of = {id(array): view for array, view in zip(own, views, strict=True)}
            parameters = [view_of.get(id(parameter), parameter) for parameter in trainee.parameters]
            begun = trainee.schedule.begin(cast("list[nn.Parameter]", parameters), steps, trainee.head)
            learners.append(Learner(parameters, *begun))

        def losses_of(step: int, going: Sequence[int]) -> list[Tensor]:
            chosen = {place: next(orders[place]) for place in going}
            rows = {place: len(indices) for place, indices in chosen.items()}
            indices = torch.cat(list(chosen.values()))
            with self._acting(rows):
                logits = problem.logits(self.model, part.batch(indices, self.device))
            labels = part.labels[indices].to(self.device)
            parts = zip(*(torch.split(tensor, list(rows.values())) for tensor in (logits, labels)), strict=True)
            return [problem.task.loss(some, truth) for some, truth in parts]

        try:
            yield from take_steps(losses_of, learners, steps, self.trainees[0].schedule.clip)
        finally:
            with torch.no_grad():
                for own, views in self.arrays:
                    for array, view in zip(own, views, strict=True):
                        array.copy_(view)

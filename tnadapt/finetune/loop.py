"""The training loop and its schedule of learning rates, and the evaluation of a model on labeled samples."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from tnadapt.errors import TnadaptError, safe_repr

from ._learning_task import LearningTask
from ._specification import Part

Logits = Callable[[nn.Module, Any], Tensor]

# Larger batches do not make evaluation faster.
EVALUATION_BATCH = 256

# Number of batches of texts that are sorted by length together.
POOL = 16

OPTIMISERS = ("adamw", "sgd")
SHAPES = ("cosine", "onecycle")

#: AdamW's first beta.
BETA1 = 0.9


@dataclasses.dataclass(frozen=True)
class OwnRates:
    """Parameters that are trained at another rate than the others, such as those of a head.

    Attributes
    ----------
    parameters : sequence of nn.Parameter
    rate : float, optional
        None for that of the others.
    """

    parameters: Sequence[nn.Parameter] = ()
    rate: float | None = None

    def groups(self, parameters: Sequence[nn.Parameter], rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups of an optimizer."""
        if self.rate is None or not self.parameters:
            return [{"params": list(parameters)}]
        ids = {id(parameter) for parameter in self.parameters}
        others = [parameter for parameter in parameters if id(parameter) not in ids]
        groups = [{"params": others, "lr": rate}] if others else []
        return [*groups, {"params": list(self.parameters), "lr": self.rate}]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The optimizer and the schedule of its learning rate.

    Attributes
    ----------
    rate : float
        The highest learning rate.
    warmup : float
        For the shape ``cosine``, the fraction of steps with a linearly rising rate; it then falls as half a cosine.
    weight_decay : float
    clip : float
        The gradient is clipped to this norm.
    optimiser : {"adamw", "sgd"}
        SGD has a momentum of 0.9.
    beta2 : float
        AdamW's; its first beta is 0.9. With two equal betas no entry moves by more than the rate in a step, which
        ``rate="adam"`` assumes. With torch's 0.999 the bound is seven rates, approached where gradients grow.
    shape : {"cosine", "onecycle"}
        ``onecycle`` is torch's OneCycleLR with its defaults: up over three tenths of the steps, from a 25th of the
        rate, then down to almost 0; SGD's momentum moves inversely, between 0.95 and 0.85.

    Raises
    ------
    TnadaptError
        If the optimizer or shape is unknown, or ``beta2`` is not from 0 to below 1.
    """

    rate: float
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    optimiser: str = "adamw"
    shape: str = "cosine"
    beta2: float = BETA1

    def __post_init__(self) -> None:
        for name, word, words in (("optimiser", self.optimiser, OPTIMISERS), ("shape", self.shape, SHAPES)):
            if word not in words:
                raise TnadaptError(f"{name} must be one of {', '.join(words)}; got {safe_repr(word)}")
        if not 0.0 <= self.beta2 < 1.0:
            raise TnadaptError(f"beta2 must be from 0 to below 1; got {safe_repr(self.beta2)}")

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the rate at a step, counted from 0, for the shape ``cosine``.

        Examples
        --------
        >>> schedule = Schedule(1e-3, warmup=0.2)
        >>> [round(schedule.factor(step, 10), 3) for step in range(0, 10, 2)]
        [0.5, 1.0, 0.854, 0.5, 0.146]
        """
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    def begin(
        self, parameters: Sequence[nn.Parameter], steps: int, own_rates: OwnRates | None = None
    ) -> tuple[Optimizer, LRScheduler]:
        """Return an optimizer of these parameters and its scheduler, to be stepped after each step.

        ``own_rates`` are those of parameters that are not trained at ``rate``.
        """
        optimiser: Optimizer
        groups = (own_rates or OwnRates()).groups(parameters, self.rate)
        if self.optimiser == "sgd":
            optimiser = torch.optim.SGD(groups, lr=self.rate, momentum=0.9, weight_decay=self.weight_decay)
        else:
            betas = (BETA1, self.beta2)
            optimiser = torch.optim.AdamW(groups, lr=self.rate, betas=betas, weight_decay=self.weight_decay)
        if self.shape == "onecycle":
            rates = [group["lr"] for group in optimiser.param_groups]
            return optimiser, lr_scheduler.OneCycleLR(optimiser, rates, total_steps=max(2, steps))
        return optimiser, lr_scheduler.LambdaLR(optimiser, lambda step: self.factor(step, steps))


class TrainingStep(NamedTuple):
    """A step of a training in :func:`take_steps`.

    Attributes
    ----------
    done, total : int
        Number of steps done, with this one, and of all.
    loss : float
        Of the batch, before the step.
    rate : float
        The learning rate of the first group of parameters.
    gradient_norm : Tensor, optional
        Before it was clipped; None if the loss is not finite, and no step was taken.
    """

    done: int
    total: int
    loss: float
    rate: float
    gradient_norm: Tensor | None = None


def steps_of(part: Part, epochs: int, batch: int, steps: int | None = None) -> int:
    """Return the number of steps: ``steps``, or that of ``epochs`` epochs."""
    return epochs * math.ceil(len(part.labels) / batch) if steps is None else steps


class Learner(NamedTuple):
    """What one of the trainings of a run changes.

    Attributes
    ----------
    parameters : sequence of nn.Parameter
        All parameters of the optimizer.
    optimiser : Optimizer
    rates : LRScheduler
        Stepped after each step but the last.
    """

    parameters: Sequence[Tensor]
    optimiser: Optimizer
    rates: LRScheduler


def take_steps(
    losses_of: Callable[[int, Sequence[int]], Sequence[Tensor]],
    learners: Sequence[Learner],
    steps: int,
    clip: float = math.inf,
    first: int = 0,
) -> Iterator[tuple[int, TrainingStep]]:
    """Take every step of one or several trainings, and yield each after it was taken: the only training loop here.

    Parameters
    ----------
    losses_of : callable
        ``losses_of(step, numbers)`` returns the losses of a step, counted from 0, one for each of the trainings of
        these numbers, each on a batch of its choice. One backward pass serves their sum.
    learners : sequence of Learner
    steps : int
    clip : float
        The gradient of each training is clipped to this norm.
    first : int
        The number of steps that were taken before, in a training that is resumed.

    Yields
    ------
    int, TrainingStep
        The number of the training, and its step. A loss that is not finite is yielded, and ends its training before the
        step; the others go on.
    """
    going = list(range(len(learners)))
    for number in range(first, steps):
        for place in going:
            learners[place].optimiser.zero_grad(set_to_none=True)
        losses = losses_of(number, going)
        values = [float(loss.detach()) for loss in losses]
        sound = [loss for loss, value in zip(losses, values, strict=True) if math.isfinite(value)]
        if sound:
            torch.autograd.backward(sound)
        for place, value in zip(going, values, strict=True):
            parameters, optimiser, rates = learners[place]
            step = TrainingStep(number + 1, steps, value, optimiser.param_groups[0]["lr"])
            if math.isfinite(value):
                step = step._replace(gradient_norm=nn.utils.clip_grad_norm_(parameters, clip))
                optimiser.step()
                if number + 1 < steps:
                    rates.step()
            yield place, step
        going = [place for place, value in zip(going, values, strict=True) if math.isfinite(value)]
        if not going:
            return


def train_steps(
    loss_of: Callable[[int], Tensor],
    parameters: Sequence[nn.Parameter],
    optimiser: Optimizer,
    rates: LRScheduler,
    steps: int,
    clip: float = math.inf,
    first: int = 0,
) -> Iterator[TrainingStep]:
    """Take every step of a single training by :func:`take_steps`: ``loss_of(step)`` returns its loss."""
    learner = Learner(parameters, optimiser, rates)
    for _, step in take_steps(lambda number, _: [loss_of(number)], [learner], steps, clip, first):
        yield step


def fit(
    model: nn.Module,
    logits: Logits,
    task: LearningTask,
    part: Part,
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    epochs: int,
    batch: int,
    device: torch.device,
    steps: int | None = None,
    own_rates: OwnRates | None = None,
) -> Iterator[TrainingStep]:
    """Train on labeled samples for ``steps`` steps, or else ``epochs`` epochs, as :func:`train_steps` does.

    The order of the samples and dropout use torch's global generator, which the caller seeds.
    """
    steps = steps_of(part, epochs, batch, steps)
    order = order_of(part, batch)

    def loss_of(step: int) -> Tensor:
        indices = next(order)
        return task.loss(logits(model, part.batch(indices, device)), part.labels[indices].to(device))

    set_training(model)
    return train_steps(loss_of, parameters, *schedule.begin(parameters, steps, own_rates), steps, schedule.clip)


def set_training(model: nn.Module) -> None:
    """Set training mode, but keep the running statistics of frozen layers: an adapter's file does not hold them."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            module.train(any(parameter.requires_grad for parameter in module.parameters()))


def order_of(part: Part, batch: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yield the batches of one epoch after another, without end; by default from torch's global generator."""
    return (indices for _ in itertools.count() for indices in batches(part, batch, generator))


def batches(part: Part, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return random batches of all samples; texts of similar length share a batch, to reduce padding."""
    order = torch.randperm(len(part.labels), generator=generator)
    if part.lengths is None:
        return list(torch.split(order, size))
    pools = [pool[part.lengths[pool].argsort(stable=True)] for pool in torch.split(order, POOL * size)]
    batches = [batch for pool in pools for batch in torch.split(pool, size)]
    return [batches[int(i)] for i in torch.randperm(len(batches), generator=generator)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    logits: Logits,
    task: LearningTask,
    part: Part,
    device: torch.device,
    batch: int = EVALUATION_BATCH,
) -> list[Tensor]:
    """Compute what the task keeps of the logits of every sample, in the order of the labels.

    ``batch`` is the training's batch size; evaluation uses larger batches, because no gradients are stored.
    """
    model.eval()
    order = torch.arange(len(part.labels)) if part.lengths is None else part.lengths.argsort(stable=True)
    kept: list[Tensor] = [order] * len(order)
    for some in torch.split(order, min(EVALUATION_BATCH, task.evaluation_factor * batch)):
        rows = task.rows(logits(model, part.batch(some, device)), part.labels[some])
        for index, row in zip(some.tolist(), rows, strict=True):
            kept[index] = row
    return kept


def accuracy(model: nn.Module, logits: Logits, task: LearningTask, part: Part, device: torch.device) -> float:
    """Return the fraction of samples that a model classifies correctly."""
    return task.measure(evaluate(model, logits, task, part, device), part.labels).score

"""The loop: some parameters of a model, fitted to labelled samples."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .problem import Part

__all__ = ["Schedule", "accuracy", "evaluate", "fit", "threads"]

Logits = Callable[[nn.Module, Any], Tensor]

# Without gradients so many times a training's batch fit, and more than so many samples gain nothing.
EVALUATION_FACTOR, EVALUATION_BATCH = 4, 256

# Batches' worth of texts that are sorted by length at a time.
POOL = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """AdamW whose rate rises linearly over the first ``warmup`` of the steps, then falls to 0 as a half cosine."""

    rate: float
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def factor(self, step: int, steps: int) -> float:
        """Of the rate, at a step counted from 0.

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


def fit(
    model: nn.Module,
    logits: Logits,
    part: Part,
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    epochs: int,
    batch: int,
    device: torch.device,
) -> Iterator[tuple[int, int, float]]:
    """Train, and yield ``(steps done, steps in all, loss)`` after each step.

    The order of the samples, and dropout, come from torch's global generator: the caller seeds it. A loss that is
    not finite is yielded and ends the training before the step is made.
    """
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=schedule.weight_decay)
    count = len(part.labels)
    steps = epochs * math.ceil(count / batch)
    done = 0
    model.train()
    for _ in range(epochs):
        for indices in _batches(part, batch):
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate * schedule.factor(done, steps)
            optimiser.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(
                logits(model, part.batch(indices, device)).float(), part.labels[indices].to(device)
            )
            value = float(loss.detach())
            done += 1
            if not math.isfinite(value):
                yield done, steps, value
                return
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimiser.step()
            yield done, steps, value


def _batches(part: Part, size: int) -> list[Tensor]:
    """All samples in random batches; texts of like length share one, so that little of it is padding."""
    order = torch.randperm(len(part.labels))
    if part.lengths is None:
        return list(torch.split(order, size))
    pools = [pool[part.lengths[pool].argsort(stable=True)] for pool in torch.split(order, POOL * size)]
    batches = [batch for pool in pools for batch in torch.split(pool, size)]
    return [batches[int(i)] for i in torch.randperm(len(batches))]


@torch.no_grad()
def evaluate(
    model: nn.Module, logits: Logits, part: Part, device: torch.device, batch: int = EVALUATION_BATCH
) -> Tensor:
    """The logits of every sample, in the order of the labels: float32 on the CPU, shape (n, classes).

    ``batch`` is a training's: a few times as many samples go through at once.
    """
    model.eval()
    order = torch.arange(len(part.labels)) if part.lengths is None else part.lengths.argsort(stable=True)
    size = min(EVALUATION_BATCH, EVALUATION_FACTOR * batch)
    pieces = [logits(model, part.batch(some, device)).float().cpu() for some in torch.split(order, size)]
    found = torch.cat(pieces)
    back = torch.empty_like(found)
    back[order] = found
    return back


def accuracy(model: nn.Module, logits: Logits, part: Part, device: torch.device) -> float:
    """The fraction of samples that a model gives the right class."""
    return float((evaluate(model, logits, part, device).argmax(1) == part.labels).float().mean())


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads inside ``with``."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

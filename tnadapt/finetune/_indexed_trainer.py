"""A ``Trainer`` of transformers on the samples of a problem, which are batches of indices to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import Tensor, device, nn

from .loop import batches
from .problem import Problem

__all__ = ["NotFiniteError", "TrainerArguments", "indexed_trainer"]


class NotFiniteError(Exception):
    """Ends a training before the step of a loss that is not finite."""


class TrainerArguments(transformers.TrainingArguments):  # type: ignore[misc]
    """Arguments of a Trainer that leaves the model where it is."""

    place_model_on_device = False


class _Batches:
    """The batches of a part as indices, redrawn in each epoch."""

    def __init__(self, problem: Problem, size: int) -> None:
        self.dataset, self.size = problem.parts["training"], size

    def __len__(self) -> int:
        return math.ceil(len(self.dataset.labels) / self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([{"indices": indices} for indices in batches(self.dataset, self.size)])


class _Progress(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Callable[[float], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.progress(state.global_step / state.max_steps)


class _IndexedTrainer(transformers.Trainer):  # type: ignore[misc]
    """Its loss is that of the problem's task."""

    loss_is_scaled_for_ga = True
    problem: Problem
    device: device
    last = math.nan

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.device_placement = False  # model and batches are on the device

    def get_train_dataloader(self) -> Any:
        return _Batches(self.problem, self.args.per_device_train_batch_size)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def compute_loss(self, model: nn.Module, inputs: Any, *given: Any, **settings: Any) -> Tensor:
        part, indices = self.problem.parts["training"], inputs["indices"]
        logits = self.problem.logits(model, part.batch(indices, self.device))
        loss = self.problem.task.loss(logits, part.labels[indices].to(self.device))
        self.last = float(loss.detach())
        if not math.isfinite(self.last):
            raise NotFiniteError
        return loss

    def training_step(self, *given: Any, **settings: Any) -> Tensor:
        return super().training_step(*given, **settings).to(self.args.device)  # type: ignore[no-any-return]


def indexed_trainer(
    model: nn.Module, problem: Problem, where: device, arguments: TrainerArguments, progress: Callable[[float], None]
) -> Any:
    """Return a Trainer of the problem's training samples.

    Parameters
    ----------
    model : nn.Module
        On the device.
    problem : Problem
    where : torch.device
    arguments : TrainerArguments
    progress : callable
        Called with the fraction of steps done.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU for each training
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    trainer = _IndexedTrainer(model=model, args=arguments, callbacks=[_Progress(progress)])
    if cached is not None:
        config.use_cache = cached  # the Trainer changes it, but it is a part of the base
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.problem, trainer.device = problem, where
    return trainer

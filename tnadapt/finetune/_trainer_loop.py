"""Trainings on transformers' ``Trainer``, for its callbacks: TensorBoard, W&B, trackio.

It takes the same steps as :func:`tnadapt.finetune.loop.fit`, bit by bit: the same batches, dropout, optimizer, rates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tnadapt.errors import TnadaptError

from ._data_sources import quiet
from ._run_logs import clear_logs, log_to
from .loop import OwnRates, Schedule, steps_of
from .problem import Problem

__all__ = ["RunReport", "need_trainer", "train_with_trainer"]

# Points in the curve of a training that is reported.
_POINTS = 50

#: Libraries whose runs the Trainer's callback leaves open; that of trackio ends them itself.
_LEFT_OPEN = ("wandb",)


@dataclasses.dataclass(frozen=True)
class RunReport:
    """Where a training is reported to.

    Attributes
    ----------
    to : str
        An integration of the Trainer, such as ``tensorboard``; ``none`` for no reports.
    name : str
        The name of the run.
    folder : Path, optional
        For the files of TensorBoard. Those of an earlier training are deleted when this one begins.
    """

    to: str = "none"
    name: str = ""
    folder: Path | None = None


def need_trainer() -> None:
    """Raise an error if the Trainer cannot be used.

    Raises
    ------
    TnadaptError
        If accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise TnadaptError(
            "trainings of your own models run on transformers' Trainer, which needs accelerate: pip install "
            "'tnadapt[hub]'"
        )


def train_with_trainer(
    model: nn.Module,
    problem: Problem,
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    epochs: int,
    batch: int,
    device: torch.device,
    steps: int | None = None,
    own_rates: OwnRates | None = None,
    report: RunReport = RunReport(),
    progress: Callable[[float], None] = lambda done: None,
) -> float:
    """Train parameters of a model, and return the last loss; one that is not finite ends the training before its step.

    Parameters
    ----------
    model : nn.Module
        On the device.
    problem : Problem
    parameters : sequence of nn.Parameter
    schedule, epochs, batch, device, steps, own_rates
        As in :func:`tnadapt.finetune.loop.fit`.
    report : RunReport
    progress : callable
        Called with the fraction of steps done.
    """
    with quiet("transformers", "accelerate"):
        from ._indexed_trainer import NotFiniteError, TrainerArguments, indexed_trainer

    steps = steps_of(problem.parts["training"], epochs, batch, steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept_random_state())
        stack.enter_context(quiet("transformers", "accelerate"))
        state = torch.get_rng_state()
        folder = None if report.to == "none" else report.folder
        out = stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else str(folder)
        arguments = TrainerArguments(
            output_dir=out, max_steps=steps, per_device_train_batch_size=batch, max_grad_norm=schedule.clip,
            learning_rate=schedule.rate, report_to=report.to, run_name=report.name, save_strategy="no",
            logging_strategy="no" if report.to == "none" else "steps", logging_steps=max(1, steps // _POINTS),
            disable_tqdm=True, logging_nan_inf_filter=False, use_cpu=device.type == "cpu",
        )  # fmt: skip
        trainer = indexed_trainer(model, problem, device, arguments, progress)
        if folder is not None:
            clear_logs(folder)
            log_to(trainer.callback_handler.callbacks, folder)
        trainer.optimizer, trainer.lr_scheduler = schedule.begin(parameters, steps, own_rates)
        # The Trainer has seeded everything; the training goes on from the state that its caller chose.
        torch.set_rng_state(state)
        try:
            trainer.train()
        except NotFiniteError:
            trainer.callback_handler.on_train_end(arguments, trainer.state, trainer.control)
        finally:
            _end_run(report.to)
        return float(trainer.last)


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the global state of ``random`` and NumPy, which the Trainer seeds."""
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)


def _end_run(library: str) -> None:
    """End a run that the Trainer's callback leaves open, so that the next training begins another."""
    module: Any = sys.modules.get(library) if library in _LEFT_OPEN else None
    if module is not None and module.run is not None:
        module.finish()

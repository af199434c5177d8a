"""One training with a method, a seed and a rate; its outcome is a result line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tnadapt import torch as tnt
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError, safe_repr

from ._saved_task import recorded
from .data import quiet
from .grid import Method
from .loop import OwnRates, Schedule, evaluate, fit, steps_of
from .problem import Problem, free

__all__ = [
    "RunReport",
    "Task",
    "Training",
    "checked_rates",
    "clear_logs",
    "log_folder",
    "log_to",
    "need_trainer",
    "train",
    "train_with_trainer",
    "usable_device",
]


# -- The folders of what trainings report to TensorBoard, which holds a curve for each ---------------------------------


# How TensorBoard's writers name their files; a reader joins all of those in one folder.
_EVENTS = "events.out.tfevents.*"


def log_folder(adapters: Path, file_name: str) -> Path:
    """Return the folder of a training's reports, next to that of the adapters.

    Examples
    --------
    >>> log_folder(Path("runs/reviews/adapters"), "lora-1.safetensors").as_posix()
    'runs/reviews/logs/lora-1'
    """
    return adapters.parent / "logs" / file_name.removesuffix(".safetensors")


def clear_logs(folder: Path) -> None:
    """Delete what an earlier training reported to a folder; files of others stay, and so do those that are in use."""
    for path in folder.rglob(_EVENTS):
        with contextlib.suppress(OSError):
            path.unlink()
    below = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*below, folder):
        with contextlib.suppress(OSError):
            path.rmdir()  # fails unless it is empty


def log_to(callbacks: Any, folder: Path) -> None:
    """Let the callback for TensorBoard write to a folder itself, unless the user's environment names another.

    By default the Trainer writes to a folder below it that has the time and this machine's name.
    """
    for callback in callbacks:
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(folder)


# -- Trainings on transformers' Trainer, for its callbacks: TensorBoard, W&B, trackio ----------------------------------

# It takes the same steps as :func:`tnadapt.finetune.loop.fit`, bit by bit: the same batches, dropout, optimizer, rates.


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


# -- One training with a method, a seed and a rate; its outcome is a result line ---------------------------------------


# Fields added later. They are left out of a study's settings while they have their defaults, so that the digest of
# results written before these fields existed still matches.
_LATER = ("optimiser", "shape", "steps", "head_rate")

# Words for devices, and what torch calls them.
_DEVICES = {name: name for name in ("cpu", "cuda", "mps", "xpu")} | {"gpu": "cuda", "nvidia": "cuda", "metal": "mps"}


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Training:
    """The settings of a training, the same for all methods.

    Attributes
    ----------
    epochs, batch : int
    targets : str or tuple of str
        As in :func:`tnadapt.torch.attach`.
    device : str
    warmup, weight_decay, clip, optimiser, shape
        See :class:`~tnadapt.finetune.loop.Schedule`.
    steps : int, optional
        Instead of epochs.
    head_rate : float, optional
        The rate of what is trained along with every adapter, such as a new head; by default that of the adapter.
    keep_references : bool
        Whether adapters of references, such as the dense update, are saved, too.
    report_to : str
        The integration of transformers' Trainer that trainings of the user's own models are reported to, such as
        ``tensorboard``; ``none`` for no reports.
    """

    epochs: int
    batch: int
    targets: str | tuple[str, ...] = "qv"
    device: str = "cpu"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    optimiser: str = "adamw"
    shape: str = "cosine"
    steps: int | None = None
    head_rate: float | None = None
    keep_references: bool = False
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.head_rate is not None:
            checked_rates([self.head_rate], "head_rate")
        self.schedule(1.0)  # refuses unknown words now rather than after a base model has been trained

    def schedule(self, rate: float) -> Schedule:
        """Return the schedule for one rate."""
        return Schedule(rate, self.warmup, self.weight_decay, self.clip, self.optimiser, self.shape)

    def settings(self) -> dict[str, Any]:
        """Return the settings that the outcome depends on; fields in ``_LATER`` only if not at their default."""
        found = dataclasses.asdict(self)
        del found["device"], found["keep_references"], found["report_to"]
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if name not in _LATER or value != usual[name]}

    @property
    def selection(self) -> str | list[str]:
        """The targets, as attach takes them."""
        return self.targets if isinstance(self.targets, str) else list(self.targets)


@dataclasses.dataclass(frozen=True)
class Task:
    """One training to be done."""

    method: Method
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """The key of its result line, unique within a study."""
        return hashlib.sha256(repr((self.settings(), self.seed, self.rate)).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.method.name}, rate {self.rate:g}, seed {self.seed}"

    def settings(self) -> dict[str, Any] | None:
        """Return the config with this seed as JSON values; None for the head alone."""
        if self.method.config is None:
            return None
        return self.method.config.replace(seed=self.seed).to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of a result line that describe the task."""
        return {
            "key": self.key,
            "family": self.method.family,
            "label": self.method.label,
            "config": self.settings(),
            "seed": self.seed,
            "rate": self.rate,
        }

    def file_name(self) -> str:
        """Return the file name of its adapter."""
        words = re.findall(r"[a-z0-9.]+", self.method.name.lower())
        return f"{'-'.join([*words, self.key])}.safetensors"


def checked_rates(rates: Sequence[float], what: str = "rates") -> None:
    """Raise an error unless all are valid learning rates.

    Raises
    ------
    TnadaptError
        If one is not a finite number above 0, or there is none.

    Examples
    --------
    >>> checked_rates([0.1, -1.0])
    Traceback (most recent call last):
    tnadapt.errors.TnadaptError: rates: a learning rate must be a finite number above 0; got -1.0
    """
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise TnadaptError(f"{what}: a learning rate must be a finite number above 0; got {rate}")
    if not len(rates):
        raise TnadaptError("rates: there is no learning rate; give at least one")


@checks_arguments
def usable_device(name: str | None) -> str:
    """Return a device's name if it is usable; for None, CUDA if available, else the CPU.

    Raises
    ------
    TnadaptError
        If the device is not available.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:  # its message lists all that any build of torch could have
        kind, _, number = name.lower().partition(":")
        near = difflib.get_close_matches(kind, _DEVICES, 1, 0.75)
        meant = _DEVICES[near[0]] + f":{number}" * number.isdecimal() if near else ""
        hint = f"did you mean {meant!r}? " if meant else ""
        raise TnadaptError(f"no device {safe_repr(name)}; {hint}give cpu, cuda, cuda:0, mps, …") from None
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises several kinds of errors
        raise TnadaptError(f"no device {safe_repr(name)} here: {str(error).splitlines()[0][:200]}") from None
    return name


def train(
    problem: Problem,
    task: Task,
    training: Training,
    adapters: Path | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Adapt a fresh copy of the base and measure it.

    Parameters
    ----------
    problem : Problem
    task : Task
    training : Training
    adapters : Path, optional
        A folder to save the adapter in (references are not saved unless ``training.keep_references``).
    progress : callable
        Called with the fraction of steps done.

    Returns
    -------
    dict
        A result line of JSON values. ``test`` is measured once, after the last step; nothing is chosen by it.
    """
    began = time.perf_counter()
    device = torch.device(training.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model = problem.build(task.seed).to(device)
        torch.manual_seed(task.seed)
        adapter = None
        if task.method.config is None:
            free(model, problem.keep_trainable)
        else:
            config = task.method.config.replace(seed=task.seed)
            try:
                adapter = tnt.attach(model, config, training.selection, keep_trainable=problem.keep_trainable)
            except MemoryError:
                raise TnadaptError(f"there is not enough memory for the parameters of {task.method.name}") from None
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # With a frozen head and no adapter, there is nothing to train.
        trained = {id(parameter) for parameter in (() if adapter is None else adapter.parameters())}
        head = OwnRates([one for one in parameters if id(one) not in trained], training.head_rate)
        value = _fitted(problem, model, parameters, head, task, training, adapters, progress) if parameters else 0.0
    own = 0 if adapter is None else adapter.num_parameters
    measured = _measured(problem, model, device, training.batch)
    diverged = not math.isfinite(value) or None in measured.values()
    record: dict[str, Any] = {
        **task.to_dict(),
        "epochs": training.epochs,
        "parameters": own,
        "kept": sum(parameter.numel() for parameter in parameters) - own,
        "diverged": diverged,
        "training_loss": _finite(value),
        **measured,
    }
    if problem.task.settings():
        record["metric"], record["percent"] = problem.task.metric.name, problem.task.metric.percent
    record["seconds"] = round(time.perf_counter() - began, 2)
    kept = training.keep_references or not task.method.reference
    if adapter is not None and adapters is not None and kept and not diverged:
        adapters.mkdir(parents=True, exist_ok=True)
        if (about := adapter.pretrained) is not None:
            adapter.pretrained = recorded(about, problem)
        adapter.save(adapters / task.file_name())
        record["adapter"] = task.file_name()
    return record


def _fitted(
    problem: Problem,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    head: OwnRates,
    task: Task,
    training: Training,
    adapters: Path | None,
    progress: Callable[[float], None],
) -> float:
    """Train, and return the last loss."""
    how = (
        training.schedule(task.rate),
        training.epochs,
        training.batch,
        torch.device(training.device),
        training.steps,
        head,
    )
    if problem.trainer:
        name = task.file_name().removesuffix(".safetensors")
        folder = None if adapters is None else log_folder(adapters, task.file_name())
        report = RunReport(training.report_to, name, folder)
        return train_with_trainer(model, problem, parameters, *how, report, progress)
    value = math.nan
    for done, steps, loss in fit(model, problem.logits, problem.task, problem.parts["training"], parameters, *how):
        value = loss
        progress(done / steps)
    return value


def _measured(problem: Problem, model: nn.Module, device: torch.device, batch: int) -> dict[str, Any]:
    """Measure scores, losses and other metrics; numbers that are not finite are None."""
    found: dict[str, Any] = {}
    for name in ("validation", "test"):
        part = problem.parts[name]
        rows = evaluate(model, problem.logits, problem.task, part, device, batch)
        measured = problem.task.measure(rows, part.labels)
        found[name] = _finite(measured.score)
        found[f"{name}_loss"] = _finite(measured.loss)
        if measured.more:
            found[f"{name}_metrics"] = {metric: _finite(value) for metric, value in measured.more.items()}
    found["predictions"] = problem.task.digest(rows)
    return found


def _finite(value: float) -> float | None:
    # JSON has no NaN.
    return round(value, 6) if math.isfinite(value) else None

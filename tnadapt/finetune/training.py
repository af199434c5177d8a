"""Trainings, each with a method, a seed and a rate: their settings, their result lines, and their reports."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnadapt import torch as tnt
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError, TnadaptError, safe_repr
from tnadapt.report import quiet

from ._saved_task import recorded
from ._specification import Part
from .grid import Task
from .loop import BETA1, OwnRates, Schedule, TrainingStep, evaluate, fit, order_of, steps_of
from .problem import Problem, free
from .together import Trainee, fit_each, share_base

# -- Settings, and one training ----------------------------------------------------------------------------------------


# Fields added later, with the values that earlier results had. A study's settings leave these values out, so that the
# digest of results written before these fields existed still matches.
_BEFORE = {
    "optimiser": "adamw", "shape": "cosine", "steps": None, "head_rate": None, "beta2": 0.999, "head_factor": None,
}  # fmt: skip


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
    warmup, weight_decay, clip, optimiser, shape, beta2
        See :class:`~tnadapt.finetune.loop.Schedule`.
    steps : int, optional
        Instead of epochs.
    head_rate : float, optional
        The rate of what is trained along with every adapter, such as a new head; by default ``head_factor`` times that
        of the adapter.
    head_factor : float, optional
        By default 1; of a :class:`~tnadapt.finetune.Study` with AdamW, 1e-2 over the rate that suits the base
        (:func:`tnadapt.learning_rate`), because the size of the base's weights says nothing about a head.
    keep_references : bool
        Whether adapters of references, such as the dense update, are saved, too.
    report_to : str
        The integration of transformers that trainings are reported to, such as ``tensorboard``; ``none`` for no
        reports.
    least_steps : int
        Where so many epochs are fewer steps, a :class:`~tnadapt.finetune.Study` takes more epochs.
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
    least_steps: int = 0
    beta2: float = BETA1
    head_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", *(["steps"] if self.steps is not None else [])):
            integer(name, getattr(self, name), 1, sys.maxsize, ConfigError)
        for name in ("head_rate", "head_factor"):
            if getattr(self, name) is not None:
                checked_rates([getattr(self, name)], name)
        self.schedule(1.0)  # rejects unknown words now, not after a base model has been trained

    def schedule(self, rate: float) -> Schedule:
        """Return the schedule for one rate."""
        return Schedule(rate, self.warmup, self.weight_decay, self.clip, self.optimiser, self.shape, self.beta2)

    def settings(self) -> dict[str, Any]:
        """Return the settings that the outcome depends on, without those at their values of ``_BEFORE``."""
        settings = dataclasses.asdict(self)
        for name in ("device", "keep_references", "report_to", "least_steps"):
            del settings[name]
        if settings["head_factor"] == 1.0:
            settings["head_factor"] = None
        return {name: value for name, value in settings.items() if name not in _BEFORE or value != _BEFORE[name]}

    def rate_of_head(self, rate: float) -> float | None:
        """Return the rate of what is trained along with an adapter; None if it is that of the adapter."""
        if self.head_rate is not None or self.head_factor in (None, 1.0):
            return self.head_rate
        return self.head_factor * rate

    @property
    def selection(self) -> str | list[str]:
        """The targets, as attach takes them."""
        return self.targets if isinstance(self.targets, str) else list(self.targets)


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
    except RuntimeError:  # its message lists the devices of all builds of torch
        raise TnadaptError(f"no device {safe_repr(name)}; give cpu, cuda, cuda:0, mps, …") from None
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
    """Run a single training by :func:`train_together`, and return its result line."""
    (record,) = train_together(problem, [task], training, adapters, progress)
    return record


def train_together(
    problem: Problem,
    tasks: Sequence[Task],
    training: Training,
    adapters: Path | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Adapt a fresh copy of the base for each task and measure it; all tasks have one method, but for the seed.

    Parameters
    ----------
    problem : Problem
    tasks : sequence of Task
        Trained as members of one run where :func:`~tnadapt.finetune.together.fit_each` allows it.
    training : Training
    adapters : Path, optional
        A folder to save the adapters in (references are not saved unless ``training.keep_references``).
    progress : callable
        Called with the fraction of steps done.

    Returns
    -------
    list of dict
        Result lines of JSON values. ``test`` is measured once, after the last step; nothing is chosen by it. The
        seconds of common steps are shared equally.
    """
    began = time.perf_counter()
    device = torch.device(training.device)
    devices = [device] if device.type == "cuda" else []
    part, records = problem.parts["training"], []
    with torch.random.fork_rng(devices=devices):
        trainees: list[Trainee] = []
        for task in tasks:
            trainees.append(_adapted(problem, task, training, device))
            share_base(trainees[0].model, trainees[-1].model)
        # With a frozen head and no adapter, there is nothing to train.
        losses, done = [math.nan if trainee.parameters else 0.0 for trainee in trainees], [0.0] * len(tasks)
        with contextlib.ExitStack() as stack:
            reports = [
                stack.enter_context(_reported(trainee.model, task, training, part, adapters))
                for task, trainee in zip(tasks, trainees, strict=True)
                if trainee.parameters
            ]
            for place, step in fit_each(problem, trainees, training.epochs, training.batch, device, training.steps):
                losses[place], done[place] = step.loss, step.done / step.total
                reports[place](step)
                progress(sum(done) / len(done))
    share = (time.perf_counter() - began) / len(tasks)
    for task, trainee, loss in zip(tasks, trainees, losses, strict=True):
        began = time.perf_counter() - share
        adapter, kept = trainee.adapter, training.keep_references or not task.method.reference
        num_parameters = 0 if adapter is None else adapter.num_parameters
        measured = _measured(problem, trainee.model, device, training.batch)
        diverged = not math.isfinite(loss) or None in measured.values()
        record: dict[str, Any] = {
            **task.to_dict(),
            "epochs": training.epochs,
            "parameters": num_parameters,
            "kept": sum(parameter.numel() for parameter in trainee.parameters) - num_parameters,
            "diverged": diverged,
            "training_loss": _finite(loss),
            **measured,
        }
        if problem.task.settings():
            record["metric"], record["percent"] = problem.task.metric.name, problem.task.metric.percent
        record["seconds"] = round(time.perf_counter() - began, 2)
        if adapter is not None and adapters is not None and kept and not diverged:
            adapters.mkdir(parents=True, exist_ok=True)
            if (about := adapter.pretrained) is not None:
                adapter.pretrained = recorded(about, problem)
            adapter.save(adapters / task.file_name())
            record["adapter"] = task.file_name()
        records.append(record)
    return records


def seconds_of(problem: Problem, task: Task, training: Training) -> float:
    """Estimate the seconds of a training, from the time of its second step and of the evaluation of one batch.

    Parameters
    ----------
    problem : Problem
    task : Task
    training : Training

    Returns
    -------
    float
        To build the model, take all steps, and evaluate it. Nothing is saved, and global generators stay as they are.

    Raises
    ------
    TnadaptError
        If the method does not fit the model.
    """
    device, part = torch.device(training.device), problem.parts["training"]
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainee = _adapted(problem, task, training, device)
        torch.manual_seed(task.seed)
        built, step = time.perf_counter() - began, 0.0
        if trainee.parameters:
            began = time.perf_counter()
            for _ in fit(
                trainee.model, problem.logits, problem.task, part, trainee.parameters, trainee.schedule,
                training.epochs, training.batch, device, 2, trainee.head,
            ):  # fmt: skip
                step, began = time.perf_counter() - began, time.perf_counter()
        some = part.batch(next(order_of(part, training.batch)), device)
        trainee.model.eval()
        began = time.perf_counter()
        with torch.no_grad():
            problem.logits(trainee.model, some).sum().item()
    batches = sum(len(problem.parts[name].labels) for name in ("validation", "test")) / training.batch
    steps = steps_of(part, training.epochs, training.batch, training.steps)
    return built + steps * step + batches * (time.perf_counter() - began)


def _adapted(problem: Problem, task: Task, training: Training, device: torch.device) -> Trainee:
    """Return a copy of the base with the adapter of a task, or with a head alone."""
    model, adapter = problem.build(task.seed).to(device), None
    if task.method.config is None:
        free(model, problem.keep_trainable)
    else:
        config = task.method.config.replace(seed=task.seed)
        try:
            adapter = tnt.attach(model, config, training.selection, keep_trainable=problem.keep_trainable)
        except MemoryError:
            raise TnadaptError(f"there is not enough memory for the parameters of {task.method.name}") from None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {id(parameter) for parameter in (() if adapter is None else adapter.parameters())}
    head = OwnRates(
        [parameter for parameter in parameters if id(parameter) not in own], training.rate_of_head(task.rate)
    )
    return Trainee(model, adapter, parameters, head, training.schedule(task.rate), task.seed)


def _measured(problem: Problem, model: nn.Module, device: torch.device, batch: int) -> dict[str, Any]:
    """Measure scores, losses and other metrics, with None for numbers that are not finite."""
    record: dict[str, Any] = {}
    for name in ("validation", "test"):
        part = problem.parts[name]
        rows = evaluate(model, problem.logits, problem.task, part, device, batch)
        measured = problem.task.measure(rows, part.labels)
        record[name] = _finite(measured.score)
        record[f"{name}_loss"] = _finite(measured.loss)
        if measured.more:
            record[f"{name}_metrics"] = {metric: _finite(value) for metric, value in measured.more.items()}
    record["predictions"] = problem.task.digest(rows)
    return record


def _finite(value: float) -> float | None:
    # JSON has no NaN.
    return round(value, 6) if math.isfinite(value) else None


# -- Reports to TensorBoard, W&B or trackio, through transformers' callbacks -------------------------------------------


# Points in the curve of a training.
_POINTS = 50

# How TensorBoard's writers name their files; a reader merges all of them in one folder.
_EVENTS = "events.out.tfevents.*"

# Libraries whose runs the callback leaves open; trackio's callback ends them itself.
_LEFT_OPEN = ("wandb",)


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


@contextlib.contextmanager
def _reported(
    model: nn.Module, task: Task, training: Training, part: Part, adapters: Path | None
) -> Iterator[Callable[[TrainingStep], None]]:
    """Yield a function that reports a step, each point of the curve having the mean loss since the last one."""
    if training.report_to == "none":
        yield lambda step: None
        return
    if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("transformers") is None:
        raise TnadaptError(
            f"reports to {training.report_to} need transformers and accelerate: pip install 'tnadapt[hub]'"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet("transformers", "accelerate"))
        import transformers
        from transformers.integrations import get_reporting_integration_callbacks

        steps = steps_of(part, training.epochs, training.batch, training.steps)
        every = max(1, steps // _POINTS)
        if adapters is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = log_folder(adapters, task.file_name())
            clear_logs(folder)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=training.batch,
            max_grad_norm=training.clip, learning_rate=task.rate, adam_beta2=training.beta2,
            report_to=training.report_to, run_name=task.file_name().removesuffix(".safetensors"), save_strategy="no",
            logging_steps=every, disable_tqdm=True, use_cpu=torch.device(training.device).type == "cpu",
        )  # fmt: skip
        state, control = transformers.TrainerState(max_steps=steps, logging_steps=every), transformers.TrainerControl()
        callbacks = [callback() for callback in get_reporting_integration_callbacks(training.report_to)]
        losses: list[float] = []

        def call(event: str, **values: Any) -> None:
            for callback in callbacks:
                getattr(callback, event)(arguments, state, control, model=model, **values)

        def report(step: TrainingStep) -> None:
            state.global_step, state.epoch = step.done, step.done / steps_of(part, 1, training.batch)
            losses.append(step.loss)
            if step.gradient_norm is not None and step.done % every == 0:
                logs = {"loss": sum(losses) / len(losses), "grad_norm": float(step.gradient_norm)}
                call("on_log", logs={**logs, "learning_rate": step.rate, "epoch": state.epoch})
                losses.clear()

        for callback in callbacks:
            # TensorBoard's would write to a subfolder named by the time and the host.
            if getattr(callback, "logging_dir", "") is None:
                callback.logging_dir = str(folder)
        try:
            call("on_train_begin")
            yield report
            call("on_train_end")
        finally:
            library: Any = sys.modules.get(training.report_to) if training.report_to in _LEFT_OPEN else None
            if library is not None and library.run is not None:
                library.finish()

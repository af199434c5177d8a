"""Reports of trainings to TensorBoard, W&B and trackio, and what a training leaves alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tnadapt import torch as tnt
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Choice, Spec, Task, Training, open_problem
from tnadapt.finetune.loop import fit
from tnadapt.finetune.training import train

from . import tiny_models as tiny

(METHOD,) = Choice(presets=("superlora",), ranks=(1,)).methods([(16, 16)] * 4, 2)[1:]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trainer")
    return open_problem(Spec(model=tiny.bert(folder / "bert"), data=tiny.tags(folder / "tags.jsonl")))


@pytest.fixture
def report_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type], None]:
    """Return a function that makes a class the callback of a library, which need not be installed."""
    integrations = importlib.import_module("transformers.integrations.integration_utils")
    return lambda name, callback: monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, name, callback)


@pytest.fixture
def curves(report_by: Callable[[str, type], None]) -> list[Any]:
    """What is reported to TensorBoard: an entry for each event."""
    events: list[Any] = []

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            events.append(("begin", args.output_dir, args.run_name))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **more: Any) -> None:
            events.append((state.global_step, logs))

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            events.append("end")

    report_by("tensorboard", Callback)
    return events


def test_a_loss_that_is_not_finite_ends_the_training_and_its_curve(
    problem: Any, tmp_path: Path, curves: list[Any]
) -> None:
    training = Training(2, 8, report_to="tensorboard")
    record = train(problem, Task(METHOD, 1, 1e30), training, tmp_path / "adapters")
    assert record["diverged"]
    assert record["training_loss"] is None
    assert not list(tmp_path.rglob("*.safetensors"))
    assert [step for step, _ in curves[1:-1]] == [1]
    assert curves[-1] == "end"


@pytest.mark.law("no-global-random-state")
def test_it_leaves_global_random_states_and_threads_alone(problem: Any) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], torch.get_num_threads()
    fractions: list[float] = []
    train(problem, Task(METHOD, 0, 0.01), Training(1, 8), progress=fractions.append)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])
    assert torch.get_num_threads() == before[3]
    assert fractions == [1 / 3, 2 / 3, 1.0]


def test_reports_change_no_result_and_are_those_of_the_steps(problem: Any, tmp_path: Path, curves: list[Any]) -> None:
    task = Task(METHOD, 0, 0.01)
    plain = Training(20, 4, warmup=0.3, clip=0.1)
    reported = dataclasses.replace(plain, report_to="tensorboard")
    assert reported.settings() == plain.settings()
    records, files = [], []
    for training in (plain, reported):
        folder = tmp_path / training.report_to / "adapters"
        record = train(problem, task, training, folder)
        del record["seconds"]
        records.append(record)
        files.append((folder / record["adapter"]).read_bytes())
    assert records[0] == records[1]
    assert files[0] == files[1]

    name = task.file_name().removesuffix(".safetensors")
    assert curves[0] == ("begin", str(tmp_path / "tensorboard" / "logs" / name), name)
    assert curves[-1] == "end"
    steps, logs = zip(*curves[1:-1], strict=True)
    total = 20 * math.ceil(len(problem.parts["training"].labels) / 4)
    every = total // 50
    assert every > 1
    assert steps == tuple(range(every, total + 1, every))
    schedule = plain.schedule(0.01)
    for step, log in zip(steps, logs, strict=True):
        assert log["learning_rate"] == pytest.approx(0.01 * schedule.factor(step - 1, total))
        assert log["epoch"] == pytest.approx(20 * step / total)
        assert log["grad_norm"] > 0
    # A point has the mean of the losses since the last one.
    with torch.random.fork_rng():
        model = problem.build(0)
        torch.manual_seed(0)
        adapter = tnt.attach(model, METHOD.config.replace(seed=0), "qv", keep_trainable=problem.keep_trainable)
        parameters = [one for one in model.parameters() if one.requires_grad]
        part, cpu = problem.parts["training"], torch.device("cpu")
        found = list(fit(model, problem.logits, problem.task, part, parameters, schedule, 20, 4, cpu))
    assert adapter.num_parameters == records[0]["parameters"]
    losses = np.array([step.loss for step in found])[: len(steps) * every].reshape(-1, every)
    np.testing.assert_allclose([log["loss"] for log in logs], losses.mean(1))


def test_a_training_that_is_repeated_replaces_its_curve(
    problem: Any, tmp_path: Path, report_by: Callable[[str, type], None]
) -> None:
    # TensorBoard is not needed: this is what the Trainer's callback for it does.
    folders: list[Path] = []

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        logging_dir: str | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            folders.append(Path(self.logging_dir or f"{args.output_dir}/runs/time_host"))
            folders[-1].mkdir(parents=True, exist_ok=True)
            (folders[-1] / f"events.out.tfevents.{len(folders)}").touch()

    report_by("tensorboard", Callback)
    tasks, logs = [Task(METHOD, seed, 0.01) for seed in (0, 1, 0)], tmp_path / "logs"
    for name in ("runs/day_host/events.out.tfevents.0", "notes.txt"):
        path = logs / tasks[0].file_name().removesuffix(".safetensors") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for task in tasks:
        train(problem, task, Training(1, 40, report_to="tensorboard"), tmp_path / "adapters")
    assert folders == [logs / task.file_name().removesuffix(".safetensors") for task in tasks]
    events = {folders[place - 1] / f"events.out.tfevents.{place}" for place in (2, 3)}
    assert {path for path in logs.rglob("events*") if path.is_file()} == events
    assert {path.name for path in folders[0].iterdir()} == {"events.out.tfevents.3", "notes.txt"}
    # The folder that the user's environment names is kept.
    Callback.logging_dir = str(tmp_path / "own")
    train(problem, tasks[0], Training(1, 40, report_to="tensorboard"), tmp_path / "adapters")
    assert folders[-1] == tmp_path / "own"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run", "ends"), [("wandb", "open", 1), ("wandb", None, 0), ("trackio", "open", 0)])
def test_a_run_that_is_left_open_is_ended(
    name: str, run: str | None, ends: int, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    report_by: Callable[[str, type], None],
) -> None:  # fmt: skip
    ended: list[str] = []
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(run=run, finish=lambda: ended.append(name)))
    report_by(name, transformers.TrainerCallback)
    train(problem, Task(METHOD, 0, 0.01), Training(1, 40, report_to=name), tmp_path / "adapters")
    assert len(ended) == ends


def test_reports_without_accelerate_say_what_to_install(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "accelerate" else find(name))
    message = r"reports to wandb need transformers and accelerate: pip install 'tnadapt\[hub\]'"
    with pytest.raises(TnadaptError, match=message):
        train(problem, Task(METHOD, 0, 0.01), Training(1, 8, report_to="wandb"))

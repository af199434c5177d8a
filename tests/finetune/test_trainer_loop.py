"""Trainings on transformers' Trainer take the same steps as the plain loop, bit by bit."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tnadapt.errors import TnadaptError
from tnadapt.finetune import Choice, Spec, Task, Training, open_problem
from tnadapt.finetune.training import clear_logs, train

from . import tiny_models as tiny

(METHOD,) = Choice(presets=("superlora",), ranks=(1,)).methods([(16, 16)] * 4, 2)[1:]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trainer")
    return open_problem(Spec(model=tiny.bert(folder / "bert"), data=tiny.tags(folder / "tags.jsonl")))


def both(problem: Any, training: Training, rate: float, folder: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    records, files = [], []
    for trainer in (True, False):
        out = folder / str(trainer)
        record = train(dataclasses.replace(problem, trainer=trainer), Task(METHOD, 1, rate), training, out)
        del record["seconds"]
        records.append(record)
        files += [path.read_bytes() for path in out.glob("*.safetensors")]
    return records, files


@pytest.mark.parametrize(
    "training",
    [
        Training(2, 7, warmup=0.3, weight_decay=0.01, clip=0.1),
        pytest.param(Training(1, 8, optimiser="sgd", shape="onecycle", steps=4), marks=pytest.mark.slow),
    ],
    ids=["epochs", "steps"],
)
def test_the_same_steps_as_the_plain_loop(problem: Any, tmp_path: Path, training: Training) -> None:
    (one, other), files = both(problem, training, 0.02, tmp_path)
    assert one == other
    assert not one["diverged"]
    assert len(files) == 2
    assert files[0] == files[1]


def test_a_loss_that_is_not_finite_ends_both(problem: Any, tmp_path: Path) -> None:
    (one, other), files = both(problem, Training(2, 8), 1e30, tmp_path)
    assert one == other
    assert one["diverged"]
    assert one["training_loss"] is None
    assert not files


@pytest.mark.law("no-global-random-state")
def test_it_leaves_global_random_states_alone(problem: Any) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    fractions: list[float] = []
    train(problem, Task(METHOD, 0, 0.01), Training(1, 8), progress=fractions.append)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])
    assert fractions == [1 / 3, 2 / 3, 1.0]


def test_reports_go_to_a_folder_of_the_run(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    seen: list[tuple[str, str, str | None]] = []

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **more: Any) -> None:
            seen.extend((args.output_dir, args.run_name, key) for key in logs)

    integrations = importlib.import_module("transformers.integrations.integration_utils")
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "tensorboard", Callback)
    task = Task(METHOD, 0, 0.01)
    train(problem, task, Training(1, 8, report_to="tensorboard"), tmp_path / "adapters")
    name = task.file_name().removesuffix(".safetensors")
    assert {one[:2] for one in seen} == {(str(tmp_path / "logs" / name), name)}
    assert {"loss", "learning_rate", "grad_norm"} <= {one[2] for one in seen}


def test_a_training_that_is_repeated_replaces_its_curve(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    # TensorBoard is not needed: this is what the Trainer's callback for it does.
    found: list[str] = []

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        logging_dir: str | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            folder = Path(self.logging_dir or f"{args.output_dir}/runs/time_host")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"events.out.tfevents.{len(found)}").touch()
            found.append(str(folder))

    integrations = importlib.import_module("transformers.integrations.integration_utils")
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "tensorboard", Callback)
    task, other = Task(METHOD, 0, 0.01), Task(METHOD, 1, 0.01)
    for one in (task, other, task):
        train(problem, one, Training(1, 40, report_to="tensorboard"), tmp_path / "adapters")
    logs = tmp_path / "logs"
    folders = [logs / one.file_name().removesuffix(".safetensors") for one in (task, other, task)]
    assert found == list(map(str, folders))
    assert sorted(path.relative_to(logs) for path in logs.rglob("events*")) == sorted(
        folders[place].relative_to(logs) / f"events.out.tfevents.{place}" for place in (1, 2)
    )
    # The folder that the user's environment names is kept.
    monkeypatch.setattr(Callback, "logging_dir", str(tmp_path / "own"))
    train(problem, task, Training(1, 40, report_to="tensorboard"), tmp_path / "adapters")
    assert found[-1] == str(tmp_path / "own")


def test_only_what_was_reported_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "run"
    for name in ("events.out.tfevents.1.host", "runs/day_host/events.out.tfevents.2", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    clear_logs(folder)
    assert [path.name for path in folder.rglob("*")] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    clear_logs(folder)
    assert not folder.exists()
    clear_logs(folder)  # nothing to do


@pytest.mark.slow
def test_a_run_that_is_left_open_is_ended(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    integrations = importlib.import_module("transformers.integrations.integration_utils")
    for name, run in (("wandb", "open"), ("wandb", None), ("trackio", "open")):
        library = types.SimpleNamespace(run=run, finish=lambda name=name: ended.append(name))
        monkeypatch.setitem(sys.modules, name, library)
        monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, name, transformers_callback())
        train(problem, Task(METHOD, 0, 0.01), Training(1, 40, report_to=name), tmp_path / "adapters")
    assert ended == ["wandb"]


def transformers_callback() -> Any:
    return importlib.import_module("transformers").TrainerCallback


def test_reports_change_no_result(problem: Any) -> None:
    assert Training(1, 8, report_to="wandb").settings() == Training(1, 8).settings()


def test_without_accelerate_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "accelerate" else find(name))
    with pytest.raises(TnadaptError, match=r"needs accelerate: pip install 'tnadapt\[hub\]'"):
        open_problem(Spec(model="any", data=tiny.tags(tmp_path / "tags.jsonl")))

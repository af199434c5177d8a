"""A study: its methods, end to end, resumed and in parallel; its loop; and what a training reports and leaves alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import random
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.errors import TnadaptError

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from tnadapt import torch as tnt
from tnadapt.errors import ConfigError, FileError, TargetError
from tnadapt.finetune import Choice, Reporter, Spec, Study, Task, Training, default_methods, grid, open_problem, within
from tnadapt.finetune.grid import DENSE, HEAD, methods_of
from tnadapt.finetune.loop import OwnRates, Schedule, batches, fit
from tnadapt.finetune.problem import base_digest
from tnadapt.finetune.training import seconds_of, train, usable_device
from tnadapt.planning.families import usual

from . import tiny_models as tiny
from .internals import points_in, study_job
from .tiny_models import CHOICE, TRAINING, spec, study


class Counting(Reporter):
    def __init__(self) -> None:
        self.begun: tuple[int, int] | None = None
        self.seconds: float | None = None
        self.done: list[str] = []

    def begins(self, tasks: int, finished: int) -> None:
        self.begun = (tasks, finished)

    def estimated(self, seconds: float) -> None:
        assert not self.done  # before the first training
        self.seconds = seconds

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        self.done.append(task.key)


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    return out, study(cache).run(out, jobs=1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in found if "key" in line]


def numbers(out: Path) -> dict[str, Any]:
    return {one["key"]: {name: value for name, value in one.items() if name != "seconds"} for one in lines(out)}


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[str]:
    """Replace the timing of trainings; return the families that were timed."""
    families: list[str] = []

    def seconds_of(problem: Any, task: Task, training: Training) -> float:
        families.append(task.method.family)
        return seconds[task.method.family]

    monkeypatch.setattr(study_job, "seconds_of", seconds_of)
    return families


def test_the_time_is_estimated_before_the_first_training(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = timed(monkeypatch, {HEAD: 1.0, "LoRA": 10.0, "SuperLoRA": 100.0})
    counting = Counting()
    # Two rates with the first seed, the better one with the second.
    Study(spec(cache), CHOICE, TRAINING, (0.01, 0.03), 2, counting, 1).run(tmp_path, jobs=1)
    assert families == [HEAD, "LoRA", "SuperLoRA"]
    assert counting.seconds == 3 * 111.0
    again = Counting()
    Study(spec(cache), CHOICE, TRAINING, (0.01, 0.03), 2, again, 1).run(tmp_path, jobs=1)
    assert again.seconds is None  # nothing is left
    more = Counting()
    Study(spec(cache), CHOICE, TRAINING, (0.01, 0.03, 0.1), 1, more).run(tmp_path, jobs=2)
    assert more.seconds == 111.0 / 2  # what is left is shared by two processes


def test_few_samples_are_passed_over_until_there_are_enough_steps(cache: Path) -> None:
    for least, epochs in ((0, 1), (7, 1), (8, 2), (200, 29)):  # 448 samples in batches of 64
        few = Study(spec(cache), CHOICE, dataclasses.replace(TRAINING, least_steps=least), (0.01,))
        # Results are those of a study that names the epochs.
        named = Study(spec(cache), CHOICE, dataclasses.replace(TRAINING, epochs=epochs), (0.01,))
        assert (few.outline(), few.steps) == (named.outline(), 7 * epochs)


def test_slow_methods_are_not_timed_one_by_one(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families = timed(monkeypatch, {HEAD: 2.0, "LoRA": 4.0, "SuperLoRA": 100.0})
    monkeypatch.setattr(study_job, "_TIMING", -1.0)
    monkeypatch.setattr(study_job, "_TIMING_SHARE", 0.0)
    counting = Counting()
    Study(spec(cache), CHOICE, TRAINING, (0.01,), 1, counting).run(tmp_path, jobs=1)
    assert families == [HEAD]
    assert counting.seconds == 3 * 2.0


def test_a_method_that_cannot_be_timed_costs_the_estimate_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, {})
    counting = Counting()
    outcome = Study(spec(cache), CHOICE, TRAINING, (0.01,), 1, counting).run(tmp_path, jobs=1)
    assert (counting.seconds, outcome.trained) == (None, 3)


def test_two_steps_and_a_batch_tell_how_long_a_training_takes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that advances by 1 s in a step and .25 s in a batch of the evaluation.
    problem = open_problem(spec(cache))
    state = torch.get_rng_state()
    task = Task(study(cache).methods[1], 0, 0.01)
    clock = [0.0]
    logits = problem.logits

    def slow(model: Any, inputs: Any) -> Any:
        clock[0] += 1.0 if torch.is_grad_enabled() else 0.25
        return logits(model, inputs)

    problem = dataclasses.replace(problem, logits=slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert seconds_of(problem, task, TRAINING) == 7 * 1.0 + (179 + 269) / 64 * 0.25  # steps, and the evaluation
    assert torch.equal(torch.get_rng_state(), state)


def test_the_outcome(finished: tuple[Path, Any]) -> None:
    out, outcome = finished
    assert [point.method.name for point in outcome.points] == ["head alone", "LoRA r = 1", "SuperLoRA r = 1"]
    assert [point.parameters for point in outcome.points] == [0, 1024, 364]
    assert {point.kept for point in outcome.points} == {325}
    assert (outcome.trained, outcome.reused) == (6, 0)
    assert outcome.best.parameters
    assert outcome.proof.holds
    assert outcome.proof.samples == 269
    assert outcome.proof.largest < 1e-4
    assert outcome.picture == out / "pareto.png"
    assert outcome.picture.stat().st_size > 5000
    assert outcome.adapter == out / "best.safetensors"
    assert len(tna.load(outcome.adapter).targets) == 8
    records = lines(out)
    assert len(records) == 6
    for record in records:
        assert 0 <= record["validation"] <= 1
        assert record["seconds"] > 0
        assert record["epochs"] == 1
        assert ("adapter" in record) == (record["config"] is not None)
        if record["config"] is not None:
            assert tna.Config.from_dict(record["config"]).seed == record["seed"] == 0
            assert (out / "adapters" / record["adapter"]).is_file()
    assert {record["rate"] for record in records} == {0.01, 0.03}
    # The file of results gives the points again.
    assert [point.to_dict() for point in points_in(out / "results.jsonl")] == [p.to_dict() for p in outcome.points]


def test_the_finished_is_not_done_again_but_a_damaged_best_is_copied(finished: tuple[Path, Any], cache: Path) -> None:
    out, before = finished
    whole = (out / "best.safetensors").read_bytes()
    truncate(out / "best.safetensors")
    reporter = Counting()
    again = Study(spec(cache), CHOICE, TRAINING, (0.01, 0.03), reporter=reporter).run(out)
    assert (reporter.begun, reporter.done) == ((6, 6), [])
    assert (again.trained, again.reused) == (0, 6)
    assert (again.points, again.proof) == (before.points, before.proof)
    assert (out / "best.safetensors").read_bytes() == whole
    other = Study(spec(cache), CHOICE, dataclasses.replace(TRAINING, epochs=2), (0.01,))
    with pytest.raises(FileError, match="another study \\(epochs was 1, now 2\\)"):
        other.run(out)


def test_a_study_grows_by_rates_seeds_and_methods(finished: tuple[Path, Any], cache: Path, tmp_path: Path) -> None:
    out, _ = finished
    (tmp_path / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes())
    reporter = Counting()
    choice = Choice(presets=("lora",), ranks=(1, 2))
    outcome = Study(spec(cache), choice, TRAINING, (0.03,), 2, reporter).run(tmp_path, jobs=1)
    # Of head, r = 1 and r = 2 at one rate, seed 0 of the first two was there. The best one's file was not copied.
    assert reporter.begun == (6, 2)
    assert [len(point.test) for point in outcome.points] == [2, 2, 2]
    assert outcome.proof.holds
    first = {one["key"]: one["predictions"] for one in lines(out)}
    assert all(one["predictions"] == first.get(one["key"], one["predictions"]) for one in lines(tmp_path))


@pytest.mark.slow
def test_side_by_side_gives_the_same_numbers(finished: tuple[Path, Any], cache: Path, tmp_path: Path) -> None:
    out, _ = finished
    study(cache).run(tmp_path, jobs=2)
    assert numbers(tmp_path) == numbers(out)


def test_fresh_starts_anew_and_takes_away_its_own_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "precious.safetensors").write_text("")
    one = study(cache, Choice(presets=("lora",), ranks=(1,)), (0.03,))
    other = study(cache, Choice(presets=("superlora",), ranks=(1,)), (0.01,))
    one.run(tmp_path)
    other.run(tmp_path, fresh=True)
    assert [line["family"] for line in lines(tmp_path)] == ["head alone", "SuperLoRA"]
    assert (tmp_path / "kept.txt").read_text() == "mine"
    (own,) = [line["adapter"] for line in lines(tmp_path) if "adapter" in line]
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {own, "precious.safetensors"}


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("", False, "is a file and should be a folder; give another folder with --out"),
        ("adapters", False, "adapters is a file and should be a folder"),
        ("pareto.png", True, "pareto.png is a folder and should be a file"),
        ("best.safetensors", True, "best.safetensors is a folder and should be a file"),
    ],
)
def test_places_that_cannot_be_written(cache: Path, tmp_path: Path, name: str, folder: bool, message: str) -> None:
    out = tmp_path / "out"
    if name:
        out.mkdir()
    (out / name).mkdir() if folder else (out / name).write_text("")
    with pytest.raises(FileError, match=message):
        study(cache).run(out)
    with pytest.raises(FileError, match="File name too long"):
        study(cache).run(tmp_path / ("x" * 300))


def test_adapters_that_were_removed_or_damaged_are_trained_again(cache: Path, tmp_path: Path) -> None:
    reporter = Counting()
    one = Study(spec(cache), CHOICE, TRAINING, (0.03,), 1, reporter)
    before, records = one.run(tmp_path), numbers(tmp_path)
    for damage in (Path.unlink, truncate, lambda path: path.write_bytes(b"")):
        for path in (tmp_path / "best.safetensors", *(tmp_path / "adapters").iterdir()):
            damage(path)
        again = one.run(tmp_path)
        assert reporter.begun == (1, 0)
        assert again.proof == before.proof
        assert numbers(tmp_path) == records


def test_the_proof_notices_another_adapter(finished: tuple[Path, Any], cache: Path) -> None:
    out, outcome = finished
    problem, record = open_problem(spec(cache)), outcome.best.records[0]
    others = [line for line in lines(out) if line["config"] and line["predictions"] != record["predictions"]]
    assert study_job.prove(problem, record, out / "best.safetensors", TRAINING).holds
    assert not study_job.prove(problem, record, out / "adapters" / others[0]["adapter"], TRAINING).loaded_same


@pytest.mark.parametrize("rates", [(1e30,), (1e30, 0.03)])
def test_a_rate_that_explodes_is_a_line_and_no_adapter(cache: Path, tmp_path: Path, rates: tuple[float, ...]) -> None:
    # One step an epoch, one epoch: only the last step explodes, and the loss before it is sound.
    training = Training(1, 100_000) if len(rates) == 2 else TRAINING
    outcome = Study(spec(cache), Choice(presets=("lora",), ranks=(1,)), training, rates).run(tmp_path, jobs=1)
    (record,) = [line for line in lines(tmp_path) if line["config"] and line["rate"] == 1e30]
    assert record["diverged"]
    assert "adapter" not in record
    if len(rates) == 2:
        assert outcome.best.rate == 0.03
    else:
        assert record["training_loss"] is None
        assert (outcome.best, outcome.adapter) == (None, None)


def test_the_base_is_the_same_whatever_the_seed_and_the_head_is_not(cache: Path) -> None:
    problem = open_problem(spec(cache))
    one, other = problem.build(0), problem.build(1)
    assert base_digest(one, problem.drawn) == base_digest(other, problem.drawn)
    assert base_digest(one) != base_digest(other)
    assert base_digest(one) == base_digest(problem.build(0))


@pytest.mark.parametrize("keep", [("nothing",), ("head", "nothing")])
def test_a_name_to_keep_that_is_not_there(cache: Path, tmp_path: Path, keep: tuple[str, ...]) -> None:
    other = Study(dataclasses.replace(spec(cache), keep_trainable=keep), CHOICE, TRAINING, (0.01,))
    with pytest.raises(TargetError, match="--keep-trainable nothing: the model has no such"):
        other.run(tmp_path, jobs=1)


def test_another_part_to_keep(cache: Path, tmp_path: Path) -> None:
    one = Study(dataclasses.replace(spec(cache), keep_trainable=("head", "norm")), CHOICE, TRAINING, (0.01,))
    outcome = one.run(tmp_path, jobs=1)
    assert {point.kept for point in outcome.points} == {325 + 128}
    assert outcome.proof.holds


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "abacus"])
def test_a_device_that_is_not_here(name: str) -> None:
    assert usable_device("cpu") == "cpu"
    with pytest.raises(TnadaptError, match="no device 'cuda:99' here: "):
        usable_device("cuda:99")
    with pytest.raises(TnadaptError, match=f"^no device '{name}'; give cpu, cuda, cuda:0, mps, …$"):
        usable_device(name)


# -- The cache ---------------------------------------------------------------------------------


def test_the_pretrained_model_is_kept_and_made_anew_where_damaged(tmp_path: Path) -> None:
    def opened() -> tuple[str, bool]:
        """Return the digest of the base, and whether it was trained."""
        told: list[str] = []
        problem = open_problem(spec(tmp_path / "made" / "here"), lambda what, done: told.append(what))
        return base_digest(problem.build(0)), bool(told)

    digest, trained = opened()
    assert trained
    assert opened() == (digest, False)
    (file,) = (tmp_path / "made" / "here" / "digits").iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[:1000], whole[:200] + b"\xff" * 4096 + whole[4296:], b"\0" * 64):
        file.write_bytes(damage)
        assert opened() == (digest, True)
        assert file.read_bytes() == whole


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(FileError, match="give another folder with --cache"):
        open_problem(Spec(cache=tmp_path / "cache", pretrain_epochs=1)).build(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    # Another recipe is another file.
    for epochs in (1, 2):
        open_problem(Spec(pretrain_epochs=epochs)).build(0)
    assert len(list((tmp_path / "xdg" / "tnadapt" / "digits").iterdir())) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_problem(Spec(pretrain_epochs=1)).build(0)
    assert list((tmp_path / "home").rglob("tnadapt/digits/*"))


def test_a_training_of_no_steps_is_refused() -> None:
    for settings, message in (
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"steps": -1}, "steps must be at least 1; got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Training(**{"epochs": 1, "batch": 8, **settings})


def test_what_does_not_fit_is_refused_before_a_base_is_trained(tmp_path: Path) -> None:
    told: list[str] = []

    class Told(Reporter):
        def preparing(self, what: str, done: float) -> None:
            told.append(what)

    with pytest.raises(ConfigError, match="format must be one of"):
        Study(spec(tmp_path), Choice(changes={"format": "none"}), TRAINING, (0.01,), reporter=Told())
    projected = Choice(presets=("lora",), ranks=(1,), changes={"projection": "linear", "ratio": 0.1})
    with pytest.raises(
        TnadaptError, match=r"LoRA r = 1, projection = linear, ratio = 0\.1 does not fit the targets: fold="
    ):
        Study(spec(tmp_path), projected, TRAINING, (0.01,), reporter=Told())
    found = Study(spec(tmp_path), CHOICE, TRAINING, (0.01,), reporter=Told())
    assert found.parameters(found.methods[-1]) > 0
    assert not told
    assert not list(tmp_path.iterdir())
    found.settings()
    assert told


# -- The loop ----------------------------------------------------------------------------------


def test_the_schedule_rises_and_falls_to_nothing() -> None:
    schedule = Schedule(1.0, warmup=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1.0
    assert all(one > other for one, other in itertools.pairwise(factors[10:]))
    assert factors[-1] < 1e-3
    assert Schedule(1.0, warmup=0.0).factor(0, 1) == 1.0


@pytest.mark.parametrize("shape", ["cosine", "onecycle"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_rate_of_a_head(optimiser: str, shape: str) -> None:
    adapter, head = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    schedule = Schedule(0.1, optimiser=optimiser, shape=shape)
    for rates, expected in ((OwnRates([head], 0.4), 4.0), (OwnRates([head]), 1.0), (OwnRates(), 1.0)):
        stepper, scheduler = schedule.begin([adapter, head], 10, rates)
        group_of = {id(p): group for group in stepper.param_groups for p in group["params"]}
        assert group_of.keys() == {id(adapter), id(head)}
        for _ in range(4):
            assert group_of[id(head)]["lr"] / group_of[id(adapter)]["lr"] == pytest.approx(expected)
            stepper.step()
            scheduler.step()
    alone, _ = schedule.begin([head], 10, OwnRates([head], 0.4))
    assert len(alone.param_groups) == 1


@given(gradients=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), sign=st.sampled_from([-1.0, 1.0]))
def test_no_step_is_larger_than_the_rate(gradients: list[float], sign: float) -> None:
    """With equal betas |m| ≤ √v (Jensen): the weights of both means are the same."""
    assert max(moves(Schedule(0.1), [sign**number * g for number, g in enumerate(gradients)])) <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.999])
def test_the_largest_step_where_gradients_grow(beta2: float) -> None:
    """It is (1 - β₁) / √((1 - β₂) (1 - β₁² / β₂)) rates: 1, 1.17 and 7.27 (Cauchy-Schwarz)."""
    gradients = [1e-3] * 4000 + [1e-3 * (beta2 / 0.9) ** number for number in range(200)]
    largest = (1 - 0.9) / math.sqrt((1 - beta2) * (1 - 0.9**2 / beta2))
    assert max(moves(Schedule(1.0, beta2=beta2), gradients)) == pytest.approx(largest, rel=0.02)


def moves(schedule: Schedule, gradients: list[float]) -> list[float]:
    """Return how far one parameter moves in each step of a long training, without the schedule of rates."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimiser, _ = dataclasses.replace(schedule, warmup=0.0).begin([parameter], 10**6)
    path = [0.0]
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimiser.step()
        path.append(parameter.item())
    return [abs(b - a) for a, b in itertools.pairwise(path)]


@pytest.mark.parametrize("beta2", [1.0, -0.1, math.nan])
def test_a_second_beta_is_from_0_to_below_1(beta2: float) -> None:
    with pytest.raises(TnadaptError, match=rf"^beta2 must be from 0 to below 1; got {beta2}$"):
        Training(1, 16, beta2=beta2)


def test_the_default_rate_suits_the_base(cache: Path, tmp_path: Path) -> None:
    """A base of larger weights gets a higher rate, and the head beside the adapter does not."""
    pytest.importorskip("transformers")
    data, choice = tiny.classes(tmp_path / "films.jsonl"), Choice(presets=("lora",), ranks=(1,))
    spec = Spec(model=tiny.bert(tmp_path / "bert"), data=data)
    study = Study(spec, choice, Training(2, 8))
    adapter = tnt.attach(study.problem.build(0), tna.presets.lora(1))
    (rate,) = study.rates
    assert (
        rate
        == adapter.learning_rate()
        == tna.learning_rate(
            [
                module.weight
                for name, module in study.problem.build(0).named_modules()
                if name.endswith(("query", "value"))
            ]
        )
    )
    assert rate == 0.04
    # The same by hand, and with a rate of one's own: the head's is in proportion.
    by_hand = Study(spec, choice, Training(2, 8, head_rate=0.01), [rate])
    assert predictions(study, tmp_path / "default") == predictions(by_hand, tmp_path / "hand")
    given = Study(spec, choice, Training(2, 8), [0.008])
    assert predictions(given, tmp_path / "given") == predictions(
        Study(spec, choice, Training(2, 8, head_rate=0.002), [0.008]), tmp_path / "same"
    )
    alike = Study(spec, choice, Training(2, 8, head_factor=1.0), [0.008])
    before = {name: value for name, value in study.training.settings().items() if name != "head_factor"}
    assert alike.training.settings() == before != study.training.settings()
    assert alike.training.rate_of_head(0.008) is None
    # Further rates resume the study of the default one.
    more = Study(spec, choice, Training(2, 8), [rate, 3 * rate]).run(tmp_path / "default")
    assert (more.trained, more.reused) == (2, 2)


def predictions(study: Study, out: Path) -> list[str]:
    return [record["predictions"] for point in study.run(out).points for record in point.records]


def test_the_digits_have_the_rate_of_their_base(cache: Path) -> None:
    problem = open_problem(spec(cache))
    assert problem.rate == tnt.attach(problem.build(0), tna.presets.lora(1)).learning_rate()


@pytest.mark.parametrize(
    ("choice", "changes"),
    [(Choice(presets=("lora",), changes={"rate": "sgd"}), {}), (CHOICE, {"optimiser": "sgd"})],
    ids=["arrays", "optimizer"],
)
def test_only_adamw_in_units_has_a_default_rate(cache: Path, choice: Choice, changes: dict[str, Any]) -> None:
    training = dataclasses.replace(TRAINING, **changes)
    with pytest.raises(TnadaptError, match=r"^no learning rate was given .* is for AdamW and configs with rate='adam'"):
        Study(spec(cache), choice, training)
    assert Study(spec(cache), choice, training, [0.1]).rates == [0.1]


def test_a_base_without_a_size_needs_a_rate(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = Spec(model=tiny.bert(tmp_path / "bert"), data=tiny.classes(tmp_path / "films.jsonl"))
    model = transformers.BertModel.from_pretrained(spec.model)
    for layer in model.encoder.layer:
        layer.attention.self.query.weight.data.zero_()
        layer.attention.self.value.weight.data.zero_()
    model.save_pretrained(spec.model)
    with pytest.raises(TnadaptError, match=r"^no learning rate was given \(--lr, rates=\): .* these 4 are zero"):
        Study(spec, CHOICE, TRAINING)
    assert Study(spec, CHOICE, TRAINING, [0.01]).training.rate_of_head(0.01) is None


def test_a_loss_that_is_not_finite_ends_the_training_before_its_step(cache: Path) -> None:
    problem = open_problem(spec(cache))
    model = problem.build(0)
    before, part = base_digest(model), problem.parts["training"]
    logits = lambda model, x: problem.logits(model, x) * float("nan")  # noqa: E731
    training = (problem.task, part, list(model.parameters()), Schedule(0.1), 3, 64, torch.device("cpu"))
    assert len(list(fit(model, logits, *training))) == 1
    assert base_digest(model) == before


def test_texts_of_like_length_share_a_batch(cache: Path) -> None:

    part = open_problem(spec(cache)).parts["training"]
    part.lengths = torch.arange(len(part.labels)).flip(0)
    some = batches(part, 10)
    assert sorted(torch.cat(some).tolist()) == list(range(len(part.labels)))
    assert len(some) == -(-len(part.labels) // 10)
    spans = [int(part.lengths[batch].max() - part.lengths[batch].min()) for batch in some]
    assert sum(spans) / len(spans) < 60  # of 448, in random batches it would be above 350


# -- Reports to TensorBoard, W&B and trackio, which change nothing ---------------------------------

(METHOD,) = Choice(presets=("superlora",), ranks=(1,)).methods([(16, 16)] * 4, 2)[1:]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("trainer")
    return open_problem(Spec(model=tiny.bert(folder / "bert"), data=tiny.tags(folder / "tags.jsonl")))


@pytest.fixture
def report_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type], None]:
    """Return a function that makes a class the callback of a library, which need not be installed."""
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    return lambda name, callback: monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, name, callback)


@pytest.fixture
def curves(report_by: Callable[[str, type], None]) -> list[Any]:
    """What is reported to TensorBoard: an entry for each event."""
    transformers = pytest.importorskip("transformers")
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


def test_a_loss_that_is_not_finite_ends_training_and_curve(problem: Any, tmp_path: Path, curves: list[Any]) -> None:
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


def test_repeating_replaces_the_curve(problem: Any, tmp_path: Path, report_by: Callable[[str, type], None]) -> None:
    # TensorBoard is not needed: this is what the Trainer's callback for it does.
    transformers = pytest.importorskip("transformers")
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
    transformers = pytest.importorskip("transformers")
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


# -- The methods to compare: by name, by default, and by budget -------------------------------------

SMALL = [(64, 64)] * 8


@pytest.mark.parametrize("shapes", [SMALL, [(768, 768)] * 24, [(64, 64), (16, 64)] * 4, [(384, 384)] * 12])
@pytest.mark.parametrize("short", [False, True])
def test_the_default_grid_fits_any_attention(shapes: list[tuple[int, int]], short: bool) -> None:
    methods = default_methods(short)
    assert len({method.name for method in methods}) == len(methods)
    counts = {method.name: tna.parameter_count(method.config, shapes) for method in methods if method.config}
    assert methods[0].family == HEAD
    assert counts[DENSE] == max(counts.values()) == sum(rows * cols for rows, cols in shapes)
    if not short and shapes == SMALL:  # from tens to tens of thousands
        assert (min(counts.values()) < 50, max(counts.values())) == (True, 32768)
        families = {HEAD, DENSE, "LoRA", "LoKr", "LoNKr", "LoRTA", "SuperLoRA", "SuperLoRA + F"}
        assert {method.family for method in methods} >= families


shapes_strategy = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@given(st.integers(1, 5000), shapes_strategy)
def test_a_budget_is_kept_and_used(budget: int, shapes: list[tuple[int, int]]) -> None:
    size = sum(rows * cols for rows, cols in shapes)
    found = {}
    for method in within(budget, shapes):
        count = tna.parameter_count(method.config, shapes)
        assert count <= min(budget, size)
        found[method.family] = max(count, found.get(method.family, 0))
    # The projections of one parameter or more are always there, and come within one of the budget.
    assert found["fastfood"] >= min(budget, size) - 1
    lora = tna.parameter_count(tna.presets.lora(1), shapes) if len({cols for _, cols in shapes}) == 1 else None
    if lora is not None and lora <= min(budget, size):
        least = min(min(shape) for shape in shapes)
        best = max(rank for rank in range(1, least + 1) if rank * lora <= min(budget, size))
        assert found["LoRA"] == best * lora


def test_named_settings() -> None:
    chosen = methods_of(["lora", "superlora"], [1, 4], {}, SMALL, 4)
    assert [method.name for method in chosen] == ["LoRA r = 1", "LoRA r = 4", "SuperLoRA r = 1", "SuperLoRA r = 4"]
    assert chosen[3].config == tna.presets.superlora(4)
    (projected,) = methods_of([], [2], {"projection": "linear", "ratio": 0.1, "groups": 2}, SMALL, 4)
    assert projected.family == "SuperLoRA + F"
    assert projected.config == tna.presets.superlora(2, groups=2, projection="linear", ratio=0.1)
    (dense,) = methods_of(["dense"], [], {}, SMALL, 4)
    assert (dense.config, dense.label) == (tna.presets.dense(), "")
    (c3a,) = methods_of(["c3a"], [], {"block": 64}, SMALL, 4)
    assert (c3a.family, c3a.label) == ("C3A", "block = 64")
    (grouped,) = methods_of(["lotr"], [2], {"groups": "role"}, [(64, 32), (16, 32)] * 2, 2)
    assert grouped.config == tna.presets.lotr(2, groups="role"), "needs no weights of one shape"


#: What some presets need besides their names, and how many parameters they have then; 0 for any number.
NEEDED: dict[str, tuple[list[int], dict[str, Any], int]] = {
    "c3a": ([], {"block": 64}, 8 * 64),
    "craft": ([8], {}, 2 * (4**2 + 2 * 8**2)),
    "quanta": ([], {"digits": (4, 4)}, 8 * 3 * 16**2),
    "lorta_cp": ([2], {"heads": 4}, 0),
    "cara": ([2], {"heads": 4}, 0),
}


@pytest.mark.parametrize("name", sorted(set(tna.presets.__all__) - {"nola"}))
def test_every_preset_by_its_name(name: str) -> None:
    ranks, changes, expected = NEEDED.get(name, ([], {}, 0))
    (method,) = methods_of([name], ranks, changes, SMALL, 4)
    count = tna.parameter_count(method.config, SMALL, roles="qv" * 4)
    assert count == expected if expected else count > 0


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("lorta_cp", SMALL, "preset 'lorta_cp' needs the number of 'heads' or .*; give it with --set NAME=VALUE"),
        (
            "lotr", [(64, 32), (16, 32)] * 2,
            "preset 'lotr' needs weights of one shape; .* give --groups role, for one group of",
        ),
        ("c3a", SMALL, "block=768, which does not divide the 64 rows"),
    ],
)  # fmt: skip
def test_presets_that_do_not_fit(name: str, shapes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(TnadaptError, match=message):
        tna.parameter_count(methods_of([name], [] if name == "c3a" else [2], {}, shapes, 4)[0].config, shapes)


def test_a_budget_below_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_families", lambda shapes: usual(shapes)[:2])
    message = r"a budget of 100 is less than any setting needs on these 8 weights; .* is 640"
    with pytest.raises(TnadaptError, match=message):
        within(100, SMALL)


def test_bad_choices() -> None:
    # Others are refused on the command line: see tests/cli/test_cli.py.
    with pytest.raises(TnadaptError, match="no field 'dropout'"):
        Choice(presets=("dense",), changes={"dropout": 1}).methods(SMALL, 4)
    with pytest.raises(TnadaptError, match="at least 1 parameter"):
        Choice(budgets=(10, -3)).methods(SMALL, 4)

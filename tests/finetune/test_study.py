"""A study from end to end, resumed, and in parallel."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

import tnadapt as tna
from tnadapt.errors import ConfigError, FileError, TargetError, TnadaptError
from tnadapt.finetune import Choice, Reporter, Spec, Study, Task, Training, open_problem
from tnadapt.finetune.loop import OwnRates, Schedule, batches, fit
from tnadapt.finetune.problem import base_digest, free
from tnadapt.finetune.training import usable_device

from .internals import points_in, study_job
from .small import CHOICE, TRAINING, spec, study


class Counting(Reporter):
    def __init__(self) -> None:
        self.begun: tuple[int, int] | None = None
        self.done: list[str] = []

    def begins(self, tasks: int, finished: int) -> None:
        self.begun = (tasks, finished)

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


def test_what_is_finished_is_not_done_again_and_a_damaged_best_adapter_copied(
    finished: tuple[Path, Any], cache: Path
) -> None:
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
    assert outcome.proof is not None
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
    (tmp_path / "results.jsonl").write_text("a diary\n")
    for fresh in (False, True):
        with pytest.raises(FileError, match="is not a results file"):
            one.run(tmp_path, fresh=fresh)


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
        assert outcome.best is not None
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
    one = Study(dataclasses.replace(spec(cache), keep_trainable=keep), CHOICE, TRAINING, (0.01,))
    with pytest.raises(TargetError, match="nothing"):
        one.run(tmp_path, jobs=1)
    with pytest.raises(TargetError, match="--keep-trainable nothing: the model has no such"):
        free(one.problem.build(0), keep)


def test_another_part_to_keep(cache: Path, tmp_path: Path) -> None:
    one = Study(dataclasses.replace(spec(cache), keep_trainable=("head", "norm")), CHOICE, TRAINING, (0.01,))
    outcome = one.run(tmp_path, jobs=1)
    assert {point.kept for point in outcome.points} == {325 + 128}
    assert outcome.proof is not None
    assert outcome.proof.holds


@pytest.mark.slow
def test_a_worker_that_cannot_open_the_problem_says_why(cache: Path, tmp_path: Path) -> None:
    one = study(cache)
    one.spec = Spec(model="no/such")
    with pytest.raises(TnadaptError, match="--model needs --data, too"):
        one.run(tmp_path, jobs=2)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("gpu", "cuda"), ("GPU:0", "cuda:0"), ("cuad:1", "cuda:1"), ("cuda:x", "cuda"), ("metal", "mps"), ("abacus", "")],
)
def test_a_device_that_is_not_here(name: str, meant: str) -> None:
    assert usable_device("cpu") == "cpu"
    with pytest.raises(TnadaptError, match="no device 'cuda:99' here: "):
        usable_device("cuda:99")
    hint = rf"did you mean '{meant}'\? " if meant else ""
    with pytest.raises(TnadaptError, match=f"^no device '{name}'; {hint}give cpu, cuda, cuda:0, mps, …$"):
        usable_device(name)


# -- The cache ---------------------------------------------------------------------------------


def test_the_pretrained_model_is_kept_and_made_anew_where_damaged(tmp_path: Path) -> None:
    one = Spec(cache=tmp_path / "made" / "here", pretrain_epochs=1)
    told: list[str] = []
    first = base_digest(open_problem(one, lambda what, done: told.append(what)).build(0))
    assert told
    (file,) = (tmp_path / "made" / "here" / "digits").iterdir()
    told.clear()
    assert base_digest(open_problem(one, lambda what, done: told.append(what)).build(0)) == first
    assert not told
    whole = file.read_bytes()
    for damage in (b"", whole[:1000], whole[:200] + b"\xff" * 4096 + whole[4296:], b"\0" * 64):
        file.write_bytes(damage)
        assert base_digest(open_problem(one, lambda what, done: told.append(what)).build(0)) == first
        assert told
        assert file.read_bytes() == whole
        told.clear()


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

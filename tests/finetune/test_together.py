"""Trainings in one run: each gets what it gets alone, and those that would not are trained one after another."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from tests.support.depth import in_depth
from tnadapt import torch as tnt
from tnadapt.errors import ConfigError
from tnadapt.finetune import Method, Problem, Spec, Study, Task, Training, open_problem
from tnadapt.finetune.grid import DENSE, head_alone, method_of
from tnadapt.finetune.together import Together, doing, share_base
from tnadapt.finetune.training import train_together

from . import tiny_models as tiny
from .internals import study_job
from .tiny_models import CHOICE, spec, study

P = tna.presets
RATES = (0.003, 0.02)
#: Each method, and whether its seeds can be members of one run.
METHODS = {
    "head": (head_alone(), True),
    "dense": (Method(DENSE, "", P.dense()), True),
    "lora": (method_of(P.lora(2)), True),
    "superlora": (method_of(P.superlora(2)), True),
    "dora": (method_of(P.dora(2)), True),
    "pissa": (method_of(P.lora(2, start="pissa")), False),
    "projected": (method_of(P.superlora(2, projection="linear", ratio=0.1)), False),
    "vera": (method_of(P.vera(8)), False),
    "unilora": (method_of(P.unilora(50)), False),
}
HOW = {
    "plain": Training(2, 24),
    "decayed": Training(1, 16, weight_decay=0.1, clip=0.05, head_rate=0.004),
    "sgd": Training(1, 16, optimiser="sgd", shape="onecycle", steps=7),
}


class Passes:
    """A problem that counts the passes of its trainings."""

    def __init__(self, problem: Problem, double: bool = False) -> None:
        self.count = 0

        def logits(model: Any, inputs: Any) -> Any:
            self.count += model.training
            return problem.logits(model, inputs.double() if double else inputs)

        build = (lambda seed: problem.build(seed).double()) if double else problem.build
        self.problem = dataclasses.replace(problem, build=build, logits=logits)

    def of(self, tasks: Sequence[Task], training: Training, folder: Path) -> tuple[list[dict[str, Any]], int]:
        """Train together; return the lines without the seconds, and the number of passes."""
        self.count = 0
        lines = train_together(self.problem, tasks, training, folder)
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines], self.count

    def alone(self, tasks: Sequence[Task], training: Training, folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
        """Train one after another."""
        done = [self.of([task], training, folder) for task in tasks]
        return [line for (line,), _ in done], [count for _, count in done]


def tasks_of(method: Method, seeds: Sequence[int] = (0, 1), rates: Sequence[float] = RATES) -> list[Task]:
    return [Task(method, seed, rate) for seed in seeds for rate in rates]


@pytest.fixture
def digits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The digits, and adapters, in double precision, where rounding does not hide anything."""
    monkeypatch.setattr(tnt, "attach", functools.partial(tnt.attach, dtype=torch.float64))
    return Passes(open_problem(dataclasses.replace(spec(cache), limit=120)), double=True)


CASES = [(name, how) for name in METHODS for how in HOW]


@pytest.mark.parametrize(
    ("name", "how"), in_depth(CASES, [case for case in CASES if case[0] == "lora" or case[1] == "decayed"])
)
def test_each_gets_what_it_gets_alone(name: str, how: str, digits: Passes, tmp_path: Path) -> None:
    method, mixed = METHODS[name]
    tasks, training = tasks_of(method), dataclasses.replace(HOW[how], keep_references=True)
    expected, counts = digits.alone(tasks, training, tmp_path / "alone")
    lines, passes = digits.of(tasks, training, tmp_path / "together")
    assert lines == expected
    assert len({line["validation_loss"] for line in lines}) >= 2
    # One pass more in each run shows that it can be one.
    assert passes == (counts[0] + 1) * (1 if mixed else 2)
    for line in lines if method.config else ():
        one, other = (tna.load(tmp_path / place / line["adapter"]) for place in ("alone", "together"))
        assert one.config == other.config
        assert one.arrays.keys() == other.arrays.keys()
        for array, values in one.arrays.items():
            np.testing.assert_allclose(other.arrays[array], values, rtol=1e-7, atol=1e-9)
        assert one.kept.keys() == other.kept.keys()
        for kept, values in one.kept.items():
            np.testing.assert_allclose(other.kept[kept], values, rtol=1e-7, atol=1e-9)


def test_one_that_diverges_ends_alone(digits: Passes, tmp_path: Path) -> None:
    tasks = tasks_of(METHODS["lora"][0], (0,), (0.01, 1e200, 0.003))
    expected, counts = digits.alone(tasks, HOW["plain"], tmp_path)
    assert [line["diverged"] for line in expected] == [False, True, False]
    assert counts[1] < counts[0]
    lines, passes = digits.of(tasks, HOW["plain"], tmp_path)
    assert lines == expected
    assert passes == counts[0] + 1
    exploding = tasks_of(METHODS["head"][0], (0, 1), (1e200, 1e250))
    expected, counts = digits.alone(exploding, HOW["plain"], tmp_path)
    assert digits.of(exploding, HOW["plain"], tmp_path) == (expected, max(counts) + 1)


def test_texts_of_one_seed_share_their_passes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = Path(tiny.bert(tmp_path / "bert"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    texts = Passes(open_problem(Spec(model=str(folder), data=tiny.tags(tmp_path / "tags.jsonl"))))
    tasks, training = tasks_of(METHODS["superlora"][0]), Training(2, 7)
    expected, counts = texts.alone(tasks, training, tmp_path)
    lines, passes = texts.of(tasks, training, tmp_path)
    assert passes == 2 * (counts[0] + 1)
    for line, alone in zip(lines, expected, strict=True):
        for name in ("training_loss", "validation_loss", "test_loss"):
            assert line[name] == pytest.approx(alone[name], rel=1e-4)


class Normalized(torch.nn.Module):
    """The small ViT with a normalization over the batch, or by running statistics."""

    def __init__(self, model: Any, running: bool = False) -> None:
        super().__init__()
        self.vit, self.norm = model, torch.nn.BatchNorm1d(5, track_running_stats=running)

    def forward(self, images: Any) -> Any:
        return self.norm(self.vit(images))


class Turned(torch.nn.Module):
    """The small ViT with a layer that gets tokens first."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vit = model
        self.layer = torch.nn.TransformerEncoderLayer(5, 1, dim_feedforward=7, dropout=0.0, batch_first=False)

    def forward(self, images: Any) -> Any:
        return self.layer(self.vit(images)[None])[0]


class Folded(torch.nn.Module):
    """The small ViT, and a layer that gets all rows as one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vit, self.again = model, torch.nn.Linear(5, 5)

    def forward(self, images: Any) -> Any:
        return self.again(self.vit(images)[None])[0]


class Counted(torch.nn.Module):
    """The small ViT, and the mean of what it gets in training."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vit = model
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, images: Any) -> Any:
        logits = self.vit(images)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean(0)
        return logits - self.mean


class Read(torch.nn.Module):
    """The small ViT, and a layer whose weight is read."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vit, self.again = model, torch.nn.Linear(5, 5)

    def forward(self, images: Any) -> Any:
        return self.again(self.vit(images).to(self.again.weight.dtype))


class Named(torch.nn.Module):
    """The small ViT, whose head has another name, too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.last, self.vit = model.head, model

    def forward(self, images: Any) -> Any:
        return self.vit(images)


def changed(make: Callable[[Any], Any], **more: Any) -> Callable[[Problem], Problem]:
    def change(problem: Problem) -> Problem:
        def build(seed: int) -> Any:
            model = problem.build(seed)
            torch.manual_seed(0)
            return make(model)

        return dataclasses.replace(problem, build=build, **more)

    return change


def dropping(model: Any) -> Any:
    model.blocks[1].mlp.append(torch.nn.Dropout(0.1))
    return model


APART = {
    "dropout": (changed(dropping), "qv"),
    "batch norm": (changed(Normalized), "qv"),
    "buffers": (changed(Counted), "qv"),
    "a weight that is read": (changed(Read, keep_trainable=("head", "again")), "qv"),
    "tokens first": (changed(Turned), ("layer.linear1",)),
    "rows as one": (changed(Folded, keep_trainable=("head", "again")), "qv"),
    "a parameter": (lambda problem: dataclasses.replace(problem, keep_trainable=("head", "position")), "qv"),
    "a bias": (lambda problem: dataclasses.replace(problem, keep_trainable=("head", "proj.bias")), "all-linear"),
}


@pytest.mark.parametrize("why", APART)
def test_those_that_would_get_something_else_are_trained_one_after_another(
    why: str, cache: Path, tmp_path: Path
) -> None:
    change, targets = APART[why]
    problem = Passes(change(open_problem(dataclasses.replace(spec(cache), limit=60))))
    tasks, training = tasks_of(METHODS["lora"][0]), Training(1, 16, targets=targets)
    expected, counts = problem.alone(tasks, training, tmp_path)
    lines, passes = problem.of(tasks, training, tmp_path)
    assert lines == expected
    assert sum(counts) <= passes <= sum(counts) + 1


@pytest.mark.parametrize("kept", [False, True])
def test_the_file_holds_what_statistics_have_become(kept: bool, digits: Passes, tmp_path: Path) -> None:
    """Frozen, they stay those of the base; trained, they are saved with the layer."""
    keep = ("head", "norm") if kept else ("head",)
    digits.problem = changed(lambda model: Normalized(model, running=True).double(), keep_trainable=keep)(
        digits.problem
    )
    tasks = tasks_of(METHODS["lora"][0])
    expected, counts = digits.alone(tasks, HOW["plain"], tmp_path)
    lines, passes = digits.of(tasks, HOW["plain"], tmp_path)
    assert sum(counts) <= passes <= sum(counts) + 1 if kept else passes == counts[0] + 1
    for line, alone in zip(lines, expected, strict=True):
        assert line["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-4)
        proof = study_job.prove(digits.problem, line, tmp_path / line["adapter"], HOW["plain"])
        assert proof.holds
    model = digits.problem.build(9)
    before = model.norm.running_mean.clone()
    tnt.load(model, tmp_path / lines[0]["adapter"])
    assert torch.equal(model.norm.running_mean, before) is not kept


def test_a_head_of_two_names_is_each_members(digits: Passes, tmp_path: Path) -> None:
    digits.problem = changed(lambda model: Named(model).double(), keep_trainable=("last",))(digits.problem)
    tasks = tasks_of(METHODS["lora"][0])
    expected, counts = digits.alone(tasks, HOW["plain"], tmp_path)
    assert digits.of(tasks, HOW["plain"], tmp_path) == (expected, counts[0] + 1)


def test_the_base_is_in_memory_once(cache: Path) -> None:
    problem = open_problem(spec(cache))
    one, other = problem.build(0), problem.build(1)
    for model in (one, other):
        tnt.attach(model, P.lora(1), keep_trainable=["head"])
    share_base(one, other)
    base = dict(one.named_parameters())
    same = {name for name, values in other.named_parameters() if values.data_ptr() == base[name].data_ptr()}
    assert same == {name for name, values in one.named_parameters() if not values.requires_grad}


# -- Calls of several tasks ----------------------------------------------------------------------------------------


def test_what_memory_cannot_hold_is_halved() -> None:
    sizes: list[int] = []

    def do_all(tasks: Sequence[str], progress: Callable[[float], None]) -> list[dict[str, Any]]:
        sizes.append(len(tasks))
        if len(tasks) > 2 or tasks[0] == "x":
            raise torch.OutOfMemoryError("no memory")
        return [{"name": task} for task in tasks]

    do = doing(do_all)
    assert do(Together(tuple("abcde")), print) == {"lines": [{"name": name} for name in "abcde"]}
    assert sizes == [5, 2, 3, 1, 2]
    assert do("a", print) == {"name": "a"}
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        do("x", print)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        do(Together(("x", "a")), print)


def test_halves_have_the_memory_of_the_whole() -> None:
    alive: list[bool] = []
    whole: list[Any] = []

    def do_all(tasks: Sequence[str], progress: Callable[[float], None]) -> list[dict[str, Any]]:
        if len(tasks) == 1:
            alive.append(whole[0]() is not None)
            return [{}]
        model = torch.nn.Module()
        object.__setattr__(model, "itself", model)
        whole.append(weakref.ref(model))
        raise torch.OutOfMemoryError("no memory")

    gc.disable()
    try:
        doing(do_all)(Together(("a", "b")), print)
    finally:
        gc.enable()
    assert alive == [False, False]


def test_progress_is_told_once_for_many_steps() -> None:
    told: list[float] = []

    def do_all(tasks: Sequence[str], progress: Callable[[float], None]) -> list[dict[str, Any]]:
        for step in range(100_000):
            progress((step + 1) / 100_000)
        return [{} for _ in tasks]

    doing(do_all)(Together(("a", "b")), told.append)
    assert told == sorted(told)
    assert 900 <= len(told) <= 1001


def lines(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["key"]: line for line in found if "key" in line}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", in_depth([1, 2], [2]))
def test_a_study_is_the_same(jobs: int, cache: Path, tmp_path: Path) -> None:
    alone = study(cache, seeds=2).run(tmp_path / "alone", together=1)
    outcome = study(cache, seeds=2).run(tmp_path / "together", jobs, together=3)
    expected, found = lines(tmp_path / "alone"), lines(tmp_path / "together")
    assert found.keys() == expected.keys()
    assert len(found) == outcome.trained == 12
    for key, line in found.items():
        assert line.keys() == expected[key].keys()
        assert line["validation_loss"] == pytest.approx(expected[key]["validation_loss"], rel=1e-3)
    assert outcome.best is not None
    assert alone.best is not None
    assert (outcome.best.method, outcome.best.rate) == (alone.best.method, alone.best.rate)
    assert outcome.proof is not None
    assert outcome.proof.holds
    assert not (tmp_path / "together" / "workers").exists()
    assert study(cache, seeds=2).run(tmp_path / "together", together=0).trained == 0
    with pytest.raises(ConfigError, match="together must be at least 0; got -1"):
        study(cache).run(tmp_path, together=-1)


@pytest.mark.parametrize(
    ("training", "together", "sizes"),
    [
        (Training(1, 8), None, [1] * 12),
        (Training(1, 8), 3, [3, 1] * 3),
        (Training(1, 8, device="cuda"), None, [4] * 3),
        (Training(1, 8, device="cuda"), 1, [1] * 12),
        (Training(1, 8, device="cuda", report_to="tensorboard"), None, [1] * 12),
    ],
)
def test_the_rule_of_what_is_together(
    training: Training, together: int | None, sizes: list[int], cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    def run_tasks(work: Any, calls: Sequence[Any], *more: Any, **named: Any) -> Any:
        asked.extend(calls)
        raise InterruptedError

    monkeypatch.setattr(study_job, "run_tasks", run_tasks)
    with pytest.raises(InterruptedError):
        Study(spec(cache), CHOICE, training, RATES, 2).run(tmp_path, together=together)
    calls = [call.tasks if isinstance(call, Together) else (call,) for call in asked]
    assert [len(tasks) for tasks in calls] == sizes
    assert all(len({task.method for task in tasks}) == 1 for tasks in calls)
    assert len({task.key for tasks in calls for task in tasks}) == 12

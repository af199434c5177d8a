"""Runs: played ones for resuming, shards and files; a real one on the digits."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality import engine, methods, store, tasks
from benchmarks.quality.command import main
from benchmarks.quality.grid import shard_of
from benchmarks.quality.running import Listener, Run
from benchmarks.quality.tuning import Plan
from tests.quality.played_task import BEST, PlayedBench, PlayedTask, setting_of
from tests.support.depth import in_depth
from tnadapt import Config
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Method as Family
from tnadapt.finetune import Task, open_engine
from tnadapt.finetune.training import train

ROOT = Path(__file__).parents[2]
SETTINGS = [setting_of(method) for method in BEST]
PLAN = Plan(seeds=2)


def run(out: Path, shard: tuple[int, int] = (1, 1), plan: Plan = PLAN, together: int = 1) -> int:
    one = Run(out, out / "cache", open_engine("local", 1), shard=shard, together=together)
    return one.task(PlayedTask(), "small", shard_of(SETTINGS, shard), plan, Listener())


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "played", PlayedTask)


def records(out: Path) -> dict[str, Any]:
    found = store.read(out, "played", "small")
    return {} if found is None else {key: {**one, "seconds": 0} for key, one in found.records.items()}


def test_a_run_is_finished_once_and_resumes_after_any_line(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "whole" / "played.jsonl"
    count, expected = run(whole), records(whole)
    before = path.read_bytes()
    assert (count, run(whole)) == (len(expected), 0)
    assert path.read_bytes() == before
    versions = {name: importlib.metadata.version(name) for name in ("peft", "torch")}
    assert all((line["device"], line["versions"]) == ("cpu", versions) for line in expected.values())
    assert not (whole / "running").exists()
    lines = before.splitlines(keepends=True)
    for cut in range(1, len(lines), 7):
        out = tmp_path / str(cut)
        out.mkdir()
        # The last line is incomplete, as a killed process leaves it.
        (out / "played.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
        kept = [json.loads(line) for line in lines[:cut]]
        assert run(out) == len(expected) - sum("key" in line for line in kept)
        assert records(out) == expected
        after = [json.loads(line) for line in (out / "played.jsonl").read_bytes().splitlines()]
        assert after[:cut] == kept
        keys = [line["key"] for line in after if "key" in line]
        assert len(set(keys)) == len(keys)
    # More seeds only add trainings.
    assert run(whole, plan=Plan(seeds=3)) == len(SETTINGS)


def test_a_broken_device_ends_the_run_and_is_no_failure_of_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with ...")

    before = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(PlayedBench, "train", broken)
        patch.setattr("torch.cuda.is_initialized", lambda: True)
        patch.setattr("torch.cuda.synchronize", broken)
        words = r"rate 0\.01, seed 0: RuntimeError: CUDA error: device-side assert triggered; nothing .* --methods"
        with pytest.raises(TnadaptError, match=words):
            run(tmp_path)
        assert records(tmp_path) == {}
        # An error after which the device works is one of the training.
        patch.setattr("torch.cuda.synchronize", lambda: None)
        run(tmp_path / "other")
    assert len({one["failed"] for one in records(tmp_path / "other").values()}) == 1
    assert run(tmp_path) == before


def test_what_failed_in_a_shard_is_tried_again_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> dict[str, Any]:
        raise ValueError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(PlayedBench, "train", broken)
        counts = [run(tmp_path, (number, 2)) for number in (1, 2)]
    assert sum(counts) == len(SETTINGS) * 4  # both seeds at the default rate, one at two others
    assert {line["failed"] for line in records(tmp_path).values()} == {"ValueError: no memory"}
    assert run(tmp_path) == 0
    # The retry writes to the file of the whole task, which is read before those of the shards.
    again = Run(tmp_path, tmp_path, open_engine("local", 1), retry=True)
    assert again.task(PlayedTask(), "small", SETTINGS, PLAN, Listener()) == len(records(tmp_path))
    assert not any("failed" in line for line in records(tmp_path).values())
    run(tmp_path / "whole")
    assert records(tmp_path) == records(tmp_path / "whole")
    store.merge(tmp_path, "played", "small")
    assert records(tmp_path) == records(tmp_path / "whole")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let the played bench train together; return the methods and numbers of trainings that it was asked for."""
    asked: list[tuple[str, int]] = []

    def train_together(self: PlayedBench, setting: Any, pairs: list[tuple[int, float]], progress: Any) -> list[Any]:
        asked.append((setting.method, len(pairs)))
        if setting.method == "unilora":
            raise ValueError("not together")
        return [self.train(setting, seed, rate, progress) for seed, rate in pairs]

    monkeypatch.setattr(PlayedBench, "train_together", train_together, raising=False)
    return asked


def test_what_trains_together_gives_the_same_lines(together: list[tuple[str, int]], tmp_path: Path) -> None:
    count = run(tmp_path / "alone")
    assert together == []
    assert run(tmp_path / "together", together=3) == count
    assert records(tmp_path / "together") == records(tmp_path / "alone")
    # Those of PEFT are alone, and those of Uni-LoRA, which fail together, in the end, too.
    assert {method for method, _ in together} == BEST.keys() - {"peft-lora"}
    assert max(number for _, number in together) == 3


def test_trainings_of_a_worker_that_dies_are_run_alone(
    together: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tasks(work: Any, calls: Any, *more: Any, do: Any, lost: Any, **named: Any) -> Any:
        for call in calls:
            if hasattr(call, "tasks"):
                lost(call, "a worker died 3 times")
            else:
                yield call, do(call, print)

    count = run(tmp_path / "alone")
    monkeypatch.setattr(engine, "run_tasks", run_tasks)
    assert run(tmp_path / "together", together=0) == count
    assert together == []
    assert records(tmp_path / "together") == records(tmp_path / "alone")


@pytest.mark.parametrize("of", [2, 3, 9])
def test_shards_find_what_a_whole_run_finds(tmp_path: Path, of: int) -> None:
    whole, parts = run(tmp_path / "whole"), tmp_path / "parts"
    assert sum(run(parts, (number, of)) for number in range(1, of + 1)) == whole
    # Files of runs that were killed before their first line.
    (parts / "played.jsonl").touch()
    (parts / "played.1-of-99.jsonl").write_bytes(b'{"format": "tn')
    for _ in range(2):
        assert records(parts) == records(tmp_path / "whole")
        assert store.merge(parts, "played", "small") == parts / "played.jsonl"
        assert [one.name for one in parts.glob("*.jsonl")] == ["played.jsonl"]
    # A merged file is a results file: the run goes on in it.
    assert run(parts) == 0


@pytest.mark.parametrize("busy", [(1, 1), (1, 2)])
def test_files_that_a_run_writes_to_are_not_merged(tmp_path: Path, busy: tuple[int, int]) -> None:
    pytest.importorskip("fcntl", reason="this system has no locks")
    for shard in ((1, 2), (2, 2), (1, 1)):
        run(tmp_path, shard)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    results = store.open_results(tmp_path, "played", "small", busy, PlayedBench().settings())
    with results, pytest.raises(FileError, match=r"is being written by another process; wait for it"):
        store.merge(tmp_path, "played", "small")
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before


def test_results_of_another_study_or_budget_are_refused(tmp_path: Path) -> None:
    run(tmp_path, (1, 2))
    path = tmp_path / "played.1-of-2.jsonl"
    before = path.read_bytes()
    other = setting_of(next(iter(records(tmp_path).values()))["method"], budget=150)
    words = r"has results of \S+ r = 1 at a budget of 100 parameters; .* at 150, too: give --budgets .* another --out"
    with pytest.raises(FileError, match=words):
        Run(tmp_path, tmp_path, open_engine("local", 1)).task(PlayedTask(), "small", [other], PLAN, Listener())
    assert path.read_bytes() == before
    path.write_text(path.read_text().replace('"targets": "qv"', '"targets": "all"', 1))
    with pytest.raises(FileError, match=r"has results of played with other targets; give another one with --out"):
        run(tmp_path, (2, 2))


def test_a_dry_run_lists_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--methods", "lora,peft-vera", "--budgets", "50,1000,10000", "--out", str(tmp_path)]
    assert main(["run", "digits", "--dry-run", *chosen]) == 0
    shown = capsys.readouterr().out
    for words in (
        "digits (Small ViT, digits 0 to 4 to digits 5 to 9): 8 settings", "10,000     9,216  lora",
        "    lora at 50: needs at least 1,024 parameters\n", "0 trainings are finished; 36 can be run now",
    ):  # fmt: skip
        assert words in shown
    assert not list(tmp_path.iterdir())


WRONG = [
    (["run", "--profile", "fast"], "no profile 'fast'; expected one of quick, day, full"),
    (["run", "numbers"], "no task 'numbers'; expected one of digits"),
    (["run", "--shard", "3/2"], "--shard takes I/N with I from 1 to N, such as 2/8; got '3/2'"),
    (["run", "--budgets", "100,x"], "--budgets takes numbers with commas between them; got '100,x'"),
    (["run", "--together", "-1"], "--together must be at least 0; got -1"),
    (["run", "--seeds", "0"], "--seeds must be at least 1 and --tuned-by at least 0; got 0 and 1"),
    # The last task is checked before the first one is trained.
    (["run", "digits", "played", "--scale", "smoke"], "task played has the scales small; got 'smoke'"),
    (["run", "played", "--engine-option", "cpus"], "--engine-option takes KEY=VALUE; got 'cpus'"),
    (["run", "played", "--engine", "cloud"], "no engine 'cloud'; expected one of local, ray, slurm"),
    (["run", "digits", "--methods", "", "--dry-run"], "no method ''; expected one of base"),
    (["run", "digits", "--budgets", "", "--dry-run"], "with commas between them; got ''"),
    (["merge"], "error: no results in {out}; give the folder of a run with --out\n"),
    (["report"], "error: no results in {out}; give the folder of a run with --out\n"),
]


@pytest.mark.parametrize(("arguments", "words"), in_depth(WRONG, [WRONG[0], *WRONG[6:7], *WRONG[9:]]))
def test_wrong_arguments_are_explained(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Run, "task", lambda *given: pytest.fail("it was trained"))
    usual = {"--methods": "lora", "--budgets": "1000"} if arguments[0] == "run" else {}
    rest = [word for name, value in usual.items() if name not in arguments for word in (name, value)]
    assert main([*arguments, *rest, "--out", str(tmp_path)]) == 2
    assert words.format(out=tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    chosen = ["--methods", "lora_xs,peft-fourierft", "--budgets", "100", "--scale", "smoke"]
    where = ["--seeds", "2", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(["run", "digits", *chosen, *where, "--jobs", "1"]) == 0
    results = store.read(tmp_path / "out", "digits", "smoke")
    assert results is not None
    lines = list(results.records.values())
    assert {line["method"] for line in lines} == {*tasks.find("digits").controls, "lora_xs", "peft-fourierft"}
    assert not any(line["diverged"] or "failed" in line for line in lines)
    # The head has as many parameters beside an adapter of either library.
    assert {line["kept"] for line in lines if line["method"] not in ("fitted-head", "biases")} == {5 * 64 + 5}
    text = (tmp_path / "out" / "digits-smoke.md").read_text(encoding="utf-8")
    assert "| FourierFT (PEFT) | n = 12 | 96 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "dense", "lora_xs"])
def test_a_training_is_that_of_tnadapt_finetune(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    task = tasks.find("digits")
    cache = tmp_path_factory.getbasetemp() / "quality-cache"
    bench: Any = task.open("smoke", cache, "cpu")
    setting = methods.find(name).largest(bench.facts, task.sketch(), 100)
    config = None if setting.values is None else Config.from_dict(setting.values)
    ours = bench.train(setting, 1, 0.05, lambda done: None)
    assert bench.training.head_rate is not None
    if config is None:
        bench.training = dataclasses.replace(bench.training, head_rate=None)
    theirs = train(bench.problem, Task(Family("", "", config), 1, 0.05), bench.training)
    for field in ("validation", "validation_loss", "test", "predictions", "training_loss", "kept", "diverged"):
        assert ours[field] == theirs[field], field
    several = bench.train_together(setting, [(0, 0.05), (1, 0.05)], lambda done: None)
    assert several[1].keys() == ours.keys()
    for field in ("validation_loss", "training_loss"):
        assert several[1][field] == pytest.approx(ours[field], rel=1e-4), field
        assert several[0][field] != several[1][field]

"""``tnadapt finetune`` on the command line, including a run that is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
typer_testing = pytest.importorskip("typer.testing")

from tests.support.depth import in_depth
from tnadapt import finetune
from tnadapt.cli import app, training_reporter
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Task
from tnadapt.finetune.grid import head_alone
from tnadapt.finetune.tasks import TASKS

from . import tiny_models as tiny
from .internals import points_in, study_job

QUICK = ("--pretrain-epochs", "1", "--epochs", "1", "--batch", "64", "--lr", "0.03")


def invoke(*arguments: Any) -> Any:
    return typer_testing.CliRunner().invoke(app, ["finetune", *map(str, arguments)], catch_exceptions=True)


def begin(*arguments: Any) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    command = [sys.executable, "-m", "tnadapt", "finetune", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )


def told_until(process: subprocess.Popen[str], text: str) -> None:
    """Wait until the process has printed a line with a text."""
    assert any(text in line for line in process.stderr), "it ended by itself"


def ends(leader: int, seconds: float) -> bool:
    """Return whether all processes of a group end in time; workers do by themselves when the parent is gone."""
    limit = time.monotonic() + seconds
    while True:
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        # Those that ended and were not waited for yet are listed, too.
        running = [state for group, state in map(str.split, listed.splitlines()) if int(group) == leader]
        if all(state.startswith("Z") for state in running) or time.monotonic() > limit:
            return all(state.startswith("Z") for state in running)
        time.sleep(0.1)


def records(out: Path) -> list[dict[str, Any]]:
    *whole, _ = (out / "results.jsonl").read_bytes().split(b"\n")
    return [line for line in map(json.loads, whole) if "key" in line]


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"validation": 0.875}, "validation 87.5%, 2.0 s"),
        ({"validation": 0.875, "metric": "micro F1", "percent": True}, "validation micro F1 87.5%, 2.0 s"),
        ({"validation": 5.3861, "metric": "RMSE", "percent": False}, "validation RMSE 5.386, 2.0 s"),
        ({"validation": 0.5, "metric": "RMSE"}, "validation RMSE 0.5, 2.0 s"),
        ({"validation_loss": 1.25}, "validation loss 1.2500, 2.0 s"),
        ({"diverged": True}, "diverged"),
    ],
)
def test_progress_has_the_tables_form(record: dict[str, Any], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with training_reporter.reporter() as reporter:
        reporter.begins(3, 1)
        reporter.estimated(42.0)
        reporter.finished(Task(head_alone(), 0, 0.1), {"diverged": False, "seconds": 2.0, **record})
    assert capsys.readouterr().err == (
        f"1 of 3 trainings were finished before\nabout 42 s for the rest\n[2/3] head alone, rate 0.1, seed 0: {shown}\n"
    )


def test_the_whole_job_and_a_proof_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*QUICK, "--cache", cache, "--out", tmp_path, "--preset", "superlora", "--preset", "lora", "--rank", 1)
    done = invoke(*given, "--jobs", 1)
    assert done.exit_code == 0, done.output
    for text in (
        "method      setting  parameters  rate  validation   test",
        "SuperLoRA   r = 1           364  0.03",
        "LoRA        r = 1         1,024  0.03",
        "● Pareto front",
        "325 parameters of the head",
        "448 training, 179 validation, 269 test samples; 3 settings x 1 rate x 1 seed = 3 trainings of 7 steps",
        "loaded on a fresh base: the same predictions on 269 test samples; merged: the same predictions",
        "each training had 7 steps, and most need hundreds: run it with --epochs 29 and another --out",
        f"results: {tmp_path / 'results.jsonl'}",
        f"picture: {tmp_path / 'pareto.png'}",
    ):
        assert text in done.stdout
    assert "[3/3] LoRA r = 1, rate 0.03, seed 0: validation" in done.stderr
    again = invoke(*given, "--json")
    assert again.exit_code == 0
    assert "3 of 3 trainings were finished before" in again.stderr
    found = json.loads(again.stdout)
    assert [point["parameters"] for point in found["points"]] == [0, 364, 1024]
    assert found["best"]["proof"]["loaded_same"] is True
    assert found["best"]["proof"]["merged_different"] == 0
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(study_job, "prove", lambda *given: study_job.Proof(269, False, 3, 0.5))
    failed = invoke(*given, "--fresh")
    assert failed.exit_code == 1
    assert "DIFFERENT predictions on 269 test samples; merged: DIFFERENT predictions for 3" in failed.stdout


#: A task of each sort of model; the metrics of all are tested in test_tasks.py.
SHORT = ("regression", "causal-lm", "image-classification")


@pytest.mark.slow
@pytest.mark.parametrize("name", in_depth(tiny.JOBS, SHORT))
def test_the_whole_job_of_a_model_of_ones_own(tmp_path: Path, name: str) -> None:
    model, write, suffix = tiny.JOBS[name]
    reference = "untrained base" if name == "causal-lm" else "head alone"
    given = ["--model", model(tmp_path / "model"), "--data", write(tmp_path / f"a{suffix}"), "--out", tmp_path / "out"]
    given += ["--preset", "lora", "--rank", 1, "--lr", 0.02, "--lr", 0.1, "--epochs", 2, "--batch", 8]
    done = invoke(*given, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["best"]["proof"]["loaded_same"]
    assert report["control"]["reference"] == reference
    assert [point["family"] for point in report["points"]] == [reference, "LoRA"]
    assert report["study"].get("task", {"name": name})["name"] == name
    again = invoke(*given, "--json")
    count = 3 if reference == "untrained base" else 4
    assert f"{count} of {count} trainings were finished before" in again.stderr
    assert json.loads(again.stdout) == report
    text = invoke(*given).stdout
    warning = report["control"]["warning"]
    assert ("warning: " in text) == (warning is not None)
    assert warning is None or warning in text
    assert f"a better test {TASKS[name].metric.name}." in text
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    points = points_in(tmp_path / "out" / "results.jsonl")
    assert [point.to_dict() for point in points] == report["points"]
    assert points[0].metric == TASKS[name].metric
    assert len({line for line in lines if '"session"' in line}) == 1


def test_a_report_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = invoke("--model", "x", "--data", "y.csv", "--report-to", "trackio")
    assert str(done.exception) == ("--report-to trackio needs trackio, which is not installed: pip install trackio")


@pytest.mark.parametrize(
    ("model", "data", "folder"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "imdb", "Qwen2.5-7B-Instruct-imdb"),
        ("Qwen/Qwen2.5-0.5B", "some/reviews:en", "Qwen2.5-0.5B-reviews-en"),
        ("timm:vit_small_patch16_224.augreg_in1k", "photos/", "vit_small_patch16_224.augreg_in1k-photos"),
        ("./my-bert", "data/reviews.csv", "my-bert-reviews"),
        ("models/SmolLM2-135M-Instruct.Q4_1.gguf", "..", "SmolLM2-135M-Instruct.Q4_1-.."),
    ],
)
def test_the_default_folder_has_the_whole_name(
    model: str, data: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(out: Path) -> None:
        raise FileError(str(out))

    for name in ("photos", "my-bert", "data", "models"):
        (tmp_path / name).mkdir()
    for name in ("my-bert/config.json", "data/reviews.csv", "models/SmolLM2-135M-Instruct.Q4_1.gguf"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "check_out", stop)
    assert str(invoke("--model", model, "--data", data).exception) == f"runs/{folder}"


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["query"], 2), (["query", "key"], 4), (["0.attention.self.query"], 1), ([".*query"], 2), (["q", "k"], 4)],
)
def test_targets_are_names_roles_or_a_pattern(
    adapter_of: Callable[[str], tuple[Path, str]], targets: list[str], count: int
) -> None:
    pytest.importorskip("transformers")
    file, data = adapter_of("classification")
    options = [part for target in targets for part in ("--targets", target)]
    done = invoke("--model", file.parent / "model", "--data", data, "--preset", "lora", *options, "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"\n{count} weight{'s' * (count > 1)} of a.jsonl with model; " in done.stdout


def test_a_budget_of_settings(cache: Path) -> None:
    done = invoke(*QUICK, "--cache", cache, "--budget", 100, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "LoNKr          K = 3, f = 2, r = 1         100" in done.stdout
    assert "Uni-LoRA       p = 100, r = 4              100" in done.stdout
    assert "10 settings x 1 rate x 1 seed = 10 trainings" in done.stdout
    listed = json.loads(invoke(*QUICK, "--cache", cache, "--budget", "0.1k", "--dry-run", "--json").stdout)
    assert all(method["parameters"] <= 100 for method in listed["methods"])
    assert listed["trainings"] == 10
    # Nothing asked for is the whole grid.
    done = invoke("--pretrain-epochs", 1, "--cache", cache, "--dry-run", "--seeds", 2)
    assert "19 settings x 1 rate x 2 seeds = 38 trainings" in done.stdout


def test_settings_arrive_in_the_config(cache: Path) -> None:
    done = invoke(
        *QUICK, "--cache", cache, "--dry-run", "--json", "--rank", 2, "--groups", "4", "--order", 3, "--splits", 2,
        "--format", "tucker", "--fold", "balanced", "--projection", "linear", "--ratio", 0.5, "--set", "split_size=2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (method,) = json.loads(done.stdout)["methods"][1:]
    assert method["label"] == (
        "r = 2, groups = 4, order = 3, splits = 2, format = tucker, fold = balanced, projection = linear, ratio = 0.5, "
        "split_size = 2"
    )


def test_engine_and_options_arrive_in_the_study(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    from tnadapt.finetune import Study

    def run(self: Study, *arguments: Any) -> None:
        given.append((self.training.device, *arguments))
        raise KeyboardInterrupt

    given: list[Any] = []
    monkeypatch.setattr(Study, "run", run)
    where = ["--engine", "slurm", "--engine-option", "gpus=1", "--engine-option", "partition=gpu"]
    done = invoke(*QUICK, "--cache", cache, "--out", tmp_path, "--rank", 1, "--together", 3, *where)
    assert done.exit_code == 130, done.output
    # The device is that of the cluster's machines; this one may have none.
    assert given == [("cuda", tmp_path, 0, False, "slurm", {"gpus": "1", "partition": "gpu"}, 3)]


@pytest.mark.slow
@pytest.mark.law("killed-sweep")
@pytest.mark.parametrize("jobs", in_depth([1, 2], [1]))
def test_killed_halfway_it_goes_on(cache: Path, tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        *("--pretrain-epochs", 1, "--cache", cache, "--out", tmp_path, "--jobs", jobs, "--batch", 64, "--epochs", 2),
        *("--lr", 0.01, "--lr", 0.02, "--rank", 1),
    )
    with begin(*arguments) as process:
        told_until(process, "[1/4]")
        process.kill()
    before = records(tmp_path)
    assert 1 <= len(before) < 4
    # What SIGKILL in the middle of a write would leave.
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')
    assert ends(process.pid, 60)
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # a console without ● must do, too
    with begin(*arguments) as process:
        out, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert f"{len(before)} of 4 trainings were finished before" in told
    after = records(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == len({one["key"] for one in after}) == 4
    assert "? Pareto front" in out
    assert "the same predictions on 269 test samples; merged: the same predictions" in out


@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "xyz", "--rank", "1"], "matches 'xyz'"),
        (["--targets", "all_linear", "--rank", "1"], "did you mean 'all-linear'?"),
        (["--device", "abacus"], "no device 'abacus'; give cpu, cuda, cuda:0, mps, …"),
        (["--limit", "3"], "--limit 3 leaves no sample for some of the 5 classes"),
        (["--limit", "8"], "it needs at least 3, one for each of training, validation, test"),
    ],
)
def test_mistakes_that_the_problem_shows(cache: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    # Others are refused before torch is imported: see tests/cli/test_cli.py.
    done = invoke("--pretrain-epochs", 1, "--cache", cache, "--out", tmp_path / "run", *arguments)
    assert isinstance(done.exception, TnadaptError), done.output
    assert message in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_without_torch_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_module('tnadapt', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "finetune"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tnadapt: tnadapt finetune needs its extra: pip install 'tnadapt[demo]'")


WHERE = [["--jobs", 1], ["--jobs", 2], ["--jobs", 2, "--engine", "ray", "--engine-option", "address=local"]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("where", in_depth(WHERE, WHERE[:1]))  # Ray takes half a minute
def test_interrupted_it_says_how_to_go_on(
    cache: Path, tmp_path: Path, where: list[Any], record_property: Callable[[str, object], None]
) -> None:
    if "ray" in where:
        pytest.importorskip("ray")
    arguments = (
        *("--pretrain-epochs", 1, "--cache", cache, "--out", tmp_path / "run", *where, "--epochs", 8, "--rank", 1),
        *("--lr", 0.005, "--lr", 0.01, "--lr", 0.02),
    )
    with begin(*arguments) as process:
        told_until(process, "[1/6]")
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        _, told = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    record_property("seconds_until_exit", round(seconds, 2))
    assert process.returncode == 130, told
    assert f"stopped; finished trainings are in {tmp_path / 'run'}, and the same command resumes" in told
    assert "Traceback" not in told
    assert seconds < 10  # two on a machine that does nothing else
    assert len(records(tmp_path / "run")) >= 1
    assert ends(process.pid, 10)
    assert not [path for path in (tmp_path / "run").glob("adapters/*") if path.suffix != ".safetensors"]

"""Engines: what is finished is kept, what dies is tried again, and nothing is left running."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

import tnadapt as tna
from tests.support.depth import in_depth, long_only
from tnadapt.finetune import Engine, engines, open_engine, run_tasks
from tnadapt.finetune.engines import Started
from tnadapt.plugins import forget_registered

from . import fake_slurm
from .internals import run_folder
from .internals import slurm as slurm_engine
from .played_tasks import ROOT, Act, Play, acts, lines, run, start


def needs(engine: str) -> pytest.MarkDecorator:
    """Skip a test where an engine's library is not installed."""
    library = engines.ENGINES[engine].library
    there = not library or importlib.util.find_spec(library) is not None
    return pytest.mark.skipif(not there, reason=f"{library} is not installed (the extra {engine})")


def wait_for(what: Callable[[], Any], seconds: float = 180.0) -> bool:
    """Return whether something becomes true."""
    limit = time.monotonic() + seconds
    while not what() and time.monotonic() < limit:
        time.sleep(0.05)
    return bool(what())


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # Where nobody collects what orphans leave.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def gone(folder: Path) -> bool:
    """Return whether all other processes that opened the work end soon."""
    others = {int(process) for process in Play(folder).noted("process")} - {os.getpid()}
    return bool(others) and wait_for(lambda: not any(map(lives, others)), 30)


def finish(done: list[str], results: Iterable[tuple[Act, Any]]) -> None:
    """Append what is finished, also before an error."""
    for task, _ in results:
        done.append(task.does)


def keys(found: list[dict[str, Any]]) -> list[str]:
    return sorted(one["key"] for one in found)


def test_one_job_runs_here_in_order_and_as_if_its_lines_had_been_in_a_file(tmp_path: Path) -> None:
    progress: list[tuple[str, float]] = []
    before = torch.get_num_threads()
    report = lambda task, done: progress.append((task.does, done))  # noqa: E731
    results = list(run_tasks(Play(tmp_path), acts(*"cab"), tmp_path, threads=before + 2, progress=report))
    assert [(task.does, line) for task, line in results] == [
        (name, {"does": name, "pair": [1, 2], "threads": before + 2, "process": os.getpid()}) for name in "cab"
    ]
    assert progress == [(name, 0.5) for name in "cab"]
    assert torch.get_num_threads() == before
    assert not (tmp_path / "workers").exists()
    # What was opened already is used.
    (result,) = run_tasks(Play(tmp_path / "none"), acts("a"), tmp_path, do=lambda task, report: {"own": task.does})
    assert result == (Act("a"), {"own": "a"})


def test_libraries_of_clusters_are_imported_where_an_engine_starts() -> None:
    code = (
        "import sys, tnadapt.finetune, paper.command; from tnadapt.cli import app; "
        "tnadapt.finetune.open_engine('local'); "
        "print([name for name in ('ray', 'submitit', 'cloudpickle') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(("engine", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_library_is_named_with_its_extra(engine: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = f"engine {engine} needs {library}, which is not installed: pip install 'tnadapt[{engine}]'"
    with pytest.raises(tna.TnadaptError, match=re.escape(message)):
        open_engine(engine)


@pytest.mark.parametrize(
    "engine", [pytest.param("ray", marks=needs("ray")), pytest.param("slurm", marks=needs("slurm"))]
)
def test_a_clusters_engine_has_options_and_room(engine: str) -> None:
    assert open_engine(engine).capacity == open_engine(engine, 0).capacity == 1000
    assert open_engine(engine, 7).capacity == 7
    assert open_engine(engine, options={"cpus": "4"}).threads(None, 9) == 4
    assert open_engine(engine, options={"cpus": "4"}).threads(1, 9) == 1
    with pytest.raises(tna.TnadaptError, match=f"engine {engine} has no option 'gpu'; it has .*cpus, gpus"):
        open_engine(engine, options={"gpu": "1"})
    with pytest.raises(
        tna.TnadaptError, match=f"option cpus of engine {engine} must be a number of at least 0; got '-1'"
    ):
        open_engine(engine, options={"cpus": "-1"}).threads(None, 1)
    assert all(engines.engine_options(engine).values())
    assert open_engine(engine).device(None) == open_engine(engine, options={"gpus": "0"}).device(None) == "cpu"
    assert open_engine(engine, options={"gpus": "1"}).device(None) == "cuda"
    assert open_engine(engine).device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("jobs", "light", "expected"),
    [(None, False, 1), (None, True, 1), (0, False, 1), (0, True, None), (3, False, 3), (3, True, 3)],
)
def test_how_many_run_on_this_machine(jobs: int | None, light: bool, expected: int | None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    engine = open_engine("local", jobs, light=light)
    assert engine.jobs == engine.capacity == (expected or cores)
    # What is left when "run the same command again" is followed may kill its process: not this one, if jobs were asked.
    assert engine.here(1) == (jobs != 3)
    assert engine.here(2) == (engine.jobs < 2)
    assert engine.device("cuda") is None, "it is looked for"
    assert engine.threads(5, 7) == 5
    assert engine.threads(None, 1) == torch.get_num_threads()
    assert engine.threads(None, 7) == max(1, torch.get_num_threads() // engine.jobs)


# -- Lines that nobody has read --------------------------------------------------------------------


def leave(folder: Path, study: str = "") -> Path:
    """Leave what a program leaves that is killed when two of its workers have finished two tasks each."""
    run = folder / "workers" / ("0123456789abcdef" * 2)
    run.mkdir(parents=True)
    (folder / "workers" / "current.json").write_text(json.dumps({"study": study, "run": run.name}))
    for worker, names in enumerate(("ab", "cd")):
        text = "".join(json.dumps({"key": f"{name}/0", "line": {"was": name}}) + "\n" for name in names)
        (run / f"worker-{worker}.jsonl").write_text(text)
    (run / "progress-1234").write_text("0.5\n")
    return run


def words(results: Any) -> dict[str, str]:
    return {task.does: line.get("was", "new") for task, line in results}


#: Steps after a program was killed: the tasks asked for, those known to be finished, those that are run now, and how
#: many files of workers are left.
STEPS = {
    "what workers had finished is not run again": [("bxdac", "", "x", 0)],
    "lines that nobody has asked for yet are kept": [("adx", "", "x", 1), ("ca", "", "a", 1), ("b", "", "", 0)],
    "lines that a killed program had read are deleted": [("cx", "abd", "x", 0)],
    "files of a program that was killed at its end are deleted": [("", "abcd", "", 0)],
}


@pytest.mark.law("killed-sweep")
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_lines_of_a_killed_program_are_used_once(steps: list[tuple[str, str, str, int]], tmp_path: Path) -> None:
    leave(tmp_path)
    for asked, known, new, files in steps:
        results = run_tasks(Play(tmp_path), [Act(name) for name in asked], tmp_path, known=[f"{k}/0" for k in known])
        assert words(results) == {name: "new" if name in new else name for name in asked}
        assert len(list(tmp_path.glob("workers/*/worker-*.jsonl"))) == files
        assert (tmp_path / "workers").exists() == bool(files)
    assert Play(tmp_path).noted("begun") == sorted(f"{name}/0" for _, _, new, _ in steps for name in new)


@pytest.mark.law("killed-sweep")
def test_who_stops_reading_loses_none_of_them(tmp_path: Path) -> None:
    leave(tmp_path)
    with contextlib.closing(run_tasks(Play(tmp_path), [Act("a"), Act("b")], tmp_path)) as results:
        assert next(results) == (Act("a"), {"was": "a"})
    assert words(run_tasks(Play(tmp_path), [Act("b")], tmp_path)) == {"b": "b"}


@pytest.mark.law("killed-sweep")
def test_files_of_jobs_that_nobody_has_asked_for_yet_are_kept(tmp_path: Path) -> None:
    run = leave(tmp_path)
    (run / "slurm").mkdir()
    (run / "slurm" / "jobs.jsonl").write_text('{"key": "later/0", "job": "77"}\n')
    known = [Act(name).key for name in "abcd"]
    assert not list(run_tasks(Play(tmp_path), [], tmp_path, known=known))
    assert (run / "slurm" / "jobs.jsonl").exists()
    assert not list(run.glob("worker-*")), "they have been read"
    assert not list(run_tasks(Play(tmp_path), [], tmp_path, known=[*known, "later/0"]))
    assert not (tmp_path / "workers").exists()


@pytest.mark.law("killed-sweep")
def test_a_line_being_written_while_others_are_deleted_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = leave(tmp_path)
    late = run / "worker-late.jsonl"
    late.write_text('{"key": "late/0", ')
    read = run_folder.undamaged_lines

    def write(path: Path) -> Iterable[dict[str, Any]]:
        lines_before = list(read(path))
        if path == late:
            late.write_text('{"key": "late/0", "line": {"was": "late"}}\n')
            (run / "worker-later.jsonl").write_text('{"key": "later/0", "line": {"was": "later"}}\n')
        return lines_before

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "undamaged_lines", write)
        run_folder.RunFolder(tmp_path, "").forget({"a/0"})
    names = ("b", "late", "later")
    assert words(run_tasks(Play(tmp_path), [Act(name) for name in names], tmp_path)) == {name: name for name in names}


def test_lines_of_another_study_are_discarded_and_nothing_else(tmp_path: Path) -> None:
    leave(tmp_path / "other", "one")
    assert words(run_tasks(Play(tmp_path), [Act("a")], tmp_path / "other", study="other")) == {"a": "new"}
    assert not (tmp_path / "other" / "workers").exists()
    run = leave(tmp_path)
    (tmp_path / "workers" / "precious").write_text("mine")
    for _ in range(2):
        engines.discard(tmp_path)
        assert not run.exists()
        assert [path.name for path in (tmp_path / "workers").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"study": "", "run": 5}', '{"study": "", "run": "../../precious"}', "[" * 9999]
)
def test_a_damaged_note_leads_nowhere(content: str, tmp_path: Path) -> None:
    run = leave(tmp_path / "study")
    (tmp_path / "precious").mkdir()
    (tmp_path / "study" / "workers" / "current.json").write_text(content)
    assert words(run_tasks(Play(tmp_path), [Act("a")], tmp_path / "study")) == {"a": "new"}
    assert (tmp_path / "precious").is_dir()
    assert run.is_dir()


@pytest.mark.law("killed-sweep")
@given(cut=st.integers(0, 200), junk=st.binary(max_size=20))
def test_whole_lines_of_a_cut_file_count(cut: int, junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = leave(folder) / "worker-0.jsonl"
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole + junk.replace(b"\n", b""))
    kept = [name for name in "ab" if f'{{"key": "{name}/0", "line": {{"was": "{name}"}}}}\n'.encode() in whole]
    results = words(run_tasks(Play(folder), [Act(name) for name in "abcd"], folder))
    assert results == {name: name if name in [*kept, "c", "d"] else "new" for name in "abcd"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("")
    with pytest.raises(tna.FileError, match=r"cannot write to .*workers.*; give another folder"):
        list(run_tasks(Play(tmp_path), acts("a", "b"), tmp_path, jobs=2))


# -- An engine of one's own ------------------------------------------------------------------------


class Crowded(Engine):
    """Runs all calls here, at most two at a time, the last one first."""

    name = "crowded"
    known: ClassVar[Mapping[str, str]] = {"cpus": "cores"}

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.most = 0
        self.closed = False

    def threads(self, wanted: int | None, tasks: int) -> int:
        return wanted or int(self.number("cpus", 1))

    @property
    def capacity(self) -> int:
        return 2

    def start(self, folder: Path, threads: int) -> Started:
        return _Here(self)

    def advice(self, folder: Path) -> str:
        return "use larger machines"


class _Here(Started):
    def __init__(self, engine: Crowded) -> None:
        self.engine = engine
        self.calls: list[Any] = []

    def submit(self, calls: Any) -> None:
        self.calls += calls
        self.engine.most = max(self.engine.most, len(self.calls))

    def wait(self, seconds: float) -> list[tuple[str, Any]]:
        call = self.calls.pop()
        if call.task.does.startswith("lost"):
            if call.task.does == "lost after its line":
                engines.run_call(call)
            return [(call.task.key, engines.Died("out of memory"))]
        return [(call.task.key, engines.run_call(call))]

    def close(self) -> None:
        self.engine.closed = True


def test_a_registered_engine_is_opened_by_its_name_and_runs_the_tasks(tmp_path: Path) -> None:
    try:
        engines.register_engine(Crowded)
        engine: Any = open_engine("crowded", 2, {"cpus": "2"})
        results = list(run_tasks(Play(tmp_path), acts(*"abcde"), tmp_path, engine=engine))
        assert sorted(task.does for task, _ in results) == list("abcde")
        assert {line["threads"] for _, line in results} == {2}
        assert (type(engine), engine.most, engine.closed) == (Crowded, 2, True)
        assert not (tmp_path / "workers").exists()
        with pytest.raises(tna.TnadaptError, match="engine crowded has no option 'gpus'; it has cpus"):
            open_engine("crowded", options={"gpus": "1"})
        assert tna.register_engine is engines.register_engine
        for wrong, message in (
            (type("Mine", (Engine,), {"name": "ray"}), "engine 'ray' is built in and cannot be replaced"),
            (type("Mine", (Engine,), {}), "the name of an engine must consist of .* lower-case letters"),
            (Play, "an engine must be a class that inherits from tnadapt.finetune.engines.Engine; got"),
        ):
            with pytest.raises(tna.ConfigError, match=message):
                engines.register_engine(wrong)
    finally:
        forget_registered()
    with pytest.raises(tna.TnadaptError, match="no engine 'crowded'; expected one of local, ray, slurm"):
        open_engine("crowded")


@pytest.mark.parametrize(
    ("tasks", "settings", "error", "message"),
    [
        (acts("refuses"), {}, tna.TnadaptError, "^not like this$"),
        (acts("raises"), {}, Exception, "no luck"),
        (acts("a"), {"do": lambda task, report: {"set": {1}}}, TypeError, "not JSON serializable"),
        (
            [Act("a"), Act("b"), Act("a")], {}, tna.TnadaptError,
            "tasks need different keys; 2 have the key 'a/0'",
        ),
        (
            acts("a"), {"engine": Crowded(options={"cpus": "x"}), "threads": None}, tna.TnadaptError,
            "option cpus of engine crowded must be a number of at least 0; got 'x'",
        ),
    ],
)  # fmt: skip
def test_errors_in_this_process_are_what_they_are(
    tasks: list[Act], settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    with pytest.raises(error, match=message):
        list(run_tasks(Play(tmp_path), tasks, tmp_path, **{"threads": before + 1, **settings}))
    assert torch.get_num_threads() == before


def test_a_process_that_outlives_a_run_does_the_work_of_the_next(tmp_path: Path) -> None:
    leave(tmp_path)  # lines of other tasks keep the folder
    assert words(run_tasks(Play(tmp_path), acts("x"), tmp_path, engine=Crowded())) == {"x": "new"}
    (tmp_path / "other").mkdir()
    assert words(run_tasks(Play(tmp_path / "other"), acts("y"), tmp_path, engine=Crowded())) == {"y": "new"}
    assert Play(tmp_path).noted("begun") == ["x/0"]
    assert Play(tmp_path / "other").noted("begun") == ["y/0"]


def test_who_dies_after_its_line_was_written_has_finished(tmp_path: Path) -> None:
    (found,) = run_tasks(Play(tmp_path), acts("lost after its line"), tmp_path, engine=Crowded())
    assert found[1]["does"] == "lost after its line"
    assert len(Play(tmp_path).noted("begun")) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("lost", *"abcde"),
            r"lost/0 \(out of memory\); use larger machines\. What is finished is kept: run the same command again to "
            "continue",
        ),
        (("lost",) * 5, r"(lost/\d \(out of memory\)(, )?){3} and 2 more; .*"),
    ],
)
def test_who_always_dies_is_named_when_all_others_are_done(names: Sequence[str], message: str, tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(tna.TnadaptError, match=f"^a worker died 3 times while it ran {message}$"):
        finish(done, run_tasks(Play(tmp_path), acts(*names), tmp_path, engine=Crowded()))
    assert sorted(done) == [name for name in names if name != "lost"]


def test_who_always_dies_is_handed_over_on_request(tmp_path: Path) -> None:
    leave(tmp_path)
    lost: list[tuple[Act, str]] = []
    found = run_tasks(
        Play(tmp_path), acts("a", "lost"), tmp_path, engine=Crowded(), known=["b/0", "c/0", "d/0"],
        lost=lambda task, why: lost.append((task, why)),
    )  # fmt: skip
    assert words(found) == {"a": "a"}
    assert lost == [(Act("lost", 1), "a worker died 3 times: out of memory")]
    assert not (tmp_path / "workers").exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("refuses", tna.TnadaptError, "^not like this$"),
        ("raises", RuntimeError, r"(?s)a task failed \(raises/1\):\n.*UnpicklableError: no luck"),
    ],
)
def test_a_failure_waits_for_no_others(name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(error, match=message):
        finish(done, run_tasks(Play(tmp_path), acts("a", name, "b", "c"), tmp_path, engine=Crowded()))
    assert done == []
    # What is not known to be finished is in the workers' files, if it is.
    assert words(run_tasks(Play(tmp_path), acts("a"), tmp_path)) == {"a": "new"}


# -- Processes of this machine ---------------------------------------------------------------------


def test_each_of_two_processes_opens_the_work_once_and_does_several(tmp_path: Path) -> None:
    progress: list[tuple[str, float]] = []
    report = lambda task, done: progress.append((task.does, done))  # noqa: E731
    results = list(run_tasks(Play(tmp_path), acts(*"abcdef"), tmp_path, jobs=2, threads=3, progress=report))
    assert sorted(task.does for task, _ in results) == list("abcdef")
    processes = {line["process"] for _, line in results}
    assert os.getpid() not in processes
    assert len(processes) <= 2
    assert sorted(map(int, Play(tmp_path).noted("process"))) == sorted(processes)
    assert {line["threads"] for _, line in results} == {3}
    assert set(progress) == {(name, 0.5) for name in "abcdef"}
    assert not (tmp_path / "workers").exists()
    assert gone(tmp_path)


@pytest.mark.slow
def test_who_stops_listening_ends_those_that_run(tmp_path: Path) -> None:
    with contextlib.closing(run_tasks(Play(tmp_path), acts("a", "long", "long"), tmp_path, jobs=2)) as results:
        assert next(results)[0].does == "a"
    assert gone(tmp_path)


@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_as_a_worker_starts_ends_it(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = futures.ProcessPoolExecutor.submit

    def submit(pool: futures.ProcessPoolExecutor, *call: Any) -> futures.Future[Any]:
        future = real(pool, *call)
        os.kill(os.getpid(), signal.SIGINT)
        return future

    ended = threading.Event()
    for _ in range(threads - 1):  # one that may hear of the signal
        threading.Thread(target=ended.wait, daemon=True).start()
    monkeypatch.setattr(futures.ProcessPoolExecutor, "submit", submit)
    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(Play(tmp_path), acts("naps", "naps"), tmp_path, jobs=2))
    assert time.monotonic() - began < 8
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is before
    ended.set()


# -- Every engine ----------------------------------------------------------------------------------

#: Each as it is without a cluster: Ray's is started on this machine, and submitit's jobs are processes of it.
OPTIONS = {"local": (), "ray": ("address=local",), "slurm": ("cluster=local",)}
EACH = [pytest.param(name, marks=needs(name)) for name in OPTIONS]


@pytest.mark.slow
@pytest.mark.law("killed-sweep")
@pytest.mark.parametrize("engine", in_depth(EACH, EACH[:2]))
def test_nothing_that_is_finished_is_lost_whatever_dies(engine: str, tmp_path: Path) -> None:
    names = ("a", "waits", "killed-once", "killed")
    with start(tmp_path, engine, *names[:-1], options=OPTIONS[engine]) as process:
        # Stopped, it cannot read what its workers write.
        assert wait_for(lambda: Play(tmp_path).noted("begun"))
        os.kill(process.pid, signal.SIGSTOP)
        assert wait_for(lambda: list(tmp_path.glob("workers/*/worker-*.jsonl")))
        # Of Ray, the whole cluster.
        (os.killpg if engine == "ray" else os.kill)(process.pid, signal.SIGKILL)
    files = tmp_path.glob("workers/*/worker-*.jsonl")
    before = [json.loads(line)["key"] for path in files for line in path.read_text().splitlines()]
    assert before
    assert engine == "slurm" or gone(tmp_path)
    (tmp_path / "go").touch()
    done = run(tmp_path, engine, *names, options=OPTIONS[engine])
    assert done.returncode == 1
    ended = r"a worker died 3 times while it ran killed/3.*run the same command again to continue$"
    if engine == "local":
        ended = ended.replace(".*", r"; .*--jobs 1; .*if __name__ == '__main__'\. .*")
    assert re.search(ended, done.stderr.splitlines()[-1])
    own = lines((tmp_path / "own.jsonl").read_text())
    assert keys(own) == ["a/0", "killed-once/2", "waits/1"]
    assert {one["threads"] for one in own} == {3}
    assert 0.5 in {one["progress"] for one in own}
    begun = Play(tmp_path).noted("begun")
    assert [begun.count(key) for key in before] == [1] * len(before)
    assert begun.count("killed/3") == 3
    assert gone(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize(
    ("engine", "number"),
    in_depth(
        [("local", signal.SIGKILL), ("local", signal.SIGINT), ("ray", signal.SIGINT), ("slurm", signal.SIGINT)],
        [("local", signal.SIGKILL)],
    ),
)
def test_a_killed_or_interrupted_parent_leaves_no_worker(engine: str, number: signal.Signals, tmp_path: Path) -> None:
    with start(tmp_path, engine, "long", "long", options=OPTIONS[engine]) as process:
        assert wait_for(lambda: len(Play(tmp_path).noted("begun")) == 2)
        os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
        _, told = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert told.splitlines()[-1] == "KeyboardInterrupt"
        # Python forgets that it was interrupted if code is compiled at exit, as torch does where tabulate is installed.
        assert process.returncode in (-signal.SIGINT, 1)
    else:
        assert process.returncode == -number
    assert gone(tmp_path)


# -- Ray -------------------------------------------------------------------------------------------


@needs("ray")
def test_ray_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**given: Any) -> None:
        asked.append(given["address"])
        raise ConnectionError("could not find\nany")

    asked: list[str | None] = []
    monkeypatch.setattr(ray, "init", init)
    hint = "; one that wants a token needs RAY_AUTH_MODE=token, and the option address=local starts a new one$"
    for options, variable, where in (
        ({"address": "ray.example:6379"}, "", r"at 'ray\.example:6379': could not find"),
        ({}, "another:1", "at 'another:1': could not find"),
        ({}, "", "where ray start has left its address: .*"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", variable) if variable else monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(tna.TnadaptError, match=f"^no Ray cluster {where}{hint}"):
            list(run_tasks(Play(tmp_path), acts("a"), tmp_path, engine="ray", options=options))
    assert asked == ["ray.example:6379", "another:1", None]


@pytest.mark.slow
@long_only  # Ray takes half a minute to find out
@needs("ray")
@pytest.mark.law("killed-sweep")
def test_a_cluster_of_ray_that_ends_is_named_and_loses_nothing(tmp_path: Path) -> None:
    import psutil

    names, options = ("a", "waits", "waits"), ("address=local",)
    with start(tmp_path, "ray", *names, options=options) as process:
        assert wait_for(lambda: len(Play(tmp_path).noted("begun")) == 3)
        (node,) = (one for one in psutil.Process(process.pid).children() if one.name() == "raylet")
        node.kill()
        for worker in Play(tmp_path).noted("process"):  # those that run a task would go on
            os.kill(int(worker), signal.SIGKILL)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert told.splitlines()[-1].endswith(
        "the Ray cluster has ended (The task's local raylet died. Check raylet.out for more information.). What is "
        "finished is kept: run the same command again to continue"
    )
    assert gone(tmp_path)
    (tmp_path / "go").touch()
    done = run(tmp_path, "ray", *names, options=options)
    assert done.returncode == 0, done.stderr
    assert keys(lines((tmp_path / "own.jsonl").read_text())) == ["a/0", "waits/1", "waits/2"]
    assert Play(tmp_path).noted("begun") == ["a/0", *["waits/1"] * 2, *["waits/2"] * 2]


@needs("ray")
def test_a_new_cluster_on_which_no_task_would_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    told: list[Any] = []
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr(ray, "init", lambda **given: told.append((given, os.environ["RAY_USAGE_STATS_ENABLED"])))
    monkeypatch.setattr(ray, "shutdown", lambda: told.append("ended"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    options = {"address": "local", "gpus": "0.5"}
    with pytest.raises(tna.TnadaptError, match=r"^this machine's Ray cluster has 0 GPUs, and each task needs 0\.5$"):
        list(run_tasks(Play(tmp_path), acts("a"), tmp_path, engine="ray", options=options))
    (given, usage), ended = told
    assert (given["num_cpus"], usage, ended) == (max(os.cpu_count() or 1, 1), "0", "ended")
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


# -- Slurm -----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put Slurm's commands on the path; return the folder with what they did."""
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "slurm"


@needs("slurm")
def test_slurm_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for options, message in (({}, 'Could not detect "srun"'), ({"cluster": "moon"}, ".* executor named moon")):
        with pytest.raises(tna.TnadaptError, match=f"^engine slurm cannot start: {message}"):
            list(run_tasks(Play(tmp_path), acts("a"), tmp_path, engine="slurm", options=options))


def slurm_jobs(folder: Path, submitted: Callable[[list[Any]], None] = lambda calls: None) -> Any:
    """Return the jobs of Slurm of a program, which is told of the calls that are submitted; none ends."""

    def map_array(run_job: object, calls: list[Any]) -> list[Any]:
        submitted(calls)
        return [SimpleNamespace(job_id=f"100_{index}", done=lambda: False) for index in range(len(calls))]

    folder.mkdir(exist_ok=True)
    return slurm_engine._SlurmJobs(SimpleNamespace(map_array=map_array), folder, "run")


def call_of(folder: Path, task: Act = Act("a")) -> engines.TaskCall:  # noqa: B008  # it cannot be changed
    return engines.TaskCall(folder, str(folder), Play(folder), task, 1, "run")


@pytest.mark.slow
@needs("slurm")
@pytest.mark.law("killed-sweep")
def test_jobs_of_slurm_are_an_array_with_the_options_and_go_on_without_the_program(tmp_path: Path, slurm: Path) -> None:
    names, options = ("waits", "waits", "a"), ("partition=gpu", "gpus=1", "time=60", "mem=4GB", "setup=export THIS=1")
    with start(tmp_path, "slurm", *names, jobs=0, options=options) as process:
        assert wait_for(lambda: len(Play(tmp_path).noted("begun")) == 3)
        os.kill(process.pid, signal.SIGKILL)
    script = (slurm / "script-100").read_text()
    for line in ("partition=gpu", "gpus-per-node=1", "time=60", "mem=4GB", "cpus-per-task=3", "array=0-2%3"):
        assert f"#SBATCH --{line}\n" in script
    assert "\nexport THIS=1\n" in script
    with start(tmp_path, "slurm", *names, jobs=0, options=options) as process:
        # It waits for the jobs that there are.
        assert wait_for(
            lambda: "a/2" in (tmp_path / "own.jsonl").read_text() if (tmp_path / "own.jsonl").exists() else 0
        )
        (tmp_path / "go").touch()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert keys(lines((tmp_path / "own.jsonl").read_text())) == ["a/2", "waits/0", "waits/1"]
    assert Play(tmp_path).noted("begun") == ["a/2", "waits/0", "waits/1"], "none was begun twice"
    assert not (slurm / "script-101").exists()
    assert not (tmp_path / "workers").exists()


@needs("slurm")
def test_a_job_that_reaches_its_time_limit_has_died(tmp_path: Path) -> None:
    import submitit

    def requeue(number: int, frame: object) -> None:  # submitit's own handler
        raise submitit.core.utils.UncompletedJobError("time limit")

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        assert slurm_engine._run_job(call_of(tmp_path, Act("clings"))) == engines.Died("time limit")
    finally:
        signal.signal(signal.SIGUSR2, before)
    advice = f"the logs are in {tmp_path / 'slurm'}; the options time and mem give jobs more of both"
    assert open_engine("slurm").advice(tmp_path) == advice


@needs("slurm")
def test_jobs_of_slurm_are_submitted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(slurm_engine, "_PERIOD", 0.3)
    started = slurm_jobs(tmp_path / "slurm", lambda calls: sizes.append(len(calls)))
    for task in acts("a", "b", "c"):
        started.submit([call_of(tmp_path, task)])
    assert sizes == [1], "one command may take seconds"
    time.sleep(0.3)
    assert not list(started.wait(0))
    assert sizes == [1, 2]
    assert [one["key"] for one in lines((tmp_path / "slurm" / "jobs.jsonl").read_text())] == ["a/0", "b/1", "c/2"]


def adopting(slurm: Path, folder: Path, **state: str) -> tuple[Any, list[Any]]:
    """Return jobs of Slurm with one of an earlier program, 79, and the calls that are submitted all the same."""
    import submitit

    submitit.SlurmJob.watcher.clear()
    folder.mkdir(exist_ok=True)
    (folder / "jobs.jsonl").write_text('{"key": "a/0", "job": "79"}\n')
    for name, content in state.items():
        (slurm / f"{name}-79").write_text(content)
    submitted: list[Any] = []
    started = slurm_jobs(folder, submitted.extend)
    started.submit([call_of(folder)])
    return started, submitted


@needs("slurm")
@pytest.mark.parametrize(
    ("state", "result", "again"),
    [
        ({"job": "1"}, None, False), ({"job": "1", "suspended": ""}, None, False),
        ({"job": "1", "ended": "1"}, None, True), ({}, None, True),
        ({}, engines.Finished({"does": "a"}), False), ({}, engines.Failed("no luck", False), True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("accounting", [True, False])
def test_a_job_that_may_still_run_or_has_finished_is_not_submitted_again(
    state: dict[str, str], result: Any, again: bool, accounting: bool, tmp_path: Path, slurm: Path
) -> None:
    if not accounting:
        (slurm / "sacct-fails").touch()
    if result is not None:  # the cause of a failure may be fixed by now
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "79_0_result.pkl").write_bytes(pickle.dumps(("success", result)))
    started, submitted = adopting(slurm, tmp_path / "logs", **state)
    assert [call.task for call in submitted] == [Act("a")] * again
    with started:
        assert result is None or again or list(started.wait(0)) == [("a/0", result)]
    assert not (slurm / "calls-scancel").exists(), "others are of a later phase"


@needs("slurm")
@pytest.mark.parametrize("reason", ["OUT_OF_MEMORY", "time limit"])
def test_a_suspended_job_is_not_dead(reason: str, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_engine, "_LOOK", 0.0)
    started, submitted = adopting(slurm, tmp_path / "logs", job="1", suspended="")
    started.lag = 0.0
    assert not [*started.wait(0), *started.wait(0), *submitted]
    # It goes on, and dies then.
    (slurm / "suspended-79").unlink()
    (slurm / "ended-79").write_text("1")
    if reason == "time limit":  # which the job itself says
        (tmp_path / "logs" / "79_0_result.pkl").write_bytes(pickle.dumps(("success", engines.Died(reason))))
    assert [*started.wait(0), *started.wait(0)] == [("a/0", engines.Died(f"job 79: {reason}"))]


@needs("slurm")
@pytest.mark.usefixtures("keyboard")
def test_an_interrupt_while_jobs_are_submitted_waits_until_they_are_noted(tmp_path: Path, slurm: Path) -> None:
    interrupted = slurm_jobs(tmp_path / "logs", lambda calls: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), interrupted as started:
        started.submit([call_of(tmp_path)])
    assert lines((tmp_path / "logs" / "jobs.jsonl").read_text()) == [{"key": "a/0", "job": "100_0"}]
    assert len((slurm / "calls-scancel").read_text().splitlines()) == 1


SBATCH = "sbatch: error: Batch job submission failed: "


@needs("slurm")
@pytest.mark.law("killed-sweep")
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    ("error", "answer", "times", "shown"),
    [
        ("FailedJobError", SBATCH + "Socket timed out on send/recv operation", 3, ""),
        ("FailedJobError", SBATCH + "QOSMaxSubmitJobPerUserLimit", 6, SBATCH + "QOSMaxSubmitJobPerUserLimit"),
        ("FailedJobError", SBATCH + "Invalid account", 1, SBATCH + "Invalid account"),
        ("FailedSubmissionError", 'Could not make sense of sbatch output "hm"\nJob instance …', 1, '.* output "hm"'),
    ],
)
def test_a_job_that_slurm_does_not_take_is_submitted_later_or_its_answer_shown(
    error: str, answer: str, times: int, shown: str, running: bool, tmp_path: Path, slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import submitit

    def submitted(calls: list[Any]) -> None:
        attempts.append(len(calls))
        if len(attempts) <= times:
            raise getattr(submitit.core.utils, error)(answer)

    def attempt() -> None:
        with started:
            started.submit([call_of(tmp_path)])
            for _ in range(times):
                assert not list(started.wait(0))

    attempts: list[int] = []
    monkeypatch.setattr(slurm_engine, "_PERIOD", 0.0)
    started = slurm_jobs(tmp_path / "logs", submitted)
    if running:
        started.jobs["b/0"] = SimpleNamespace(job_id="99", done=lambda: False)
    if not shown:
        attempt()
        assert attempts == [1] * (times + 1)
        return
    message = f"engine slurm cannot submit jobs: {shown}; look at its options, and at --jobs, the number that is queued"
    goes_on = "; jobs that run go on, and the same command finds them again" if running else ""
    with pytest.raises(tna.TnadaptError, match=f"^{message} at a time{goes_on}$"):
        attempt()
    assert attempts == [1] * times
    assert (slurm / "calls-scancel").exists() is not running


@pytest.mark.slow
@needs("slurm")
@pytest.mark.usefixtures("keyboard")
def test_an_interrupt_cancels_jobs_of_slurm(tmp_path: Path, slurm: Path) -> None:
    with start(tmp_path, "slurm", "long", "long", jobs=0) as process:
        assert wait_for(lambda: len(Play(tmp_path).noted("begun")) == 2)
        os.kill(process.pid, signal.SIGKILL)
    (slurm / "calls-sacct").unlink(missing_ok=True)
    # It asks for one of them alone.
    with start(tmp_path, "slurm", "long", jobs=0) as process:
        assert wait_for(lambda: (slurm / "calls-sacct").exists())
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert {path.name for path in slurm.glob("cancelled-*")} == {"cancelled-100_0", "cancelled-100_1"}
    assert len((slurm / "calls-scancel").read_text().splitlines()) == 1, "one command may take seconds"
    assert gone(tmp_path)

"""Several processes: DDP and FSDP2 train the same adapter as a single process, however they are started."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no Gloo", allow_module_level=True)
if sys.platform == "win32":
    pytest.skip("processes are started and stopped as POSIX does", allow_module_level=True)

import tnadapt as tna
import tnadapt.torch
from tests.support.depth import in_depth

from . import distributed_jobs as jobs
from .distributed_checks import CHECKS
from .distributed_main import DEATHS
from .loops import relative

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "distributed"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
JOBS = ["-m", f"{__package__}.distributed_main"]
TRAINER = all(importlib.util.find_spec(name) for name in ("accelerate", "transformers"))

pytestmark = pytest.mark.slow

# Two processes take jobs of each kind, and all in the long profile; four take fewer.
CONFIGS = in_depth(jobs.CONFIGS, ["default", "lora"])
TWO = in_depth(
    jobs.JOBS,
    [
        *(f"{how}-{config}" for how in ("ddp", "fsdp2") for config in ("default", "lora")),
        *("ddp-reentrant", "ddp-accumulate", "fsdp2-checkpoint", "fsdp2-mixed"),
    ],
)
FOUR = in_depth(["ddp-default", "ddp-lora", "fsdp2-default", "fsdp2-linear", "fsdp2-mixed"], ["fsdp2-mixed"])


def run(*commands: Sequence[Any], timeout: float = 600.0) -> list[str]:
    """Start these commands together, wait for them and return their output. No process outlives the call."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with contextlib.ExitStack() as stack:  # closes their pipes
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [str(part) for part in command], cwd=ROOT, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )
            for command in commands
        ]  # fmt: skip
        try:
            printed = [process.communicate(timeout=timeout)[0] for process in started]
        except subprocess.TimeoutExpired:
            states = [process.poll() for process in started]
            _end(started)
            told = "\n".join(process.communicate()[0] for process in started)
            pytest.fail(f"not done within {timeout:g} s; exit codes {states} (None is running):\n{told}")
        finally:
            _end(started)
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text
    return printed


def _end(started: Sequence[subprocess.Popen[str]]) -> None:
    """End the processes that are running."""
    for process in started:
        if process.poll() is None:
            # torchrun ends its workers when it is asked to end, and could not if it were killed.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.law("dead-process")
@pytest.mark.parametrize(
    ("how", "death", "world"),
    in_depth([("ddp", "killed", 2), ("fsdp2", "raises", 2), ("ddp", "raises", 4)], [("ddp", "killed", 2)]),
)
def test_a_process_that_dies_ends_the_job_with_a_message(tmp_path: Path, how: str, death: str, world: int) -> None:
    with pytest.raises(AssertionError) as ended:
        run([*TORCHRUN, "--standalone", "--nproc-per-node", world, *JOBS, tmp_path, f"{how}-{death}"], timeout=100.0)
    said = str(ended.value)
    assert DEATHS[death] in said
    assert f"rank      : {world - 1} (local_rank: {world - 1})" in said
    assert not list(tmp_path.glob("finished.*"))
    # Nobody is left, and what was saved before is whole.
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "dying").read_text()), 0)
    torch.manual_seed(0)  # the base of jobs.build
    model = jobs.Model(None)
    assert tna.torch.load(model, tmp_path / "adapter.safetensors").num_parameters


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of every job and check with two processes."""
    folder = tmp_path_factory.mktemp("two")
    trainer = ["trainer"] if TRAINER else []
    run([*TORCHRUN, "--standalone", "--nproc-per-node", 2, *JOBS, folder, *TWO, *CHECKS, *trainer])
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run([*TORCHRUN, "--standalone", "--nproc-per-node", 4, *JOBS, folder, *FOUR])
    return folder


def results(folder: Path, name: str, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *(pytest.param("two", name, marks=pytest.mark.law("two-processes")) for name in TWO),
        *(pytest.param("four", name, marks=pytest.mark.law("four-processes")) for name in FOUR),
    ],
)
def test_several_processes_train_as_one(folder: str, name: str, request: pytest.FixtureRequest) -> None:
    job = jobs.JOBS[name]
    losses, adapter, _ = jobs.train(job)
    ranks = results(request.getfixturevalue(folder), name, {"two": 2, "four": 4}[folder])
    assert len(set(losses)) == len(losses)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-6)
        assert rank["kept"]
        for array, tensor in ranks[0]["arrays"].items():
            assert torch.equal(rank["arrays"][array], tensor), array
    _, fresh = jobs.build(job)
    for array, tensor in adapter.arrays().items():
        assert relative(ranks[0]["arrays"][array], tensor) < 1e-6, array
        assert relative(fresh.arrays()[array], tensor) > 1e-4, array


@pytest.mark.law("distributed-save")
@pytest.mark.parametrize("name", TWO)
def test_the_file_is_that_of_one_process(two: Path, tmp_path: Path, name: str) -> None:
    once, twice = (two / f"{name}.{time}.safetensors" for time in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    if name.removeprefix("fsdp2-") in CONFIGS:  # sharded or replicated
        assert once.read_bytes() == (two / f"{name.replace('fsdp2', 'ddp')}.once.safetensors").read_bytes()
    _, alone, _ = jobs.train(jobs.JOBS[name])
    alone.save(tmp_path / "alone.safetensors")
    expected, found = tna.load(tmp_path / "alone.safetensors"), tna.load(once)
    for field in ("config", "targets", "base", "dtypes", "activation"):
        assert getattr(found, field) == getattr(expected, field), field
    for there, here in ((found.arrays, expected.arrays), (found.kept, expected.kept)):
        assert list(there) == list(here)
        for array in here:
            assert relative(torch.tensor(there[array]), torch.tensor(here[array])) < 1e-6, array
    model = jobs.Model()
    model.load_state_dict(jobs.build(jobs.JOBS[name])[0].state_dict(), strict=False)
    loaded = tnadapt.torch.load(model, once)
    for array, tensor in results(two, name, 2)[0]["arrays"].items():
        assert torch.equal(loaded.arrays()[array], tensor)


@pytest.mark.law("launchers")
@pytest.mark.skipif(not TRAINER, reason="transformers' Trainer is not installed")
def test_trainer_on_two_processes(two: Path, tmp_path: Path) -> None:
    losses, adapter = jobs.train_by_trainer(tmp_path)
    for rank in results(two, "trainer", 2):
        for array, tensor in adapter.arrays().items():
            assert relative(rank["arrays"][array], tensor) < 1e-6, array
    # Process 0 keeps the log, which is rounded to four digits.
    assert results(two, "trainer", 2)[0]["losses"] == pytest.approx(losses, rel=1e-3)


@pytest.mark.law("two-processes")
@pytest.mark.parametrize("check", CHECKS)
def test_several_processes(two: Path, check: str) -> None:
    for rank in results(two, check, 2):
        assert rank["error"] is None, rank["error"]


# -- The scripts of the documentation --------------------------------------------------------


def by_one_process(task: Any, shuffled: bool, start: Path | None, out: Path) -> tna.AdapterFile:
    """Return the adapter that the scripts train, trained by a simple loop."""
    model = task.pretrained_model()
    attach, load = tnadapt.torch.attach, tnadapt.torch.load
    adapter = attach(model, keep_trainable="head") if start is None else load(model, start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    data = task.Bars()
    order = torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0, seed=0, shuffle=shuffled)
    for epoch in range(2):
        order.set_epoch(epoch)
        for images, labels in torch.utils.data.DataLoader(data, 16, sampler=order):
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    adapter.save(out)
    return tna.load(out)


def is_like(found: tna.AdapterFile, expected: tna.AdapterFile) -> None:
    assert (found.config, found.targets, found.base) == (expected.config, expected.targets, expected.base)
    for there, here in ((found.arrays, expected.arrays), (found.kept, expected.kept)):
        for name in here:
            # AdamW divides by a gradient's size: where it is next to nothing, rounding decides.
            torch.testing.assert_close(torch.tensor(there[name]), torch.tensor(here[name]), rtol=0, atol=1e-5)


@pytest.mark.law("launchers")
@pytest.mark.parametrize(
    "launcher",
    in_depth(["torchrun", "torchrun on two machines", "accelerate"], ["torchrun on two machines", "accelerate"]),
)
def test_a_script_of_the_documentation_trains_as_one_process(launcher: str, tmp_path: Path) -> None:
    task = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "task.py")))
    start, out = None, tmp_path / "adapter.safetensors"
    arguments = ["--epochs", 2, "--out", out]
    if launcher == "torchrun":
        commands = [[*TORCHRUN, "--standalone", "--nproc-per-node", 2, EXAMPLES / "train.py", *arguments]]
    elif launcher == "accelerate":
        pytest.importorskip("accelerate")
        launch = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", free_port()),
        ]
        commands = [[*launch, EXAMPLES / "train_accelerate.py", *arguments]]
    else:
        start = tmp_path / "start.safetensors"
        tnadapt.torch.attach(task.pretrained_model(), tna.presets.lora(2), keep_trainable="head").save(start)
        # Not by --rdzv-backend c10d: there, a machine fails that still looks for newcomers when the first one is done.
        port = free_port()
        commands = [
            [
                *TORCHRUN,
                *("--nnodes", 2, "--node-rank", machine, "--nproc-per-node", 1),
                *("--master-addr", "localhost", "--master-port", port),
                *(EXAMPLES / "train.py", "--how", "fsdp2", "--adapter", start, *arguments),
            ]
            for machine in range(2)
        ]
    printed = run(*commands)
    assert "".join(printed).count("loss") == 2
    is_like(tna.load(out), by_one_process(task, launcher != "accelerate", start, tmp_path / "alone.safetensors"))

"""Each process of ``test_distributed.py`` runs this: ``torchrun -m tests.torch.distributed_main FOLDER NAME …``.

A name is that of a job or check, or ``ddp-killed``, ``ddp-raises`` and so on: jobs in which the last process dies.
"""

from __future__ import annotations

import datetime
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tnadapt.torch import Adapter

from .distributed_checks import CHECKS
from .distributed_jobs import JOBS, Job, batches, build, spread, train, train_by_trainer

DEATHS = {"killed": "Signal 9 (SIGKILL) received by PID", "raises": "the data of this process ended"}


def main(folder: Path, names: list[str]) -> None:
    """Run jobs and checks; every process writes its results, and process 0 also the adapters' files."""
    # Should the one that started it be killed, nothing is left behind.
    signal.alarm(300)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        for name in names:
            if name in CHECKS:
                found: dict[str, Any] = {"error": checked(CHECKS[name], folder)}
            elif name.rpartition("-")[2] in DEATHS:
                train_until_one_dies(folder, *name.split("-"))
                continue
            elif name == "trainer":
                losses, adapter = train_by_trainer(folder / name, world)
                found = {"losses": losses, "arrays": detached(adapter)}
            else:
                losses, adapter, kept = train(JOBS[name], rank, world)
                found = {"losses": losses, "kept": kept, "arrays": detached(adapter)}
                for time in ("once", "twice"):
                    adapter.save(folder / f"{name}.{time}.safetensors")
            torch.save(found, folder / f"{name}.{rank}.pt")
        dist.barrier()  # none takes its end of the connections down while another still works
    finally:
        dist.destroy_process_group()


def train_until_one_dies(folder: Path, how: str, death: str) -> None:
    """Train and save after every step; the last process dies in the second one."""
    rank, world, job = dist.get_rank(), dist.get_world_size(), Job(how)
    model, adapter = build(job)
    running = spread(job, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number, ((x, y),) in enumerate(batches(job)):
        if number == 1:
            dist.barrier()  # process 0 has written the file of the first step; the others do not wait for it in `save`
        if number == 1 and rank == world - 1:
            (folder / "dying").write_text(str(os.getpid()))
            if death == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(DEATHS[death])
        functional.cross_entropy(running(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.save(folder / "adapter.safetensors")
    (folder / f"finished.{rank}").touch()


def detached(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in adapter.arrays().items()}


def checked(check: Callable[..., None], folder: Path) -> str | None:
    """Return the error that a check raised."""
    try:
        check(folder) if inspect.signature(check).parameters else check()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    # DTensor's caches keep Gloo's threads past destroy_process_group. One that still lets go of a tensor while Python
    # ends aborts the process (https://github.com/pytorch/pytorch/issues/190489), so Python is not asked to end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

"""A job whose last process dies: ``torchrun -m tests.torch.distributed_dying FOLDER HOW {killed,raises}``."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional

from .distributed_jobs import Job, batches, build, spread


def main(folder: Path, how: str, death: str) -> None:
    """Train, save after every step, and die in the second one."""
    signal.alarm(120)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    job = Job(how)
    model, adapter = build(job)
    running = spread(job, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number, ((x, y),) in enumerate(batches(job)):
        if number == 1 and rank == world - 1:
            (folder / "dying").write_text(str(os.getpid()))
            if death == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the data of this process ended")
        functional.cross_entropy(running(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.save(folder / "adapter.safetensors")
    (folder / f"finished.{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

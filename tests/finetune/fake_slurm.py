"""Slurm's commands, as far as submitit uses them, with processes of this machine as jobs."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

STATE = "FAKE_SLURM"


def install(folder: Path) -> dict[str, str]:
    """Write the commands to a folder; return the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "sacct", "squeue", "scancel"):
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", STATE: str(folder)}


def sbatch(path: str) -> None:
    """Start all jobs of an array at once."""
    folder = Path(os.environ[STATE])
    text = Path(path).read_text()
    number = next(number for number in itertools.count(100) if not (folder / f"script-{number}").exists())
    (folder / f"script-{number}").write_text(text)
    array = re.search(r"--array='?0-(\d+)%", text)
    for index in range(int(array[1]) + 1) if array else [None]:
        job = str(number) if index is None else f"{number}_{index}"
        more = {} if index is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
        script = f"bash {path}; echo $? > {folder}/ended-{job}"
        process = subprocess.Popen(
            ["bash", "-c", script], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "SLURM_JOB_ID": job, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
                 "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", **more},
        )  # fmt: skip
        process.returncode = 0  # it outlives this command
        (folder / f"job-{job}").write_text(str(process.pid))
    print(f"Submitted batch job {number}")


def srun(*given: str) -> None:
    """Run a command with its output in files."""
    options = list(given)
    files = {}
    while options[0].startswith("--"):
        name = options.pop(0)
        if name != "--unbuffered":
            files[name] = options.pop(0)
    names = {"%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%j": "SLURM_JOB_ID", "%t": "SLURM_PROCID"}
    for stream, name in ((1, "--output"), (2, "--error")):
        path = re.sub("%[Aajt]", lambda found: os.environ[names[found[0]]], files[name])
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.execvp(options[0], options)


def jobs_of(number: str) -> list[str]:
    """Return the jobs that an array has had, or one that is none."""
    folder = Path(os.environ[STATE])
    found = [path for name in (number, f"{number}_*") for path in folder.glob(f"job-{name}")]
    return sorted(path.name.removeprefix("job-") for path in found)


def has(job: str, what: str) -> bool:
    return (Path(os.environ[STATE]) / f"{what}-{job}").exists()


def sacct(*given: str) -> None:
    """Print the states of jobs."""
    folder = Path(os.environ[STATE])
    if (folder / "sacct-fails").exists():
        sys.exit("sacct: error: Slurm accounting storage is disabled")
    print("JobID|State|NodeList")
    for job in itertools.chain(*(jobs_of(number) for name, number in itertools.pairwise(given) if name == "-j")):
        failed = has(job, "ended") and (folder / f"ended-{job}").read_text().strip() != "0"
        states = {
            "CANCELLED by 0": has(job, "cancelled"), "OUT_OF_MEMORY": failed, "SUSPENDED": has(job, "suspended"),
            "COMPLETED": has(job, "ended"), "RUNNING": True,
        }  # fmt: skip
        print(f"{job}|{next(state for state, is_so in states.items() if is_so)}|node1")


def squeue(*given: str) -> None:
    """Print the jobs of an array that have not ended."""
    jobs = jobs_of(given[given.index("--jobs") + 1])
    if not jobs:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print(*(job for job in jobs if not has(job, "ended") and not has(job, "cancelled")), sep="\n")


def scancel(option: str, name: str) -> None:
    """End the jobs with a name that still run."""
    folder = Path(os.environ[STATE])
    assert option == "--name"
    for script in folder.glob("script-*"):
        if f"#SBATCH --job-name={name}\n" in script.read_text():
            for job in jobs_of(script.name.removeprefix("script-")):
                if not has(job, "ended"):
                    (folder / f"cancelled-{job}").touch()
                    os.killpg(int((folder / f"job-{job}").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    with (Path(os.environ[STATE]) / f"calls-{command}").open("a") as file:
        print(*given, file=file)
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "squeue": squeue, "scancel": scancel}[command](*given)

"""The Slurm engine: tasks as Slurm jobs through submitit, which is imported when the engine starts."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from tnadapt.errors import TnadaptError
from tnadapt.finetune.results import undamaged_lines

from ._engine import NOTES, SHARE, Died, Ended, Engine, Failed, Finished, Started, TaskCall, interrupts_held, run_call

# Seconds until the file system of a cluster shows a new file on other machines.
_LAG = 15.0
# Seconds that local processes get to end after they were told to.
_PATIENCE = 10.0
# Seconds between two commands that submit jobs. A command may take seconds, so all waiting jobs are submitted together.
_PERIOD = 10.0
# How often Slurm may refuse jobs, with a doubling pause: five minutes often outlast a limit or a restart.
_REFUSALS = 6
# Submitit's default of five minutes would end most trainings.
_MINUTES = 240
# States of jobs that will, or may, give a result. UNKNOWN means that accounting gave no answer, perhaps only this time.
_ALIVE = frozenset(
    {"UNKNOWN", "PENDING", "CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "COMPLETING", "STAGE_OUT", "SUSPENDED",
     "STOPPED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "PREEMPTED"}
)  # fmt: skip
# Seconds until accounting is queried again about jobs that submitit considers finished.
_LOOK = 60.0
#: Options that submitit has under another name (integers), or with the prefix "slurm_" (text).
_NUMBERS = MappingProxyType({"time": "timeout_min", "gpus": "gpus_per_node", "cpus": "cpus_per_task"})
_TEXTS = ("partition", "account", "qos", "constraint", "gres", "mem", "exclude")


class SlurmEngine(Engine):
    """Arrays of jobs of Slurm, one job for each task."""

    name = "slurm"
    library = "submitit"
    extra = "slurm"
    period = 1.0
    known = MappingProxyType(
        {
            "time": f"limit of each job in minutes; {_MINUTES} by default",
            "cpus": "of each job; torch uses as many threads, unless the problem fixes their number",
            "gpus": "of each job",
            "mem": "of each job, such as 16GB",
            "partition": "of the cluster",
            "account": "to charge",
            "qos": "quality of service",
            "constraint": "on nodes",
            "gres": "generic resources, such as gpu:a100:1",
            "exclude": "nodes",
            "setup": "a shell command to run before each job, such as module load cuda",
            "cluster": "slurm; or local, for processes of this machine",
        }
    )

    def start(self, folder: Path, threads: int) -> Started:
        """Prepare to submit jobs.

        Raises
        ------
        TnadaptError
            If there is no Slurm, or submitit refuses an option.
        """
        import submitit

        cluster = self.options.get("cluster", "slurm")
        name = f"tnadapt-{folder.name}"
        parameters: dict[str, Any] = {"timeout_min": _MINUTES, "cpus_per_task": threads, "name": name}
        parameters |= {theirs: int(self.number(ours, 0)) for ours, theirs in _NUMBERS.items() if ours in self.options}
        parameters |= {f"slurm_{option}": self.options[option] for option in _TEXTS if option in self.options}
        if "setup" in self.options:
            parameters[f"{cluster}_setup"] = [self.options["setup"]]
        parameters["slurm_array_parallelism"] = self.capacity
        try:
            executor = submitit.AutoExecutor(folder=_logs(folder), cluster=cluster)
            executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, AssertionError) as error:
            raise TnadaptError(f"engine slurm cannot start: {str(error).splitlines()[0]}") from None
        return _SlurmJobs(executor, _logs(folder), name) if cluster == "slurm" else _Jobs(executor)

    def advice(self, folder: Path) -> str:
        """Return where to look, and what usually ends jobs."""
        return f"the logs are in {_logs(folder)}; the options time and mem give jobs more of both"


def _logs(folder: Path) -> Path:
    return folder / "slurm"


class _Jobs(Started):
    """Jobs of any submitit executor."""

    lag = 0.0

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.jobs: dict[str, Any] = {}
        self.pause = 0.0
        self.ended: dict[str, float] = {}

    def submit(self, calls: Sequence[TaskCall]) -> None:
        jobs = self.executor.map_array(_run_job, calls)
        self.jobs.update({call.task.key: job for call, job in zip(calls, jobs, strict=True)})

    def wait(self, seconds: float) -> Iterator[tuple[str, Ended]]:
        time.sleep(max(seconds, self.pause))
        began = time.monotonic()
        finished = {key: ended for key, job in self.jobs.items() if (ended := self._ended(key, job)) is not None}
        self.pause = (time.monotonic() - began) / SHARE
        for key, ended in finished.items():
            del self.jobs[key]
            yield key, ended

    def _ended(self, key: str, job: Any) -> Ended | None:
        if not job.done():
            return None
        if job.paths.result_pickle.exists():
            self.ended.pop(key, None)
            return _result(job)
        # It may have ended without a result, or the result cannot be seen yet.
        if self._lives(job) or time.monotonic() - self.ended.setdefault(key, time.monotonic()) < self.lag:
            return None
        del self.ended[key]
        return Died(f"job {job.job_id}: {job.state}")

    def _lives(self, job: Any) -> bool:
        """Return whether a job that submitit considers finished is still running."""
        return False

    def close(self) -> None:
        for job in self.jobs.values():
            job.cancel(check=False)
        limit = time.monotonic() + _PATIENCE
        while not all(job.done() for job in self.jobs.values()) and time.monotonic() < limit:
            time.sleep(0.05)


def _result(job: Any) -> Ended:
    """Return how the task of a job ended, given that the job has left a result."""
    try:
        ended: Ended = job.result()
    except Exception as error:  # the call could not be unpickled there
        return Failed(str(error), False)
    return Died(f"job {job.job_id}: {ended.reason}") if isinstance(ended, Died) else ended


def _state(job: Any) -> str:
    """Return the state of a job of Slurm, such as CANCELLED for "CANCELLED by 1000"."""
    return str(job.state).upper().partition(" ")[0]


def _queued(number: str) -> set[str] | None:
    """Return the jobs of an array that have not ended, or None if Slurm cannot tell at the moment."""
    command = ["squeue", "--noheader", "--array", "--format", "%i", "--jobs", number]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    if done.returncode:  # as for numbers that it has forgotten
        return set() if "Invalid job id" in done.stderr else None
    return set(done.stdout.split())


class _SlurmJobs(_Jobs):
    """Jobs of Slurm, which outlive the program that submits them: their numbers are noted in a file.

    They have a name that no other run has.
    """

    lag = _LAG

    def __init__(self, executor: Any, folder: Path, name: str) -> None:
        import submitit

        super().__init__(executor)
        self.submitit, self.name = submitit, name
        self.waiting: list[TaskCall] = []
        self.next, self.refusals = time.monotonic(), 0
        self.go_on = False  # whether jobs keep running when this program ends
        self.looked = float("-inf")
        self.queued = functools.cache(_queued)
        self.notes = folder / NOTES
        # All are registered before the first query, so that one command answers for all.
        self.earlier = {
            note["key"]: submitit.SlurmJob(folder=folder, job_id=note["job"])
            for note in undamaged_lines(self.notes)
            if {"key", "job"} <= note.keys()
        }

    def submit(self, calls: Sequence[TaskCall]) -> None:
        self.waiting += [call for call in calls if not self._goes_on(call.task.key)]
        self._submit_waiting()

    def wait(self, seconds: float) -> Iterator[tuple[str, Ended]]:
        self._submit_waiting()
        yield from super().wait(seconds)

    def _submit_waiting(self) -> None:
        """Submit all waiting jobs, unless it is too early for another command."""
        if not self.waiting or time.monotonic() < self.next:
            return
        try:
            with interrupts_held():
                super().submit(self.waiting)
                with open(self.notes, "ab", buffering=0) as file:
                    for key in (call.task.key for call in self.waiting):
                        file.write(json.dumps({"key": key, "job": self.jobs[key].job_id}).encode() + b"\n")
        except self.submitit.core.utils.FailedJobError as error:
            message = (str(error).strip().splitlines() or ["sbatch failed"])[-1]
            self._refused(message, "invalid" in message.lower())  # such as an account, a partition or a time
            return
        except self.submitit.core.utils.FailedSubmissionError as error:  # its output has no job number
            self._refused(str(error).splitlines()[0], True)
            return
        self.waiting, self.refusals = [], 0
        self.next = time.monotonic() + _PERIOD

    def _refused(self, message: str, final: bool) -> None:
        """Schedule another attempt, unless the refusal is final or there were too many."""
        self.refusals += 1
        self.next = time.monotonic() + _PERIOD * 2 ** (self.refusals - 1)
        if final or self.refusals == _REFUSALS:
            self.go_on = bool(self.jobs or self.earlier)
            goes_on = "; jobs that run go on, and the same command finds them again" if self.go_on else ""
            raise TnadaptError(
                f"engine slurm cannot submit jobs: {message}; look at its options, and at --jobs, the number that is "
                f"queued at a time{goes_on}"
            ) from None

    def _goes_on(self, key: str) -> bool:
        """Return whether an earlier program's job runs this task or has finished it, and if so wait for that job."""
        job = self.earlier.pop(key, None)
        if job is None:
            return False
        if job.paths.result_pickle.exists():
            goes_on = isinstance(_result(job), Finished)  # the cause of a failure may be fixed by now
        else:
            state = _state(job)
            goes_on = state in _ALIVE
            if state == "UNKNOWN":  # accounting does not know it, or cannot be asked
                queued = self.queued(job.job_id.partition("_")[0])
                goes_on = queued is None or job.job_id in queued
        if goes_on:
            self.jobs[key] = job
        return goes_on

    def _lives(self, job: Any) -> bool:
        if _state(job) not in _ALIVE:
            return False
        if time.monotonic() - self.looked > _LOOK:
            self.looked = time.monotonic()
            job.watcher.clear()  # otherwise submitit would not ask about it again
        return True

    def __exit__(self, *error: object) -> None:
        # Without an error, all requested jobs have ended; those of a later phase keep running.
        self.go_on = self.go_on or not any(error)
        super().__exit__(*error)

    def close(self) -> None:
        if not self.go_on:
            # One command for all jobs, also of earlier programs: it may take seconds. A second Ctrl-C does not stop it.
            subprocess.Popen(["scancel", "--name", self.name], start_new_session=True).wait()


# -- In a job ----------------------------------------------------------------------------------


class _TimeLimit(BaseException):
    """Raised before a job is killed; not an Exception, which a task or a library might catch."""


def _run_job(call: TaskCall) -> Ended:
    """Run a task in a job, where reaching the time limit does not count as an error of the task."""
    try:
        _raise_at_limit()
        return run_call(call)
    except _TimeLimit:
        return Died("time limit")


def _raise_at_limit() -> None:
    """Raise _TimeLimit where submitit's handler raises its own error, and still requeue preempted jobs."""
    import submitit

    number = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
    theirs: Any = signal.getsignal(number)

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            theirs(number, frame)
        except submitit.core.utils.UncompletedJobError:
            raise _TimeLimit from None

    if callable(theirs):
        signal.signal(number, handle)

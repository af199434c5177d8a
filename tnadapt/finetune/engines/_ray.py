"""The Ray engine: tasks on a Ray cluster, with Ray imported when the engine starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tnadapt.errors import TnadaptError, safe_repr

from ._engine import AGAIN, Died, Ended, Engine, Failed, Started, TaskCall, run_call

_USAGE = "RAY_USAGE_STATS_ENABLED"


class RayEngine(Engine):
    """Tasks of Ray: on the cluster that there is, else on one that is started on this machine."""

    name = "ray"
    library = extra = "ray"
    period = 0.25
    known = MappingProxyType(
        {
            "address": "of the cluster; by default RAY_ADDRESS, else that of ray start; local starts a new one",
            "cpus": "of each task; torch uses as many threads, unless the problem fixes their number",
            "gpus": "of each task, such as 1 or 0.25",
            "memory": "of each task, in GiB",
        }
    )

    def start(self, folder: Path, threads: int) -> Started:
        """Connect to a cluster, or start one.

        Raises
        ------
        TnadaptError
            If there is none at the given address.
        """
        needs = {"num_cpus": self.number("cpus", threads), "num_gpus": self.number("gpus", 0)}
        if memory := self.number("memory", 0):
            needs["memory"] = memory * 2**30
        return _Cluster(self.options.get("address"), needs, self.jobs)

    def advice(self, folder: Path) -> str:
        """Return where to look."""
        return "Ray's logs say why, and the option memory reserves memory"


class _Cluster(Started):
    def __init__(self, address: str | None, needs: dict[str, float], jobs: int) -> None:
        import ray

        self.ray = ray
        self.calls: dict[Any, str] = {}
        self.connected = not ray.is_initialized()  # otherwise the program connected, and will disconnect
        if self.connected:
            _connect(ray, address, needs, jobs)
        # Retries are left to run_tasks, which knows what is finished.
        self.remote = ray.remote(run_call).options(max_retries=0, **needs)

    def submit(self, calls: Sequence[TaskCall]) -> None:
        for call in calls:
            self.calls[self.remote.remote(call)] = call.task.key

    def wait(self, seconds: float) -> Iterator[tuple[str, Ended]]:
        ready, _ = self.ray.wait(list(self.calls), timeout=seconds)
        if ready:
            ready, _ = self.ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)
        for call in ready:
            yield self.calls.pop(call), self._ended(call)

    def _ended(self, call: Any) -> Ended:
        try:
            return self.ray.get(call)  # type: ignore[no-any-return]
        except self.ray.exceptions.RayTaskError as error:  # the call could not be unpickled there
            return Failed(str(error), False)
        except self.ray.exceptions.LocalRayletDiedError as error:  # this program's connection to the cluster
            raise TnadaptError(f"the Ray cluster has ended ({error}). {AGAIN}") from None
        except self.ray.exceptions.RayError as error:
            return Died(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def close(self) -> None:
        for call in self.calls:
            self.ray.cancel(call, force=True)
        if self.connected:
            self.ray.shutdown()


def _connect(ray: Any, address: str | None, needs: dict[str, float], jobs: int) -> None:
    """Connect to the cluster at an address or, without one, to the cluster of this machine or a new one."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    cluster = address or os.environ.get("RAY_ADDRESS")
    if cluster == "local":
        quiet["num_cpus"] = jobs * needs["num_cpus"] if jobs else max(os.cpu_count() or 1, needs["num_cpus"])
    if cluster in (None, "local"):
        quiet["include_dashboard"] = False
    # Without reports of usage, unless the user has decided about them.
    decided = _USAGE in os.environ
    os.environ.setdefault(_USAGE, "0")
    try:
        ray.init(address=cluster, **quiet)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"at {safe_repr(cluster)}" if cluster else "where ray start has left its address"
        raise TnadaptError(
            f"no Ray cluster {where}: {str(error).splitlines()[0]}; one that wants a token needs RAY_AUTH_MODE=token, "
            "and the option address=local starts a new one"
        ) from None
    finally:
        if not decided:
            del os.environ[_USAGE]
    if cluster in (None, "local"):  # other clusters may scale up on demand; on this one no task would ever start
        have = ray.cluster_resources()
        for need, word in ((needs["num_cpus"], "CPU"), (needs["num_gpus"], "GPU")):
            if need > have.get(word, 0):
                ray.shutdown()
                raise TnadaptError(
                    f"this machine's Ray cluster has {have.get(word, 0):g} {word}s, and each task needs {need:g}"
                )

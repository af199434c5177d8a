"""The engines by name."""

from __future__ import annotations

from collections.abc import Mapping

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError, safe_repr

from ._engine import Engine
from ._local import LocalEngine
from ._ray import RayEngine
from ._slurm import SlurmEngine

__all__ = ["ENGINES", "engine_options", "open_engine"]

ENGINES: Mapping[str, type[Engine]] = {engine.name: engine for engine in (LocalEngine, RayEngine, SlurmEngine)}


@checks_arguments
def open_engine(
    name: str, jobs: int | None = None, options: Mapping[str, str] | None = None, light: bool = False
) -> Engine:
    """Return an engine by name.

    Parameters
    ----------
    name : str
        ``local``: processes of this machine. ``ray``: a Ray cluster; the one that there is, else one that is started on
        this machine. ``slurm``: jobs of Slurm, through submitit.
    jobs : int, optional
        The largest number of parallel tasks; 0 for as many as can run: on this machine one, or one per core
        if the tasks are light. By default 1 on this machine, and 0 on a cluster.
    options : mapping of str to str, optional
        Settings of the engine: see :func:`engine_options`.
    light : bool
        Whether a task needs no more than one core.

    Raises
    ------
    TnadaptError
        If there is no such engine or option, or its library is not installed.

    Examples
    --------
    >>> open_engine("local", jobs=2).capacity
    2
    >>> open_engine("loca")
    Traceback (most recent call last):
    tnadapt.errors.TnadaptError: no engine 'loca'; expected one of local, ray, slurm
    """
    return _engine(name)(jobs, options, light)


def _engine(name: str) -> type[Engine]:
    if name not in ENGINES:
        raise TnadaptError(f"no engine {safe_repr(name)}; expected one of {', '.join(ENGINES)}")
    return ENGINES[name]


def engine_options(name: str) -> Mapping[str, str]:
    """Return the options of an engine, and what they mean.

    Examples
    --------
    >>> engine_options("ray")["gpus"]
    'of each task, such as 1 or 0.25'
    """
    return _engine(name).known

"""The engines by name."""

from __future__ import annotations

from collections.abc import Mapping

from tnadapt.errors import TnadaptError, safe_repr

from ._engine import Engine
from ._local import LocalEngine

__all__ = ["ENGINES", "open_engine"]

ENGINES: Mapping[str, type[Engine]] = {engine.name: engine for engine in (LocalEngine,)}


def open_engine(name: str, jobs: int = 0, options: Mapping[str, str] | None = None, light: bool = False) -> Engine:
    """Return an engine by name.

    Parameters
    ----------
    name : str
        ``local``: processes of this machine.
    jobs : int
        The largest number of parallel tasks; 0 for as many as there is room for. On this machine, that is one, or one
        per core if the tasks are light.
    options : mapping of str to str, optional
        Settings of the engine.
    light : bool
        Whether a task needs no more than one core.

    Raises
    ------
    TnadaptError
        If there is no such engine or option, or its library is not installed.

    Examples
    --------
    >>> open_engine("local", jobs=2).room
    2
    >>> open_engine("loca")
    Traceback (most recent call last):
    tnadapt.errors.TnadaptError: no engine 'loca'; expected one of local
    """
    if name not in ENGINES:
        raise TnadaptError(f"no engine {safe_repr(name)}; expected one of {', '.join(ENGINES)}")
    return ENGINES[name](jobs, options, light)

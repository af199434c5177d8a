"""Engines: where tasks run in parallel. :func:`run_tasks` runs any tasks on one of them.

An engine is a subclass of :class:`Engine` in a file of its own here, and a name in ``ENGINES``. Another package
registers its own class with :func:`register_engine`, or passes an object of it to :func:`run_tasks`.
"""

from ._engine import (
    Died,
    Do,
    Ended,
    Engine,
    Failed,
    Finished,
    Keyed,
    Started,
    TaskCall,
    Work,
    discard,
    run_call,
    threads,
)
from ._running import ENGINES, engine_options, open_engine, register_engine, run_tasks

__all__ = [
    "ENGINES",
    "Died",
    "Do",
    "Ended",
    "Engine",
    "Failed",
    "Finished",
    "Keyed",
    "Started",
    "TaskCall",
    "Work",
    "discard",
    "engine_options",
    "open_engine",
    "register_engine",
    "run_call",
    "run_tasks",
    "threads",
]

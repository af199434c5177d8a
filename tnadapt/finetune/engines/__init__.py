"""Engines: where tasks run in parallel. :func:`run_tasks` runs any tasks on one of them.

An engine is a subclass of :class:`Engine` in a file of its own here, and a name in ``ENGINES``; or pass an object of
your own class to :func:`run_tasks`.
"""

from ._engine import Engine, Started
from ._engine_registry import ENGINES, engine_options, open_engine
from ._run_folder import discard
from ._running import run_tasks
from ._task_call import Died, Ended, Failed, Finished, TaskCall, run_call
from ._work import Do, Keyed, Work

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
    "run_call",
    "run_tasks",
]

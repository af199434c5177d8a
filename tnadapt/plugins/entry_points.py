"""Entry points in the group ``tnadapt.plugins``, loaded when a name is first asked for that is not known.

An entry point names a function without arguments, which calls ``tnadapt.register_format`` and its relatives::

    [project.entry-points."tnadapt.plugins"]
    tensor-ring = "my_package:register"
"""

from __future__ import annotations

import functools
import importlib.metadata

__all__ = ["GROUP", "load_plugins"]

GROUP = "tnadapt.plugins"


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load every installed plug-in, once in a process.

    Returns
    -------
    tuple of str
        One sentence for each plug-in that failed to load: its name, its package, and the error. The others are
        registered; a plug-in that fails never prevents those, nor anything built in, from working.
    """
    failures = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:  # whatever another package raises
            package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
            failures.append(f"plug-in {entry.name!r} of {package} failed to load: {type(error).__name__}: {error}")
    return tuple(failures)

"""Entry points in the group ``tnadapt.plugins``, loaded when an unknown name is first looked up.

An entry point names a function without arguments that calls ``tnadapt.register_format`` or a similar function::

    [project.entry-points."tnadapt.plugins"]
    tensor-ring = "my_package:register"
"""

from __future__ import annotations

import functools

__all__ = ["GROUP", "load_plugins"]

GROUP = "tnadapt.plugins"


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load every installed plug-in, once per process.

    Returns
    -------
    tuple of str
        One sentence per plug-in that failed to load: its name, its package, and the error. A failing plug-in never
        prevents the others, or anything built in, from working.
    """
    import importlib.metadata  # brings along the parser of emails and more, and most programs need no plug-in

    failures = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:  # a plug-in may raise anything
            package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
            failures.append(f"plug-in {entry.name!r} of {package} failed to load: {type(error).__name__}: {error}")
    return tuple(failures)

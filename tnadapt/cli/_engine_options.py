"""Where parallel trainings run: the options of every command that trains."""

from __future__ import annotations

from collections.abc import Sequence

from tnadapt.errors import TnadaptError, safe_repr

__all__ = ["ENGINE_HELP", "ENGINE_OPTION_HELP", "engine_options"]

ENGINE_HELP = "Where parallel trainings run: local, ray (a Ray cluster) or slurm."
ENGINE_OPTION_HELP = "A setting of the engine, such as partition=gpu or gpus=1; repeat for more."


def engine_options(given: Sequence[str]) -> dict[str, str]:
    """Parse the options ``--engine-option``.

    Raises
    ------
    TnadaptError
        If one is not KEY=VALUE, or a key is given twice.

    Examples
    --------
    >>> engine_options(["partition=gpu", "setup=export A=1"])
    {'partition': 'gpu', 'setup': 'export A=1'}
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise TnadaptError(f"--engine-option takes KEY=VALUE; got {safe_repr(text)}")
        if name in found:
            raise TnadaptError(f"--engine-option {name} is given twice")
        found[name] = value
    return found

"""From what the user named to a problem: model and data, in one form."""

from __future__ import annotations

from collections.abc import Callable

from tnadapt.errors import TnadaptError

from ._digits import digits
from ._pretrained import pretrained
from .problem import Problem, Spec

__all__ = ["open_problem"]


def open_problem(spec: Spec, progress: Callable[[str, float], None] = lambda what, done: None) -> Problem:
    """Open the model and the data.

    Parameters
    ----------
    spec : Spec
    progress : callable
        Is told ``(what, fraction done)`` of what takes long.

    Returns
    -------
    Problem

    Raises
    ------
    TnadaptError
        If one of the two is missing, cannot be read, or does not go with the other.
    """
    if spec.model is None and spec.data is None:
        return digits(spec, progress)
    if spec.model is None or spec.data is None:
        given, other = ("--data", "--model") if spec.model is None else ("--model", "--data")
        raise TnadaptError(f"{given} needs {other}, too; with neither, the job is scikit-learn's digits")
    return pretrained(spec)

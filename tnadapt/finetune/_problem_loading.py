"""Opening of a problem: model and data as the user named them, in a common form."""

from __future__ import annotations

from collections.abc import Callable

from tnadapt.errors import TnadaptError

from ._digits import digits
from ._pretrained import pretrained
from ._specification import Spec
from .problem import Problem

__all__ = ["open_problem"]


def open_problem(spec: Spec, progress: Callable[[str, float], None] = lambda what, done: None) -> Problem:
    """Open the model and the data.

    Parameters
    ----------
    spec : Spec
    progress : callable
        Called with ``(what, fraction done)`` during long steps.

    Returns
    -------
    Problem

    Raises
    ------
    TnadaptError
        If one of the two is missing or cannot be read, or they do not fit together.
    """
    if spec.model is None and spec.data is None:
        return digits(spec, progress)
    if spec.model is None or spec.data is None:
        given, other = ("--data", "--model") if spec.model is None else ("--model", "--data")
        raise TnadaptError(f"{given} needs {other}, too; with neither, the data are scikit-learn's digits")
    return pretrained(spec)

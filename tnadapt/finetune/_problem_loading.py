"""Opening of a problem: model and data as the user named them, in a common form."""

from __future__ import annotations

from collections.abc import Callable

from tnadapt.argument_checks import checks_arguments

from ._digits import digits
from ._pretrained import pretrained
from ._specification import Spec
from .problem import Problem

__all__ = ["open_problem"]


@checks_arguments
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
    spec.check()
    return digits(spec, progress) if spec.model is None else pretrained(spec)

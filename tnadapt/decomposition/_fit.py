"""The result of a solver, and its stopping criteria."""

from __future__ import annotations

from typing import NamedTuple

from tnadapt.backends.backend import Array

from .optimality import Claim

__all__ = ["Fit", "Limits", "unwatched"]

Arrays = dict[str, Array]


def unwatched(iteration: int, error: float | None) -> None:
    """Ignore progress. A solver that is given this one computes no error that only progress would show."""


class Fit(NamedTuple):
    """Fitted arrays, and how they were computed.

    Attributes
    ----------
    arrays : dict of str to array
    optimal : bool or function that returns one
        Whether they are known to be the optimum.
    iterations : int
    method : str
        Short description of the method.
    """

    arrays: Arrays
    optimal: Claim
    iterations: int
    method: str


class Limits(NamedTuple):
    """Stopping criteria of an iteration.

    Attributes
    ----------
    tol : float
        Stop when a step reduces the relative error by no more than this.
    iterations : int
        Maximum number of iterations.
    """

    tol: float = 1e-6
    iterations: int = 100

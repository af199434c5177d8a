"""What a solver returns, and when it stops."""

from __future__ import annotations

from typing import NamedTuple

from tnadapt.backends.backend import Array

__all__ = ["Fit", "Limits"]

Arrays = dict[str, Array]


class Fit(NamedTuple):
    """Arrays, and how they came about.

    Attributes
    ----------
    arrays : dict of str to array
    optimal : bool
        Whether algebra says that no others come nearer.
    iterations : int
    method : str
        In a few words.
    """

    arrays: Arrays
    optimal: bool
    iterations: int
    method: str


class Limits(NamedTuple):
    """When an iteration ends.

    Attributes
    ----------
    tol : float
        At a step that makes the relative error smaller by no more.
    iterations : int
        After so many, in any case.
    """

    tol: float = 1e-6
    iterations: int = 100

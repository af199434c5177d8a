"""The smallest rank whose fit keeps to an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tnadapt.errors import ConfigError, ShapeError

from ._decomposed import Decomposed

__all__ = ["smallest_rank"]

D = TypeVar("D", bound=Decomposed)


def smallest_rank(fitted: Callable[[int], D], limit: float, most: int, shape: Sequence[int], init: Any = "svd") -> D:
    """Return the fit of the smallest rank that is found to keep to an error: doubling, then halving.

    Parameters
    ----------
    fitted : callable
        Returns the fit of a rank.
    limit : float
        The relative error that is allowed.
    most : int
        The rank that represents any tensor of the shape.
    shape : sequence of int
    init : object
        What the fits start from, which must be named.

    Raises
    ------
    ConfigError
        If a start is given, since it has one rank only.
    ShapeError
        If the fit of the largest rank has a larger error.
    """
    if not isinstance(init, str):
        raise ConfigError("max_error= tries several ranks: use init='svd' or 'random', or give rank=")
    low, rank, best = 0, 1, fitted(1)
    while (best.error or 0.0) > limit and rank < most:
        low, rank = rank, min(2 * rank, most)
        best = fitted(rank)
    if (best.error or 0.0) > limit:
        raise ShapeError(
            f"rank {rank}, which represents any tensor of shape {tuple(shape)}, was fitted with an error of "
            f"{best.error:.2g} only: allow a larger max_error, more max_iterations or more starts"
        )
    while rank - low > 1:
        middle = (low + rank) // 2
        found = fitted(middle)
        if (found.error or 0.0) <= limit:
            rank, best = middle, found
        else:
            low = middle
    return best

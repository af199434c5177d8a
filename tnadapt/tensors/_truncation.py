"""Truncation of ranks: by a number, or by an error that is allowed.

The Frobenius error of a sequence of truncations is at most the root of the sum of their squares, so each of n
truncations may lose ``max_error / sqrt(n)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.matrix_truncation import kept
from tnadapt.errors import ShapeError, safe_repr

from ._checks import integer_of

__all__ = ["error_limit", "inner_ranks", "ranks_of", "ring_ranks", "rounded_cores", "useful_rank"]


def error_limit(max_error: Any) -> float:
    """Return an allowed relative error; raise a ShapeError unless it is from 0 to below 1."""
    real = isinstance(max_error, (int, float, np.floating)) and not isinstance(max_error, bool)
    if not real or not 0.0 <= max_error < 1.0:
        raise ShapeError(f"max_error must be from 0 to below 1, a relative error; got {safe_repr(max_error)}")
    return float(max_error)


def _are_several(rank: Any) -> bool:
    """Return whether a rank is a sequence of ranks."""
    return isinstance(rank, (list, tuple)) or (isinstance(rank, np.ndarray) and rank.ndim == 1)


def ranks_of(rank: Any, count: int, what: str) -> list[int]:
    """Return one rank for each of ``count`` bonds or modes, from one number or a sequence of them."""
    if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool):
        return [integer_of("rank", rank, 1)] * count
    listed = list(rank) if _are_several(rank) else None
    if listed is None or len(listed) != count:
        raise ShapeError(f"rank must be a number or one for each of the {count} {what}; got {safe_repr(rank)}")
    return [integer_of(f"rank[{place}]", one, 1) for place, one in enumerate(listed)]


def inner_ranks(rank: Any, possible: Sequence[int]) -> list[int]:
    """Return the ranks of the bonds of a train.

    Parameters
    ----------
    rank : int or sequence of int
        One number is cut to what is possible. A sequence has one for each bond, with or without a 1 at both ends.
    possible : sequence of int
        The largest rank of each bond.

    Raises
    ------
    ShapeError
        If a rank of a sequence is above the possible.
    """
    listed = list(rank) if _are_several(rank) else rank
    if not isinstance(listed, list):
        return [min(one, most) for one, most in zip(ranks_of(listed, len(possible), "bonds"), possible, strict=True)]
    if len(listed) == len(possible) + 2 and (listed[0], listed[-1]) == (1, 1):
        listed = listed[1:-1]
    found = ranks_of(listed, len(possible), "bonds")
    for bond, (one, most) in enumerate(zip(found, possible, strict=True)):
        if one > most:
            raise ShapeError(f"rank {one} of bond {bond} is above {most}, the largest that is possible there")
    return found


def useful_rank(shape: Sequence[int]) -> int:
    """Return the rank with which every tensor of a shape is a CP tensor."""
    return math.prod(shape) // max(shape)


def ring_ranks(ranks: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Cut the ranks of a ring to what is useful.

    A ring that is opened at one bond is a train, and represents any tensor with the full ranks of a train; and no bond
    has more independent rows than the core on either side of it has columns.

    Parameters
    ----------
    ranks : sequence of int
        Of each bond, the first one left of the first core.
    shape : sequence of int

    Returns
    -------
    list of int

    Examples
    --------
    >>> ring_ranks([99, 99, 99], (5, 6, 7)), ring_ranks([99, 2, 2], (5, 6, 7)), ring_ranks([3, 4, 5], (5, 6, 7))
    ([6, 6, 6], [10, 2, 2], [3, 4, 5])
    """
    order, found = len(shape), list(ranks)
    turned = [[*shape[first:], *shape[:first]] for first in range(order)]
    most = min(max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, order)) for sizes in turned)
    if min(found) >= most:
        found = [most] * order
    while True:
        # Bond m lies between the cores m - 1 and m.
        cut = [min(found[m], found[m - 1] * shape[m - 1], found[(m + 1) % order] * shape[m]) for m in range(order)]
        if cut == found:
            return found
        found = cut


def rounded_cores(
    backend: Backend, cores: Sequence[Array], rank: int | Sequence[int] | None, max_error: float | None
) -> list[Array]:
    """Reduce the ranks of a train whose cores are orthogonal from the left.

    Parameters
    ----------
    backend : Backend
    cores : sequence of array, shape (r_{m-1}, d_m, r_m)
    rank, max_error
        As for :meth:`tnadapt.tensors.TTTensor.round`.

    Returns
    -------
    list of array
    """
    if (rank is None) == (max_error is None):
        raise ShapeError("give either rank= or max_error=, to say what to round to")
    cores, bonds = list(cores), len(cores) - 1
    limits = [0] * bonds if rank is None else ranks_of(rank, bonds, "bonds")
    loss = 0.0
    if max_error is not None:
        norm = float(np.linalg.norm(backend.to_numpy(cores[-1]).reshape(-1)))
        loss = error_limit(max_error) * norm / math.sqrt(max(1, bonds))
    for bond in range(bonds - 1, -1, -1):
        left, size, right = (int(one) for one in cores[bond + 1].shape)
        u, s, vh = backend.svd(backend.reshape(cores[bond + 1], (left, size * right)))
        most = int(s.shape[0])
        keep = min(limits[bond], most) if rank is not None else kept(backend.to_numpy(s), most, loss)
        cores[bond + 1] = backend.reshape(vh[:keep, :], (keep, size, right))
        before = cores[bond]
        flat = backend.reshape(before, (-1, left))
        cores[bond] = backend.reshape(backend.matmul(flat, u[:, :keep] * s[:keep]), (*before.shape[:2], keep))
    return cores

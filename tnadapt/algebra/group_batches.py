"""Groups whose F is computed in one call, since many small calls take longer than a few large ones.

One group after another is the plain way, and the reference, with the same bits. But each call of F is some operations
or launches of kernels, and with ``groups="weight"`` these take longer than the work on the vector of a small weight.
:meth:`tnadapt.backends.Backend.at_once` says how many elements to compute in one call, which bounds the memory that a
batch adds.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .group import Group, updates

__all__ = ["Run", "batches", "updates_of_runs"]

#: A group, and the first element and the end of a part of its vector.
Run = tuple[Group, int, int]


def updates_of_runs(
    backend: Backend, runs: Sequence[Run], params: Mapping[str, Array], trained: str | None = None
) -> list[Array]:
    """Return these parts of the updates of groups, each as :meth:`tnadapt.algebra.group.Group.update` gives it.

    Parameters
    ----------
    backend : Backend
    runs : sequence of (group, start, stop)
    params : mapping of str to array
    trained : str, optional
        As for :meth:`~tnadapt.algebra.group.Group.update`.

    Returns
    -------
    list of array, shape (stop - start,)
        They may share memory with each other.
    """
    found: dict[int, Array] = {}
    for numbers in batches(backend, params[next(iter(runs[0][0].names.values()))], runs):
        _, start, stop = runs[numbers[0]]
        made = updates(backend, [runs[number][0] for number in numbers], params, start, stop, trained)
        found.update(zip(numbers, made, strict=True))
    return [found[number] for number in range(len(runs))]


def batches(backend: Backend, like: Array, runs: Sequence[Run]) -> list[list[int]]:
    """Return the numbers of the runs that are computed in one call each, in order of the first of them.

    They are whole groups that share F, as many as the backend wants in one call for arrays like this one. Parts of
    groups are alone, and so are groups whose F has other bits in a batch.
    """
    limit = backend.at_once(like)
    found: list[list[int]] = []
    current: dict[Hashable, list[int]] = {}
    for number, (group, start, stop) in enumerate(runs):
        projection = group.projection
        joins = projection.map.exact_in_batches and (start, stop) == (0, group.size)
        most = limit // projection.padded if joins else 0
        key = id(projection), group.subtracts, start, stop
        batch = current.get(key)
        if batch is None or len(batch) >= most:
            batch = current[key] = []
            found.append(batch)
        batch.append(number)
    return found

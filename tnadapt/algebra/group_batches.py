"""Groups whose F is computed in one call, since many small calls take longer than a few large ones.

One group after another is the plain way, and the reference, with the same bits. But each call of F is some operations
or launches of kernels, and with ``groups="weight"`` these take longer than the work on the vector of a small weight.
:meth:`tnadapt.backends.Backend.at_once` says how many elements to compute in one call, which bounds the memory that a
batch adds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

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
    # The runs of a group whose weights are not adjacent are cut from the whole, which takes one call of F and not many.
    wanted = list(map(_whole_if_all(runs), runs))
    distinct = list({_key(run): run for run in wanted}.values())
    made = dict(zip(map(_key, distinct), _computed(backend, distinct, params, trained), strict=True))
    return [
        made[_key(whole)] if run[1:] == whole[1:] else made[_key(whole)][run[1] : run[2]]
        for run, whole in zip(runs, wanted, strict=True)
    ]


def _key(run: Run) -> tuple[int, int, int]:
    group, start, stop = run
    # Each group has its own start. A compiler can trace the id of an object of a class, and not of a tuple.
    return id(group.start), start, stop


def _whole_if_all(runs: Sequence[Run]) -> Callable[[Run], Run]:
    """Return a function that replaces a run of a group behind an F by the whole group, if these are all of its runs."""
    length: dict[int, int] = {}
    for group, start, stop in runs:
        length[id(group.start)] = length.get(id(group.start), 0) + stop - start

    def replaced(run: Run) -> Run:
        group = run[0]
        complete = length[id(group.start)] == group.size and not group.projection.map.identity
        return (group, 0, group.size) if complete else run

    return replaced


def _computed(backend: Backend, runs: Sequence[Run], params: Mapping[str, Array], trained: str | None) -> list[Array]:
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

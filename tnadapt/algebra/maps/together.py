"""A map F on several vectors at once, as the rows of one array."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .projection import Projection

__all__ = ["adjoints", "slices"]


def slices(backend: Backend, projection: Projection, vectors: Sequence[Array], start: int, stop: int) -> list[Array]:
    """Return elements ``start`` to ``stop - 1`` of F of each vector, by one call of F.

    Parameters
    ----------
    backend : Backend
    projection : Projection
    vectors : sequence of array, shape (n_in,)
    start, stop : int

    Returns
    -------
    list of array, shape (stop - start,)
        They may share memory with each other.
    """
    return _by_rows(backend, lambda x: projection.slice(x, start, stop), vectors)


def adjoints(backend: Backend, projection: Projection, vectors: Sequence[Array]) -> list[Array]:
    """Return the adjoint of a linear F of each vector, by one call, as :func:`slices`."""
    return _by_rows(backend, projection.adjoint, vectors)


def _by_rows(backend: Backend, compute: Callable[[Array], Array], vectors: Sequence[Array]) -> list[Array]:
    if len(vectors) == 1:
        return [compute(vectors[0])]
    found = compute(backend.reshape(backend.concat(vectors), (len(vectors), vectors[0].shape[0])))
    return backend.split(backend.flatten(found), [found.shape[1]] * len(vectors))

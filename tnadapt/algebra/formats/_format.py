"""What a format is asked: which arrays, and what tensor do they make on a box, or on a part of an unfolding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ..unfolding import Cut

__all__ = ["Format", "Ranges", "Rank", "rows_of", "unfolded"]

Rank = int | tuple[int | None, ...]
Ranges = Sequence[tuple[int, int]]


class Format:
    """One way of making a tensor of given sizes from a few arrays.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M``.
    rank : int or tuple
        As in :class:`~tnadapt.Config`.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        The arrays, in order.
    zero : str
        The array that is zero at the start of a linear adapter: the factor of the leading mode.
    ones : frozenset of str
        Arrays that start at one.
    unfolds : bool
        Whether :meth:`inner` has an answer for every cut of a tensor of integer rank. A format whose unfoldings are
        not products of two smaller matrices says False, and returns None there.

    Examples
    --------
    >>> from tnadapt.algebra.formats import FORMATS
    >>> FORMATS["cp"]((5, 7), 2).shapes
    {'factor0': (5, 2), 'factor1': (7, 2)}
    """

    zero: str
    ones: frozenset[str] = frozenset()
    unfolds: bool = True

    def __init__(self, sizes: Sequence[int], rank: Rank) -> None:
        self.sizes = tuple(sizes)
        self.shapes: dict[str, tuple[int, ...]] = self._shapes(rank)

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        """The tensor on a box.

        Parameters
        ----------
        backend : Backend
            Of the arrays.
        arrays : mapping of str to array
            Of the shapes in ``shapes``.
        ranges : sequence of (int, int)
            Start and stop in every mode.

        Returns
        -------
        array
            Of the box's sizes.
        """
        raise NotImplementedError

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        """The gradient of ``<tensor, T>`` with respect to each array, T being what the arrays make.

        T is linear in each array, so this is the adjoint of each of these maps, the other arrays held.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        tensor : array, shape (d_1, …, d_M)

        Returns
        -------
        dict of str to array
            In the shapes of ``shapes``.
        """
        raise NotImplementedError

    def inner(self, modes: int) -> int | None:
        """How many columns L has where the first ``modes`` modes are rows and the tensor is ``L R``; None for no such.

        ``1 <= modes < M``.
        """
        return None

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        """L and R of a part of an unfolding, where :meth:`inner` says that there are such.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        cut : Cut
            Which modes are rows, and which rows and columns are wanted.

        Returns
        -------
        (array, array)
            Of shapes (rows, inner) and (inner, columns); their product is that part.
        """
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Elements of all arrays."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def paths(self, name: str) -> int:
        """How many elements of one array each element of the tensor is a sum over."""
        raise NotImplementedError

    @property
    def total_paths(self) -> int:
        """How many products of one element of each array an element of the tensor is a sum of."""
        raise NotImplementedError


def unfolded(backend: Backend, tensor: Array, mode: int) -> Array:
    """One mode as rows, the others in order as columns."""
    moved = backend.moveaxis(tensor, mode, 0)
    return backend.reshape(moved, (tensor.shape[mode], math.prod(tensor.shape) // tensor.shape[mode]))


def rows_of(array: Array, bounds: tuple[int, int], axis: int = 0) -> Array:
    """A range of one axis; the array itself where that is all of it."""
    start, stop = bounds
    if (start, stop) == (0, array.shape[axis]):
        return array
    return array[(*(slice(None),) * axis, slice(start, stop), ...)]

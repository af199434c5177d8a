"""Slices of a tensor's vector as one matrix product, by unfoldings of the tensor network.

In an unfolding, the leading modes of a tensor are the rows of a matrix and the others its columns. Its ``vec`` is the
tensor's, so that a slice is a run of rows. CP, Tucker and tensor trains give each unfolding as a product ``L R`` with
few columns in L. A slice is then one product of some rows of L with R, which writes each element once and in order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ShapeError

__all__ = [
    "Box",
    "Cut",
    "along",
    "best_cut",
    "boxes",
    "row_wise_khatri_rao",
]


# -- Cover a slice of a tensor's vector by boxes of the tensor: integer arithmetic only --------------------------------

# A tensor network restricted to a box is the same network with its factors restricted to the box's rows. This is how a
# slice is computed without the rest of the tensor.


class Box(NamedTuple):
    """A box of a tensor whose elements are contiguous in ``vec``.

    Attributes
    ----------
    ranges : tuple of (int, int)
        Start and stop in every mode.
    start : int
        Position in ``vec`` of its first element.
    """

    ranges: tuple[tuple[int, int], ...]
    start: int


# One box may compute up to this fraction of extra elements if that avoids splitting the slice into three boxes.
SLACK = 0.25


def boxes(sizes: Sequence[int], start: int, stop: int) -> list[Box]:
    """Return boxes that together hold elements ``start`` to ``stop - 1`` of ``vec`` of a tensor, in order.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M`` of the tensor.
    start, stop : int
        The slice, ``0 <= start < stop <= prod(sizes)``.

    Returns
    -------
    list of Box
        At most 2 M - 1 boxes. The first may begin before ``start`` and the last may end after ``stop``: at most a
        quarter of the slice's length extra, so that a slice of a few rows is one box instead of three.

    Raises
    ------
    ShapeError
        If the slice is empty or extends beyond the tensor.

    Notes
    -----
    The leading modes in which the slice stays at one index are fixed, the next mode is cut to the rows that the slice
    touches, and the remaining modes are whole.

    Examples
    --------
    >>> boxes((4, 10), 10, 30)
    [Box(ranges=((1, 3), (0, 10)), start=10)]
    >>> boxes((4, 10), 19, 21)
    [Box(ranges=((1, 2), (9, 10)), start=19), Box(ranges=((2, 3), (0, 1)), start=20)]
    """
    if not 0 <= start < stop <= math.prod(sizes):
        raise ShapeError(f"no slice {start}:{stop} of a tensor of sizes {tuple(sizes)} ({math.prod(sizes)} elements)")
    return _boxes(tuple(sizes), start, stop)


def _boxes(sizes: tuple[int, ...], start: int, stop: int) -> list[Box]:
    if len(sizes) == 1:
        return [Box(((start, stop),), start)]
    row = math.prod(sizes[1:])
    whole = tuple((0, size) for size in sizes[1:])
    first, end = start // row, -(-stop // row)

    def inside(index: int, lo: int, hi: int) -> list[Box]:
        """Return the boxes of elements lo to hi - 1 of one row."""
        return [Box(((index, index + 1), *box.ranges), index * row + box.start) for box in _boxes(sizes[1:], lo, hi)]

    if end - first == 1:
        return inside(first, start - first * row, stop - first * row)
    if (end - first) * row <= (1 + SLACK) * (stop - start):
        return [Box(((first, end), *whole), first * row)]
    head: list[Box] = []
    tail: list[Box] = []
    if start % row:
        head, first = inside(first, start % row, row), first + 1
    if stop % row:
        tail, end = inside(end - 1, 0, stop % row), end - 1
    middle = [Box(((first, end), *whole), first * row)] if first < end else []
    return head + middle + tail


# -- Slices of a tensor's vector as one matrix product, by unfoldings of the tensor network ----------------------------


# Cost model, in multiply-adds: overhead per element of the result, and cost per element of L or R.
_WRITTEN = 12
_FORMED = 36


class Cut(NamedTuple):
    """The part of an unfolding that contains a slice.

    Attributes
    ----------
    modes : int
        Number of leading modes that are rows.
    rows, cols : (int, int)
        Start and stop.
    start : int
        Position of its first element in ``vec``; the others follow contiguously.
    """

    modes: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    start: int


def best_cut(sizes: Sequence[int], start: int, stop: int, rank: Callable[[int], int | None]) -> Cut | None:
    """Return the unfolding in which a slice costs least.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M``.
    start, stop : int
        The slice, ``0 <= start < stop <= prod(sizes)``.
    rank : callable
        Maps a number of leading modes to the number of columns of L; None if there is no such product.

    Returns
    -------
    Cut or None
        None if there is no unfolding, or each would compute over a quarter more than the slice.

    Examples
    --------
    A weight of 2**24 elements out of 2**30 in four modes is 507 rows of the square unfolding:

    >>> best_cut((182, 182, 182, 182), 0, 1 << 24, lambda modes: 8)
    Cut(modes=2, rows=(0, 507), cols=(0, 33124), start=0)
    >>> best_cut((4, 10), 12, 15, lambda modes: 1)
    Cut(modes=1, rows=(1, 2), cols=(2, 5), start=12)
    """
    found: tuple[int, Cut] | None = None
    for modes in range(1, len(sizes)):
        inner = rank(modes)
        if inner is None:
            continue
        length = math.prod(sizes[modes:])
        first, end = start // length, -(-stop // length)
        # A slice within one row needs only its own columns.
        cols = (start - first * length, stop - first * length) if end - first == 1 else (0, length)
        height, width = end - first, cols[1] - cols[0]
        if height * width > (1 + SLACK) * (stop - start):
            continue
        cost = height * width * (_WRITTEN + inner) + (height + width) * inner * _FORMED
        if found is None or cost < found[0]:
            found = cost, Cut(modes, (first, end), cols, first * length + cols[0])
    return None if found is None else found[1]


def along(
    backend: Backend,
    sizes: Sequence[int],
    start: int,
    stop: int,
    make: Callable[[Sequence[tuple[int, int]]], Array],
    axis: int = 0,
) -> Array:
    """Call ``make`` on the boxes of a slice, join the results and crop them to the slice.

    Parameters
    ----------
    backend : Backend
    sizes : sequence of int
        Sizes of the tensor.
    start, stop : int
        The slice of its ``vec``.
    make : callable
        Maps the ranges of a box to an array with one axis over all elements of the box, in order.
    axis : int
        That axis.

    Returns
    -------
    array
        Length ``stop - start`` on that axis.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> x = np.arange(12).reshape(3, 4)
    >>> along(get_backend(x), (3, 4), 3, 9, lambda box: x[box[0][0]:box[0][1], box[1][0]:box[1][1]].reshape(-1))
    array([3, 4, 5, 6, 7, 8])
    """
    parts = []
    for ranges, first in boxes(sizes, start, stop):
        part = make(ranges)
        lo, hi = max(start - first, 0), min(stop - first, part.shape[axis])
        whole = (lo, hi) == (0, part.shape[axis])
        parts.append(part if whole else part[(*(slice(None),) * axis, slice(lo, hi), ...)])
    return backend.concat(parts, axis=axis)


def row_wise_khatri_rao(backend: Backend, arrays: Sequence[Array]) -> Array:
    """Compute the row-wise Kronecker product of matrices: L of an elementwise product from the L of its factors.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 10.0], [1.0, 10.0]])
    >>> row_wise_khatri_rao(get_backend(a), [a, b])
    array([[ 1., 10.,  2., 20.],
           [ 3., 30.,  4., 40.]])
    """

    def pair(a: Array, b: Array) -> Array:
        rows = a.shape[0]
        product = backend.reshape(a, (rows, -1, 1)) * backend.reshape(b, (rows, 1, -1))
        return backend.reshape(product, (rows, a.shape[1] * b.shape[1]))

    return functools.reduce(pair, arrays)

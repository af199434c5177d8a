"""Folding a vector into a tensor: sizes of the tensor and its splits, and which part of the tensor a slice is.

A slice of a tensor's ``vec`` is a few boxes of the tensor, or a run of rows of an unfolding (a matrix with the leading
modes as rows and the others as columns). In CP, Tucker and tensor trains each unfolding is a product ``L R`` with few
columns in L. A slice is then one product of some rows of L with R, which writes each element once and in order.

Paper symbols: N (length of the long vector), M (order), d_m (size of mode m), K (splits). All arithmetic is on Python
integers: floating-point roots are inexact at perfect powers (64 ** (1/3) < 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tnadapt.argument_checks import checks_arguments, integer, is_sequence
from tnadapt.backends import Array, Backend, get_backend
from tnadapt.errors import ConfigError, ShapeError, safe_repr

# -- Sizes of the tensor, and of its splits ----------------------------------------------------------------------------


#: The folds that have a name.
FOLDS = ("stack", "hypercube", "balanced")


# NumPy arrays have at most 64 axes; a Kronecker product of order M is computed with 2 M of them.
MAX_ORDER = 32
# The long vector's positions are 64-bit integers.
MAX_SIZE = 1 << 62
# A hypercube of more elements than this, and than this many times what it holds, is a mistake in its order.
_LARGE, _PADDED = 1 << 24, 64
# Finding the divisors of larger numbers by trial division takes minutes.
_MAX_FACTORED = 1 << 44


def hypercube_shape(size: Any, order: int) -> tuple[int, ...]:
    """Return the sizes of the smallest hypercube of that order that holds ``size`` elements.

    Parameters
    ----------
    size : int, shape, array, or sequence of shapes or arrays
        Number of elements n, at least 1, or what has them: ``(rows, cols)``, a matrix, or several of these.
    order : int
        Number of modes M, at least 1.

    Returns
    -------
    tuple of int
        ``(d, …, d)``, where d is the least integer with ``d ** order >= n``.

    Raises
    ------
    ShapeError
        If size or order is not an integer or is below 1, or order is above 32.

    Notes
    -----
    The paper's "reshaping to regular tensor" (section 3.2, appendix A.3).

    Examples
    --------
    >>> hypercube_shape(64, 3), hypercube_shape(65, 3)
    ((4, 4, 4), (5, 5, 5))
    >>> hypercube_shape([(768, 768)] * 24, 2)
    (3763, 3763)
    """
    size = sum(map(math.prod, _shapes_of(size)[0]))
    order = integer("order", order, 1, MAX_ORDER, ShapeError)
    low, high = 1, 1 << -(-size.bit_length() // order)
    while low < high:
        middle = (low + high) // 2
        if middle**order >= size:
            high = middle
        else:
            low = middle + 1
    return (low,) * order


def balanced_shape(size: int, order: int) -> tuple[int, ...]:
    """Return the tightest nearly equal sizes: each is d or d - 1, with d as for the hypercube.

    Parameters
    ----------
    size, order : int
        As for :func:`hypercube_shape`.

    Returns
    -------
    tuple of int
        Largest first; the product is at least ``size`` and at most the hypercube's.

    Raises
    ------
    ShapeError
        If size or order is not an integer or is below 1, or order is above 32.

    Examples
    --------
    >>> balanced_shape(60, 3), balanced_shape(49, 3)
    ((4, 4, 4), (4, 4, 4))
    >>> balanced_shape(48, 3), balanced_shape(30, 3)
    ((4, 4, 3), (4, 3, 3))
    """
    d = hypercube_shape(size, order)[0]
    order = int(order)
    smaller = max(k for k in range(order) if d ** (order - k) * (d - 1) ** k >= size)
    return (d,) * (order - smaller) + (d - 1,) * smaller


@checks_arguments
def to_hypercube(x: Array | Sequence[Array], order: int) -> Array:
    """Fold a vector, a matrix or several matrices into a hypercube, padded with zeros at the end.

    Parameters
    ----------
    x : array or sequence of array
        Of any supported library and dtype. Its elements form one vector: array after array, each in C order.
    order : int
        Number of modes M.

    Returns
    -------
    array, shape (d, …, d)
        In the library, dtype and device of ``x``; differentiable.

    Raises
    ------
    ShapeError
        If ``x`` has no elements, order is below 1, or the hypercube has more than 2^24 elements and more than 64 times
        those of ``x``.
    BackendError
        If ``x`` is not an array of a known library, or mixes libraries, dtypes or devices.

    Notes
    -----
    Forms all ``d ** order`` elements, zeros included: ``2 ** order`` or more if ``x`` has more than one.

    Examples
    --------
    >>> import numpy as np
    >>> to_hypercube(np.arange(3.0), 2)
    array([[0., 1.],
           [2., 0.]])
    >>> to_hypercube([np.ones((3, 2)), np.zeros((1, 2))], 3).shape
    (2, 2, 2)
    """
    arrays = [x] if hasattr(x, "shape") else list(x)
    shapes = [tuple(array.shape) for array in arrays]
    if not sum(map(math.prod, shapes)):
        raise ShapeError(f"x must have one or more elements; got {safe_repr(shapes)} as the shapes of its arrays")
    backend = get_backend(*arrays, what="each array of x")
    vec = backend.concat([backend.flatten(array) for array in arrays])
    count, sizes = int(vec.shape[0]), hypercube_shape(vec.shape[0], order)
    if math.prod(sizes) > max(_LARGE, _PADDED * count):
        fits = next(m for m in range(order, 0, -1) if math.prod(hypercube_shape(count, m)) <= 2 * count)
        raise ShapeError(
            f"a hypercube of order {order} for {count:,} elements has {sizes[0]}^{order} = {math.prod(sizes):,}, "
            f"nearly all of them zeros: use a smaller order, such as {fits}"
        )
    return folded(backend, vec, sizes)


def folded(backend: Backend, vec: Array, sizes: Sequence[int]) -> Array:
    """Fold a vector into a tensor of these sizes, padded with zeros at the end."""
    return backend.reshape(backend.pad_last(vec, math.prod(sizes)), sizes)


@checks_arguments
def from_hypercube(tensor: Array, size: Any) -> Any:
    """Return the first elements of ``vec(tensor)`` as a vector, a matrix or several: the inverse of `to_hypercube`.

    Parameters
    ----------
    tensor : array, any shape
        In C order, the last axis fastest.
    size : int, shape, array, or sequence of shapes or arrays
        The number of elements of a vector; the shape of a matrix; or the shapes of several. Of an array, its shape.
        There are at most as many elements as ``tensor`` has.

    Returns
    -------
    array, shape (size,), or array of that shape, or list of array
        In the library, dtype and device of ``tensor``; differentiable.

    Raises
    ------
    ShapeError
        If the tensor has fewer elements, or size is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> from_hypercube(to_hypercube(np.arange(3.0), 2), 3)
    array([0., 1., 2.])
    >>> [matrix.shape for matrix in from_hypercube(np.ones((3, 3, 3)), [(4, 5), (2, 2)])]
    [(4, 5), (2, 2)]
    """
    backend = get_backend(tensor)
    shapes, several = _shapes_of(size)
    lengths, elements = [math.prod(shape) for shape in shapes], math.prod(tensor.shape)
    if sum(lengths) > elements:
        raise ShapeError(
            f"size must be at most that of the tensor; cannot take {sum(lengths)} elements of one of shape "
            f"{tuple(tensor.shape)}, which has {elements}"
        )
    parts = backend.split(backend.flatten(tensor)[: sum(lengths)], lengths)
    matrices = [backend.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    return matrices if several else matrices[0]


def _shapes_of(size: Any) -> tuple[list[tuple[int, ...]], bool]:
    """Return the shapes that a size stands for, and whether it is that of several arrays."""
    parts = [] if hasattr(size, "shape") or not is_sequence(size) else list(size)
    several = any(is_sequence(part) or hasattr(part, "shape") for part in parts)
    if not parts and is_sequence(size) and not hasattr(size, "shape"):
        raise ShapeError("size is an empty sequence; expected a number of elements, a shape, or several shapes")
    return [_shape_of(part) for part in (parts if several else [size])], several


def _shape_of(size: Any) -> tuple[int, ...]:
    """Return the shape of one array that a size stands for, where a number is that of a vector."""
    shape = getattr(size, "shape", ()) or size
    return tuple(map(_checked, shape)) if is_sequence(shape) else (_checked(shape),)


def balanced_factors(size: int, parts: int) -> tuple[int, ...]:
    """Factor ``size`` exactly into integers that are as equal as possible, smallest first.

    Parameters
    ----------
    size : int
        The number to factor, at least 1.
    parts : int
        Number of factors K, at least 1.

    Returns
    -------
    tuple of int
        The exact factorization with the least sum (for a fixed product the sum is least when the factors are
        equal); ties are broken by the larger first factor.

    Raises
    ------
    ShapeError
        If size or parts is not an integer, below 1, or too large.

    Examples
    --------
    >>> balanced_factors(768, 2), balanced_factors(768, 3), balanced_factors(7, 2)
    ((24, 32), (8, 8, 12), (1, 7))
    """
    size, parts = _checked(size), integer("parts", parts, 1, MAX_ORDER, ShapeError)
    if parts == 1:
        return (size,)
    if size > _MAX_FACTORED:
        raise ShapeError(f"{size} is too large to be factored evenly; give split_size as an integer")
    divisors = _divisors(size)

    @functools.cache
    def best(rest: int, parts: int, least: int) -> tuple[int, ...] | None:
        if parts == 1:
            return (rest,) if rest >= least else None
        factors = None
        for d in divisors:
            if d < least or rest % d:
                continue
            if d**parts > rest:
                break
            tail = best(rest // d, parts - 1, d)
            if tail is not None and (factors is None or d + sum(tail) <= sum(factors)):
                factors = (d, *tail)
        return factors

    return best(size, parts, 1)  # type: ignore[return-value]  # (1, …, 1, size) always exists


def _checked(size: int) -> int:
    # The size is used in arithmetic only, so it may exceed that of any array.
    return integer("size", size, 1, 1 << 1024, ShapeError)


def _divisors(size: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return small + [size // d for d in reversed(small) if d * d != size]


def kronecker_sizes(sizes: Sequence[int], splits: int, split_size: int | str | Sequence[int]) -> list[tuple[int, ...]]:
    """Return the sizes of the K tensors whose Kronecker product covers a tensor of ``sizes``.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M``.
    splits : int
        K, at least 1.
    split_size : int, "balanced" or sequence of int
        An integer f: splits 1 to K - 1 have size f in every mode and the last one
        ``ceil(d_m / f ** (K - 1))`` (the paper uses 6, 8 and 10). One integer per mode: the same, with ``f_m``.
        ``"balanced"``: each ``d_m`` is factored by :func:`balanced_factors`.

    Returns
    -------
    list of tuple of int
        One per split. Their product in mode m is at least ``d_m``; the product tensor is cropped to ``d_m``.

    Raises
    ------
    ConfigError
        If split_size is neither "balanced", nor an integer of at least 1, nor one such integer per mode.

    Examples
    --------
    >>> kronecker_sizes((768, 768), 2, "balanced")
    [(24, 24), (32, 32)]
    >>> kronecker_sizes((752, 752), 3, 8)
    [(8, 8), (8, 8), (12, 12)]
    >>> kronecker_sizes((64, 48), 2, (8, 4))
    [(8, 4), (8, 12)]
    """
    if isinstance(split_size, str) and split_size == "balanced":
        return list(zip(*(balanced_factors(d, splits) for d in sizes), strict=True))
    per_mode = split_size if isinstance(split_size, (tuple, list)) else (split_size,) * len(sizes)
    if len(per_mode) != len(sizes):
        raise ConfigError(
            f"split_size={tuple(per_mode)} has {len(per_mode)} sizes for {len(sizes)} modes: give one per mode"
        )
    first = tuple(integer("split_size", f, 1, MAX_SIZE, ConfigError, 'or "balanced"') for f in per_mode)
    last = tuple(-(-d // f ** (splits - 1)) for d, f in zip(sizes, first, strict=True))
    return [first] * (splits - 1) + [last]


# -- A slice as boxes of the tensor ------------------------------------------------------------------------------------

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
    if len(sizes) == 1:
        return [Box(((start, stop),), start)]
    row = math.prod(sizes[1:])
    whole = tuple((0, size) for size in sizes[1:])
    first, end = start // row, -(-stop // row)

    def inside(index: int, lo: int, hi: int) -> list[Box]:
        """Return the boxes of elements lo to hi - 1 of one row."""
        return [Box(((index, index + 1), *box.ranges), index * row + box.start) for box in boxes(sizes[1:], lo, hi)]

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


# -- A slice as rows of an unfolding -----------------------------------------------------------------------------------


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
    cheapest: tuple[int, Cut] | None = None
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
        if cheapest is None or cost < cheapest[0]:
            cheapest = cost, Cut(modes, (first, end), cols, first * length + cols[0])
    return None if cheapest is None else cheapest[1]


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

"""Sizes for folding a vector into a tensor and for cutting a tensor into splits.

Paper symbols: N (length of the long vector), M (order), d_m (size of mode m), K (splits). All arithmetic is on Python
integers: floating-point roots are inexact at perfect powers (64 ** (1/3) < 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError, integer

__all__ = [
    "FOLDS",
    "balanced_factors",
    "balanced_shape",
    "from_hypercube",
    "hypercube_shape",
    "kronecker_sizes",
    "to_hypercube",
]

#: The folds that have a name.
FOLDS = ("stack", "hypercube", "balanced")


# NumPy arrays have at most 64 axes; a Kronecker product of order M is computed with 2 M of them.
MAX_ORDER = 32
# The long vector's positions are 64-bit integers.
MAX_SIZE = 1 << 62
# Finding the divisors of larger numbers by trial division takes minutes.
_MAX_FACTORED = 1 << 44


@checks_arguments
def hypercube_shape(size: int, order: int) -> tuple[int, ...]:
    """Return the sizes of the smallest hypercube of that order that holds ``size`` elements.

    Parameters
    ----------
    size : int
        Number of elements n, at least 1.
    order : int
        Number of modes M, at least 1.

    Returns
    -------
    tuple of int
        ``(d, …, d)``, where d is the least integer with ``d ** order >= size``.

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
    >>> hypercube_shape(24 * 768 * 768, 2)
    (3763, 3763)
    """
    size, order = _checked(size), integer("order", order, 1, MAX_ORDER, ShapeError)
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
def to_hypercube(vec: Array, order: int) -> Array:
    """Fold a vector into a hypercube, padded with zeros at the end.

    Parameters
    ----------
    vec : array, shape (n,)
        Of any supported library and dtype.
    order : int
        Number of modes M.

    Returns
    -------
    array, shape (d, …, d)
        In the library, dtype and device of ``vec``; differentiable.

    Raises
    ------
    ShapeError
        If ``vec`` is not a vector of at least one element, or order is below 1.
    BackendError
        If ``vec`` is not an array of a known library.

    Examples
    --------
    >>> import numpy as np
    >>> to_hypercube(np.arange(3.0), 2)
    array([[0., 1.],
           [2., 0.]])
    """
    backend = get_backend(vec)
    if len(vec.shape) != 1:
        raise ShapeError(f"to_hypercube expects a vector, shape (n,); got shape {tuple(vec.shape)}")
    shape = hypercube_shape(vec.shape[0], order)
    return backend.reshape(backend.pad_last(vec, math.prod(shape)), shape)


@checks_arguments
def from_hypercube(tensor: Array, size: int) -> Array:
    """Return the first ``size`` elements of ``vec(tensor)``; the inverse of :func:`to_hypercube`.

    Parameters
    ----------
    tensor : array, any shape
        In C order, the last axis fastest.
    size : int
        Length of the vector, at most the number of elements of ``tensor``.

    Returns
    -------
    array, shape (size,)
        In the library, dtype and device of ``tensor``; differentiable.

    Raises
    ------
    ShapeError
        If the tensor has fewer than ``size`` elements, or size is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> from_hypercube(to_hypercube(np.arange(3.0), 2), 3)
    array([0., 1., 2.])
    """
    backend = get_backend(tensor)
    elements = math.prod(tensor.shape)
    size = _checked(size)
    if size > elements:
        raise ShapeError(
            f"size must be at most that of the tensor; cannot take {size} elements of one of shape "
            f"{tuple(tensor.shape)}, which has {elements}"
        )
    return backend.flatten(tensor)[:size]


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
        found = None
        for d in divisors:
            if d < least or rest % d:
                continue
            if d**parts > rest:
                break
            tail = best(rest // d, parts - 1, d)
            if tail is not None and (found is None or d + sum(tail) <= sum(found)):
                found = (d, *tail)
        return found

    return best(size, parts, 1)  # type: ignore[return-value]  # (1, …, 1, size) always exists


def _checked(size: int) -> int:
    # The size is only used in arithmetic, so it may be larger than any array.
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
    given = split_size if isinstance(split_size, (tuple, list)) else (split_size,) * len(sizes)
    if len(given) != len(sizes):
        raise ConfigError(f"split_size={tuple(given)} has {len(given)} sizes for {len(sizes)} modes: give one per mode")
    first = tuple(integer("split_size", f, 1, MAX_SIZE, ConfigError, 'or "balanced"') for f in given)
    last = tuple(-(-d // f ** (splits - 1)) for d, f in zip(sizes, first, strict=True))
    return [first] * (splits - 1) + [last]

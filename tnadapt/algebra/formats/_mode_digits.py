"""Indices of several digits: the range of the index that contains a box of its digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Cover", "covered"]


class Cover(NamedTuple):
    """The contiguous range of a mode that contains a box of its digits.

    Attributes
    ----------
    bounds : (int, int)
        Start and stop.
    lengths : list of int
        How many indices of each digit the range covers.
    crop : list of slice
        Which of them are in the box.
    """

    bounds: tuple[int, int]
    lengths: list[int]
    crop: list[slice]


def covered(sizes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Cover:
    """Return the range of an index that contains a box of its digits, which have these sizes.

    Examples
    --------
    >>> covered((4, 10), [(2, 3), (5, 7)])
    Cover(bounds=(25, 27), lengths=[1, 2], crop=[slice(None, None, None), slice(None, None, None)])
    >>> covered((4, 10), [(2, 4), (5, 7)])
    Cover(bounds=(20, 40), lengths=[2, 10], crop=[slice(None, None, None), slice(5, 7, None)])
    """
    start, open_ = 0, False
    lengths: list[int] = []  # a compiler cannot trace list[int]()
    crop: list[slice] = []
    for size, (lo, hi) in zip(sizes, ranges, strict=True):
        if open_:
            # Digits after the first one with a range: all of them, of which the box is a part.
            start *= size
            lengths.append(size)
            crop.append(slice(lo, hi))
            continue
        start = start * size + lo
        open_ = hi - lo > 1
        lengths.append(hi - lo)
        crop.append(slice(None))
    return Cover((start, start + math.prod(lengths)), lengths, crop)

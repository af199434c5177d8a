"""The reference of circuits: gates applied one after another to the unit vectors of the columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["circuit", "circuit_count"]

Float = NDArray[np.floating[Any]]


def circuit(gates: Mapping[str, Float], sizes: tuple[int, ...]) -> Float:
    """Return the tensor of a circuit.

    Parameters
    ----------
    gates : mapping of str to ndarray
        In order.
    sizes : tuple of int
        The digits of the rows, then those of the columns.

    Examples
    --------
    >>> circuit({"gate0": np.arange(6.0).reshape(2, 3)}, (2, 3)).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    axes = -(-len(sizes) // 2)
    cols = sizes[axes:]
    # One axis per digit, of length 1 for a row digit without a column digit, and the unit vectors last.
    state = np.eye(math.prod(cols)).reshape(*cols, *(1,) * (axes - len(cols)), -1)
    for gate, pair in zip(gates.values(), _pairs(axes), strict=True):
        before = tuple(state.shape[axis] for axis in pair)
        after = gate.shape[: len(pair)]
        turned = np.moveaxis(state, pair, range(len(pair)))
        rest = turned.shape[len(pair) :]
        turned = gate.reshape(math.prod(after), math.prod(before)) @ turned.reshape(math.prod(before), -1)
        state = np.moveaxis(turned.reshape(*after, *rest), range(len(pair)), pair)
    return np.asarray(state.reshape(sizes), np.float64)


def circuit_count(sizes: tuple[int, ...]) -> int:
    """Return the number of elements of the gates.

    Examples
    --------
    >>> circuit_count((2, 3, 2, 3))
    36
    """
    axes = -(-len(sizes) // 2)
    now, total = [*sizes[axes:], *(1,) * (axes - len(sizes) // 2)], 0
    for pair in _pairs(axes):
        total += math.prod(sizes[axis] * now[axis] for axis in pair)
        for axis in pair:
            now[axis] = sizes[axis]
    return total


def _pairs(axes: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(axes), 2)) or [(0,)]

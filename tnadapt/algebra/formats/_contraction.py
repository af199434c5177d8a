"""Contract a small tensor network that an einsum string describes, on any backend.

The reference way of every format, and the only one of a format that declares no faster: arrays are contracted pair by
pair, from left to right, each pair as one batched matrix product. An index may be on any number of arrays, and stays
open where the output names it.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError

__all__ = ["Formula", "contract", "least_cut", "letters"]


def letters(modes: int, bonds: int) -> tuple[str, str]:
    """Indices for the formula of a format of any order: so many for its modes, and so many for its bonds.

    Examples
    --------
    >>> letters(3, 2)
    ('abc', 'de')
    """
    every = string.ascii_letters + "".join(map(chr, range(0x3B1, 0x3B1 + max(0, modes + bonds - 52))))
    return every[:modes], every[modes : modes + bonds]


class Formula(NamedTuple):
    """An einsum string, taken apart.

    Attributes
    ----------
    inputs : tuple of str
        The indices of each array, in order.
    output : str
        The open indices: one a mode.

    Examples
    --------
    >>> Formula.parsed("ar,br->ab", 2, 2)
    Formula(inputs=('ar', 'br'), output='ab')
    """

    inputs: tuple[str, ...]
    output: str

    @classmethod
    def parsed(cls, text: str, arrays: int, order: int) -> Formula:
        """Take a string apart and check it against the number of arrays and of modes.

        Raises
        ------
        ConfigError
            If it is no einsum string of explicit output for so many arrays and modes.
        """
        left, arrow, output = text.replace(" ", "").partition("->")
        inputs = tuple(left.split(","))
        known = set(left)
        if not arrow or len(inputs) != arrays or len(output) != order or len(set(output)) != order:
            raise ConfigError(f"formula {text!r} is not one of {arrays} arrays and {order} modes, as in 'ar,br->ab'")
        if any(len(set(own)) != len(own) for own in inputs) or not set(output) <= known:
            raise ConfigError(f"formula {text!r} repeats an index on one array, or its output names an unknown index")
        return cls(inputs, output)

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The size of every index.

        Raises
        ------
        ConfigError
            If the shapes do not fit the indices.
        """
        found: dict[str, int] = {}
        for own, shape in zip(self.inputs, shapes, strict=True):
            if len(own) != len(shape) or any(found.setdefault(i, d) != d for i, d in zip(own, shape, strict=True)):
                raise ConfigError(f"an array of shape {tuple(shape)} does not fit its indices {own!r} in the formula")
        return found


def contract(backend: Backend, inputs: Sequence[str], arrays: Sequence[Array], output: str) -> Array:
    """The einsum of some arrays.

    Parameters
    ----------
    backend : Backend
    inputs : sequence of str
        The indices of each array, none twice on one.
    arrays : sequence of array
    output : str
        Indices that are not summed, in order; each is on some array.

    Returns
    -------
    array

    Notes
    -----
    Costs what the pairwise contraction from left to right costs; no optimal order is searched.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import load_backend
    >>> a, b = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    >>> contract(load_backend("numpy"), ["ij", "jk"], [a, b], "ki")
    array([[ 3., 12.],
           [ 3., 12.]])
    """
    indices, now = inputs[0], arrays[0]
    for place in range(1, len(inputs)):
        later = set(output).union(*inputs[place + 1 :])
        now, indices = _pair(backend, (indices, now), (inputs[place], arrays[place]), later)
    now, indices = _summed(backend, indices, now, set(output))
    return backend.permute_dims(now, [indices.index(i) for i in output]) if indices != output else now


def _summed(backend: Backend, indices: str, array: Array, kept: set[str]) -> tuple[Array, str]:
    """Sum over the indices that nobody else has."""
    for index in [i for i in indices if i not in kept]:
        array = backend.sum(array, axis=indices.index(index))
        indices = indices.replace(index, "")
    return array, indices


def _pair(backend: Backend, a: tuple[str, Array], b: tuple[str, Array], later: set[str]) -> tuple[Array, str]:
    """Contract two arrays over the indices that are on both and on nothing later."""
    left, left_is = _summed(backend, a[0], a[1], later | set(b[0]))
    right, right_is = _summed(backend, b[0], b[1], later | set(a[0]))
    both = [i for i in left_is if i in right_is]
    batch, inner = [i for i in both if i in later], [i for i in both if i not in later]
    rows, cols = [i for i in left_is if i not in both], [i for i in right_is if i not in both]
    size = {**dict(zip(left_is, left.shape, strict=True)), **dict(zip(right_is, right.shape, strict=True))}

    def matrices(array: Array, own: str, first: list[str], second: list[str]) -> Array:
        order = [own.index(i) for i in itertools.chain(batch, first, second)]
        array = array if order == sorted(order) else backend.permute_dims(array, order)
        return backend.reshape(array, [math.prod(size[i] for i in part) for part in (batch, first, second)])

    product = backend.matmul(matrices(left, left_is, rows, inner), matrices(right, right_is, inner, cols))
    found = [*batch, *rows, *cols]
    return backend.reshape(product, [size[i] for i in found]), "".join(found)


def least_cut(formula: Formula, size: Mapping[str, int], rows: Sequence[int]) -> int:
    """The product of the bonds that a cut between some modes and the others goes through, at the least that is found.

    An upper bound of the rank of that unfolding: every division of the arrays into two sides gives one. Up to 12 arrays
    all divisions are tried; of more, one after another is moved to the side that makes the product smaller.
    """
    open_rows = {formula.output[mode] for mode in rows}
    count = len(formula.inputs)

    def cost(side: Sequence[bool]) -> int:
        total = 1
        for index, length in size.items():
            sides = {side[k] for k, own in enumerate(formula.inputs) if index in own}
            if index in formula.output:
                sides.add(index in open_rows)
            total *= length if len(sides) == 2 else 1
        return total

    if count <= 12:
        return min(cost(side) for side in itertools.product((False, True), repeat=count))
    side = [bool(open_rows & set(own)) for own in formula.inputs]
    best, improved = cost(side), True
    while improved:
        improved = False
        for k in range(count):
            side[k] = not side[k]
            now = cost(side)
            if now < best:
                best, improved = now, True
            else:
                side[k] = not side[k]
    return best

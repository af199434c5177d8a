"""Contraction of a small tensor network given as an einsum string, on any backend.

This is the reference implementation for every format, and the default for formats that do not override it. Arrays are
contracted pairwise from left to right, each pair as one batched matrix product. An index may occur on any number of
arrays; it stays open if the output names it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import NamedTuple

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

__all__ = ["Contraction", "Formula", "letters"]


def letters(modes: int, bonds: int) -> tuple[str, str]:
    """Return distinct index letters for the modes and for the bonds of a formula.

    Greek letters continue after the 52 ASCII letters.

    Examples
    --------
    >>> letters(3, 2)
    ('abc', 'de')
    """
    every = string.ascii_letters + "".join(map(chr, range(0x3B1, 0x3B1 + max(0, modes + bonds - 52))))
    return every[:modes], every[modes : modes + bonds]


class Formula(NamedTuple):
    """A parsed einsum string.

    Attributes
    ----------
    inputs : tuple of str
        The indices of each array, in order.
    output : str
        The open indices, one per mode.

    Examples
    --------
    >>> Formula.parsed("ar,br->ab", 2, 2)
    Formula(inputs=('ar', 'br'), output='ab')
    """

    inputs: tuple[str, ...]
    output: str

    @classmethod
    def parsed(cls, text: str, arrays: int, order: int) -> Formula:
        """Parse a string and check it against the number of arrays and of modes.

        Raises
        ------
        ConfigError
            If it is not an einsum string with explicit output for that many arrays and modes.
        """
        if not isinstance(text, str):
            raise ConfigError(
                f"the formula of a format must be a string; got {safe_repr(text)}. If it is a method, write @property "
                "above its definition"
            )
        left, arrow, output = text.replace(" ", "").partition("->")
        inputs = tuple(left.split(","))
        known = set(left)
        if not arrow or len(inputs) != arrays or len(output) != order or len(set(output)) != order:
            raise ConfigError(
                f"formula {text!r} must be an einsum string for {arrays} arrays and {order} modes, such as 'ar,br->ab'"
            )
        if any(len(set(own)) != len(own) for own in inputs) or not set(output) <= known:
            raise ConfigError(f"formula {text!r} repeats an index on one array, or its output names an unknown index")
        return cls(inputs, output)

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Return the size of every index.

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


class _Pair(NamedTuple):
    """The plan of one pairwise contraction.

    ``left_sums`` and ``right_sums`` are axes to sum first. The orders then sort the remaining axes: those of the left
    array into batch, rows, inner, and those of the right array into batch, inner, columns. The last three fields count
    the axes of each kind.
    """

    left_sums: tuple[int, ...]
    right_sums: tuple[int, ...]
    left_order: tuple[int, ...]
    right_order: tuple[int, ...]
    batch: int
    rows: int
    inner: int


class Contraction:
    """An einsum, planned once and run on any backend.

    All decisions about indices are made in the constructor. A call runs only sums, permutations, reshapes and matrix
    products, which a compiler can trace.

    Parameters
    ----------
    inputs : sequence of str
        The indices of each array, without repeats on one array.
    output : str
        Indices that are not summed, in order; each occurs on at least one array.

    Notes
    -----
    Pairs are contracted from left to right; no optimal order is searched.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import load_backend
    >>> a, b = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    >>> Contraction(["ij", "jk"], "ki")(load_backend("numpy"), [a, b])
    array([[ 3., 12.],
           [ 3., 12.]])
    """

    def __init__(self, inputs: Sequence[str], output: str) -> None:
        self.pairs: list[_Pair] = []
        now = inputs[0]
        for place in range(1, len(inputs)):
            later = set(output).union(*inputs[place + 1 :])
            now = self._planned(now, inputs[place], later)
        self.sums, now = _summed(now, set(output))
        order = tuple(now.index(index) for index in output)
        self.order = order if order != tuple(range(len(order))) else ()

    def _planned(self, left: str, right: str, later: set[str]) -> str:
        left_sums, left = _summed(left, later | set(right))
        right_sums, right = _summed(right, later | set(left))
        both = [index for index in left if index in right]
        batch = [index for index in both if index in later]
        inner = [index for index in both if index not in later]
        rows = [index for index in left if index not in both]
        cols = [index for index in right if index not in both]
        left_order = tuple(left.index(index) for index in [*batch, *rows, *inner])
        right_order = tuple(right.index(index) for index in [*batch, *inner, *cols])
        self.pairs.append(_Pair(left_sums, right_sums, left_order, right_order, len(batch), len(rows), len(inner)))
        return "".join([*batch, *rows, *cols])

    def __call__(self, backend: Backend, arrays: Sequence[Array]) -> Array:
        """Compute the contracted array."""
        now = arrays[0]
        for pair, right in zip(self.pairs, arrays[1:], strict=True):
            now = _contracted(backend, pair, now, right)
        now = _without(backend, now, self.sums)
        return backend.permute_dims(now, self.order) if self.order else now


def _summed(indices: str, kept: set[str]) -> tuple[tuple[int, ...], str]:
    """Return the axes of the indices that are not kept, last axis first, and the remaining indices."""
    axes = tuple(axis for axis in reversed(range(len(indices))) if indices[axis] not in kept)
    return axes, "".join(index for index in indices if index in kept)


def _without(backend: Backend, array: Array, axes: tuple[int, ...]) -> Array:
    for axis in axes:
        array = backend.sum(array, axis=axis)
    return array


def _contracted(backend: Backend, pair: _Pair, left: Array, right: Array) -> Array:
    left = _turned(backend, _without(backend, left, pair.left_sums), pair.left_order)
    right = _turned(backend, _without(backend, right, pair.right_sums), pair.right_order)
    end = pair.batch + pair.rows
    batch, rows, inner = left.shape[: pair.batch], left.shape[pair.batch : end], left.shape[end:]
    cols = right.shape[pair.batch + pair.inner :]
    sizes = math.prod(batch), math.prod(rows), math.prod(inner), math.prod(cols)
    product = backend.matmul(
        backend.reshape(left, (sizes[0], sizes[1], sizes[2])), backend.reshape(right, (sizes[0], sizes[2], sizes[3]))
    )
    return backend.reshape(product, (*batch, *rows, *cols))


def _turned(backend: Backend, array: Array, order: tuple[int, ...]) -> Array:
    return array if order == tuple(range(len(order))) else backend.permute_dims(array, order)

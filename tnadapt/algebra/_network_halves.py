"""A weight's rows of a tensor network as a product of two matrices whose inner dimension is the bound on their rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays

from ._weight_places import Box, WeightPlace, enclosing, run_in_box
from .formats import Format, Legs
from .network import Network
from .products import kronecker_tensor
from .unfolding import row_wise_khatri_rao

__all__ = ["NetworkHalves", "width_at"]


class _SplitBox(NamedTuple):
    """The box of one split, and its rows and columns."""

    ranges: Box
    legs: Legs


def width_at(network: Network, place: WeightPlace) -> int | None:
    """Return a bound on the rank of a weight's rows, the inner dimension of :class:`NetworkHalves`.

    None if rows and columns are digits of several splits.
    """
    parts = _parts(network, place)
    if parts is None:
        return None
    # The rank of an elementwise product, as that of a Kronecker product, is at most the product of the ranks.
    return network.terms * math.prod(
        _width(*pair) for pair in zip(network.splits, [p.legs for p in parts], strict=True)
    )


@functools.lru_cache(maxsize=1024)
def _width(split: Format, legs: Legs) -> int:
    # The same for all weights of one shape in a group.
    return split.rank_of_legs(legs)


def _is_kronecker(network: Network) -> bool:
    return network.kronecker and len(network.splits) > 1


def _parts(network: Network, place: WeightPlace) -> list[_SplitBox] | None:
    if not _is_kronecker(network):
        return [_SplitBox(place.ranges, place.legs())] * len(network.splits)
    if place.across > 1:
        return None
    # An index is a number with one digit a split. The update is a part of the Kronecker product of the matrices that
    # the digits' ranges cut out of the splits.
    digits = [enclosing(_digit_sizes(network, mode), *bounds) for mode, bounds in enumerate(place.ranges)]
    boxes = [tuple(digit[k] for digit in digits) for k in range(len(network.splits))]
    return [_SplitBox(ranges, place._replace(ranges=ranges).legs()) for ranges in boxes]


def _digit_sizes(network: Network, mode: int) -> list[int]:
    return [split.sizes[mode] for split in network.splits]


class NetworkHalves(FixedArrays):
    """L and R of a weight's rows, planned once.

    Parameters
    ----------
    network : Network
    place : WeightPlace
        For which :func:`width_at` is not None.

    Examples
    --------
    Two rows in each row of a matrix of rank 2 have rank 4:

    >>> import numpy as np
    >>> from tnadapt import Config
    >>> from tnadapt.algebra._weight_places import place_of
    >>> from tnadapt.backends import load_backend
    >>> network = Network(Config(2, fold=(24, 20)), 480)
    >>> halves = NetworkHalves(network, place_of((24, 20), 120, 120, 10))
    >>> left, right = halves(load_backend("numpy"), {name: np.ones(shape) for name, shape in network.shapes.items()})
    >>> left.shape, right.shape
    ((12, 4), (4, 10))
    """

    def __init__(self, network: Network, place: WeightPlace) -> None:
        super().__init__()
        parts = _parts(network, place)
        assert parts is not None
        self.network, self.place, self._ranges = network, place, [part.ranges for part in parts]
        self._halves = [split.halves(part.legs) for split, part in zip(network.splits, parts, strict=True)]
        self._rows = run_in_box(place.row_sizes, place.row_ranges, place.rows)
        self._within: list[slice | np.ndarray] = []
        if _is_kronecker(network):
            for mode, bounds in enumerate(place.ranges):
                sizes = _digit_sizes(network, mode)
                self._within.append(run_in_box(sizes, enclosing(sizes, *bounds), bounds))

    def __deepcopy__(self, memo: dict[int, object]) -> NetworkHalves:
        return self  # immutable

    def make(self, key: Hashable) -> np.ndarray:
        """Return positions that are no slice: of the rows, or of a mode's indices in the box of their digits."""
        found = self._rows if key == "rows" else self._within[key]  # type: ignore[call-overload]
        assert isinstance(found, np.ndarray)
        return found

    def __call__(self, backend: Backend, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Compute L and R without the scale, shapes (rows, inner) and (inner, columns); differentiable."""
        lefts, rights = [], []
        for prefixes in self.network.prefixes:
            own = self.network.of_term(prefixes, arrays)
            halves = [
                made(backend, list(mine.values()), ranges)
                for made, mine, ranges in zip(self._halves, own, self._ranges, strict=True)
            ]
            lefts.append(self._joined(backend, [left for left, _ in halves], range(self.place.modes)))
            after = range(self.place.modes, len(self.place.ranges))
            rights.append(self._joined(backend, [right for _, right in halves], after))
        left = self._picked(backend, backend.concat(lefts, axis=1), "rows", 0)
        return left, backend.matrix_transpose(backend.concat(rights, axis=1))

    def _joined(self, backend: Backend, halves: Sequence[Array], modes: range) -> Array:
        """Join the halves of the splits on one side of the cut, whose modes are given."""
        if not self._within:
            return row_wise_khatri_rao(backend, [backend.reshape(half, (-1, half.shape[-1])) for half in halves])
        whole = kronecker_tensor(backend, halves)
        for mode in modes:
            whole = self._picked(backend, whole, mode, mode)
        return backend.reshape(whole, (-1, whole.shape[-1]))

    def _picked(self, backend: Backend, array: Array, key: str | int, axis: int) -> Array:
        where = self._rows if key == "rows" else self._within[axis]
        if not isinstance(where, slice):
            return backend.take(array, self.on(backend, key, array), axis=axis)
        whole = (where.start, where.stop) == (0, array.shape[axis])
        return array if whole else array[(*(slice(None),) * axis, where, ...)]

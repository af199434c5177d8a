"""The tensor network of one group before F: a scaled sum of Kronecker or Hadamard products of splits.

``scale * sum_t kron_k(split_tk)``, the argument of F in equation (2) of the paper; for LoHa, elementwise products.
:class:`Network` computes the vector or any slice of it, and :class:`NetworkHalves` the rows of a weight as a product of
two matrices. Symbols: T terms, K splits, M modes.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tnadapt.backends import Array, Backend, FixedArrays
from tnadapt.errors import ConfigError, ShapeError

from .config import Config, is_named
from .folding import Cut, along, balanced_shape, best_cut, boxes, folded, hypercube_shape, kronecker_sizes
from .formats import Format, Legs, Permuted, make_format
from .layout import Box, WeightPlace, enclosing, run_in_box
from .products import contracted, hadamard_tensor, khatri_rao, kronecker_tensor, rearranged, row_wise_khatri_rao

# -- The network: arrays, slices and adjoint ---------------------------------------------------------------------------


# An elementwise product of splits is computed as one matrix product if L has at most this many columns per term;
# beyond that, the product of tensors costs less.
_THICK = 64


def fold_sizes(config: Config, size: int, columns: int) -> tuple[int, ...]:
    """Return the sizes ``d_1 … d_M`` to which a group's vector is folded.

    Parameters
    ----------
    config : Config
        ``fold`` and ``order`` are used.
    size : int
        Length of the vector.
    columns : int
        c, for ``fold="stack"``: the greatest common divisor of the columns of the group's weights.

    Returns
    -------
    tuple of int
        Their product is at least ``size``.

    Raises
    ------
    ShapeError
        If the size is not a multiple of the columns of a stack, or explicit sizes are too small.

    Examples
    --------
    >>> fold_sizes(Config(groups=1), 24 * 768 * 768, columns=768)
    (18432, 768)
    """
    if config.order == 1 and config.axes is None:
        sizes: tuple[int, ...] = (size,)
    elif config.fold == "stack":
        if size % columns:
            raise ShapeError(
                f"fold='stack' needs groups that are a multiple of {columns} columns; one has {size} elements: "
                "use fold='hypercube', or groups that end where weights do"
            )
        sizes = (size // columns, columns)
    elif config.fold == "hypercube":
        sizes = hypercube_shape(size, config.order)
    elif config.fold == "balanced":
        sizes = balanced_shape(size, config.order)
    else:
        if isinstance(config.fold, str) or is_named(config.fold):
            raise ConfigError(f"fold={config.fold!r} has no sizes without the weights of a group")
        sizes = tuple(int(each) for each in config.fold)
    if math.prod(sizes) < size:
        raise ShapeError(
            f"fold={sizes} holds {math.prod(sizes)} elements and a group has {size}; "
            "give larger sizes, or fold='balanced'"
        )
    return sizes


def _in_order(name: str, sizes: tuple[int, ...], config: Config) -> Format:
    """Return the format of a split, with its modes in the order of ``config.axes``."""
    if config.axes is None:
        return make_format(name, sizes, config.rank)
    axes = tuple(axis if isinstance(axis, tuple) else (axis,) for axis in config.axes)
    inner = make_format(name, [math.prod(sizes[digit] for digit in axis) for axis in axes], config.rank)
    return Permuted(inner, sizes, axes)


class Network:
    """Tensor network that computes a vector of ``size`` elements from a few arrays.

    Parameters
    ----------
    config : Config
        ``fold``, ``format``, ``rank``, ``splits``, ``terms`` and ``combine`` are used.
    size : int
        Length of the vector.
    columns : int
        See :func:`fold_sizes`.

    Attributes
    ----------
    sizes : tuple of int
        Sizes of the folded tensor, whose ``vec`` is cut to ``size``.
    splits : list of Format
        The K splits; each term has its own arrays of the same shapes.
    shapes : dict of str to tuple of int
        The arrays: ``"split0.factor0"``, or ``"term0.split0.factor0"`` where there are several terms.

    Examples
    --------
    >>> Network(Config(rank=2, fold="hypercube"), 30).shapes
    {'split0.factor0': (6, 2), 'split0.factor1': (6, 2)}
    """

    def __init__(self, config: Config, size: int, columns: int = 1) -> None:
        self.size = size
        self.scale = config.scale
        self.kronecker = config.combine == "kronecker"
        self.sizes = fold_sizes(config, size, columns)
        if self.kronecker:
            split_sizes = kronecker_sizes(self.sizes, config.splits, config.split_size)
        else:
            split_sizes = [self.sizes] * config.splits
        leading = "dense" if config.leading == "dense" else config.format
        names = [leading] * (config.splits - 1) + [config.format]
        self.splits: list[Format] = [
            _in_order(name, sizes, config) for name, sizes in zip(names, split_sizes, strict=True)
        ]
        if config.axes is not None and math.prod(self.sizes) != size:
            raise ShapeError(
                f"axes={config.axes} reorder all {math.prod(self.sizes)} elements of fold={self.sizes}, and a group "
                f"has {size}: give a fold with as many elements as the group, such as ('weights', 'rows', 'cols')"
            )
        self.terms = config.terms

    @functools.cached_property
    def prefixes(self) -> list[list[str]]:
        """For each term and split, the prefix of the names of its arrays."""
        several = self.terms > 1
        return [
            [f"{f'term{term}.' if several else ''}split{k}." for k in range(len(self.splits))]
            for term in range(self.terms)
        ]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array, in order."""
        return {
            prefix + name: shape
            for term in self.prefixes
            for prefix, split in zip(term, self.splits, strict=True)
            for name, shape in split.shapes.items()
        }

    def mode_of(self, name: str) -> int | None:
        """Return the mode whose factor an array is, of shape ``(sizes[mode], rank)``; None if it is none."""
        if is_kronecker(self):
            return None
        _, split, array = parsed_name(self, name)
        return split.mode_of(array)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all arrays."""
        return self.terms * sum(split.num_parameters for split in self.splits)

    def whole(self, backend: Backend, arrays: Mapping[str, Array]) -> Array:
        """Compute the vector, shape (size,)."""
        return self.slice(backend, arrays, 0, self.size)

    def slice(self, backend: Backend, arrays: Mapping[str, Array], start: int, stop: int) -> Array:
        """Compute elements ``start`` to ``stop - 1`` of the vector, without forming anything much larger.

        This is one matrix product if the formats allow it (see :mod:`tnadapt.algebra.folding`), else a sequence of
        boxes of the tensor.
        """
        cut = best_cut(self.sizes, start, stop, self._thin)
        if cut is not None:
            vec = backend.flatten(self._product(backend, arrays, cut))
            lo, hi = start - cut.start, stop - cut.start
            return vec if (lo, hi) == (0, vec.shape[0]) else vec[lo:hi]
        vec = along(
            backend, self.sizes, start, stop, lambda ranges: backend.flatten(self._sum(backend, arrays, ranges))
        )
        return vec if self.scale == 1.0 else vec * self.scale

    def slice_factors(
        self, backend: Backend, arrays: Mapping[str, Array], start: int, stop: int
    ) -> tuple[Array, Array, int] | None:
        """Compute the two matrices whose product contains a slice, if :meth:`slice` is one matrix product.

        Returns
        -------
        (array, array, int) or None
            L and R, one of them scaled, and the position in ``vec(L R)`` of the first element of the slice.
        """
        cut = best_cut(self.sizes, start, stop, self._thin)
        if cut is None:
            return None
        return *self._scaled(*self.unfolded(backend, arrays, cut)), start - cut.start

    def adjoint(
        self, backend: Backend, arrays: Mapping[str, Array], vec: Array, only: str | None = None
    ) -> dict[str, Array]:
        """Compute the gradient of ``<vec, whole(arrays)>`` with respect to each array.

        The vector is linear in each single array; this applies the adjoint of each of these maps.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
            Of the shapes in ``shapes``.
        vec : array, shape (size,)
        only : str, optional
            Name of one array, to compute only the arrays of its split.

        Returns
        -------
        dict of str to array
            In the order and shapes of ``shapes``.

        Notes
        -----
        Each contraction costs as much as forming the vector; memory is a few times its length.
        """
        scaled = vec if self.scale == 1.0 else vec * self.scale
        tensor = folded(backend, scaled, self.sizes)
        gradients: dict[str, Array] = {}
        for prefixes in self.prefixes:
            factors = self.of_term(prefixes, arrays)
            for k, (prefix, split) in enumerate(zip(prefixes, self.splits, strict=True)):
                if only is not None and only.rpartition(".")[0] + "." != prefix:
                    continue
                reached = self._reached(backend, factors, tensor, k)
                gradients |= {prefix + name: g for name, g in split.adjoint(backend, factors[k], reached).items()}
        return {name: gradients[name] for name in self.shapes if name in gradients}

    def of_term(self, prefixes: Sequence[str], arrays: Mapping[str, Array]) -> list[dict[str, Array]]:
        """Return the arrays of one term, split by split, by the names that their formats use."""
        return [
            {name: arrays[prefix + name] for name in split.shapes}
            for prefix, split in zip(prefixes, self.splits, strict=True)
        ]

    def _reached(self, backend: Backend, factors: Sequence[Mapping[str, Array]], tensor: Array, k: int) -> Array:
        """Compute the gradient of ``<tensor, T>`` with respect to the tensor of one split of a term."""
        if len(self.splits) == 1:
            return tensor
        others = [
            None if j == k else split.tensor(backend, factors[j], [(0, size) for size in split.sizes])
            for j, split in enumerate(self.splits)
        ]
        if not self.kronecker:
            return hadamard_tensor([tensor, *(other for other in others if other is not None)])
        sizes = [split.sizes for split in self.splits]
        return contracted(backend, rearranged(backend, tensor, sizes), others, sizes[k])

    def inner(self, modes: int) -> int | None:
        """Return the inner size of L R if the unfolding with ``modes`` modes as rows is such a product, else None."""
        if is_kronecker(self):
            return None
        inner = self.terms
        for split in self.splits:
            width = split.inner(modes)
            if width is None:
                return None
            inner *= width
        return inner

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        """Compute L and R of a part of the unfolding, without the scale. :meth:`inner` must not be None.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        cut : Cut
            The modes that are rows, and the range of rows and columns.

        Returns
        -------
        (array, array)
            Shapes (rows, inner) and (inner, columns).
        """
        lefts, rights = [], []
        for prefixes in self.prefixes:
            factors = self.of_term(prefixes, arrays)
            halves = [split.unfolded(backend, mine, cut) for split, mine in zip(self.splits, factors, strict=True)]
            # For an elementwise product, L has all products of columns, and R all products of rows.
            lefts.append(row_wise_khatri_rao(backend, [left for left, _ in halves]))
            rights.append(khatri_rao(backend, [right for _, right in halves]))
        return backend.concat(lefts, axis=1), backend.concat(rights, axis=0)

    def _thin(self, modes: int) -> int | None:
        """Return :meth:`inner` if one matrix product is the cheapest, or else None."""
        inner = self.inner(modes)
        return None if inner is None or (len(self.splits) > 1 and inner > _THICK * self.terms) else inner

    def _product(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> Array:
        """Compute a part of the unfolded sum over terms as one matrix product, with the scale."""
        left, right = self.unfolded(backend, arrays, cut)
        if self.scale != 1.0 and backend.dtype_name(left) in ("float16", "bfloat16"):
            # Scale the product and not a factor: scaling rounds, and half precision has few bits.
            return backend.matmul(left, right) * self.scale
        return backend.matmul(*self._scaled(left, right))

    def _scaled(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Multiply the smaller factor by the scale."""
        if self.scale == 1.0:
            return left, right
        return (left * self.scale, right) if left.shape[0] < right.shape[1] else (left, right * self.scale)

    def _sum(self, backend: Backend, arrays: Mapping[str, Array], ranges: Sequence[tuple[int, int]]) -> Array:
        """Compute a box of the tensor: the sum over terms."""
        compute = self._kronecker if self.kronecker else self._hadamard
        terms = [compute(backend, self.of_term(prefixes, arrays), ranges) for prefixes in self.prefixes]
        if self.terms > 1 and len(self.splits) == 1:
            # A term may be a view of its single array. The gradients of all such arrays are then views of the same
            # memory, into which torch would accumulate a second gradient once per view: copy the terms instead.
            terms = [term * 1.0 for term in terms]
        return functools.reduce(operator.add, terms)

    def _hadamard(
        self, backend: Backend, own: Sequence[Mapping[str, Array]], ranges: Sequence[tuple[int, int]]
    ) -> Array:
        return hadamard_tensor(
            [split.tensor(backend, arrays, ranges) for split, arrays in zip(self.splits, own, strict=True)]
        )

    def _kronecker(
        self, backend: Backend, factors: Sequence[Mapping[str, Array]], ranges: Sequence[tuple[int, int]]
    ) -> Array:
        if len(self.splits) == 1:
            return self.splits[0].tensor(backend, factors[0], ranges)
        # In each mode the index is a K-digit number with one digit per split, most significant first. A range of
        # indices is a box of digits, or a sequence of a few such boxes.
        digits = []
        for mode, (lo, hi) in enumerate(ranges):
            digit_boxes = boxes([split.sizes[mode] for split in self.splits], lo, hi)
            if len(digit_boxes) > 1:
                edges = [lo, *(box.start for box in digit_boxes[1:]), hi]
                parts = [
                    self._kronecker(backend, factors, [*ranges[:mode], edge, *ranges[mode + 1 :]])
                    for edge in itertools.pairwise(edges)
                ]
                return backend.concat(parts, axis=mode)
            digits.append(digit_boxes[0])
        tensor = kronecker_tensor(
            backend,
            [
                split.tensor(backend, arrays, [box.ranges[k] for box in digits])
                for k, (split, arrays) in enumerate(zip(self.splits, factors, strict=True))
            ],
        )
        cut = tuple(slice(lo - box.start, hi - box.start) for (lo, hi), box in zip(ranges, digits, strict=True))
        return tensor[cut]


def is_kronecker(network: Network) -> bool:
    """Return whether a network is a Kronecker product of several splits."""
    return network.kronecker and len(network.splits) > 1


def parsed_name(network: Network, name: str) -> tuple[int, Format, str]:
    """Return the term, the split and the format's own name of an array of a network."""
    prefix, _, array = name.rpartition(".")
    term, _, split = prefix.rpartition("split")
    return int(term[len("term") : -1] or 0), network.splits[int(split)], array


# -- A weight's rows as a product of two matrices, and a bound on their rank -------------------------------------------


def width_at(network: Network, place: WeightPlace) -> int | None:
    """Return a bound on the rank of a weight's rows, the inner dimension of :class:`NetworkHalves`.

    None if rows and columns are digits of several splits.
    """
    parts = _parts(network, place)
    if parts is None:
        return None
    # The rank of an elementwise product, like that of a Kronecker product, is at most the product of the ranks.
    return network.terms * math.prod(
        _width(split, legs) for split, (_, legs) in zip(network.splits, parts, strict=True)
    )


@functools.lru_cache(maxsize=1024)
def _width(split: Format, legs: Legs) -> int:
    # The same for all weights of one shape in a group.
    return split.rank_of_legs(legs)


def _parts(network: Network, place: WeightPlace) -> list[tuple[Box, Legs]] | None:
    """Return the box of each split, and its rows and columns."""
    if not is_kronecker(network):
        return [(place.ranges, place.legs())] * len(network.splits)
    if place.across > 1:
        return None
    # An index is a number with one digit per split. The update is a part of the Kronecker product of the matrices that
    # the digits' ranges cut out of the splits.
    digits = [enclosing(_digit_sizes(network, mode), *bounds) for mode, bounds in enumerate(place.ranges)]
    boxes = [tuple(digit[k] for digit in digits) for k in range(len(network.splits))]
    return [(ranges, place._replace(ranges=ranges).legs()) for ranges in boxes]


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
    >>> from tnadapt.algebra.layout import place_of
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
        self.network, self.place, self._ranges = network, place, [ranges for ranges, _ in parts]
        self._halves = [split.halves(legs) for split, (_, legs) in zip(network.splits, parts, strict=True)]
        self._rows = run_in_box(place.row_sizes, place.row_ranges, place.rows)
        self._within: list[slice | np.ndarray] = []
        if is_kronecker(network):
            for mode, bounds in enumerate(place.ranges):
                sizes = _digit_sizes(network, mode)
                self._within.append(run_in_box(sizes, enclosing(sizes, *bounds), bounds))

    def __deepcopy__(self, memo: dict[int, object]) -> NetworkHalves:
        return self  # immutable

    def make(self, key: Hashable) -> np.ndarray:
        """Return positions that are no slice: of the rows, or of a mode's indices in the box of their digits."""
        positions = self._rows if key == "rows" else self._within[key]  # type: ignore[call-overload]
        assert isinstance(positions, np.ndarray)
        return positions

    def __call__(self, backend: Backend, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Compute L and R without the scale, shapes (rows, inner) and (inner, columns); differentiable."""
        lefts, rights = [], []
        for prefixes in self.network.prefixes:
            factors = self.network.of_term(prefixes, arrays)
            halves = [
                halves_of_split(backend, list(mine.values()), ranges)
                for halves_of_split, mine, ranges in zip(self._halves, factors, self._ranges, strict=True)
            ]
            lefts.append(self._joined(backend, [left for left, _ in halves], range(self.place.modes)))
            after = range(self.place.modes, len(self.place.ranges))
            rights.append(self._joined(backend, [right for _, right in halves], after))
        left = self._picked(backend, backend.concat(lefts, axis=1), "rows", 0)
        return left, backend.matrix_transpose(backend.concat(rights, axis=1))

    def _joined(self, backend: Backend, halves: Sequence[Array], modes: range) -> Array:
        """Join the halves of the splits on one side of the cut, which has the given modes."""
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

"""Layout: which elements of which weights form each of G groups, and where a weight is in a group's folded tensor.

The updates of all weights form one long vector: weight after weight, each in C order (``vec``, concatenated). A layout
cuts it into G groups. Paper: appendix A.3, figure 13.
"""

from __future__ import annotations

import collections
import itertools
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tnadapt.argument_checks import checks_arguments, integer, is_sequence, wrong_argument
from tnadapt.backends import Array, Backend, get_backend
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from .folding import MAX_SIZE, boxes
from .formats import Legs

# -- The long vector and its groups ------------------------------------------------------------------------------------


# Longer lists of pieces are cached: few groups have so many weights.
_LONG = 64
# The groups of several configs are listed; only a hostile file has more.
_MAX_JOINED = 1 << 20

Groups = str | int | tuple[tuple[int, ...], ...]


class Piece(NamedTuple):
    """A run of consecutive elements within one weight and one group.

    Attributes
    ----------
    weight : int
        Index of the weight.
    weight_start : int
        Position of the first element in ``vec`` of the weight.
    group : int
        Index of the group.
    group_start : int
        Position of the first element in the group's vector.
    length : int
        Number of elements.
    """

    weight: int
    weight_start: int
    group: int
    group_start: int
    length: int


class Layout:
    """The long vector cut into groups.

    The groups cut a vector of the same weights, which may be in another order.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
        One per weight.
    cuts : sequence of int
        Where each group starts in the vector that is cut, and the last one ends, with the vector or behind it.
    order : sequence of int, optional
        The weights in the order in which they are cut; that of ``shapes`` if omitted.

    Attributes
    ----------
    size : int
        N, the total number of elements of all weights.
    num_groups : int
        G, the number of groups.

    Notes
    -----
    With a range of cuts, neither time nor memory of the constructor grows with the number of groups, so that a plan for
    any G is instant.

    Examples
    --------
    >>> layout = make_layout(2, [(2, 3), (2, 2)])
    >>> layout.size, layout.num_groups, layout.group_size(0)
    (10, 2, 5)
    >>> layout.of_weight(0)
    [Piece(weight=0, weight_start=0, group=0, group_start=0, length=5),
     Piece(weight=0, weight_start=5, group=1, group_start=0, length=1)]
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], cuts: Sequence[int], order: Sequence[int] | None = None
    ) -> None:
        self.shapes = tuple(shapes)
        self._sizes = [rows * cols for rows, cols in self.shapes]
        self.size = sum(self._sizes)
        self.num_groups = len(cuts) - 1
        self._cuts = cuts
        self._order = range(len(self.shapes)) if order is None else order
        self._places = self._order if order is None else {weight: place for place, weight in enumerate(order)}
        #: Where each weight starts in the vector that is cut, and the end of the last one.
        self._starts = [0, *itertools.accumulate(self._sizes[weight] for weight in self._order)]
        # Computed here rather than on first access: a compiler cannot trace a bisection.
        listed = () if isinstance(cuts, range) else self._starts[:-1]
        self._first_groups = [bisect_right(cuts, start) - 1 for start in listed]
        self._long: dict[int, list[Piece]] = {}

    @classmethod
    def joined(cls, layouts: Sequence[Layout]) -> Layout:
        """Return several layouts one after another as one; at most 2**20 groups.

        Examples
        --------
        >>> layout = Layout.joined([make_layout("weight", [(2, 2)] * 2), make_layout(1, [(2, 3)])])
        >>> layout.num_groups, layout.of_weight(2)
        (3, [Piece(weight=2, weight_start=0, group=2, group_start=0, length=6)])
        """
        number = sum(layout.num_groups for layout in layouts)
        if number > _MAX_JOINED:
            raise ConfigError(f"several configs make at most {_MAX_JOINED} groups together; these make {number}")
        shapes, cuts, order = list[tuple[int, int]](), [0], list[int]()
        for layout in layouts:
            size = cuts[-1]
            cuts += [size + min(cut, layout.size) for cut in layout._cuts[1:]]
            order += [len(shapes) + weight for weight in layout._order]
            shapes += layout.shapes
        return cls(shapes, cuts, order)

    def group_size(self, group: int) -> int:
        """Return the number of elements of a group."""
        last = group + 1 == self.num_groups
        return (self.size if last else self._cuts[group + 1]) - self._cuts[group]

    def same_size(self) -> list[tuple[int, int, int]]:
        """Return runs of consecutive groups of equal size: ``(first group, number of groups, size)``."""
        last = self.num_groups - 1
        if isinstance(self._cuts, range) and last:
            return [(0, last, self._cuts.step), (last, 1, self.group_size(last))]
        return [(group, 1, self.group_size(group)) for group in range(self.num_groups)]

    @cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """The groups that differ in size: the first of each kind, and the number of groups of that kind.

        Examples
        --------
        >>> make_layout("weight", [(2, 3), (2, 2), (3, 2)]).kinds, make_layout(4, [(2, 3), (2, 2)]).kinds
        ([(0, 2), (1, 1)], [(0, 3), (3, 1)])
        """
        return _first_and_count(self.same_size())

    @cached_property
    def kinds_of_stacks(self) -> list[tuple[int, int]]:
        """The groups that differ in size or in :meth:`columns`, like ``kinds``."""
        if self.equal_columns:
            return self.kinds
        return _first_and_count(
            (group, 1, (self.group_size(group), self.columns(group))) for group in range(self.num_groups)
        )

    @cached_property
    def shape_counts(self) -> collections.Counter[tuple[int, int]]:
        """The number of weights of each shape."""
        return collections.Counter(self.shapes)

    @cached_property
    def equal_columns(self) -> bool:
        """Whether all weights have the same number of columns."""
        return len({cols for _, cols in self.shape_counts}) == 1

    def columns(self, group: int) -> int:
        """Return c, the greatest common divisor of the column counts of the weights with elements in the group."""
        if self.equal_columns:
            return self.shapes[0][1]
        return math.gcd(*(self.shapes[piece.weight][1] for piece in self.of_group(group)))

    def _overlap(self, place: int, group: int) -> Piece:
        """Return the elements that a group has of the weight at a position of the vector that is cut."""
        first, start = self._starts[place], self._cuts[group]
        lo, hi = max(first, start), min(self._starts[place + 1], self._cuts[group + 1])
        return Piece(self._order[place], lo - first, group, lo - start, hi - lo)

    def of_weight(self, weight: int) -> list[Piece]:
        """Return the pieces of one weight, in order; together they cover it."""
        place = self._places[weight]
        start, end = self._starts[place], self._starts[place + 1]
        group = self._first_groups[place] if self._first_groups else start // self._cuts[1]
        pieces = [self._overlap(place, group)]
        while self._cuts[group + 1] < end:
            group += 1
            pieces.append(self._overlap(place, group))
        return pieces

    def of_group(self, group: int) -> list[Piece]:
        """Return the pieces of one group, in order; together they cover it. Do not change the list."""
        if group in self._long:
            return self._long[group]
        first = bisect_right(self._starts, self._cuts[group]) - 1
        places = range(first, bisect_left(self._starts, self._cuts[group + 1], first, len(self._order)))
        pieces = [self._overlap(place, group) for place in places]
        if len(pieces) > _LONG:
            self._long[group] = pieces
        return pieces

    def whole_weights(self, group: int, needed_by: str) -> list[tuple[int, int]]:
        """Return the shapes of the weights of a group, or raise a ConfigError if it has a part of one."""
        shapes = []
        for piece in self.of_group(group):
            rows, cols = self.shapes[piece.weight]
            if piece.length != rows * cols:
                raise ConfigError(
                    f"{needed_by} needs groups of whole weights, and group {group} has {piece.length} of the "
                    f"{rows * cols} elements of a weight of {rows}×{cols}: use groups='weight', 'layer', 'role', 1, or "
                    "lists of weights"
                )
            shapes.append((rows, cols))
        return shapes

    def of_slice(self, start: int, stop: int) -> list[Piece]:
        """Return runs that cover elements ``start`` to ``stop - 1`` of the long vector, in order, each in one group.

        Unlike in :meth:`of_weight`, weights that are adjacent in a group form a single run.
        """
        if not 0 <= start <= stop <= self.size:
            raise ShapeError(f"no slice {start}:{stop} of a vector of {self.size} elements")
        pieces: list[Piece] = []
        ends = itertools.accumulate(self._sizes)
        for weight, (size, end) in enumerate(zip(self._sizes, ends, strict=True)):
            base = end - size
            if base >= stop or end <= start:
                continue
            for piece in self.of_weight(weight):
                first = base + piece.weight_start
                lo, hi = max(start - first, 0), min(stop - first, piece.length)
                if lo >= hi:
                    continue
                run = Piece(weight, piece.weight_start + lo, piece.group, piece.group_start + lo, hi - lo)
                last = pieces[-1] if pieces else None
                if last and (last.group, last.group_start + last.length) == (run.group, run.group_start):
                    pieces[-1] = last._replace(length=last.length + run.length)
                else:
                    pieces.append(run)
        return pieces


def _first_and_count(runs: Iterable[tuple[int, int, Hashable]]) -> list[tuple[int, int]]:
    """Return the first group and the number of groups of each kind, given (first, number, kind) of each run."""
    kinds: dict[Hashable, tuple[int, int]] = {}
    for start, count, kind in runs:
        first, known = kinds.get(kind, (start, 0))
        kinds[kind] = first, known + count
    return list(kinds.values())


def make_layout(
    groups: Groups,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> Layout:
    """Return the layout that ``Config.groups`` describes for these weights.

    Parameters
    ----------
    groups : {"weight", "layer", "role"}, int or tuple of tuples
        One group per weight; one per layer; one per role; G pieces of ``ceil(N / G)`` elements; or the weights of each
        group.
    shapes : sequence of (rows, cols)
        Shapes of the weights, at least one.
    layers : sequence of hashable, optional
        For ``"layer"``: one key per weight; weights with the same key form a group, in order of first appearance.
    roles : sequence of hashable, optional
        For ``"role"``: likewise, such as ``["q", "v", "q", "v"]``.

    Returns
    -------
    Layout
        With an integer G, groups of ``ceil(N / G)`` elements may cover the vector with fewer than G groups; empty
        groups are left out, and ``num_groups`` is then smaller than G. Of :class:`KnownWeights`, made once.

    Raises
    ------
    ShapeError
        If a shape is not two integers of at least 1, or there are no shapes.
    ConfigError
        If the groups do not fit the weights: G > N; an index that is repeated, missing or out of range; layers
        or roles that are missing or of the wrong length.

    Examples
    --------
    >>> make_layout("layer", [(2, 2)] * 4, layers=[0, 0, 1, 1]).num_groups
    2
    """
    if isinstance(shapes, KnownWeights) and shapes.layers is layers and shapes.roles is roles:
        if groups not in shapes.layouts:
            shapes.layouts[groups] = make_layout(groups, list(shapes), layers, roles)
        return shapes.layouts[groups]
    shapes = checked_shapes(shapes)
    sizes = [rows * cols for rows, cols in shapes]
    if groups == "weight":
        return Layout(shapes, list(itertools.accumulate(sizes, initial=0)))
    if isinstance(groups, int):
        size = sum(sizes)
        if groups > size:
            raise ConfigError(f"groups={groups} is more than the {size} elements there are; use at most {size}")
        length = -(-size // groups)
        return Layout(shapes, range(0, size + length, length))
    if isinstance(groups, str):
        members: Sequence[Sequence[int]] = _by_key(groups, layers if groups == "layer" else roles, len(shapes))
    else:
        members = groups
    order = list(itertools.chain.from_iterable(members))
    if sorted(order) != list(range(len(shapes))):
        raise ConfigError(
            f"explicit groups must name each of the weights 0 to {len(shapes) - 1} exactly once; got {list(members)}"
        )
    lengths = [sum(sizes[weight] for weight in weights) for weights in members]
    return Layout(shapes, list(itertools.accumulate(lengths, initial=0)), order)


def checked_groups(groups: Any) -> Groups:
    """Return groups as a config has them, or raise a ConfigError."""
    what = '"weight", "layer", "role", an integer of at least 1, or a list of lists of weight indices'
    if isinstance(groups, str):
        if groups not in ("weight", "layer", "role"):
            raise ConfigError(f"groups must be {what}; got {safe_repr(groups)}")
        return groups
    if isinstance(groups, (list, tuple)):
        if not groups or not all(isinstance(group, (list, tuple)) and group for group in groups):
            raise ConfigError(f"groups must be {what}, none of them empty; got {safe_repr(groups)}")
        return tuple(
            tuple(integer(f"groups[{g}]", weight, 0, 1 << 40, ConfigError) for weight in group)
            for g, group in enumerate(groups)
        )
    return integer("groups", groups, 1, MAX_SIZE, ConfigError, 'or "weight", "layer", "role" or a list of lists')


def require_alike(layout: Layout, shape: tuple[int, int], fold: Sequence[int]) -> None:
    """Raise a ConfigError unless all weights have the given shape and each group has as many of them as the fold holds.

    Parameters
    ----------
    layout : Layout
    shape : (rows, cols)
        ``Config.weight_shape``.
    fold : sequence of int
        Sizes; the product of some of the last ones is columns, and of some more of them rows times columns.

    Examples
    --------
    >>> require_alike(make_layout(1, [(4, 5), (2, 5)]), (4, 5), (2, 4, 5))
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: fold=(2, 4, 5) stands for 2 weights of 4×5, and the weights given are 1 of 4×5, 1 of ...
    """
    rows, cols = shape
    number = math.prod(fold) // (rows * cols)
    meant = f"fold={tuple(fold)} stands for {number} weight{'s' * (number != 1)} of {rows}×{cols}"
    counts = layout.shape_counts
    if set(counts) != {(rows, cols)}:
        listed = [f"{count} of {r}×{c}" for (r, c), count in list(counts.items())[:6]]
        raise ConfigError(
            f"{meant}, and the weights given are {', '.join(listed)}{', …' if len(counts) > 6 else ''}: the fold would "
            'cut through weights. Use groups="role", one group of all queries, one of all values and so on '
            '(grouped-query attention), and leave the sizes to it: preset(rank, groups="role") without weights, rows '
            "and cols. Or use a preset that takes any shapes, such as superlora or lora"
        )
    for _, _, size in layout.same_size():
        if size != math.prod(fold):
            whole, rest = divmod(size, rows * cols)
            raise ConfigError(
                f"{meant}, and a group has {whole} of them{f' and {rest} elements of another' if rest else ''}: give "
                "the preset the number of adapted weights, and use groups of whole weights"
            )


def _by_key(what: str, given: Iterable[Hashable] | None, weights: int) -> list[list[int]]:
    """Return the weights of each group, which have the same key, in order of first appearance."""
    if given is None:
        raise ConfigError(
            f'groups="{what}" needs {what}s=[…], one key per weight, to know which weights share a {what}; '
            'or use groups="weight"'
        )
    try:
        keys = list(given)
        members: dict[Hashable, list[int]] = {}
        for weight, key in enumerate(keys):
            members.setdefault(key, []).append(weight)
    except TypeError as error:
        raise ConfigError(f"{what}s must be a list of hashable keys, one per weight; got {safe_repr(given)}") from error
    if len(keys) != weights:
        raise ConfigError(f"{what}s has {len(keys)} keys for {weights} weights; give one key per weight")
    return list(members.values())


def checked_shapes(shapes: Sequence[tuple[int, int]], name: str = "shapes") -> list[tuple[int, int]]:
    """Return the shapes as pairs of integers, or raise a ShapeError."""
    try:
        checked = [tuple(operator.index(size) for size in shape) for shape in shapes]
    except TypeError as error:
        if hasattr(shapes, "named_modules"):
            advice = "[target.shape for target in tnadapt.torch.find_targets(model)]"
            raise ShapeError(f"shapes must be a list of (rows, cols) integers; got a model: give {advice}") from error
        raise ShapeError(f"shapes must be a list of (rows, cols) integers; got {safe_repr(shapes)}") from error
    if not checked:
        raise ShapeError(f"{name} is empty: there is no weight to update")
    for position, shape in enumerate(checked):
        if len(shape) != 2 or min(shape) < 1:
            raise ShapeError(
                f"{name}[{position}] is {safe_repr(shape)}; expected (rows, cols), both at least 1 "
                "(a convolution's weight is seen as (out, in * height * width))"
            )
    if sum(math.prod(shape) for shape in checked) > MAX_SIZE:
        raise ShapeError("the weights have more than 2**62 elements together, which 64-bit positions cannot count")
    return [(rows, cols) for rows, cols in checked]


# -- The matrices of weights as the vectors of groups, and back --------------------------------------------------------


@checks_arguments
def split_groups(
    matrices: Sequence[Array],
    groups: Any,
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> list[Array]:
    """Cut the long vector of several matrices into the vectors of groups.

    Parameters
    ----------
    matrices : sequence of array, shape (rows, cols)
        Of one library, dtype and device.
    groups : int, "weight", "layer", "role" or sequence of sequences of int
        As ``Config.groups``: G pieces of ``ceil(N / G)`` elements, of which the last may be shorter, and empty ones are
        left out; one group for each matrix, layer or role; or the matrices of each group, each matrix once.
    layers, roles : sequence of hashable, optional
        One key per matrix, for ``groups="layer"`` and ``"role"``.

    Returns
    -------
    list of array, shape (n,)
        A vector per group, row by row, in the library, dtype and device of the matrices; differentiable. It may share
        their memory.

    Raises
    ------
    ShapeError
        If there are no matrices, or one is no matrix with elements.
    ConfigError
        If the groups do not fit the matrices.
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.array([[0, 1, 2], [3, 4, 5]]), np.array([[6, 7]])
    >>> split_groups([a, b], 2)
    [array([0, 1, 2, 3]), array([4, 5, 6, 7])]
    """
    layout = _grouped("matrices", [array.shape for array in matrices], groups, layers, roles)
    backend = get_backend(*matrices, what="each of matrices")
    pieces = [layout.of_group(group) for group in range(layout.num_groups)]
    return list(group_vectors(backend, lambda weight: matrices[weight], pieces))


@checks_arguments
def join_groups(
    vectors: Sequence[Array],
    shapes: Sequence[tuple[int, int]],
    groups: Any,
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> list[Array]:
    """Return the matrices whose groups have these vectors: the inverse of :func:`split_groups`.

    Parameters
    ----------
    vectors : sequence of array, shape (n,)
        One per group, of one library, dtype and device.
    shapes : sequence of (rows, cols)
        Of the matrices.
    groups, layers, roles
        As for :func:`split_groups`.

    Returns
    -------
    list of array, shape (rows, cols)
        In the library, dtype and device of the vectors; differentiable.

    Raises
    ------
    ShapeError
        If there is not one vector of each group's length, or a shape is not two integers of at least 1.
    ConfigError
        If the groups do not fit the shapes.
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> join_groups([np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])], [(2, 3), (1, 2)], 2)
    [array([[0, 1, 2],
           [3, 4, 5]]), array([[6, 7]])]
    """
    layout = _grouped("shapes", shapes, groups, layers, roles)
    pieces = [layout.of_group(group) for group in range(layout.num_groups)]
    if len(vectors) != layout.num_groups:
        raise ShapeError(f"vectors must be one per group; got {len(vectors)} for {layout.num_groups} groups")
    for group, vector in enumerate(vectors):
        if tuple(vector.shape) != (layout.group_size(group),):
            raise ShapeError(
                f"vectors[{group}] has shape {tuple(vector.shape)}; expected ({layout.group_size(group)},), as the "
                "shapes and groups say"
            )
    return group_matrices(get_backend(*vectors, what="each of vectors"), vectors, pieces, layout.shapes)


def _grouped(name: str, shapes: Any, groups: Any, layers: Any, roles: Any) -> Layout:
    """Return the layout of public functions, whose groups no config has checked."""
    require_keys(layers, roles)
    return make_layout(checked_groups(groups), checked_shapes(shapes, name), layers, roles)


def group_vectors(backend: Backend, read: Callable[[int], Array], groups: Iterable[Sequence[Piece]]) -> Iterator[Array]:
    """Yield the vector of each group of pieces, of matrices that are read by their number, one at a time."""
    last: tuple[int, Array] | None = None
    for pieces in groups:
        parts = []
        for piece in pieces:
            if last is None or last[0] != piece.weight:
                last = piece.weight, backend.flatten(read(piece.weight))
            parts.append(last[1][piece.weight_start : piece.weight_start + piece.length])
        yield backend.concat(parts)


def group_matrices(
    backend: Backend, vectors: Sequence[Array], groups: Iterable[Sequence[Piece]], shapes: Sequence[tuple[int, int]]
) -> list[Array]:
    """Return the matrices of all weights from the vectors of all groups."""
    parts: dict[int, list[Array]] = {weight: [] for weight in range(len(shapes))}
    for vec, pieces in zip(vectors, groups, strict=True):
        split = backend.split(vec, [piece.length for piece in pieces])
        for piece, part in zip(pieces, split, strict=True):
            parts[piece.weight].append(part)
    # Groups cut the long vector in order, so the parts of each weight are in order, too.
    return [backend.reshape(backend.concat(parts[weight]), shape) for weight, shape in enumerate(shapes)]


# -- The rows and columns of a weight in a folded tensor ---------------------------------------------------------------


Box = tuple[tuple[int, int], ...]


class WeightPlace(NamedTuple):
    """Where the rows of a weight are in a folded tensor.

    Attributes
    ----------
    ranges : tuple of (int, int)
        A box that contains them: start and stop of every mode.
    modes : int
        Number of leading modes that are rows.
    across : int
        How many columns an index of the next mode stands for; the other columns are those of the modes after it. 1 if
        there is no such mode.
    row_sizes : tuple of int
        Sizes of the modes of the whole tensor that are rows, with that of the rows' part of the mode that has both.
    row_ranges : tuple of (int, int)
        The box, of these.
    rows : (int, int)
        The weight's rows are this run of the rows of the whole tensor.
    """

    ranges: Box
    modes: int
    across: int
    row_sizes: tuple[int, ...]
    row_ranges: Box
    rows: tuple[int, int]

    def legs(self) -> Legs:
        """Return for each mode how many rows and columns its range stands for."""
        lengths = [stop - start for start, stop in self.ranges]
        legs = [(length, 1) for length in lengths[: self.modes]]
        legs += [(1, length) for length in lengths[self.modes :]]
        if self.across > 1:
            legs[self.modes] = (lengths[self.modes] // self.across, self.across)
        return tuple(legs)


def place_of(sizes: Sequence[int], start: int, length: int, cols: int) -> WeightPlace | None:
    """Return where a run of rows is in a folded tensor; None if rows begin at different places of its modes.

    Examples
    --------
    Rows of 10 elements in a matrix of rows of 20:

    >>> place = place_of((24, 20), 120, 120, 10)
    >>> place.ranges, place.legs()
    (((6, 12), (0, 20)), ((6, 1), (2, 10)))
    """
    inner, modes = 1, len(sizes)
    while modes and inner * sizes[modes - 1] <= cols and cols % (inner * sizes[modes - 1]) == 0:
        modes -= 1
        inner *= sizes[modes]
    across = cols // inner
    run = start // cols, (start + length) // cols
    after = tuple((0, size) for size in sizes[modes:])
    if across == 1:
        if start % cols:
            return None
        leading = enclosing(sizes[:modes], *run)
        return WeightPlace((*leading, *after), modes, 1, tuple(sizes[:modes]), leading, run)
    if not modes or start % inner:
        return None
    # Mode modes - 1 holds parts of rows: several of its indices make up the columns.
    modes -= 1
    box = enclosing(sizes[: modes + 1], start // inner, (start + length) // inner)
    before, last = box[:-1], box[-1]
    if all(stop - first == 1 for first, stop in before):
        # The rows fill the box.
        rows = (last[1] - last[0]) // across
        ranges, whole = (*before, last, *after), ((0, 1),) * modes
        return WeightPlace(ranges, modes, across, (*(1,) * modes, rows), (*whole, (0, rows)), (0, rows))
    if sizes[modes] % across or start % cols:
        return None
    ranges, rows = (*before, (0, sizes[modes]), *after), sizes[modes] // across
    return WeightPlace(ranges, modes, across, (*sizes[:modes], rows), (*before, (0, rows)), run)


def enclosing(sizes: Sequence[int], start: int, stop: int) -> Box:
    """Return the smallest box that contains a run of ``vec``."""
    covering = boxes(sizes, start, stop) if sizes else []
    sides = [[box.ranges[mode] for box in covering] for mode in range(len(sizes))]
    return tuple((min(lo for lo, _ in side), max(hi for _, hi in side)) for side in sides)


def run_in_box(sizes: Sequence[int], box: Box, run: tuple[int, int]) -> slice | np.ndarray:
    """Return where the elements of a run of ``vec`` are in the ``vec`` of a box that contains it.

    Examples
    --------
    >>> run_in_box((4, 10), ((1, 3), (0, 10)), (12, 15)), run_in_box((4, 10), ((0, 2), (4, 6)), (4, 6))
    (slice(2, 5, None), slice(0, 2, None))
    >>> run_in_box((4, 2, 2), ((0, 2), (1, 2), (0, 2)), (2, 4))
    slice(0, 2, None)
    """
    if not sizes:
        return slice(0, 1)
    digits = np.unravel_index(np.arange(*run), tuple(sizes))
    inside = [digit - lo for digit, (lo, _) in zip(digits, box, strict=True)]
    places = np.ravel_multi_index(inside, [hi - lo for lo, hi in box])
    first, stop = int(places[0]), int(places[0]) + len(places)
    return slice(first, stop) if np.array_equal(places, np.arange(first, stop)) else places


# -- Shapes that are checked once, for the plans of many configs -------------------------------------------------------


class KnownWeights(tuple[tuple[int, int], ...]):
    """Shapes of weights that are checked once, for the plans of many configs, which share their layouts.

    Parameters
    ----------
    shapes, layers, roles
        As for :func:`make_layout`.

    Examples
    --------
    >>> import tnadapt as tna
    >>> weights = KnownWeights([(2, 3), (2, 2)])
    >>> plan, other = (tna.UpdatePlan(tna.presets.superlora(rank, groups=2), weights) for rank in (1, 2))
    >>> plan.layout is other.layout, plan.shapes
    (True, ((2, 3), (2, 2)))
    """

    layers: Sequence[Hashable] | None
    roles: Sequence[Hashable] | None
    layouts: dict[Groups, Layout]

    def __new__(
        cls,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None = None,
        roles: Sequence[Hashable] | None = None,
    ) -> KnownWeights:
        weights = super().__new__(cls, checked_shapes(shapes))
        weights.layers, weights.roles, weights.layouts = layers, roles, {}
        return weights

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


def require_keys(layers: Sequence[Hashable] | None, roles: Sequence[Hashable] | None) -> None:
    """Raise a ConfigError for layers or roles that are no sequences; text is one of letters."""
    for name, keys in (("layers", layers), ("roles", roles)):
        if keys is not None and not is_sequence(keys) and not isinstance(keys, str):
            raise wrong_argument(name, "a sequence of one key per weight or None", keys)

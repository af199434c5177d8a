"""One group of a plan: its network, map F and arrays, the ΔW that they compute, and bounds on the rank of that.

The bounds are computed from the integers of a plan, whatever the arrays are. LoRA of that rank holds the update
exactly; how, is in :mod:`tnadapt.algebra.factoring`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from tnadapt.backends import Array, Backend

from .init import Initializer
from .layout import Layout, Piece, place_of
from .maps import Map, PerWeight
from .maps.projection import Projection, slices
from .network import Network, width_at
from .sources import FrozenArrays, Multiplied

# -- One group: its network, map F and arrays, and its update ----------------------------------------------------------


class Group(NamedTuple):
    """One group: the network and map that produce its part of the long vector, and the weights it covers.

    Attributes
    ----------
    size : int
        Elements of its update.
    network : Network
        What F is applied to.
    projection : Projection
        F.
    start : Initializer
        Its arrays at the start of training.
    names : dict of str to str
        For each trained array of the network, its name in the plan's ``param_shapes``.
    pieces : list of Piece
        The slices of weights that it covers, in order.
    frozen : FrozenArrays
        The other arrays of the network.
    frozen_names : dict of str to str
        For each of them, its name in the plan's ``frozen_shapes``.
    multiplied : dict of str to Multiplied
        The arrays with trained multipliers, which ``names`` has as ``split0.factor0.size``.
    """

    size: int
    network: Network
    projection: Projection
    start: Initializer
    names: dict[str, str]
    pieces: list[Piece]
    frozen: FrozenArrays
    frozen_names: dict[str, str]
    multiplied: dict[str, Multiplied] = MappingProxyType({})  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        return self  # immutable

    @property
    def num_parameters(self) -> int:
        """Number of trained elements that the group uses; those that are tied together count once."""
        shapes = dict(zip(self.names.values(), map(self.shape_of, self.names), strict=True))
        return sum(math.prod(shape) for shape in shapes.values())

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array or multiplier, by its name in ``names``."""
        if name in self.network.shapes:
            return self.network.shapes[name]
        array, _, multiplier = name.rpartition(".")
        return self.multiplied[array].multiplier_shapes(self.network.shapes[array])[multiplier]

    def arrays(self, backend: Backend, params: Mapping[str, Array], trained: str | None = None) -> Mapping[str, Array]:
        """Return all arrays of the network, by the network's names: those of the parameters, and the frozen ones.

        ``trained`` is as in :meth:`with_frozen`.
        """
        return self.with_frozen(backend, {name: params[full] for name, full in self.names.items()}, trained)

    def with_frozen(
        self, backend: Backend, own: Mapping[str, Array], trained: str | None = None
    ) -> Mapping[str, Array]:
        """Return all arrays of the network, given the trained ones by the names in ``names``; in their dtype.

        The frozen ones are rounded to the dtype ``trained``, so that an update that is computed in a wider dtype than
        that of training, as in merging, has the arrays of training.
        """
        if not self.frozen_names and not self.multiplied:
            return own
        like = next(iter(own.values()))  # a plan refuses groups without a trained array
        dtype = backend.dtype_name(like)
        arrays = {}
        for name in self.network.shapes:
            array = own[name] if name in own else self.frozen.on(backend, (name, trained or dtype), like, dtype)
            if name in self.multiplied:
                multipliers = {part: own[f"{name}.{part}"] for part in self.multiplied[name].multipliers}
                array = self.multiplied[name].product(backend, array, multipliers)
            arrays[name] = array
        return arrays

    @property
    def subtracts(self) -> bool:
        """Whether the update is that of the arrays minus that of the start: of a nonlinear F, or a given start."""
        return self.start.subtracts or not self.projection.linear

    def begun(self, backend: Backend, params: Mapping[str, Array], trained: str | None = None) -> Mapping[str, Array]:
        """Return all arrays of the network at the start, as :meth:`arrays` returns the current ones."""
        like = next(params[full] for full in self.names.values())
        dtype = backend.dtype_name(like)
        arrays = {name: self.start.on(backend, (name, trained or dtype), like, dtype) for name in self.names}
        return self.with_frozen(backend, arrays, trained)

    def update(
        self, backend: Backend, params: Mapping[str, Array], start: int, stop: int, trained: str | None = None
    ) -> Array:
        """Return elements ``start`` to ``stop - 1`` of the update: ``F(x)``, or ``F(x) - F(x_start)`` if it subtracts.

        ``trained`` is the dtype in which the parameters started, to which x_start is rounded; by default their own.
        """
        return updates(backend, [self], params, start, stop, trained)[0]


def updates(
    backend: Backend,
    groups: Sequence[Group],
    params: Mapping[str, Array],
    start: int,
    stop: int,
    trained: str | None = None,
) -> list[Array]:
    """Return the same elements of the updates of groups that share F, which is called once for all of them.

    Parameters
    ----------
    backend : Backend
    groups : sequence of Group
        Those that :func:`batches` puts together.
    params : mapping of str to array
    start, stop : int
    trained : str, optional
        As for :meth:`Group.update`.

    Returns
    -------
    list of array, shape (stop - start,)
    """
    arrays = [{name: params[full] for name, full in group.names.items()} for group in groups]
    if not groups[0].subtracts:
        return _projected(backend, groups, arrays, start, stop, trained)
    like = next(iter(arrays[0].values()))
    dtype = backend.dtype_name(like)
    # The difference of two near numbers: taken in single precision at least, and rounded once.
    wide = dtype if dtype == "float64" else "float32"
    begun = [group.start.on(backend, (name, trained or dtype), like, wide) for group in groups for name in group.names]
    current = [backend.astype(array, wide) for of_group in arrays for array in of_group.values()]
    # A compiler that computed the two by different routes would not find them equal at the start.
    both = iter(backend.apart([*current, *begun]))
    now = [{name: next(both) for name in group.names} for group in groups]
    then = [{name: next(both) for name in group.names} for group in groups]
    halves = [_projected(backend, groups, half, start, stop, trained or dtype) for half in (now, then)]
    outputs = backend.apart([part for half in halves for part in half])
    return [
        backend.astype(new - old, dtype)
        for new, old in zip(outputs[: len(groups)], outputs[len(groups) :], strict=True)
    ]


def _projected(
    backend: Backend,
    groups: Sequence[Group],
    arrays: Sequence[Mapping[str, Array]],
    start: int,
    stop: int,
    trained: str | None,
) -> list[Array]:
    completed = [group.with_frozen(backend, of_group, trained) for group, of_group in zip(groups, arrays, strict=True)]
    if groups[0].projection.map.identity:
        return [
            group.network.slice(backend, of_group, start, stop)
            for group, of_group in zip(groups, completed, strict=True)
        ]
    vectors = [group.network.whole(backend, of_group) for group, of_group in zip(groups, completed, strict=True)]
    return slices(backend, groups[0].projection, vectors, start, stop)


# -- Several groups in one call of F -----------------------------------------------------------------------------------

# One group after another is the plain way, and the reference, with the same bits. But each call of F is some operations
# or launches of kernels, and with ``groups="weight"`` these take longer than the work on the vector of a small weight.
# :meth:`tnadapt.backends.Backend.at_once` says how many elements to compute in one call, which bounds the memory that a
# batch adds.


#: A group, and the first element and the end of a part of its vector.
Run = tuple[Group, int, int]


def updates_of_runs(
    backend: Backend, runs: Sequence[Run], params: Mapping[str, Array], trained: str | None = None
) -> list[Array]:
    """Return these parts of the updates of groups, each as :meth:`Group.update` gives it.

    Parameters
    ----------
    backend : Backend
    runs : sequence of (group, start, stop)
    params : mapping of str to array
    trained : str, optional
        As for :meth:`Group.update`.

    Returns
    -------
    list of array, shape (stop - start,)
        They may share memory with each other.
    """
    lengths: dict[int, int] = {}
    for group, start, stop in runs:
        lengths[id(group.start)] = lengths.get(id(group.start), 0) + stop - start
    # The runs of a group whose weights are not adjacent are cut from the whole, which takes one call of F and not many.
    wanted = [
        (group, 0, group.size)
        if lengths[id(group.start)] == group.size and not group.projection.map.identity
        else (group, start, stop)
        for group, start, stop in runs
    ]
    distinct = list({_key(run): run for run in wanted}.values())
    update_of: dict[tuple[int, int, int], Array] = {}
    for numbers in batches(backend, params[next(iter(distinct[0][0].names.values()))], distinct):
        batch = [distinct[number] for number in numbers]
        _, start, stop = batch[0]
        computed = updates(backend, [group for group, _, _ in batch], params, start, stop, trained)
        update_of.update(zip(map(_key, batch), computed, strict=True))
    return [
        update_of[_key(whole)] if run[1:] == whole[1:] else update_of[_key(whole)][run[1] : run[2]]
        for run, whole in zip(runs, wanted, strict=True)
    ]


def _key(run: Run) -> tuple[int, int, int]:
    group, start, stop = run
    # Each group has its own start. A compiler can trace the id of an object of a class, and not of a tuple.
    return id(group.start), start, stop


def batches(backend: Backend, like: Array, runs: Sequence[Run]) -> list[list[int]]:
    """Return the numbers of the runs that are computed in one call each, in order of the first of them.

    They are whole groups that share F, as many as the backend wants in one call for arrays like this one. Parts of
    groups are alone, and so are groups whose F has other bits in a batch.
    """
    limit = backend.at_once(like)
    batched: list[list[int]] = []
    current: dict[Hashable, list[int]] = {}
    for number, (group, start, stop) in enumerate(runs):
        projection = group.projection
        joins = projection.map.exact_in_batches and (start, stop) == (0, group.size)
        most = limit // projection.padded if joins else 0
        key = id(projection), group.subtracts, start, stop
        batch = current.get(key)
        if batch is None or len(batch) >= most:
            batch = current[key] = []
            batched.append(batch)
        batch.append(number)
    return batched


# -- Where rows and columns of a weight stay separate ------------------------------------------------------------------


class Separation(NamedTuple):
    """The matrix X of a weight in the vector of a group's network, and the maps that make the update of it.

    Attributes
    ----------
    start : int
        Where X begins in the vector; it is contiguous, in C order.
    shape : (int, int)
        Rows and columns of X.
    sides : sequence of (Map, Map)
        Pairs (A_t, B_t), with ``ΔW = sum_t A_t X B_tᵀ``; none if X is the update itself.
    """

    start: int
    shape: tuple[int, int]
    sides: Sequence[tuple[Map, Map]] = ()


def separation_of(group: Group, piece: Piece, cols: int) -> Separation | None:
    """Return where the rows of a weight in a piece come from; None if the map mixes rows with columns.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.miss(4), [(8, 16)])
    >>> separation = separation_of(plan.groups[0], plan.groups[0].pieces[0], 16)
    >>> separation.shape, separation.sides
    ((8, 4), [(Identity(n_in=8, n_out=8, seed=0, group=0), Repeat(n_in=4, n_out=16, seed=0, group=0))])
    """
    f = group.projection.map
    if f.identity:
        return Separation(piece.group_start, (piece.length // cols, cols))
    start, part = f.part_at(piece.group_start) if isinstance(f, PerWeight) else (0, f)
    sides = part.sides()
    if not sides or part.n_out != piece.length:
        return None
    rows_of, cols_of = sides[0]
    return Separation(start, (rows_of.n_in, cols_of.n_in), sides)


# -- Bounds on the matrix rank of each weight's update -----------------------------------------------------------------


def rank_bound(layout: Layout, groups: Sequence[Group], weight: int) -> int:
    """Return a rank that no update of a weight exceeds; see :meth:`tnadapt.SuperLoRA.largest_rank`.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.loha(2), [(8, 6)])
    >>> rank_bound(plan.layout, plan.groups, 0)
    4
    """
    rows, cols = layout.shapes[weight]
    return min(sum(_of_piece(groups[piece.group], piece, cols) for piece in layout.of_weight(weight)), rows, cols)


def rank_bounds(layout: Layout, groups: Sequence[Group]) -> Iterator[int]:
    """Yield :func:`rank_bound` of every weight; weights at the same place of groups that are alike share theirs.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.loha(2), [(8, 6), (8, 6), (3, 6)])
    >>> list(rank_bounds(plan.layout, plan.groups))
    [4, 4, 3]
    """
    known: dict[tuple[object, ...], int] = {}
    for weight, (rows, cols) in enumerate(layout.shapes):
        key = rows, cols, *(_kind(groups[piece.group], piece) for piece in layout.of_weight(weight))
        if key not in known:
            known[key] = rank_bound(layout, groups, weight)
        yield known[key]


def _kind(group: Group, piece: Piece) -> tuple[object, ...]:
    """Return all that :func:`_of_piece` depends on, besides the shape of the weight."""
    _, weight_start, _, group_start, length = piece
    return id(group.network), group.projection.kind, group.subtracts, weight_start, group_start, length


def lora_rank(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int | None:
    """Return the largest of the ranks; None if two factors of a rank are not smaller than their weight.

    Examples
    --------
    >>> lora_rank([(64, 32), (16, 32)], [2, 3]), lora_rank([(64, 32), (16, 32)], [2, 11])
    (3, None)
    """
    smaller = all(rank * (rows + cols) < rows * cols for rank, (rows, cols) in zip(ranks, shapes, strict=True))
    return max(ranks) if smaller else None


def useful_rank(groups: Iterable[Group]) -> int | None:
    """Return the rank beyond which no group gains expressiveness; None if there is no rank.

    Examples
    --------
    >>> import tnadapt as tna
    >>> useful_rank(tna.SuperLoRA(tna.presets.lora(2), [(8, 6), (3, 6)]).groups)
    6
    """
    ranks = (split.useful_rank() for group in groups for split in group.network.splits)
    return max((rank for rank in ranks if rank is not None), default=None)


def _of_piece(group: Group, piece: Piece, cols: int) -> int:
    """Return a bound on the rank of the rows of a weight that have elements in a piece."""
    first, last = piece.weight_start // cols, -(-(piece.weight_start + piece.length) // cols)
    touched = min(last - first, cols)
    if piece.weight_start % cols or piece.length % cols:
        return touched
    separation = separation_of(group, piece, cols)
    if separation is None:
        return touched
    place = place_of(group.network.sizes, separation.start, math.prod(separation.shape), separation.shape[1])
    width = None if place is None else width_at(group.network, place)
    # The difference of two updates, that of the arrays and that of their start.
    before = min(separation.shape) if width is None else min(width * (2 if group.subtracts else 1), *separation.shape)
    return min(touched, before * max(1, len(separation.sides)))

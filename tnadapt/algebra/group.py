"""The groups of a plan: the network, map F and arrays of each, the ΔW that they compute, and bounds on its rank.

The bounds follow from the integers of a plan, whatever the arrays are. LoRA of that rank represents the update exactly:
see :mod:`tnadapt.algebra.factoring`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Array, Backend
from tnadapt.errors import ConfigError

from . import sources
from .config import Config, group_fold, is_named
from .init import Initializer, StartingGroup, ZeroArray, zero_arrays
from .layout import Layout, Piece, place_of, require_alike
from .maps import Map, PerWeight, input_length, is_linear
from .maps.projection import Projection, slices
from .network import Network, width_at
from .rng import PURPOSE
from .starting_points import STARTS, StartPlace

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
    frozen: sources.FrozenArrays
    frozen_names: dict[str, str]
    multiplied: dict[str, sources.Multiplied]

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


# -- The groups of one config ------------------------------------------------------------------------------------------


Shapes = dict[str, tuple[int, ...]]
Weights = tuple[tuple[int, int], ...] | None


class PlanPart:
    """The groups of one config of a plan: their networks and maps F, and where the numbers of their arrays come from.

    Groups that are alike share their network, map and frozen arrays.

    Parameters
    ----------
    config : Config
    layout : Layout
        Of the weights of this config, which it numbers from 0, like the groups.
    given : mapping of str to ndarray
        The plan's arrays that are not drawn, by name. Filled in later.
    first_weight, first_group : int
        Their numbers in the plan.

    Raises
    ------
    ConfigError
        If the config does not suit these weights.
    ShapeError
        If a fold does not fit a group.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        given: Mapping[str, np.ndarray],
        first_weight: int = 0,
        first_group: int = 0,
    ) -> None:
        self.config, self.layout, self.given = config, layout, given
        self.first_weight, self.first_group = first_weight, first_group
        if config.weight_shape is not None:
            require_alike(layout, config.weight_shape, config.fold)  # type: ignore[arg-type]  # Config refuses others
        self._stacked, self._named = config.fold == "stack" and config.order == 2, is_named(config.fold)
        assert isinstance(config.sources, sources.SourceMap)  # Config converts any other mapping
        self._sources = config.sources
        #: Whether an array may be tied to one of another group, so that groups differ in their origins.
        self.tied = any(isinstance(sources.inner_source(source), sources.Tied) for source in self._sources.values())
        self.point = STARTS.find(config.start)()
        self._networks: dict[tuple[int, int, Weights, tuple[int, ...] | None], Network] = {}
        self._projections: dict[tuple[int, int, Weights], Projection] = {}
        self._frozen_arrays: dict[tuple[int, int], sources.FrozenArrays] = {}
        self._trained: dict[tuple[int, int], Shapes] = {}
        self._zeros: dict[int, list[ZeroArray]] = {}
        for group, _ in self.kinds:
            self.network(group)
        if self._sources:
            self._check_sources()
        if self.point.needs_base:
            for group in range(layout.num_groups):
                self.point.check(self.place(group))
        if self.tied and is_linear(config.projection):
            self._zero_table()  # raises a ConfigError if a term cannot start at zero

    def name(self, group: int, array: str) -> str:
        """Return the plan's name of an array of a group."""
        return f"group{self.first_group + group}.{array}"

    @functools.cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """The groups that may differ in their network: the index of the first of each kind, and how many have it.

        Groups of equal size have the same network, but for stacks and folds in names, of different weights, and groups
        with a map F of each weight.
        """
        if self.config.on == "weight" or (self._named and len(self.layout.shape_counts) > 1):
            return [(group, 1) for group in range(self.layout.num_groups)]
        return self.layout.kinds_of_stacks if self._stacked else self.layout.kinds

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The groups, whose pieces are of the weights of this config."""
        return [self._group(index) for index in range(self.layout.num_groups)]

    @functools.cached_property
    def alike(self) -> list[tuple[Group, int]]:
        """A group of each kind, and their number; groups with tied arrays stand for themselves."""
        if self.tied:
            return [(group, 1) for group in self.groups]
        return [(self._group(first), count) for first, count in self.kinds]

    @functools.cached_property
    def num_elements(self) -> int:
        """Number of elements of all trained arrays, counted without laying all groups out."""
        kinds = [(group, 1) for group in range(self.layout.num_groups)] if self.tied else self.kinds
        return sum(count * sum(map(math.prod, self.trained_shapes(group).values())) for group, count in kinds)

    # -- One group ---------------------------------------------------------------------------

    def network(self, group: int) -> Network:
        """Return the network of a group."""
        size = self.layout.group_size(group)
        columns = self.layout.columns(group) if self._stacked else 1
        config, weights = self.config, self._weights(group)
        fold = group_fold(config.fold, self.layout, group) if self._named else None
        key = size, columns, weights, fold
        if key not in self._networks:
            n_in = input_length(config.projection, size, config.ratio, weights)
            folded = config if fold is None else config.replace(fold=fold)
            self._networks[key] = Network(folded, n_in, columns)
        return self._networks[key]

    def _weights(self, group: int) -> Weights:
        """Return the shapes of a group's weights if F is applied to each of them, or None if to the group's vector."""
        return tuple(self.layout.whole_weights(group, "on='weight'")) if self.config.on == "weight" else None

    def _projection(self, group: int) -> Projection:
        config, weights, size = self.config, self._weights(group), self.layout.group_size(group)
        stream = 0 if config.shared else group
        key = size, stream, weights
        if key not in self._projections:
            self._projections[key] = (
                Projection(config.projection, self.network(group).size, size, config.seed, stream)
                if weights is None
                else Projection.on_weights(config.projection, weights, config.ratio, config.seed, stream)
            )
        return self._projections[key]

    def _group(self, index: int) -> Group:
        network, projection, origins = self.network(index), self._projection(index), self._origins(index)
        prefix = f"group{self.first_group + index}."
        names = {} if origins else {name: prefix + name for name in network.shapes}
        frozen_names, multiplied = dict[str, str](), dict[str, sources.Multiplied]()
        for name, origin in origins.items():
            if origin.source.trained:
                names[name] = self.name(*origin.key)
            else:
                frozen_names[name] = prefix + name
            if origin.multiplied is not None:
                multiplied[name], full = origin.multiplied, self.name(*origin.owner)
                names |= {f"{name}.{part}": f"{full}.{part}" for part in origin.multiplied.multipliers}
        # Arrays that do not depend on the group are computed and kept once for all groups with the same network.
        key = id(network), 0 if self._frozen_alike else index
        if key not in self._frozen_arrays:
            self._frozen_arrays[key] = sources.FrozenArrays(self._frozen(origins), self.given)
        frozen = self._frozen_arrays[key]
        start = Initializer(
            network, projection, self.config.seed, index, names, frozen, origins=origins,
            starts=self._start_of if self.tied else None, table=self._zero_table if self.tied else None,
            point=self.point, given=self.given,
        )  # fmt: skip
        size, pieces = self.layout.group_size(index), self.layout.of_group(index)
        return Group(size, network, projection, start, names, pieces, frozen, frozen_names, multiplied)

    def place(self, group: int) -> StartPlace:
        """Return what a start needs to know of a group."""
        network, config = self.network(group), self.config
        weights = tuple(self.layout.shapes[piece.weight] for piece in self.layout.of_group(group))
        plain = config.projection == "identity" and not config.sources and network.terms == 1
        plain = plain and list(network.shapes) == ["split0.factor0", "split0.factor1"]
        size = self.layout.group_size(group)
        return StartPlace(network.shapes, network.sizes, weights, size, network.scale, plain)

    # -- Origins of its arrays: trained, frozen or tied --------------------------------------

    def _origins(self, group: int) -> dict[str, sources.Origin]:
        """Return the origin of each array of a group, by the network's names; empty if the config has no sources."""
        if not self._sources:
            return {}
        if self.tied:
            return sources.origins_of(self._sources, group, self.network(0).shapes, self.layout.num_groups)
        # The same for all groups, except for the group index.
        return {name: origin._replace(group=group, owner=(group, name)) for name, origin in self._first_origins.items()}

    @functools.cached_property
    def _first_origins(self) -> dict[str, sources.Origin]:
        return sources.origins_of(self._sources, 0, self.network(0).shapes, self.layout.num_groups)

    def trained_shapes(self, group: int) -> Shapes:
        """Return the trained arrays and multipliers that belong to a group itself, by the network's names."""
        network = self.network(group)
        if not self._sources:
            return network.shapes
        key = id(network), group if self.tied else 0
        if key not in self._trained:
            trained = self._trained[key] = dict[str, tuple[int, ...]]()
            for name, origin in self._origins(group).items():
                if origin.source.trained and origin.key == (group, name):
                    trained[name] = network.shapes[name]
                if origin.multiplied is not None and origin.owner == (group, name):
                    multipliers = origin.multiplied.multiplier_shapes(network.shapes[name])
                    trained |= {f"{name}.{multiplier}": shape for multiplier, shape in multipliers.items()}
        return self._trained[key]

    def array_shapes(self) -> Shapes:
        """Return the trained arrays and multipliers of all groups, by the plan's names."""
        return {
            f"group{self.first_group + group}.{array}": shape
            for group in range(self.layout.num_groups)
            for array, shape in self.trained_shapes(group).items()
        }

    def shapes_of(self, chosen: Callable[[sources.Source], bool]) -> Shapes:
        """Return the names and shapes of the frozen arrays whose source is chosen, in order, each once."""
        if not any(chosen(sources.inner_source(source)) for source in self._sources.values()):
            return {}
        shapes: Shapes = {}
        for group in range(self.layout.num_groups):
            for entry in self._frozen(self._origins(group)).values():
                if chosen(entry.source) and entry.full not in shapes:
                    shared = entry.source.independent_of_group
                    shapes[entry.full] = self._largest[entry.full.partition(".")[2]] if shared else entry.shape
        return shapes

    @functools.cached_property
    def _largest(self) -> Shapes:
        """The largest size of each array along each axis, over all groups."""
        shapes = [self.network(group).shapes for group, _ in self.kinds]
        return {
            name: tuple(max(sizes) for sizes in zip(*(other[name] for other in shapes), strict=True))
            for name in shapes[0]
        }

    @functools.cached_property
    def _frozen_alike(self) -> bool:
        """Whether all groups with the same network have the same frozen arrays."""
        frozen = [origin.source for origin in self._origins(0).values() if not origin.source.trained]
        return not self.tied and all(source.independent_of_group for source in frozen)

    def _frozen(self, origins: Mapping[str, sources.Origin]) -> dict[str, sources.FrozenArray]:
        """Return the FrozenArray of each frozen array of a group, by the network's names."""
        numbers = {name: number for number, name in enumerate(self.network(0).shapes)}  # the same in all groups
        frozen = {}
        for name, (group, inner, source, _, _) in origins.items():
            if source.trained:
                continue
            network, purpose = self.network(group), PURPOSE["source"] + numbers[inner]
            mode = network.mode_of(inner)
            stream = sources.Stream(self.config.seed, group, purpose, self._largest[inner], mode=mode)
            full = self.name(0 if source.brought and source.independent_of_group else group, inner)
            frozen[name] = sources.FrozenArray(full, source, network.shapes[inner], stream)
        return frozen

    def _check_sources(self) -> None:
        """Raise a ConfigError if a source does not suit its array."""
        network = self.network(0)  # all networks have arrays of the same names
        self._sources.check_names(network.shapes)
        groups = [first for first, _ in self.kinds]
        for group in range(self.layout.num_groups) if self.tied else groups:
            origins = self._origins(group)
            for name, origin in origins.items():
                self._check_array(group, name, origin)
                if origin.source.needs_factors and origin.key == (group, name):
                    _check_factors(group, name, origins)
            for prefixes in network.prefixes:
                pairs = zip(prefixes, network.splits, strict=True)
                sources.check_term(origins, [prefix + name for prefix, split in pairs for name in split.shapes])

    def _check_array(self, group: int, name: str, origin: sources.Origin) -> None:
        if origin.multiplied is None and origin.source.trained and origin.key == (group, name):
            return
        network, owner = self.network(group), self.network(origin.group)
        if owner.shapes[origin.name] != network.shapes[name]:
            raise ConfigError(
                f"sources ties 'group{group}.{name}', of shape {network.shapes[name]}, to "
                f"'group{origin.group}.{origin.name}', of shape {owner.shapes[origin.name]}: only arrays of one shape "
                "can be tied"
            )
        mapped = self.config.projection != "identity"
        shape, mode = network.shapes[name], owner.mode_of(origin.name)
        origin.source.check(sources.Place(origin.name, shape, mode, owner.sizes, mapped))
        if origin.multiplied is None:
            return
        origin.multiplied.check(sources.Place(name, shape, network.mode_of(name), network.sizes, mapped))
        if origin.multiplied.zero is not None and not is_linear(self.config.projection):
            raise ConfigError(
                f"start=0 of {name!r} leaves a nonlinear F without a gradient, as tanhshrink'(0) = 0: give start=1"
            )

    # -- The start ---------------------------------------------------------------------------

    def _start_of(self, group: int) -> Initializer:
        return self.groups[group].start

    def _zero_table(self) -> dict[int, list[ZeroArray]]:
        """Return the array that starts at zero in each term of each group, if arrays are tied and F is linear."""
        if not self._zeros:
            self._zeros |= self._zeros_if([None] * self.layout.num_groups)
        return self._zeros

    def _zeros_if(self, trained: Sequence[Collection[str] | None]) -> dict[int, list[ZeroArray]]:
        numbers = range(self.layout.num_groups)
        return zero_arrays(
            list(map(StartingGroup, numbers, map(self.network, numbers), map(self._origins, numbers), trained))
        )

    def starts_if(self, groups: Sequence[Group], chosen: Collection[str]) -> list[Initializer]:
        """Return the initial arrays of its groups, whatever their units, if arrays of these names alone are trained."""
        trained = [{name for name, full in group.names.items() if full in chosen} for group in groups]
        if not self.tied:
            return [group.start.for_trained(names) for group, names in zip(groups, trained, strict=True)]
        starts: list[Initializer] = []
        table = functools.cache(lambda: self._zeros_if(trained))
        for group, names in zip(groups, trained, strict=True):
            starts.append(group.start.for_trained(names, starts.__getitem__, table))
        return starts


def _check_factors(group: int, name: str, origins: Mapping[str, sources.Origin]) -> None:
    """Raise a ConfigError unless the other arrays of the split of an array are computed from the base."""
    split = name.rpartition(".")[0]
    for other, origin in origins.items():
        of_split = other != name and other.rpartition(".")[0] == split
        if of_split and not (origin.source.needs_base and origin.key == (group, other)):
            raise ConfigError(
                f"{type(origins[name].source).__name__} computes {name!r} from the base weights and the factors of all "
                f"modes, and {other!r} is not computed from the base: give it FromBase('mode') or Mixed"
            )


# -- Updates of groups -------------------------------------------------------------------------------------------------


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
    # A difference of nearly equal numbers: computed in single precision at least, and rounded once.
    wide = dtype if dtype == "float64" else "float32"
    begun = [group.start.on(backend, (name, trained or dtype), like, wide) for group in groups for name in group.names]
    current = [backend.astype(array, wide) for of_group in arrays for array in of_group.values()]
    # If a compiler computed the two in different ways, they would not be equal at the start.
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

# The reference implementation computes one group after another, with the same bits. But each call of F has overhead:
# operations or kernel launches, which with ``groups="weight"`` take longer than the work on a small weight's vector.
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
    # The runs of a group whose weights are not adjacent are cut from the whole vector: one call of F instead of many.
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
    # Each group has its own start. A compiler can trace the id of a class instance, but not of a tuple.
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
    >>> plan = tna.UpdatePlan(tna.presets.miss(4), [(8, 16)])
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
    """Return a rank that no update of a weight exceeds; see :meth:`tnadapt.UpdatePlan.largest_rank`.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.UpdatePlan(tna.presets.loha(2), [(8, 6)])
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
    >>> plan = tna.UpdatePlan(tna.presets.loha(2), [(8, 6), (8, 6), (3, 6)])
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
    """Return everything that :func:`_of_piece` depends on, except the shape of the weight."""
    _, weight_start, _, group_start, length = piece
    return id(group.network), group.projection.kind, group.subtracts, weight_start, group_start, length


def pair_widths(layout: Layout, groups: Sequence[Group]) -> Iterator[int | None]:
    """Yield for every weight the width of the two factors that are its own network, as in LoRA; None for another one.

    Examples
    --------
    >>> import tnadapt as tna
    >>> for config in (tna.presets.lora(9), tna.presets.superlora(9)):
    ...     plan = tna.UpdatePlan(config, [(8, 6)])
    ...     print(list(pair_widths(plan.layout, plan.groups)))
    [9]
    [None]
    """
    return (_pair_width(layout, groups, weight) for weight in range(len(layout.shapes)))


def _pair_width(layout: Layout, groups: Sequence[Group], weight: int) -> int | None:
    piece, *others = layout.of_weight(weight)
    group, (_, cols) = groups[piece.group], layout.shapes[weight]
    network = group.network
    if others or len(group.pieces) > 1 or group.subtracts or not group.projection.map.identity:
        return None
    if len(network.splits) > 1 or len(network.sizes) != 2 or network.sizes[1] != cols:
        return None
    width = network.splits[0].inner(1)
    return None if width is None else network.terms * width


def lora_rank(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[int], widths: Sequence[int | None] | None = None
) -> int | None:
    """Return the rank of LoRA that holds every update; None if for some weight its factors are not smaller than it.

    Factors that an adapter has already, of the given widths, count at any size.

    Examples
    --------
    >>> shapes = [(64, 32), (16, 32)]
    >>> lora_rank(shapes, [2, 3]), lora_rank(shapes, [2, 11]), lora_rank(shapes, [11, 11], [None, 11])
    (3, None, 11)
    """
    largest = 0
    for (rows, cols), rank, width in zip(shapes, ranks, widths or [None] * len(ranks), strict=True):
        if rank * (rows + cols) >= rows * cols:
            if width is None:
                return None
            rank = width
        largest = max(largest, rank)
    return largest


def useful_rank(groups: Iterable[Group]) -> int | None:
    """Return the rank beyond which no group gains expressiveness; None if there is no rank.

    Examples
    --------
    >>> import tnadapt as tna
    >>> useful_rank(tna.UpdatePlan(tna.presets.lora(2), [(8, 6), (3, 6)]).groups)
    6
    """
    ranks = (split.useful_rank() for group in groups for split in group.network.splits)
    return max((rank for rank in ranks if rank is not None), default=None)


def _of_piece(group: Group, piece: Piece, cols: int) -> int:
    """Return a bound on the rank of the rows that a weight has in a piece."""
    first, last = piece.weight_start // cols, -(-(piece.weight_start + piece.length) // cols)
    touched = min(last - first, cols)
    if piece.weight_start % cols or piece.length % cols:
        return touched
    separation = separation_of(group, piece, cols)
    if separation is None:
        return touched
    place = place_of(group.network.sizes, separation.start, math.prod(separation.shape), separation.shape[1])
    width = None if place is None else width_at(group.network, place)
    # The difference of two updates: that of the arrays, and that of their start.
    before = min(separation.shape) if width is None else min(width * (2 if group.subtracts else 1), *separation.shape)
    return min(touched, before * max(1, len(separation.sides)))

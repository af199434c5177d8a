"""One config on its weights: the networks, arrays and groups of a plan, and what base weights determine of them.

A plan of a :class:`~tnadapt.Config` has one part, and that of a :class:`~tnadapt.CompositeConfig` one for each config.
Weights, groups and the names of arrays are numbered from 0 in each part.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend, one_blas_thread
from tnadapt.errors import ConfigError, ShapeError, TnadaptError, safe_repr, summarize

from .config import Config, group_fold, is_named
from .group import Group
from .init import Initializer, StartingGroup, ZeroArray, zero_arrays
from .layout import layout_of, require_alike
from .maps import input_length, is_linear
from .maps.projection import Projection
from .network import Network
from .rng import PURPOSE
from .sources import (
    FrozenArray,
    FrozenArrays,
    Origin,
    Place,
    Source,
    SourceMap,
    Stream,
    Tied,
    check_term,
    inner_source,
    origins_of,
)
from .starting_points import PREFIX, STARTS, StartPlace
from .theta import Theta

# -- The groups of one config ------------------------------------------------------------------------------------------


Weights = tuple[tuple[int, int], ...] | None
Shapes = dict[str, tuple[int, ...]]


class PlanPart:
    """One config on its weights, in integers; arrays are drawn or computed when they are asked for.

    Parameters
    ----------
    config, shapes, layers, roles
        As for :class:`~tnadapt.SuperLoRA`, which raises the same errors; the config is not composite.

    Attributes
    ----------
    layout : Layout
    point : Start
        What its arrays start from.
    given : dict of str to ndarray
        The arrays that are not drawn and that the part has, by name, without those of P. Groups refer to it.

    Examples
    --------
    >>> PlanPart(Config(rank=2), [(6, 4)]).array_shapes
    {'group0.split0.factor0': (6, 2), 'group0.split0.factor1': (4, 2)}
    """

    def __init__(
        self,
        config: Config,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None = None,
        roles: Sequence[Hashable] | None = None,
    ) -> None:
        self.config, self._keys = config, (layers, roles)
        self.layout = layout_of(config.groups, shapes, layers, roles)
        if config.weight_shape is not None:
            require_alike(self.layout, config.weight_shape, config.fold)  # type: ignore[arg-type]  # Config refuses others
        self.shapes = self.layout.shapes
        self.num_groups = self.layout.num_groups
        self._networks: dict[tuple[int, int, Weights, tuple[int, ...] | None], Network] = {}
        self._projections: dict[tuple[int, int, Weights], Projection] = {}
        self._frozen_arrays: dict[tuple[int, int], FrozenArrays] = {}
        self._trained: dict[tuple[int, int], Shapes] = {}
        # Build every network once, to raise errors here and not at the first use.
        for group in self._different:
            self.network(group)
        self._check_sources()
        self.point = STARTS.find(config.start)()
        if self.point.needs_base:
            for group in range(self.num_groups):
                self.point.check(self.start_place(group))
        if self.tied and is_linear(config.projection):
            _ = self._zeros  # raises a ConfigError if a term cannot start at zero
        self.given: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Recompute it from its few integers, instead of pickling the cached draws.
        return PlanPart, (self.config, self.shapes, *self._keys), {"given": self.given}

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanPart:
        return self  # immutable, but for what its plan adds to `given`

    # -- Networks ----------------------------------------------------------------------------

    @functools.cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """The groups that may differ in their network: the index of the first of each kind, and how many have it.

        Groups of equal size have the same network, but for stacks and folds in names, of different weights, and groups
        with a map F of each weight.
        """
        if self.config.on == "weight" or (self._named and not self.layout.equal_shapes):
            return [(group, 1) for group in range(self.num_groups)]
        return self.layout.kinds(columns=self._stacked)

    @property
    def _different(self) -> list[int]:
        """Indices of groups that together have every network."""
        return [first for first, _ in self.kinds]

    @functools.cached_property
    def _stacked(self) -> bool:
        return self.config.fold == "stack" and self.config.order == 2

    @functools.cached_property
    def _named(self) -> bool:
        return is_named(self.config.fold)

    def network(self, group: int) -> Network:
        """Return the network of a group; groups that are alike share it."""
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
        """Return the shapes of a group's weights if F is applied to each of them; None if to the group's vector."""
        if self.config.on == "vector":
            return None
        for piece in self.layout.of_group(group):
            rows, cols = self.shapes[piece.weight]
            if piece.length != rows * cols:
                raise ConfigError(
                    f"on='weight' needs groups of whole weights, and groups={self.config.groups} cuts through weight "
                    f"{piece.weight} of {rows}×{cols}: use groups='weight', 'layer', 1 or lists of weights"
                )
        return tuple(self.shapes[piece.weight] for piece in self.layout.of_group(group))

    def start_place(self, group: int) -> StartPlace:
        """Return what a start needs to know of a group."""
        network, config = self.network(group), self.config
        weights = tuple(self.shapes[piece.weight] for piece in self.layout.of_group(group))
        plain = config.projection == "identity" and not config.sources and network.terms == 1
        plain = plain and list(network.shapes) == ["split0.factor0", "split0.factor1"]
        size = self.layout.group_size(group)
        return StartPlace(network.shapes, network.sizes, weights, size, network.scale, plain)

    # -- Origins: which arrays are trained, frozen or tied -----------------------------------

    @property
    def _sources(self) -> SourceMap:
        assert isinstance(self.config.sources, SourceMap)  # Config converts any other mapping
        return self.config.sources

    @functools.cached_property
    def tied(self) -> bool:
        """Whether an array may be tied to one of another group, so that groups differ in their origins."""
        return any(isinstance(inner_source(source), Tied) for source in self._sources.values())

    def origins(self, group: int) -> dict[str, Origin]:
        """Return the origin of each array of a group, by the network's names; empty if the config has no sources."""
        if not self.config.sources:
            return {}
        if self.tied:
            return origins_of(self._sources, group, self.network(0).shapes, self.num_groups)
        # The same for all groups, except for the index.
        return {name: origin._replace(group=group, owner=(group, name)) for name, origin in self._first_origins.items()}

    @functools.cached_property
    def _first_origins(self) -> dict[str, Origin]:
        return origins_of(self._sources, 0, self.network(0).shapes, self.num_groups)

    def _trained_shapes(self, group: int) -> Shapes:
        """Return the trained arrays and multipliers that belong to a group itself, by the network's names."""
        network = self.network(group)
        if not self.config.sources:
            return network.shapes
        key = id(network), group if self.tied else 0
        if key not in self._trained:
            self._trained[key] = self._shapes_by_origin(group, network.shapes)
        return self._trained[key]

    def _shapes_by_origin(self, group: int, shapes: Shapes) -> Shapes:
        trained: Shapes = {}
        for name, origin in self.origins(group).items():
            if origin.source.trained and origin.key == (group, name):
                trained[name] = shapes[name]
            if origin.multiplied is not None and origin.owner == (group, name):
                multipliers = origin.multiplied.multiplier_shapes(shapes[name])
                trained |= {f"{name}.{multiplier}": shape for multiplier, shape in multipliers.items()}
        return trained

    def _check_sources(self) -> None:
        """Raise a ConfigError if a source does not suit its array."""
        if not self.config.sources:
            return
        network = self.network(0)  # all networks have arrays of the same names
        self._sources.check_names(network.shapes)
        for group in range(self.num_groups) if self.tied else self._different:
            origins = self.origins(group)
            for name, origin in origins.items():
                self._check_array(group, name, origin)
            self._check_factors(group, origins)
            for prefixes in network.prefixes:
                pairs = zip(prefixes, network.splits, strict=True)
                check_term(origins, [prefix + name for prefix, split in pairs for name in split.shapes])

    @staticmethod
    def _check_factors(group: int, origins: Mapping[str, Origin]) -> None:
        """Raise a ConfigError if a source needs the factors of its split, and one is not computed from the base."""
        for name, origin in origins.items():
            if not origin.source.needs_factors or origin.key != (group, name):
                continue
            split = name.rpartition(".")[0]
            for other, theirs in origins.items():
                of_split = other != name and other.rpartition(".")[0] == split
                if of_split and not (theirs.source.needs_base and theirs.key == (group, other)):
                    raise ConfigError(
                        f"{type(origin.source).__name__} computes {name!r} from the base weights and the factors of "
                        f"all modes, and {other!r} is not computed from the base: give it FromBase('mode') or Mixed"
                    )

    def _check_array(self, group: int, name: str, origin: Origin) -> None:
        if origin.multiplied is None and origin.source.trained and origin.key == (group, name):
            return
        network, owner = self.network(group), self.network(origin.group)
        if owner.shapes[origin.name] != network.shapes[name]:
            raise ConfigError(
                f"sources ties 'group{group}.{name}', of shape {network.shapes[name]}, to "
                f"'group{origin.group}.{origin.name}', of shape {owner.shapes[origin.name]}: only arrays of one shape "
                "can be tied"
            )
        plain = self.config.projection == "identity"
        origin.source.check(
            Place(origin.name, network.shapes[name], owner.mode_of(origin.name), owner.sizes, not plain)
        )
        if origin.multiplied is None:
            return
        origin.multiplied.check(Place(name, network.shapes[name], network.mode_of(name), network.sizes, not plain))
        if origin.multiplied.zero is not None and not is_linear(self.config.projection):
            raise ConfigError(
                f"start=0 of {name!r} leaves a nonlinear F without a gradient, as tanhshrink'(0) = 0: give start=1"
            )

    # -- Names, shapes and counts of arrays --------------------------------------------------

    @functools.cached_property
    def array_shapes(self) -> Shapes:
        """Name and shape of every array that is trained, or made from θ, in order."""
        return {
            f"group{group}.{name}": shape
            for group in range(self.num_groups)
            for name, shape in self._trained_shapes(group).items()
        }

    @functools.cached_property
    def num_elements(self) -> int:
        """Number of elements of the arrays in ``array_shapes``, counted without laying all groups out."""
        if self.tied:
            return sum(map(math.prod, self.array_shapes.values()))
        return sum(count * sum(map(math.prod, self._trained_shapes(group).values())) for group, count in self.kinds)

    @functools.cached_property
    def theta(self) -> Theta | None:
        """The map before the network; None if there is none, and the arrays themselves are trained."""
        return None if self.config.before is None else Theta(self.config, self.num_elements, lambda: self.array_shapes)

    @functools.cached_property
    def param_shapes(self) -> Shapes:
        """Name and shape of what is trained of the groups: the arrays, or θ."""
        return self.array_shapes if self.theta is None else self.theta.shapes

    @functools.cached_property
    def frozen_shapes(self) -> Shapes:
        """Name and shape of every array that ``config.sources`` freezes, in order."""
        return {full: group.network.shapes[name] for group in self.groups for name, full in group.frozen_names.items()}

    @functools.cached_property
    def given_shapes(self) -> Shapes:
        """Name and shape of every frozen array that the caller brings, in order."""
        return self._shapes_of(lambda source: source.brought)

    @functools.cached_property
    def base_shapes(self) -> Shapes:
        """Name and shape of every array that is computed from the base weights: frozen ones, and the start."""
        frozen = self._shapes_of(lambda source: source.needs_base)
        return {**frozen, **self.start_shapes} if self.point.needs_base else frozen

    @functools.cached_property
    def start_shapes(self) -> Shapes:
        """Name and shape of every array of x_0 that is not drawn: ``start.`` and its name in ``array_shapes``."""
        if not (self.point.brought or self.point.needs_base):
            return {}
        return {PREFIX + name: shape for name, shape in self.array_shapes.items()}

    def _shapes_of(self, chosen: Callable[[Source], bool]) -> Shapes:
        """Return the names and shapes of the frozen arrays whose source is chosen, in order, each once."""
        if not any(chosen(inner_source(source)) for source in self._sources.values()):
            return {}
        shapes: Shapes = {}
        for group in range(self.num_groups):
            for entry in self._frozen(self.origins(group)).values():
                if chosen(entry.source) and entry.full not in shapes:
                    shared = entry.source.independent_of_group
                    shapes[entry.full] = self._largest[entry.full.partition(".")[2]] if shared else entry.shape
        return shapes

    # -- Frozen arrays -----------------------------------------------------------------------

    @functools.cached_property
    def _largest(self) -> Shapes:
        """The largest size of each array along each axis, over all groups."""
        shapes = [self.network(group).shapes for group in self._different]
        return {
            name: tuple(max(sizes) for sizes in zip(*(other[name] for other in shapes), strict=True))
            for name in shapes[0]
        }

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        """Positions of the arrays among those of a group, which are the same in all groups."""
        return {name: number for number, name in enumerate(self.network(0).shapes)}

    @functools.cached_property
    def _frozen_alike(self) -> bool:
        """Whether all groups with the same network have the same frozen arrays."""
        frozen = [origin.source for origin in self.origins(0).values() if not origin.source.trained]
        return not self.tied and all(source.independent_of_group for source in frozen)

    def _frozen(self, origins: Mapping[str, Origin]) -> dict[str, FrozenArray]:
        """Return what computes each frozen array of a group, by the network's names."""
        return {name: self._frozen_array(origin) for name, origin in origins.items() if not origin.source.trained}

    def _frozen_array(self, origin: Origin) -> FrozenArray:
        network, name = self.network(origin.group), origin.name
        stream = Stream(
            self.config.seed, origin.group, PURPOSE["source"] + self._numbers[name], self._largest[name],
            mode=network.mode_of(name),
        )  # fmt: skip
        group = 0 if origin.source.brought and origin.source.independent_of_group else origin.group
        return FrozenArray(f"group{group}.{name}", origin.source, network.shapes[name], stream)

    # -- Groups ------------------------------------------------------------------------------

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The groups. Those of equal length share their network, and their F if ``config.shared``."""
        return [self._group(index) for index in range(self.num_groups)]

    @functools.cached_property
    def alike(self) -> list[tuple[Group, int]]:
        """A group of each kind, and the number of groups that have its network, map, and kinds of arrays.

        For what is counted in integers, without laying all groups out. Groups with tied arrays stand for themselves.
        """
        if self.tied:
            return [(group, 1) for group in self.groups]
        return [(self._group(first), count) for first, count in self.kinds]

    def _group(self, index: int) -> Group:
        network, size = self.network(index), self.layout.group_size(index)
        origins, projection = self.origins(index), self._projection(index)
        names, frozen_names = _names_of(index, network.shapes, origins)
        # Arrays that do not depend on the group are computed and kept once for all groups with the same network.
        key = id(network), 0 if self._frozen_alike else index
        if key not in self._frozen_arrays:
            self._frozen_arrays[key] = FrozenArrays(self._frozen(origins), self.given)
        frozen = self._frozen_arrays[key]
        start = Initializer(
            network, projection, self.config.seed, index, frozen, origins=origins,
            starts=self._start_of if self.tied else None, table=self._zero_table if self.tied else None,
            point=self.point, given=self.given,
        )  # fmt: skip
        multiplied = {name: origin.multiplied for name, origin in origins.items() if origin.multiplied is not None}
        pieces = self.layout.of_group(index)
        return Group(size, network, projection, start, names, pieces, frozen, frozen_names, multiplied)

    def _projection(self, index: int) -> Projection:
        config, weights, size = self.config, self._weights(index), self.layout.group_size(index)
        stream = 0 if config.shared else index
        key = size, stream, weights
        if key not in self._projections:
            self._projections[key] = (
                Projection(config.projection, self.network(index).size, size, config.seed, stream)
                if weights is None
                else Projection.on_weights(config.projection, weights, config.ratio, config.seed, stream)
            )
        return self._projections[key]

    # -- Starts ------------------------------------------------------------------------------

    def _start_of(self, group: int) -> Initializer:
        return self.groups[group].start

    def _zero_table(self) -> dict[int, list[ZeroArray]]:
        return self._zeros

    @functools.cached_property
    def _zeros(self) -> dict[int, list[ZeroArray]]:
        """The array that is zero at the start in each term of each group, if arrays are tied and F is linear."""
        return self._zeros_if([None] * self.num_groups)

    def _zeros_if(self, trained: Sequence[Collection[str] | None]) -> dict[int, list[ZeroArray]]:
        return zero_arrays(
            [
                StartingGroup(index, self.network(index), self.origins(index), names)
                for index, names in enumerate(trained)
            ]
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


def _names_of(
    index: int, shapes: Iterable[str], origins: Mapping[str, Origin]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the full names of a group's trained arrays and multipliers, and of its frozen arrays."""
    if not origins:
        return {name: f"group{index}.{name}" for name in shapes}, {}
    names, frozen = dict[str, str](), dict[str, str]()
    for name, origin in origins.items():
        if origin.source.trained:
            names[name] = f"group{origin.group}.{origin.name}"
        else:
            frozen[name] = f"group{index}.{name}"
        if origin.multiplied is not None:
            group, owner = origin.owner
            names |= {f"{name}.{part}": f"group{group}.{owner}.{part}" for part in origin.multiplied.multipliers}
    return names, frozen


# -- Arrays that a caller gives ----------------------------------------------------------------------------------------


def checked_given(
    given: Any, shapes: Mapping[str, tuple[int, ...]], integers: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Return the arrays that a caller gives in float32, or raise an error that names the one that does not fit.

    Parameters
    ----------
    given : mapping of str to array
    shapes : mapping of str to tuple of int
        Of those that a caller may give.
    integers : collection of str
        Names of the arrays whose dtype may be an integer one.

    Raises
    ------
    ConfigError
        If a name is not one of ``shapes``, or an array is not finite.
    ShapeError
        If an array has another shape.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"given must be a mapping of names to arrays; got {type(given).__name__}")
    unknown = [name for name in given if name not in shapes]
    if unknown:
        known = f"are {summarize(list(shapes))}" if shapes else "are none: use tnadapt.sources.Given()"
        raise ConfigError(f"given names {safe_repr(unknown[0])}; the arrays that a caller can give {known}")
    return {name: _single(f"given[{name!r}]", array, shapes[name], name in integers) for name, array in given.items()}


def checked_start(
    start: str, brought: bool, arrays: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Return the initial arrays that a caller brings, in float32, by their names after ``"start."``.

    Parameters
    ----------
    start : str
        ``Config.start``.
    brought : bool
        Whether arrays may be brought to such a start.
    arrays : mapping of str to array
    shapes : mapping of str to tuple of int
        ``plan.array_shapes``.

    Raises
    ------
    ConfigError
        If the start takes none, a name is unknown, or an array is not finite.
    ShapeError
        If an array has another shape.
    """
    if not brought:
        raise ConfigError(f"arrays to start from need Config(start='given'); the config has start={start!r}")
    if not isinstance(arrays, Mapping):
        raise ConfigError(f"start_from must be a mapping of array names to arrays; got {type(arrays).__name__}")
    unknown = [name for name in arrays if name not in shapes]
    if unknown:
        raise ConfigError(
            f"start_from names {safe_repr(unknown[0])}; the arrays that can start anywhere are those in array_shapes: "
            f"{summarize(list(shapes))}"
        )
    return {PREFIX + name: _single(f"start_from[{name!r}]", array, shapes[name]) for name, array in arrays.items()}


def _single(label: str, array: Any, shape: tuple[int, ...], integers: bool = False) -> np.ndarray:
    try:
        numbers = np.asarray(get_backend(array).to_numpy(array))
    except TnadaptError as error:
        raise ConfigError(f"{label} must be an array; {error}") from error
    if numbers.shape != shape:
        raise ShapeError(f"{label} has shape {numbers.shape}; expected {shape}")
    with np.errstate(over="ignore"):
        single = np.array(numbers, np.float32, order="C")  # parameters that start there must be contiguous
    if numbers.dtype.kind not in ("fiu" if integers else "f") or not np.isfinite(single).all():
        what = "finite numbers" if integers else "finite floating-point numbers"
        raise ConfigError(f"{label} must hold {what} that float32 can represent; its dtype is {numbers.dtype}")
    return single


# -- What base weights determine: frozen arrays and starts -------------------------------------------------------------


_WORKERS = min(8, os.cpu_count() or 1)


def from_base(
    part: PlanPart, weight: Callable[[int], np.ndarray], on_array: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """Compute the arrays in ``part.base_shapes``; see :meth:`tnadapt.SuperLoRA.with_base`.

    ``weight`` returns a base weight as a vector, by its number in the part; ``on_array`` is called after each array.
    """
    arrays = dict[str, np.ndarray]()

    def put(computed: Iterable[tuple[str, np.ndarray]]) -> None:
        for full, array in computed:
            arrays[full] = array
            on_array()

    starts = collections.deque[Future[dict[str, np.ndarray]]]()
    # The last bits of a matrix product depend on the number of threads: one for each array, and arrays in parallel.
    with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        for index, group in enumerate(part.groups):
            # Tied arrays are computed with the group that they belong to.
            entries = {
                entry.full: entry
                for entry in group.frozen.entries.values()
                if entry.source.needs_base and entry.stream.group == index and entry.full not in arrays
            }
            if not entries and not part.point.needs_base:
                continue
            base = _folded(group, weight)
            if part.point.needs_base:
                # Starts of several groups in parallel, as many as there are weights in memory.
                starts.append(pool.submit(_start, part, index, base))
                if len(starts) == _WORKERS:
                    put(starts.popleft().result().items())
            # What is computed from the factors comes after them.
            for late in (False, True):
                phase = {full: entry for full, entry in entries.items() if entry.source.needs_factors == late}
                factors = [_factors(group, full, arrays) if late else {} for full in phase]
                put(zip(phase, pool.map(functools.partial(_computed, base), phase.values(), factors), strict=True))
        for start in starts:
            put(start.result().items())
    return arrays


def base_weight(backend: Backend, weight: Any, index: int, shape: tuple[int, int]) -> Any:
    """Return a base weight after checking its shape and dtype."""
    if tuple(weight.shape) != shape:
        raise ShapeError(f"base weight {index} has shape {tuple(weight.shape)}; expected {shape}")
    backend.require_float(weight, f"base weight {index}")
    return weight


def _factors(group: Group, full: str, arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the frozen factors of the split of an array, by their modes."""
    split = full.partition(".")[2].rpartition(".")[0] + "."
    modes = {name: group.network.mode_of(name) for name in group.frozen_names if name.startswith(split)}
    return {mode: arrays[group.frozen_names[name]] for name, mode in modes.items() if mode is not None}


def _computed(base: np.ndarray, entry: FrozenArray, factors: Mapping[int, np.ndarray]) -> np.ndarray:
    return entry.compute(dataclasses.replace(entry.stream, base=base, factors=factors))


def _start(part: PlanPart, index: int, base: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the start of a group, by the names in ``part.start_shapes``, in float32."""
    place = part.start_place(index)
    computed = part.point.arrays(place, base, Stream(part.config.seed, index, PURPOSE["source"]))
    what = f"start={part.config.start!r} of group {index}"
    if not isinstance(computed, Mapping) or computed.keys() != place.shapes.keys():
        names = sorted(computed) if isinstance(computed, Mapping) else type(computed).__name__
        raise ConfigError(f"{what} must compute an array for each of {', '.join(place.shapes)}; got {names}")
    start = dict[str, np.ndarray]()
    for name, shape in place.shapes.items():
        array = np.asarray(computed[name])
        if array.shape != shape or array.dtype.kind != "f":
            raise ConfigError(
                f"{what} must compute floating-point numbers of shape {shape} for {name!r}; got {array.dtype} of shape "
                f"{array.shape}"
            )
        with np.errstate(over="ignore"):
            single = array.astype(np.float32, order="C")
        if not np.isfinite(single).all() or (array.any() and not single.any()):
            raise ConfigError(f"{what} has numbers that float32 cannot represent in {name!r}")
        start[f"{PREFIX}group{index}.{name}"] = single
    return start


def _folded(group: Group, weight: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return the base weights of a group as a tensor with the sizes of its network, in float64."""
    sizes = group.network.sizes
    vec = np.zeros(math.prod(sizes))
    start = 0
    for piece in group.pieces:
        whole = weight(piece.weight)
        vec[start : start + piece.length] = whole[piece.weight_start : piece.weight_start + piece.length]
        start += piece.length
    return vec.reshape(sizes)

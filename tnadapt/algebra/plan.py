"""The plan of an adapter: which arrays its groups have, counts and shapes, the start, and what base weights determine.

:class:`ArrayPlan` says which arrays are trained, frozen or tied. :class:`GroupPlan` lays out the groups,
:class:`ParameterPlan` adds their parameters, and :class:`RankPlan` bounds on the ranks of the updates.
:class:`tnadapt.algebra.units.UnitPlan` and :class:`tnadapt.SuperLoRA` derive from these, and add the updates.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, Literal, Self, cast, overload

import numpy as np

from tnadapt.argument_checks import checks_arguments, wrong_argument
from tnadapt.backends import (
    Array,
    Backend,
    JaxArray,
    TorchArray,
    get_backend,
    load_backend,
    load_imported,
    one_blas_thread,
)
from tnadapt.errors import BackendError, ConfigError, ShapeError, TnadaptError, integer, safe_repr, summarize

from .applying import applying_of
from .config import Config, group_fold, is_named
from .group import Group, lora_rank, rank_bound, rank_bounds
from .init import Initializer, StartingGroup, ZeroArray, zero_arrays
from .layout import layout_of, require_alike, require_keys
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
from .starting_points import PREFIX, StartPlace, starting_point
from .theta import Theta

__all__ = [
    "GroupPlan",
    "ParameterPlan",
    "RankPlan",
    "base_starts",
    "base_weight",
    "checked_given",
    "checked_start",
    "from_base",
]


# -- Which arrays of a plan are trained, frozen, tied or scaled --------------------------------------------------------


class ArrayPlan:
    """Origins of the arrays of all groups, as ``Config.sources`` says.

    Parameters
    ----------
    config : Config
    num_groups : int
    network : callable
        Returns the network of a group, by its index.
    different : iterable of int
        Groups that together have every network.

    Examples
    --------
    >>> from tnadapt.algebra.sources import Seeded
    >>> config = Config(rank=2, sources={"factor1": Seeded("normal")})
    >>> plan = ArrayPlan(config, 3, lambda group: Network(config, 24, 4), [0])
    >>> plan.trained_shapes(1)
    {'split0.factor0': (6, 2)}
    """

    def __init__(
        self, config: Config, num_groups: int, network: Callable[[int], Network], different: Iterable[int]
    ) -> None:
        self.config, self.num_groups, self._network, self._different = config, num_groups, network, different

    @functools.cached_property
    def _sources(self) -> SourceMap:
        assert isinstance(self.config.sources, SourceMap)  # Config converts any other mapping
        return self.config.sources

    @functools.cached_property
    def tied(self) -> bool:
        """Whether an array may be tied to one of another group, so that groups differ in their origins."""
        return any(isinstance(inner_source(source), Tied) for source in self._sources.values())

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all groups with the same network have the same frozen arrays."""
        frozen = [origin.source for origin in self.origins(0).values() if not origin.source.trained]
        return not self.tied and all(source.independent_of_group for source in frozen)

    def origins(self, group: int) -> dict[str, Origin]:
        """Return the origin of each array of a group, by the network's names; empty if the config has no sources."""
        if not self.config.sources:
            return {}
        if self.tied:
            return origins_of(self._sources, group, self._network(0).shapes, self.num_groups)
        # The same for all groups, except for the index.
        return {name: found._replace(group=group, owner=(group, name)) for name, found in self._first.items()}

    @functools.cached_property
    def _first(self) -> dict[str, Origin]:
        return origins_of(self._sources, 0, self._network(0).shapes, self.num_groups)

    def trained_shapes(self, group: int) -> dict[str, tuple[int, ...]]:
        """Return the trained arrays and multipliers that belong to a group itself, by the network's names."""
        shapes, found = self._network(group).shapes, dict[str, tuple[int, ...]]()
        for name, origin in self.origins(group).items():
            if origin.source.trained and origin.key == (group, name):
                found[name] = shapes[name]
            if origin.multiplied is not None and origin.owner == (group, name):
                multipliers = origin.multiplied.multiplier_shapes(shapes[name])
                found |= {f"{name}.{multiplier}": shape for multiplier, shape in multipliers.items()}
        return found

    def check(self) -> None:
        """Raise a ConfigError if a source does not suit its array."""
        if not self.config.sources:
            return
        network = self._network(0)  # all networks have arrays of the same names
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
                own = other != name and other.rpartition(".")[0] == split
                if own and not (theirs.source.needs_base and theirs.key == (group, other)):
                    raise ConfigError(
                        f"{type(origin.source).__name__} computes {name!r} from the base weights and the factors of "
                        f"all modes, and {other!r} is not computed from the base: give it FromBase('mode') or Mixed"
                    )

    def _check_array(self, group: int, name: str, origin: Origin) -> None:
        if origin.multiplied is None and origin.source.trained and origin.key == (group, name):
            return
        own, there = self._network(group), self._network(origin.group)
        if there.shapes[origin.name] != own.shapes[name]:
            raise ConfigError(
                f"sources ties 'group{group}.{name}', of shape {own.shapes[name]}, to "
                f"'group{origin.group}.{origin.name}', of shape {there.shapes[origin.name]}: only arrays of one shape "
                "can be tied"
            )
        plain = self.config.projection == "identity"
        origin.source.check(Place(origin.name, own.shapes[name], there.mode_of(origin.name), there.sizes, not plain))
        if origin.multiplied is None:
            return
        origin.multiplied.check(Place(name, own.shapes[name], own.mode_of(name), own.sizes, not plain))
        if origin.multiplied.zero is not None and not is_linear(self.config.projection):
            raise ConfigError(
                f"start=0 of {name!r} leaves a nonlinear F without a gradient, as tanhshrink'(0) = 0: give start=1"
            )

    # -- Frozen arrays -------------------------------------------------------------------------

    @functools.cached_property
    def _largest(self) -> dict[str, tuple[int, ...]]:
        """The largest size of each array along each axis, over all groups."""
        shapes = [self._network(group).shapes for group in self._different]
        return {
            name: tuple(max(sizes) for sizes in zip(*(own[name] for own in shapes), strict=True)) for name in shapes[0]
        }

    def frozen(self, origins: Mapping[str, Origin]) -> dict[str, FrozenArray]:
        """Return what computes each frozen array of a group, by the network's names."""
        return {name: self._frozen(origin) for name, origin in origins.items() if not origin.source.trained}

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        """Positions of the arrays among those of a group, which are the same in all groups."""
        return {name: number for number, name in enumerate(self._network(0).shapes)}

    def _frozen(self, origin: Origin) -> FrozenArray:
        network, name = self._network(origin.group), origin.name
        stream = Stream(
            self.config.seed, origin.group, PURPOSE["source"] + self._numbers[name], self._largest[name],
            mode=network.mode_of(name),
        )  # fmt: skip
        group = 0 if origin.source.brought and origin.source.independent_of_group else origin.group
        return FrozenArray(f"group{group}.{name}", origin.source, network.shapes[name], stream)

    def shapes_of(self, chosen: Callable[[Source], bool]) -> dict[str, tuple[int, ...]]:
        """Return the full names and shapes of the frozen arrays whose source is chosen, in order, each once."""
        if not any(chosen(inner_source(source)) for source in self._sources.values()):
            return {}
        found = dict[str, tuple[int, ...]]()
        for group in range(self.num_groups):
            for entry in self.frozen(self.origins(group)).values():
                if chosen(entry.source) and entry.full not in found:
                    shared = entry.source.independent_of_group
                    found[entry.full] = self._largest[entry.full.partition(".")[2]] if shared else entry.shape
        return found


def names_of(index: int, shapes: Iterable[str], origins: Mapping[str, Origin]) -> tuple[dict[str, str], dict[str, str]]:
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
        there = f"are {summarize(list(shapes))}" if shapes else "are none: use tnadapt.sources.Given()"
        raise ConfigError(f"given names {safe_repr(unknown[0])}; the arrays that a caller can give {there}")
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
        found = np.asarray(get_backend(array).to_numpy(array))
    except TnadaptError as error:
        raise ConfigError(f"{label} must be an array; {error}") from error
    if found.shape != shape:
        raise ShapeError(f"{label} has shape {found.shape}; expected {shape}")
    with np.errstate(over="ignore"):
        single = np.array(found, np.float32, order="C")  # parameters that start there must be contiguous
    if found.dtype.kind not in ("fiu" if integers else "f") or not np.isfinite(single).all():
        what = "finite numbers" if integers else "finite floating-point numbers"
        raise ConfigError(f"{label} must hold {what} that float32 can represent; its dtype is {found.dtype}")
    return single


# -- Groups, lengths before and after F (ρ), parameter counts, shapes of arrays ----------------------------------------


Weights = tuple[tuple[int, int], ...] | None
_Projections = dict[tuple[int, int, Weights], Projection]

# Plans of up to this many groups are laid out when they are made; larger ones when their arrays are asked for.
LAID_OUT = 4096


class GroupPlan:
    """Groups, networks and shapes of an adapter. The base of :class:`~tnadapt.SuperLoRA`, which adds arrays.

    It has the parameters of :class:`~tnadapt.SuperLoRA` and raises the same errors.

    Examples
    --------
    >>> GroupPlan(Config(rank=2), [(6, 4)]).param_shapes
    {'group0.split0.factor0': (6, 2), 'group0.split0.factor1': (4, 2)}
    """

    def __init__(
        self,
        config: Config,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None = None,
        roles: Sequence[Hashable] | None = None,
        *,
        given: Mapping[str, Any] | None = None,
        start_from: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(f"config must be a tnadapt.Config; got {type(config).__name__}")
        require_keys(layers, roles)
        self.config = config
        self.applying = applying_of(config.apply, config.magnitude_axis)
        self.layout = layout_of(config.groups, shapes, layers, roles)
        if config.weight_shape is not None:
            require_alike(self.layout, config.weight_shape, config.fold)  # type: ignore[arg-type]  # Config refuses others
        self.shapes = self.layout.shapes
        self.size = self.layout.size
        self.num_groups = self.layout.num_groups
        self._layers = None if layers is None else list(layers)
        self._roles = None if roles is None else list(roles)
        self._networks: dict[tuple[int, int, Weights, tuple[int, ...] | None], Network] = {}
        # Build every network once, to raise errors here and not at the first use.
        for group in self._different:
            self._network(group)
        self._array_plan = ArrayPlan(config, self.num_groups, self._network, self._different)
        self._array_plan.check()
        self._base_starts: dict[str, np.ndarray] = {}
        self.point = starting_point(config.start)
        if self.point.needs_base:
            for group in range(self.num_groups):
                self.point.check(self.start_place(group))
        # Filled in place: groups refer to it.
        self._given: dict[str, np.ndarray] = {}
        fitting = checked_given(given, self.fixed_shapes, self.brought_shapes)
        if self.theta is not None:
            self.theta.bring({name: fitting.pop(name) for name in self.brought_shapes if name in fitting})
        self._given.update(fitting)
        if start_from is not None:
            self._given.update(checked_start(config.start, self.point.brought, start_from, self.array_shapes))
        self._lay_out()
        if self._array_plan.tied and is_linear(config.projection):
            _ = self._zeros  # raises a ConfigError if a term cannot start at zero

    def _lay_out(self) -> None:
        """Load backends and lay the groups out now, so that torch.compile and jax.jit never trace this code."""
        load_imported()
        if self.num_groups <= LAID_OUT:
            _ = self.param_shapes, self.weight_param_names

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of trained elements; counted without allocating anything."""
        if self.theta is not None or self._array_plan.tied:
            return sum(math.prod(shape) for shape in self.param_shapes.values())
        own = sum(math.prod(shape) for shape in self.weight_param_shapes.values())
        return own + sum(count * self._num_trained(group) for group, count in self.kinds)

    def _num_trained(self, group: int) -> int:
        if not self.config.sources:
            return self._network(group).num_parameters
        return sum(math.prod(shape) for shape in self._array_plan.trained_shapes(group).values())

    @functools.cached_property
    def theta(self) -> Theta | None:
        """The map before the network; None if there is none, and the arrays themselves are trained."""
        return None if self.config.before is None else Theta(self.config, self.array_shapes)

    @functools.cached_property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, in order: the arrays in ``array_shapes``, or θ; ``weight_param_shapes``.

        With ``config.before``, θ is named ``theta``, ``group{g}.theta`` or ``group{g}.split{k}.{array}.theta``,
        depending on ``config.scope``.
        """
        made = self.array_shapes if self.theta is None else self.theta.shapes
        return {**made, **self.weight_param_shapes} if self.weight_param_shapes else made

    @functools.cached_property
    def weight_param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter that belongs to a weight, not to its update, in order.

        ``weight{i}.magnitude`` with ``apply="magnitude"``. They start at numbers of the base weights.
        """
        if self.applying.additive:
            return {}
        return {
            name: own
            for index, shape in enumerate(self.shapes)
            for name, own in self.applying.param_shapes(index, shape).items()
        }

    @functools.cached_property
    def weight_param_names(self) -> list[tuple[str, ...]]:
        """The names in ``weight_param_shapes`` of each weight."""
        return [tuple(self.applying.param_shapes(index, shape)) for index, shape in enumerate(self.shapes)]

    @property
    def base_starts(self) -> dict[str, np.ndarray]:
        """The initial values of the parameters in ``weight_param_shapes`` that the plan has, by name, in float64."""
        return dict(self._base_starts)

    @property
    def needs_base(self) -> bool:
        """Whether the plan lacks arrays or initial values that are computed from the base weights."""
        return not (
            self.base_shapes.keys() <= self._given.keys()
            and self.weight_param_shapes.keys() <= self._base_starts.keys()
        )

    @functools.cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that is trained, or made from θ, in order.

        Names are ``group{g}.split{k}.{array}``, with ``term{t}.`` before the split where there are several
        terms; ``array`` is dense, factor0 …, weights, core, or core0 … (tensor train). The trained diagonals of a
        frozen array are ``.size`` and ``.rank`` after its name.
        """
        if not self.config.sources:
            return {full: group.network.shapes[name] for group in self.groups for name, full in group.names.items()}
        return {
            f"group{group}.{name}": shape
            for group in range(self.num_groups)
            for name, shape in self._array_plan.trained_shapes(group).items()
        }

    @functools.cached_property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that ``config.sources`` freezes, in order; named as in ``array_shapes``."""
        return {full: group.network.shapes[name] for group in self.groups for name, full in group.frozen_names.items()}

    @functools.cached_property
    def given_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that the caller brings, in order.

        Frozen arrays whose source is :class:`tnadapt.sources.Given`, and those of P for ``before="tied"``
        (``theta.index``) and ``before="given"`` (``theta.matrix``).
        """
        frozen = self._array_plan.shapes_of(lambda source: source.brought)
        return {**frozen, **self.brought_shapes}

    @property
    def brought_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of the map before the network that the caller brings."""
        return {} if self.theta is None else self.theta.brought_shapes

    @functools.cached_property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that is computed from the base weights, in order: frozen ones, and the start.

        The start of an array is named ``start.`` and the array's name.
        """
        frozen = self._array_plan.shapes_of(lambda source: source.needs_base)
        return {**frozen, **self.start_shapes} if self.point.needs_base else frozen

    @functools.cached_property
    def start_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of x_0 that is not drawn: ``start.`` and its name in ``array_shapes``.

        With ``config.start="given"``, of all those that a caller may bring.
        """
        if not (self.point.brought or self.point.needs_base):
            return {}
        return {PREFIX + name: shape for name, shape in self.array_shapes.items()}

    @property
    def fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that ``given`` may have: those in given, base and start shapes."""
        return {**self.given_shapes, **self.base_shapes, **self.start_shapes}

    @property
    def given(self) -> dict[str, np.ndarray]:
        """The arrays in ``fixed_shapes`` that the plan has, by name, in float32."""
        return dict(self._given) if self.theta is None else {**self._given, **self.theta.brought}

    def start_place(self, group: int) -> StartPlace:
        """Return what a start needs to know of a group."""
        network, config = self._network(group), self.config
        weights = tuple(self.shapes[piece.weight] for piece in self.layout.of_group(group))
        plain = config.projection == "identity" and not config.sources and network.terms == 1
        plain = plain and list(network.shapes) == ["split0.factor0", "split0.factor1"]
        size = self.layout.group_size(group)
        return StartPlace(network.shapes, network.sizes, weights, size, network.scale, plain)

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The groups: the network, map and weight slices of each.

        Groups of equal length share their network, and their F if ``config.shared``.

        Examples
        --------
        >>> import tnadapt as tna
        >>> GroupPlan(tna.presets.fastfood(ratio=0.1), [(10, 10)]).groups[0].projection
        Projection('linear', n_in=10, n_out=100, seed=0, group=0)
        """
        projections: _Projections = {}
        arrays: dict[tuple[int, int], FrozenArrays] = {}
        return [self._made(index, projections, arrays) for index in range(self.num_groups)]

    @functools.cached_property
    def alike(self) -> list[tuple[Group, int]]:
        """A group of each kind, and the number of groups that have its network, map, and kinds of arrays.

        For what is counted in integers, without laying all groups out. Groups with ``sources`` stand for themselves.
        """
        if self.config.sources:
            return [(group, 1) for group in self.groups]
        projections: _Projections = {}
        arrays: dict[tuple[int, int], FrozenArrays] = {}
        return [(self._made(first, projections, arrays), count) for first, count in self.kinds]

    def _made(self, index: int, projections: _Projections, arrays: dict[tuple[int, int], FrozenArrays]) -> Group:
        config, alike, tied = self.config, self._array_plan.alike, self._array_plan.tied
        network, size = self._network(index), self.layout.group_size(index)
        key = size, 0 if config.shared else index, self._weights(index)
        if key not in projections:
            projections[key] = self._projection(network.size, *key)
        origins = self._array_plan.origins(index)
        names, frozen_names = names_of(index, network.shapes, origins)
        # Arrays that do not depend on the group are computed and kept once for all groups with the same network.
        own = id(network), 0 if alike else index
        if own not in arrays:
            arrays[own] = FrozenArrays(self._array_plan.frozen(origins), self._given)
        start = Initializer(
            network, projections[key], config.seed, index, arrays[own], origins=origins,
            starts=self._start_of if tied else None, table=self._zero_table if tied else None,
            point=self.point, given=self._given,
        )  # fmt: skip
        multiplied = {name: origin.multiplied for name, origin in origins.items() if origin.multiplied is not None}
        pieces = self.layout.of_group(index)
        return Group(size, network, projections[key], start, names, pieces, arrays[own], frozen_names, multiplied)

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
                StartingGroup(index, self._network(index), self._array_plan.origins(index), own)
                for index, own in enumerate(trained)
            ]
        )

    def _projection(self, n_in: int, size: int, stream: int, weights: Weights) -> Projection:
        config = self.config
        if weights is None:
            return Projection(config.projection, n_in, size, config.seed, stream)
        return Projection.on_weights(config.projection, weights, config.ratio, config.seed, stream)

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

    @property
    def _stacked(self) -> bool:
        return self.config.fold == "stack" and self.config.order == 2

    @functools.cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """The groups that may differ in their network: the index of the first of each kind, and how many have it.

        Groups of equal size have the same network, but for stacks and folds in names, of different weights, and groups
        with a map F of each weight.
        """
        named = is_named(self.config.fold) and not self.layout.equal_shapes
        if self.config.on == "weight" or named:
            return [(group, 1) for group in range(self.num_groups)]
        return self.layout.kinds(columns=self._stacked)

    @property
    def _different(self) -> list[int]:
        """Indices of groups that together have every network of the plan."""
        return [first for first, _ in self.kinds]

    def _network(self, group: int) -> Network:
        size = self.layout.group_size(group)
        columns = self.layout.columns(group) if self._stacked else 1
        config, weights = self.config, self._weights(group)
        fold = group_fold(config.fold, self.layout, group) if is_named(config.fold) else None
        found = self._networks.get((size, columns, weights, fold))
        if found is None:
            n_in = input_length(config.projection, size, config.ratio, weights)
            own = config if fold is None else config.replace(fold=fold)
            found = self._networks[size, columns, weights, fold] = Network(own, n_in, columns)
        return found

    @checks_arguments
    def starts(self, trained: Collection[str] | None = None) -> list[Initializer]:
        """Return each group's initial arrays, if only the parameters of these names are trained; None means all.

        Which θ are trained does not affect them: the gradient of each θ comes through all of its arrays.
        """
        if trained is None:
            return [group.start for group in self.groups]
        trained = list(trained)
        unknown = [name for name in trained if name not in self.param_shapes]
        if unknown or not trained:
            raise ConfigError(
                f"trained must name some of the parameters in param_shapes; unknown: {some_names(unknown)}; there are "
                f"{some_names(list(self.param_shapes))}"
            )
        if self.theta is not None:
            return self.starts()
        return self._starts_if(set(trained))

    def _starts_if(self, chosen: Collection[str]) -> list[Initializer]:
        """Return each group's initial arrays if these are trained, of which a group may have none."""
        found = list[Initializer]()
        own = [{name for name, full in group.names.items() if full in chosen} for group in self.groups]
        if not self._array_plan.tied:
            return [group.start.for_trained(names) for group, names in zip(self.groups, own, strict=True)]
        zeros: list[dict[int, list[ZeroArray]]] = []

        def table() -> dict[int, list[ZeroArray]]:
            if not zeros:
                zeros.append(self._zeros_if(own))
            return zeros[0]

        for group, names in zip(self.groups, own, strict=True):
            found.append(group.start.for_trained(names, found.__getitem__, table))
        return found


def some_names(names: Sequence[str]) -> str:
    """Return the first few names, for a message."""
    first: Iterator[str] = iter(names[:4])
    return (", ".join(map(repr, first)) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# -- What base weights determine: frozen arrays, starts, and magnitudes ------------------------------------------------


_WORKERS = min(8, os.cpu_count() or 1)


def from_base(
    plan: GroupPlan,
    weights: Sequence[Any] | Callable[[int], Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Compute the arrays in ``plan.base_shapes``; see :meth:`tnadapt.SuperLoRA.with_base`."""
    found = dict[str, np.ndarray]()

    def put(arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        for full, array in arrays:
            found[full] = array
            if progress is not None:
                progress(len(found), len(plan.base_shapes))

    starts = collections.deque[Future[dict[str, np.ndarray]]]()
    # The last bits of a matrix product depend on the number of threads: one for each array, and arrays in parallel.
    with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        for index, group in enumerate(plan.groups):
            # Tied arrays are computed with the group that they belong to.
            entries = {
                entry.full: entry
                for entry in group.frozen.entries.values()
                if entry.source.needs_base and entry.stream.group == index and entry.full not in found
            }
            if not entries and not plan.point.needs_base:
                continue
            base = _folded(plan, index, weights)
            if plan.point.needs_base:
                # Starts of several groups in parallel, as many as there are weights in memory.
                starts.append(pool.submit(_start, plan, index, base))
                if len(starts) == _WORKERS:
                    put(starts.popleft().result().items())
            # What is computed from the factors comes after them.
            for late in (False, True):
                own = {full: entry for full, entry in entries.items() if entry.source.needs_factors == late}
                factors = [_factors(group, full, found) if late else {} for full in own]
                arrays = pool.map(functools.partial(_computed, base), own.values(), factors)
                put(zip(own, arrays, strict=True))
        for start in starts:
            put(start.result().items())
    return found


def base_starts(plan: GroupPlan, weights: Sequence[Any] | Callable[[int], Any]) -> dict[str, np.ndarray]:
    """Compute where the parameters in ``plan.weight_param_shapes`` start."""
    found = dict[str, np.ndarray]()
    for index, names in enumerate(plan.weight_param_names):
        if names:
            weight = _weight(plan, index, weights).reshape(plan.shapes[index])
            found.update(plan.applying.starts(index, weight.astype(np.float64)))
    for name, start in found.items():
        if not np.isfinite(start).all():
            raise ConfigError(f"{name} would start at the norms of a base weight that holds NaN or infinity")
    return found


def base_weight(backend: Backend, weight: Any, index: int, shape: tuple[int, int]) -> Any:
    """Return a base weight after checking its shape and dtype."""
    if tuple(weight.shape) != shape:
        raise ShapeError(f"base weight {index} has shape {tuple(weight.shape)}; expected {shape}")
    backend.require_float(weight, f"base weight {index}")
    return weight


def _factors(group: Group, full: str, found: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the frozen factors of the split of an array, by their modes."""
    split = full.partition(".")[2].rpartition(".")[0] + "."
    modes = {name: group.network.mode_of(name) for name in group.frozen_names if name.startswith(split)}
    return {mode: found[group.frozen_names[name]] for name, mode in modes.items() if mode is not None}


def _computed(base: np.ndarray, entry: FrozenArray, factors: Mapping[int, np.ndarray]) -> np.ndarray:
    return entry.compute(dataclasses.replace(entry.stream, base=base, factors=factors))


def _start(plan: GroupPlan, index: int, base: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the start of a group, by the names in ``plan.start_shapes``, in float32."""
    place = plan.start_place(index)
    stream = Stream(plan.config.seed, index, PURPOSE["source"])
    made = plan.point.arrays(place, base, stream)
    what = f"start={plan.config.start!r} of group {index}"
    if not isinstance(made, Mapping) or made.keys() != place.shapes.keys():
        names = sorted(made) if isinstance(made, Mapping) else type(made).__name__
        raise ConfigError(f"{what} must compute an array for each of {', '.join(place.shapes)}; got {names}")
    found = dict[str, np.ndarray]()
    for name, shape in place.shapes.items():
        array = np.asarray(made[name])
        if array.shape != shape or array.dtype.kind != "f":
            raise ConfigError(
                f"{what} must compute floating-point numbers of shape {shape} for {name!r}; got {array.dtype} of shape "
                f"{array.shape}"
            )
        with np.errstate(over="ignore"):
            single = array.astype(np.float32, order="C")
        if not np.isfinite(single).all() or (array.any() and not single.any()):
            raise ConfigError(f"{what} has numbers that float32 cannot represent in {name!r}")
        found[f"{PREFIX}group{index}.{name}"] = single
    return found


def _folded(plan: GroupPlan, index: int, weights: Sequence[Any] | Callable[[int], Any]) -> np.ndarray:
    """Return the base weights of a group as a tensor with the sizes of its network, in float64."""
    group = plan.groups[index]
    sizes = group.network.sizes
    vec = np.zeros(math.prod(sizes))
    start = 0
    for piece in group.pieces:
        whole = _weight(plan, piece.weight, weights)
        vec[start : start + piece.length] = whole[piece.weight_start : piece.weight_start + piece.length]
        start += piece.length
    return vec.reshape(sizes)


def _weight(plan: GroupPlan, index: int, weights: Sequence[Any] | Callable[[int], Any]) -> np.ndarray:
    if not callable(weights) and len(weights) != len(plan.shapes):
        raise ShapeError(f"with_base needs the {len(plan.shapes)} base weights; got {len(weights)}")
    weight = weights(index) if callable(weights) else weights[index]
    backend = get_backend(weight)
    weight = base_weight(backend, weight, index, plan.shapes[index])
    # bfloat16 has no NumPy dtype; every bfloat16 and float16 number is a float32 number.
    wide = weight if backend.dtype_name(weight) == "float64" else backend.astype(weight, "float32")
    return np.asarray(backend.to_numpy(wide)).reshape(-1)


# -- The parameters of a plan: where they start, and the arrays that they make -----------------------------------------


class ParameterPlan(GroupPlan):
    """A plan with parameters. The base of :class:`~tnadapt.SuperLoRA`, which adds updates.

    Examples
    --------
    >>> from tnadapt import Config
    >>> list(ParameterPlan(Config(rank=2), [(6, 4)]).init())
    ['group0.split0.factor0', 'group0.split0.factor1']
    """

    #: The class of the plans of each special class of configs.
    _of: ClassVar[dict[type[Config], type[ParameterPlan]]] = {}

    def __init_subclass__(cls, of: type[Config] | None = None) -> None:
        super().__init_subclass__()
        if of is not None:
            ParameterPlan._of[of] = cls

    def __new__(cls, config: Config, *args: Any, **settings: Any) -> Self:
        return cast(Self, object.__new__(cls._of.get(type(config), cls)))

    # -- Base weights ------------------------------------------------------------------------

    @checks_arguments
    def with_base(
        self, weights: Sequence[Any] | Callable[[int], Any], progress: Callable[[int, int], None] | None = None
    ) -> Self:
        """Return this plan with what is computed from the base weights: frozen arrays, the start, and magnitudes.

        Parameters
        ----------
        weights : sequence of array, or callable
            The base weight of each update, ``(rows, cols)``, of any library; or a function that returns the weight with
            an index, so that only one group's weights are in memory at a time.
        progress : callable, optional
            Called with the numbers of frozen arrays that are computed and of all, after each array.

        Returns
        -------
        SuperLoRA
            Itself if nothing of it is computed from the base.

        Raises
        ------
        ShapeError
            If a weight is missing or has another shape.
        ConfigError
            If an array cannot be computed from its weight: NaN, or too few singular values.

        Notes
        -----
        For :class:`tnadapt.sources.FromBase`; for starts that are computed from the base weights; and for
        ``apply="magnitude"``, whose magnitudes start at the norms of the weights. Memory: a group's weights in float64;
        for starts, those of as many groups as there are cores, up to 8.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> sources = {"factor0": tna.sources.FromBase("rows")}
        >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources=sources), [(6, 4)])
        >>> plan.base_shapes, plan.with_base([np.diag([3.0, 2, 1, 1, 1, 1])[:, :4]]).given.keys()
        ({'group0.split0.factor0': (6, 2)}, dict_keys(['group0.split0.factor0']))
        """
        if not self.base_shapes and not self.weight_param_shapes:
            return self
        found = from_base(self, weights, progress) if self.base_shapes else {}
        plan = type(self)(self.config, self.shapes, self._layers, self._roles, given={**self.given, **found})
        plan._base_starts = base_starts(self, weights)
        return plan

    def fill(self, other: ParameterPlan) -> None:
        """Add what is computed from the base weights and this plan lacks, in place, from a plan that has it.

        For an adapter that uses the plan already. What the plan has stays as it is.

        Parameters
        ----------
        other : SuperLoRA
            A plan of the same config and shapes, such as :meth:`with_base` returns.
        """
        own = self.given
        self._given.update({name: array for name, array in other.given.items() if name not in own})
        # In place, like the given arrays: the plan in other units has the same ones.
        self._base_starts.update(
            {name: start for name, start in other.base_starts.items() if name not in self._base_starts}
        )

    # -- Start -------------------------------------------------------------------------------

    @checks_arguments
    def with_start(self, arrays: Mapping[str, Any]) -> Self:
        """Return this plan with other initial arrays, as ``start_from=arrays`` gives it.

        Parameters
        ----------
        arrays : mapping of str to array
            Of any library, for some or all names in ``array_shapes``. The others start as usual.

        Returns
        -------
        SuperLoRA
            A new plan, with the given and base arrays of this one.

        Raises
        ------
        ConfigError
            If ``config.start`` is not "given", a name is unknown, or an array is not finite.
        ShapeError
            If an array has another shape.

        Examples
        --------
        ΔW is the difference to the start, which itself is no zero:

        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.SuperLoRA(tna.presets.lora(1, start="given"), [(2, 3)])
        >>> plan = plan.with_start({"group0.split0.factor0": np.ones((2, 1))})
        >>> params = plan.init()
        >>> params["group0.split0.factor0"].tolist(), bool(plan.deltas(params)[0].any())
        ([[1.0], [1.0]], False)
        """
        given = {name: array for name, array in self.given.items() if name not in self.start_shapes}
        plan = type(self)(self.config, self.shapes, self._layers, self._roles, given=given, start_from=arrays)
        plan._base_starts = self._base_starts
        return plan

    @overload
    def init(
        self,
        backend: Literal["numpy"] = "numpy",
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]: ...

    @overload
    def init(
        self,
        backend: Literal["torch"],
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, TorchArray]: ...

    @overload
    def init(
        self,
        backend: Literal["jax"],
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, JaxArray]: ...

    @overload
    def init(
        self, backend: str, dtype: str = "float32", device: Any = None, trained: Collection[str] | None = None
    ) -> dict[str, Any]: ...

    def init(
        self,
        backend: str = "numpy",
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Return initial parameters, for which ΔW is exactly zero and its gradient is not.

        Parameters
        ----------
        backend : str
            ``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"`` or a registered name.
        dtype : str
            ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
        device : optional
            Device of the arrays; the library's default if None.
        trained : collection of str, optional
            Names of the arrays that will be trained while the others stay as returned. The array that starts at zero is
            then one of these, so that it has a gradient.

        Returns
        -------
        dict of str to array
            In the order of ``param_shapes``, with the same numbers in every library.

        Raises
        ------
        BackendError
            If the library, dtype or device is not available.
        ConfigError
            If the dtype cannot represent the initial values (float16, a nonlinear F and a tiny alpha), or ``trained``
            names no array.

        Notes
        -----
        For a linear F, the factor of the leading mode of the last split is zero in every term, and the other arrays are
        random. For a nonlinear F all arrays are random, and ``deltas`` subtracts the update of the initial values. The
        random arrays are normal, drawn from ``config.seed``, and scaled to a common root mean square: the one for which
        the first SGD step changes ΔW by 1/32 of what dense fine-tuning changes (for a white gradient and a scale of 1),
        whatever rank, order, splits and ρ are. :mod:`tnadapt.algebra.init` has the formula, and the case of order 1.

        Examples
        --------
        >>> import tnadapt as tna
        >>> params = tna.SuperLoRA(tna.Config(rank=1), [(2, 3)]).init()
        >>> params["group0.split0.factor0"].tolist()
        [[0.0], [0.0]]
        >>> plan = tna.SuperLoRA(tna.Config(rank=1), [(2, 3)])
        >>> params = plan.init(trained=["group0.split0.factor1"])
        >>> [bool(array.any()) for array in params.values()]
        [True, False]
        """
        library = load_backend(backend)
        if not library.usable():
            raise BackendError(f"{backend} is installed, but finds no device to compute on")
        if not isinstance(dtype, str):
            raise BackendError(f"dtype must be a name such as 'float32'; got {safe_repr(dtype)}")
        # Try an empty array first, to refuse an unavailable dtype or device before anything is drawn.
        library.asarray(np.zeros(0), dtype, device)
        made = self._weight_params(library, dtype, device)
        if self.theta is not None:
            self.theta.require_brought()
            self._require_gradient()
            for name, shape in self.theta.shapes.items():
                made[name] = library.asarray(np.zeros(shape), dtype, device)
            return {name: made[name] for name in self.param_shapes}
        for group, start in zip(self.groups, self.starts(trained), strict=True):
            for name, full in group.names.items():
                if full in made:
                    continue  # arrays that are tied
                host = start.host(name)
                if dtype == "float16" and np.max(np.abs(host)) > np.finfo(np.float16).max:
                    raise ConfigError(
                        f"{full} starts at numbers of up to {np.max(np.abs(host)):.1e}, which float16 cannot hold; "
                        f"use float32, or a larger alpha than {self.config.alpha}"
                    )
                made[full] = library.asarray(host, dtype, device)
        return {name: made[name] for name in self.param_shapes}

    def _weight_params(self, library: Backend, dtype: str, device: Any) -> dict[str, Array]:
        """Return the initial values of the parameters in ``weight_param_shapes``."""
        missing = [name for name in self.weight_param_shapes if name not in self._base_starts]
        if missing:
            raise ConfigError(
                f"{missing[0]} starts at the norms of its base weight, which this plan has not seen: call "
                "plan.with_base(weights) first, or attach the config to a model"
            )
        found = {}
        for name in self.weight_param_shapes:
            # To float32 first, as the norm is rounded where it is divided by.
            host = self._base_starts[name] if dtype == "float64" else self._base_starts[name].astype(np.float32)
            if dtype == "float16" and np.max(host) > np.finfo(np.float16).max:
                raise ConfigError(
                    f"{name} starts at norms of up to {np.max(host):.1e}, which float16 cannot hold; use float32"
                )
            found[name] = library.asarray(host, dtype, device)
        return found

    def arrays(self, params: Mapping[str, Array], dtype: str | None = None) -> dict[str, Array]:
        """Compute the arrays in ``array_shapes`` from the parameters: ``a_start + P θ``, or the parameters themselves.

        Parameters
        ----------
        params : mapping of str to array
            Names and shapes as in ``param_shapes``; one library, dtype and device.
        dtype : str, optional
            The dtype in which the parameters were trained, if they have been cast since: the arrays then have the
            numbers of training, and no gradient.

        Returns
        -------
        dict of str to array
            Differentiable in torch and JAX. ``arrays_plan`` computes updates from them.

        Raises
        ------
        ShapeError, BackendError
            As in :meth:`deltas`.

        Notes
        -----
        One call of P. a_start is rounded to the dtype of the parameters, and the sum is exactly a_start if θ is 0.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.SuperLoRA(tna.presets.lora(1, before="one-hot", parameters=2), [(2, 3)])
        >>> [array.shape for array in plan.arrays({"theta": np.ones(2)}).values()]
        [(2, 1), (3, 1)]
        """
        return self._arrays(self._checked(params), params, dtype)

    def _arrays(self, backend: Backend, params: Mapping[str, Array], dtype: str | None) -> dict[str, Array]:
        if dtype is not None and not isinstance(dtype, str):
            raise wrong_argument("dtype", "a string or None", dtype)
        if self.theta is None:
            return dict(params) if not self.weight_param_shapes else {name: params[name] for name in self.array_shapes}
        return self.theta.arrays(backend, params, functools.partial(self.array_start, backend), dtype)

    @functools.cached_property
    def arrays_plan(self) -> Self:
        """The plan of the updates alone, whose parameters are the arrays of this one.

        Itself, unless ``config.before`` makes them from θ or ``config.apply`` adds parameters of the weights.
        """
        if self.theta is None and self.applying.additive:
            return self
        found = object.__new__(type(self))
        own = {"theta", "param_shapes", "num_parameters", "arrays_plan", "weight_param_shapes", "weight_param_names"}
        # The groups, and the arrays that they draw, are shared.
        found.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        found.config = self.config.replace(
            before=None, parameters=None, scope="plan", offset=True, apply="add", magnitude_axis="rows"
        )
        found.applying, found._base_starts = applying_of("add"), {}
        _ = found.param_shapes, found.weight_param_names
        return found

    def array_start(self, backend: Backend, full: str, like: Array, dtype: str | None = None) -> Array:
        """Return the initial value of an array in ``array_shapes``, in the library, dtype and device of ``like``.

        ``dtype`` is the dtype to which it is rounded, if that is not like's.
        """
        index, _, name = full.removeprefix("group").partition(".")
        kind = backend.dtype_name(like)
        return self.groups[int(index)].start.on(backend, (name, dtype or kind), like, kind)

    def _require_gradient(self) -> None:
        """Raise a ConfigError if θ = 0 has no gradient: without an offset, where two arrays of a product are zero."""
        if self.config.offset:
            return
        for group in self.groups:
            for prefixes in group.network.prefixes:
                made = [name for name in group.names if name.startswith(tuple(prefixes))]
                if len(made) > 1:
                    raise ConfigError(
                        f"offset=False starts {' and '.join(made[:2])} at zero, whose product has no gradient there: "
                        "use offset=True, or sources that leave one array per term to train"
                    )

    def _checked(self, params: Mapping[str, Array]) -> Backend:
        """Return the backend of the parameters, after checking their names, shapes, dtypes and devices."""
        if not isinstance(params, Mapping):
            raise ShapeError(f"params must be a mapping of names to arrays; got {type(params).__name__}")
        expected = self.param_shapes
        if params.keys() != expected.keys():
            missing = [name for name in expected if name not in params]
            unknown = [name for name in params if name not in expected]
            raise ShapeError(
                f"params must have exactly the names of param_shapes; missing: {some_names(missing)}; "
                f"unknown: {some_names(unknown)}"
            )
        backend = get_backend(*params.values())
        for name, shape in expected.items():
            backend.require_float(params[name], f"params[{name!r}]")
            if tuple(params[name].shape) != shape:
                raise ShapeError(f"params[{name!r}] has shape {tuple(params[name].shape)}; expected {shape}")
        return backend


# -- Matrix ranks of the updates ---------------------------------------------------------------------------------------


class RankPlan(ParameterPlan):
    """A plan with bounds on the ranks of its updates."""

    @checks_arguments
    def largest_rank(self, i: int) -> int:
        """Return a matrix rank that the update of a weight never exceeds, whatever the arrays are.

        LoRA of that rank holds the update exactly, and :func:`tnadapt.convert` writes it from the factors.

        Parameters
        ----------
        i : int
            Index of the weight, ``0 <= i < len(shapes)``.

        Returns
        -------
        int
            At most ``min(shapes[i])``.

        Raises
        ------
        ShapeError
            If there is no weight i.

        Notes
        -----
        The bound follows from the integers of the plan: the least product of bonds of the network between the rows and
        the columns of the weight, as a slice of the folded tensor. It holds for frozen arrays as well. Terms add up,
        and ranks of the splits of Kronecker and Hadamard products multiply. Behind a map F that mixes rows with
        columns, or where a fold cuts through rows, only ``min(rows, cols)`` is known. Random arrays usually attain it;
        see :func:`tnadapt.planning.largest_rank` for the rank that they have.

        Examples
        --------
        >>> import tnadapt as tna
        >>> vit, P = [(768, 768)] * 24, tna.presets
        >>> for config in (P.lora(4), P.lotr(4), P.cara(4, heads=12), P.lokr(4), P.superlora(4)):
        ...     print(tna.SuperLoRA(config, vit).largest_rank(0))
        4
        4
        4
        96
        768
        """
        i = integer("i", i, 0, len(self.shapes) - 1, ShapeError)
        return rank_bound(self.layout, self.groups, i)

    @functools.cached_property
    def lora_rank(self) -> int | None:
        """The rank of LoRA that holds the update of every weight exactly: the maximum of :meth:`largest_rank`.

        None if for some weight two factors of its rank are no smaller than the update itself, or if ``config.apply``
        does more than add the update.

        Examples
        --------
        >>> import tnadapt as tna
        >>> gqa = [(64, 32), (16, 32)] * 3
        >>> tna.SuperLoRA(tna.presets.fact_tk(2, groups="role"), gqa, roles="qvqvqv").lora_rank
        2
        >>> tna.SuperLoRA(tna.presets.superlora(2), gqa).lora_rank is None
        True
        """
        if not self.applying.additive:
            return None
        return lora_rank(self.shapes, self.largest_ranks)

    @functools.cached_property
    def largest_ranks(self) -> list[int]:
        """:meth:`largest_rank` of every weight."""
        return list(rank_bounds(self.layout, self.groups))

    def full_rank_bound(self) -> int | None:
        """Return the rank of the weights' smaller sides if some update may have it and is no smaller as LoRA.

        None if not; no other rank has to be known then.
        """
        most = max(map(min, self.shapes))
        for (rows, cols), rank in zip(self.shapes, rank_bounds(self.layout, self.groups), strict=True):
            if rank * (rows + cols) < rows * cols:
                return None
            if rank == most:
                return most
        return None

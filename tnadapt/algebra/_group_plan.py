"""The integers of a plan: groups, lengths before and after F (ρ), parameter counts, shapes of arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import load_imported
from tnadapt.errors import ConfigError

from ._array_plan import ArrayPlan, checked_given, checked_start, names_of
from ._zeros import StartingGroup, ZeroArray, zero_arrays
from .applying import applying_of
from .config import Config
from .group import Group
from .init import Initializer
from .known_weights import layout_of, require_keys
from .layout import require_alike
from .maps import input_length, is_linear
from .maps.projection import Projection
from .named_fold import group_fold, is_named
from .network import Network
from .sources import FrozenArrays
from .starting_points import PREFIX, StartPlace, starting_point
from .theta import Theta

__all__ = ["GroupPlan", "some_names"]

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

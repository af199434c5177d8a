"""Several configs in one adapter: the plan, which is the plans of the parts side by side.

The long vector of a composite plan is that of its first part, then that of its second, and so on. Groups and weights
are numbered through all parts: if the first part has two groups, ``group2`` is the first group of the second part. Each
part draws its numbers with its own seed and its own numbers of groups, so that they do not depend on the other parts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.errors import ConfigError, ShapeError

from ._array_plan import checked_given, checked_start
from ._base_arrays import base_starts, from_base
from ._composite_config import CompositeConfig, ConfigPart
from ._composite_layout import CompositeLayout
from ._group_plan import LAID_OUT
from ._parameter_plan import ParameterPlan
from ._rates import RATES
from .applying import applying_of
from .group import Group
from .init import Initializer
from .starting_points import PREFIX, StartPlace, starting_point
from .superlora import SuperLoRA

__all__ = ["CompositeConfig", "CompositePlan", "ConfigPart"]

_Shapes = dict[str, tuple[int, ...]]


class CompositePlan(SuperLoRA, of=CompositeConfig):
    """The plan of a :class:`CompositeConfig`, which ``SuperLoRA(config, shapes)`` returns for one.

    Attributes
    ----------
    parts : tuple of SuperLoRA
        The plans of the parts.

    Notes
    -----
    Its groups are those of the parts, under other names, so that the same code computes the same updates.

    Examples
    --------
    >>> import tnadapt as tna
    >>> config = CompositeConfig([(tna.presets.lora(1), 1), (tna.presets.superlora(2), 2)])
    >>> plan = tna.SuperLoRA(config, [(6, 4), (3, 3), (3, 3)])
    >>> list(plan.param_shapes)[1:3], plan.parts[1].num_parameters
    (['group0.split0.factor1', 'group1.split0.factor0'], 20)
    """

    config: CompositeConfig
    layout: CompositeLayout

    def __init__(
        self,
        config: CompositeConfig,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None = None,
        roles: Sequence[Hashable] | None = None,
        *,
        given: Mapping[str, Any] | None = None,
        start_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, shapes = config, list(shapes)
        keys = [[None] * len(shapes) if own is None else _as_many(own, shapes) for own in (layers, roles)]
        self.parts = tuple(
            SuperLoRA(
                own,
                [shape for shape, _, _ in weights],
                None if layers is None else [layer for _, layer, _ in weights],
                None if roles is None else [role for _, _, role in weights],
            )
            for own, weights in config.split(list(zip(shapes, *keys, strict=True)))
        )
        self.applying = applying_of(config.apply, config.magnitude_axis)
        self.layout = CompositeLayout([part.layout for part in self.parts])
        self.shapes, self.size, self.num_groups = self.layout.shapes, self.layout.size, self.layout.num_groups
        self._layers = None if layers is None else list(layers)
        self._roles = None if roles is None else list(roles)
        self.point = starting_point(config.start)
        self._base_starts: dict[str, np.ndarray] = {}
        self._bring(checked_given(given, self.fixed_shapes))
        if start_from is not None:
            self._bring(checked_start(config.start, self.point.brought, start_from, self.array_shapes))
        if self.num_groups <= LAID_OUT:
            # As in GroupPlan: torch.compile and jax.jit never trace this code.
            _ = self.param_shapes, self.weight_param_names, self.groups

    def _bring(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Give arrays to the parts that they belong to."""
        for place, part in enumerate(self.parts):
            own = self._names(place, part.fixed_shapes)
            part._given.update({name: arrays[full] for name, full in own.items() if full in arrays})

    # -- Names -------------------------------------------------------------------------------

    def _names(self, place: int, names: Collection[str]) -> dict[str, str]:
        """Map names of arrays of a part to their names in the whole."""
        _, group = self.layout.firsts[place]
        return {name: _renumbered(name, group) for name in names}

    def _renamed(self, shapes: Callable[[SuperLoRA], _Shapes]) -> _Shapes:
        found: _Shapes = {}
        for place, part in enumerate(self.parts):
            own = shapes(part)
            found |= zip(self._names(place, own).values(), own.values(), strict=True)
        return found

    @functools.cached_property
    def array_shapes(self) -> _Shapes:
        """Name and shape of every array that is trained, in order."""
        return self._renamed(lambda part: part.array_shapes)

    @functools.cached_property
    def frozen_shapes(self) -> _Shapes:
        """Name and shape of every array that sources freeze, in order."""
        return self._renamed(lambda part: part.frozen_shapes)

    @functools.cached_property
    def given_shapes(self) -> _Shapes:
        """Name and shape of every array that the caller brings, in order."""
        return self._renamed(lambda part: part.given_shapes)

    @functools.cached_property
    def base_shapes(self) -> _Shapes:
        """Name and shape of every array that is computed from the base weights, in order."""
        return self._renamed(lambda part: part.base_shapes)

    @property
    def given(self) -> dict[str, np.ndarray]:
        """The arrays in ``fixed_shapes`` that the plan has, by name, in float32."""
        found: dict[str, np.ndarray] = {}
        for place, part in enumerate(self.parts):
            own = part.given
            found |= zip(self._names(place, own).values(), own.values(), strict=True)
        return found

    @property
    def needs_base(self) -> bool:
        """Whether the plan lacks arrays or initial values that are computed from the base weights."""
        return not (
            self.base_shapes.keys() <= self.given.keys() and self.weight_param_shapes.keys() <= self._base_starts.keys()
        )

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of trained elements."""
        return sum(part.num_parameters for part in self.parts)

    def part_of(self, i: int) -> tuple[SuperLoRA, int]:
        """Return the plan of the part that has weight ``i``, and the weight's number in it."""
        place = max(place for place, (first, _) in enumerate(self.layout.firsts) if first <= i)
        return self.parts[place], i - self.layout.firsts[place][0]

    @property
    def alone(self) -> list[tuple[SuperLoRA, dict[str, str], int]]:
        """The plan of each part's updates alone, the names here of its arrays, and the number of its first weight."""
        return [
            (part.arrays_plan, self._names(place, part.array_shapes), self.layout.firsts[place][0])
            for place, part in enumerate(self.parts)
        ]

    # -- Units -------------------------------------------------------------------------------

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """The unit of each parameter; see :attr:`SuperLoRA.units`. A step of all parts is that of one plan."""
        return self._units_for([part.config.rate for part in self.parts])

    def units_for(self, rate: str) -> dict[str, float]:
        """Return the units of another value of ``config.rate`` of all parts."""
        return self._units_for([rate] * len(self.parts))

    def _units_for(self, rates: Sequence[str]) -> dict[str, float]:
        found = dict.fromkeys(self.param_shapes, 1.0)
        for place, (part, rate) in enumerate(zip(self.parts, rates, strict=True)):
            own = RATES[rate](part, self.shapes)
            found |= {full: own[name] for name, full in self._names(place, part.array_shapes).items()}
        return found

    def with_units(self, units: Mapping[str, float]) -> CompositePlan:
        """Return the plan whose parameters are in these units; see :attr:`SuperLoRA.training_plan`."""
        found = super().with_units(units)
        found.parts = tuple(
            part.with_units({name: units[full] for name, full in self._names(place, part.array_shapes).items()})
            for place, part in enumerate(self.parts)
        )
        return found

    # -- Groups ------------------------------------------------------------------------------

    def start_place(self, group: int) -> StartPlace:
        """Return what a start needs to know of a group."""
        place = self.layout.part_of(group)
        return self.parts[place].start_place(group - self.layout.firsts[place][1])

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The groups of all parts, with their numbers and names in the whole."""
        found = list[Group]()
        for place, part in enumerate(self.parts):
            _, first = self.layout.firsts[place]
            for group in part.groups:
                found.append(
                    group._replace(
                        names={name: _renumbered(full, first) for name, full in group.names.items()},
                        frozen_names={name: _renumbered(full, first) for name, full in group.frozen_names.items()},
                        pieces=[self.layout.moved(place, piece) for piece in group.pieces],
                    )
                )
        return found

    @functools.cached_property
    def alike(self) -> list[tuple[Group, int]]:
        """A group of each kind of each part, and the number of groups like it."""
        return [kind for part in self.parts for kind in part.alike]

    def _starts_if(self, chosen: Collection[str]) -> list[Initializer]:
        found = list[Initializer]()
        for place, part in enumerate(self.parts):
            own = self._names(place, part.array_shapes)
            found += part._starts_if({name for name, full in own.items() if full in chosen})
        return found

    # -- Base weights ------------------------------------------------------------------------

    def with_base(
        self, weights: Sequence[Any] | Callable[[int], Any], progress: Callable[[int, int], None] | None = None
    ) -> CompositePlan:
        """Return this plan with what is computed from the base weights; see :meth:`SuperLoRA.with_base`."""
        if not self.base_shapes and not self.weight_param_shapes:
            return self
        if not callable(weights) and len(weights) != len(self.shapes):
            raise ShapeError(f"with_base needs the {len(self.shapes)} base weights; got {len(weights)}")
        found, done = self.given, itertools.count(1)

        def told(*_: int) -> None:
            if progress is not None:
                progress(next(done), len(self.base_shapes))

        for place, part in enumerate(self.parts):
            if part.base_shapes:
                first, _ = self.layout.firsts[place]
                arrays = from_base(part, functools.partial(_weight_of, weights, first), told)
                found |= zip(self._names(place, arrays).values(), arrays.values(), strict=True)
        plan = CompositePlan(self.config, self.shapes, self._layers, self._roles, given=found)
        plan._base_starts = base_starts(self, weights)
        return plan

    def fill(self, other: ParameterPlan) -> None:
        """Add what is computed from the base weights and this plan lacks, in place; see :meth:`SuperLoRA.fill`."""
        own = self.given
        self._bring({name: array for name, array in other.given.items() if name not in own})
        self._base_starts.update(
            {name: start for name, start in other.base_starts.items() if name not in self._base_starts}
        )


def _renumbered(name: str, first: int) -> str:
    """Return the name of an array of a part in the whole: with the group's number there."""
    prefix = PREFIX if name.startswith(PREFIX) else ""
    group, _, rest = name.removeprefix(prefix).removeprefix("group").partition(".")
    return f"{prefix}group{int(group) + first}.{rest}"


def _weight_of(weights: Any, first: int, index: int) -> Any:
    return weights(first + index) if callable(weights) else weights[first + index]


def _as_many(keys: Sequence[Hashable], shapes: Sequence[tuple[int, int]]) -> list[Hashable]:
    found = list(keys)
    if len(found) != len(shapes):
        raise ConfigError(f"layers and roles have one key per weight; got {len(found)} for {len(shapes)} weights")
    return found

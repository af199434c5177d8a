"""Several configs in one adapter: their config, layout, and plan, which is the plans of the parts side by side.

The long vector of a composite plan is that of its first part, then that of its second, and so on. Groups and weights
are numbered through all parts: if the first part has two groups, ``group2`` is the first group of the second part. Each
part draws its numbers with its own seed and its own numbers of groups, so that they do not depend on the other parts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tnadapt.argument_checks import is_sequence, wrong_argument
from tnadapt.errors import ConfigError, ShapeError, integer, safe_repr
from tnadapt.report import TextTable

from .applying import applying_of
from .config import Config
from .folding import MAX_SIZE
from .group import Group
from .init import Initializer
from .layout import Layout, Piece
from .plan import LAID_OUT, ParameterPlan, base_starts, checked_given, checked_start, from_base
from .starting_points import PREFIX, StartPlace, starting_point
from .superlora import SuperLoRA
from .units import RATES

__all__ = [
    "CompositeConfig",
    "CompositePlan",
]


# -- A config of parts: several configs, each for some of the weights --------------------------------------------------


_Item = TypeVar("_Item")

# Fields that a plan, and what it is attached to, has once for all of its weights.
_SAME = ("apply", "magnitude_axis", "start")


class ConfigPart(NamedTuple):
    """One config of several, and the number of weights that it is for.

    Attributes
    ----------
    config : Config
    weights : int
    """

    config: Config
    weights: int


class CompositeConfig(Config):
    """Several configs, each for some of the weights of one adapter: the first for the first weights, and so on.

    :func:`tnadapt.torch.attach` makes one of a mapping of patterns to configs.

    Parameters
    ----------
    parts : sequence of (Config, int)
        Each config, and the number of weights that it is for.

    Attributes
    ----------
    parts : tuple of ConfigPart

    Raises
    ------
    ConfigError
        If there are fewer than two parts, one is not a config with a number of weights, or they cannot be in one
        adapter: with another ``apply``, ``magnitude_axis`` or ``start``, or with a map ``before`` the network.

    Notes
    -----
    It has the fields of :class:`Config`. One that all parts share has their value; to read another one is an error that
    names the field, so that nothing takes the config of one part for that of all.

    Examples
    --------
    >>> import tnadapt as tna
    >>> config = CompositeConfig([(tna.presets.lora(8), 2), (tna.presets.lokr(4), 1)])
    >>> tna.SuperLoRA(config, [(64, 64), (64, 64), (256, 64)]).num_parameters
    2272
    >>> config.seed, config.replace(seed=3).parts[1].config.seed
    (0, 3)
    >>> config.rank
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: rank differs between the 2 configs of one adapter: 8, 4; read it in config.parts
    """

    parts: tuple[ConfigPart, ...]

    def __new__(cls, *args: Any, **settings: Any) -> CompositeConfig:
        return object.__new__(cls)

    def __init__(self, parts: Sequence[tuple[Config, int]]) -> None:
        object.__setattr__(self, "parts", _checked_parts(parts))

    def __repr__(self) -> str:
        return f"CompositeConfig([{', '.join(f'({part.config!r}, {part.weights})' for part in self.parts)}])"

    def _repr_html_(self) -> str:
        rows = [(f"{part.weights:,}", repr(part.config)) for part in self.parts]
        return TextTable(rows, ("weights", "config"), caption=type(self).__name__).html()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompositeConfig) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def split(self, items: Sequence[_Item]) -> list[tuple[Config, Sequence[_Item]]]:
        """Return each config with its own of the items, of which there is one for each weight."""
        expected = sum(part.weights for part in self.parts)
        if not is_sequence(items) and not isinstance(items, str):
            raise wrong_argument("items", "a sequence of one for each weight", items)
        items = list(items)
        if len(items) != expected:
            raise ShapeError(f"items must be one for each of the {expected} weights of the configs; got {len(items)}")
        left = iter(items)
        return [(part.config, list(itertools.islice(left, part.weights))) for part in self.parts]

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"parts": [[fields of a config, number of weights], …]}``."""
        return {"parts": [[part.config.to_dict(), part.weights] for part in self.parts]}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompositeConfig:
        """Return the config of a dictionary that :meth:`to_dict` wrote."""
        if not isinstance(settings, Mapping) or settings.keys() != {"parts"}:
            raise ConfigError(f"expected a mapping with the key 'parts'; got {safe_repr(settings)}")
        parts = settings["parts"]
        if not isinstance(parts, (list, tuple)) or not all(_is_pair(part) for part in parts):
            raise ConfigError(
                f"parts must be a list of pairs of a config and a number of weights; got {safe_repr(parts)}"
            )
        return cls([(Config.from_dict(config), weights) for config, weights in parts])

    def replace(self, **changes: Any) -> CompositeConfig:
        """Return a copy with some fields of every part changed."""
        return CompositeConfig([(part.config.replace(**changes), part.weights) for part in self.parts])


def _shared(name: str) -> property:
    """Return the property that reads a field of all parts."""

    def read(config: CompositeConfig) -> Any:
        values = [getattr(part.config, name) for part in config.parts]
        if any(value != values[0] for value in values):
            some = ", ".join(safe_repr(value) for value in values[:4]) + (", …" if len(values) > 4 else "")
            raise ConfigError(
                f"{name} differs between the {len(values)} configs of one adapter: {some}; read it in config.parts"
            )
        return values[0]

    return property(read)


# The fields have defaults in the class, which would be read silently.
for _field in dataclasses.fields(Config):
    setattr(CompositeConfig, _field.name, _shared(_field.name))


def _is_pair(part: Any) -> bool:
    return isinstance(part, (tuple, list)) and len(part) == 2


def _checked_parts(parts: Any) -> tuple[ConfigPart, ...]:
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not all(_is_pair(part) for part in parts):
        raise ConfigError(
            f"parts must be a list of two or more pairs of a config and a number of weights; got {safe_repr(parts)}"
        )
    found = list[ConfigPart]()
    for place, (config, weights) in enumerate(parts):
        if not isinstance(config, Config) or isinstance(config, CompositeConfig):
            raise ConfigError(f"part {place} must be a tnadapt.Config; got {type(config).__name__}")
        found.append(ConfigPart(config, integer(f"the weights of part {place}", weights, 1, MAX_SIZE, ConfigError)))
        if config.before is not None:
            raise ConfigError(
                f"part {place} makes its arrays from θ by before={safe_repr(config.before)}, which one config of "
                "several cannot: attach it as an adapter of its own, under another name"
            )
        for name in _SAME:
            first, own = getattr(found[0].config, name), getattr(config, name)
            if own != first:
                raise ConfigError(
                    f"all configs of one adapter must have the same {name}; part 0 has {first!r}, part {place} "
                    f"{own!r}: attach one of them as an adapter of its own, under another name"
                )
    return tuple(found)


# -- The layout of several parts ---------------------------------------------------------------------------------------


class CompositeLayout(Layout):
    """The layouts of several parts, one after another.

    Parameters
    ----------
    parts : sequence of Layout

    Examples
    --------
    >>> from .layout import make_layout
    >>> layout = CompositeLayout([make_layout("weight", [(2, 2)] * 2), make_layout(1, [(2, 3)])])
    >>> layout.num_groups, layout.of_weight(2)
    (3, [Piece(weight=2, weight_start=0, group=2, group_start=0, length=6)])
    """

    def __init__(self, parts: Sequence[Layout]) -> None:
        shapes = [shape for part in parts for shape in part.shapes]
        super().__init__(shapes, ())
        self.parts = tuple(parts)
        self.num_groups = sum(part.num_groups for part in parts)
        #: For each part, the numbers of its first weight and of its first group.
        self.firsts = [
            (sum(len(part.shapes) for part in parts[:place]), sum(part.num_groups for part in parts[:place]))
            for place in range(len(parts))
        ]
        self._of_weight = [place for place, part in enumerate(parts) for _ in part.shapes]

    def part_of(self, group: int) -> int:
        """Return the part that a group belongs to."""
        return max(place for place, (_, first) in enumerate(self.firsts) if first <= group)

    def moved(self, place: int, piece: Piece) -> Piece:
        """Return a piece of a part with the numbers of the whole."""
        weight, group = self.firsts[place]
        return piece._replace(weight=piece.weight + weight, group=piece.group + group)

    def group_size(self, group: int) -> int:
        """Return the number of elements of a group."""
        place = self.part_of(group)
        return self.parts[place].group_size(group - self.firsts[place][1])

    def same_size(self) -> list[tuple[int, int, int]]:
        """Return runs of consecutive groups of equal size."""
        return [
            (first + start, count, size)
            for part, (_, start) in zip(self.parts, self.firsts, strict=True)
            for first, count, size in part.same_size()
        ]

    def columns(self, group: int) -> int:
        """Return the greatest common divisor of the column counts in a group."""
        place = self.part_of(group)
        return self.parts[place].columns(group - self.firsts[place][1])

    def of_weight(self, weight: int) -> list[Piece]:
        """Return the pieces of one weight."""
        place = self._of_weight[weight]
        return [self.moved(place, piece) for piece in self.parts[place].of_weight(weight - self.firsts[place][0])]

    def of_group(self, group: int) -> list[Piece]:
        """Return the pieces of one group."""
        place = self.part_of(group)
        return [self.moved(place, piece) for piece in self.parts[place].of_group(group - self.firsts[place][1])]


# -- The plan of several parts -----------------------------------------------------------------------------------------


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

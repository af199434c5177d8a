"""Which arrays of a plan are trained, frozen, tied or scaled: their names, shapes and origins in every group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from tnadapt.backends import get_backend
from tnadapt.errors import ConfigError, ShapeError, TnadaptError, safe_repr, summarize

from .config import Config
from .maps import is_linear
from .network import Network
from .rng import PURPOSE
from .sources import (
    FrozenArray,
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
from .starting_points import PREFIX

__all__ = ["ArrayPlan", "checked_given", "checked_start", "names_of"]


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

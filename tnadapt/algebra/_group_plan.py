"""The integers of a plan: groups, lengths before and after F (ρ), parameter counts, shapes of arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from fractions import Fraction

from tnadapt.errors import ConfigError

from .config import Config
from .group import Group
from .init import Initializer
from .layout import make_layout, require_alike
from .maps.projection import Projection
from .named_fold import group_fold, is_named
from .network import Network
from .sources import FrozenArrays, Source, SourceMap

__all__ = ["GroupPlan", "some_names"]

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
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(f"expected a tnadapt.Config; got {type(config).__name__}")
        self.config = config
        self.layout = make_layout(config.groups, shapes, layers, roles)
        if config.weight_shape is not None:
            require_alike(self.layout, config.weight_shape, config.fold)  # type: ignore[arg-type]  # Config refuses others
        self.shapes = self.layout.shapes
        self.size = self.layout.size
        self.num_groups = self.layout.num_groups
        self._layers = None if layers is None else list(layers)
        self._roles = None if roles is None else list(roles)
        self._networks: dict[tuple[int, int, tuple[int, ...] | None], Network] = {}
        # Build every network once, to raise errors here and not at the first use.
        for group in self._different:
            self._network(group)
        _ = self._frozen_sources
        if self.num_groups <= LAID_OUT:
            # Lay the groups out now, so that torch.compile and jax.jit never trace this code.
            _ = self.param_shapes

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of trained elements; counted without allocating anything."""
        if self._networks_vary:
            return sum(self._num_trained(group) for group in range(self.num_groups))
        return sum(count * self._num_trained(group) for group, count, _ in self.layout.same_size())

    def _num_trained(self, group: int) -> int:
        network = self._network(group)
        frozen = sum(math.prod(network.shapes[name]) for name in self._frozen_sources)
        return network.num_parameters - frozen

    @functools.cached_property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every trained array, in order.

        Names are ``group{g}.split{k}.{array}``, with ``term{t}.`` before the split where there are several
        terms; ``array`` is dense, factor0 …, weights, core, or core0 … (tensor train).
        """
        return {full: group.network.shapes[name] for group in self.groups for name, full in group.names.items()}

    @functools.cached_property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that ``config.sources`` freezes, in order; named as in ``param_shapes``."""
        return {full: group.network.shapes[name] for group in self.groups for name, full in group.frozen_names.items()}

    @functools.cached_property
    def _frozen_sources(self) -> dict[str, Source]:
        """The sources of the arrays that are frozen in every group, by the network's names."""
        if not self.config.sources:
            return {}
        sources, network = self.config.sources, self._network(0)  # all networks have arrays of the same names
        assert isinstance(sources, SourceMap)  # Config converts any other mapping
        sources.check_names(network.shapes)
        named = {name: sources.of(name) for name in network.shapes}
        found = {name: source for name, source in named.items() if source is not None and not source.trained}
        for prefixes in network.prefixes if found else ():
            pairs = zip(prefixes, network.splits, strict=True)
            term = [prefix + name for prefix, split in pairs for name in split.shapes]
            if found.keys() >= set(term):
                raise ConfigError(
                    f"sources freezes all of {', '.join(term)}, and nothing is left to train there: give one of them "
                    "tnadapt.sources.Trained()"
                )
        return found

    @functools.cached_property
    def _largest_frozen(self) -> dict[str, tuple[int, ...]]:
        """The largest size of each frozen array along each axis, over all groups."""
        shapes = [self._network(group).shapes for group in (self._different if self._frozen_sources else ())]
        return {
            name: tuple(max(sizes) for sizes in zip(*(own[name] for own in shapes), strict=True))
            for name in self._frozen_sources
        }

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
        config, found = self.config, list[Group]()
        projections: dict[tuple[int, int], Projection] = {}
        # Arrays that do not depend on the group are computed and kept once for all groups with the same network.
        alike = all(source.independent_of_group for source in self._frozen_sources.values())
        arrays: dict[tuple[int, int], FrozenArrays] = {}
        for index in range(self.num_groups):
            network, size = self._network(index), self.layout.group_size(index)
            key = size, 0 if config.shared else index
            if key not in projections:
                projections[key] = Projection(config.projection, network.size, size, config.seed, key[1])
            names = {name: f"group{index}.{name}" for name in network.shapes if name not in self._frozen_sources}
            frozen_names = {name: f"group{index}.{name}" for name in self._frozen_sources}
            own = id(network), 0 if alike else index
            if own not in arrays:
                arrays[own] = FrozenArrays(
                    network.shapes, self._frozen_sources, config.seed, own[1], self._largest_frozen
                )
            frozen = arrays[own]
            start = Initializer(network, projections[key], config.seed, index, frozen)
            pieces = self.layout.of_group(index)
            found.append(Group(size, network, projections[key], start, names, pieces, frozen, frozen_names))
        return found

    @property
    def _stacked(self) -> bool:
        return self.config.fold == "stack" and self.config.order == 2

    @property
    def _networks_vary(self) -> bool:
        """Whether groups of equal size may have different networks: stacks and folds in names, of different weights."""
        if is_named(self.config.fold):
            return not self.layout.equal_shapes
        return self._stacked and not self.layout.equal_columns

    @property
    def _different(self) -> Iterable[int]:
        """Indices of groups that together have every network of the plan."""
        return range(self.num_groups) if self._networks_vary else [first for first, _, _ in self.layout.same_size()]

    def _network(self, group: int) -> Network:
        size = self.layout.group_size(group)
        columns = self.layout.columns(group) if self._stacked else 1
        config = self.config
        fold = group_fold(config.fold, self.layout, group) if is_named(config.fold) else None
        found = self._networks.get((size, columns, fold))
        if found is None:
            # The ratio is the decimal it prints as: 0.07 of 100 is 7, not 8.
            n_in = max(1, math.ceil(Fraction(str(config.ratio)) * size))
            own = config if fold is None else config.replace(fold=fold)
            found = self._networks[size, columns, fold] = Network(own, n_in, columns)
        return found

    def starts(self, trained: Collection[str] | None = None) -> list[Initializer]:
        """Return each group's initial arrays, if only the arrays of these full names are trained; None means all."""
        if trained is None:
            return [group.start for group in self.groups]
        unknown = [name for name in trained if name not in self.param_shapes]
        if unknown or not trained:
            raise ConfigError(
                f"trained must name some of the arrays in param_shapes; unknown: {some_names(unknown)}; there are "
                f"{some_names(list(self.param_shapes))}"
            )
        chosen = set(trained)
        return [
            group.start.for_trained({name for name, full in group.names.items() if full in chosen})
            for group in self.groups
        ]


def some_names(names: Sequence[str]) -> str:
    """Return the first few names, for a message."""
    first: Iterator[str] = iter(names[:4])
    return (", ".join(map(repr, first)) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")

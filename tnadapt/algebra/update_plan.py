"""From a config and the shapes of weights to parameters, and from parameters to the ΔW of every weight.

``Config`` + shapes -> :class:`UpdatePlan` (integers) -> ``init`` (arrays) -> ``deltas`` (arrays).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, overload

import numpy as np

from tnadapt.argument_checks import checks_arguments, flag, integer, is_sequence, wrong_argument
from tnadapt.backends import (
    Array,
    ArrayT,
    Backend,
    JaxArray,
    TorchArray,
    get_backend,
    load_backend,
    load_imported,
)
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr, summarize
from tnadapt.report import TextTable

from . import sources
from .applying import APPLYING, Applying, applying_of
from .base_arrays import base_weight, checked_given, from_base
from .composite import CompositeConfig
from .config import RATE_NAMES, Config, checked_word
from .group import Group, PlanPart, Shapes, lora_rank, pair_widths, rank_bound, rank_bounds, updates_of_runs
from .init import Initializer
from .layout import Layout, Piece, checked_shapes, group_matrices, make_layout, require_keys
from .network import Network
from .starting_points import PREFIX, Start, StartPlace
from .theta import Theta
from .units import adam_units, in_units

# Plans of up to this many groups are laid out on creation, larger ones when their arrays are first needed.
LAID_OUT = 4096


class UpdatePlan:
    """The weight updates of a model as one long vector, cut into groups, each made from a small tensor network.

    ``ΔW_group = F(scale * sum_t kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length.

    Parameters
    ----------
    config : Config
        What each group is made of.
    shapes : sequence of (rows, cols)
        Shapes of the weights to update, in torch's order ``(out_features, in_features)``.
    layers : sequence of hashable, optional
        One key per weight, for ``groups="layer"``.
    roles : sequence of hashable, optional
        One key per weight, for ``groups="role"``, such as ``["q", "v", "q", "v"]``.
    given : mapping of str to array, optional
        The frozen arrays in ``given_shapes``, whose source is :class:`tnadapt.sources.Given`; also those in
        ``base_shapes``, in place of :meth:`with_base`. Copied, in float32.
    start_from : mapping of str to array, optional
        For ``config.start="given"``: the arrays at which training starts, of some or all names in ``array_shapes``;
        the others start as usual. Copied, in float32.
    lay_out : bool
        Whether to lay up to 4,096 groups out now, so that torch.compile and jax.jit never trace that. False makes a
        plan faster of which only integers are read.

    Attributes
    ----------
    config : Config
    shapes : tuple of (int, int)
    size : int
        N, the number of elements of all weights.
    num_groups : int
        G, the number of groups.
    layout : Layout
        Maps slices of weights to slices of groups.

    Raises
    ------
    ConfigError
        If the config does not suit these weights.
    ShapeError
        If a shape is not a pair of positive integers, or a fold does not fit a group.

    Notes
    -----
    Equation (2) of the paper. The object is a plan in integers: it allocates no arrays, imports no framework, and takes
    microseconds for a model of any size. Random draws and initial arrays of a group are cached once they are used.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = UpdatePlan(tna.Config(rank=22, groups=1, fold="hypercube"), [(768, 768)] * 24)
    >>> plan.num_parameters, plan.param_shapes
    (165572, {'group0.split0.factor0': (3763, 22), 'group0.split0.factor1': (3763, 22)})
    >>> params = plan.init()
    >>> deltas = plan.deltas(params)
    >>> len(deltas), deltas[0].shape, bool(deltas[0].any())
    (24, (768, 768), False)
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
        lay_out: bool = True,
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(
                f"config must be a tnadapt.Config; got {type(config).__name__}"
                + "; config and shapes may be swapped" * isinstance(shapes, Config)
            )
        require_keys(layers, roles)
        lay_out = flag("lay_out", lay_out)
        self.config = config
        self._layers = None if layers is None else list(layers)
        self._roles = None if roles is None else list(roles)
        self._units: Mapping[str, float] = {}
        self._file_plan: Self | None = None
        # Arrays that are not drawn, except those of P; groups refer to this dictionary.
        self._given: dict[str, np.ndarray] = {}
        self._base_starts: dict[str, np.ndarray] = {}
        #: The groups of each config; several of a CompositeConfig.
        self._parts: list[PlanPart] = []
        first_weight = first_group = 0
        for each, own_shapes, own_layers, own_roles in _by_config(config, shapes, self._layers, self._roles):
            layout = make_layout(each.groups, own_shapes, own_layers, own_roles)
            self._parts.append(PlanPart(each, layout, self._given, first_weight, first_group))
            first_weight, first_group = first_weight + len(own_shapes), first_group + layout.num_groups
        layouts = [part.layout for part in self._parts]
        self.layout = layouts[0] if len(layouts) == 1 else Layout.joined(layouts)
        if given is not None:
            self._bring(checked_given(given, self.fixed_shapes, self.brought_shapes))
        if start_from is not None:
            self._bring_start(start_from)
        _ = self.theta  # raises a ConfigError if it has more elements than the arrays made from it
        if lay_out:
            load_imported()
            self._lay_out()

    def _lay_out(self) -> None:
        """Compute everything that a compiled program reads of a plan, so that its compiler never traces this code."""
        if self.num_groups <= LAID_OUT:
            _ = self.param_shapes, self.weight_param_names, self.groups

    def _view(self, **fields: Any) -> Self:
        """Return a plan with other fields, without the values that depend on them and are cached in this one."""
        view = type(self).__new__(type(self))
        cached = {name for name, value in vars(UpdatePlan).items() if isinstance(value, functools.cached_property)}
        view.__dict__.update({name: value for name, value in self.__dict__.items() if name not in cached})
        view.__dict__.update(fields)
        view._lay_out()
        return view

    def with_given(self, given: Mapping[str, Any]) -> Self:
        """Return a plan of the same config and weights that has these arrays, and not those of this one."""
        arrays = dict[str, np.ndarray]()
        parts = [
            PlanPart(part.config, part.layout, arrays, part.first_weight, part.first_group) for part in self._parts
        ]
        plan = self._view(_parts=parts, _given=arrays, _units={}, _file_plan=None)
        plan._bring(checked_given(given, plan.fixed_shapes, plan.brought_shapes))
        return plan

    def __repr__(self) -> str:
        counts = f"{len(self.shapes)} weights, {self.num_groups} groups, {self.size} elements"
        return f"UpdatePlan({self.config!r}, {counts})"

    def _repr_html_(self) -> str:
        share = 100.0 * self.num_parameters / self.size
        facts = [
            ("weights", f"{len(self.shapes):,}"), ("elements", f"{self.size:,}"), ("groups", f"{self.num_groups:,}"),
            ("parameters", f"{self.num_parameters:,} ({share:.3g} % of the elements)"),
            ("config", repr(self.config)),
        ]  # fmt: skip
        return TextTable(facts, caption=type(self).__name__).html()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._units:
            return UpdatePlan.with_units, (self.file_plan, dict(self._units))
        # Recompute it from its few integers, instead of pickling the cached draws.
        first = self._parts[0].first_weight, self._parts[0].first_group
        return _restored, (self.config, self.shapes, self._layers, self._roles, first, self.given, self._base_starts)

    def __deepcopy__(self, memo: dict[int, Any]) -> UpdatePlan:
        return self  # immutable

    # -- Weights, groups and parts -----------------------------------------------------------

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes ``(rows, cols)`` of the weights."""
        return self.layout.shapes

    @property
    def size(self) -> int:
        """N, the number of elements of all weights."""
        return self.layout.size

    @property
    def num_groups(self) -> int:
        """G, the number of groups."""
        return self.layout.num_groups

    @functools.cached_property
    def applying(self) -> Applying:
        """How an update changes its weight, as ``config.apply`` says."""
        return applying_of(self.config.apply, self.config.magnitude_axis)

    @property
    def point(self) -> Start:
        """What the arrays start from, as ``config.start`` says."""
        return self._parts[0].point

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The groups: the network, map and weight slices of each.

        Groups of equal length share their network, and their F if ``config.shared``.

        Examples
        --------
        >>> import tnadapt as tna
        >>> UpdatePlan(tna.presets.fastfood(ratio=0.1), [(10, 10)]).groups[0].projection
        Projection('linear', n_in=10, n_out=100, seed=0, group=0)
        """
        if self._file_plan is not None:
            if self.theta is not None:
                return self._file_plan.groups  # θ has a unit, and the arrays that it makes have none
            networks: dict[tuple[int, float], Network] = {}
            return [in_units(group, self._units, networks) for group in self._file_plan.groups]
        if len(self._parts) == 1:
            return self._parts[0].groups
        groups = itertools.chain.from_iterable(part.groups for part in self._parts)
        return [group._replace(pieces=self.layout.of_group(index)) for index, group in enumerate(groups)]

    @property
    def alike(self) -> list[tuple[Group, int]]:
        """A group of each kind, and the number of groups that have its network, map, and kinds of arrays.

        For what is counted in integers, without laying all groups out. Groups with tied arrays stand for themselves.
        """
        return [kind for part in self._parts for kind in part.alike]

    @functools.cached_property
    def config_plans(self) -> list[tuple[UpdatePlan, int]]:
        """The plan of each config, whose arrays have the names that they have here, and the number of its first weight.

        Examples
        --------
        >>> import tnadapt as tna
        >>> config = tna.CompositeConfig([(tna.presets.lora(1), 2), (tna.presets.lora(2), 1)])
        >>> [(list(plan.param_shapes.values()), first) for plan, first in UpdatePlan(config, [(3, 4)] * 3).config_plans]
        [([(3, 1), (4, 1), (3, 1), (4, 1)], 0), ([(3, 2), (4, 2)], 2)]
        """
        if len(self._parts) == 1:
            return [(self, 0)]
        return [(self._of_part(number), part.first_weight) for number, part in enumerate(self._parts)]

    def _of_part(self, number: int) -> UpdatePlan:
        assert isinstance(self.config, CompositeConfig)
        part = self._parts[number]
        groups = [
            group._replace(pieces=part.layout.of_group(index))
            for index, group in enumerate(self._groups_of(part, self.groups))
        ]
        weights = slice(part.first_weight, part.first_weight + len(part.layout.shapes))
        return self._view(
            config=self.config.parts[number].config, layout=part.layout, groups=groups, _parts=[part],
            _layers=self._layers and self._layers[weights], _roles=self._roles and self._roles[weights],
            _file_plan=self._file_plan and self._file_plan._of_part(number),
        )  # fmt: skip

    def _groups_of(self, part: PlanPart, groups: Sequence[Group]) -> Sequence[Group]:
        """Return the groups among those given that belong to a config."""
        first = part.first_group - self._parts[0].first_group
        return groups[first : first + part.layout.num_groups]

    @checks_arguments
    def part_of(self, i: int) -> tuple[UpdatePlan, int]:
        """Return the plan in ``config_plans`` that has weight ``i``, and the weight's number in it.

        Raises
        ------
        ShapeError
            If there is no weight ``i``.

        Examples
        --------
        >>> from tnadapt import presets
        >>> UpdatePlan(presets.lora(2), [(4, 3), (6, 3)]).part_of(1)[1]
        1
        """
        i = integer("i", i, 0, len(self.shapes) - 1, ShapeError)
        return next((plan, i - first) for plan, first in reversed(self.config_plans) if first <= i)

    # -- Names, shapes and counts ------------------------------------------------------------

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of trained elements; counted without allocating anything."""
        elements = sum(part.num_elements for part in self._parts)
        if self.theta is not None:
            elements = sum(map(math.prod, self.theta.shapes.values()))
        return elements + sum(map(math.prod, self.weight_param_shapes.values()))

    @functools.cached_property
    def theta(self) -> Theta | None:
        """The map before the network; None if there is none, and the arrays themselves are trained."""
        if self.config.before is None:
            return None
        if self._file_plan is not None and self._file_plan.theta is not None:
            return self._file_plan.theta.in_units(self._units)
        return Theta(self.config, self._parts[0].num_elements, lambda: self.array_shapes)

    @functools.cached_property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, in order: the arrays in ``array_shapes``, or θ; ``weight_param_shapes``.

        With ``config.before``, θ is named ``theta``, ``group{g}.theta`` or ``group{g}.split{k}.{array}.theta``,
        depending on ``config.scope``.
        """
        of_groups = self.array_shapes if self.theta is None else self.theta.shapes
        return {**of_groups, **self.weight_param_shapes} if self.weight_param_shapes else of_groups

    @functools.cached_property
    def weight_param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter that belongs to a weight, not to its update, in order.

        ``weight{i}.magnitude`` with ``apply="magnitude"``. They start at numbers of the base weights.
        """
        if APPLYING.find(self.config.apply).additive:
            return {}
        first = self._parts[0].first_weight
        shapes = [self.applying.param_shapes(first + index, shape) for index, shape in enumerate(self.shapes)]
        return {name: shape for of_weight in shapes for name, shape in of_weight.items()}

    @functools.cached_property
    def weight_param_names(self) -> list[tuple[str, ...]]:
        """The names in ``weight_param_shapes`` of each weight."""
        if not self.weight_param_shapes:
            return [()] * len(self.shapes)
        first = self._parts[0].first_weight
        return [tuple(self.applying.param_shapes(first + index, shape)) for index, shape in enumerate(self.shapes)]

    @functools.cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that is trained, or made from θ, in order.

        Names are ``group{g}.split{k}.{array}``, with ``term{t}.`` before the split where there are several
        terms; ``array`` is dense, factor0 …, weights, core, or core0 … (tensor train). The trained diagonals of a
        frozen array are ``.size`` and ``.rank`` after its name.
        """
        return {name: shape for part in self._parts for name, shape in part.array_shapes().items()}

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
        return {**self._shapes_of(lambda source: source.brought), **self.brought_shapes}

    @property
    def brought_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of the map before the network that the caller brings."""
        return {} if self.theta is None else self.theta.brought_shapes

    @functools.cached_property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that is computed from the base weights, in order: frozen ones, and the start.

        The start of an array is named ``start.`` and the array's name.
        """
        frozen = self._shapes_of(lambda source: source.needs_base)
        return {**frozen, **self.start_shapes} if self.point.needs_base else frozen

    def _shapes_of(self, chosen: Callable[[sources.Source], bool]) -> Shapes:
        return {name: shape for part in self._parts for name, shape in part.shapes_of(chosen).items()}

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

    # -- Ranks of the updates ----------------------------------------------------------------

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
        ...     print(tna.UpdatePlan(config, vit).largest_rank(0))
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

        None if for some weight two factors of its rank are no smaller than the update itself and are not the
        adapter's own, as those of LoRA are, or if ``config.apply`` does more than add the update.

        Examples
        --------
        >>> import tnadapt as tna
        >>> gqa = [(64, 32), (16, 32)] * 3
        >>> tna.UpdatePlan(tna.presets.fact_tk(2, groups="role"), gqa, roles="qvqvqv").lora_rank
        2
        >>> tna.UpdatePlan(tna.presets.superlora(2), gqa).lora_rank is None
        True
        """
        if not self.applying.additive:
            return None
        return lora_rank(self.shapes, self.largest_ranks, list(pair_widths(self.layout, self.groups)))

    @functools.cached_property
    def largest_ranks(self) -> list[int]:
        """:meth:`largest_rank` of every weight."""
        return list(rank_bounds(self.layout, self.groups))

    def full_rank_bound(self) -> int | None:
        """Return the rank of the weights' smaller sides if some update may have it and is no smaller as LoRA.

        None if not; no other rank has to be known then.
        """
        most = max(map(min, self.shapes))
        bounds, widths = rank_bounds(self.layout, self.groups), pair_widths(self.layout, self.groups)
        for (rows, cols), rank, width in zip(self.shapes, bounds, widths, strict=True):
            if rank * (rows + cols) < rows * cols or width is not None:
                return None
            if rank == most:
                return most
        return None

    # -- Arrays that are given, or computed from base weights --------------------------------

    @property
    def given(self) -> dict[str, np.ndarray]:
        """The arrays in ``fixed_shapes`` that the plan has, by name, in float32."""
        # Without those of other configs, whose plans share the dictionary.
        fixed = self.fixed_shapes
        arrays = {name: array for name, array in self._given.items() if name in fixed}
        return arrays if self.theta is None else {**arrays, **self.theta.brought}

    @property
    def needs_base(self) -> bool:
        """Whether the plan lacks arrays or initial values that are computed from the base weights."""
        return not (
            self.base_shapes.keys() <= self.given.keys() and self.weight_param_shapes.keys() <= self._base_starts.keys()
        )

    def _bring(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store checked arrays where the groups and the map before them look for them."""
        if self.theta is not None:
            self.theta.bring({name: arrays[name] for name in self.brought_shapes if name in arrays})
        self._given |= {name: array for name, array in arrays.items() if name not in self.brought_shapes}

    def _bring_start(self, arrays: Any) -> None:
        """Check the arrays at which training starts, and store them where the groups look for them."""
        if not self.point.brought:
            raise ConfigError(
                f"arrays to start from need Config(start='given'); the config has start={self.config.start!r}"
            )
        starts = checked_given(arrays, self.array_shapes, label="start_from")
        self._bring({PREFIX + name: array for name, array in starts.items()})

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
        UpdatePlan
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
        >>> plan = tna.UpdatePlan(tna.presets.lora(2, sources=sources), [(6, 4)])
        >>> plan.base_shapes, plan.with_base([np.diag([3.0, 2, 1, 1, 1, 1])[:, :4]]).given.keys()
        ({'group0.split0.factor0': (6, 2)}, dict_keys(['group0.split0.factor0']))
        """
        if not self.base_shapes and not self.weight_param_shapes:
            return self
        if not callable(weights) and len(weights) != len(self.shapes):
            raise ShapeError(f"with_base needs the {len(self.shapes)} base weights; got {len(weights)}")
        computed = itertools.count(1)

        def on_array() -> None:
            if progress is not None:
                progress(next(computed), len(self.base_shapes))

        def weight(index: int) -> np.ndarray:
            return _host_weight(weights(index) if callable(weights) else weights[index], index, self.shapes[index])

        given = self.given
        for part in self._parts:
            given |= from_base(
                part, self._groups_of(part, self.file_plan.groups), lambda index: weight(index).reshape(-1), on_array
            )
        plan = self.with_given(given)
        plan._base_starts = self._starts_of_weights(weight)
        return plan

    def _starts_of_weights(self, weight: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
        """Compute where the parameters in ``weight_param_shapes`` start."""
        starts, first = dict[str, np.ndarray](), self._parts[0].first_weight
        for index in range(len(self.shapes)) if self.weight_param_shapes else ():
            starts |= self.applying.starts(first + index, weight(index).astype(np.float64))
        for name, start in starts.items():
            if not np.isfinite(start).all():
                raise ConfigError(f"{name} would start at the norms of a base weight that holds NaN or infinity")
        return starts

    def fill(self, other: UpdatePlan) -> None:
        """Add what is computed from the base weights and this plan lacks, in place, from a plan that has it.

        For an adapter that uses the plan already. What the plan has stays as it is.

        Parameters
        ----------
        other : UpdatePlan
            A plan of the same config and shapes, such as :meth:`with_base` returns.
        """
        present = self.given
        self._bring({name: array for name, array in other.given.items() if name not in present})
        # In place, like the given arrays, which the plan in other units shares.
        self._base_starts.update(
            {name: start for name, start in other._base_starts.items() if name not in self._base_starts}
        )

    @checks_arguments
    def with_start(self, arrays: Mapping[str, Any]) -> Self:
        """Return this plan with other initial arrays, as ``start_from=arrays`` gives it.

        Parameters
        ----------
        arrays : mapping of str to array
            Of any library, for some or all names in ``array_shapes``. The others start as usual.

        Returns
        -------
        UpdatePlan
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
        >>> plan = tna.UpdatePlan(tna.presets.lora(1, start="given"), [(2, 3)])
        >>> plan = plan.with_start({"group0.split0.factor0": np.ones((2, 1))})
        >>> params = plan.init()
        >>> params["group0.split0.factor0"].tolist(), bool(plan.deltas(params)[0].any())
        ([[1.0], [1.0]], False)
        """
        given = {name: array for name, array in self.given.items() if name not in self.start_shapes}
        plan = self.with_given(given)
        plan._bring_start(arrays)
        return plan

    def start_place(self, group: int) -> StartPlace:
        """Return what a start needs to know of a group."""
        number = group + self._parts[0].first_group
        part = max((part for part in self._parts if part.first_group <= number), key=lambda part: part.first_group)
        return part.place(number - part.first_group)

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
                "trained must name some of the parameters in param_shapes; unknown: "
                f"{summarize(map(str, unknown))}; there are {summarize(self.param_shapes)}"
            )
        if self.theta is not None:
            return self.starts()
        chosen, starts = set(trained), list[Initializer]()
        for part in self._parts:
            starts += part.starts_if(self._groups_of(part, self.groups), chosen)
        return starts

    @overload
    def init(
        self,
        backend: Literal["numpy"] = ...,
        dtype: str = ...,
        device: Any = ...,
        trained: Collection[str] | None = ...,
    ) -> dict[str, np.ndarray]: ...

    @overload
    def init(
        self, backend: Literal["torch"], dtype: str = ..., device: Any = ..., trained: Collection[str] | None = ...
    ) -> dict[str, TorchArray]: ...

    @overload
    def init(
        self, backend: Literal["jax"], dtype: str = ..., device: Any = ..., trained: Collection[str] | None = ...
    ) -> dict[str, JaxArray]: ...

    @overload
    def init(
        self, backend: str, dtype: str = ..., device: Any = ..., trained: Collection[str] | None = ...
    ) -> dict[str, Any]: ...

    def init(
        self, backend: str = "numpy", dtype: str = "float32", device: Any = None, trained: Collection[str] | None = None
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
        >>> params = tna.UpdatePlan(tna.Config(rank=1), [(2, 3)]).init()
        >>> params["group0.split0.factor0"].tolist()
        [[0.0], [0.0]]
        >>> plan = tna.UpdatePlan(tna.Config(rank=1), [(2, 3)])
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
        hosts = self._weight_starts(dtype)
        if self.theta is not None:
            self.theta.require_brought()
            self._require_gradient()
            hosts |= {name: np.zeros(shape) for name, shape in self.theta.shapes.items()}
        else:
            for group, start in zip(self.groups, self.starts(trained), strict=True):
                # Tied arrays have been drawn already.
                hosts |= {full: start.host(name) for name, full in group.names.items() if full not in hosts}
        params = {}
        for name in self.param_shapes:
            host = hosts.pop(name)
            if dtype == "float16" and (most := np.max(np.abs(host))) > np.finfo(np.float16).max:
                norms = name in self.weight_param_shapes
                raise ConfigError(
                    f"{name} starts at {'norms' if norms else 'numbers'} of up to {most:.1e}, which float16 cannot "
                    f"hold; use float32{'' if norms else f', or a larger alpha than {self.config.alpha}'}"
                )
            params[name] = library.asarray(host, dtype, device)
        return params

    def drawn_for(
        self, members: Sequence[int], trained: Collection[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Draw the random initial arrays of members of a population: a member's number is added to the config's seed.

        F and frozen arrays are those of all members.

        Parameters
        ----------
        members : sequence of int
        trained : collection of str, optional
            As in :meth:`init`.

        Yields
        ------
        name : str
            That of an array in ``param_shapes``.
        arrays : ndarray of float32, shape (members, …)
            Those of the members: bit for bit as :meth:`init` of the plan with such a seed returns them.

        Raises
        ------
        ConfigError
            If the update of the initial arrays is subtracted: then it is a part of the plan.

        Examples
        --------
        >>> import tnadapt as tna
        >>> plan = tna.UpdatePlan(tna.presets.lora(2), [(64, 32)])
        >>> [(name, arrays.shape) for name, arrays in plan.drawn_for(range(1, 1000))]
        [('group0.split0.factor1', (999, 32, 2))]
        """
        if self.theta is not None:
            return
        for group, start in zip(self.groups, self.starts(trained), strict=True):
            if group.subtracts:
                raise ConfigError(
                    f"the update of the initial arrays is subtracted (start={self.config.start!r}, "
                    f"projection={self.config.projection!r}), so all members share them: use seeds='one'"
                )
            yield from ((group.names[name], arrays) for name, arrays in start.drawn_for(members))

    def _weight_starts(self, dtype: str) -> dict[str, np.ndarray]:
        """Return the initial values of the parameters in ``weight_param_shapes``."""
        missing = [name for name in self.weight_param_shapes if name not in self._base_starts]
        if missing:
            raise ConfigError(
                f"{missing[0]} starts at the norms of its base weight, which this plan has not seen: call "
                "plan.with_base(weights) first, or attach the config to a model"
            )
        # To float32 first, as the norm is rounded in the quotient.
        host_dtype = np.float64 if dtype == "float64" else np.float32
        return {name: self._base_starts[name].astype(host_dtype) for name in self.weight_param_shapes}

    # -- Units of the parameters, and plans of the same updates ------------------------------

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """The unit of each parameter, by its name in ``param_shapes``: a power of two, as ``config.rate`` says.

        Adam at the rate η in ``training_plan`` is Adam at the rate ``η * unit`` of each parameter in this plan. All are
        1 for ``rate="sgd"``; docs/learning_rate.rst has the rule for "adam".

        Examples
        --------
        >>> import tnadapt as tna
        >>> tna.UpdatePlan(tna.presets.lora(4), [(64, 64)] * 8).units["group0.split0.factor0"]
        2.0
        """
        if self._units:
            return dict.fromkeys(self.param_shapes, 1.0)
        return self._units_for([part.config.rate for part in self._parts])

    @checks_arguments
    def units_for(self, rate: str) -> dict[str, float]:
        """Return the units of another value of ``config.rate``.

        Parameters
        ----------
        rate : "adam" or "sgd"

        Returns
        -------
        dict of str to float
            Powers of two, by the names in ``param_shapes``.
        """
        checked_word("rate", rate, RATE_NAMES)
        return self._units_for([rate] * len(self._parts))

    def _units_for(self, rates: Sequence[str]) -> dict[str, float]:
        units = dict.fromkeys(self.param_shapes, 1.0)
        for part, rate in zip(self._parts, rates, strict=True):
            if rate == "adam":
                units |= adam_units(self._groups_of(part, self.file_plan.groups), self.theta, self.shapes)
        return units

    @property
    def file_plan(self) -> Self:
        """The plan whose parameters are the arrays in files: itself, unless it is a ``training_plan``."""
        return self if self._file_plan is None else self._file_plan

    @functools.cached_property
    def training_plan(self) -> Self:
        """The plan whose parameters an optimizer trains: ``array = unit * parameter``; itself if all units are 1.

        It computes the same updates at the same cost, as the units become part of the scale of its networks.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.UpdatePlan(tna.presets.lora(4), [(64, 64)] * 8)
        >>> training = plan.training_plan
        >>> params = training.init()
        >>> deltas = training.deltas(params)  # and after some steps of an optimizer
        >>> arrays = training.to_arrays(params)  # for tnadapt.save
        >>> bool(np.array_equal(plan.deltas(arrays)[0], deltas[0])), list(arrays) == list(plan.init())
        (True, True)
        """
        if self._units or all(unit == 1.0 for unit in self.units.values()):
            return self
        return self.with_units(self.units)

    @checks_arguments
    def with_units(self, units: Mapping[str, float]) -> Self:
        """Return the plan whose parameters are in these units; see :attr:`training_plan`.

        Parameters
        ----------
        units : mapping of str to float
            A power of two for each name in ``param_shapes``.

        Raises
        ------
        ConfigError
            If the units of the arrays of a term have another product than those of the other terms of its group.
        """
        if missing := self.param_shapes.keys() - units:
            raise ConfigError(f"units must have each name of param_shapes; missing: {summarize(missing)}")
        plan = self._view(_units=dict(units), _file_plan=self, array_shapes=self.array_shapes)
        _ = plan.groups  # raises the error of terms now
        return plan

    @functools.cached_property
    def arrays_plan(self) -> Self:
        """The plan of the updates alone, whose parameters are the arrays of this one, in their units.

        Itself, unless ``config.before`` makes them from θ, or ``config.apply`` adds parameters of the weights.
        """
        if self.theta is None and self.applying.additive:
            return self
        if self._units:
            updates = self.file_plan.arrays_plan
            if self.theta is not None:
                return updates  # θ has a unit, and the arrays that it makes have none
            return updates.with_units({name: self._units[name] for name in updates.param_shapes})
        config = self.config.replace(
            before=None, parameters=None, scope="plan", offset=True, apply="add", magnitude_axis="rows"
        )
        return self._view(config=config, _base_starts={}, groups=self.groups, array_shapes=self.array_shapes)

    @checks_arguments
    def to_arrays(self, params: Mapping[str, ArrayT]) -> dict[str, ArrayT]:
        """Return the arrays of the ``file_plan`` from the parameters of this plan, exactly.

        Parameters
        ----------
        params : mapping of str to array
            For all or some names in ``param_shapes``, of any library.

        Returns
        -------
        dict of str to array
            Of the same library and dtype; differentiable.

        Notes
        -----
        Units are powers of two: nothing is rounded, unless a number leaves the range of its dtype (float16).
        """
        return {name: _times(param, self._units.get(name, 1.0)) for name, param in params.items()}

    @checks_arguments
    def from_arrays(self, arrays: Mapping[str, ArrayT]) -> dict[str, ArrayT]:
        """Return the parameters of this plan from the arrays of its ``file_plan``: the inverse of :meth:`to_arrays`.

        Parameters
        ----------
        arrays : mapping of str to array
            For all or some names in ``param_shapes``, of any library.

        Returns
        -------
        dict of str to array
            Of the same library and dtype; differentiable.
        """
        return {name: _times(array, 1.0 / self._units.get(name, 1.0)) for name, array in arrays.items()}

    # -- Updates -----------------------------------------------------------------------------

    def deltas(self, params: Mapping[str, ArrayT], dtype: str | None = None) -> list[ArrayT]:
        """Compute the update of every weight.

        Parameters
        ----------
        params : mapping of str to array
            Names and shapes as in ``param_shapes``; one library, dtype and device.
        dtype : str, optional
            The dtype in which the parameters were trained, if they have been cast since. Frozen arrays, and the initial
            values that a nonlinear F subtracts, are rounded to it; by default to that of the parameters.

        Returns
        -------
        list of array, shape (rows, cols)
            In the library, dtype and device of the parameters; differentiable in torch and JAX.

        Raises
        ------
        ShapeError
            If an array is missing, unknown or of another shape.
        BackendError
            If libraries, dtypes or devices are mixed, or the dtype is not real floating.

        Notes
        -----
        Each group is computed once and split into pieces. Memory: the long vector of N elements; for a linear F about
        three times its padded length L, and twice that in the first call, which draws. A result may share memory with
        the parameters (a dense update is a view of them): do not write to it.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> plan = UpdatePlan(tna.Config(rank=1), [(2, 3)])
        >>> b, a = np.array([[1.0], [2.0]]), np.array([[1.0], [10.0], [100.0]])
        >>> plan.deltas({"group0.split0.factor0": b, "group0.split0.factor1": a})[0]
        array([[  1.,  10., 100.],
               [  2.,  20., 200.]])
        """
        backend = self._checked(params)
        arrays = self._arrays(backend, params, dtype)
        vectors = updates_of_runs(backend, [(group, 0, group.size) for group in self.groups], arrays, dtype)
        return group_matrices(backend, vectors, [group.pieces for group in self.groups], self.shapes)

    def delta(self, params: Mapping[str, ArrayT], i: int, dtype: str | None = None) -> ArrayT:
        """Compute the update of one weight without forming the others.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        i : int
            Index of the weight, ``0 <= i < len(shapes)``.
        dtype : str, optional
            As for :meth:`deltas`.

        Returns
        -------
        array, shape (rows, cols)
            Equal to ``deltas(params)[i]`` up to the order of summation.

        Raises
        ------
        ShapeError
            If there is no weight i, or the parameters do not match ``param_shapes``.

        Notes
        -----
        For CP, Tucker, tensor trains and Kronecker products, only the rows of the factors that the weight needs are
        used. For a linear F, only the slice of the last transform is formed: memory is the compressed vector, two to
        three times the slice, and a few chunks of 2**18 elements, while time is that of all of F's draws. A shuffle
        forms the whole group before F.

        Examples
        --------
        >>> import tnadapt as tna
        >>> plan = UpdatePlan(tna.Config(groups=1, fold="hypercube"), [(2, 3), (4, 5)])
        >>> plan.delta(plan.init(), 1).shape
        (4, 5)
        """
        backend = self._checked(params)
        i = integer("i", i, 0, len(self.shapes) - 1, ShapeError)
        arrays = self._arrays(backend, params, dtype)
        delta: ArrayT = backend.reshape(
            self._assembled(backend, arrays, self.layout.of_weight(i), dtype), self.shapes[i]
        )
        return delta

    def merged(
        self,
        params: Mapping[str, ArrayT],
        weights: Sequence[ArrayT],
        dtype: str | None = None,
        *,
        detach_norm: bool = False,
    ) -> list[ArrayT]:
        """Compute the changed weights W', as ``config.apply`` says.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        weights : sequence of array
            The base weight W of each update, ``(rows, cols)``, of the library and device of the parameters.
        dtype : str, optional
            As for :meth:`deltas`.
        detach_norm : bool
            For ``apply="magnitude"``: whether the gradient takes the norm for a constant, as PEFT's does.

        Returns
        -------
        list of array, shape (rows, cols)
            In the wider dtype of weight and parameters, at least float32; not rounded to the weight's. Differentiable
            in torch and JAX, with respect to the weights, too.

        Raises
        ------
        ShapeError
            If a weight is missing or has another shape, or as in :meth:`deltas`.
        BackendError
            If the weights are of another library, or as in :meth:`deltas`; with ``apply="magnitude"``, if the library
            has no float64 (JAX, unless it is switched on).

        Notes
        -----
        For the parameters of :meth:`init` W' is W to the bit. :mod:`tnadapt.algebra.applying` has the formulas, and the
        order of the sum in a norm, which makes that so.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> w = np.array([[3.0, 4.0], [0.0, 2.0]])
        >>> plan = UpdatePlan(tna.presets.dora(rank=1), [(2, 2)]).with_base([w])
        >>> params = plan.init(dtype="float64")
        >>> params["weight0.magnitude"], bool((plan.merged(params, [w])[0] == w).all())
        (array([5., 2.]), True)
        """
        detach_norm = flag("detach_norm", detach_norm)
        if not is_sequence(weights):
            raise wrong_argument("weights", "a sequence of base weights", weights, ShapeError)
        weights = list(weights)
        if len(weights) != len(self.shapes):
            raise ShapeError(f"weights must be the {len(self.shapes)} base weights; got {len(weights)}")
        deltas, merged = self.deltas(params, dtype), list[Array]()
        backend = get_backend(*deltas)
        for index, delta in enumerate(deltas):
            # Weights and parameters may be of different dtypes.
            if not backend.owns(weights[index]):
                raise BackendError(
                    f"base weight {index} is {type(weights[index]).__name__}, and the parameters are arrays of "
                    f"{backend.name}: convert it"
                )
            weight = base_weight(backend, weights[index], index, self.shapes[index])
            dtypes = backend.dtype_name(weight), backend.dtype_name(delta)
            wide = "float64" if "float64" in dtypes else "float32"
            weight_params = [params[name] for name in self.weight_param_names[index]]
            weight, delta = backend.astype(weight, wide), backend.astype(delta, wide)
            merged.append(self.applying.merged(backend, weight, delta, weight_params, dtype, detach_norm))
        return merged

    def vector(
        self, params: Mapping[str, ArrayT], start: int = 0, stop: int | None = None, dtype: str | None = None
    ) -> ArrayT:
        """Compute a slice of the long vector, the concatenation of all updates in C order.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        start, stop : int
            ``0 <= start < stop <= size``; the whole vector by default.
        dtype : str, optional
            As for :meth:`deltas`.

        Returns
        -------
        array, shape (stop - start,)

        Raises
        ------
        ShapeError
            If the slice is empty or out of range, or the parameters do not match ``param_shapes``.

        Notes
        -----
        As in :meth:`delta`, nothing outside the slice is formed where the format allows it.

        Examples
        --------
        >>> import tnadapt as tna
        >>> plan = UpdatePlan(tna.Config(groups=1, fold="hypercube"), [(2, 3), (4, 5)])
        >>> plan.vector(plan.init(), 4, 9).shape
        (5,)
        """
        backend = self._checked(params)
        start = integer("start", start, 0, self.size - 1, ShapeError)
        stop = self.size if stop is None else integer("stop", stop, 0, self.size, ShapeError)
        if start >= stop:
            raise ShapeError(f"no slice {start}:{stop} of a vector of {self.size} elements; start must be below stop")
        arrays = self._arrays(backend, params, dtype)
        vec: ArrayT = self._assembled(backend, arrays, self.layout.of_slice(start, stop), dtype)
        return vec

    def _assembled(
        self, backend: Backend, arrays: Mapping[str, Array], pieces: Sequence[Piece], dtype: str | None
    ) -> Array:
        runs = [(self.groups[run.group], run.group_start, run.group_start + run.length) for run in pieces]
        return backend.concat(updates_of_runs(backend, runs, arrays, dtype))

    # -- Arrays from parameters --------------------------------------------------------------

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
        >>> plan = tna.UpdatePlan(tna.presets.lora(1, before="one-hot", parameters=2), [(2, 3)])
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

    def array_start(self, backend: Backend, full: str, like: Array, dtype: str | None = None) -> Array:
        """Return the initial value of an array in ``array_shapes``, in the library, dtype and device of ``like``.

        ``dtype`` is the dtype to which it is rounded, if that is not like's.
        """
        index, _, name = full.removeprefix("group").partition(".")
        like_dtype = backend.dtype_name(like)
        return self.groups[int(index)].start.on(backend, (name, dtype or like_dtype), like, like_dtype)

    def _require_gradient(self) -> None:
        """Raise a ConfigError if, without an offset, two arrays of a product are zero at θ = 0: no gradient."""
        if self.config.offset:
            return
        for group in self.groups:
            for prefixes in group.network.prefixes:
                names = [name for name in group.names if name.startswith(tuple(prefixes))]
                if len(names) > 1:
                    raise ConfigError(
                        f"offset=False starts {' and '.join(names[:2])} at zero, whose product has no gradient there: "
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
                f"params must have exactly the names of param_shapes; missing: {summarize(missing)}; "
                f"unknown: {summarize(map(str, unknown))}"
            )
        backend = get_backend(*params.values())
        for name, shape in expected.items():
            backend.require_float(params[name], f"params[{name!r}]")
            if tuple(params[name].shape) != shape:
                raise ShapeError(f"params[{name!r}] has shape {tuple(params[name].shape)}; expected {shape}")
        return backend


#: The former name of :class:`UpdatePlan`.
SuperLoRA = UpdatePlan


def _restored(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None,
    roles: Sequence[Hashable] | None,
    first: tuple[int, int],
    given: Mapping[str, np.ndarray],
    base_starts: dict[str, np.ndarray],
) -> UpdatePlan:
    """Rebuild a pickled plan."""
    plan = UpdatePlan(config, shapes, layers, roles, lay_out=False)
    for part in plan._parts:
        part.first_weight, part.first_group = part.first_weight + first[0], part.first_group + first[1]
    plan._base_starts = base_starts
    return plan.with_given(given)


def _by_config(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None,
    roles: Sequence[Hashable] | None,
) -> Iterator[tuple[Config, Sequence[tuple[int, int]], Sequence[Hashable] | None, Sequence[Hashable] | None]]:
    """Yield each config with the shapes and keys of its weights."""
    if not isinstance(config, CompositeConfig):
        yield config, shapes, layers, roles
        return
    shapes = checked_shapes(shapes)
    for keys in (layers, roles):
        if keys is not None and len(keys) != len(shapes):
            raise ConfigError(f"layers and roles have one key per weight; got {len(keys)} for {len(shapes)} weights")
    first = 0
    for each, own_shapes in config.split(shapes):
        weights = slice(first, first + len(own_shapes))
        first = weights.stop
        yield each, own_shapes, None if layers is None else layers[weights], None if roles is None else roles[weights]


def _host_weight(weight: Any, index: int, shape: tuple[int, int]) -> np.ndarray:
    """Return a base weight in float64 or float32."""
    backend = get_backend(weight)
    weight = base_weight(backend, weight, index, shape)
    # bfloat16 has no NumPy dtype; every bfloat16 and float16 number is a float32 number.
    wide = weight if backend.dtype_name(weight) == "float64" else backend.astype(weight, "float32")
    return np.asarray(backend.to_numpy(wide))


def _times(array: Array, factor: float) -> Array:
    return array if factor == 1.0 else array * factor


@checks_arguments
def parameter_count(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> int:
    """Return the number of trained elements of a config on these weights: ``UpdatePlan(…).num_parameters``.

    Parameters
    ----------
    config, shapes, layers, roles
        As for :class:`UpdatePlan`.

    Returns
    -------
    int

    Examples
    --------
    >>> import tnadapt as tna
    >>> parameter_count(tna.presets.lora(rank=4), [(768, 768)] * 24)
    147456
    """
    return UpdatePlan(config, shapes, layers, roles, lay_out=False).num_parameters


# -- Equal maps of several plans ---------------------------------------------------------------------------------------


def share_maps(plan: UpdatePlan, others: Iterable[UpdatePlan], digests: bool = False) -> None:
    """Let a plan use the maps F of other plans where they are equal.

    Parameters
    ----------
    plan : UpdatePlan
    others : iterable of UpdatePlan
    digests : bool
        Whether to compute the digests of the others' maps now, unless they are known, so that the plan has them.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan, other = (UpdatePlan(tna.presets.fastfood(0.1), [(10, 10)]) for _ in range(2))
    >>> share_maps(plan, [other])
    >>> plan.groups[0].projection.map is other.groups[0].projection.map
    True
    """
    by_key = {group.projection.key: group.projection for other in others for group in other.arrays_plan.groups}
    for group in plan.arrays_plan.groups:
        if group.projection.key in by_key:
            group.projection.share(by_key[group.projection.key], digests)

"""Units of the trained arrays for Adam, with which one learning rate fits all configs; and plans in these units.

A step of Adam moves each entry of a parameter by about the learning rate, whatever its gradient is. An array that is
trained as ``a = unit * parameter`` moves by ``unit`` times the rate. All arrays of a product have the same unit. It
makes the first ``STEPS`` steps at ``RATE``, in all arrays together, move ΔW by

    STEPS * STEP_NORM * sqrt(WEIGHTS / n_weights) / sqrt(N)

per element (root mean square), where N is the number of elements of all n_weights adapted weights: the Frobenius norm
of a step is about ``STEP_NORM * sqrt(WEIGHTS / n_weights)``, whatever is trained and however large the weights are. The
steps of many weights add up in what the model computes: n of them, each of the norm s, change it by n times as much as
one does, while the norm of all of them together is only sqrt(n) times s.

A map of n to N numbers, F or P, makes the norm larger by ``(N / n) ** SPREAD``. A step in a random subspace of n of N
dimensions points less along the gradient: by sqrt(n / N), so that for equal progress the norm would be larger by the
inverse. But it is limited by the curvature, too.

For ΔW that is linear in the parameters (dense updates, a map F of them) the number of steps does not matter. A product
of several arrays grows faster than in proportion to the steps: at first only the array that starts from zero counts,
multiplied by the small random ones, and soon the moves of all of them, multiplied with each other.

The moves are taken to have independent signs, and entries of different arrays to be independent: an array that moves by
x adds x² to its mean square, and mean squares of products multiply. With ``before``, θ has a unit, by what its arrays
move, and the arrays have none. Magnitudes (``apply="magnitude"``) have the unit 1.

Units are powers of two, so that the conversions are exact. They do not depend on which arrays are trained. The three
constants are fits: docs/learning_rate.rst has the measurements.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, ArrayT
from tnadapt.errors import ConfigError, safe_repr, summarize

from .group import Group
from .init import Initializer
from .maps.projection import Projection
from .network import Network
from .plan import GroupPlan, RankPlan

__all__ = [
    "RATE",
    "RATES",
    "SPREAD",
    "STEPS",
    "STEP_NORM",
    "WEIGHTS",
    "UnitPlan",
    "step_norm",
    "term_product",
]


# -- How far ΔW of one group moves if the entries of its arrays do -----------------------------------------------------


def _mean_square(start: Initializer, name: str) -> float:
    """Return the mean square of an array or multiplier, by its name in the network, apart from being the zero.

    That of an array that is computed from the base does not depend on the base.
    """
    array, _, multiplier = name.rpartition(".")
    if name not in start.network.shapes:
        source = start.origins[array].multiplied
        assert source is not None
        return (source.starts[multiplier] or 1.0) ** 2
    if name in start.frozen.entries:
        return start.frozen.expected_square(name)
    return start.std_of(name) ** 2


def update_step(start: Initializer, variance: float, moved: Collection[str], distance: float) -> float:
    """Return the root mean square of the step of ΔW if entries of arrays move by ± ``distance`` from the start.

    Parameters
    ----------
    start : Initializer
        Of the group.
    variance : float
        That of its map F; it is given because it may take long to compute, and does not depend on the distance.
    moved : collection of str
        Names of the arrays and multipliers that move, in the network.
    distance : float

    Notes
    -----
    The signs of the moves, and the entries of different arrays, are taken for independent. The mean square of a product
    of arrays is then that of each, plus ``distance²`` where it moves, multiplied.
    """
    network, projection = start.network, start.projection
    change = total = 0.0
    for prefixes in network.prefixes:
        before = after = 1.0
        for prefix, split in zip(prefixes, network.splits, strict=True):
            before, after = before * split.num_terms, after * split.num_terms
            for name in split.shapes:
                before *= _square(start, prefix + name, (), 0.0)
                after *= _square(start, prefix + name, moved, distance)
        change, total = change + after - before, total + after
    gain = network.scale**2 * variance
    if projection.linear:
        return math.sqrt(gain * change)
    # The derivative of tanhshrink(t) is tanh(t)² ~ t², as for the standard deviation, and at most 1.
    return math.sqrt(gain * change * min(1.0, projection.map.fourth_moment() * (gain * total) ** 2))


def _square(start: Initializer, name: str, moved: Collection[str], distance: float) -> float:
    """Return the mean square of an array times its multipliers, if some of them have moved from the start."""

    def of(part: str, products: int = 1) -> float:
        begun = 0.0 if part in start.zeros else _mean_square(start, part)
        return begun + products * distance**2 if part in moved else begun

    square, origin = of(name), start.origins.get(name)
    if origin is not None and origin.multiplied is not None:
        source, shape = origin.multiplied, start.network.shapes[name]
        square *= math.prod(of(f"{name}.{part}", source.touched(part, 1, shape)[1]) for part in source.multipliers)
    return square


# -- Units for Adam ----------------------------------------------------------------------------------------------------


#: The learning rate for which the units are made. With it, most units are between 1/16 and 16.
RATE = 1e-2
#: Frobenius norm of a step of all weights, if they are ``WEIGHTS``.
STEP_NORM = 1.0
#: The number of weights of the model that the norm was fitted on.
WEIGHTS = 8
#: Number of steps after which ΔW has moved by so many times the norm.
STEPS = 5
#: The power of N / n by which a map of n to N numbers makes the norm larger.
SPREAD = 1.0 / 3.0


def adam_units(plan: GroupPlan, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return the unit of each parameter of a plan, by its name in ``param_shapes``.

    Parameters
    ----------
    plan : GroupPlan
        One that is not composite.
    shapes : sequence of (int, int)
        Of all weights of the whole plan that it is a part of.

    Returns
    -------
    dict of str to float
        Powers of two.
    """
    target = STEPS * step_norm(len(shapes)) / math.sqrt(sum(rows * cols for rows, cols in shapes))
    steps = _steps_of_arrays(plan) if plan.theta is None else _steps_of_theta(plan)
    # What moves the same groups, as all arrays of a group do, has the same unit.
    distances = {key: step.distance(target) for key, step in {id(step): step for step in steps.values()}.items()}
    found = {name: _power(distances[id(step)] / (STEPS * RATE * step.gain)) for name, step in steps.items()}
    return {name: found.get(name, 1.0) for name in plan.param_shapes}


def step_norm(weights: int) -> float:
    """Return the Frobenius norm of a step of all weights together, but for the factors of maps.

    Parameters
    ----------
    weights : int
        Their number.
    """
    return STEP_NORM * math.sqrt(WEIGHTS / weights)


def spread(projection: Projection) -> float:
    """Return the factor of the norm of a step in the image of a map."""
    return float(max(1.0, projection.map.n_out / projection.map.n_in) ** SPREAD)


def _power(number: float) -> float:
    """Return the nearest power of two."""
    return float(2.0 ** round(math.log2(number)))


class _UpdateStep:
    """The root mean square of the step of ΔW, over the elements that something moves, as a function of the distance.

    It is relative to the factors of the norm of the maps.

    Parameters
    ----------
    gain : float
        How far arrays move if the parameter moves by 1.
    factor : float
        Of the norm, by a map before the network.
    """

    def __init__(self, gain: float = 1.0, factor: float = 1.0) -> None:
        self.gain, self.factor = gain, factor
        self._groups: dict[tuple[object, ...], tuple[Initializer, float, Collection[str], int]] = {}

    def add(self, group: Group, moved: Collection[str]) -> None:
        """Record that arrays of a group move, by their names in its network."""
        start = group.start
        # Groups with the same networks, maps and frozen arrays take the same steps.
        key = id(group.network), id(group.projection), id(start.frozen), start.zeros, frozenset(moved)
        if key in self._groups:
            _, variance, _, elements = self._groups[key]
        else:
            variance, elements = start.projection.map.variance(), 0
        self._groups[key] = start, variance, moved, elements + group.size

    @property
    def kinds(self) -> Collection[tuple[object, ...]]:
        """What is different between its groups, apart from the number of elements."""
        return self._groups.keys()

    def __call__(self, distance: float) -> float:
        square = sum(
            elements * (update_step(start, variance, moved, distance) / spread(start.projection)) ** 2
            for start, variance, moved, elements in self._groups.values()
        )
        return math.sqrt(square / sum(elements for *_, elements in self._groups.values())) / self.factor

    def distance(self, target: float) -> float:
        """Return the distance that makes such a step, to 1 %."""
        low, high = -100.0, 100.0
        while high - low > 0.015:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self(2.0**middle) < target else (low, middle)
        return float(2.0**high)


def _steps_of_arrays(plan: GroupPlan) -> dict[str, _UpdateStep]:
    """Return the step of each array; the same object for those that move the same groups."""
    groups: dict[str, list[int]] = {}
    for index, group in enumerate(plan.groups):
        for full in group.names.values():
            own = groups.setdefault(full, [])
            if index not in own[-1:]:
                own.append(index)
    made: dict[tuple[int, ...], _UpdateStep] = {}
    alike: dict[tuple[object, ...], _UpdateStep] = {}
    found = {}
    for full, indices in groups.items():
        key = tuple(indices)
        if key not in made:
            made[key] = _step_of([(plan.groups[index], plan.groups[index].names) for index in indices], alike)
        found[full] = made[key]
    return found


def _step_of(
    moves: Collection[tuple[Group, Collection[str]]], alike: dict[tuple[object, ...], _UpdateStep]
) -> _UpdateStep:
    """Return the step of arrays of some groups; for a single group that of a group like it, if there is one."""
    step = _UpdateStep()
    for group, moved in moves:
        step.add(group, moved)
    return alike.setdefault(tuple(step.kinds), step) if len(moves) == 1 else step


def _steps_of_theta(plan: GroupPlan) -> dict[str, _UpdateStep]:
    assert plan.theta is not None
    found = {}
    for part in plan.theta.parts:
        step = found[part.name] = _UpdateStep(math.sqrt(part.projection.map.variance()), spread(part.projection))
        for group in plan.groups:
            # Other θ move the other arrays of the group at the same time.
            if not part.arrays.keys().isdisjoint(group.names.values()):
                step.add(group, group.names)
    return found


def term_product(group: Group, units: Mapping[str, float]) -> float:
    """Return the product of the units of the arrays of each term, which is a factor of the scale.

    Raises
    ------
    ConfigError
        If it differs between terms.
    """
    products = {
        math.prod(units[full] for name, full in group.names.items() if name.startswith(tuple(prefixes)))
        for prefixes in group.network.prefixes
    }
    if len(products) > 1:
        raise ConfigError(
            "rate='adam' needs terms with the same sources, and those of this config differ, so that each would have a "
            "scale of its own: give every term the same sources, or use rate='sgd'"
        )
    return products.pop()


# -- Units by the name of the optimizer --------------------------------------------------------------------------------


# A parametrization is a function of the plan and of the shapes of all adapted weights, which returns the unit of each
# parameter by its name.


def sgd_units(plan: GroupPlan, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return 1 for each parameter: :mod:`tnadapt.algebra.init` scales the arrays for equal steps of SGD."""
    return dict.fromkeys(plan.param_shapes, 1.0)


#: By the names in :data:`tnadapt.algebra.config.RATE_NAMES`.
RATES: dict[str, Callable[[GroupPlan, Sequence[tuple[int, int]]], dict[str, float]]] = {
    "sgd": sgd_units,
    "adam": adam_units,
}


# -- Plans whose parameters are in units -------------------------------------------------------------------------------


class UnitPlan(RankPlan):
    """A plan with units, in which its parameters are trained.

    Files, :meth:`init` and :meth:`deltas` have the arrays themselves. ``training_plan`` is the same plan in units:
    ``array = unit * parameter``.
    """

    _in_units = False

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """The unit of each parameter, by its name in ``param_shapes``: a power of two, as ``config.rate`` says.

        Adam at the rate η in ``training_plan`` is Adam at the rate ``η * unit`` of each parameter in this plan. All are
        1 for ``rate="sgd"``; docs/learning_rate.rst has the rule for "adam".

        Examples
        --------
        >>> import tnadapt as tna
        >>> tna.SuperLoRA(tna.presets.lora(4), [(64, 64)] * 8).units["group0.split0.factor0"]
        2.0
        """
        return self.units_for(self.config.rate)

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
        if rate not in RATES:
            raise ConfigError(f"rate must be one of {', '.join(map(repr, RATES))}; got {safe_repr(rate)}")
        return RATES[rate](self, self.shapes)

    @functools.cached_property
    def file_plan(self) -> Self:
        """The plan whose parameters are the arrays in files: itself, unless it is a ``training_plan``."""
        return self

    @functools.cached_property
    def training_plan(self) -> Self:
        """The plan whose parameters an optimizer trains: ``array = unit * parameter``; itself if all units are 1.

        It computes the same updates at the same cost, as the units become part of the scale of its networks.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.SuperLoRA(tna.presets.lora(4), [(64, 64)] * 8)
        >>> training = plan.training_plan
        >>> params = training.init()
        >>> deltas = training.deltas(params)  # and after some steps of an optimizer
        >>> arrays = training.to_arrays(params)  # for tnadapt.save
        >>> bool(np.array_equal(plan.deltas(arrays)[0], deltas[0])), list(arrays) == list(plan.init())
        (True, True)
        """
        if self._in_units or all(unit == 1.0 for unit in self.units.values()):
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
        found = object.__new__(type(self))
        own = {"units", "training_plan", "file_plan", "arrays_plan", "alike", "groups", "theta"}
        found.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        found._in_units, found._units, found.file_plan = True, dict(units), self
        found.units = dict.fromkeys(self.param_shapes, 1.0)
        found.theta = None if self.theta is None else self.theta.in_units(units)
        found.groups = self._groups_in(units)
        return found

    @functools.cached_property
    def arrays_plan(self) -> Self:
        """The plan of the updates alone, whose parameters are the arrays of this one, in their units.

        Itself, unless ``config.before`` makes them from θ, or ``config.apply`` adds parameters of the weights.
        """
        if not self._in_units:
            return super().arrays_plan
        alone = self.file_plan.arrays_plan
        if alone is self.file_plan:
            return self
        if self.theta is not None:
            return alone  # θ has a unit, and the arrays that it makes have none
        return alone.with_units({name: self._units[name] for name in alone.param_shapes})

    def _groups_in(self, units: Mapping[str, float]) -> list[Group]:
        if self.theta is not None:
            return self.groups
        networks: dict[tuple[int, float], Network] = {}
        return [_in_units(group, units, networks) for group in self.groups]

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

    _units: Mapping[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        if self._in_units:
            return _with_units, (self.file_plan, dict(self._units))
        return self._reduced()

    def _reduced(self) -> tuple[Any, ...]:
        raise NotImplementedError


def _with_units(plan: UnitPlan, units: Mapping[str, float]) -> UnitPlan:
    return plan.with_units(units)


def _times(array: Array, factor: float) -> Array:
    return array if factor == 1.0 else array * factor


def _in_units(group: Group, units: Mapping[str, float], networks: dict[tuple[int, float], Network]) -> Group:
    product = term_product(group, units)
    key = id(group.network), product
    network = networks.get(key)
    if network is None:
        network = networks[key] = copy.copy(group.network)
        network.scale = group.network.scale * product
    own = {name: units[full] for name, full in group.names.items()}
    return group._replace(network=network, start=group.start.in_units(own))

"""Units of the trained arrays for Adam, with which one learning rate fits all configs; and plans in these units.

A step of Adam moves each entry of a parameter by about the learning rate, whatever its gradient is. An array that is
trained as ``a = unit * parameter`` moves by ``unit`` times the rate. All arrays of a product have the same unit. It
makes the first ``STEPS`` steps at ``RATE``, in all arrays together, move ΔW by

    STEPS * STEP_NORM * sqrt(WEIGHTS / n_weights) / sqrt(N)

per element (root mean square), where N is the number of elements of all n_weights adapted weights: the Frobenius norm
of a step is about ``STEP_NORM * sqrt(WEIGHTS / n_weights)``, whatever is trained and however large the weights are. The
steps of many weights add up in the output of the model: n of them, each of the norm s, change it by n times as much as
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

Units are powers of two, so that the conversions are exact. They depend on config and shapes alone: neither on which
arrays are trained nor on the base. How far a base may move depends on the size of its weights, and that is in the rate,
which is the same for all configs: :func:`learning_rate`. The four constants are fits: docs/learning_rate.rst has the
measurements.
"""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import get_backend
from tnadapt.errors import BackendError, ConfigError

from .group import Group
from .init import Initializer
from .maps.projection import Projection
from .network import Network
from .theta import Theta

# -- How far ΔW of one group moves if the entries of its arrays do -----------------------------------------------------


def _mean_square(start: Initializer, name: str) -> float:
    """Return the mean square of an array or multiplier, by its name in the network, as if it did not start at zero."""
    array, _, multiplier = name.rpartition(".")
    if name not in start.network.shapes:
        source = start.origins[array].multiplied
        assert source is not None
        return (source.starts[multiplier] or 1.0) ** 2
    if name in start.frozen.entries:
        # For an array that is computed from the base, this does not depend on the base.
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
    """Return the mean square of an array times its multipliers, once some of them have moved from the start."""

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
#: The norm of a step as a multiple of the root mean square of the base's weights, where the rate may choose it.
RELATIVE_NORM = 14.0
#: Frobenius norm of a step of all weights, for a model of ``WEIGHTS`` weights.
STEP_NORM = 1.0
#: The number of weights of the model that the norm was fitted on.
WEIGHTS = 8
#: Number of steps after which ΔW has moved by as many times the norm.
STEPS = 5
#: The power of N / n by which a map of n to N numbers makes the norm larger.
SPREAD = 1.0 / 3.0


def adam_units(groups: Sequence[Group], theta: Theta | None, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return the units of the arrays of groups, or of the θ that makes them, by name.

    Parameters
    ----------
    groups : sequence of Group
        Of one config.
    theta : Theta or None
    shapes : sequence of (int, int)
        Of all weights of the plan, of which the groups may cover some.

    Returns
    -------
    dict of str to float
        Powers of two.
    """
    target = STEPS * step_norm(len(shapes)) / math.sqrt(sum(rows * cols for rows, cols in shapes))
    steps = _steps_of_arrays(groups) if theta is None else _steps_of_theta(groups, theta)
    # Parameters that move the same groups, as all arrays of a group do, have the same unit: the nearest power of two.
    units = {
        step: 2.0 ** round(math.log2(step.distance(target) / (STEPS * RATE * step.gain)))
        for step in set(steps.values())
    }
    return {name: units[step] for name, step in steps.items()}


def step_norm(weights: int) -> float:
    """Return the Frobenius norm of a step of all weights together, but for the factors of maps.

    Parameters
    ----------
    weights : int
        Their number.
    """
    return STEP_NORM * math.sqrt(WEIGHTS / weights)


@checks_arguments
def learning_rate(weights: Iterable[Any]) -> float:
    """Return the learning rate for Adam that suits updates of these weights, whatever the config is.

    Parameters
    ----------
    weights : iterable of array
        An array for each weight that is adapted, of any library; give the matrices of a stacked one singly. A generator
        keeps only one in memory.

    Returns
    -------
    float
        1e-2 times a power of two.

    Raises
    ------
    ConfigError
        If there are no weights, all are zero, or one holds NaN or infinity. If one has no values, such as on the meta
        device. If ``weights`` is itself an array.
    BackendError
        If one is not an array of floating-point numbers.

    Notes
    -----
    The units of ``rate="adam"`` make all updates move by a norm of :math:`s = \\sqrt{8 / n_w}` a step at 1e-2, for
    :math:`n_w` weights. How far a base can move without harm is roughly proportional to the size of its weights: with
    this rate, the norm of a step is about fourteen times their root mean square. The rate is 1e-2 for MiniLM, a half of
    it for a ViT-S, and sixteen times as much for all linear layers of SmolLM2-135M. docs/learning_rate.rst has what it
    was fitted to.

    A new head has no base; 1e-2 or 1e-3 suits most. Cost: reads all weights once.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> rng = np.random.default_rng(0)
    >>> weights = [rng.normal(scale=0.04, size=(64, 64)) for _ in range(24)]
    >>> tna.learning_rate(weights), tna.learning_rate([4 * weight for weight in weights])
    (0.01, 0.04)
    """
    if hasattr(weights, "shape"):
        raise ConfigError("weights must be a list of arrays; got one array: give [array]")
    square, elements, count = 0.0, 0, 0
    for index, weight in enumerate(weights):
        what = f"weights[{index}]"
        try:
            backend = get_backend(weight)
        except BackendError as error:
            raise BackendError(f"{what}: {error}") from None
        backend.require_float(weight, what)
        # Sums of bfloat16 numbers would be wrong by the first digit.
        wide = weight if backend.dtype_name(weight) == "float64" else backend.astype(weight, "float32")
        try:
            vector = backend.flatten(backend.detached(wide))
            square += float(backend.sum(vector * vector, 0))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{what} has no values: it is on the meta device, traced or sparse; call this outside of jit, once "
                "dense weights are loaded"
            ) from error
        elements, count = elements + math.prod(weight.shape), count + 1
    if not 0.0 < square < math.inf:
        why = f"these {count} {'hold NaN or infinity' if square else 'are zero'}" if count else "there are none"
        raise ConfigError(f"the learning rate depends on the size of the base weights, and {why}: choose one yourself")
    factor = RELATIVE_NORM * math.sqrt(square / elements) / step_norm(count)
    return RATE * 2.0 ** round(math.log2(factor))


def spread(projection: Projection) -> float:
    """Return the factor of the norm of a step in the image of a map."""
    return float(max(1.0, projection.map.n_out / projection.map.n_in) ** SPREAD)


class _UpdateStep:
    """The root mean square step of ΔW, over the elements that a parameter moves, as a function of the distance.

    It is relative to the factor by which maps enlarge the norm.

    Parameters
    ----------
    gain : float
        How far arrays move if the parameter moves by 1.
    factor : float
        Of the norm, by a map before the network.
    """

    def __init__(self, gain: float = 1.0, factor: float = 1.0) -> None:
        self.gain, self.factor = gain, factor
        #: Keyed by what differs between groups: the start of one of them, the variance of its map, and what moves.
        self.kinds: dict[tuple[object, ...], tuple[Initializer, float, Collection[str]]] = {}
        self._elements = collections.Counter[tuple[object, ...]]()

    def add(self, group: Group, moved: Collection[str]) -> None:
        """Record that arrays of a group move, by their names in its network."""
        start = group.start
        # Groups with the same networks, maps and frozen arrays take the same steps.
        key = id(group.network), id(group.projection), id(start.frozen), start.zeros, frozenset(moved)
        if key not in self.kinds:
            self.kinds[key] = start, start.projection.map.variance(), moved
        self._elements[key] += group.size

    def __call__(self, distance: float) -> float:
        square = sum(
            self._elements[key] * (update_step(start, variance, moved, distance) / spread(start.projection)) ** 2
            for key, (start, variance, moved) in self.kinds.items()
        )
        return math.sqrt(square / self._elements.total()) / self.factor

    def distance(self, target: float) -> float:
        """Return the distance that makes such a step, to 1 %."""
        low, high = -100.0, 100.0
        while high - low > 0.015:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self(2.0**middle) < target else (low, middle)
        return float(2.0**high)


def _steps_of_arrays(groups: Sequence[Group]) -> dict[str, _UpdateStep]:
    """Return the step of each array, the same object for arrays that move the same groups."""
    indices_of: dict[str, dict[int, None]] = {}
    for index, group in enumerate(groups):
        for full in group.names.values():
            indices_of.setdefault(full, {})[index] = None
    step_of: dict[tuple[int, ...], _UpdateStep] = {}
    alike: dict[tuple[object, ...], _UpdateStep] = {}
    for indices in dict.fromkeys(map(tuple, indices_of.values())):
        step = _UpdateStep()
        for index in indices:
            step.add(groups[index], groups[index].names)
        # Reuse the step of a group like this one, if there is one.
        step_of[indices] = alike.setdefault(tuple(step.kinds), step) if len(indices) == 1 else step
    return {full: step_of[tuple(indices)] for full, indices in indices_of.items()}


def _steps_of_theta(groups: Sequence[Group], theta: Theta) -> dict[str, _UpdateStep]:
    steps = {}
    for part in theta.parts:
        step = steps[part.name] = _UpdateStep(math.sqrt(part.projection.map.variance()), spread(part.projection))
        for group in groups:
            # Other θ move the group's other arrays at the same time.
            if not part.arrays.keys().isdisjoint(group.names.values()):
                step.add(group, group.names)
    return steps


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


# -- Groups whose arrays are in units ----------------------------------------------------------------------------------


def in_units(group: Group, units: Mapping[str, float], networks: dict[tuple[int, float], Network]) -> Group:
    """Return a group whose arrays are ``unit * parameter``; the units of a term are a factor of its network's scale."""
    product = term_product(group, units)
    key = id(group.network), product
    if key not in networks:
        networks[key] = copy.copy(group.network)
        networks[key].scale = group.network.scale * product
    start = group.start.in_units({name: units[full] for name, full in group.names.items()})
    return group._replace(network=networks[key], start=start)

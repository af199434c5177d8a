"""Laws as a library call (``tnadapt.verify``): does a config compute what it defines, on this machine and library?

Each law reports the largest error found and the error allowed; a report holds if no law exceeds its limit. The sections
check the laws of changed weights, of a projection, of a config, and of the library one by one, and ``verify`` runs them
all, with those of decompositions and conversion (``round_trips``).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import platform
import shlex
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

import tnadapt
from tnadapt.algebra import presets, rng
from tnadapt.algebra.config import Config
from tnadapt.algebra.maps.fastfood import fwht
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.presets import PRESETS, Preset
from tnadapt.algebra.products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from tnadapt.algebra.sources import Tied, inner_source
from tnadapt.algebra.starting_points import STARTS
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.backends import Array, Backend, available_backends, load_backend
from tnadapt.errors import BackendError, ConfigError, safe_repr
from tnadapt.report import TextTable

from . import _reference as reference
from .round_trips import Case, conversion_cases, decomposition_cases

# -- The result of checking one law, its error, and the collector of results -------------------------------------------


# Relative to the largest element compared; a float64 has sixteen digits.
TIGHT = 1e-12


@dataclasses.dataclass(frozen=True)
class Law:
    """The result of one law on one library.

    Attributes
    ----------
    name : str
        The statement of the law.
    subject : str
        What was checked: a method, a config, or the library.
    backend : str
        The array library.
    cases : int
        Number of comparisons.
    error : float
        The largest error found; NaN if a value that must be a number is NaN.
    allowed : float
        The largest error allowed.
    sizes : str
        What was compared, of the case with the largest error.
    """

    name: str
    subject: str
    backend: str
    cases: int
    error: float
    allowed: float
    sizes: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is at most the allowed one (NaN is not) and there was at least one case."""
        return self.cases > 0 and self.error <= self.allowed


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected element; infinite if the shapes differ."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    scale = float(np.max(np.abs(expected)))
    return float(np.max(np.abs(actual - expected))) / (scale or 1.0)


class LawCollector:
    """Gathers the results of laws for one subject and library, of cases whose sizes are the same or are given."""

    def __init__(self, subject: str, backend: Backend, sizes: str = "") -> None:
        self.subject, self.backend, self.sizes, self.found = subject, backend, sizes, list[Law]()

    def add(self, name: str, errors: Sequence[float], allowed: float = TIGHT, sizes: Sequence[str] = ()) -> None:
        # A NaN is worse than any number.
        worst = max(range(len(errors)), key=lambda case: (math.isnan(errors[case]), errors[case]), default=None)
        error, where = (math.nan, "") if worst is None else (errors[worst], sizes[worst] if sizes else self.sizes)
        self.found.append(Law(name, self.subject, self.backend.name, len(errors), error, allowed, where))


# -- W' for updates that are not just added ----------------------------------------------------------------------------

# The formulas are written out here once more, row by row.


def formula(config: Config, weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """Return W' of one weight in float64.

    Examples
    --------
    >>> formula(Config(apply="magnitude"), np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]]), np.array([10.0]))
    array([[6., 8.]])
    """
    if config.apply == "add":
        return np.asarray(weight + delta)
    if config.apply == "hadamard":
        return np.asarray(weight * (1.0 + delta))
    if config.apply != "magnitude":
        raise ConfigError(f"there is no reference for apply={safe_repr(config.apply)}")
    assert magnitude is not None
    updated = np.asarray(weight + delta)
    turned = updated if config.magnitude_axis == "rows" else updated.T
    for row, length in zip(turned, magnitude.tolist(), strict=True):  # views: changed in place
        row *= length / math.hypot(*row.tolist())
    return updated


def _vector(matrices: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([matrix.reshape(-1) for matrix in matrices])


# -- Laws of one projection F: its dense matrix, adjoint and slices ----------------------------------------------------


def of_projection(label: str, f: Projection, backend: Backend, rng: np.random.Generator) -> list[Law]:
    """Check the laws of one projection on one library."""
    collector = LawCollector(label, backend, repr(f))
    matrix = reference.matrix_of(f.map)
    host = rng.normal(size=f.n_in)
    x = backend.asarray(host, "float64")
    expected: np.ndarray = matrix @ host
    slope = np.ones_like(expected)
    if not f.linear:
        expected, slope = reference.tanhshrink(expected), np.tanh(expected) ** 2
    collector.add("F = its dense matrix", [relative_error(backend.to_numpy(f(x)), expected)])
    y = rng.normal(size=f.n_out)
    adjoint = backend.to_numpy(f.adjoint(backend.asarray(y, "float64"), at=x))
    collector.add("F's adjoint = its matrix transposed", [relative_error(adjoint, matrix.T @ (slope * y))])
    other = rng.normal(size=f.n_in)
    forward, back = float((slope * (matrix @ other)) @ y), float(other @ adjoint)
    size = float(np.linalg.norm(slope * (matrix @ other)) * np.linalg.norm(y)) or 1.0
    collector.add("<F x, y> = <x, Fᵀ y>", [abs(forward - back) / size])
    errors = []
    for _ in range(2):
        start, stop = sorted(rng.choice(f.n_out + 1, 2, replace=False).tolist())
        fresh = copy.deepcopy(f)  # without the draws
        for projection in (f, fresh):  # with draws in memory, and with draws for the slice only
            part = backend.to_numpy(projection.slice(x, start, stop))
            errors.append(float(np.max(np.abs(part - expected[start:stop]))) / (float(np.max(np.abs(expected))) or 1.0))
    collector.add("a slice of F = F's", errors)
    return collector.found


# -- Laws of one config: counts, formulas, slices, start and gradients -------------------------------------------------

# Everything is computed in float64 on one array library and compared with :mod:`tnadapt.testing._reference` and the
# formula of the preset, which are written independently of the library.


# A central difference with this step has an error of about 1e-10 of the value it differentiates.
_STEP, DIFFERENCE = 1e-5, 1e-6
# Elements: a gibibyte in float64, of which several are needed.
MOST = 1 << 27

Keys = Sequence[Hashable] | None


def _listed(shapes: Sequence[tuple[int, int]]) -> str:
    """Return shapes as the options of commands list them."""
    runs = [(f"{rows}x{cols}", len(list(run))) for (rows, cols), run in itertools.groupby(map(tuple, shapes))]
    return ", ".join(f"{shape}*{count}" if count > 1 else shape for shape, count in runs)


def checkable(config: Config, shapes: Sequence[tuple[int, int]], layers: Keys, roles: Keys = None) -> UpdatePlan:
    """Return the plan of a config, if it is small enough for its laws to be checked.

    Raises
    ------
    ConfigError
        If there are more than 2**27 parameters and elements of updates in total, or the config does not suit the
        shapes.

    Examples
    --------
    >>> checkable(Config(rank=1), [(2, 2)], None).num_parameters
    4
    """
    plan = UpdatePlan(config, shapes, layers, roles)
    elements = plan.num_parameters + sum(rows * cols for rows, cols in plan.shapes)
    if elements > MOST:
        raise ConfigError(
            f"{elements:,} parameters and elements of updates are too many to check, which takes about ten "
            f"float64 arrays of that size: give a smaller rank or smaller shapes, at most {MOST:,} elements in total"
        )
    return plan


class ConfigLaws(LawCollector):
    """The checks of one config on one library.

    Parameters
    ----------
    label : str
        The subject.
    config, shapes, layers, roles
        As for :class:`tnadapt.UpdatePlan`.
    backend : Backend
    rng : numpy.random.Generator
        Source of the random parameters.
    preset : Preset, optional
        The method whose formula is checked, too.

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> laws = ConfigLaws("x", Config(rank=1), [(2, 2)], load_backend("numpy"), np.random.default_rng(0)).checked()
    >>> all(law.holds for law in laws)
    True
    """

    def __init__(
        self,
        label: str,
        config: Config,
        shapes: Sequence[tuple[int, int]],
        backend: Backend,
        rng: np.random.Generator,
        layers: Keys = None,
        roles: Keys = None,
        preset: Preset | None = None,
    ) -> None:
        super().__init__(label, backend, f"weights {_listed(shapes)}")
        self.config, self.layers, self.roles, self.preset, self.rng = config, layers, roles, preset, rng
        self.plan = checkable(config, shapes, layers, roles)
        if self.plan.theta is not None and self.plan.brought_shapes:
            brought = self.plan.theta.stand_ins(rng)
            self.plan = UpdatePlan(config, self.plan.shapes, layers, roles, given=brought)
        self.base: list[np.ndarray] = []
        if self.plan.needs_base or not self.plan.applying.additive:
            # Any base will do: arrays computed from it are given to the reference, like the draws of a source.
            self.base = [rng.normal(size=shape) for shape in self.plan.shapes]
            self.plan = self.plan.with_base(self.base)
        if self.plan.point.brought:
            self.plan = self.plan.with_start({n: rng.normal(size=s) for n, s in self.plan.array_shapes.items()})
        self.start = {name: array.astype(np.float64) for name, array in self.plan.init().items()}
        self.host = {name: rng.normal(size=shape) for name, shape in self.plan.param_shapes.items()}
        # A source has no second definition: its arrays are given to the reference.
        self.frozen = {
            full: group.frozen.host(name).astype(np.float64)
            for group in self.plan.groups
            for name, full in group.frozen_names.items()
        } | {name: self.plan.given[name].astype(np.float64) for name in self.plan.brought_shapes}
        self.begun = {
            f"group{index}.{name}": group.start.host(name).astype(np.float64)
            for index, group in enumerate(self.plan.groups)
            for name in group.names
        }
        self.names = [group.network.shapes for group in self.plan.groups]
        self.params = self._sent(self.host)

    def checked(self) -> list[Law]:
        whole = self._numbers(self.plan.deltas(self.params))
        self._counts()
        self._formulas(whole)
        self._slices(whole)
        self._begin()
        self._gradient()
        if not all(group.projection.map.identity for group in self.plan.groups):
            for group in self.plan.groups:
                self.found += of_projection(self.subject, group.projection, self.backend, self.rng)
        if not self.plan.applying.additive:
            self._changed()
            self._changed_begin()
            self._changed_gradient()
        return self.found

    def _sent(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        return {name: self.backend.asarray(array, "float64") for name, array in arrays.items()}

    def _numbers(self, arrays: Sequence[Array]) -> np.ndarray:
        return _vector([self.backend.to_numpy(array) for array in arrays])

    def _counts(self) -> None:
        created = sum(math.prod(array.shape) for array in self.plan.init(self.backend.name, "float64").values())
        formula = self._formula_count()
        counted = self.plan.num_parameters
        self.add("parameters counted = made = formula", [abs(counted - created) + abs(counted - formula)], 0.0)

    def _formula_count(self) -> int:
        """Return the number of parameters by the formulas of the formats, and by what each source trains."""
        num_magnitudes = reference.count_of_magnitudes(self.config, self.plan.shapes)
        if self.config.before is not None:
            scopes = {"plan": 1, "group": self.plan.num_groups, "array": len(self.plan.array_shapes)}
            return num_magnitudes + scopes[self.config.scope] * (self.config.parameters or 0)
        if self.config.sources:
            trained = reference.trained_shapes(self.config, self.names)
            return num_magnitudes + sum(math.prod(shape) for shape in trained.values())
        return reference.count(self.config, self.plan.shapes, self.layers, self.roles)

    def _formulas(self, whole: np.ndarray) -> None:
        shapes = self.plan.shapes
        self.add("ΔW = the textbook formula", [relative_error(whole, self._textbook(self.host))])
        if self.preset is not None and self.preset.formula is not None:
            begun = {f"begun.{full}": array for full, array in self.begun.items()}
            expected = self.preset.formula({**self.host, **self.frozen, **begun}, self.config, shapes)
            self.add("ΔW = the method's own formula", [relative_error(whole, _vector(expected))])
        self.add("ΔW = NumPy's", [relative_error(whole, _vector(self.plan.deltas(self.host)))])

    def _slices(self, whole: np.ndarray) -> None:
        errors = []
        edges = np.cumsum([0, *(rows * cols for rows, cols in self.plan.shapes)])
        # Errors are relative to the whole, because a slice may be almost zero.
        scale = float(np.max(np.abs(whole))) or 1.0
        for weight in range(len(self.plan.shapes)):
            values = self._numbers([self.plan.delta(self.params, weight)])
            errors.append(float(np.max(np.abs(values - whole[edges[weight] : edges[weight + 1]]))) / scale)
        for _ in range(4):
            start, stop = sorted(self.rng.choice(self.plan.size + 1, 2, replace=False).tolist())
            values = self._numbers([self.plan.vector(self.params, start, stop)])
            errors.append(float(np.max(np.abs(values - whole[start:stop]))) / scale)
        self.add("a slice = the whole's", errors)

    def _begin(self) -> None:
        errors = []
        for dtype in ("float64", "float32"):
            fresh = self.plan.init(self.backend.name, dtype)
            errors.append(float(np.max(np.abs(self._numbers(self.plan.deltas(fresh))))))
            errors.append(float(np.max(np.abs(self._numbers([self.plan.delta(fresh, 0)])))))
        self.add("at the start ΔW is exactly 0", errors, 0.0)
        # The gradient is not zero if a random direction changes ΔW to first order; the error is 1 if it does not. (From
        # a dead start ΔW grows cubically, by a slope of about 1e-12 for a step of 1e-6.)
        h = 1e-6
        alive = []
        for group in range(self.plan.num_groups):
            group_names = self.plan.groups[group].names.values()
            names = [name for name in self.start if name in group_names or self.plan.theta is not None]
            names = [name for name in names if name not in self.plan.weight_param_shapes]
            way = {name: self.rng.normal(size=self.start[name].shape) for name in names}
            ahead, behind = ({**self.start, **{n: self.start[n] + s * h * way[n] for n in names}} for s in (1, -1))
            slope = (self._moved(ahead) - self._moved(behind)) / (2 * h)
            alive.append(0.0 if np.max(np.abs(slope)) > 1e-11 else 1.0)
        self.add("at the start the gradient is not 0", alive, 0.0)

    def _moved(self, host: dict[str, np.ndarray]) -> np.ndarray:
        return self._numbers(self.plan.deltas(self._sent(host)))

    def _gradient(self) -> None:
        target = self.rng.normal(size=self.plan.size)
        weights = self.backend.asarray(target, "float64")
        # ΔW does not depend on the magnitudes of weights.
        fixed = {name: self.params[name] for name in self.plan.weight_param_shapes}
        host = {name: array for name, array in self.host.items() if name not in fixed}

        def loss(params: dict[str, Array]) -> Array:
            return self.backend.sum(self.plan.vector({**fixed, **params}) * weights, axis=0)

        def exact(name: str, way: np.ndarray) -> float:
            # ΔW is affine in each array, so its derivative is ΔW with the direction in place of the array, minus ΔW
            # with zeros in its place.
            without = self._textbook({**self.host, name: np.zeros_like(way)})
            return float(target @ (self._textbook({**self.host, name: way}) - without))

        def difference(name: str, way: np.ndarray) -> float:
            return self._difference(self._textbook, target, name, way)

        if "gradient" in self.backend.lacks(weights):
            return
        if self.plan.groups[0].projection.linear and not self._powers:
            self.add("the gradient = the exact derivative", self._derivatives(loss, host, exact))
        else:
            errors = self._derivatives(loss, host, difference)
            self.add("the gradient = a central difference", errors, DIFFERENCE)

    @property
    def _powers(self) -> bool:
        """Whether a parameter may occur more than once in a product: θ, and arrays that are tied."""
        inner = map(inner_source, self.config.sources.values())
        return self.config.before is not None or any(isinstance(source, Tied) for source in inner)

    def _textbook(self, host: dict[str, np.ndarray]) -> np.ndarray:
        deltas = reference.deltas(
            self.config, self.plan.shapes, self._whole(host), self.layers, self._whole(self.start), self.roles
        )
        return _vector(deltas)

    def _whole(self, host: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return reference.network_arrays(self.config, self.names, host, self.frozen, self.begun)

    # W', if an update is not just added

    def _changed(self) -> None:
        sent = [self.backend.asarray(weight, "float64") for weight in self.base]
        updated = self._numbers(self.plan.merged(self.params, sent))
        self.add("W' = the textbook formula", [relative_error(updated, self._changed_textbook(self.host))])
        if self.preset is not None and self.preset.changed is not None:
            expected = self.preset.changed({**self.host, **self.frozen}, self.config, self.base)
            self.add("W' = the method's own formula", [relative_error(updated, _vector(expected))])

    def _changed_textbook(self, host: dict[str, np.ndarray]) -> np.ndarray:
        updates = zip(self.base, self.plan.deltas(host), self.plan.weight_param_names, strict=True)
        magnitudes = [
            formula(self.config, weight, delta, host[names[0]] if names else None) for weight, delta, names in updates
        ]
        return _vector(magnitudes)

    def _changed_begin(self) -> None:
        errors = []
        for dtype in ("float64", "float32"):
            plan = self.plan.with_base([weight.astype(dtype) for weight in self.base])
            weights = [self.backend.asarray(weight, dtype) for weight in self.base]
            fresh = plan.merged(plan.init(self.backend.name, dtype), weights)
            for new, old in zip(fresh, weights, strict=True):
                errors.append(float(not np.array_equal(self.backend.to_numpy(new), self.backend.to_numpy(old))))
        self.add("at the start W' is W to the bit", errors, 0.0)

    def _changed_gradient(self) -> None:
        sent = [self.backend.asarray(weight, "float64") for weight in self.base]
        if "gradient" in self.backend.lacks(sent[0]):
            return
        targets = [self.rng.normal(size=shape) for shape in self.plan.shapes]
        ways = [self.backend.asarray(target, "float64") for target in targets]

        def loss(params: dict[str, Array]) -> Array:
            pairs = zip(self.plan.merged(params, sent), ways, strict=True)
            total = [self.backend.sum(self.backend.flatten(new * way), axis=0) for new, way in pairs]
            return sum(total[1:], start=total[0])

        def difference(name: str, way: np.ndarray) -> float:
            return self._difference(self._changed_textbook, _vector(targets), name, way)

        errors = self._derivatives(loss, self.host, difference)
        self.add("the gradient of W' = a central difference", errors, DIFFERENCE)

    # Derivatives

    def _derivatives(
        self,
        loss: Callable[[dict[str, Array]], Array],
        host: dict[str, np.ndarray],
        expected: Callable[[str, np.ndarray], float],
    ) -> list[float]:
        """Compare the gradient of a loss with the derivative in a random direction of each array."""
        gradients = self.backend.gradient(loss, {name: self.params[name] for name in host})
        if gradients is None:
            raise BackendError(
                f"the backend {self.backend.name!r} returned None for a gradient, and its lacks() does not list "
                "'gradient'; return the derivatives, or list it"
            )
        errors = []
        for name, array in host.items():
            way = self.rng.normal(size=array.shape)
            got, exact = float(np.sum(self.backend.to_numpy(gradients[name]) * way)), expected(name, way)
            errors.append(abs(got - exact) / max(abs(exact), abs(got), 1.0))
        return errors

    def _difference(
        self, textbook: Callable[[dict[str, np.ndarray]], np.ndarray], target: np.ndarray, name: str, way: np.ndarray
    ) -> float:
        """Return the derivative of ``<target, textbook>`` in a direction of one array, as a central difference."""
        ahead, behind = (textbook({**self.host, name: self.host[name] + sign * _STEP * way}) for sign in (1, -1))
        return float(target @ (ahead - behind)) / (2 * _STEP)


# -- Laws of the library's operations: draws, fwht, products and projections -------------------------------------------

# They are compared with known answers, with SciPy's Hadamard matrix and with TensorLy's products.


# (seed, group, purpose, first word), and the words from there.
KNOWN_WORDS = (
    ((0, 0, 1, 0), ("844515e1", "f08d6eaa", "0f19c053", "83f875f0", "ca7cf69e")),
    (((1 << 40) + 7, 3, 2, 6), ("63e2c124", "276e314f")),
)
#: The Walsh–Hadamard transform is checked up to 2**(_BITS - 1).
_BITS = 13
# Name -> length, and the first 16 hex digits of SHA-256 of the bytes of seed 0, group 0.
KNOWN_DIGESTS = {
    "signs": (1000, "3557a0b7985e0a08"),
    "permutation": (1000, "2e6668c5a904a31a"),
    "normals": (100_000, "9ef7bb3d30e7e723"),
}


def of_library(backend: Backend, rng: np.random.Generator, deep: bool = True) -> list[Law]:
    """Check the laws of the operations by themselves: draws, fwht, products, projections; a few sizes if not deep.

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> all(law.holds for law in of_library(load_backend("numpy"), np.random.default_rng(0)))
    True
    """
    collector = LawCollector("library", backend)
    _draw_laws(collector)
    _fwht_laws(collector, rng, range(_BITS) if deep else (0, 3, _BITS - 1))
    _product_laws(collector, rng, range(1, 6) if deep else (3,))
    for map_name in ("shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2"):
        for n_in, n_out in ((1, 1), (7, 7), (37, 509), (64, 64), (40, 7)) if deep else ((37, 509),):
            if map_name == "shuffle":
                n_in = n_out
            collector.found += of_projection("library", Projection(map_name, n_in, n_out, seed=5), backend, rng)
    return collector.found


def _draw_laws(collector: LawCollector) -> None:
    wrong = 0
    for (seed, group, purpose, first), expected in KNOWN_WORDS:
        words = rng.words(seed, group, purpose, first, first + len(expected))
        wrong += [f"{word:08x}" for word in words.tolist()] != list(expected)
    arrays = {name: _drawn(name, 0, length) for name, (length, _) in KNOWN_DIGESTS.items()}
    wrong += sum(rng.digest(iter([array.tobytes()]))[:16] != KNOWN_DIGESTS[name][1] for name, array in arrays.items())
    for name, array in arrays.items():
        # A round trip through the library, whole or in pieces, preserves the bits.
        whole = collector.backend.to_numpy(collector.backend.constant(array, None))
        cut = len(array) // 3
        edges = ((0, cut), (cut, cut + 1), (cut + 1, len(array)))
        joined = np.concatenate([_drawn(name, start, stop) for start, stop in edges])
        wrong += not np.array_equal(whole, joined)
    collector.add("draws = the known answers, whole or in pieces", [float(wrong)], 0.0)


def _drawn(name: str, start: int, stop: int) -> np.ndarray:
    if name == "signs":
        return rng.signs(0, 0, start, stop).astype("<f4")
    if name == "permutation":
        return rng.permutation(KNOWN_DIGESTS[name][0], 0, 0, start, stop).astype("<i8")
    return rng.normals(0, 0, rng.PURPOSE["gaussian"], start, stop).astype("<f4")


def _fwht_laws(collector: LawCollector, rng: np.random.Generator, lengths: Iterable[int]) -> None:
    from scipy.linalg import hadamard

    backend = collector.backend
    twice, dense = list[float](), list[float]()
    # Its leading block is the matrix of half its size.
    matrix = hadamard(1 << (_BITS - 1), dtype=np.int8)
    for bits in lengths:
        host = rng.normal(size=(2, 1 << bits))
        x = backend.asarray(host, "float64")
        twice.append(relative_error(backend.to_numpy(fwht(fwht(x))), host))
        expected = host @ matrix[: 1 << bits, : 1 << bits].astype(np.float64)
        dense.append(relative_error(backend.to_numpy(fwht(x, normalize=False)), expected))
    sizes = [f"length {1 << bits}" for bits in lengths]
    collector.add("fwht twice = the identity", twice, sizes=sizes)
    collector.add("fwht = SciPy's Hadamard matrix", dense, sizes=sizes)


def _product_laws(collector: LawCollector, rng: np.random.Generator, orders: Iterable[int]) -> None:
    import tensorly

    backend, errors, cases = collector.backend, list[float](), list[str]()

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    def sent(arrays: Sequence[np.ndarray]) -> list[Array]:
        return [backend.asarray(array, "float64") for array in arrays]

    def compare(what: str, order: int, actual: Array, expected: Any) -> None:
        errors.append(relative_error(backend.to_numpy(actual), expected))
        cases.append(f"{what}, order {order}")

    # TensorLy's backend is a process-wide setting: set it for this thread only, and restore it.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        for order in orders:
            sizes = range(2, order + 2)
            weights, factors = draw(3), [draw(d, 3) for d in sizes]
            product = tensorly.cp_to_tensor((weights, factors))
            compare("CP", order, cp_to_tensor((sent([weights])[0], sent(factors))), product)
            core, factors = draw(*([2] * order)), [draw(d, 2) for d in sizes]
            product = tensorly.tucker_to_tensor((core, factors))
            compare("Tucker", order, tucker_to_tensor((sent([core])[0], sent(factors))), product)
            bonds = [1, *(2 + m % 2 for m in range(order - 1)), 1]
            cores = [draw(bonds[m], d, bonds[m + 1]) for m, d in enumerate(sizes)]
            compare("tensor train", order, tt_to_tensor(sent(cores)), tensorly.tt_to_tensor(cores))
        matrices, x = [draw(2, 3), draw(4, 2), draw(3, 5)], draw(30)
        product = tensorly.tenalg.kronecker(matrices)
        compare("Kronecker product", 2, kronecker(sent(matrices)), product)
        compare("kron_matvec", 2, kron_matvec(sent(matrices), sent([x])[0]), product @ x)
    collector.add("products = TensorLy's", errors, sizes=cases)


def _of_cases(subject: str, backend: Backend, cases: Iterable[Case]) -> list[Law]:
    """Return the laws of a decomposition's or conversion's cases."""
    collector, by_law = LawCollector(subject, backend), dict[str, list[Case]]()
    for case in cases:
        by_law.setdefault(case.law, []).append(case)
    for law, of_law in by_law.items():
        collector.add(law, [case.error for case in of_law], of_law[0].allowed, [case.sizes for case in of_law])
    return collector.found


# -- verify ------------------------------------------------------------------------------------------------------------


_HEAD = ("law", "backend", "cases", "largest error", "allowed", "")


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of :func:`verify`.

    Attributes
    ----------
    laws : tuple of Law
    absent : dict of str to str
        Libraries that were requested but cannot be used here, and why.
    versions : dict of str to str
        Of this library, Python, and the packages that matter here, as installed.
    seed : int
    deep : bool
    call : str
        What checks the same config again; empty if the library was checked.
    """

    laws: tuple[Law, ...]
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    deep: bool = False
    call: str = ""

    @property
    def holds(self) -> bool:
        """Whether every law holds."""
        return bool(self.laws) and all(law.holds for law in self.laws)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values.

        Examples
        --------
        >>> verify(presets.lora(1), [(2, 2)], backends=["numpy"]).to_dict()["holds"]
        True
        """
        return {
            "holds": self.holds,
            "laws": [{**dataclasses.asdict(law), "holds": law.holds} for law in self.laws],
            "absent": self.absent,
            "versions": self.versions,
            "seed": self.seed,
        }

    def rows(self) -> Iterator[tuple[str, str, str, str, str, str]]:
        """Yield one row per law and library, over all subjects: name, backend, cases, error, allowed, verdict."""
        grouped: dict[tuple[str, str], list[Law]] = {}
        for law in self.laws:
            grouped.setdefault((law.name, law.backend), []).append(law)
        for (name, backend), laws in grouped.items():
            broken = [law.subject for law in laws if not law.holds]
            # max() may ignore a NaN, so check for one first.
            errors = [law.error for law in laws]
            worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
            yield (
                name,
                backend,
                str(sum(law.cases for law in laws)),
                f"{worst:.1e}",
                f"{laws[0].allowed:.0e}" if laws[0].allowed else "0",
                "holds" if not broken else "BROKEN: " + ", ".join(broken),
            )

    def __str__(self) -> str:
        """Return the table as plain text."""
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        return TextTable(list(self.rows()), _HEAD, caption="Laws", notes=self._notes())

    def _notes(self) -> list[str]:
        absent = [f"{name}: not checked: {why}" for name, why in self.absent.items()]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        verdict = "all laws hold" if self.holds else "NOT all laws hold"
        return [*absent, *self._failures(), *filter(None, [versions]), verdict]

    def _failures(self) -> Iterator[str]:
        """Yield lines about the first subjects with broken laws: their sizes and seed, and how to see them again."""
        broken: dict[tuple[str, str], list[Law]] = {}
        for law in self.laws:
            if not law.holds:
                broken.setdefault((law.subject, law.backend), []).append(law)
        for (subject, backend), laws in itertools.islice(broken.items(), _SHOWN):
            yield f"{subject} on {backend} with seed {self.seed} breaks"
            for law in laws:
                yield f"  {law.name}: error {law.error:.1e}, allowed {law.allowed:.0e} ({law.sizes or 'no cases'})"
            again = f"tnadapt verify --only {shlex.quote(subject)} --backend {backend} --seed {self.seed}"
            yield f"  to reproduce: {self.call or again + ' --deep' * self.deep}"
        if len(broken) > _SHOWN:
            yield f"and {len(broken) - _SHOWN} more"


#: What --only takes besides presets.
LIBRARY, DECOMPOSITIONS, CONVERSION = "library", "decompositions", "conversion"
#: Libraries that compile each operation for each shape, which for all presets takes minutes; and what they are checked
#: for without ``deep``.
_COMPILING, _FEW = ("jax",), ("lora", "superlora")
_PACKAGES = (
    "numpy", "scipy", "numba", "torch", "jax", "cupy-cuda12x", "tensorly", "safetensors", "peft", "lycoris-lora",
    "transformers",
)  # fmt: skip
#: Subjects with broken laws that a report describes.
_SHOWN = 5


@checks_arguments
def verify(
    config: Config | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    layers: Sequence[Hashable] | None = None,
    backends: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    roles: Sequence[Hashable] | None = None,
    *,
    deep: bool = False,
    only: Sequence[str] | None = None,
) -> Report:
    """Check the laws of a config, or of the library and all presets.

    Parameters
    ----------
    config : Config, optional
        The config to check; of a :class:`tnadapt.CompositeConfig` every part, on its own of the shapes. If None, the
        draws, the products, fwht and F of the library, every preset of :mod:`tnadapt.presets` against the formula of
        its method, those of plug-ins included, every start, the decompositions, and files of PEFT and LyCORIS.
    shapes : sequence of (rows, cols), optional
        Shapes of the weights for ``config``; ``[(12, 8), (12, 8), (8, 12)]`` by default. A projection is compared with
        its dense matrix, so use at most a few thousand elements per group.
    layers : sequence of hashable, optional
        For ``groups="layer"``.
    backends : sequence of str, optional
        Libraries to check on; by default all that are usable here.
    seed : int
        Seed of the random parameters.
    progress : callable, optional
        Called with a line that says what is checked next: the part, and after a colon what of it.
    roles : sequence of hashable, optional
        For ``groups="role"``.
    deep : bool
        Without a config: whether to check everything on every library. By default, JAX, which compiles every operation
        for every shape, is checked for a few sizes and presets.
    only : sequence of str, optional
        Without a config: which presets and parts to check; the other parts are "library", "decompositions" and
        "conversion".

    Returns
    -------
    Report
        ``print`` it for a table; ``report.holds``; ``report.to_dict()``. What breaks a law is described with its sizes
        and seed, and with the command that checks it alone.

    Raises
    ------
    ConfigError
        If shapes are given without a config, or deep or only with one; the config does not suit the shapes or has more
        than 2**27 elements; seed is not an integer from 0 to 2**64 - 1; backends is empty; or only names nothing.
    BackendError
        If a backend is unknown.

    Notes
    -----
    The laws: the number of parameters equals the number of elements created and the format's formula; ΔW equals the
    textbook formula and the method's formula; a slice equals that part of the whole; initially ΔW is exactly 0 and its
    gradient is not; the gradient equals the exact derivative; where ``apply`` is not "add", W' equals its formula, is W
    to the bit initially, and has the formula's derivative; F equals its dense matrix, and its adjoint passes the dot
    test; every library agrees with NumPy; draws equal known answers; a decomposition has the error and bound that it
    states; a file of another library has the updates of its adapter.

    Examples
    --------
    >>> print(verify(presets.lora(rank=2), [(4, 3)], backends=["numpy"]))
    law                                    backend  cases  largest error  allowed
    parameters counted = made = formula    numpy    1      0.0e+00        0        holds
    ...
    all laws hold
    """
    shapes = None if shapes is None else list(shapes)
    if config is None and shapes is not None:
        raise ConfigError("shapes belong to a config; give verify(config, shapes)")
    if config is not None and (deep or only is not None):
        raise ConfigError("deep and only choose checks of the library, and a config is checked whole: leave them out")
    seed = integer("seed", seed, 0, (1 << 64) - 1, ConfigError)
    where = shapes if shapes is not None else [(12, 8), (12, 8), (8, 12)]
    if config is not None:  # before the slow imports of the libraries
        for _, part, weights, keys, own_roles in _parts(config, where, layers, roles):
            checkable(part, weights, keys, own_roles)
    names, absent = _usable(backends)
    tell = progress or (lambda line: None)
    laws: list[Law] = []
    if config is not None:
        for name in names:
            backend = load_backend(name)
            tell(f"{name}: the config")
            with backend.double_precision():
                rng = np.random.default_rng(seed)
                for label, part, weights, keys, own_roles in _parts(config, where, layers, roles):
                    laws += ConfigLaws(label, part, weights, backend, rng, keys, own_roles).checked()
        keys = "".join(f", {name}={list(keys)!r}" for name, keys in (("layers", layers), ("roles", roles)) if keys)
        call = f"tnadapt.verify({config!r}, {where!r}{keys}, backends={names!r}, seed={seed})"
        return Report(tuple(laws), absent, _versions(), seed, call=call)
    checks = list(_checks(names, seed, deep, None if only is None else list(only)))
    if names and not checks:
        raise ConfigError(f"there is nothing to check: {CONVERSION} is checked with the backend 'numpy' alone")
    totals = collections.Counter(check.part for check in checks)
    done: collections.Counter[str] = collections.Counter()
    for check in checks:
        done[check.part] += 1
        several = f": {check.subject}, {done[check.part]} of {totals[check.part]}" if totals[check.part] > 1 else ""
        tell(check.part + several)
        laws += check.laws()
    return Report(tuple(laws), absent, _versions(), seed, deep)


class _Check(NamedTuple):
    """A subject to check on a library, and the part of the progress that it is shown in."""

    part: str
    subject: str
    backend: Backend
    run: Callable[[], list[Law]]

    def laws(self) -> list[Law]:
        """Return the laws; an exception is a broken one, so that the others are still checked."""
        with self.backend.double_precision():
            try:
                return self.run()
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                return [Law("no exception is raised", self.subject, self.backend.name, 1, math.inf, 0.0, text)]


def _checks(names: Sequence[str], seed: int, deep: bool, only: Sequence[str] | None) -> Iterator[_Check]:
    """Yield the checks of the library, each with random numbers that do not depend on the others."""
    configs = {**examples(), **_starts()}
    known = [LIBRARY, DECOMPOSITIONS, CONVERSION, *configs]
    if only is not None and (not only or not set(only) <= set(known)):
        unknown = next((name for name in only if name not in known), None)
        raise ConfigError(f"only must name some of {', '.join(map(repr, known))}; got {safe_repr(unknown or only)}")

    def rng() -> np.random.Generator:
        return np.random.default_rng(seed)

    for name in names:
        backend, whole = load_backend(name), deep or name not in _COMPILING
        wanted = only if only is not None else known if whole else [LIBRARY, *_FEW]
        if LIBRARY in wanted:
            run = functools.partial(lambda backend, whole: of_library(backend, rng(), whole), backend, whole)
            yield _Check(f"{name}, operations", LIBRARY, backend, run)
        for label, (config, weights) in configs.items():
            if label in wanted:
                laws = functools.partial(ConfigLaws, label, config, weights, preset=PRESETS.get(label))
                run = functools.partial(lambda backend, laws: laws(backend=backend, rng=rng()).checked(), backend, laws)
                yield _Check(f"{name}, presets", label, backend, run)
        if DECOMPOSITIONS in wanted:
            run = functools.partial(
                lambda backend: _of_cases(DECOMPOSITIONS, backend, decomposition_cases(backend, rng())), backend
            )
            yield _Check(f"{name}, decompositions", DECOMPOSITIONS, backend, run)
    if "numpy" in names and (only is None or CONVERSION in only):
        backend = load_backend("numpy")
        yield _Check(CONVERSION, CONVERSION, backend, lambda: _of_cases(CONVERSION, backend, conversion_cases(rng())))


def _versions() -> dict[str, str]:
    """Return the versions of this library, Python, and the packages that are installed."""
    versions = {"tnadapt": tnadapt.__version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def examples() -> dict[str, tuple[Config, list[tuple[int, int]]]]:
    """Return a small instance of every preset, those of plug-ins included: name -> (config, shapes)."""
    return {name: (PRESETS[name].config(**PRESETS[name].example), [(12, 8)] * 4) for name in PRESETS.installed()}


def _starts() -> dict[str, tuple[Config, list[tuple[int, int]]]]:
    """Return a small instance of every built-in start that is subtracted; presets cover the others."""
    rank = {"rank": 3, "alpha": 6}
    return {
        f"lora, start={name}": (presets.lora(**rank, start=name), [(12, 8)] * 2)
        for name in STARTS.built_in
        if STARTS[name].subtracts
    }


def _parts(
    config: Config, shapes: Sequence[tuple[int, int]], layers: Keys, roles: Keys
) -> Iterator[tuple[str, Config, Sequence[tuple[int, int]], Keys, Keys]]:
    """Yield each config of an adapter with a label and with the shapes and keys of its weights."""
    parts = config.split(range(len(shapes)))
    if len(parts) == 1:
        yield "config", config, shapes, layers, roles
        return
    for number, (part, places) in enumerate(parts):
        keys = [None if labels is None else [labels[place] for place in places] for labels in (layers, roles)]
        yield f"part {number}", part, [shapes[place] for place in places], keys[0], keys[1]


def _usable(wanted: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    if wanted is None:
        return available_backends(), {}
    if isinstance(wanted, str) or not list(wanted):
        raise ConfigError(f'backends must be a list of one or more names, e.g. ["numpy"]; got {safe_repr(wanted)}')
    absent = {name: "no device to compute on" for name in wanted if not load_backend(name).usable()}
    return [name for name in wanted if name not in absent], absent

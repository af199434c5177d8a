"""Each law by itself: of one config, of one projection, of the operations of the library.

Everything is computed in float64 on one array library and compared with :mod:`tnadapt.testing._reference` and
:mod:`tnadapt.testing._methods`, which are written independently, with SciPy's Hadamard matrix and with TensorLy's
products. :func:`tnadapt.verify` runs them and makes the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.config import Config
from tnadapt.algebra.maps.hadamard import fwht
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError, ConfigError

from . import _methods as methods
from . import _reference as reference

__all__ = ["Law", "checkable", "of_config", "of_library"]

# Relative to the largest element compared; a float64 has sixteen digits.
TIGHT = 1e-12
# A central difference of step 1e-5 has an error of some 1e-10 of what it differentiates.
DIFFERENCE = 1e-6
# A gibibyte in float64, of which several are needed.
MOST = 1 << 27

# (seed, group, purpose, first word), and the words from there.
KNOWN_WORDS = (
    ((0, 0, 1, 0), ("844515e1", "f08d6eaa", "0f19c053", "83f875f0", "ca7cf69e")),
    (((1 << 40) + 7, 3, 2, 6), ("63e2c124", "276e314f")),
)
# Name -> length, and the first 16 hex digits of SHA-256 of the bytes of seed 0, group 0.
KNOWN_DIGESTS = {
    "signs": (1000, "3557a0b7985e0a08"),
    "permutation": (1000, "2e6668c5a904a31a"),
    "normals": (100_000, "9ef7bb3d30e7e723"),
}


@dataclasses.dataclass(frozen=True)
class Law:
    """One law on one library.

    Attributes
    ----------
    name : str
        What must hold.
    subject : str
        Of what: a method, a config, or the library.
    backend : str
        On which array library.
    cases : int
        How many comparisons were made.
    error : float
        The largest seen; NaN where something that must be a number is none.
    allowed : float
        The largest allowed.
    """

    name: str
    subject: str
    backend: str
    cases: int
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed (NaN is not) and there was a case at all."""
        return self.cases > 0 and self.error <= self.allowed


def _error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest element of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    scale = float(np.max(np.abs(expected)))
    return float(np.max(np.abs(found - expected))) / (scale or 1.0)


class _Collector:
    """Laws as they are checked, one name at a time."""

    def __init__(self, subject: str, backend: Backend) -> None:
        self.subject, self.backend, self.found = subject, backend, list[Law]()

    def add(self, name: str, errors: Sequence[float], allowed: float = TIGHT) -> None:
        worst = math.nan if any(math.isnan(error) for error in errors) else max(errors, default=math.nan)
        self.found.append(Law(name, self.subject, self.backend.name, len(errors), worst, allowed))


def of_config(
    label: str,
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None,
    backend: Backend,
    rng: np.random.Generator,
) -> list[Law]:
    """The laws of one config on one library.

    Parameters
    ----------
    label : str
        The subject; where it is a name in :data:`tnadapt.testing._methods.METHODS`, that method's formula is compared
        with, too.
    config, shapes, layers
        As for :class:`tnadapt.SuperLoRA`.
    backend : Backend
    rng : numpy.random.Generator
        Of the parameters.

    Returns
    -------
    list of Law

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> laws = of_config("x", Config(rank=1), [(2, 2)], None, load_backend("numpy"), np.random.default_rng(0))
    >>> all(law.holds for law in laws)
    True
    """
    return _Case(label, config, shapes, layers, backend, rng).laws()


def checkable(config: Config, shapes: Sequence[tuple[int, int]], layers: Sequence[Hashable] | None) -> SuperLoRA:
    """The plan of a config on weights that are few enough for its laws to be checked.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
    layers : sequence of hashable, optional

    Returns
    -------
    SuperLoRA

    Raises
    ------
    ConfigError
        If parameters and elements of updates are more than 2**27 together, or the config does not suit the shapes.

    Examples
    --------
    >>> checkable(Config(rank=1), [(2, 2)], None).num_parameters
    4
    """
    plan = SuperLoRA(config, shapes, layers)
    elements = plan.num_parameters + sum(rows * cols for rows, cols in plan.shapes)
    if elements > MOST:
        raise ConfigError(
            f"{elements:,} parameters and elements of updates are too many to be checked, which takes some ten "
            f"arrays of them in float64: give a smaller rank or smaller shapes, of at most {MOST:,} together"
        )
    return plan


class _Case:
    """One config on one library."""

    def __init__(
        self,
        label: str,
        config: Config,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None,
        backend: Backend,
        rng: np.random.Generator,
    ) -> None:
        self.label, self.config, self.layers, self.backend, self.rng = label, config, layers, backend, rng
        self.plan = checkable(config, shapes, layers)
        self.start = {name: array.astype(np.float64) for name, array in self.plan.init().items()}
        self.host = {name: rng.normal(size=shape) for name, shape in self.plan.param_shapes.items()}
        self.params = self._sent(self.host)
        self.collector = _Collector(label, backend)

    def laws(self) -> list[Law]:
        whole = self._numbers(self.plan.deltas(self.params))
        self._counts()
        self._formulas(whole)
        self._slices(whole)
        self._begin()
        self._gradient()
        if self.config.projection != "identity":
            self._projections()
        return self.collector.found

    def _sent(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        return {name: self.backend.asarray(array, "float64") for name, array in arrays.items()}

    def _numbers(self, arrays: Sequence[Array]) -> np.ndarray:
        return np.concatenate([self.backend.to_numpy(array).reshape(-1) for array in arrays])

    def _counts(self) -> None:
        made = sum(math.prod(array.shape) for array in self.plan.init(self.backend.name, "float64").values())
        formula = reference.count(self.config, self.plan.shapes, self.layers)
        counted = self.plan.num_parameters
        self.collector.add("parameters counted = made = formula", [abs(counted - made) + abs(counted - formula)], 0.0)

    def _formulas(self, whole: np.ndarray) -> None:
        shapes = self.plan.shapes
        textbook = reference.deltas(self.config, shapes, self.host, self.layers, self.start)
        expected = np.concatenate([delta.reshape(-1) for delta in textbook])
        self.collector.add("ΔW = the textbook formula", [_error(whole, expected)])
        if self.label in methods.METHODS:
            own = methods.METHODS[self.label](self.host, self.config, shapes)
            self.collector.add(
                "ΔW = the method's own formula", [_error(whole, np.concatenate([d.reshape(-1) for d in own]))]
            )
        numpy = self.plan.deltas(self.host)
        self.collector.add("ΔW = NumPy's", [_error(whole, np.concatenate([d.reshape(-1) for d in numpy]))])

    def _slices(self, whole: np.ndarray) -> None:
        errors = []
        edges = np.cumsum([0, *(rows * cols for rows, cols in self.plan.shapes)])
        # Errors are judged against the whole: a slice of it may be all but zero.
        scale = float(np.max(np.abs(whole))) or 1.0
        for weight in range(len(self.plan.shapes)):
            found = self._numbers([self.plan.delta(self.params, weight)])
            errors.append(float(np.max(np.abs(found - whole[edges[weight] : edges[weight + 1]]))) / scale)
        for _ in range(4):
            start, stop = sorted(self.rng.choice(self.plan.size + 1, 2, replace=False).tolist())
            found = self._numbers([self.plan.vector(self.params, start, stop)])
            errors.append(float(np.max(np.abs(found - whole[start:stop]))) / scale)
        self.collector.add("a slice = the whole's", errors)

    def _begin(self) -> None:
        errors = []
        for dtype in ("float64", "float32"):
            fresh = self.plan.init(self.backend.name, dtype)
            errors.append(float(np.max(np.abs(self._numbers(self.plan.deltas(fresh))))))
            errors.append(float(np.max(np.abs(self._numbers([self.plan.delta(fresh, 0)])))))
        self.collector.add("at the start ΔW is exactly 0", errors, 0.0)
        # That the gradient lives: some direction moves ΔW to first order. 1 is "none does". (A dead start
        # leaves a cubic: 1e-12 of a step of 1e-6.)
        h = 1e-6
        alive = []
        for group in range(self.plan.num_groups):
            own = [name for name in self.start if name.startswith(f"group{group}.")]
            way = {name: self.rng.normal(size=self.start[name].shape) for name in own}
            ahead, behind = ({**self.start, **{n: self.start[n] + s * h * way[n] for n in own}} for s in (1, -1))
            slope = (self._moved(ahead) - self._moved(behind)) / (2 * h)
            alive.append(0.0 if np.max(np.abs(slope)) > 1e-11 else 1.0)
        self.collector.add("at the start the gradient is not 0", alive, 0.0)

    def _moved(self, host: dict[str, np.ndarray]) -> np.ndarray:
        return self._numbers(self.plan.deltas(self._sent(host)))

    def _gradient(self) -> None:
        target = self.rng.normal(size=self.plan.size)
        weights = self.backend.asarray(target, "float64")

        def loss(params: dict[str, Array]) -> Array:
            return self.backend.sum(self.plan.vector(params) * weights, axis=0)

        if "gradient" in self.backend.lacks(weights):
            return
        found = self.backend.gradient(loss, self.params)
        if found is None:
            raise BackendError(
                f"the backend {self.backend.name!r} returned None for a gradient, and its lacks() does not list "
                "'gradient'; return the derivatives, or list it"
            )
        errors = []
        linear = self.plan.groups[0].projection.linear
        for name, array in self.host.items():
            way = self.rng.normal(size=array.shape)
            got = float(np.sum(self.backend.to_numpy(found[name]) * way))
            if linear:
                # ΔW is affine in each of its arrays: put the direction in its place, less what is without it.
                without = self._textbook({**self.host, name: np.zeros_like(array)})
                exact = float(target @ (self._textbook({**self.host, name: way}) - without))
            else:
                h = 1e-5
                ahead, behind = (self._textbook({**self.host, name: array + s * h * way}) for s in (1, -1))
                exact = float(target @ (ahead - behind)) / (2 * h)
            errors.append(abs(got - exact) / max(abs(exact), abs(got), 1.0))
        if linear:
            self.collector.add("the gradient = the exact derivative", errors, TIGHT)
        else:
            self.collector.add("the gradient = a central difference", errors, DIFFERENCE)

    def _textbook(self, host: dict[str, np.ndarray]) -> np.ndarray:
        found = reference.deltas(self.config, self.plan.shapes, host, self.layers, self.start)
        return np.concatenate([delta.reshape(-1) for delta in found])

    def _projections(self) -> None:
        for group in self.plan.groups:
            self.collector.found += _projection_laws(self.label, group.projection, self.backend, self.rng)


def _projection_laws(label: str, f: Projection, backend: Backend, rng: np.random.Generator) -> list[Law]:
    collector = _Collector(label, backend)
    matrix = reference.matrix(f.kind, f.n_in, f.n_out, f.seed, f.group)
    host = rng.normal(size=f.n_in)
    x = backend.asarray(host, "float64")
    expected: np.ndarray = matrix @ host
    slope = np.ones_like(expected)
    if not f.linear:
        expected, slope = reference.tanhshrink(expected), np.tanh(expected) ** 2
    collector.add("F = its dense matrix", [_error(backend.to_numpy(f(x)), expected)])
    y = rng.normal(size=f.n_out)
    adjoint = backend.to_numpy(f.adjoint(backend.asarray(y, "float64"), at=x))
    collector.add("F's adjoint = its matrix transposed", [_error(adjoint, matrix.T @ (slope * y))])
    other = rng.normal(size=f.n_in)
    forward, back = float((slope * (matrix @ other)) @ y), float(other @ adjoint)
    size = float(np.linalg.norm(slope * (matrix @ other)) * np.linalg.norm(y)) or 1.0
    collector.add("<F x, y> = <x, Fᵀ y>", [abs(forward - back) / size])
    errors = []
    for _ in range(2):
        start, stop = sorted(rng.choice(f.n_out + 1, 2, replace=False).tolist())
        fresh = Projection(f.kind, f.n_in, f.n_out, f.seed, f.group)
        for projection in (f, fresh):  # from the kept draws, and drawn for the slice alone
            part = backend.to_numpy(projection.slice(x, start, stop))
            errors.append(float(np.max(np.abs(part - expected[start:stop]))) / (float(np.max(np.abs(expected))) or 1.0))
    collector.add("a slice of F = F's", errors)
    return collector.found


def of_library(backend: Backend, rng: np.random.Generator) -> list[Law]:
    """The laws of the operations by themselves: draws, fwht, products, projections.

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> all(law.holds for law in of_library(load_backend("numpy"), np.random.default_rng(0)))
    True
    """
    collector = _Collector("library", backend)
    _draw_laws(collector)
    _fwht_laws(collector, rng)
    _product_laws(collector, rng)
    for kind in ("shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2"):
        for n_in, n_out in ((1, 1), (7, 7), (37, 509), (64, 64), (40, 7)):
            if kind == "shuffle":
                n_in = n_out
            collector.found += _projection_laws("library", Projection(kind, n_in, n_out, seed=5), backend, rng)
    return collector.found


def _draw_laws(collector: _Collector) -> None:
    wrong = 0
    for (seed, group, purpose, first), expected in KNOWN_WORDS:
        found = rng.words(seed, group, purpose, first, first + len(expected))
        wrong += [f"{word:08x}" for word in found.tolist()] != list(expected)
    made = {name: _drawn(name, 0, length) for name, (length, _) in KNOWN_DIGESTS.items()}
    wrong += sum(rng.digest(iter([array.tobytes()]))[:16] != KNOWN_DIGESTS[name][1] for name, array in made.items())
    for name, array in made.items():
        # The same bits once they have been through the library, whole or in pieces.
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


def _fwht_laws(collector: _Collector, rng: np.random.Generator) -> None:
    from scipy.linalg import hadamard

    backend = collector.backend
    twice, dense = [], []
    for bits in range(13):
        host = rng.normal(size=(2, 1 << bits))
        x = backend.asarray(host, "float64")
        twice.append(_error(backend.to_numpy(fwht(fwht(x))), host))
        dense.append(_error(backend.to_numpy(fwht(x, normalize=False)), host @ hadamard(1 << bits)))
    collector.add("fwht twice = the identity", twice)
    collector.add("fwht = SciPy's Hadamard matrix", dense)


def _product_laws(collector: _Collector, rng: np.random.Generator) -> None:
    import tensorly

    backend, errors = collector.backend, list[float]()

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    def sent(arrays: Sequence[np.ndarray]) -> list[Array]:
        return [backend.asarray(array, "float64") for array in arrays]

    def compare(found: Array, expected: Any) -> None:
        errors.append(_error(backend.to_numpy(found), expected))

    # TensorLy's backend belongs to the process: it is set for this thread, and restored.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        for order in range(1, 6):
            sizes = range(2, order + 2)
            weights, factors = draw(3), [draw(d, 3) for d in sizes]
            compare(cp_to_tensor((sent([weights])[0], sent(factors))), tensorly.cp_to_tensor((weights, factors)))
            core, factors = draw(*([2] * order)), [draw(d, 2) for d in sizes]
            compare(tucker_to_tensor((sent([core])[0], sent(factors))), tensorly.tucker_to_tensor((core, factors)))
            bonds = [1, *(2 + m % 2 for m in range(order - 1)), 1]
            cores = [draw(bonds[m], d, bonds[m + 1]) for m, d in enumerate(sizes)]
            compare(tt_to_tensor(sent(cores)), tensorly.tt_to_tensor(cores))
        matrices, x = [draw(2, 3), draw(4, 2), draw(3, 5)], draw(30)
        product = tensorly.tenalg.kronecker(matrices)
        compare(kronecker(sent(matrices)), product)
        compare(kron_matvec(sent(matrices), sent([x])[0]), product @ x)
    collector.add("products = TensorLy's", errors)

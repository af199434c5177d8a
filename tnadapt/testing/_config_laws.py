"""The laws of one config: counts, formulas, slices, the start and gradients of its plan.

Everything is computed in float64 on one array library and compared with :mod:`tnadapt.testing._reference` and
:mod:`tnadapt.testing._methods`, which are written independently of the library.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.sources import Tied, inner_source
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError, ConfigError

from . import _methods as methods
from . import _reference as reference
from ._change_laws import ChangeLaws
from ._law import TIGHT, Law, LawCollector, relative_error
from ._projection_laws import of_projection
from ._reference_arrays import network_arrays, trained_shapes

__all__ = ["checkable", "of_config"]

# A central difference of step 1e-5 has an error of about 1e-10 of the value it differentiates.
DIFFERENCE = 1e-6
# Elements: a gibibyte in float64, of which several are needed.
MOST = 1 << 27


def of_config(
    label: str,
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None,
    backend: Backend,
    rng: np.random.Generator,
    roles: Sequence[Hashable] | None = None,
) -> list[Law]:
    """Check the laws of one config on one library.

    Parameters
    ----------
    label : str
        The subject; if it is a name in :data:`tnadapt.testing._methods.METHODS`, that method's formula is checked, too.
    config, shapes, layers, roles
        As for :class:`tnadapt.SuperLoRA`.
    backend : Backend
    rng : numpy.random.Generator
        Source of the random parameters.

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
    return _Case(label, config, shapes, layers, backend, rng, roles).laws()


def checkable(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None,
    roles: Sequence[Hashable] | None = None,
) -> SuperLoRA:
    """Return the plan of a config, if it is small enough for its laws to be checked.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
    layers, roles : sequence of hashable, optional

    Returns
    -------
    SuperLoRA

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
    plan = SuperLoRA(config, shapes, layers, roles)
    elements = plan.num_parameters + sum(rows * cols for rows, cols in plan.shapes)
    if elements > MOST:
        raise ConfigError(
            f"{elements:,} parameters and elements of updates are too many to check, which takes about ten "
            f"float64 arrays of that size: give a smaller rank or smaller shapes, at most {MOST:,} elements in total"
        )
    return plan


class _Case:
    """The checks of one config on one library."""

    def __init__(
        self,
        label: str,
        config: Config,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None,
        backend: Backend,
        rng: np.random.Generator,
        roles: Sequence[Hashable] | None = None,
    ) -> None:
        self.roles = roles
        self.label, self.config, self.layers, self.backend, self.rng = label, config, layers, backend, rng
        self.plan = checkable(config, shapes, layers, roles)
        if self.plan.theta is not None and self.plan.brought_shapes:
            brought = self.plan.theta.stand_ins(rng)
            self.plan = SuperLoRA(config, self.plan.shapes, layers, roles, given=brought)
        self.base: list[np.ndarray] = []
        if self.plan.needs_base or not self.plan.applying.additive:
            # Any base will do: what is computed from it is given to the reference, like the draws of a source.
            self.base = [rng.normal(size=shape) for shape in self.plan.shapes]
            self.plan = self.plan.with_base(self.base)
        if self.plan.point.brought:
            self.plan = self.plan.with_start({n: rng.normal(size=s) for n, s in self.plan.array_shapes.items()})
        self.start = {name: array.astype(np.float64) for name, array in self.plan.init().items()}
        self.host = {name: rng.normal(size=shape) for name, shape in self.plan.param_shapes.items()}
        # A source has no second definition: what it computes is given to the reference.
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
        self.collector = LawCollector(label, backend)

    def laws(self) -> list[Law]:
        whole = self._numbers(self.plan.deltas(self.params))
        self._counts()
        self._formulas(whole)
        self._slices(whole)
        self._begin()
        self._gradient()
        if not all(group.projection.map.identity for group in self.plan.groups):
            self._projections()
        if not self.plan.applying.additive:
            laws = ChangeLaws(self.label, self.plan, self.base, self.backend, self.rng, self.collector)
            laws.check(self.host, self.frozen)
        return self.collector.found

    def _sent(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        return {name: self.backend.asarray(array, "float64") for name, array in arrays.items()}

    def _numbers(self, arrays: Sequence[Array]) -> np.ndarray:
        return np.concatenate([self.backend.to_numpy(array).reshape(-1) for array in arrays])

    def _counts(self) -> None:
        made = sum(math.prod(array.shape) for array in self.plan.init(self.backend.name, "float64").values())
        formula = self._formula_count()
        counted = self.plan.num_parameters
        self.collector.add("parameters counted = made = formula", [abs(counted - made) + abs(counted - formula)], 0.0)

    def _formula_count(self) -> int:
        """The number of parameters by the formulas of the formats, and by what each source says is trained."""
        own = reference.count_of_magnitudes(self.config, self.plan.shapes)
        if self.config.before is not None:
            scopes = {"plan": 1, "group": self.plan.num_groups, "array": len(self.plan.array_shapes)}
            return own + scopes[self.config.scope] * (self.config.parameters or 0)
        if self.config.sources:
            return own + sum(math.prod(shape) for shape in trained_shapes(self.config, self.names).values())
        return reference.count(self.config, self.plan.shapes, self.layers, self.roles)

    def _formulas(self, whole: np.ndarray) -> None:
        shapes = self.plan.shapes
        self.collector.add("ΔW = the textbook formula", [relative_error(whole, self._textbook(self.host))])
        if self.label in methods.METHODS:
            begun = {f"begun.{full}": array for full, array in self.begun.items()}
            own = methods.METHODS[self.label]({**self.host, **self.frozen, **begun}, self.config, shapes)
            self.collector.add(
                "ΔW = the method's own formula", [relative_error(whole, np.concatenate([d.reshape(-1) for d in own]))]
            )
        numpy = self.plan.deltas(self.host)
        self.collector.add("ΔW = NumPy's", [relative_error(whole, np.concatenate([d.reshape(-1) for d in numpy]))])

    def _slices(self, whole: np.ndarray) -> None:
        errors = []
        edges = np.cumsum([0, *(rows * cols for rows, cols in self.plan.shapes)])
        # Errors are relative to the whole, because a slice may be almost zero.
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
        # The gradient is not zero if a random direction changes ΔW to first order; the error is 1 if it does not. (From
        # a dead start ΔW grows cubically, by a slope of about 1e-12 for a step of 1e-6.)
        h = 1e-6
        alive = []
        for group in range(self.plan.num_groups):
            made = self.plan.groups[group].names.values()
            own = [name for name in self.start if name in made or self.plan.theta is not None]
            own = [name for name in own if name not in self.plan.weight_param_shapes]
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
        # ΔW does not depend on the magnitudes of weights.
        fixed = {name: self.params[name] for name in self.plan.weight_param_shapes}
        host = {name: array for name, array in self.host.items() if name not in fixed}

        def loss(params: dict[str, Array]) -> Array:
            return self.backend.sum(self.plan.vector({**fixed, **params}) * weights, axis=0)

        if "gradient" in self.backend.lacks(weights):
            return
        found = self.backend.gradient(loss, {name: self.params[name] for name in host})
        if found is None:
            raise BackendError(
                f"the backend {self.backend.name!r} returned None for a gradient, and its lacks() does not list "
                "'gradient'; return the derivatives, or list it"
            )
        errors = []
        linear = self.plan.groups[0].projection.linear and not self._powers
        for name, array in host.items():
            way = self.rng.normal(size=array.shape)
            got = float(np.sum(self.backend.to_numpy(found[name]) * way))
            if linear:
                # ΔW is affine in each array, so its derivative is ΔW with the direction in place of the array, minus ΔW
                # with zeros in its place.
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

    @property
    def _powers(self) -> bool:
        """Whether a parameter may occur more than once in a product: θ, and arrays that are tied."""
        inner = map(inner_source, self.config.sources.values())
        return self.config.before is not None or any(isinstance(source, Tied) for source in inner)

    def _textbook(self, host: dict[str, np.ndarray]) -> np.ndarray:
        found = reference.deltas(
            self.config, self.plan.shapes, self._whole(host), self.layers, self._whole(self.start), self.roles
        )
        return np.concatenate([delta.reshape(-1) for delta in found])

    def _whole(self, host: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return network_arrays(self.config, self.names, host, self.frozen, self.begun)

    def _projections(self) -> None:
        for group in self.plan.groups:
            self.collector.found += of_projection(self.label, group.projection, self.backend, self.rng)

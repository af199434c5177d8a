"""The laws of a weight that an update changes otherwise than by a sum: W' of ``Config.apply``.

The formulas are written out here once more, row by row, and the derivative of W' is compared with a central difference
of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from . import _methods as methods
from ._law import LawCollector, relative_error

__all__ = ["ChangeLaws", "formula"]

# As for ΔW: a central difference of step 1e-5.
_STEP, _DIFFERENCE = 1e-5, 1e-6


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
    found = np.asarray(weight + delta)
    turned = found if config.magnitude_axis == "rows" else found.T
    for row, length in zip(turned, magnitude.tolist(), strict=True):  # views: changed in place
        row *= length / math.hypot(*row.tolist())
    return found


class ChangeLaws:
    """The checks of W' for one plan on one library.

    Parameters
    ----------
    label : str
        The subject; if it is a name in :data:`tnadapt.testing._methods.CHANGED`, that method's formula is checked, too.
    plan : SuperLoRA
        With what it computes from the base.
    base : sequence of ndarray
        The base weights in float64.
    backend : Backend
    rng : numpy.random.Generator
    collector : LawCollector
    """

    def __init__(
        self,
        label: str,
        plan: SuperLoRA,
        base: Sequence[np.ndarray],
        backend: Backend,
        rng: np.random.Generator,
        collector: LawCollector,
    ) -> None:
        self.label, self.plan, self.base, self.backend = label, plan, base, backend
        self.rng, self.collector = rng, collector

    def check(self, host: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> None:
        """Check all laws for parameters in float64; ``others`` are frozen arrays."""
        sent = [self.backend.asarray(weight, "float64") for weight in self.base]
        params = {name: self.backend.asarray(array, "float64") for name, array in host.items()}
        found = _vector([self.backend.to_numpy(weight) for weight in self.plan.merged(params, sent)])
        self.collector.add("W' = the textbook formula", [relative_error(found, self._formula(host))])
        if self.label in methods.CHANGED:
            own = methods.CHANGED[self.label]({**host, **others}, self.plan.config, self.base)
            self.collector.add("W' = the method's own formula", [relative_error(found, _vector(own))])
        self._start()
        if "gradient" not in self.backend.lacks(sent[0]):
            self._gradient(host, params, sent)

    def _formula(self, host: Mapping[str, np.ndarray]) -> np.ndarray:
        names = self.plan.weight_param_names
        return _vector(
            [
                formula(self.plan.config, weight, delta, host[names[index][0]] if names[index] else None)
                for index, (weight, delta) in enumerate(zip(self.base, self.plan.deltas(host), strict=True))
            ]
        )

    def _start(self) -> None:
        errors = []
        for dtype in ("float64", "float32"):
            plan = self.plan.with_base([weight.astype(dtype) for weight in self.base])
            weights = [self.backend.asarray(weight, dtype) for weight in self.base]
            fresh = plan.merged(plan.init(self.backend.name, dtype), weights)
            errors += [
                float(not np.array_equal(self.backend.to_numpy(new), self.backend.to_numpy(old)))
                for new, old in zip(fresh, weights, strict=True)
            ]
        self.collector.add("at the start W' is W to the bit", errors, 0.0)

    def _gradient(self, host: Mapping[str, np.ndarray], params: dict[str, Array], sent: Sequence[Array]) -> None:
        targets = [self.rng.normal(size=shape) for shape in self.plan.shapes]
        ways = [self.backend.asarray(target, "float64") for target in targets]

        def loss(params: dict[str, Array]) -> Array:
            total = [
                self.backend.sum(self.backend.flatten(new * way), axis=0)
                for new, way in zip(self.plan.merged(params, sent), ways, strict=True)
            ]
            return sum(total[1:], start=total[0])

        found = self.backend.gradient(loss, params)
        assert found is not None  # lacks() says so
        errors = []
        for name, array in host.items():
            way = self.rng.normal(size=array.shape)
            got = float(np.sum(self.backend.to_numpy(found[name]) * way))
            ahead, behind = (
                float(_vector(targets) @ self._formula({**host, name: array + sign * _STEP * way})) for sign in (1, -1)
            )
            exact = (ahead - behind) / (2 * _STEP)
            errors.append(abs(got - exact) / max(abs(exact), abs(got), 1.0))
        self.collector.add("the gradient of W' = a central difference", errors, _DIFFERENCE)


def _vector(matrices: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([matrix.reshape(-1) for matrix in matrices])

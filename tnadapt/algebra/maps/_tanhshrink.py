"""The linear fastfood maps followed by the nonlinearity ``t - tanh(t)``."""

from __future__ import annotations

from fractions import Fraction

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._linear import Linear, LinearV2
from ._map import Map

__all__ = ["Nonlinear", "NonlinearV2", "tanhshrink"]


class Nonlinear(Linear):
    """``tanhshrink(linear)``; its adjoint at a point uses the slope ``tanh(t)**2`` of ``t - tanh(t)``."""

    kind = "nonlinear"
    linear = False
    _linear_kind: type[Linear] = Linear

    @property
    def linear_part(self) -> Map:
        return self._linear_kind(self.n_in, self.n_out, self.seed, self.group)

    def forward(self, backend: Backend, x: Array) -> Array:
        return tanhshrink(backend, super().forward(backend, x))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return tanhshrink(backend, super().slice(backend, x, start, stop))

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        slope = backend.tanh(super().forward(backend, at))
        return self.adjoint(backend, y * slope * slope)

    def fourth_moment(self) -> float:
        # t is normal; for the v2 kind it is a normal number times the normal diagonal g'.
        return 45.0 if self.normal else 3.0


class NonlinearV2(Nonlinear):
    """``tanhshrink(linear_v2)``."""

    kind = "nonlinear_v2"
    normal = True
    _linear_kind = LinearV2


def tanhshrink(backend: Backend, t: Array) -> Array:
    """Compute ``t - tanh(t)``; near 0, where the difference would cancel, by its series in odd powers."""
    none = t * 0.0

    def near(inside: Array, outside: Array) -> Array:
        return backend.where(t > -0.25, backend.where(t < 0.25, inside, outside), outside)

    # Zero where the series is not used, because its powers would overflow there and spoil the gradient.
    small = near(t, none)
    square = small * small
    series = square * 0.0 + _SHRINK_SERIES[-1]
    for coefficient in reversed(_SHRINK_SERIES[:-1]):
        series = series * square + coefficient
    return near(small * square * series, t - backend.tanh(t))


def _shrink_series(terms: int) -> list[float]:
    """Return the coefficients of ``t**3, t**5, …`` in ``t - tanh(t)``, from ``tanh' = 1 - tanh**2``."""
    odd = [Fraction(1)]
    for k in range(1, terms + 1):
        odd.append(-sum((odd[i] * odd[k - 1 - i] for i in range(k)), Fraction(0)) / (2 * k + 1))
    return [float(-coefficient) for coefficient in odd[1:]]


# For |t| < 1/4 the truncation error is below 1e-15 of the sum: each term is at most 0.026 of the one before.
_SHRINK_SERIES = _shrink_series(9)

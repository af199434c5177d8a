"""Refinement by gradients: L-BFGS on all arrays at once, for a nonlinear F and for Hadamard products.

The gradient is computed by the adjoints of F at a point and of the network. The few parameters are passed to SciPy in
float64 on the host; long vectors stay on their device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._linear_algebra import Algebra
from ._single_tensor import Fit, Limits

__all__ = ["refine"]


def refine(
    algebra: Algebra,
    network: Network,
    projection: Projection,
    y: Array,
    start: Mapping[str, Array],
    limits: Limits,
    watch: Callable[[int, float], None],
) -> Fit:
    """Improve the arrays of a network so that F of the network is nearer to a vector.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    projection : Projection
        Any kind.
    y : array, shape (n_out,)
        The target of ``F(x)``; for a nonlinear F, the update plus ``F(x_start)``.
    start : mapping of str to array
    limits : Limits
    watch : callable
        Called with each iteration's number and error relative to y.

    Returns
    -------
    Fit

    Notes
    -----
    L-BFGS-B of Byrd, Lu, Nocedal & Zhu (1995), in SciPy. Each evaluation runs F and the network forwards and backwards.
    """
    from scipy.optimize import minimize

    backend, shapes = algebra.backend, network.shapes
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    norm = algebra.norm(y)
    # Each array is scaled to a root mean square of one, so that the method sees parameters of similar size.
    units = {name: max(algebra.norm(start[name]) / size**0.5, 1e-6) for name, size in zip(shapes, sizes, strict=True)}

    def arrays_of(theta: np.ndarray) -> dict[str, Array]:
        pieces = np.split(theta, np.cumsum(sizes)[:-1])
        return {
            name: algebra.array((piece * units[name]).reshape(shape))
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def flat(arrays: Mapping[str, Array], exponent: int) -> np.ndarray:
        host = {name: backend.to_numpy(arrays[name]).astype(np.float64) * units[name] ** exponent for name in shapes}
        return np.concatenate([host[name].reshape(-1) for name in shapes])

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        arrays = arrays_of(theta)
        x = network.whole(backend, arrays)
        left = projection(x) - y
        # Divide twice by the norm: its square may overflow.
        relative = left * (1.0 / norm)
        gradient = network.adjoint(backend, arrays, projection.adjoint(relative, at=x) * (2.0 / norm))
        return algebra.squares(relative), flat(gradient, 1)

    seen = 0

    def step(intermediate_result: object) -> None:
        nonlocal seen
        seen += 1
        watch(seen, max(0.0, float(getattr(intermediate_result, "fun", 0.0))) ** 0.5)

    with np.errstate(over="ignore", invalid="ignore"):  # the line search backtracks from a step that overflows
        found = minimize(
            value, flat(start, -1), jac=True, method="L-BFGS-B", callback=step,
            options={"maxiter": limits.iterations, "ftol": limits.tol**2, "gtol": 0.0},
        )  # fmt: skip
    return Fit(arrays_of(found.x), False, int(found.nit), "L-BFGS")

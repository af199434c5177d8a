"""Refinement by gradients: L-BFGS on all arrays at once, for a nonlinear F and for Hadamard products.

The gradient goes through the adjoints of F at a point and of the network. The few parameters are SciPy's, in float64 on
the host; all that is long stays where it is.
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
    """Arrays with which F of the network is nearer to a vector than where they start.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    projection : Projection
        Of any kind.
    y : array, shape (n_out,)
        What ``F(x)`` is to be: of a nonlinear F, the update plus ``F(x_start)``.
    start : mapping of str to array
    limits : Limits
    watch : callable
        Called with each iteration's number and error relative to y.

    Returns
    -------
    Fit

    Notes
    -----
    Byrd, Lu, Nocedal & Zhu (1995), as SciPy has it. An evaluation is F and the network forth and back.
    """
    from scipy.optimize import minimize

    backend, shapes = algebra.backend, network.shapes
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    norm = algebra.norm(y)
    # Arrays of any size are of one to the method.
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
        # Divided one by one: the square of the norm may be beyond every number.
        relative = left * (1.0 / norm)
        gradient = network.adjoint(backend, arrays, projection.adjoint(relative, at=x) * (2.0 / norm))
        return algebra.squares(relative), flat(gradient, 1)

    seen = 0

    def step(intermediate_result: object) -> None:
        nonlocal seen
        seen += 1
        watch(seen, max(0.0, float(getattr(intermediate_result, "fun", 0.0))) ** 0.5)

    with np.errstate(over="ignore", invalid="ignore"):  # a step too far is taken back
        found = minimize(
            value, flat(start, -1), jac=True, method="L-BFGS-B", callback=step,
            options={"maxiter": limits.iterations, "ftol": limits.tol**2, "gtol": 0.0},
        )  # fmt: skip
    return Fit(arrays_of(found.x), False, int(found.nit), "L-BFGS")

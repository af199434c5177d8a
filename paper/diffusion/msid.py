"""MSID: a distance between the shapes of two point clouds, from heat diffusion on their neighborhood graphs.

Tsitsulin, Munkhoeva, Mottin, Karras, Bronstein, Oseledets and Müller, "The Shape of Data: Intrinsic Distance for Data
Distributions" (ICLR 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from tnadapt.errors import ShapeError

__all__ = ["heat_trace", "msid"]

NEIGHBOURS = 5
# Up to this many points all eigenvalues are computed (2 s on one core); beyond, the trace is estimated.
EXACT = 2048
STEPS, PROBES = 10, 100


def msid(first: ArrayLike, second: ArrayLike, neighbors: int = NEIGHBOURS, seed: int = 0) -> float:
    """Compute the intrinsic distance of two sets of points, whose dimensions may differ.

    ``10^6 max over t of exp(-2 (t + 1/t)) |h_1(t) - h_2(t)|``, where h is :func:`heat_trace` and t has 256
    logarithmically spaced values from 0.1 to 10. (The factor of a million is the authors', for comparable numbers.)

    Parameters
    ----------
    first : array_like, shape (n, d)
    second : array_like, shape (m, e)
    neighbors : int
        Neighbors of each point in the graph.
    seed : int
        Seed of the estimate, for more than 2,048 points.

    Returns
    -------
    float
        0 for the same shape.

    Raises
    ------
    ShapeError
        If one is not a matrix with more points than neighbors.

    Notes
    -----
    Costs O(n^3) up to 2,048 points; beyond, 1,000 products of a sparse matrix of about 2 n k numbers.

    Examples
    --------
    A rotated and shifted cloud has the same shape; points on a circle have another:

    >>> points = np.random.default_rng(0).normal(size=(200, 2))
    >>> angle = np.random.default_rng(1).uniform(0, 6.28, 200)
    >>> bool(msid(points, points @ [[0, 1], [-1, 0]] + 3) < 1e-6)
    True
    >>> bool(msid(points, np.stack([np.cos(angle), np.sin(angle)], 1)) > 100)
    True
    """
    times = np.logspace(-1, 1, 256)
    traces = [heat_trace(points, times, neighbors, seed) for points in (first, second)]
    return float(1e6 * np.max(np.exp(-2 * (times + 1 / times)) * np.abs(traces[0] - traces[1])))


def heat_trace(
    points: ArrayLike, times: ArrayLike, neighbors: int = NEIGHBOURS, seed: int = 0, exact: bool | None = None
) -> NDArray[np.float64]:
    """Compute ``trace(exp(-t L)) / n``, the mean heat that stays at its node, on the nearest-neighbor graph.

    L is the normalized Laplacian ``1 - D^(-1/2) A D^(-1/2)``; A joins two points if one is among the nearest neighbors
    of the other.

    Parameters
    ----------
    points : array_like, shape (n, d)
    times : array_like, shape (k,)
    neighbors, seed
        As in :func:`msid`.
    exact : bool, optional
        Whether to use all eigenvalues rather than an estimate by stochastic Lanczos quadrature (10 steps from 100
        vectors of signs); by default it depends on the number of points.

    Returns
    -------
    ndarray of float64, shape (k,)

    Raises
    ------
    ShapeError
        If it is not a matrix with more points than neighbors.

    Examples
    --------
    With 6 points and 5 neighbors each, all points are joined: eigenvalues 0 and five times 6/5.

    >>> found = heat_trace(np.eye(6), [1.0])
    >>> np.allclose(found, (1 + 5 * np.exp(-6 / 5)) / 6)
    True
    """
    points, times = np.asarray(points, np.float64), np.asarray(times, np.float64)
    if points.ndim != 2 or len(points) <= neighbors:
        raise ShapeError(f"expected a matrix of more than {neighbors} points; got shape {points.shape}")
    laplacian = _laplacian(points, neighbors)
    if len(points) <= EXACT if exact is None else exact:
        values = np.linalg.eigvalsh(laplacian.toarray())
        return np.asarray(np.exp(-np.outer(times, values)).mean(1))
    return _estimated(laplacian, times, np.random.default_rng(seed))


def _laplacian(points: NDArray[np.float64], neighbors: int) -> Any:
    count = len(points)
    # A point is not its own neighbor, and among coinciding points it need not be the first one found.
    _, near = cKDTree(points).query(points, neighbors + 1)
    own = near == np.arange(count)[:, None]
    own[~own.any(1), -1] = True
    near = near[~own].reshape(count, neighbors)
    rows = np.repeat(np.arange(count), neighbors)
    joined = scipy.sparse.csr_matrix((np.ones(rows.size), (rows, near.reshape(-1))), (count, count))
    joined = joined.maximum(joined.T)
    root = scipy.sparse.diags(1 / np.sqrt(np.asarray(joined.sum(1)).reshape(-1)))
    return (scipy.sparse.identity(count) - root @ joined @ root).tocsr()


def _estimated(matrix: Any, times: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """Estimate the trace by Gauss quadrature from a Lanczos tridiagonal matrix per probe (Ubaru, Chen and Saad 2017).

    Only the difference of exp(-t x) from its parabola at x = 1 is estimated. The parabola is exact: the mean eigenvalue
    is 1, and the mean of (x - 1)^2 is the sum of the squared off-diagonal elements, divided by n.
    """
    count = matrix.shape[0]
    beside_diagonal = (matrix - scipy.sparse.identity(count)).power(2).sum() / count
    still = np.exp(-times)
    found = np.zeros(len(times))
    for _ in range(PROBES):
        vector = random.choice((-1.0, 1.0), count) / np.sqrt(count)
        basis, diagonal, beside = [vector], [], []
        for step in range(STEPS):
            product = matrix @ basis[-1]
            diagonal.append(float(basis[-1] @ product))
            for one in (*basis, *basis):  # orthogonalize twice: one pass leaves cancellation errors
                product = product - (one @ product) * one
            length = float(np.linalg.norm(product))
            if step == STEPS - 1 or length < 1e-12:
                break
            beside.append(length)
            basis.append(product / length)
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside)
        away = np.outer(times, values - 1)
        found += (still[:, None] * (np.exp(-away) - 1 + away - away**2 / 2)) @ vectors[0] ** 2
    parabola: NDArray[np.float64] = still * (1 + times**2 * beside_diagonal / 2)
    return found / PROBES + parabola

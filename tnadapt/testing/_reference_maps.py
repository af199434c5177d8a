"""Reference of the maps F: the dense matrix of each, and tanhshrink, in float64 NumPy. See ``_reference``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra import rng
from tnadapt.algebra.maps import KINDS, Chain, Map, PerWeight, make_map
from tnadapt.errors import ConfigError

__all__ = ["LINEAR_PARTS", "matrix", "matrix_of", "tanhshrink"]

# The longest side of a dense matrix of F: half a gigabyte.
LARGEST = 1 << 13

Float = NDArray[np.floating[Any]]

# The linear map before tanhshrink, for each nonlinear kind.
LINEAR_PARTS = {"nonlinear": "linear", "nonlinear_v2": "linear_v2"}


def matrix_of(found: Map) -> Float:
    """Return the dense matrix of a linear map, or of the linear part of a nonlinear one.

    Parameters
    ----------
    found : Map

    Returns
    -------
    ndarray of float64, shape (n_out, n_in)

    Notes
    -----
    That of a chain is the product of its maps', and that of a map of each weight has theirs on its diagonal. Maps other
    than the paper's define their own, independently of what they compute with.

    Examples
    --------
    >>> matrix_of(make_map(("shuffle", "shuffle"), 3, 3)).sum(axis=0)
    array([1., 1., 1.])
    """
    if isinstance(found, Chain):
        product = matrix_of(found.parts[0])
        for part in found.parts[1:]:
            product = matrix_of(part) @ product
        return product
    if isinstance(found, PerWeight):
        from scipy.linalg import block_diag

        return np.asarray(block_diag(*map(matrix_of, found.parts)))
    if found.kind in KINDS:
        return matrix(found.kind, found.n_in, found.n_out, found.seed, found.group)
    _check_small(found.n_in, found.n_out)
    return np.asarray(found.linear_part.matrix(), np.float64)


def _check_small(n_in: int, n_out: int) -> None:
    if max(n_in, n_out) > LARGEST:
        raise ConfigError(
            f"the dense matrix of F has {n_out} x {n_in} elements; it is for checking small ones, of up to {LARGEST} "
            "per side: give smaller shapes, or more groups"
        )


def matrix(kind: str, n_in: int, n_out: int, seed: int = 0, group: int = 0) -> Float:
    """Return the dense matrix of a linear F, or of the linear part of a nonlinear one.

    Parameters
    ----------
    kind : str
        As for :class:`tnadapt.Projection`.
    n_in, n_out, seed, group : int

    Returns
    -------
    ndarray of float64, shape (n_out, n_in)

    Raises
    ------
    ConfigError
        If a side is longer than 2**13, or there is no reference of that kind.

    Notes
    -----
    ``diag(B) H[:n] Π diag(G) H[:, :n_in]``: the transpose of the paper's equation (4), which applies F from the right.
    H is ``scipy.linalg.hadamard``.

    Examples
    --------
    >>> matrix("shuffle", 4, 4, seed=0)
    array([[0., 0., 0., 1.],
           [0., 1., 0., 0.],
           [0., 0., 1., 0.],
           [1., 0., 0., 0.]])
    """
    from scipy.linalg import hadamard

    _check_small(n_in, n_out)
    kind = LINEAR_PARTS.get(kind, kind)
    if kind not in KINDS:
        return np.asarray(make_map(kind, n_in, n_out, seed, group).matrix(), np.float64)
    if kind == "identity":
        return np.eye(n_out)
    if kind == "shuffle":
        return np.eye(n_out)[rng.permutation(n_out, seed, group)]
    if kind not in ("linear", "linear_v2"):
        raise ConfigError(f"there is no reference implementation of the map {kind!r}: add its matrix here")
    length = 2 ** math.ceil(math.log2(max(n_in, n_out)))
    h = hadamard(length) / math.sqrt(length)
    g = rng.normals(seed, group, rng.PURPOSE["gaussian"], 0, length).astype(np.float64)
    permuted = (g[:, None] * h[:, :n_in])[rng.permutation(length, seed, group)]
    if kind.endswith("_v2"):
        b = rng.normals(seed, group, rng.PURPOSE["gaussian_v2"], 0, n_out).astype(np.float64)
    else:
        b = rng.signs(seed, group, 0, n_out).astype(np.float64)
    return np.asarray(b[:, None] * (h @ permuted)[:n_out])


def tanhshrink(t: Float) -> Float:
    """Compute ``t - tanh(t)``; near 0 by a series of ``(t cosh t - sinh t) / cosh t``, whose terms do not cancel.

    Examples
    --------
    >>> tanhshrink(np.array([1e-5, 5.0]))
    array([3.33333333e-16, 4.00009080e+00])
    """
    near = np.where(np.abs(t) < 3.0, t, 0.0)
    terms = [2 * k * near ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(1, 26)]
    return np.asarray(np.where(np.abs(t) < 3.0, sum(terms) / np.cosh(near), t - np.tanh(t)))

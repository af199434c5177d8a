"""SVD and QR of base weights, with results that do not depend on the LAPACK: for sources and starts (PiSSA, OLoRA)."""

from __future__ import annotations

import numpy as np

from tnadapt.errors import ConfigError, warn

# LAPACKs agree on a singular subspace but not on the singular vectors, whose signs and, where singular values are
# close, directions are arbitrary. So a subspace is computed here and given a basis that depends on it alone: the
# projection of the seeded normal numbers onto it, orthonormalized. Rounding errors change that basis by about 1e-12
# where the subspace is well separated.


#: Passes of the iteration, each a multiplication by the matrix and by its transpose.
PASSES = 4
#: Passes for a start of training, which needs the vectors and values themselves.
START_PASSES = 16
#: Columns that are iterated in addition to those wanted.
OVERSAMPLING = 8
# Singular values closer than this, relative to the larger one, leave the single vectors undetermined.
_TIE = 1e-4
# With a gap below this, relative to the larger value, float64 rounding errors turn a subspace visibly in float32.
_LOST = 1e-8
# Singular values below this, relative to the largest one, are rounding errors of a float32 weight.
_NOISE = 1e-9


def dominant_basis(matrix: np.ndarray, normals: np.ndarray, rank: int, vectors: bool, what: str) -> np.ndarray:
    """Return an orthonormal basis of the subspace of the ``rank`` largest left singular values.

    Parameters
    ----------
    matrix : ndarray of float64, shape (d, n)
    normals : ndarray of float64, shape (d, min(rank + OVERSAMPLING, d))
        Start of the iteration.
    rank : int
        At most ``min(d, n)``.
    vectors : bool
        Whether to return the singular vectors themselves, each with its largest entry positive.
    what : str
        Name of the array, for messages.

    Returns
    -------
    ndarray of float64, shape (d, rank)

    Raises
    ------
    ConfigError
        If the matrix has NaN or infinity, or fewer than ``rank`` singular values above rounding errors.

    Warns
    -----
    UserWarning
        If ``vectors`` and two neighboring singular values are nearer than 1e-4, or if the last value of the subspace is
        nearer than 1e-8 to the next one.

    Notes
    -----
    ``PASSES`` passes of ``Q <- qr(A Aᵀ Q)`` with ``rank + OVERSAMPLING`` columns; all of min(d, n), where that many are
    needed, give the subspace exactly. Cost: ``2 d n (rank + OVERSAMPLING)`` multiply-adds a pass.

    Examples
    --------
    >>> matrix = np.diag([3.0, 2.0, 1.0])
    >>> dominant_basis(matrix, np.ones((3, 3)) + np.eye(3), 2, True, "factor0").round(6) + 0.0  # no -0
    array([[1., 0.],
           [0., 1.],
           [0., 0.]])
    """
    largest = max(float(np.max(matrix)), -float(np.min(matrix)))
    if not np.isfinite(largest):
        raise ConfigError(f"{what} is computed from the base weight, which holds NaN or infinity")
    width = min(rank + OVERSAMPLING, *matrix.shape)
    # Only float64 weights can have squares that overflow or underflow.
    scaled = matrix if 1e-60 < largest < 1e60 or largest == 0.0 else matrix / largest
    q = _iterated(scaled, normals[:, :width], PASSES)
    # Rayleigh-Ritz: the singular vectors of the part of the matrix in that space.
    left, values, _ = np.linalg.svd(q.T @ scaled, full_matrices=False)
    if values[rank - 1] <= _NOISE * values[0]:
        raise ConfigError(
            f"{what} needs {rank} singular vectors of the base weight, which has only "
            f"{int((values > _NOISE * values[0]).sum())} singular values above rounding errors: use a smaller rank"
        )
    basis = q @ left[:, :rank]
    if not vectors:
        if rank < len(values) and values[rank - 1] - values[rank] < _LOST * values[rank - 1]:
            warn(
                f"{what} takes singular vectors of a base weight up to a value that is nearer than {_LOST:g} to the "
                "next one: another machine may take another part. Save with store_bases=True, or use another rank",
            )
        return orthonormal(basis @ (basis.T @ normals[:, :rank]))
    values = values[: rank + 1]
    if _tied(values):
        warn(
            f"{what} takes single singular vectors of a base weight, two of whose singular values are nearer than "
            f"{_TIE:g}: another machine may compute other vectors. Save with store_bases=True, or use vectors=False",
        )
    return np.asarray(basis * _signs(basis))


def _tied(values: np.ndarray) -> bool:
    """Return whether two neighbors in a descending sequence of singular values are closer than 1e-4."""
    return bool((values[:-1] - values[1:] < _TIE * values[:-1]).any())


Triples = tuple[np.ndarray, np.ndarray, np.ndarray]


def dominant_svd(matrix: np.ndarray, normals: np.ndarray, rank: int, what: str) -> Triples:
    """Return the ``rank`` largest singular values with their vectors, by ``START_PASSES`` passes.

    Parameters
    ----------
    matrix : ndarray of float64, shape (d, n)
        Finite.
    normals : ndarray of float64, shape (d, width)
        Start of the iteration; of ``min(d, n)`` columns, it gives the decomposition itself.
    rank : int
        At most ``width``.
    what : str
        Name of what is computed, for messages.

    Returns
    -------
    (ndarray, ndarray, ndarray)
        Left vectors (d, rank), the largest entry of each positive; values; right vectors (n, rank).

    Raises
    ------
    ConfigError
        If the matrix has fewer than ``rank`` singular values above rounding errors.

    Warns
    -----
    UserWarning
        If the smallest value taken and the largest one left out are nearer than 1e-4.

    Examples
    --------
    >>> left, values, right = dominant_svd(np.diag([3.0, 2.0, 1.0]), np.ones((3, 3)) + np.eye(3), 2, "x")
    >>> ((left * values) @ right.T).round(6) + 0.0  # no -0
    array([[3., 0., 0.],
           [0., 2., 0.],
           [0., 0., 0.]])
    """
    largest = float(np.abs(matrix).max())
    scaled = matrix / (largest or 1.0)
    q = _iterated(scaled, normals, START_PASSES)
    inner, values, right = np.linalg.svd(q.T @ scaled, full_matrices=False)
    return _signed(q @ inner, largest * values, right.T, slice(0, rank), what)


def minor_svd(matrix: np.ndarray, rank: int, what: str) -> Triples:
    """Return the ``rank`` smallest singular values with their vectors, like :func:`dominant_svd`, from LAPACK.

    Examples
    --------
    >>> minor_svd(np.diag([3.0, 2.0]), 1, "x")[1]
    array([2.])
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return _signed(left, values, right.T, slice(len(values) - rank, None), what)


def leading_qr(matrix: np.ndarray, rank: int, what: str) -> np.ndarray:
    """Return Q of the QR decomposition of the first ``rank`` columns, for a positive diagonal of R.

    Raises
    ------
    ConfigError
        If these columns are linearly dependent up to rounding errors, so that Q is not determined.

    Examples
    --------
    >>> leading_qr(np.diag([-3.0, 2.0]), 1, "x") + 0.0  # no -0
    array([[-1.],
           [ 0.]])
    """
    first = matrix[:, :rank]
    q = orthonormal(first)
    diagonal = np.abs(np.diagonal(q.T @ first))
    if diagonal.min() <= _NOISE * diagonal.max():
        raise ConfigError(
            f"{what} needs the first {rank} columns of the base weight to be linearly independent, and only "
            f"{int((diagonal > _NOISE * diagonal.max()).sum())} are: use a smaller rank, or start='pissa'"
        )
    return q


def _signed(left: np.ndarray, values: np.ndarray, right: np.ndarray, part: slice, what: str) -> Triples:
    """Return some of the triplets, with the largest entry of each left vector positive."""
    selected = values[part]
    if selected[-1] <= _NOISE * values[0]:
        raise ConfigError(
            f"{what} needs {len(selected)} singular values of the base weight that are not zero, and only "
            f"{int((values > _NOISE * values[0]).sum())} are above rounding errors: use a smaller rank, or start='zero'"
        )
    first = part.start or 0
    edge = first or first + len(selected)
    if edge < len(values) and _tied(values[edge - 1 : edge + 1]):
        warn(
            f"{what} takes singular vectors of a base weight up to a value that is nearer than {_TIE:g} to the next "
            "one: another machine may take another part. Save with store_bases=True",
        )
    signs = _signs(left[:, part])
    return left[:, part] * signs, selected, right[:, part] * signs


def _iterated(matrix: np.ndarray, normals: np.ndarray, passes: int) -> np.ndarray:
    """Return an orthonormal basis after some passes of the iteration, or without any for the whole space."""
    q = orthonormal(normals)
    for _ in range(passes if q.shape[1] < len(matrix) else 0):
        q = orthonormal(matrix @ (matrix.T @ q))
    return q


def orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Return the Q of the QR decomposition whose R has a positive diagonal."""
    q, r = np.linalg.qr(matrix)
    return np.asarray(q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0))


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Return the signs that make the largest entry of each column positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.where(vectors[largest, np.arange(vectors.shape[1])] < 0.0, -1.0, 1.0)

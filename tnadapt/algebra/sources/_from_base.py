"""Sources that compute an array from the base weights, by their singular vectors; SVD and QR of a weight for starts."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from tnadapt.algebra import rng
from tnadapt.errors import ConfigError, safe_repr, warn

from ._source import Place, Source, Stream

# -- Dominant singular subspaces of a matrix, by subspace iteration from seeded normal numbers in float64 --------------

# LAPACKs agree on a singular subspace and not on the singular vectors, whose signs and, where singular values are
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
# A gap below this, relative to the larger value, lets rounding errors of float64 turn a subspace by what float32 shows.
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
    # Only float64 weights can be so large or small that their squares overflow or underflow.
    scaled = matrix if 1e-60 < largest < 1e60 or largest == 0.0 else matrix / largest
    q = _orthonormal(normals[:, :width])
    if width < matrix.shape[0]:
        for _ in range(PASSES):
            q = _orthonormal(scaled @ (scaled.T @ q))
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
        return _orthonormal(basis @ (basis.T @ normals[:, :rank]))
    values = values[: rank + 1]
    if _tied(values):
        warn(
            f"{what} takes single singular vectors of a base weight, two of whose singular values are nearer than "
            f"{_TIE:g}: another machine may compute other vectors. Save with store_bases=True, or use vectors=False",
        )
    return np.asarray(basis * _signs(basis))


def _tied(values: np.ndarray) -> bool:
    """Return whether two neighboring singular values, of a falling sequence, are nearer than 1e-4."""
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
    q = _orthonormal(normals)
    if q.shape[1] < matrix.shape[0]:
        for _ in range(START_PASSES):
            q = _orthonormal(scaled @ (scaled.T @ q))
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
    q = _orthonormal(first)
    diagonal = np.abs(np.diagonal(q.T @ first))
    if diagonal.min() <= _NOISE * diagonal.max():
        raise ConfigError(
            f"{what} needs the first {rank} columns of the base weight to be linearly independent, and only "
            f"{int((diagonal > _NOISE * diagonal.max()).sum())} are: use a smaller rank, or start='pissa'"
        )
    return q


def _signed(left: np.ndarray, values: np.ndarray, right: np.ndarray, part: slice, what: str) -> Triples:
    """Return some of the triples, each with the largest entry of its left vector positive."""
    selected = values[part]
    if selected[-1] <= _NOISE * values[0]:
        raise ConfigError(
            f"{what} needs {len(selected)} singular values of the base weight that are not zero, and only "
            f"{int((values > _NOISE * values[0]).sum())} are above rounding errors: use a smaller rank, or start='zero'"
        )
    first = part.start or 0
    edge = first or first + len(selected)
    if 0 < edge < len(values) and _tied(values[edge - 1 : edge + 1]):
        warn(
            f"{what} takes singular vectors of a base weight up to a value that is nearer than {_TIE:g} to the next "
            "one: another machine may take another part. Save with store_bases=True",
        )
    signs = _signs(left[:, part])
    return left[:, part] * signs, selected, right[:, part] * signs


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Return the Q of the QR decomposition whose R has a positive diagonal."""
    q, r = np.linalg.qr(matrix)
    return np.asarray(q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0))


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Return the signs that make the largest entry of each column positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.where(vectors[largest, np.arange(vectors.shape[1])] < 0.0, -1.0, 1.0)


# -- Factors: bases of the base's dominant singular subspaces ----------------------------------------------------------


_SIDES = ("rows", "cols", "mode")


@dataclasses.dataclass(frozen=True)
class FromBase(Source):
    """A frozen factor: an orthonormal basis of a dominant singular subspace of the group's base weights.

    Parameters
    ----------
    side : {"rows", "cols", "mode"}
        ``"rows"`` for left, ``"cols"`` for right singular vectors of the weight, or of a stack of weights (weights,
        rows, cols) unfolded along that mode. ``"mode"`` is the array's own mode, of a tensor of any order (HOSVD).
    vectors : bool
        Whether the columns are the singular vectors themselves, from the largest singular value down, each with its
        largest entry positive. By default the columns are another basis of the same subspace, which does not depend on
        the machine's LAPACK.

    Raises
    ------
    ConfigError
        If the side is unknown or ``vectors`` is not a boolean.

    Notes
    -----
    The subspace has as many dimensions as the array has columns. It is computed in float64 by
    four passes of subspace iteration from seeded normal numbers (:func:`dominant_basis`) and rounded
    to float32: the same bits on one machine, and equal to about 1e-6 between machines. It costs ``8 d n (r + 8)``
    multiply-adds for a weight of d × n.

    A plan counts without the base weights; arrays need them: :meth:`tnadapt.SuperLoRA.with_base`.
    :func:`tnadapt.torch.attach` takes them from the model. A file stores the fingerprint of the base, or, with
    ``save(…, store_bases=True)``, the arrays.

    Examples
    --------
    LoRA-XS, which trains an r × r matrix between them:

    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.sources import FromBase
    >>> bases = {"factor0": FromBase("rows"), "factor1": FromBase("cols")}
    >>> config = tna.Config(format="tucker", rank=2, sources=bases)
    >>> plan = tna.SuperLoRA(config, [(6, 4)]).with_base([np.arange(24.0).reshape(6, 4) ** 2])
    >>> plan.param_shapes, plan.deltas({"group0.split0.core": np.eye(2)})[0].shape
    ({'group0.split0.core': (2, 2)}, (6, 4))
    """

    side: str
    vectors: bool = False

    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.side, str) or self.side not in _SIDES:
            raise ConfigError(f"side must be one of {', '.join(map(repr, _SIDES))}; got {safe_repr(self.side)}")
        if not isinstance(self.vectors, bool):
            raise ConfigError(f"vectors must be True or False; got {safe_repr(self.vectors)}")

    def _mode(self, place: Place) -> int:
        """Return the mode along which the base is unfolded."""
        order = len(place.sizes)
        if self.side == "mode":
            assert place.mode is not None  # checked before
            return place.mode
        if order not in (2, 3):
            raise ConfigError(
                f"FromBase({self.side!r}) needs matrices, or a stack (weights, rows, cols), and the group is folded to "
                f"{place.sizes}: use FromBase('mode')"
            )
        return order - (2 if self.side == "rows" else 1)

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if place.projection:
            raise ConfigError(
                f"FromBase makes {place.name!r} of the base weights, and a projection follows the network, so that the "
                "two have no rows and columns in common: use projection='identity'"
            )
        if place.mode is None:
            raise ConfigError(
                f"FromBase makes factors of shape (size of a mode, rank), and {place.name!r} of shape {place.shape} is "
                "none: use format='cp', 'cp-weighted' or 'tucker' with splits=1 or combine='hadamard'"
            )
        mode = self._mode(place)
        size, rank = place.shape
        if size != place.sizes[mode]:
            raise ConfigError(
                f"FromBase({self.side!r}) gives vectors of {place.sizes[mode]} elements, and {place.name!r} has "
                f"{size} rows: use the other side, or 'mode'"
            )
        most = min(size, math.prod(place.sizes) // size)
        if rank > most:
            raise ConfigError(
                f"FromBase({self.side!r}) needs {rank} singular vectors for {place.name!r}, and a base weight folded "
                f"to {place.sizes} has {most} at most along that mode: use rank={most} or less"
            )

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        assert stream.base is not None  # the plan gives it to a source that needs it
        base = stream.base
        order = base.ndim
        mode = stream.mode if self.side == "mode" else order - (2 if self.side == "rows" else 1)
        assert mode is not None  # checked by the plan
        matrix = np.moveaxis(base, mode, 0).reshape(base.shape[mode], -1)
        rows, rank = shape
        width = min(rank + OVERSAMPLING, rows)
        drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, rows * width)
        normals = drawn.astype(np.float64).reshape(rows, width)
        what = f"FromBase({self.side!r}) of group {stream.group}"
        return dominant_basis(matrix, normals, rank, self.vectors, what).astype(np.float32)

    def mean_square(self, shape: tuple[int, ...]) -> float:
        """See :meth:`Source.mean_square`: the columns have norm 1."""
        return 1.0 / shape[0]


# -- The core of the higher-order singular value decomposition of the base ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class BaseCore(Source):
    """The core of a Tucker decomposition of the group's base weights: ``W ×_0 U_0ᵀ ×_1 U_1ᵀ …``.

    The factors U of all modes are computed from the base, too: ``FromBase("mode")``, or :class:`Mixed` of it. With
    orthonormal factors, ``core ×_0 U_0 ×_1 U_1 …`` is the projection of the base weights to their subspaces: the
    truncated higher-order SVD, or CRAFT's frozen tensor. Computed in float64 from the factors in float32, and rounded.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.sources import BaseCore, FromBase, Mixed
    >>> sources = {"core": BaseCore(), "factor0": Mixed(FromBase("rows")), "factor1": FromBase("cols")}
    >>> plan = tna.SuperLoRA(tna.Config(format="tucker", rank=2, sources=sources), [(6, 4)])
    >>> plan = plan.with_base([np.diag([3.0, 2.0, 1.0, 0.5, 0.0, 0.0])[:, :4]])
    >>> plan.param_shapes
    {'group0.split0.factor0.mix': (2, 2)}
    >>> plan.deltas({"group0.split0.factor0.mix": np.eye(2)})[0].diagonal().round(4)[:2].tolist()
    [3.0, 2.0]
    """

    needs_base: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if place.projection:
            raise ConfigError(
                f"BaseCore makes {place.name!r} of the base weights, and a projection follows the network, so that the "
                "two have no rows and columns in common: use projection='identity'"
            )
        if place.name.rpartition(".")[2] != "core" or len(place.shape) != len(place.sizes):
            raise ConfigError(
                f"BaseCore is for the core of format='tucker'; {place.name!r} has the shape {place.shape}"
            )

    def expected_square(self, shape: tuple[int, ...]) -> float:
        """See :meth:`Source.expected_square`: every slice of the first mode has singular values of 1."""
        return 1.0 / max(shape[1:] or shape)

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        assert stream.base is not None  # the plan gives both to a source that needs them
        core = stream.base
        for mode, factor in stream.factors.items():
            wide = factor.astype(np.float64)
            core = np.moveaxis(np.tensordot(wide.T, core, axes=(1, mode)), 0, mode)
        return np.ascontiguousarray(core, np.float32)

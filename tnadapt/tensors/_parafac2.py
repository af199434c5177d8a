"""``parafac2``: decompose matrices with the same columns, but rows of their own, into components that they share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, get_backend
from tnadapt.decomposition.block_passes import khatri_rao_product
from tnadapt.decomposition.cp_als import MOVED, Products, fit_cp_by_products
from tnadapt.decomposition.fits import Callback, Fit, FitOutcome, Iteration, limits_of
from tnadapt.decomposition.linear_algebra import Algebra, double_on_host, refuse_trace
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._decomposed import CPTensor, Result
from ._requests import (
    alike,
    as_tensor,
    as_tensors,
    exponent_of,
    finite,
    integer_of,
    mode_of,
    normal,
    scaled_by,
    seed_of,
    setting_of,
)

# -- The result --------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    weights: Array
    factors: list[Array]
    projections: list[Array]


class Parafac2Tensor(Result, _Parts):
    """Matrices ``projections[k] @ B @ diag(weights * A[k]) @ C.T``, where ``A, B, C = factors``.

    The cross products ``(projections[k] @ B).T @ (projections[k] @ B)`` are the same for all k. Unpacks as ``weights,
    factors, projections``, like TensorLy's Parafac2Tensor, which takes it. It is multiplied by numbers.

    Parameters
    ----------
    weights : array, shape (r,), or None
        None stands for ones.
    factors : sequence of array, shapes (K, r), (r, r) and (J, r)
    projections : sequence of array, shape (I_k, r)
        K matrices with orthonormal columns, which is not checked.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If the shapes do not go together.
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> factors = [np.ones((2, 1)), np.ones((1, 1)), np.ones((2, 1))]
    >>> result = Parafac2Tensor(None, factors, [np.ones((1, 1)), np.eye(4, 1)])
    >>> result.rank, [matrix.shape for matrix in result.to_tensors()], result.slice(0)
    (1, [(1, 2), (4, 2)], array([[1., 1.]]))
    >>> float(result.norm()), (3 * result).slice(0)
    (2.0, array([[3., 3.]]))
    """

    @checks_arguments
    def __new__(cls, weights: Any, factors: Sequence[Any], projections: Sequence[Any]) -> Self:
        factors, projections = as_tensors(factors, "factors")[1], as_tensors(projections, "projections")[1]
        backend = get_backend(*factors, *projections)
        alike(factors, 1, "PARAFAC2 factor")
        alike(projections, 1, "matrix of projections")
        rank, shapes = int(factors[0].shape[1]), [tuple(factor.shape) for factor in factors]
        sizes = len(projections), int(projections[0].shape[1])
        if len(factors) != 3 or shapes[:2] != [sizes, (rank, rank)]:
            raise ShapeError(
                "a PARAFAC2 tensor has factors of shapes (K, r), (r, r) and (J, r), and K projections with r columns; "
                f"got {sizes[0]} projections with {sizes[1]} columns, and shapes {', '.join(map(str, shapes))}"
            )
        if weights is None:
            weights = backend.sum(factors[1] * 0.0, axis=0) + 1.0
        weights = as_tensor(weights, "weights")[1]
        get_backend(factors[0], weights)
        if tuple(weights.shape) != (rank,):
            raise ShapeError(f"PARAFAC2 weights have shape {tuple(weights.shape)}; expected ({rank},)")
        return cls.of(backend, (weights, factors, projections))

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.factors[0].shape[1])

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the matrices."""
        columns = int(self.factors[2].shape[0])
        return tuple((int(projection.shape[0]), columns) for projection in self.projections)

    @property
    def size(self) -> int:
        """Number of elements of all matrices."""
        return sum(rows * columns for rows, columns in self.shape)

    @property
    def arrays(self) -> list[Array]:
        return [self.weights, *self.factors, *self.projections]

    def norm(self) -> Array:
        """Compute the Frobenius norm of all matrices together, without forming them.

        Returns
        -------
        array
            Without axes; differentiable. That of the tensor with the matrices ``B @ diag(weights * A[k]) @ C.T``, since
            the columns of projections are orthonormal.
        """
        return CPTensor(self.weights, self.factors).norm()

    def _times(self, number: Any) -> Self:
        return type(self)(self.weights * number, self.factors, self.projections)

    def __add__(self, other: Any) -> Any:
        # Sums have no such form; a tuple would be joined to another one.
        return NotImplemented

    def slice(self, number: int) -> Array:
        """Form one of the matrices, shape (I_k, J), by its number from 0 to K - 1."""
        backend, (a, b, c) = self.backend, self.factors
        k = integer_of("number", number, 0, len(self.projections) - 1)
        return backend.matmul(
            backend.matmul(self.projections[k], b * (self.weights * a[k, :])), backend.matrix_transpose(c)
        )

    def to_tensors(self) -> list[Array]:
        """Form all matrices."""
        return [self.slice(number) for number in range(len(self.projections))]

    def to_tensor(self) -> Array:
        """Form the tensor of all matrices, shape (K, I, J); raise a ShapeError unless they have as many rows."""
        if len(set(self.shape)) > 1:
            raise ShapeError("the matrices differ in their numbers of rows, so they form no tensor: use to_tensors()")
        backend = self.backend
        return backend.concat([backend.reshape(matrix, (1, *matrix.shape)) for matrix in self.to_tensors()], axis=0)

    def _described(self) -> str:
        rows = sorted({rows for rows, _ in self.shape})
        span = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
        return f"{len(self.projections)} matrices of {span} rows and {self.shape[0][1]} columns"


# -- The decomposition -------------------------------------------------------------------------------------------------


@checks_arguments
def parafac2(
    slices: Any,
    rank: int,
    *,
    init: str = "svd",
    nonnegative: Collection[int] = (),
    starts: int = 3,
    random_state: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 1000,
    callback: Callback | None = None,
) -> Parafac2Tensor:
    """Decompose matrices ``X_k`` with the same columns into ``P_k B diag(A[k]) C.T``, with orthonormal ``P_k``.

    Parameters
    ----------
    slices : sequence of array, shape (I_k, J)
        K matrices, real or complex, whose numbers of rows may differ; or an array of shape (K, I, J).
    rank : int
        Number of components, at most the least number of rows and of columns.
    init : {"svd", "random"}
        Whether C starts from the leading right singular vectors of all matrices, with a little noise, or from normal
        numbers.
    nonnegative : collection of int
        Modes whose factors have no negative elements: 0 for A, 2 for C.
    starts : int
        Number of starts, the first by ``init`` and the others random; the best result is returned.
    random_state : int or Generator, optional
        Seed of random numbers.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps of each start.
    callback : callable, optional
        Called with the number of each sweep, counted through all starts, and the least relative error so far; stops the
        iteration if it returns True.

    Returns
    -------
    Parafac2Tensor
        ``weights, (A, B, C), projections``, whose factors have columns of norm 1 and whose weights are in descending
        order, in the slices' library, dtype and device.

    Raises
    ------
    ShapeError
        If the slices are no matrices with the same columns, hold NaN or infinity, or the rank is out of range.
    BackendError
        If they are not arrays of numbers of one library, are traced or require gradients, or are complex and
        ``nonnegative`` is given.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Kiers, ten Berge & Bro, "PARAFAC2, part I: a direct fitting algorithm" (J. Chemometrics 13, 1999), with extrapolated
    sweeps, in double precision on the host. Rows beyond J are compressed first, which costs ``J² sum(I_k)``
    multiply-adds and loses nothing; a sweep costs about ``4 K r min(I, J) J``. With four matrices or more, components
    are unique in general, up to their order and signs.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> profiles, loadings = rng.normal(size=(20, 2)), rng.normal(size=(5, 2))
    >>> slices = [np.roll(profiles, k, axis=0) * rng.uniform(1, 2, 2) @ loadings.T for k in range(6)]
    >>> slices[3] = np.concatenate([slices[3], np.zeros((4, 5))])  # four more rows
    >>> weights, (a, b, c), projections = parafac2(slices, 2)
    >>> a.shape, b.shape, c.shape, projections[3].shape
    ((6, 2), (2, 2), (5, 2), (24, 2))
    >>> parafac2(slices, 2).error < 1e-6
    True
    """
    listed = list(slices) if isinstance(slices, (list, tuple)) else _unstacked(slices)
    backend, matrices = as_tensors(listed, "slices")
    alike(matrices, 1, "slice")
    for number, matrix in enumerate(matrices):
        refuse_trace(backend, matrix, "parafac2()", "detach the slices")
        finite(backend, matrix, f"slice {number}")
        if backend.differentiates(matrix):
            raise BackendError("slices of parafac2() are not differentiated: detach them first, as in x.detach()")
    if init not in ("svd", "random"):
        raise ConfigError(f"init must be 'svd' or 'random'; got {safe_repr(init)}")
    columns = int(matrices[0].shape[1])
    most = min(columns, *(int(matrix.shape[0]) for matrix in matrices))
    if integer_of("rank", rank, 1) > most:
        raise ShapeError(f"rank {rank} is above {most}, the least number of rows or columns of a slice")
    bounded = {mode_of(mode, (len(matrices), rank, columns)) for mode in nonnegative}
    if 1 in bounded:
        raise ConfigError("nonnegative= takes the modes 0 and 2: rows of the mode 1 are those of P_k B, of any sign")
    if bounded and backend.is_complex(matrices[0]):
        raise BackendError("nonnegative= needs real slices: complex numbers are neither negative nor positive")
    steps, seed = Iteration(limits_of(tol, max_iterations), callback), seed_of(random_state)
    count = setting_of("starts", starts, 1, 1 << 20)
    algebra, hosts = Algebra(backend, matrices[0]), [double_on_host(backend, matrix) for matrix in matrices]
    # Of this power of two, so that no square overflows or vanishes.
    shift = max(map(exponent_of, hosts))
    stacks = _Slices([scaled_by(host, -shift) for host in hosts])
    if not stacks.norm:
        shapes = [(len(hosts), rank), (rank, rank), (columns, rank)]
        fit = Fit({f"factor{mode}": np.zeros(shape) for mode, shape in enumerate(shapes)}, True, 0, "zero", error=0.0)
    else:
        begun = _starts(stacks, rank, init, count, seed, bounded)
        fit = fit_cp_by_products(stacks.products(rank), begun, steps, nonnegative=bounded)
    weights, factors = CPTensor(None, list(fit.arrays.values())).truncated(rank)
    assert weights is not None
    found = Parafac2Tensor(weights, factors, stacks.projections(weights, factors))
    error = stacks.distance(found) / stacks.norm if stacks.norm else 0.0
    result = Parafac2Tensor(
        algebra.array(scaled_by(np.asarray(weights), shift)), [algebra.array(factor) for factor in factors],
        [algebra.array(projection) for projection in found.projections],
    )  # fmt: skip
    result.outcome = FitOutcome(
        error=error, bound=0.0, certified=error <= 64.0 * algebra.eps, stopped=fit.stopped, history=fit.history,
        method="nonnegative ALS" if bounded else "ALS",
    )  # fmt: skip
    return result


def _unstacked(slices: Any) -> list[Array]:
    """Return the matrices of an array of shape (K, I, J)."""
    tensor = as_tensor(slices, "slices")[1]
    if len(tensor.shape) != 3:
        raise ShapeError(
            f"slices must be a list of matrices or an array of shape (K, I, J); got shape {tuple(tensor.shape)}"
        )
    return [tensor[number, :, :] for number in range(int(tensor.shape[0]))]


def _rotated(matrices: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return the nearest matrices with orthonormal columns ``P_k``, for a stack of slices and their rows of A."""
    u, _, vh = np.linalg.svd((matrices @ c.conj()) * a.conj()[:, None, :] @ b.conj().T, full_matrices=False)
    return np.asarray(u @ vh)


class _Slices:
    """Slices whose rows beyond their number of columns are compressed, in one stack for each number of rows."""

    def __init__(self, matrices: Sequence[np.ndarray]) -> None:
        self.matrices = matrices
        self.norm = float(np.linalg.norm([float(np.linalg.norm(matrix)) for matrix in matrices]))
        small = [np.linalg.qr(x, mode="r") if x.shape[0] > x.shape[1] else x for x in matrices]
        places = {len(x): [k for k, y in enumerate(small) if len(y) == len(x)] for x in small}
        self.stacks = [(place, np.stack([small[k] for k in place])) for place in places.values()]

    def products(self, rank: int) -> Products:
        """Return what a fit takes from the tensor of the matrices ``P_kᴴ X_k``, whose norm is that of the slices."""
        shape = (len(self.matrices), rank, self.matrices[0].shape[1])

        def at(factors: Sequence[np.ndarray]) -> Products:
            a, b, c = factors
            rotations = [_rotated(stack, a[place], b, c) for place, stack in self.stacks]
            tensor = np.empty(shape, self.stacks[0][1].dtype)
            for (place, stack), rotation in zip(self.stacks, rotations, strict=True):
                tensor[place] = np.swapaxes(rotation.conj(), -1, -2) @ stack

            def distance(factors: Sequence[np.ndarray]) -> float:
                a, b, c = factors
                lost = [
                    np.linalg.norm(stack - rotation @ (b * a[place][:, None, :]) @ c.T)
                    for (place, stack), rotation in zip(self.stacks, rotations, strict=True)
                ]
                return float(np.linalg.norm(lost))

            return Products(shape, self.norm, lambda x, mode: khatri_rao_product(tensor, mode, x), distance)

        return at([np.ones((shape[0], rank)), np.eye(rank), np.eye(shape[2], rank)])._replace(at=at)

    def projections(self, weights: np.ndarray, factors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the projection of each slice."""
        a, b, c = weights * factors[0], factors[1], factors[2]
        return [_rotated(matrix[None], a[k : k + 1], b, c)[0] for k, matrix in enumerate(self.matrices)]

    def distance(self, tensor: Parafac2Tensor) -> float:
        """Compute the distance from a PARAFAC2 tensor."""
        pairs = zip(self.matrices, tensor.to_tensors(), strict=True)
        return float(np.linalg.norm([float(np.linalg.norm(matrix - made)) for matrix, made in pairs]))


def _starts(
    slices: _Slices, rank: int, init: str, count: int, seed: int, nonnegative: Collection[int]
) -> Iterator[list[np.ndarray]]:
    """Yield the factors of each start."""
    rng, stacks = np.random.default_rng(seed), [stack for _, stack in slices.stacks]
    dtype, columns = stacks[0].dtype.name, stacks[0].shape[2]
    for number in range(count):
        factors = [normal(rng, shape, dtype) for shape in ((len(slices.matrices), rank), (rank, rank), (columns, rank))]
        factors[0] = rng.uniform(0.5, 1.5, factors[0].shape)
        if not number and init == "svd":
            rows = np.concatenate([stack.reshape(-1, columns) for stack in stacks])
            small = rows if len(rows) <= columns else np.linalg.qr(rows, mode="r")
            leading = np.linalg.svd(small, full_matrices=False)[2][:rank].T
            factors[1] = np.eye(rank) + MOVED * factors[1]
            factors[2] *= MOVED / np.sqrt(columns)
            factors[2][:, : leading.shape[1]] += leading
        yield [abs(factor) if mode in nonnegative else factor for mode, factor in enumerate(factors)]

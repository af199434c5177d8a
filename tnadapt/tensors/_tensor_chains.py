"""Tensor trains, tensor rings and TT matrices: chains of cores.

Oseledets, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33, 2011); Zhao et al., "Tensor ring decomposition"
(arXiv 1606.05535).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np

from tnadapt.algebra.products import tt_left, tt_to_tensor
from tnadapt.backends import Array, Backend, get_backend, load_backend
from tnadapt.decomposition.fits import Contraction
from tnadapt.decomposition.linear_algebra import norm_of
from tnadapt.decomposition.tt_svd import Spending, moved_right, planned
from tnadapt.errors import ShapeError

from ._decomposed import CPTensor, Decomposed, Multilinear, TuckerTensor, block_diagonal
from ._matrix_products import mode_dot
from ._requests import as_tensors, error_limit, numeric, ranks_of

# -- Tensor trains and tensor rings: cores of three axes ---------------------------------------------------------------


class _Cores(Decomposed, tuple[Array, ...]):
    """Base class of all chains, which unpack as lists of cores."""

    @property
    def factors(self) -> list[Array]:
        """The cores, as TensorLy calls them."""
        return list(self)

    @property
    def arrays(self) -> list[Array]:
        return list(self)

    @property
    def rank(self) -> tuple[int, ...]:
        return (*(int(core.shape[0]) for core in self), int(self[-1].shape[-1]))

    def _times(self, number: Any) -> Self:
        return type(self)([self[0] * number, *self[1:]])


def _cores_of_train(cores: Sequence[Any], what: str, *sizes: str) -> tuple[Backend, list[Array]]:
    """Return cores whose neighbors have equal ranks, with rank 1 at both ends."""
    backend, arrays = as_tensors(cores, "cores")
    left = 1
    for number, core in enumerate(arrays):
        right = 1 if number == len(arrays) - 1 else "r"
        if len(core.shape) != 2 + len(sizes) or core.shape[0] != left or (right == 1 and core.shape[-1] != 1):
            expected = f"({left}, {', '.join(sizes)}, {right})"
            raise ShapeError(f"core {number} of a {what} has shape {tuple(core.shape)}; expected {expected}")
        left = int(core.shape[-1])
    return backend, arrays


class CoreChain(_Cores, Multilinear):
    """What tensor trains and tensor rings share."""

    _level = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(core.shape[1]) for core in self)

    @property
    def contraction(self) -> Contraction:
        order = self.order
        # The last bond of a ring is the first one; in a train, both have size 1.
        return [[mode, order + mode, (mode + 1) % order] for mode in range(order)], list(range(order, 2 * order))

    def entries(self, indices: Any) -> Array:
        backend, places = self.backend, self.places(indices)
        products: Array = None
        for core, place in zip(self, places, strict=True):
            # (r, d, r') -> one matrix per element: (n, r, r').
            matrices = backend.take(
                backend.permute_dims(core, (1, 0, 2)), backend.constant(place, backend.device(core)), axis=0
            )
            products = matrices if products is None else backend.matmul(products, matrices)
        return self._closed(backend, products)

    def part(self, *index: int | slice) -> Self:
        slices = self.slices(index)
        return type(self)([core[:, rows, :] for core, rows in zip(self, slices, strict=True)])

    def _along(self, matrix: Array, mode: int) -> Self:
        return type(self)([mode_dot(core, matrix, 1) if m == mode else core for m, core in enumerate(self)])

    def _dropped(self, mode: int) -> Any:
        backend, bond, rest = self.backend, self[mode][:, 0, :], [*self[:mode], *self[mode + 1 :]]
        if not rest:
            return self._closed(backend, backend.reshape(bond, (1, *bond.shape)))[0]
        # The neighbor on the left takes the matrix; that of the first core is on the right.
        at, axis = (mode - 1, 2) if mode else (0, 0)
        rest[at] = mode_dot(rest[at], backend.matrix_transpose(bond) if mode else bond, axis)
        return type(self)(rest)

    def _inner(self, other: CoreChain) -> Array:
        backend = self.backend
        product: Array = None
        for mine, theirs in zip(self, other, strict=True):
            transfer = self._transfer(backend, backend.conj(mine), theirs)
            product = transfer if product is None else backend.matmul(product, transfer)
        return self._closed(backend, backend.reshape(product, (1, *product.shape)))[0]

    @staticmethod
    def _transfer(backend: Backend, a: Array, b: Array) -> Array:
        """Contract the modes of two cores: a matrix of shape (r_a * r_b, r_a' * r_b')."""
        (left_a, size, right_a), (left_b, _, right_b) = a.shape, b.shape
        rows = backend.reshape(backend.permute_dims(a, (0, 2, 1)), (left_a * right_a, size))
        cols = backend.reshape(backend.permute_dims(b, (1, 0, 2)), (size, left_b * right_b))
        both = backend.reshape(backend.matmul(rows, cols), (left_a, right_a, left_b, right_b))
        return backend.reshape(backend.permute_dims(both, (0, 2, 1, 3)), (left_a * left_b, right_a * right_b))

    @staticmethod
    def _closed(backend: Backend, matrices: Array) -> Array:
        """Return the trace of each matrix."""
        size = int(matrices.shape[-1])
        if size == 1:
            return backend.reshape(matrices, (-1,))
        flat = backend.reshape(matrices, (-1, size * size))
        places = np.arange(size) * (size + 1)
        return backend.sum(backend.take(flat, backend.constant(places, backend.device(flat)), axis=1), axis=1)

    def _sum(self, other: Self) -> Self:
        backend, last, ends = self.backend, self.order - 1, isinstance(self, TTTensor)
        if last == 0 and ends:
            return type(self)([self[0] + other[0]])
        cores = []
        for number, pair in enumerate(zip(self, other, strict=True)):
            axes = [axis for axis, end in ((0, number == 0), (2, number == last)) if not (ends and end)]
            cores.append(block_diagonal(backend, *pair, axes))
        return type(self)(cores)

    def _product(self, other: Self) -> Self:
        backend, cores = self.backend, []
        for a, b in zip(self, other, strict=True):
            (left_a, size, right_a), (left_b, _, right_b) = a.shape, b.shape
            a = backend.reshape(a, (left_a, 1, size, right_a, 1))
            b = backend.reshape(b, (1, left_b, size, 1, right_b))
            cores.append(backend.reshape(a * b, (left_a * left_b, size, right_a * right_b)))
        return type(self)(cores)


class TTTensor(CoreChain):
    """A tensor train: ``tensor[i, j, …] = cores[0][:, i, :] @ cores[1][:, j, :] @ …``.

    Parameters
    ----------
    cores : sequence of array, shape (r_{m-1}, d_m, r_m)
        With ``r_0 = r_M = 1``.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a core does not have three axes, neighbors differ in rank, or the ends have a rank other than 1.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Behaves as the list of its cores, like TensorLy's TTTensor. ``a + b``, ``a - b`` and ``a * b`` (element by element)
    are tensor trains again, whose ranks are sums and products of ranks; ``round`` reduces them, as ``compress`` does in
    quimb, whose ``MatrixProductState`` takes the cores with ``shape="lpr"``.

    Examples
    --------
    >>> import numpy as np
    >>> tt = TTTensor([np.ones((1, 2, 2)), np.ones((2, 3, 1))])
    >>> tt.to_tensor()
    array([[2., 2., 2.],
           [2., 2., 2.]])
    >>> (tt + tt).rank, (tt + tt).round(max_error=1e-12).rank, float(tt.entry(0, 1))
    ((1, 4, 1), (1, 1, 1), 2.0)
    """

    def __new__(cls, cores: Sequence[Any]) -> Self:
        return cls.of(*_cores_of_train(cores, "tensor train", "size"))

    @classmethod
    def _converted(cls, other: Decomposed) -> Self | None:
        if isinstance(other, TuckerTensor):
            train = cls(exact_cores(other.backend, other.core))
            for mode, factor in enumerate(other.factors):
                train = train.mode_dot(factor, mode)
            return train
        if not isinstance(other, CPTensor):
            return None
        # Cores that are diagonal in the ranks, with the weights in the first one.
        backend, rank, (first, *rest) = other.backend, other.rank, other.factors
        first = first if other.weights is None else first * other.weights
        if not rest:
            return cls([backend.reshape(backend.sum(first, axis=1), (1, -1, 1))])
        diagonal = backend.asarray(
            np.eye(rank).reshape(rank, 1, rank), backend.dtype_name(first), backend.device(first)
        )
        cores = [backend.reshape(factor, (1, -1, rank)) for factor in (first, *rest[:-1])]
        last = backend.reshape(backend.matrix_transpose(rest[-1]), (rank, -1, 1))
        return cls([cores[0], *(core * diagonal for core in cores[1:]), last])

    def to_tensor(self) -> Array:
        return tt_to_tensor(list(self))

    def left_orthogonal(self) -> Self:
        """Return the same tensor with cores whose left unfoldings have orthonormal columns, but for the last one.

        Ranks are cut to what these columns allow. By QR decompositions: ``M d r^3`` multiply-adds.
        """
        cores = list(self)
        for mode in range(len(cores) - 1):
            moved_right(self.backend, cores, mode)
        return type(self)(cores)

    def _norm(self) -> Array:
        # To full precision, by QR decompositions.
        backend = self.backend
        last = backend.flatten(self.left_orthogonal()[-1])
        squares = last * backend.conj(last)
        return backend.sqrt(backend.sum(backend.xp.real(squares) if backend.is_complex(last) else squares, axis=0))

    def round(self, rank: int | Sequence[int] | None = None, *, max_error: float | None = None) -> Self:
        """Reduce the ranks; the best approximation of these ranks within a factor √(M - 1).

        Parameters
        ----------
        rank : int or sequence of int, optional
            The largest rank of each bond, or of all.
        max_error : float, optional
            Relative Frobenius error that is allowed, with about the fewest parameters, as in
            :func:`~tnadapt.tensors.tensor_train`. Not inside ``jax.jit``, as ranks depend on the values.

        Returns
        -------
        TTTensor

        Raises
        ------
        ShapeError
            Unless exactly one of both is given, or if a rank is below 1.
        ConfigError
            If ``max_error`` is not from 0 to below 1.

        Notes
        -----
        Oseledets (2011), algorithm 2: ``M d r^3`` multiply-adds.
        """
        if (rank is None) == (max_error is None):
            raise ShapeError("give either rank= or max_error=, to say what to round to")
        backend, cores, bonds = self.backend, list(self.left_orthogonal()), self.order - 1
        limits = [0] * bonds if rank is None else ranks_of(rank, bonds, "bonds")
        if max_error is not None:
            allowed, norm = error_limit(max_error) ** 2, norm_of(backend, cores[-1]) or 1.0
            # Truncated from the last core to the first, as below.
            turned = [np.transpose(backend.to_numpy(core), (2, 1, 0)) for core in reversed(cores)]
            turned[0] = turned[0] / norm
            for mode in range(bonds):
                moved_right(load_backend("numpy"), turned, mode)
            spending = Spending(allowed, planned(turned, allowed)[0])
        for bond in range(bonds - 1, -1, -1):
            left, size, right = map(int, cores[bond + 1].shape)
            u, s, vh = backend.svd(backend.reshape(cores[bond + 1], (left, size * right)))
            keep = min(limits[bond], int(s.shape[0]))
            if max_error is not None:
                keep = spending.rank(backend.to_numpy(s) / norm, bonds - 1 - bond)
            cores[bond + 1] = backend.reshape(vh[:keep, :], (keep, size, right))
            flat = backend.reshape(cores[bond], (-1, left))
            rest = backend.matmul(flat, u[:, :keep] * s[:keep])
            cores[bond] = backend.reshape(rest, (*cores[bond].shape[:2], keep))
        return type(self)(cores)


class TRTensor(CoreChain):
    """A tensor ring: ``tensor[i, j, …] = trace(cores[0][:, i, :] @ cores[1][:, j, :] @ …)``.

    Parameters
    ----------
    cores : sequence of array, shape (r_{m-1}, d_m, r_m)
        With ``r_M = r_0``.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a core does not have three axes, or neighbors differ in rank.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Behaves as the list of its cores, like TensorLy's TRTensor. Sums and products are rings again, whose ranks are sums
    and products of ranks. They are not reduced: decompose ``to_tensor()`` again.

    Examples
    --------
    >>> import numpy as np
    >>> ring = TRTensor([np.ones((2, 3, 2)), np.ones((2, 4, 2))])
    >>> ring.shape, float(ring.entry(0, 0)), float(ring.to_tensor()[0, 0])
    ((3, 4), 4.0, 4.0)
    """

    def __new__(cls, cores: Sequence[Any]) -> Self:
        backend, arrays = as_tensors(cores, "cores")
        for number, core in enumerate(arrays):
            before = tuple(arrays[number - 1].shape)
            left = before[-1] if before else 1
            if len(core.shape) != 3 or core.shape[0] != left:
                raise ShapeError(
                    f"core {number} of a tensor ring has shape {tuple(core.shape)}; expected ({left}, size, r), as "
                    f"core {(number - 1) % len(arrays)} ends with rank {left}"
                )
        return cls.of(backend, arrays)

    @classmethod
    def _converted(cls, other: Decomposed) -> Self | None:
        train = other if isinstance(other, TTTensor) else TTTensor._converted(other)
        return None if train is None else cls(list(train))

    def to_tensor(self) -> Array:
        backend, cores = self.backend, list(self)
        if len(cores) == 1:
            return self._closed(backend, backend.permute_dims(cores[0], (1, 0, 2)))
        closing = int(cores[0].shape[0])
        # All cores but the last are contracted to (r_0, prod d, r), then closed with the last one in one product.
        first = tt_left(backend, [backend.reshape(cores[0], (1, closing * cores[0].shape[1], -1)), *cores[1:-1]])
        rest, size = int(cores[-1].shape[0]), int(cores[-1].shape[1])
        rows = backend.reshape(first, (closing, -1, rest))
        rows = backend.reshape(backend.permute_dims(rows, (1, 0, 2)), (-1, closing * rest))
        cols = backend.reshape(backend.permute_dims(cores[-1], (2, 0, 1)), (closing * rest, size))
        return backend.reshape(backend.matmul(rows, cols), self.shape)


def exact_cores(backend: Backend, array: Array) -> list[Array]:
    """Return the cores of a train that equals an array without rounding: the array between identity matrices."""
    shape = [int(size) for size in array.shape]
    before = [math.prod(shape[:mode]) for mode in range(len(shape) + 1)]
    behind = [math.prod(shape[mode:]) for mode in range(len(shape) + 1)]
    # Each rank is the smaller one of the products before and behind a bond.
    middle = next(mode for mode in range(len(shape)) if before[mode + 1] >= behind[mode + 1])
    cores = []
    for mode, size in enumerate(shape):
        if mode == middle:
            cores.append(backend.reshape(array, (before[mode], size, behind[mode + 1])))
            continue
        left, right = (before[mode], before[mode + 1]) if mode < middle else (behind[mode], behind[mode + 1])
        identity = np.eye(max(left, right)).reshape(left, size, right)
        cores.append(backend.asarray(identity, backend.dtype_name(array), backend.device(array)))
    return cores


# -- TT matrices: cores of four axes -----------------------------------------------------------------------------------


class TTMatrix(_Cores):
    """A matrix whose rows and columns are both divided into modes.

    ``matrix[i_1 … i_M, j_1 … j_M] = cores[0][0, i_1, j_1, :] @ … @ cores[-1][:, i_M, j_M, 0]``.

    Parameters
    ----------
    cores : sequence of array, shape (r_{m-1}, rows_m, cols_m, r_m)
        With ``r_0 = r_M = 1``.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a core does not have four axes, neighbors differ in rank, or the ends have a rank other than 1.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Oseledets, "Approximation of 2^d × 2^d matrices using tensor decomposition" (SIAM J. Matrix Anal. 31, 2010).
    Behaves as the list of its cores, like TensorLy's TTMatrix. ``shape`` is that of the matrix; ``to_tensor`` gives the
    modes ``(rows_1, …, rows_M, cols_1, …, cols_M)``, like TensorLy. It is added to TT matrices, and to Kronecker
    products of matrices of its modes. ``matrix @ x`` multiplies a vector, a matrix of columns, a train whose modes are
    the columns', or another TT matrix, without forming it.

    Examples
    --------
    >>> import numpy as np
    >>> identity = TTMatrix([np.eye(2)[None, :, :, None], np.eye(3)[None, :, :, None]])
    >>> bool((identity.to_matrix() == np.eye(6)).all()), identity @ np.arange(6.0)
    (True, array([0., 1., 2., 3., 4., 5.]))
    """

    def __new__(cls, cores: Sequence[Any]) -> Self:
        return cls.of(*_cores_of_train(cores, "TT matrix", "rows", "cols"))

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """How the rows are divided into modes."""
        return tuple(int(core.shape[1]) for core in self)

    @property
    def col_sizes(self) -> tuple[int, ...]:
        """How the columns are divided into modes."""
        return tuple(int(core.shape[2]) for core in self)

    @property
    def shape(self) -> tuple[int, ...]:
        return math.prod(self.row_sizes), math.prod(self.col_sizes)

    def train(self) -> TTTensor:
        """Return the tensor train whose mode m is the rows and columns m, merged."""
        backend = self.backend
        return TTTensor([backend.reshape(core, (core.shape[0], -1, core.shape[3])) for core in self])

    def _from(self, train: TTTensor) -> Self:
        shapes = [(core.shape[0], *own.shape[1:3], core.shape[2]) for core, own in zip(train, self, strict=True)]
        return type(self)([self.backend.reshape(core, shape) for core, shape in zip(train, shapes, strict=True)])

    def to_tensor(self) -> Array:
        backend, order = self.backend, len(self)
        merged = backend.reshape(self.train().to_tensor(), [int(size) for core in self for size in core.shape[1:3]])
        return backend.permute_dims(merged, [*range(0, 2 * order, 2), *range(1, 2 * order, 2)])

    def to_matrix(self) -> Array:
        """Form the matrix."""
        return self.backend.reshape(self.to_tensor(), self.shape)

    def entries(self, indices: Any) -> Array:
        rows, cols = self.places(indices)
        split = zip(
            np.unravel_index(rows, self.row_sizes), np.unravel_index(cols, self.col_sizes), self.col_sizes, strict=True
        )
        return self.train().entries(np.stack([row * size + col for row, col, size in split], axis=1))

    def part(self, *index: int | slice) -> Self:
        """Take a slice; only whole rows and columns, because others do not divide into modes."""
        return self._whole(index)

    # It projects the others, as none has its modes.
    _level = -1

    def _projected(self, other: Any) -> Array:
        backend = self.backend
        first, second = other if isinstance(other, CoreChain) else cast("TTTensor", TTTensor._converted(other))
        rows = backend.reshape(backend.permute_dims(first, (1, 0, 2)), (self.shape[0], -1))
        cols = backend.reshape(backend.permute_dims(second, (1, 2, 0)), (self.shape[1], -1))
        return backend.sum(backend.flatten(backend.conj(self @ backend.conj(cols)) * rows), axis=0)

    def _formed(self) -> Array:
        return self.to_matrix()

    def _inner(self, other: Self) -> Array:
        return self.train().inner(other.train())

    def norm(self) -> Array:
        return self.train().norm()

    @property
    def T(self) -> Self:  # noqa: N802 - the name in every library
        """The transposed matrix."""
        return type(self)([self.backend.permute_dims(core, (0, 2, 1, 3)) for core in self])

    def __matmul__(self, other: Any) -> Any:
        """Multiply by a vector, a matrix of columns, a tensor train, or another TT matrix, without forming this one.

        A tensor train of the shape :attr:`col_sizes` gives one of the shape :attr:`row_sizes`, whose ranks are products
        of ranks: ``round`` reduces them.
        """
        backend = self.backend
        if isinstance(other, TTMatrix):
            return self._composed(other)
        if isinstance(other, TTTensor):
            if other.shape != self.col_sizes:
                raise ShapeError(f"columns in modes {self.col_sizes} do not multiply a train of shape {other.shape}")
            return self._composed(TTMatrix([backend.reshape(core, (*core.shape[:2], 1, -1)) for core in other])).train()
        x = numeric(get_backend(other), other, "the vector or matrix")
        get_backend(self[0], x)
        if len(x.shape) not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected ({self.shape[1]},) or ({self.shape[1]}, batch)")
        batch = math.prod(x.shape[1:])
        # State: (r, remaining columns, finished rows × batch).
        state = backend.reshape(x, (1, self.shape[1], batch))
        for core in self:
            left, rows, cols, right = (int(size) for size in core.shape)
            rest = math.prod(state.shape[1:2]) // cols
            state = backend.reshape(state, (left, cols, rest * int(state.shape[2])))
            matrix = backend.reshape(backend.permute_dims(core, (3, 1, 0, 2)), (right * rows, left * cols))
            state = backend.matmul(matrix, backend.reshape(state, (left * cols, -1)))
            # (r', rows, rest, done): the new rows go after the finished ones, before the batch.
            done = int(state.shape[1]) // (rest * batch)
            state = backend.reshape(state, (right, rows, rest, done, batch))
            state = backend.reshape(backend.permute_dims(state, (0, 2, 3, 1, 4)), (right, rest, done * rows * batch))
        return backend.reshape(state, (self.shape[0], *x.shape[1:]))

    def _composed(self, other: TTMatrix) -> TTMatrix:
        if other.row_sizes != self.col_sizes:
            raise ShapeError(f"columns in modes {self.col_sizes} do not multiply rows in modes {other.row_sizes}")
        backend, cores = self.backend, []
        for a, b in zip(self, other, strict=True):
            (left_a, rows, inner, right_a), (left_b, _, cols, right_b) = a.shape, b.shape
            matrix_a = backend.reshape(backend.permute_dims(a, (0, 1, 3, 2)), (left_a * rows * right_a, inner))
            matrix_b = backend.reshape(backend.permute_dims(b, (1, 0, 2, 3)), (inner, left_b * cols * right_b))
            both = backend.reshape(backend.matmul(matrix_a, matrix_b), (left_a, rows, right_a, left_b, cols, right_b))
            both = backend.permute_dims(both, (0, 3, 1, 4, 2, 5))
            cores.append(backend.reshape(both, (left_a * left_b, rows, cols, right_a * right_b)))
        return TTMatrix(cores)

    def _sum(self, other: Self) -> Self:
        return self._from(self.train() + other.train())

    def _product(self, other: Self) -> Self:
        return self._from(self.train() * other.train())

    def round(self, rank: int | Sequence[int] | None = None, *, max_error: float | None = None) -> Self:
        """Reduce the ranks, as :meth:`TTTensor.round` does."""
        return self._from(self.train().round(rank, max_error=max_error))

    def same_shape(self, other: Decomposed) -> None:
        if isinstance(other, TTMatrix) and (self.row_sizes, self.col_sizes) != (other.row_sizes, other.col_sizes):
            raise ShapeError(
                f"the matrices divide into {self.row_sizes} × {self.col_sizes} and {other.row_sizes} × "
                f"{other.col_sizes}; expected the same modes"
            )
        super().same_shape(other)

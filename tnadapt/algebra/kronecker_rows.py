"""Rows of a matrix that is a Kronecker product, each as one outer product of two vectors.

Row i of ``A ⊗ B ⊗ C`` is the Kronecker product of a row of each, those of the digits of i. So a run of rows needs no
cutting into boxes of digits, and its gradient is two sums. The products are those of
:func:`tnadapt.algebra.products.kronecker_tensor`, in the same order, to the bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays

from .network import Network
from .products import LONG
from .unfolding import row_wise_khatri_rao

__all__ = ["KroneckerRows"]


class KroneckerRows(FixedArrays):
    """The rows of a network of order 2 that contain a slice; see :meth:`of`.

    Parameters
    ----------
    network : Network
    start, stop : int
        The slice of its ``vec``.

    Attributes
    ----------
    cols : int
        Length of a row. The outer products may be longer: the rest is cut off.
    first : int
        Position of the first element of the slice in the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt import Config
    >>> from tnadapt.backends import load_backend
    >>> network = Network(Config(format="dense", fold=(4, 6), splits=2, split_size=2), 24)
    >>> arrays = {"split0.dense": np.ones((2, 2)), "split1.dense": np.arange(6.0).reshape(2, 3)}
    >>> left, right = KroneckerRows.of(network, 6, 18)(load_backend("numpy"), arrays)
    >>> (left[:, :, None] * right[:, None, :]).reshape(2, 6)
    array([[3., 4., 5., 3., 4., 5.],
           [0., 1., 2., 0., 1., 2.]])
    """

    def __init__(self, network: Network, start: int, stop: int) -> None:
        super().__init__()
        self.network, self.cols = network, network.sizes[1]
        rows = start // self.cols, -(-stop // self.cols)
        self.first = start - rows[0] * self.cols
        self._digits = np.unravel_index(np.arange(*rows), [split.sizes[0] for split in network.splits])

    @classmethod
    def of(cls, network: Network, start: int, stop: int) -> KroneckerRows | None:
        """Return the rows of a slice; None if the network is not one Kronecker product of matrices."""
        single = network.terms > 1 or len(network.splits) < 2 or not network.kronecker
        return None if single or len(network.sizes) != 2 else cls(network, start, stop)

    def make(self, key: Hashable) -> np.ndarray:
        """Return the digits of the rows in the split with that number."""
        assert isinstance(key, int)
        return np.asarray(self._digits[key], np.int64)

    def __call__(self, backend: Backend, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Compute the two vectors of each row, without the scale, shapes (rows, p) and (rows, q); differentiable."""
        (prefixes,) = self.network.prefixes
        found = []
        for k, (split, own) in enumerate(zip(self.network.splits, self.network.of_term(prefixes, arrays), strict=True)):
            matrix = split.tensor(backend, own, [(0, size) for size in split.sizes])
            found.append(backend.take(matrix, self.on(backend, k, matrix), axis=0))
        *others, right = found
        while len(others) > 1 and right.shape[-1] < LONG:
            right = row_wise_khatri_rao(backend, [others.pop(), right])
        return _row_wise(backend, others), right


def _row_wise(backend: Backend, rows: Sequence[Array]) -> Array:
    """Multiply as many vectors a row, in the order of ``kronecker_tensor``."""
    if len(rows) < 3:
        return row_wise_khatri_rao(backend, rows)
    *others, right = rows
    while others and right.shape[-1] < LONG:
        right = row_wise_khatri_rao(backend, [others.pop(), right])
    return row_wise_khatri_rao(backend, [_row_wise(backend, others), right]) if others else right

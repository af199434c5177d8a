"""An update as a sum of Kronecker products of small matrices, and the maps between which the sum may be."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .maps import Map
from .products import kronecker_tensor

__all__ = ["Factored", "Matrix", "difference", "mapped"]


class Matrix(NamedTuple):
    """A matrix, dense or as a product of two narrow ones.

    Attributes
    ----------
    left : array, shape (rows, width), or (rows, cols) if ``right`` is None
    right : array, shape (cols, width), or None
        The matrix is ``left @ right.T``.
    """

    left: Array
    right: Array | None


class Factored(NamedTuple):
    """An update as a sum of Kronecker products of small matrices.

    Attributes
    ----------
    terms : list of list of Matrix
        The matrices of each term; the first one varies slowest in rows and columns.
    scale : float
        Factor of the sum.
    sides : (Map, Map), optional
        (A, B): the update is A times the sum times Bᵀ.
    """

    terms: list[list[Matrix]]
    scale: float
    sides: tuple[Map, Map] | None = None

    def dense(self, backend: Backend) -> Array:
        """Compute the update itself, ``(rows, cols)``."""
        found = []
        for term in self.terms:
            made = [
                m.left if m.right is None else backend.matmul(m.left, backend.matrix_transpose(m.right)) for m in term
            ]
            found.append(kronecker_tensor(backend, made))
        total = functools.reduce(lambda a, b: a + b, found)
        if self.sides is not None:
            rows, cols = self.sides
            total = mapped(backend, rows, cols.forward(backend, total))
        return total if self.scale == 1.0 else total * self.scale

    def pair(self, backend: Backend) -> Matrix:
        """Return the update of a single matrix, without the scale, as two factors as narrow as its shape allows."""
        ((matrix,),) = self.terms
        if self.sides is None or matrix.right is not None:
            return matrix
        x, (rows, cols) = matrix.left, self.sides
        narrow = min(x.shape)
        unit = backend.asarray(np.eye(narrow), backend.dtype_name(x), backend.device(x))
        left, right = (unit, backend.matrix_transpose(x)) if x.shape[0] == narrow else (x, unit)
        return Matrix(mapped(backend, rows, left), mapped(backend, cols, right))


def difference(backend: Backend, now: Matrix, then: Matrix) -> Matrix:
    """Return a matrix minus another one; of two products, as a product that is exactly zero if they are equal."""
    if now.right is None or then.right is None:
        return Matrix(now.left - then.left, None)
    left = backend.concat([now.left - then.left, then.left], axis=1)
    return Matrix(left, backend.concat([now.right, now.right - then.right], axis=1))


def mapped(backend: Backend, map_: Map, matrix: Array) -> Array:
    """Apply a map to each column of a matrix."""
    if map_.identity:
        return matrix
    return backend.matrix_transpose(map_.forward(backend, backend.matrix_transpose(matrix)))

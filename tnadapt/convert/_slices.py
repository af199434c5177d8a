"""The update of one weight as a slice of low rank of a tensor that several weights share, in two factors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tnadapt.algebra.factoring import Matrix, factoring
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend

from ._updates import Float, ModuleUpdate, Pair

__all__ = ["low_rank_slice"]


def low_rank_slice(plan: SuperLoRA, weight: int, arrays: Mapping[str, Float], dtype: str) -> ModuleUpdate | None:
    """Return the two factors of a slice if they are smaller than the slice; they are products of the network's arrays.

    Parameters
    ----------
    plan : SuperLoRA
    weight : int
        Index of the weight.
    arrays : mapping of str to ndarray
        The plan's arrays in float64.
    dtype : str
        The dtype in which they were trained.
    """
    how, (rows, cols) = factoring(plan, weight), plan.shapes[weight]
    if how is not None and how.group.subtracts:
        how = factoring(plan, weight, single=True)
    if how is None or how.width is None or how.width * (rows + cols) >= rows * cols:
        return None
    backend = load_backend("numpy")
    found = how(backend, arrays, dtype)
    matrix = found.pair(backend)
    return ModuleUpdate("lora", (rows, cols), (_narrowed(matrix, plan.largest_rank(weight)),), found.scale)


def _narrowed(matrix: Matrix, rank: int) -> Pair:
    """Return two factors of at most the given rank, which is known to be at least that of the product."""
    pair = Pair(np.asarray(matrix.left), np.asarray(matrix.right))
    if pair.rank <= rank:
        return pair
    # A Tucker core that is narrower on one side: the product lies in the span of as many vectors.
    basis, upper = np.linalg.qr(pair.a)
    left, s, vt = np.linalg.svd(pair.b @ upper.T, full_matrices=False)
    return Pair(left[:, :rank] * s[:rank], basis @ vt[:rank].T)

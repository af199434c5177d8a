"""Dimensions of the sets of CP tensors, Tucker tensors and tensor trains, by formula.

The formulas are upper bounds. They are exact except for the few known defective shapes (CP of rank 3 on
2 × 2 × 2 × 2, of rank 4 on 3 × 3 × 3, and their series).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["of_cp", "of_train", "of_tucker"]


def of_cp(sizes: Sequence[int], rank: int) -> int:
    ranks = multilinear(sizes, [rank] * len(sizes))
    bases = sum(r * (d - r) for r, d in zip(ranks, sizes, strict=True))
    # Restricted to the spans of its factors, the tensor is a smaller CP tensor, which may fill these spaces.
    inner = min(math.prod(ranks), rank * (sum(ranks) - len(ranks) + 1))
    return min(math.prod(sizes), bases + inner, rank * (sum(sizes) - len(sizes) + 1))


def of_tucker(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    ranks = multilinear(sizes, ranks)
    return math.prod(ranks) + sum(r * (d - r) for r, d in zip(ranks, sizes, strict=True))


def multilinear(sizes: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Return the ranks of the unfoldings: each at most its mode's size and the product of the other ranks."""
    found = [min(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    largest = max(range(len(found)), key=lambda mode: found[mode])
    rest = math.prod(found[:largest] + found[largest + 1 :])
    # Only the largest rank can exceed the product of the others, since every other product contains the largest one.
    found[largest] = min(found[largest], rest)
    return found


def of_train(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    bonds = [1, *ranks, 1]
    for mode in range(1, len(sizes)):
        bonds[mode] = min(bonds[mode], bonds[mode - 1] * sizes[mode - 1])
    for mode in range(len(sizes) - 1, 0, -1):
        bonds[mode] = min(bonds[mode], bonds[mode + 1] * sizes[mode])
    cores = sum(left * size * right for left, size, right in zip(bonds, sizes, bonds[1:], strict=False))
    return cores - sum(bond * bond for bond in bonds[1:-1])

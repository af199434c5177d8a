"""One weight's update in the forms that other libraries have: low rank, Kronecker, Hadamard, dense.

Each is a small adapter of this library for one weight: its update is the plan's, and nothing here computes another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.superlora import SuperLoRA

__all__ = ["KINDS", "Float", "Pair", "Update", "alpha_of", "padded", "product", "scaled"]

Float = NDArray[np.float64]

KINDS = ("lora", "lokr", "loha", "dense")


class Pair(NamedTuple):
    """A matrix of low rank, ``b @ a.T``.

    Attributes
    ----------
    b : ndarray, shape (rows, rank)
    a : ndarray, shape (cols, rank)
    """

    b: Float
    a: Float

    @property
    def rank(self) -> int:
        """Columns of the factors."""
        return int(self.b.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.b.shape[0], self.a.shape[0]


class Update(NamedTuple):
    """What one weight's update is made of.

    Attributes
    ----------
    kind : {"lora", "lokr", "loha", "dense"}
    shape : tuple of int
        ``(rows, cols)`` of the update.
    parts : tuple of Pair or ndarray
        One Pair; W1 and W2, whose Kronecker product it is, each a Pair or a matrix; two Pairs, whose
        Hadamard product it is; or the matrix itself. float64.
    scale : float
        What all is multiplied by.

    Examples
    --------
    >>> b, a = np.array([[1.0], [2.0]]), np.array([[1.0], [10.0], [100.0]])
    >>> Update("lora", (2, 3), (Pair(b, a),), 0.5).delta()
    array([[  0.5,   5. ,  50. ],
           [  1. ,  10. , 100. ]])
    """

    kind: str
    shape: tuple[int, int]
    parts: tuple[Pair | Float, ...]
    scale: float = 1.0

    @property
    def num_parameters(self) -> int:
        """Elements of all parts."""
        return sum(sum(half.size for half in part) if isinstance(part, Pair) else part.size for part in self.parts)

    @property
    def rank(self) -> int:
        """The largest rank of a Pair among the parts; 1 where there is none."""
        return max((part.rank for part in self.parts if isinstance(part, Pair)), default=1)

    def config(self) -> Config:
        """The settings for a weight of this form, without the scale."""
        if self.kind == "dense":
            return Config(order=1, format="dense", rank=1)
        if self.kind == "lora":
            return Config(rank=self.rank)
        if self.kind == "loha":
            return Config(rank=self.rank, splits=2, combine="hadamard", leading="same")
        first, last = self.parts
        same = isinstance(first, Pair) and isinstance(last, Pair)
        return Config(
            rank=self.rank,
            splits=2,
            split_size=first.shape,
            leading="same" if same else "dense",
            format="cp" if isinstance(last, Pair) else "dense",
        )

    def arrays(self) -> dict[str, Float]:
        """The arrays that :meth:`config` asks for, without the group's prefix; all Pairs padded to one rank."""
        config, found = self.config(), dict[str, Float]()
        for number, part in enumerate(self.parts):
            leading = self.kind == "lokr" and number == 0 and config.leading == "dense"
            if isinstance(part, Pair) and not leading:
                part = padded(part, self.rank)
                found |= {f"split{number}.factor0": part.b, f"split{number}.factor1": part.a}
            elif self.kind == "dense":
                found[f"split{number}.dense"] = product(part).reshape(-1)
            else:
                found[f"split{number}.dense"] = product(part)
        return found

    def delta(self) -> Float:
        """The update itself, shape (rows, cols)."""
        arrays = {f"group0.{name}": array for name, array in scaled(self).arrays().items()}
        found: Float = SuperLoRA(self.config(), [self.shape]).deltas(arrays)[0]
        return found


def padded(pair: Pair, rank: int) -> Pair:
    """The same matrix with zero columns up to the rank."""
    wide = ((0, 0), (0, rank - pair.rank))
    return pair if pair.rank == rank else Pair(np.pad(pair.b, wide), np.pad(pair.a, wide))


def product(part: Pair | Float) -> Float:
    """A part as one matrix."""
    if not isinstance(part, Pair):
        return part
    found: Float = part.b @ part.a.T
    return found


def scaled(update: Update) -> Update:
    """The same with its scale within the first part, and 1 beside it."""
    if update.scale == 1.0:
        return update
    first, *rest = update.parts
    moved = first._replace(b=first.b * update.scale) if isinstance(first, Pair) else first * update.scale
    return update._replace(parts=(moved, *rest), scale=1.0)


def alpha_of(scales: Sequence[float], rank: int) -> float | None:
    """The alpha for which ``alpha / rank`` is every one of the scales, to the bit; None where there is none.

    Examples
    --------
    >>> alpha_of([16 / 3] * 2, 3), alpha_of([1.0, 2.0], 3)
    (16.0, None)
    """
    first = scales[0]
    if len(set(scales)) > 1 or not math.isfinite(first):
        return None
    exact = first * rank
    for alpha in (float(round(exact)), round(exact, 6), exact):
        if MIN_ALPHA <= alpha <= MAX_ALPHA and alpha / rank == first:
            return alpha
    return None

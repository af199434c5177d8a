"""Which Kronecker factors PEFT and LyCORIS can load: both work out W1's shape from the weight's by a rule of their own.

A file does not say its sizes. PEFT has one ``decompose_factor`` for all weights, from which it takes the sizes, and
the rank decides which of W1 and W2 are full. LyCORIS guesses a factor from the tensors of each weight, and takes
the sizes from the factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._updates import Float, Pair, Update, padded, product

__all__ = ["Fit", "lycoris_fit", "peft_factorization", "peft_fits", "sizes_of"]

_BEYOND, _MOST = 64, 1 << 16


class Fit(NamedTuple):
    """A LoKr update as one of the two libraries holds it.

    Attributes
    ----------
    update : Update
        Its W1 and W2 full or low-rank as they have to be there; the scale is the one that it had.
    rank : int
        For which the library comes to the same.
    """

    update: Update
    rank: int


def peft_factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """The sizes of W1 and W2 in PEFT: the factor where it divides, else two that are near each other.

    Examples
    --------
    >>> peft_factorization(128), peft_factorization(128, 4), peft_factorization(12, 6), peft_factorization(127)
    ((8, 16), (4, 32), (6, 2), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor < 0 else factor
    small, large = 1, size
    best = small + large
    while small < large:
        following = next(d for d in range(small + 1, size + 1) if size % d == 0)
        if following + size // following > best or following > limit:
            break
        small, large = following, size // following
    return min(small, large), max(small, large)


def lycoris_factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """The sizes of W1 and W2 in LyCORIS: PEFT's, smaller first."""
    small, large = sorted(peft_factorization(size, factor))
    return small, large


def sizes_of(update: Update, stored: Sequence[int]) -> tuple[int, int, int, int] | None:
    """``(p, q, k, n)``: W1 is (p, q) and W2 (k, n, …) with ``stored = (p k, q n, …)``; None where they are not."""
    (p, q), (k, _) = update.parts[0].shape, update.parts[1].shape
    return (p, q, k, stored[1] // q) if stored[1] % q == 0 and p * k == stored[0] else None


def peft_fits(updates: Sequence[Update], stored: Sequence[Sequence[int]]) -> tuple[int, bool, list[Fit]] | None:
    """``decompose_factor``, ``decompose_both``, and every update with its rank; None where PEFT has none that fit."""
    sizes = [sizes_of(update, shape) for update, shape in zip(updates, stored, strict=True)]
    factor = _peft_factor([size for size in sizes if size is not None], stored)
    if None in sizes or factor is None:
        return None
    both = all(_both_low(update, size) for update, size in zip(updates, sizes, strict=True))
    fits = []
    for update, shape, size in zip(updates, stored, sizes, strict=True):
        assert size is not None
        first, last = update.parts
        if both:
            rank = update.rank
            fits.append(Fit(update._replace(parts=tuple(_padded(part, rank) for part in update.parts)), rank))
        elif isinstance(last, Pair) and _low(last, size[2:], last.rank):
            fits.append(Fit(update._replace(parts=(product(first), last)), last.rank))
        elif len(shape) == 3 and size[:2] != (1, 1):
            return None  # of a Conv1d with a full W2 it multiplies other axes
        else:
            rank = -(-max(size[2:]) // 2)
            fits.append(Fit(update._replace(parts=(product(first), product(last))), rank))
    return factor, both, fits


def _peft_factor(sizes: Sequence[tuple[int, int, int, int]], stored: Sequence[Sequence[int]]) -> int | None:
    """One ``decompose_factor`` for which every weight has its sizes, or None."""
    wanted = dict.fromkeys((size, tuple(shape[:2])) for size, shape in zip(sizes, stored, strict=False))
    sides = [side for size, _ in wanted for side in size[:2]]
    # A factor that does not divide is a limit: one somewhat above the sides may do where they themselves divide more.
    factors: list[int] = [-1, *sides, *range(1, max(sides, default=0) + _BEYOND)]
    for factor in dict.fromkeys(factors[:_MOST]):
        if all(
            peft_factorization(rows, factor) == (p, k) and peft_factorization(cols, factor) == (q, n)
            for (p, q, k, n), (rows, cols) in wanted
        ):
            return factor
    return None


def lycoris_fit(update: Update, stored: Sequence[int]) -> Fit | None:
    """The update as LyCORIS loads it, or None where it would come to other sizes than the tensors have."""
    size = sizes_of(update, stored)
    if size is None:
        return None
    p, q, k, n = size
    first, last = update.parts
    low = isinstance(last, Pair) and _low(last, size[2:], last.rank)
    parts: tuple[Pair | Float, ...] = (product(first), last if low else product(last))
    if _both_low(update, size):
        parts = tuple(_padded(part, update.rank) for part in update.parts)
    made = update._replace(parts=parts)
    last_shape = (k, n, *stored[2:]) if not isinstance(parts[1], Pair) else parts[1].shape
    factor = _guessed((p, q), last_shape, isinstance(parts[1], Pair))
    if lycoris_factorization(stored[0], factor) != (p, k) or lycoris_factorization(stored[1], factor) != (q, n):
        return None
    return Fit(made, max((part.rank for part in parts if isinstance(part, Pair)), default=1))


def _guessed(first: tuple[int, int], last: tuple[int, ...], low: bool) -> int:
    """The factor that LyCORIS comes to: of a low-rank W2 it takes a kernel's sizes for channels."""
    rows, cols = first[0] * last[0], first[1] * last[1]
    if first == (lycoris_factorization(rows)[0], lycoris_factorization(cols)[0]):
        return -1
    one, two = max(first), max(last[:2] if low else last)
    for factor in (one, two):
        if rows % factor == cols % factor == 0 and factor in (first[0], last[0]) and factor in (first[1], last[1]):
            return factor
    return min(one, two)


def _low(part: Pair | Float, sides: Sequence[int], rank: int) -> bool:
    """Whether a rank is below half of W1's or W2's larger side: both libraries' rule for keeping two factors."""
    return isinstance(part, Pair) and 2 * rank < max(sides)


def _both_low(update: Update, size: tuple[int, int, int, int] | None) -> bool:
    """Whether W1 and W2 are kept as two factors each. Both then have one rank, the larger."""
    assert size is not None
    return all(_low(part, sides, update.rank) for part, sides in zip(update.parts, (size[:2], size[2:]), strict=True))


def _padded(part: Pair | object, rank: int) -> Pair:
    assert isinstance(part, Pair)
    return padded(part, rank)

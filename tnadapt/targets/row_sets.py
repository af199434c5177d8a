"""Rows of a weight: a repeated pattern of them, or a list."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

from tnadapt.errors import TargetError, integer, safe_repr

__all__ = ["MAX_SIZE", "RowIndices", "Rows"]

#: The largest size and index that a target may have.
MAX_SIZE = 1 << 62


class Rows(NamedTuple):
    """Rows ``start`` to ``start + length - 1`` of each of ``count`` blocks of ``stride`` rows.

    Attributes
    ----------
    start, length, stride, count : int
        One block is a plain slice, for q, k and v stored one after another. Several blocks are for q, k and v
        interleaved head by head, as in GPT-NeoX and BLOOM.

    Examples
    --------
    >>> Rows(0, 2, 6, 3).indices()  # q of three heads of size 2
    [0, 1, 6, 7, 12, 13]
    """

    start: int
    length: int
    stride: int
    count: int = 1  # type: ignore[assignment]  # hides tuple.count

    @property
    def number(self) -> int:
        """Number of rows."""
        return self.length * self.count

    def to_json(self) -> list[int]:
        """Return what a file has for them."""
        return list(self)

    def indices(self) -> list[int]:
        """Return the indices of all rows, in order."""
        return [
            block * self.stride + row
            for block in range(self.count)
            for row in range(self.start, self.start + self.length)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class RowIndices:
    """Rows by their indices, such as those of some tokens in an embedding.

    Parameters
    ----------
    numbers : sequence of int
        The indices, in increasing order.

    Raises
    ------
    TargetError
        If there is none, or they are not increasing integers.

    Examples
    --------
    >>> RowIndices([5, 9]).indices()
    [5, 9]
    """

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, (tuple, list, range)) or not self.numbers:
            raise TargetError(f"indices of rows must be a list of at least one integer; got {safe_repr(self.numbers)}")
        found = tuple(integer("an index of a row", number, 0, MAX_SIZE, TargetError) for number in self.numbers)
        for one, two in itertools.pairwise(found):
            if two <= one:
                raise TargetError(f"indices of rows must increase; {two} follows {one}")
        object.__setattr__(self, "numbers", found)

    @property
    def number(self) -> int:
        """Number of rows."""
        return len(self.numbers)

    def to_json(self) -> dict[str, list[int]]:
        """Return what a file has for them."""
        return {"indices": list(self.numbers)}

    def indices(self) -> list[int]:
        """Return the indices of all rows, in order."""
        return list(self.numbers)

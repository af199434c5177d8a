"""Fused weights, the known sizes of their attention, and the rows of q, k and v in them.

Nothing here depends on whether the sizes come from a torch module's attributes or a checkpoint's ``config.json``, so a
model in memory and its checkpoint get the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tnadapt.errors import TargetError

from .target import Rows

__all__ = ["SHARED", "Blocks", "Facts", "Fused", "LayoutError", "place_rows"]

# The number of equal blocks, and the parts of one block: a letter and its row count; "-" is none of q, k and v.
Blocks = tuple[int, list[tuple[str, int]]]

# All letters share the same rows, as q and k or as k and v. Compared by identity: no rule computes such a value.
SHARED: Blocks = (0, [])

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "heads")
_KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "num_heads_kv", "kv_heads", "n_kv_head",
    "n_head_kv",
)  # fmt: skip
_HEAD_SIZE = ("head_dim", "head_size", "dim_head", "d_head")


class LayoutError(TargetError):
    """A fused weight whose layout cannot be determined; the message says what is missing."""


class Fused(NamedTuple):
    """A fused weight.

    Attributes
    ----------
    letters : {"qkv", "qk", "kv"}
        The projections that it produces, in the order of its name.
    out : int
        Its output rows.
    q_out, o_in : int or None
        Rows of a separate query projection, and columns of the output projection, where there is exactly one.
    """

    letters: str
    out: int
    q_out: int | None = None
    o_in: int | None = None


class Facts:
    """Named sizes and flags of one attention.

    Parameters
    ----------
    lookups : sequence of callable
        Functions from a name to a value or None; the first value found wins.
    lacks : str
        How messages introduce a missing name, such as ``"config.json lacks"``.
    """

    def __init__(self, lookups: Sequence[Callable[[str], Any]], lacks: str) -> None:
        self._lookups = lookups
        self._lacks = lacks

    def value(self, name: str) -> Any:
        """Return the first value that the lookups find for a name; None if there is none."""
        return next((found for lookup in self._lookups if (found := lookup(name)) is not None), None)

    def number(self, *names: str) -> int | None:
        """Return the first positive integer under these names below 2**62, which no size of a tensor exceeds."""
        # The order of lookups comes before that of names: an attention's own number is preferred to the config's under
        # a better name, as the config may describe a model of several parts.
        for lookup in self._lookups:
            for name in names:
                value = lookup(name)
                if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62:
                    return value
        return None

    def need(self, *names: str) -> int:
        """Return :meth:`number`, or raise :class:`LayoutError` if there is none."""
        found = self.number(*names)
        if found is None:
            raise LayoutError(f"{self._lacks} {names[0]}")
        return found

    def flag(self, name: str) -> bool:
        """Return a boolean that must be present, as its default differs between releases."""
        found = self.value(name)
        if not isinstance(found, bool):
            raise LayoutError(f"{self._lacks} {name}")
        return found

    @property
    def heads(self) -> int | None:
        """Number of query heads."""
        return self.number(*_HEADS)

    @property
    def kv_heads(self) -> int | None:
        """Number of key-value heads."""
        # num_key_value_groups is the number of query heads per key-value head. It comes first because attentions of
        # transformers have it as an attribute, while the number of key-value heads is only in the config.
        groups, heads = self.number("num_key_value_groups"), self.heads
        return heads // groups if groups and heads else self.number(*_KV_HEADS)

    @property
    def head_size(self) -> int | None:
        return self.number(*_HEAD_SIZE)

    def need_heads(self) -> int:
        heads = self.heads
        if heads is None:
            raise LayoutError(f"{self._lacks} num_attention_heads: it does not say how many heads it has")
        return heads

    def need_kv_heads(self) -> int:
        heads = self.kv_heads
        if heads is None:
            raise LayoutError(f"{self._lacks} num_key_value_heads: it does not say how many heads of keys it has")
        return heads


def place_rows(blocks: Blocks, fused: Fused) -> dict[str, Rows | None]:
    """Return the rows of each letter.

    Parameters
    ----------
    blocks : (int, list of (str, int))
    fused : Fused

    Returns
    -------
    dict of str to Rows or None
        None where the whole weight produces the letter.

    Raises
    ------
    LayoutError
        If the blocks do not fill the weight exactly.

    Examples
    --------
    >>> place_rows((2, [("q", 4), ("k", 4), ("v", 4)]), Fused("qkv", 24))["k"].indices()
    [4, 5, 6, 7, 16, 17, 18, 19]
    """
    if blocks is SHARED:
        return dict.fromkeys(fused.letters)
    # Leftover rows, or a size below one, mean that the rule does not fit this weight; sizes are never rounded to fit.
    count, parts = blocks
    stride = sum(size for _, size in parts)
    if count < 1 or stride * count != fused.out or any(size < 1 for letter, size in parts if letter != "-"):
        raise LayoutError(f"{count} blocks of {stride} rows were expected")
    found: dict[str, Rows | None] = {}
    start = 0
    for letter, size in parts:
        if letter != "-":
            found[letter] = Rows(start, size, stride, count)
        start += size
    return found

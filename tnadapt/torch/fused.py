"""How q, k and v lie in one weight.

Most libraries put them one after another, and a weight of an unknown attention is read so: sizes from the numbers of
heads where keys and values have fewer, else equal parts, and checked against what the output projection takes. Other
layouts are known by the class, in one table; of a class that is in doubt the rows must be named by the caller.
"""

from __future__ import annotations

from typing import Any

from ..errors import TargetError
from ..target import Rows
from .layouts import Layout, heads_of, known_layout, kv_heads_of, number_of, shares

__all__ = ["rows_of"]

# Names under which some libraries interleave heads and others do not.
_DOUBTFUL = ("query_key_value", "linear_qkv")


def rows_of(
    parent: Any, name: str, letters: str, out: int, path: str, q_out: int | None = None, o_in: int | None = None
) -> dict[str, Rows | None]:
    """Which rows of a fused weight make q, k and v.

    Parameters
    ----------
    parent : Module
        The attention.
    name : str
        The weight's name there.
    letters : {"qkv", "qk", "kv"}
        What it makes, in the order of its name.
    out : int
        Its output rows.
    path : str
        Its dotted path, for the message.
    q_out, o_in : int, optional
        Rows of a separate query projection, and columns of the output projection, where the attention has them.

    Returns
    -------
    dict of str to Rows or None
        For each letter; None where the whole weight makes it.

    Raises
    ------
    TargetError
        If the layout is not known, or does not fit.
    """
    if shares(parent):
        return dict.fromkeys(letters)
    known = known_layout(parent, name)
    try:
        layout = known(parent, letters, out) if known else None
    except (AttributeError, ArithmeticError, TypeError, ValueError):
        # Another release of the library than the one that the table was made from.
        raise _unknown(parent, path, letters, out, "its attributes are not those that were expected") from None
    if layout is None:
        if name in _DOUBTFUL or any(word in name for word in ("qkvz", "mlp")):
            raise _unknown(parent, path, letters, out, "libraries lay it out in different ways")
        layout = _after_one_another(parent, letters, out, q_out, o_in)
    if layout is None:
        raise _unknown(parent, path, letters, out, "the sizes do not follow from its attributes")
    count, parts = layout
    stride = sum(size for _, size in parts)
    if count < 1:
        raise _unknown(parent, path, letters, out, "it does not say how many heads it has")
    if stride * count != out or any(size < 1 for letter, size in parts if letter != "-"):
        raise _unknown(parent, path, letters, out, f"{count} blocks of {stride} rows were expected")
    found: dict[str, Rows | None] = {}
    start = 0
    for letter, size in parts:
        if letter != "-":
            found[letter] = Rows(start, size, stride, count)
        start += size
    return found


def _unknown(parent: Any, path: str, letters: str, out: int, why: str) -> TargetError:
    return TargetError(
        f"{path} makes {', '.join(letters)} with one weight of {out} rows, and which rows of a {type(parent).__name__} "
        f"make which is not known: {why}; give the rows, targets=[tnadapt.Target({path!r}, stored shape, 'q', "
        "rows=tnadapt.Rows(start, length, stride, count)), …], or leave it out by a list of paths or a function"
    )


# -- One after another ------------------------------------------------------------------------


def _after_one_another(parent: Any, letters: str, out: int, q_out: int | None, o_in: int | None) -> Layout | None:
    if letters != "qkv":
        half = out // 2
        if half == 0 or any(size is not None and size % half for size in (q_out, o_in)):
            return None
        return 1, [(letter, half) for letter in letters]
    heads, kv_heads = heads_of(parent), kv_heads_of(parent)
    if heads is not None and kv_heads is not None and kv_heads != heads:
        size = number_of(parent, "head_dim", "head_size", "dim_head", "d_head") or out // (heads + 2 * kv_heads)
        sizes = [heads * size, kv_heads * size, kv_heads * size]
    else:
        sizes = [out // 3] * 3
    # What the heads give is what the output projection takes.
    if sum(sizes) != out or (o_in is not None and o_in != sizes[0]):
        return None
    return 1, list(zip(letters, sizes, strict=True))

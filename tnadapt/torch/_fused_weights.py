"""Which rows of a fused weight make q, k and v, in a model.

Layouts that are known by the class of the attention come from one table, which checkpoints on disk share. A weight of
an unknown class is read as its name says, one letter after another as most libraries have it: sizes from the numbers of
heads where keys and values have fewer, else equal parts, and checked against what the output projection takes. Where
the name is in doubt, the rows must be named by the caller.
"""

from __future__ import annotations

from typing import Any

from tnadapt.errors import TargetError
from tnadapt.targets.attention_layouts import by_name
from tnadapt.targets.fused_rows import Fused, LayoutError, place_rows
from tnadapt.targets.target import Rows

from ._layout_hints import facts_of, layout_of

__all__ = ["rows_of"]


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
    entry = layout_of(parent, name)
    rule = by_name(name) if entry is None else entry.rule
    fused = Fused(letters, out, q_out, o_in)
    try:
        if rule is None:
            raise LayoutError("libraries lay it out in different ways")
        return place_rows(rule(facts_of(parent), fused), fused)
    except LayoutError as error:
        why = str(error)
    raise TargetError(
        f"{path} makes {', '.join(letters)} with one weight of {out} rows, and which rows of a {type(parent).__name__} "
        f"make which is not known: {why}; give the rows, targets=[tnadapt.Target({path!r}, stored shape, 'q', "
        "rows=tnadapt.Rows(start, length, stride, count)), …], or leave it out by a list of paths or a function"
    )

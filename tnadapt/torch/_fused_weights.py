"""The rows of a model's fused weight that produce q, k and v.

Layouts that are known by the class of the attention come from a table shared with checkpoints on disk. The layout of an
unknown class is inferred from the weight's name, with one block per letter in order, as in most libraries. Block sizes
come from the numbers of heads where keys and values have fewer heads, else the blocks are equal; they are checked
against the width of the output projection. Where the name is ambiguous, the caller must give the rows.
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
    """Return the rows of a fused weight that produce q, k and v.

    Parameters
    ----------
    parent : Module
        The attention module.
    name : str
        The weight's name there.
    letters : {"qkv", "qk", "kv"}
        The projections in the weight, in the order of its name.
    out : int
        Number of output rows.
    path : str
        Dotted path of the weight, for the error message.
    q_out, o_in : int, optional
        Rows of a separate query projection, and columns of the output projection, where the attention has them.

    Returns
    -------
    dict of str to Rows or None
        The rows of each letter; None where the whole weight produces it.

    Raises
    ------
    TargetError
        If the layout is unknown or does not fit.
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
        f"{path} computes {', '.join(letters)} with one weight of {out} rows, and the layout of the rows in a "
        f"{type(parent).__name__} is unknown: {why}; give the rows, targets=[tnadapt.Target({path!r}, stored shape, "
        "'q', rows=tnadapt.Rows(start, length, stride, count)), …], or leave it out with a list of paths or a function"
    )

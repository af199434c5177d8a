"""Locate q, k and v in a checkpoint's fused weight by its name, ``config.json`` and neighboring tensors.

A checkpoint has no classes, so the table of layouts is searched by model type. If that finds nothing, the name of the
weight decides, unless some entry of the table has a weight that looks the same. Then the weight is rejected with a
message that says what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tnadapt.errors import safe_repr

from ._fused_table import TRANSPOSED
from .attention_layouts import StoredWeight, by_name, contested, of_config
from .fused_rows import Facts, Fused, LayoutError, place_rows
from .target import Rows

__all__ = ["is_transposed", "stored_rows"]

Config = Mapping[str, Any]

# The Conv1D layers of these models; heads and embeddings are stored as usual.
_CONV1D = [["c_attn"], ["q_attn"], ["c_proj"], ["c_fc"]]

_WHICH_PART = "config.json has several parts, and the name does not say to which it belongs"

# Maps the name of a model's part in its config to the words for it in the names of weights.
_WORDS = {
    "text": {"text", "language", "llm"},
    "llm": {"text", "language", "llm"},
    "language": {"text", "language", "llm"},
    "vision": {"vision", "visual", "image", "img", "vit"},
    "vit": {"vision", "visual", "image", "img", "vit"},
    "audio": {"audio", "speech"},
}


def stored_rows(
    name: str, stored: StoredWeight, fused: Fused, cols: int, config: Config | None
) -> dict[str, Rows | None]:
    """Return the rows of a fused weight that produce q, k and v.

    Parameters
    ----------
    name : str
        The tensor's name. It appears in messages and selects the part of the config.
    stored : StoredWeight
    fused : Fused
    cols : int
        Columns of the weight.
    config : mapping or None

    Returns
    -------
    dict of str to Rows or None
        By letter; None where the whole weight produces it.

    Raises
    ------
    LayoutError
        If the layout cannot be determined.
    """
    found: list[dict[str, Rows | None]] = []
    reasons: list[str] = []
    parts = _parts_for(name, config or {})
    for part in parts:
        try:
            rows = _rows(stored, fused, cols, part, config is not None)
            if len(parts) > 1 and fused.letters == "qkv" and fused.o_in is None and fused.out != 3 * cols:
                raise LayoutError(_WHICH_PART)
        except LayoutError as error:
            reasons.append(str(error))
        else:
            found += [rows] if rows not in found else []
    if len(found) == 1:
        return found[0]
    why = _WHICH_PART if found else reasons[0]
    raise LayoutError(
        f"{name} produces {', '.join(fused.letters)} with one weight of {fused.out} rows, in an unknown layout: {why}. "
        "Put the model's own config.json next to the weights, build the model and use tnadapt.torch, which reads its "
        "classes, or name whole weights"
    )


def is_transposed(name: str, shape: tuple[int, ...], config: Config | None) -> bool:
    """Return whether a matrix is stored as (in, out), as transformers' Conv1D does.

    Examples
    --------
    >>> is_transposed("h.0.attn.c_attn.weight", (4, 12), {"model_type": "gpt2"})
    True
    """
    if len(shape) != 2 or name.split(".")[-2:-1] not in _CONV1D:
        return False
    kinds = [part.get("model_type") for part in _parts_for(name, config or {})]
    return any(isinstance(kind, str) and kind in TRANSPOSED for kind in kinds)


def _rows(stored: StoredWeight, fused: Fused, cols: int, config: Config, given: bool) -> dict[str, Rows | None]:
    entry = of_config(config, stored)
    rule = by_name(stored.name) if entry is None else entry.rule
    if rule is None or (entry is None and contested(config, stored)):
        kind = config.get("model_type") or config.get("architecture")
        says = f"{safe_repr(kind)} has no known layout" if kind else "config.json has no model_type"
        raise LayoutError(
            f"libraries lay out {safe_repr(stored.name)} in different ways, and "
            + (says if given else "there is no config.json that says what kind of model this is")
        )
    inner = config.get("attn_config")
    lookups = [config.get, *([inner.get] if isinstance(inner, Mapping) else [])]
    rows = place_rows(
        rule(Facts(lookups, "config.json lacks" if given else "without a config.json, there is no"), fused), fused
    )
    if entry is None and fused.letters == "qkv" and fused.o_in is None:
        # There is no output projection to check the sizes against.
        equal = len({one.length for one in rows.values() if one is not None}) == 1
        if equal and fused.out != 3 * cols and _has_no_heads(config):
            raise LayoutError("no output projection and no numbers of heads determine its sizes")
        if not equal and fused.out == 3 * cols:
            raise LayoutError("config.json has fewer key heads, but the shape suggests as many as query heads")
    return rows


def _has_no_heads(config: Config) -> bool:
    facts = Facts([config.get], "")
    return facts.heads is None or facts.kv_heads is None


def _parts_for(name: str, config: Config) -> list[Config]:
    """Return the parts of a config that a tensor may belong to: those that its name mentions, otherwise all."""
    words = set(re.split(r"[._]", name))
    parts = list(_nested(config))
    named = [part for key, part in parts if words & _WORDS.get(key, {key})]
    return named or [config, *(part for _, part in parts)]


def _nested(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield the nested configs of a config's sub-models, with their keys."""
    for key, part in config.items():
        if isinstance(part, Mapping) and (part.get("model_type") or Facts([part.get], "").heads):
            yield key.removesuffix("_config"), part

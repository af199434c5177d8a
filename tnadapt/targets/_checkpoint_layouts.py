"""Rows of q, k and v in a fused weight of a checkpoint, by its ``config.json``, its name and what lies beside it.

A checkpoint says less than a model: it has no classes. The table of layouts is asked by model type. Where that says
nothing, the name of the weight decides, but only if no entry of the table has a weight that looks the same; else it is
refused, and the message says what is missing.
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

# The layers of these models that are Conv1D; their heads and embeddings are none.
_CONV1D = [["c_attn"], ["q_attn"], ["c_proj"], ["c_fc"]]

_WHICH_PART = "config.json has several parts, and the name does not say to which it belongs"

# What a part of a model is called in its config, and in the names of its weights.
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
    """Which rows of a fused weight make q, k and v.

    Parameters
    ----------
    name : str
        The tensor's name, for the message and for which part of the config it belongs to.
    stored : Stored
    fused : Fused
    cols : int
        Columns of the weight.
    config : mapping or None

    Returns
    -------
    dict of str to Rows or None
        For each letter; None where the whole weight makes it.

    Raises
    ------
    LayoutError
        If the layout does not follow.
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
        f"{name} makes {', '.join(fused.letters)} with one weight of {fused.out} rows, and which rows make which is "
        f"not known: {why}. Put the model's own config.json beside the weights, build the model and use tnadapt.torch, "
        "which reads its classes, or name whole weights"
    )


def is_transposed(name: str, shape: tuple[int, ...], config: Config | None) -> bool:
    """Whether a matrix is stored as (in, out), as transformers' Conv1D does.

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
        says = f"{safe_repr(kind)} is none whose layout is known" if kind else "config.json has no model_type"
        raise LayoutError(
            f"libraries lay {safe_repr(stored.name)} out in different ways, and "
            + (says if given else "there is no config.json that says what kind of model this is")
        )
    inner = config.get("attn_config")
    lookups = [config.get, *([inner.get] if isinstance(inner, Mapping) else [])]
    rows = place_rows(
        rule(Facts(lookups, "config.json lacks" if given else "without a config.json, there is no"), fused), fused
    )
    if entry is None and fused.letters == "qkv" and fused.o_in is None:
        # No output projection to check the sizes with.
        equal = len({one.length for one in rows.values() if one is not None}) == 1
        if equal and fused.out != 3 * cols and _has_no_heads(config):
            raise LayoutError("no output projection and no numbers of heads tell its sizes")
        if not equal and fused.out == 3 * cols:
            raise LayoutError("config.json has fewer heads of keys, and its shape speaks for as many as of queries")
    return rows


def _has_no_heads(config: Config) -> bool:
    facts = Facts([config.get], "")
    return facts.heads is None or facts.kv_heads is None


def _parts_for(name: str, config: Config) -> list[Config]:
    """The parts of a config that a tensor may belong to: those its name names, else all."""
    words = set(re.split(r"[._]", name))
    parts = list(_nested(config))
    named = [part for key, part in parts if words & _WORDS.get(key, {key})]
    return named or [config, *(part for _, part in parts)]


def _nested(config: Config) -> Iterator[tuple[str, Config]]:
    """The models that a config is made of, by what they are called there."""
    for key, part in config.items():
        if isinstance(part, Mapping) and (part.get("model_type") or Facts([part.get], "").heads):
            yield key.removesuffix("_config"), part

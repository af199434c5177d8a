"""Rows of an embedding that PEFT trained for single tokens: next to LoRA, or by a method of their own.

PEFT stores the new rows themselves, in the order of the tokens' numbers in its settings. Here an update is added, so it
is the difference of these rows and the base's, and reading needs the base's numbers. A row that is added to the base
rounds to the stored one: exactly in half precision, to the last bit in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.row_sets import RowIndices
from tnadapt.targets.target import Target

from ._base_model import Base
from ._peft_embeddings import is_head
from ._unpack import TargetUpdate
from ._updates import Float, ModuleUpdate

__all__ = ["TOKENS", "decoded", "separate_rows"]

#: The suffix of the tensors' names.
TOKENS = "token_adapter.trainable_tokens_delta"


def decoded(tensors: Mapping[str, Float], indices: Any, base: Base | None) -> list[TargetUpdate]:
    """Return the updates of embeddings.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        The new rows, by the path of the embedding.
    indices
        The tokens' numbers in the settings: a list, or one for each embedding.
    base : Base, optional

    Raises
    ------
    FileError, TargetError
        If the base or its numbers are missing, or rows and indices do not fit.
    """
    found, copies = [], {} if base is None else _copies(tensors, base)
    for path, rows in tensors.items():
        if path in copies:
            continue
        numbers = _numbers(path, indices)
        if rows.ndim != 2 or len(rows) != len(numbers):
            raise FileError(f"{safe_repr(path)} has rows of shape {rows.shape} for {len(numbers)} tokens")
        if base is None:
            raise FileError(
                f"the rows of tokens of {safe_repr(path)} replace those of the base, and an update is the "
                "difference: give base= (--base), a folder or safetensors file of the base model"
            )
        order = np.argsort(numbers)
        chosen = tuple(numbers[place] for place in order)
        before = base.rows(path, chosen)
        if before.shape != (len(chosen), rows.shape[1]):
            raise FileError(f"{safe_repr(path)} has rows of {rows.shape[1]} numbers, and in base of {before.shape[1]}")
        stored = base.shapes[path]
        assert stored is not None  # its rows were read
        heads = [*(copy for copy, of in copies.items() if of == path), *_untrained_heads(path, tensors, base)]
        tied = tuple(f"{head}.weight" for head in heads)
        role = "linear" if is_head(path) else "embedding"
        target = Target(path, stored, role, rows=RowIndices(chosen), tied=tied)
        found.append(TargetUpdate(target, ModuleUpdate("dense", target.shape, (rows[order] - before,))))
    return found


def separate_rows(found: Sequence[TargetUpdate], base: Base | None) -> list[str]:
    """Return the names of tied weights of which an embedding and a head have different rows, or the head alone has."""
    heads = {} if base is None else base.heads
    trained = {one.target.module for one in found}
    apart = {name for pair in heads.items() if pair[0] in trained for name in pair}
    return [one.target.name for one in found if one.target.module in apart]


def _copies(tensors: Mapping[str, Float], base: Base) -> dict[str, str]:
    """Return the heads that a base does not store because they are tied, each with the embedding of the same rows."""
    there = [path for path in tensors if path in base.shapes and path not in base.heads]
    return {
        path: of for path in tensors if path not in there for of in there if np.array_equal(tensors[path], tensors[of])
    }


def _untrained_heads(path: str, tensors: Mapping[str, Float], base: Base) -> list[str]:
    """Return the heads that PEFT ties to an embedding: all that a base ties, unless one has other rows of its own."""
    heads, copies = [head for head, embedding in base.heads.items() if embedding == path], _copies(tensors, base)
    apart = any(head in tensors and head not in copies for head in heads)
    return [] if apart else [head for head in heads if head not in tensors]


def _numbers(path: str, indices: Any) -> list[int]:
    if isinstance(indices, Mapping):
        own = [value for key, value in indices.items() if f".{path}".endswith(f".{key}")]
        indices = own[0] if len(own) == 1 else None
    whole = isinstance(indices, list) and all(type(number) is int and number >= 0 for number in indices)
    if not whole or not indices or len(set(indices)) < len(indices):
        raise FileError(f"the settings have no list of different tokens for {safe_repr(path)}")
    return list(indices)

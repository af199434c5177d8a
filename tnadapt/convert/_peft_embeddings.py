"""PEFT's LoRA of an embedding: the factors of the transposed update, under names of their own.

PEFT looks a token up in ``lora_embedding_A``, of shape (rank, tokens), and multiplies by ``lora_embedding_B``, of shape
(width, rank): ΔW is the transpose of ``B @ A``. Here the same factors are those of a linear layer's update, with the
tokens as rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.errors import FileError, safe_repr
from tnadapt.targets.target import RowIndices, Target

from ._base_model import Base
from ._unpack import Module, TargetUpdate
from ._updates import Float, ModuleUpdate

__all__ = [
    "EMBEDDING",
    "TOKENS",
    "as_embedding",
    "decoded",
    "decoded_tokens",
    "encoded",
    "is_embedding",
    "is_head",
    "joined_ties",
    "separate_rows",
    "tied_paths",
    "without_ties",
]


# -- PEFT's LoRA of an embedding: the factors of the transposed update, under names of their own -----------------------


#: Maps suffixes of names in the file to the names under which the transposed tensors are decoded.
EMBEDDING = {"lora_embedding_A": "lora_up", "lora_embedding_B": "lora_down"}

# All names of the heads that transformers ties to embeddings.
_HEADS = (
    "decoder", "embed_out", "generator_lm_head", "head", "lm_head", "lm_loss", "out_proj", "output",
    "output_projection", "proj", "proj_out", "vocab_projector",
)  # fmt: skip


def is_embedding(module: Module) -> bool:
    """Return whether a module is an embedding."""
    return module.targets[0][1].role == "embedding"


def encoded(module: Module, factors: Mapping[str, Float]) -> dict[str, Float]:
    """Return the tensors of a module's update, given the factors of a linear layer's: by path and name."""
    if not is_embedding(module):
        return {f"{module.path}.{name}": array for name, array in factors.items()}
    turned = {"lora_embedding_A": factors["lora_B.weight"].T, "lora_embedding_B": factors["lora_A.weight"].T}
    # What is tied to the embedding has the same update once more; a head has it as a linear layer.
    return {
        f"{path}.{name}": array
        for path in (module.path, *tied_paths(module))
        for name, array in (factors if path != module.path and is_head(path) else turned).items()
    }


def is_head(path: str) -> bool:
    """Return whether a module is an output head, by its name outside of all numbered layers."""
    *outer, last = path.split(".")
    return last in _HEADS and not any(map(str.isdecimal, outer))


def decoded(suffix: str, array: Float) -> Float:
    """Return a factor of a linear layer's update, given that of an embedding."""
    if array.ndim != 2:
        raise FileError(f"{suffix} must be a matrix; its shape is {array.shape}")
    return np.ascontiguousarray(array.T)


def as_embedding(update: TargetUpdate, embeddings: Mapping[str, object]) -> TargetUpdate:
    """Return an update whose target has the role of an embedding, if its module is one."""
    if update.target.module not in embeddings:
        return update
    return update._replace(target=_with_role(update.target))


def _with_role(target: Target) -> Target:
    return dataclasses.replace(target, role="embedding", transposed=False)


def without_ties(target: Target) -> Target:
    """Return an embedding's target as one that is not tied, if its other names are the weights of modules."""
    ties = target.role == "embedding" and all(name.endswith(".weight") for name in target.tied)
    return dataclasses.replace(target, tied=()) if ties else target


def tied_paths(module: Module) -> list[str]:
    """Return the paths of the modules to which an embedding is tied."""
    return [name.removesuffix(".weight") for name in module.targets[0][1].tied]


def joined_ties(found: Sequence[TargetUpdate]) -> list[TargetUpdate]:
    """Return updates of which those of a head that equal an embedding's are one with it."""
    joined = list(found)
    for one in found:
        if one.target.role != "embedding" or one.update.kind != "lora" or not any(own is one for own in joined):
            continue
        others = [other for other in joined if other is not one and _same(one.update, other.update)]
        if others:
            tied = dataclasses.replace(one.target, tied=tuple(other.target.name for other in others))
            joined = [one._replace(target=tied) if own is one else own for own in joined if own not in others]
    return joined


def _same(one: ModuleUpdate, other: ModuleUpdate) -> bool:
    if other.kind != "lora" or (one.shape, one.scale, one.rank) != (other.shape, other.scale, other.rank):
        return False
    return all(np.array_equal(a, b) for a, b in zip(one.pair, other.pair, strict=True))


# -- Rows of an embedding that PEFT trained for single tokens: next to LoRA, or by a method of their own ---------------

# PEFT stores the new rows themselves, in the order of the tokens' numbers in its settings. Here an update is added, so
# it is the difference of these rows and the base's, and reading needs the base's numbers. A row that is added to the
# base rounds to the stored one: exactly in half precision, to the last bit in float32.


#: The suffix of the tensors' names.
TOKENS = "token_adapter.trainable_tokens_delta"


def decoded_tokens(tensors: Mapping[str, Float], indices: Any, base: Base | None) -> list[TargetUpdate]:
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

"""PEFT's LoRA of an embedding: the factors of the transposed update, under names of their own.

PEFT looks a token up in ``lora_embedding_A``, of shape (rank, tokens), and multiplies by ``lora_embedding_B``, of shape
(width, rank): ΔW is the transpose of ``B @ A``. Here the same factors are those of a linear layer's update, with the
tokens as rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.errors import FileError
from tnadapt.targets.target import Target

from ._unpack import Module, TargetUpdate
from ._updates import Float, ModuleUpdate

__all__ = [
    "EMBEDDING", "as_embedding", "decoded", "encoded", "is_embedding", "joined_ties", "stored_bases", "tied_paths",
    "without_ties",
]  # fmt: skip

#: Maps suffixes of names in the file to the names under which the transposed tensors are decoded.
EMBEDDING = {"lora_embedding_A": "lora_up", "lora_embedding_B": "lora_down"}

_BASE = "base_layer.weight"


def is_embedding(module: Module) -> bool:
    """Return whether a module is an embedding."""
    return module.targets[0][1].role == "embedding"


def encoded(module: Module, factors: Mapping[str, Float]) -> dict[str, Float]:
    """Return the tensors of a module's update, given the factors of a linear layer's: by path and name."""
    if not is_embedding(module):
        return {f"{module.path}.{name}": array for name, array in factors.items()}
    own = {"lora_embedding_A": factors["lora_B.weight"].T, "lora_embedding_B": factors["lora_A.weight"].T}
    # A head that is tied to the embedding has the same update once more, as a linear layer.
    heads = {f"{path}.{name}": array for path in tied_paths(module) for name, array in factors.items()}
    return {f"{module.path}.{name}": array for name, array in own.items()} | heads


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
        if one.target.role != "embedding" or one.update.kind != "lora":
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


def stored_bases(unknown: Sequence[str], prefix: str, embeddings: Mapping[str, object]) -> list[str]:
    """Return the tensors that are weights of the base, which PEFT saves next to an embedding's update."""
    return [name for name in unknown if name.removeprefix(prefix).removesuffix(f".{_BASE}") in embeddings]

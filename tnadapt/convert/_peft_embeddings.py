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
    "EMBEDDING", "as_embedding", "decoded", "encoded", "is_embedding", "is_head", "joined_ties", "tied_paths",
    "without_ties",
]  # fmt: skip

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

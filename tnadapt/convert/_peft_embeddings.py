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
from ._updates import Float

__all__ = ["EMBEDDING", "as_embedding", "decoded", "encoded", "is_embedding", "stored_bases"]

#: Maps suffixes of names in the file to the names under which the transposed tensors are decoded.
EMBEDDING = {"lora_embedding_A": "lora_up", "lora_embedding_B": "lora_down"}

_BASE = "base_layer.weight"


def is_embedding(module: Module) -> bool:
    """Return whether a module is an embedding."""
    return module.targets[0][1].role == "embedding"


def encoded(factors: Mapping[str, Float]) -> dict[str, Float]:
    """Return the factors of an embedding's update, given those of a linear layer."""
    return {"lora_embedding_A": factors["lora_B.weight"].T, "lora_embedding_B": factors["lora_A.weight"].T}


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


def stored_bases(unknown: Sequence[str], prefix: str, embeddings: Mapping[str, object]) -> list[str]:
    """Return the tensors that are weights of the base, which PEFT saves next to an embedding's update."""
    return [name for name in unknown if name.removeprefix(prefix).removesuffix(f".{_BASE}") in embeddings]

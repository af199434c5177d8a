"""The weights that a command plans for: those of a model's headers, or of ``--shape``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import tnadapt
from tnadapt.errors import FileError, TnadaptError

from ._settings import shapes_of, targets_of

__all__ = ["Weights", "planned_weights"]


class Weights(NamedTuple):
    """The weights to plan for."""

    shapes: list[tuple[int, int]]
    layers: list[str] | None
    names: list[str] | None  # short
    roles: list[str] | None
    targets: list[str]
    drawn_roles: list[str] | None = None  # None where roles do not tell weights apart


def planned_weights(model: str | None, targets: list[str] | None, shape: list[str] | None) -> Weights:
    """Return the weights of a model, or of ``--shape``.

    Raises
    ------
    TnadaptError
        If both or none of them are given, or the model has no such weights.
    """
    if (model is None) == (shape is None):
        raise TnadaptError("give a model, or the shapes of weights by --shape ROWSxCOLS; one of them")
    if shape is not None:
        if targets is not None:
            raise TnadaptError("--targets chooses among the weights of a model, and --shape has none; leave it out")
        return Weights(shapes_of(shape), None, None, None, [])
    assert model is not None
    try:
        found = tnadapt.planning.model_targets(model, targets_of(targets))
    except FileError as error:
        path = Path(model)
        if path.suffix.lower() == ".gguf" or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
            raise FileError(
                f"{error}. For a GGUF file give the shapes of its weights by --shape, or open it with transformers and "
                "call tnadapt.plan([target.shape for target in tnadapt.torch.find_targets(model)], budget)"
            ) from None
        raise
    layers = [target.layer for target in found]
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    roles = [target.role for target in found]
    plain = {"linear", "conv"}.isdisjoint(roles)
    names = [
        f"{role}{numbers[layer]}" if plain else str(i)
        for i, (role, layer) in enumerate(zip(roles, layers, strict=True))
    ]
    shapes, paths = [target.shape for target in found], [target.name for target in found]
    return Weights(shapes, layers, names, roles, paths, roles if plain else None)

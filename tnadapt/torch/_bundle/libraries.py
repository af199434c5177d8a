"""The libraries of pretrained models by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tnadapt.checkpoints.pretrained_model import Pretrained

from .model_library import ModelLibrary
from .timm_models import TimmModels
from .transformers_models import TransformersModels

__all__ = ["LIBRARIES", "describe"]

LIBRARIES: Mapping[str, ModelLibrary] = {library.name: library for library in (TransformersModels(), TimmModels())}


def describe(model: nn.Module) -> Pretrained | None:
    """Return what a model says about its base, task and labels; None if it is of no known library."""
    found = (library.describe(model) for library in LIBRARIES.values())
    return next((about for about in found if about is not None), None)

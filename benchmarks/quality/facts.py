"""What methods are fitted to: the weights that a task adapts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import nn

from tnadapt import torch as tnt
from tnadapt.errors import TnadaptError
from tnadapt.presets import AdaptedWeights


@dataclasses.dataclass(frozen=True)
class Facts:
    """The adapted weights of a model."""

    #: Paths of the layers.
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    #: One key per weight, as in :class:`tnadapt.UpdatePlan`.
    layers: tuple[object, ...]
    roles: tuple[object, ...]
    #: Rows of an attention head, if every weight consists of heads.
    head_size: int | None = None

    @functools.cached_property
    def weights(self) -> AdaptedWeights:
        """What families of presets are made for."""
        return AdaptedWeights(self.shapes, self.layers, self.roles, self.head_size)

    @property
    def size(self) -> int:
        """Number of elements of all weights."""
        return self.weights.size

    @property
    def side(self) -> int:
        """The shorter side of the smallest weight, beyond which a matrix rank gains nothing."""
        return self.weights.side


def facts_of(model: nn.Module, targets: str | Sequence[str], head_size: int | None = None) -> Facts:
    """Return the facts of a model, which may be on the meta device."""
    found = tnt.find_targets(model, targets)
    for target in found:
        if target.parameter != "weight" or target.rows is not None or target.index is not None:
            raise TnadaptError(
                f"only a part of {target.module}.{target.parameter} is a target; PEFT adapts whole layers, so cut it up"
            )
    return Facts(
        tuple(target.module for target in found),
        tuple(target.shape for target in found),
        tuple(target.layer for target in found),
        tuple(target.role for target in found),
        head_size,
    )

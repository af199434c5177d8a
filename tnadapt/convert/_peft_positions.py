"""Methods of PEFT that train a few values at some positions of a matrix: settings and names in common.

All weights have one config, whose map has one number of values. Where theirs differ, the shorter ones get zeros at
further positions of the same permutation. Positions that no seed gives are listed in the config, as long as it holds
them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import Recipe
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.targets.target import Target

from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, scaled_config
from ._unpack import Module
from ._updates import Float, ModuleUpdate

__all__ = ["dense_updates", "few_values", "padded", "targets_with_room", "values_of"]


def few_values(targets: Sequence[Target], values: Sequence[Float], projection: Recipe, scale: float) -> OwnStructure:
    """Return one vector per weight, to which a map is applied."""

    def config(alpha: float | None) -> Config:
        return Config(order=1, format="dense", rank=1, projection=projection, on="weight", alpha=alpha)

    made, factor = scaled_config(scale, config)
    arrays = {f"group{number}.split0.dense": own.reshape(-1) * factor for number, own in enumerate(values)}
    return OwnStructure(targets, made, arrays)


def dense_updates(targets: Sequence[Target], deltas: Sequence[Float], why: str) -> OwnStructure:
    """Return the updates themselves, exact but large, with a note."""
    updates = [ModuleUpdate("dense", target.shape, (delta,)) for target, delta in zip(targets, deltas, strict=True)]
    return OwnStructure(targets, updates=updates, notes=(f"stored dense: {why}",))


def targets_with_room(content: PeftContent, values: Sequence[Float]) -> list[Target]:
    """Return the target of each module, which must have as many elements as there are values."""
    return [
        content.target_from_base(path, functools.partial(_has_room, own.size), f"it has {own.size} values")
        for path, own in zip(content.modules, values, strict=True)
    ]


def _has_room(count: int, rows: int, cols: int) -> bool:
    return rows * cols >= count


def padded(values: Float, size: int) -> Float:
    """Return values with zeros at the end."""
    return np.pad(values, (0, size - values.size))


def values_of(method: PeftMethod, module: Module, file: AdapterFile) -> tuple[Float, float, Recipe]:
    """Return the values of a weight, their scale and the map; raise ConfigError if the config has another structure."""
    config, plan = file.config, file.plan
    method.require_one_weight_per_group(file)
    group = plan.groups[plan.layout.of_weight(module.targets[0][0])[0].group]
    if config.on != "weight" or list(group.network.shapes) != ["split0.dense"] or group.frozen_names:
        method.refuse(
            "it needs one trained vector for each weight, order=1 and format='dense', and a map with on='weight', as "
            f"presets.{method.kind} has them"
        )
    vector: Float = file.arrays[group.names["split0.dense"]].astype(np.float64).reshape(-1)
    return vector, group.network.scale, config.projection

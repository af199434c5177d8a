"""The arrays that a config and its targets call for: their shapes, and the frozen ones that a file may leave out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.formats import make_format
from tnadapt.algebra.init import Initializer
from tnadapt.algebra.layout import make_layout
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, ShapeError, safe_repr, summarize
from tnadapt.targets.target import Target

# Frozen arrays that a file leaves out, and elements of them together: what a small file may make a reader draw.
MAX_LEFT_OUT, MAX_DRAWN = 1024, 1 << 24
# Trial divisions that factoring may cost: one number of 2**36, or a hundred of 2**23.
_MAX_DIVISIONS = 1 << 18


def plan_of(config: Config, targets: Sequence[Target]) -> SuperLoRA:
    return SuperLoRA(config, [target.shape for target in targets], layers=[target.layer for target in targets])


def check_fit(
    config: Config,
    targets: Sequence[Target],
    shapes: Mapping[str, tuple[int, ...]],
    trained: Sequence[str] | None = None,
) -> None:
    """An error unless arrays of these shapes are the plan's; of those that are not ``trained``, some may be left out.

    It takes time and memory as there are shapes and targets, however large the numbers in the config are.

    Raises
    ------
    ConfigError, ShapeError
        That names what is missing, unknown or of another shape.
    """
    layout = make_layout(config.groups, [target.shape for target in targets], [target.layer for target in targets])
    expected = layout.num_groups * _arrays_of_group(config)
    if expected > len(shapes) + 1024:
        raise ShapeError(f"config and targets make {expected} arrays; there are {len(shapes)}")
    sizes = {size for _, _, size in layout.same_size()}
    if config.splits > 1 and config.combine == "kronecker" and config.split_size == "balanced":
        folds = [config.fold if isinstance(config.fold, tuple) else (size,) for size in sizes]
        if sum(math.isqrt(size) for fold in folds for size in fold) > _MAX_DIVISIONS:
            raise ConfigError(
                "the sizes that split_size='balanced' has to factor are too large; give split_size as an integer"
            )
    found = plan_of(config, targets).param_shapes
    missing = found.keys() - shapes.keys()
    if trained is not None:
        missing -= found.keys() - set(checked_trained(trained, found) or found)
    left_out = found.keys() - shapes.keys() - missing
    if len(left_out) > MAX_LEFT_OUT or sum(math.prod(found[name]) for name in left_out) > MAX_DRAWN:
        raise ShapeError(
            f"{len(left_out)} frozen arrays are left out; at most {MAX_LEFT_OUT} of {MAX_DRAWN} elements together are"
        )
    if missing or not shapes.keys() <= found.keys():
        raise ShapeError(
            f"the arrays must be those of config and targets; missing: {summarize(missing)}; "
            f"unknown: {summarize(shapes.keys() - found.keys())}"
        )
    for name, shape in found.items():
        if shapes.get(name, shape) != shape:
            raise ShapeError(f"{name} has shape {shapes[name]}; config and targets make it {shape}")


def _arrays_of_group(config: Config) -> int:
    def count(name: str) -> int:
        return len(make_format(name, (1,) * config.order, config.rank).shapes)

    leading = "dense" if config.leading == "dense" else config.format
    return config.terms * ((config.splits - 1) * count(leading) + count(config.format))


def checked_trained(trained: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    """Names of trained arrays in the order of the plan; None where they are all of them."""
    if trained is None:
        return None
    if isinstance(trained, str) or not isinstance(trained, Sequence) or not all(isinstance(n, str) for n in trained):
        raise ConfigError(f"trained must be a list of names of arrays, or None for all; got {safe_repr(trained)}")
    chosen = set(trained)
    if not chosen or len(chosen) < len(trained) or not chosen <= shapes.keys():
        raise ConfigError(
            f"trained must name some of the arrays, each once; unknown: {summarize(chosen - shapes.keys())}; there are "
            f"{summarize(shapes)}"
        )
    return None if len(chosen) == len(shapes) else tuple(name for name in shapes if name in chosen)


def drawn(plan: SuperLoRA, trained: Sequence[str] | None, dtype: str) -> dict[str, Callable[[], np.ndarray]]:
    """Of each array that is frozen, what makes it as the seed draws it, rounded to a dtype; in the order of the plan.

    bfloat16 as float32 numbers.
    """
    if trained is None:
        return {}
    chosen, found = set(trained), dict[str, Callable[[], np.ndarray]]()
    kind = "float32" if dtype == "bfloat16" else dtype
    for group, start in zip(plan.groups, plan.starts(trained), strict=True):
        for name, full in group.names.items():
            if full not in chosen:
                found[full] = functools.partial(_drawn, start, name, dtype, kind)
    return found


def _drawn(start: Initializer, name: str, dtype: str, kind: str) -> np.ndarray:
    made: np.ndarray = start.make((name, dtype)).astype(kind)
    return made

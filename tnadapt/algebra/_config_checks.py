"""Checks of the fields of a config: each returns the value in its canonical form, or raises ConfigError."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from tnadapt.errors import ConfigError, integer, safe_repr

from .folding import FOLDS
from .maps import Recipe, checked_projection, is_brought, is_linear, projection_name, takes_ratio
from .named_fold import check_fold, is_named
from .sources import SourceMap, source_from_dict

__all__ = [
    "MAX_INT",
    "checked_before",
    "checked_fold",
    "checked_groups",
    "checked_integer",
    "checked_number",
    "checked_sources",
    "checked_split_size",
    "checked_weight_shape",
    "checked_word",
]

SCOPES = ("plan", "group", "array")

# Values beyond these are typing errors or hostile.
MAX_INT = 1 << 40
MAX_BEFORE = 8


def checked_before(
    before: Any, parameters: Any, scope: Any, offset: Any, projection: Recipe
) -> tuple[Recipe | None, int | None]:
    """Return the map from θ and the number of its parameters."""
    checked_word("scope", scope, SCOPES)
    if not isinstance(offset, bool):
        raise ConfigError(f"offset must be True or False; got {safe_repr(offset)}")
    if parameters is not None:
        parameters = checked_integer("parameters", parameters, 1, MAX_INT)
    if before is None:
        for name, value, default in (
            ("parameters", parameters, None),
            ("scope", scope, "plan"),
            ("offset", offset, True),
        ):
            if value is not default and value != default:
                raise ConfigError(
                    f"{name}={safe_repr(value)} is about the map before the network, and there is none: set "
                    f"before='one-hot', take a preset that has one, such as unilora or tinylora, or leave {name} out"
                )
        return None, None
    try:
        found = checked_projection(before)
    except ConfigError as error:
        raise ConfigError(f"before: {error}") from error
    if not is_linear(found) or not takes_ratio(found):
        raise ConfigError(
            f"before must be a linear map from vectors of any length, such as 'one-hot', 'normal' or 'linear'; got "
            f"{projection_name(found)}"
        )
    if isinstance(found, tuple) and len(found) > MAX_BEFORE:
        raise ConfigError(f"before composes at most {MAX_BEFORE} maps; got {len(found)}")
    if isinstance(found, tuple) and is_brought(found):
        raise ConfigError(
            f"before={projection_name(found)} composes a map whose array the caller brings, which must be the only "
            "map: compose its array with the others"
        )
    if parameters is None:
        raise ConfigError(f"before={found!r} needs the number of parameters: parameters=p, an integer")
    if not offset and not is_linear(projection):
        raise ConfigError(
            f"offset=False starts the arrays at zero, where projection={projection_name(projection)!r} has no "
            "gradient: use offset=True"
        )
    return found, parameters


def checked_weight_shape(weight_shape: Any, fold: str | tuple[int | str, ...]) -> tuple[int, int] | None:
    """Return the shape that all weights must have; None for any."""
    if weight_shape is None:
        return None
    if not isinstance(weight_shape, (tuple, list)) or len(weight_shape) != 2:
        raise ConfigError(f"weight_shape must be (rows, cols), or None for any weights; got {safe_repr(weight_shape)}")
    rows, cols = (checked_integer(f"weight_shape[{side}]", size, 1, 1 << 62) for side, size in enumerate(weight_shape))
    if not isinstance(fold, tuple):
        raise ConfigError(
            f"weight_shape={(rows, cols)} says what the sizes of a fold stand for, and fold={fold!r} names "
            "none: give fold=(weights, rows, cols), or weight_shape=None"
        )
    if is_named(fold):
        raise ConfigError(
            f"fold={fold} takes the shapes that the weights have, and weight_shape={(rows, cols)} demands "
            "one: leave weight_shape out, or give the fold in integers"
        )
    sizes = [int(size) for size in fold]
    inner = list(itertools.accumulate(reversed(sizes), operator.mul))
    if cols not in inner or rows * cols not in inner[inner.index(cols) :]:
        raise ConfigError(
            f"the last sizes of fold={fold} do not multiply to the {rows} rows and {cols} columns of "
            f"weight_shape={(rows, cols)}: give fold=(weights, rows, cols), or weight_shape=None"
        )
    return rows, cols


def checked_fold(fold: Any, axes: Any, order: int) -> str | tuple[int | str, ...]:
    """Return the fold: its name, or its sizes."""
    if isinstance(fold, (tuple, list)):
        sizes = tuple(
            size if isinstance(size, str) else checked_integer(f"fold[{mode}]", size, 1, 1 << 62)
            for mode, size in enumerate(fold)
        )
        if is_named(sizes):
            check_fold(sizes)
        if axes is None and len(sizes) != order:
            raise ConfigError(f"fold={sizes} has {len(sizes)} sizes and order is {order}; set order={len(sizes)}")
        return sizes
    checked_word("fold", fold, FOLDS, "or a tuple of sizes")
    if fold == "stack" and order > 2:
        raise ConfigError(f"fold='stack' makes matrices only and order is {order}; use fold='hypercube' or 'balanced'")
    return str(fold)


def checked_split_size(split_size: Any, order: int) -> int | str | tuple[int, ...]:
    """Return the size of the first split, or of its modes; "balanced"."""
    if isinstance(split_size, (tuple, list)):
        sizes = tuple(checked_integer(f"split_size[{mode}]", size, 1, MAX_INT) for mode, size in enumerate(split_size))
        if len(sizes) != order:
            raise ConfigError(
                f"split_size={safe_repr(sizes)} has {len(sizes)} sizes and order is {order}: give one per mode"
            )
        return sizes
    if isinstance(split_size, str) and split_size == "balanced":
        return split_size
    return checked_integer("split_size", split_size, 1, MAX_INT, 'or "balanced", or a tuple of one size per mode')


def checked_integer(name: str, value: Any, low: int, high: int, other: str = "") -> int:
    return integer(name, value, low, high, ConfigError, other)


def checked_number(name: str, value: Any, most: float = math.inf) -> float:
    if isinstance(value, (bool, str)):
        raise ConfigError(f"{name} must be a number; got {safe_repr(value)}")
    try:
        # Read it as the decimal that it prints as: a float32 of 0.07 means 0.07, not 0.07000000029802322.
        number = float(value) if isinstance(value, (int, float, Fraction)) else float(str(value))
    except Exception:  # str() of any object may raise anything
        raise ConfigError(f"{name} must be a number; got {safe_repr(value)}") from None
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite; got {number!r}")
    if abs(number) > most:
        raise ConfigError(f"{name} must be at most {most:g} in absolute value; got {number!r}")
    return number


def checked_word(name: str, value: Any, words: tuple[str, ...], other: str = "") -> None:
    if not isinstance(value, str) or value not in words:
        listed = ", ".join(repr(word) for word in words)
        other = f" {other}" if other else ""
        raise ConfigError(f"{name} must be one of {listed}{other}; got {safe_repr(value)}")


def checked_groups(groups: Any) -> str | int | tuple[tuple[int, ...], ...]:
    what = '"weight", "layer", "role", an integer of at least 1, or a list of lists of weight indices'
    if isinstance(groups, str):
        if groups not in ("weight", "layer", "role"):
            raise ConfigError(f"groups must be {what}; got {safe_repr(groups)}")
        return groups
    if isinstance(groups, (list, tuple)):
        if not groups or not all(isinstance(group, (list, tuple)) and group for group in groups):
            raise ConfigError(f"groups must be {what}, none of them empty; got {safe_repr(groups)}")
        return tuple(
            tuple(checked_integer(f"groups[{g}]", weight, 0, MAX_INT) for weight in group)
            for g, group in enumerate(groups)
        )
    return checked_integer("groups", groups, 1, 1 << 62, 'or "weight", "layer", "role" or a list of lists')


def checked_sources(sources: Any) -> SourceMap:
    """Return the sources of a config; each may be given as a dictionary, as :meth:`Config.to_dict` writes it."""
    if isinstance(sources, SourceMap):
        return sources
    if not isinstance(sources, Mapping):
        raise ConfigError(
            f"sources must be a mapping of array names to sources, such as {{'factor0': Trained()}}; got "
            f"{safe_repr(sources)}"
        )
    found = {}
    for name, source in sources.items():
        try:
            found[name] = source_from_dict(source) if isinstance(source, Mapping) else source
        except ConfigError as error:
            raise ConfigError(f"sources[{safe_repr(name)}]: {error}") from error
    return SourceMap(found)

"""The setting ``axes``: which sizes of the fold each mode of the network indexes, and in which order."""

from __future__ import annotations

import itertools
from typing import Any

from tnadapt.errors import ConfigError, integer, safe_repr

from .folding import MAX_ORDER
from .formats import Axes

__all__ = ["checked_axes"]


def checked_axes(axes: Any, fold: Any, order: int) -> Axes | None:
    """Return the axes as one tuple of positions per mode, or raise a ConfigError that says what is allowed.

    Examples
    --------
    >>> checked_axes((2, 0, 1), (24, 768, 768), 3)
    ((2,), (0,), (1,))
    >>> checked_axes(((0, 2), (1, 3)), (24, 32, 24, 32), 2)
    ((0, 2), (1, 3))
    """
    if axes is None:
        return None
    if not isinstance(fold, (tuple, list)):
        raise ConfigError(
            f"axes={safe_repr(axes)} are positions in a fold of explicit sizes, and fold={fold!r} has none: give "
            'fold=("weights", "rows", "cols"), or leave axes out'
        )
    if len(fold) > MAX_ORDER:
        raise ConfigError(f"axes reorder up to {MAX_ORDER} sizes; fold has {len(fold)}: merge neighboring ones")
    what = f"axes must name each of the positions 0 to {len(fold) - 1} of fold={tuple(fold)} once"
    if not isinstance(axes, (tuple, list)):
        raise ConfigError(f"{what}, such as {tuple(range(len(fold)))}; got {safe_repr(axes)}")
    found = tuple(
        tuple(
            integer(f"axes[{mode}]", digit, 0, len(fold) - 1, ConfigError)
            for digit in (axis if isinstance(axis, (tuple, list)) else (axis,))
        )
        for mode, axis in enumerate(axes)
    )
    if not all(found) or sorted(itertools.chain.from_iterable(found)) != list(range(len(fold))):
        raise ConfigError(f"{what}, in the order of the network's modes; got {safe_repr(axes)}")
    if len(found) != order:
        raise ConfigError(f"axes={safe_repr(axes)} are {len(found)} modes and order is {order}; set order={len(found)}")
    return found

"""The settings of a map: a frozen dataclass, which configs hold and adapter files store."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tnadapt.algebra._settings_class import require_frozen
from tnadapt.errors import ConfigError, safe_repr

__all__ = ["MapSettings", "check_settings_class", "settings_text"]

# Positions and the like are elided in texts beyond this many.
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class MapSettings:
    """The settings of a map, as ``Config.projection`` takes them.

    A subclass is a frozen dataclass whose fields are the settings. They are written into adapter files, so that their
    values must be ``None``, booleans, numbers, strings, or tuples of these. The map's class names it as its
    ``settings_class``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.maps.Scatter(size=1000)
    Scatter(size=1000, positions=None)
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_plain(value):
                raise ConfigError(
                    f"{type(self).__name__}: {field.name} must be None, a boolean, an integer, a finite float, a "
                    f"string or a tuple of these; got {safe_repr(value)}"
                )


def check_settings_class(kind: str, cls: Any) -> None:
    """Raise a ConfigError unless a map's settings are a frozen dataclass whose fields a file can hold."""
    if not (isinstance(cls, type) and issubclass(cls, MapSettings)):
        raise ConfigError(
            f"map {kind!r}: settings_class must inherit from tnadapt.maps.MapSettings; got {safe_repr(cls)}"
        )
    require_frozen(cls, f"map {kind!r}: the settings class {cls.__name__}", "map")


def settings_text(settings: MapSettings, short: bool = False) -> str:
    """Return the settings that differ from their defaults, such as ``"size=1000"``; long tuples elided if ``short``."""
    told = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        long = short and isinstance(value, tuple) and len(value) > _SHOWN
        told.append(f"{field.name}={f'({len(value)} given)' if long else repr(value)}")
    return ", ".join(told)


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Return whether a file can hold a value and give it back."""
    if isinstance(value, tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, float):
        return type(value) is float and math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 64
    return value is None or type(value) in (bool, str)

"""The configs of presets: their settings, what the caller changes, and the rate that all presets share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Config

__all__ = ["preset_config"]


def preset_config(own: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Return the config of a preset.

    Parameters
    ----------
    own : mapping
        The preset's settings.
    changes : mapping
        Fields that the caller gives, which override them.

    Examples
    --------
    >>> preset_config({"rank": 2}, {"seed": 1}).rate, preset_config({"rank": 2}, {"rate": "sgd"}).rate
    ('adam', 'sgd')
    """
    return Config.from_dict({"rate": "adam", **own, **changes})

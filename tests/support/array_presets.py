"""Presets that train the arrays themselves, for tests that step by SGD, or set parameters to numbers of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tnadapt as tna


class _ArrayPresets:
    """Functions of ``tnadapt.presets``, with ``rate="sgd"``."""

    def __getattr__(self, name: str) -> Callable[..., tna.Config]:
        return functools.partial(getattr(tna.presets, name), rate="sgd")


P = _ArrayPresets()

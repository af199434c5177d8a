"""The usual start: one array of each term is zero, the others are random."""

from __future__ import annotations

from typing import ClassVar

from ._start import Start

__all__ = ["ZeroStart"]


class ZeroStart(Start):
    """Zero and random arrays drawn from the seed, as :mod:`tnadapt.algebra.init` describes. Nothing is subtracted."""

    subtracts: ClassVar[bool] = False

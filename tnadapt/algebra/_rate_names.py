"""The names of the optimizers that :mod:`tnadapt.algebra._rates` has units for."""

from __future__ import annotations

__all__ = ["RATE_NAMES"]

#: Values of ``Config.rate``.
RATE_NAMES = ("adam", "sgd")

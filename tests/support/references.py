"""The independent formulas of ``tnadapt.verify``, with which the tests compare updates."""

from __future__ import annotations

from tnadapt.testing import _reference as reference

__all__ = ["reference"]

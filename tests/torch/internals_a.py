"""What the tests of this folder need from inside of tnadapt.torch, for which it has no public name."""

from __future__ import annotations

from tnadapt.torch._quantized import quantized_type
from tnadapt.torch._state import register_in

__all__ = ["quantized_type", "register_in"]

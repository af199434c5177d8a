"""The private names that tests of this package need: what no public call shows, and numbers that they must replace."""

from __future__ import annotations

from tnadapt.torch import _linear as linear
from tnadapt.torch._delta import Slice
from tnadapt.torch._weights import host_of, reads_outside

__all__ = ["Slice", "host_of", "linear", "reads_outside"]

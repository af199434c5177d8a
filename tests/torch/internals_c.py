"""The private names that tests of this package need: what no public call shows, and numbers that they must replace."""

from __future__ import annotations

from tnadapt.algebra.starting_points import STARTS
from tnadapt.torch import _linear as linear
from tnadapt.torch import _merging as merging
from tnadapt.torch import _rows as batch_rows
from tnadapt.torch._delta import Slice
from tnadapt.torch._strategy_choice import MACHINES, Machine, StepWork, choose, costs, dequantized
from tnadapt.torch._weights import host_of, reads_outside

__all__ = [
    "MACHINES",
    "STARTS",
    "Machine",
    "Slice",
    "StepWork",
    "batch_rows",
    "choose",
    "costs",
    "dequantized",
    "host_of",
    "linear",
    "merging",
    "reads_outside",
]

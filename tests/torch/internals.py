"""The private names of the library that the tests of tnadapt.torch need: each is a debt.

They are what no user sees but what makes a layer fast, numbers that tests replace, and targets found in a checkpoint.
"""

from __future__ import annotations

from tnadapt.algebra.starting_points import STARTS
from tnadapt.targets.attention_layouts import TABLE
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.fused_rows import LayoutError
from tnadapt.torch import _delta as delta
from tnadapt.torch import _forms as forms
from tnadapt.torch import _forward_pass as forward_pass
from tnadapt.torch import _forward_patch as forward_patch
from tnadapt.torch import _merging as merging
from tnadapt.torch import _rows as batch_rows
from tnadapt.torch._delta import Slice, Snapshot, pieces, product_vjp_once, vector
from tnadapt.torch._forward_pass import LowRankLayer
from tnadapt.torch._quantized import quantized_type
from tnadapt.torch._registry import _bytes_held as bytes_held
from tnadapt.torch._registry import drawn, held_by_draws
from tnadapt.torch._state import MemberState, register_in
from tnadapt.torch._strategy_choice import MACHINES, Machine, StepWork, choose, costs, dequantized
from tnadapt.torch._target_selection import TargetSearch
from tnadapt.torch._weights import host_of, reads_outside

__all__ = [
    "MACHINES",
    "STARTS",
    "TABLE",
    "LayoutError",
    "LowRankLayer",
    "Machine",
    "MemberState",
    "Slice",
    "Snapshot",
    "StepWork",
    "TargetSearch",
    "batch_rows",
    "bytes_held",
    "choose",
    "costs",
    "delta",
    "dequantized",
    "drawn",
    "find_stored",
    "forms",
    "forward_pass",
    "forward_patch",
    "held_by_draws",
    "host_of",
    "merging",
    "pieces",
    "product_vjp_once",
    "quantized_type",
    "reads_outside",
    "register_in",
    "vector",
]

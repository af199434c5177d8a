"""Private parts of the library that the tests of ``tnadapt.torch`` need.

They are what no user sees but what makes a layer fast, and the targets that are found in a checkpoint.
"""

from tnadapt.targets.attention_layouts import TABLE
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.fused_rows import LayoutError
from tnadapt.torch import _delta as delta
from tnadapt.torch import _forward_pass as forward_pass
from tnadapt.torch import _forward_patch as forward_patch
from tnadapt.torch import _linear as linear
from tnadapt.torch._delta import DeltaCache, Slice, Snapshot, outer_vjp_once, pieces, vector
from tnadapt.torch._forward_pass import LowRankLayer
from tnadapt.torch._registry import _bytes_held as bytes_held
from tnadapt.torch._registry import drawn, held_by_draws
from tnadapt.torch._target_selection import AttentionModule, attentions

__all__ = [
    "TABLE",
    "AttentionModule",
    "DeltaCache",
    "LayoutError",
    "LowRankLayer",
    "Slice",
    "Snapshot",
    "attentions",
    "bytes_held",
    "delta",
    "drawn",
    "find_stored",
    "forward_pass",
    "forward_patch",
    "held_by_draws",
    "linear",
    "outer_vjp_once",
    "pieces",
    "vector",
]

"""Private parts of ``tnadapt.torch`` that the tests need: what a user cannot see, but what makes a layer fast."""

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
    "AttentionModule",
    "DeltaCache",
    "LowRankLayer",
    "Slice",
    "Snapshot",
    "attentions",
    "bytes_held",
    "delta",
    "drawn",
    "forward_pass",
    "forward_patch",
    "held_by_draws",
    "linear",
    "outer_vjp_once",
    "pieces",
    "vector",
]

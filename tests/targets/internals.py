"""What tests of targets use of inner modules: rules of layouts, names in checkpoints, places of adapters."""

from __future__ import annotations

from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.stored_weights import resolve
from tnadapt.targets import fused_rows as rules
from tnadapt.targets.attention_layouts import (
    TABLE,
    AttentionLayout,
    StoredWeight,
    contested,
    forget_layouts,
    of_class,
    of_config,
    register_layout,
)
from tnadapt.targets.checkpoint_experts import experts_of
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.fused_rows import Facts, Fused, LayoutError, place_rows

__all__ = [
    "TABLE",
    "AttentionLayout",
    "Facts",
    "Fused",
    "LayoutError",
    "StoredWeight",
    "contested",
    "experts_of",
    "find_stored",
    "forget_layouts",
    "of_class",
    "of_config",
    "open_checkpoint",
    "place_rows",
    "register_layout",
    "resolve",
    "rules",
]

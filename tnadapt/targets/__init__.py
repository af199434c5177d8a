"""Targets: the rows of stored weights that an adapter updates.

``target`` defines the class, and rejects targets that share an element. ``roles`` parses the names of projections and
the words by which targets are chosen; ``attention_layouts`` looks up fused query-key-value weights, for models in
memory and checkpoints on disk, and ``fused_rows`` has the rows of q, k and v in them. ``checkpoint_targets`` finds
targets in a checkpoint by names and shapes, and ``checkpoint_experts`` the matrices of experts. ``prefixes`` matches
the weights of one model under two sets of names.
"""

from types import ModuleType

from tnadapt.lazy_names import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name)

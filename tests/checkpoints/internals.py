"""The internals of ``tnadapt.checkpoints`` that tests reach: for failures that no system has on demand, mostly.

Tests import them from this module alone, so that one place follows when the library is restructured.
"""

from __future__ import annotations

from tnadapt.checkpoints import atomic_files, checkpoint, container, population_changes, stored_weights
from tnadapt.checkpoints.merge import _journal as journal
from tnadapt.checkpoints.merge import _merge_checkpoint as merge_job
from tnadapt.checkpoints.merge import _shards as shards
from tnadapt.checkpoints.pretrained_model import MAX_LABELS, TASKS
from tnadapt.targets.checkpoint_targets import find_stored

__all__ = [
    "MAX_LABELS",
    "TASKS",
    "atomic_files",
    "checkpoint",
    "container",
    "find_stored",
    "journal",
    "merge_job",
    "population_changes",
    "shards",
    "stored_weights",
]

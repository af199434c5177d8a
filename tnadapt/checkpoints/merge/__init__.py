"""Merge an adapter into a checkpoint on disk, one tensor at a time, without a framework: ``tnadapt.merge``.

``_merge_checkpoint`` defines the function, and computes each tensor and file. ``checkpoints.stored_weights`` finds the
weights in the checkpoint. ``_destination`` decides what may be replaced, ``_shards`` writes the files, and ``_journal``
resumes an interrupted merge, keeps other processes out and publishes the finished output.
"""

from ._merge_checkpoint import MergeReport, merge

__all__ = ["MergeReport", "merge"]

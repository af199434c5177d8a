"""Merge an adapter into a checkpoint on disk, one tensor at a time, without a framework: ``tnadapt.merge``.

``_merge_checkpoint`` defines the function. ``checkpoints._resolution`` finds the weights in the checkpoint, ``_job``
computes each tensor and file, ``_shards`` writes them, and ``_journal`` resumes an interrupted merge. ``_work_lock``
serializes processes that write to the same destination, ``_publishing`` moves the finished output into place.
"""

from ._merge_checkpoint import MergeReport, merge

__all__ = ["MergeReport", "merge"]

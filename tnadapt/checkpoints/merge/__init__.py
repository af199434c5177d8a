"""Merge an adapter into a checkpoint on disk, one tensor at a time, without a framework: ``tnadapt.merge``.

``merge_checkpoint`` is the call. ``_resolution`` finds the adapter's weights in the checkpoint, ``_job`` decides what
becomes of each tensor and file, ``_shards`` writes them, and ``_journal`` resumes an interrupted merge. ``_work_lock``
serializes processes that write to one destination, ``_publishing`` puts the finished output in place.
"""

from .merge_checkpoint import MergeReport, merge

__all__ = ["MergeReport", "merge"]

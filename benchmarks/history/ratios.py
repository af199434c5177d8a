"""The ratios of ``short.py`` for asv, which keeps them by commit.

asv times functions one by one. Here both of a case take turns in one call, which returns the ratio; asv only tracks
that number, so that its history depends little on how fast or busy the machine was on the day.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import short
import short_cases

__all__ = ["track_ratio"]


def track_ratio(case: str) -> float:
    """Return the ratio of one case."""
    return float(short.measure(short_cases.CASES[case]).get("ratio", "nan"))


track_ratio.params = list(short_cases.CASES)  # type: ignore[attr-defined]
track_ratio.param_names = ["case"]  # type: ignore[attr-defined]
track_ratio.unit = "ratio"  # type: ignore[attr-defined]
track_ratio.timeout = 120  # type: ignore[attr-defined]
# The same benchmark as long as it has this version: asv would otherwise start a new history after every edit above.
track_ratio.version = "1"  # type: ignore[attr-defined]

"""Decomposition: fit the parameters of a config to given updates.

``decompose`` fits group by group, ``search_rank`` finds the smallest rank within an error, and ``extraction`` creates
an adapter from a tuned checkpoint. The solvers are one subject a file.
"""

from ._decompose import FoundRank, Settings, decompose, search_rank, smallest_rank
from ._single_tensor import fit_format
from .fits import Fit, FitReport, GroupReport, Limits, Step

__all__ = [
    "Fit",
    "FitReport",
    "FoundRank",
    "GroupReport",
    "Limits",
    "Settings",
    "Step",
    "decompose",
    "fit_format",
    "search_rank",
    "smallest_rank",
]

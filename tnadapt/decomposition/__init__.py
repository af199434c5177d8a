"""Given updates to the parameters that make them: the standalone decomposition call.

One solver a file: SVD, ALS, HOOI and TT-SVD of one tensor (``single``), Kronecker products and sums (``splits``), free
padding (``networks``), least squares through F (``least_squares``, ``arrays``), gradients (``gradient``), and what no
parameters can fall below (``bounds``).
"""

from ._decompose import Settings, decompose
from ._fit_report import FitReport, GroupReport, Step
from ._rank_search import FoundRank, search_rank, smallest_rank

__all__ = ["FitReport", "FoundRank", "GroupReport", "Settings", "Step", "decompose", "search_rank", "smallest_rank"]

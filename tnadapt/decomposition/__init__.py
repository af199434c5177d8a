"""Decomposition: fit the parameters of a config to given updates.

``_decompose`` has :func:`tnadapt.decompose` and the search for a rank; ``extraction`` creates an adapter from a tuned
checkpoint. ``_group_fits`` fits the groups of a plan, each through its F: by ``_network_fit`` before F, which divides
sums of Kronecker products into single tensors (``_single_tensor``) and leaves Hadamard products to ``_hadamard_fit``;
or, for frozen, tied and scaled arrays, by ``_parameter_fit``. ``_reports`` says how good the fits are.
:mod:`tnadapt.tensors` has the same drivers: ``cp_als``, ``hooi`` (Tucker), ``tt_svd``, and ``completion`` where
elements are missing, with ``linear_algebra`` (singular vectors) and ``block_passes``. ``_least_squares`` has the
general solvers, ``fits`` says when an iteration stops and what a fit is, ``lower_bounds`` whether it is the optimum.
"""

from ._decompose import FoundRank, Settings, decompose, search_rank, smallest_rank
from ._reports import FitReport, GroupReport, Step
from ._single_tensor import fit_format
from .fits import Fit, Limits

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

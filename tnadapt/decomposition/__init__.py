"""Decomposition: fit the parameters of a config to given updates.

Each file has one solver: leading singular triplets (``_truncated_svd``, ``_lanczos``) and the proof that they are the
leading ones (``leading_proof``), the nearest tensor of rank one (``rank_one``), SVD, ALS, HOOI and TT-SVD of one
tensor (``_single_tensor``), alternating least squares of one tensor in any format (``_general_fit``), sweeps over a
train (``train_als``), Kronecker products and sums (``_kronecker_sums``), Hadamard products (``_hadamard_fit``), a
group before F with free padding (``_network_fit``, ``_padded_fit``), and a group through F (``_through_map``) by least
squares (``_least_squares``), array by array (``_alternating``) or by gradients (``_gradient``). Observed elements
(``_observed_elements``, ``completion``) are fitted by sweeps (``_observed_sweeps``) and the damped Gauss-Newton method
(``_damped_gauss_newton``). Parameters of frozen, tied and scaled arrays are fitted together (``_parameter_fit``), the
matrices of a frozen Tucker core from its equivalence with the update's (``_tensor_equivalence``). ``_lower_bounds``
computes lower bounds of the error, ``_rank_search`` finds the smallest rank within an error, and ``extraction`` creates
an adapter from a tuned checkpoint.
"""

from ._decompose import Settings, decompose
from ._rank_search import FoundRank, search_rank, smallest_rank
from ._single_tensor import Fit, Limits, fit_format
from .fits import FitReport, GroupReport, Step

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

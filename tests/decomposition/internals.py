"""What is tested here and has no public name: solvers, bounds and proofs, of which a user sees the results alone.

Modules are here where a test lowers one of their thresholds, so that a small problem goes the way of a large one.
"""

from __future__ import annotations

from tnadapt.decomposition import _group_fits as group_fits
from tnadapt.decomposition import _network_fit as network_fit
from tnadapt.decomposition import _parameter_fit as parameter_fit
from tnadapt.decomposition import completion, cp_als, linear_algebra, tt_svd
from tnadapt.decomposition._least_squares import damped_gauss_newton, least_squares
from tnadapt.decomposition.block_passes import BlockPasses
from tnadapt.decomposition.cp_als import CPSweeps
from tnadapt.decomposition.linear_algebra import Algebra, leading_triplets, tensorly_on, truncated_pays
from tnadapt.decomposition.lower_bounds import lower_bound
from tnadapt.decomposition.sparse_tensor import SparseTensor

__all__ = [
    "Algebra",
    "BlockPasses",
    "CPSweeps",
    "SparseTensor",
    "completion",
    "cp_als",
    "damped_gauss_newton",
    "group_fits",
    "leading_triplets",
    "least_squares",
    "linear_algebra",
    "lower_bound",
    "network_fit",
    "parameter_fit",
    "tensorly_on",
    "truncated_pays",
    "tt_svd",
]

"""Tensors as small networks: products, arithmetic and decompositions, on every array library.

Conventions are TensorLy's: row-major unfoldings, factors of shape ``(size, rank)``, and results that unpack as
``weights, factors`` or as a list of cores. A result is a tuple with methods: it forms the tensor, single entries and
slices, and adds, multiplies and rounds without forming it.
"""

from typing import TYPE_CHECKING

from tnadapt.algebra.products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from tnadapt.decomposition.fits import FitOutcome
from tnadapt.lazy_names import lazy_names

if TYPE_CHECKING:
    from ._cp_decomposition import cp
    from ._cross import tt_cross
    from ._decomposed import CPTensor, Decomposed, TuckerTensor
    from ._kronecker import HadamardTensor, KroneckerTensor, hadamard_decomposition, kronecker_decomposition
    from ._matrix_products import (
        fold,
        inner,
        khatri_rao,
        mode_dot,
        multi_mode_dot,
        outer,
        row_khatri_rao,
        unfold,
    )
    from ._parafac2 import Parafac2Tensor, parafac2
    from ._random_tensors import random_cp, random_tr, random_tt, random_tt_matrix, random_tucker
    from ._tensor_chains import TRTensor, TTMatrix, TTTensor
    from ._tensor_file import load
    from ._train_decomposition import tensor_ring, tensor_train, tt_matrix
    from ._tucker_decomposition import tucker

__all__ = [
    "CPTensor",
    "Decomposed",
    "FitOutcome",
    "HadamardTensor",
    "KroneckerTensor",
    "Parafac2Tensor",
    "TRTensor",
    "TTMatrix",
    "TTTensor",
    "TuckerTensor",
    "cp",
    "cp_to_tensor",
    "fold",
    "hadamard_decomposition",
    "inner",
    "khatri_rao",
    "kron_matvec",
    "kronecker",
    "kronecker_decomposition",
    "load",
    "mode_dot",
    "multi_mode_dot",
    "outer",
    "parafac2",
    "random_cp",
    "random_tr",
    "random_tt",
    "random_tt_matrix",
    "random_tucker",
    "row_khatri_rao",
    "tensor_ring",
    "tensor_train",
    "tt_cross",
    "tt_matrix",
    "tt_to_tensor",
    "tucker",
    "tucker_to_tensor",
    "unfold",
]

# Imported on first use: one decomposition needs few of them.
_LAZY = {
    name: module
    for module, names in {
        "_cp_decomposition": ("cp",),
        "_cross": ("tt_cross",),
        "_decomposed": ("CPTensor", "Decomposed", "TuckerTensor"),
        "_kronecker": ("HadamardTensor", "KroneckerTensor", "hadamard_decomposition", "kronecker_decomposition"),
        "_matrix_products": (
            "fold",
            "inner",
            "khatri_rao",
            "mode_dot",
            "multi_mode_dot",
            "outer",
            "row_khatri_rao",
            "unfold",
        ),
        "_parafac2": ("Parafac2Tensor", "parafac2"),
        "_random_tensors": ("random_cp", "random_tr", "random_tt", "random_tt_matrix", "random_tucker"),
        "_tensor_chains": ("TRTensor", "TTMatrix", "TTTensor"),
        "_tensor_file": ("load",),
        "_train_decomposition": ("tensor_ring", "tensor_train", "tt_matrix"),
        "_tucker_decomposition": ("tucker",),
    }.items()
    for name in names
}


__getattr__, __dir__ = lazy_names(__name__, _LAZY)

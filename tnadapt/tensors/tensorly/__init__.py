"""The functions that TensorLy has, too, under its names, orders of arguments and keywords.

A script that uses TensorLy runs after its imports are changed to ``from tnadapt.tensors.tensorly import …``, for the
functions that are here. They call those of :mod:`tnadapt.tensors`, and return its results, which unpack as TensorLy's
and know their error. There is no global backend: the library is that of the arrays. Where TensorLy cuts a rank to the
largest possible one, so do these. A keyword acts as in TensorLy, or raises an error that says what to do instead.
"""

from .._matrix_products import inner, outer
from .._modes import mode_dot, tensor_to_vec, unfold
from ._chain_forms import (
    tr_to_tensor,
    tr_to_unfolded,
    tr_to_vec,
    tt_matrix_to_matrix,
    tt_matrix_to_tensor,
    tt_matrix_to_unfolded,
    tt_matrix_to_vec,
    tt_to_tensor,
    tt_to_unfolded,
    tt_to_vec,
)
from ._cp_forms import (
    cp_flip_sign,
    cp_mode_dot,
    cp_norm,
    cp_normalize,
    cp_permute_factors,
    cp_to_tensor,
    cp_to_unfolded,
    cp_to_vec,
)
from ._estimators import (
    CP,
    CP_NN,
    CP_NN_HALS,
    TensorRing,
    TensorRingALS,
    TensorTrain,
    TensorTrainMatrix,
    Tucker,
    Tucker_NN,
    Tucker_NN_HALS,
)
from ._parafac import (
    non_negative_parafac,
    non_negative_parafac_hals,
    parafac,
)
from ._partial_modes import (
    batched_outer,
    fold,
    khatri_rao,
    kronecker,
    multi_mode_dot,
    partial_fold,
    partial_tensor_to_vec,
    partial_unfold,
    partial_vec_to_tensor,
    vec_to_tensor,
)
from ._partial_tucker import (
    partial_tucker,
)
from ._random_draws import (
    random_cp,
    random_tensor,
    random_tr,
    random_tt,
    random_tt_matrix,
    random_tucker,
)
from ._train_and_ring import (
    tensor_ring,
    tensor_ring_als,
    tensor_train,
    tensor_train_matrix,
)
from ._tucker_calls import (
    non_negative_tucker,
    non_negative_tucker_hals,
    tucker,
)
from ._tucker_forms import (
    tucker_mode_dot,
    tucker_normalize,
    tucker_to_tensor,
    tucker_to_unfolded,
    tucker_to_vec,
)

__all__ = [
    "CP",
    "CP_NN",
    "CP_NN_HALS",
    "TensorRing",
    "TensorRingALS",
    "TensorTrain",
    "TensorTrainMatrix",
    "Tucker",
    "Tucker_NN",
    "Tucker_NN_HALS",
    "batched_outer",
    "cp_flip_sign",
    "cp_mode_dot",
    "cp_norm",
    "cp_normalize",
    "cp_permute_factors",
    "cp_to_tensor",
    "cp_to_unfolded",
    "cp_to_vec",
    "fold",
    "inner",
    "khatri_rao",
    "kronecker",
    "mode_dot",
    "multi_mode_dot",
    "non_negative_parafac",
    "non_negative_parafac_hals",
    "non_negative_tucker",
    "non_negative_tucker_hals",
    "outer",
    "parafac",
    "partial_fold",
    "partial_tensor_to_vec",
    "partial_tucker",
    "partial_unfold",
    "partial_vec_to_tensor",
    "random_cp",
    "random_tensor",
    "random_tr",
    "random_tt",
    "random_tt_matrix",
    "random_tucker",
    "tensor_ring",
    "tensor_ring_als",
    "tensor_to_vec",
    "tensor_train",
    "tensor_train_matrix",
    "tr_to_tensor",
    "tr_to_unfolded",
    "tr_to_vec",
    "tt_matrix_to_matrix",
    "tt_matrix_to_tensor",
    "tt_matrix_to_unfolded",
    "tt_matrix_to_vec",
    "tt_to_tensor",
    "tt_to_unfolded",
    "tt_to_vec",
    "tucker",
    "tucker_mode_dot",
    "tucker_normalize",
    "tucker_to_tensor",
    "tucker_to_unfolded",
    "tucker_to_vec",
    "unfold",
    "vec_to_tensor",
]

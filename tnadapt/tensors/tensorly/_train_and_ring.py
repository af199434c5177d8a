"""Tensor trains, TT matrices and tensor rings under TensorLy's names and keywords."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends.backend import Array
from tnadapt.decomposition.matrix_truncation import Leading, MatrixTruncation
from tnadapt.decomposition.ring_als import ring_svd
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from .. import _ring_decomposition, _train_decomposition
from .._checks import as_tensor, integer_of, mode_of
from .._requests import requested
from .._tensor_chains import TRTensor, TTTensor
from .._truncation import ranks_of, ring_ranks
from .._tt_matrix import TTMatrix
from ._keywords import Sweeps, ranks_by_share, svd_method, tolerance

__all__ = ["tensor_ring", "tensor_ring_als", "tensor_train", "tensor_train_matrix"]


def tensor_train(
    input_tensor: Any,
    rank: Any,
    svd: str = "truncated_svd",
    verbose: bool | int = False,
    random_state: Any = None,
) -> TTTensor:
    """Decompose a tensor into a tensor train; :func:`tnadapt.tensor_train` with TensorLy's keywords.

    Parameters
    ----------
    input_tensor : array, shape (d_1, …, d_M)
        Real or complex.
    rank : int, sequence of int, float or "same"
        One for all bonds, one each with the 1 at both ends, or the share of the tensor's parameters. A rank above what
        is possible is cut to it.
    svd : {"truncated_svd", "symeig_svd", "randomized_svd"}
        The first two are computed in the same way: exactly, and no more than the leading singular vectors.
    verbose : bool or int
        Whether to print the shapes of the cores.
    random_state : int, RandomState or Generator, optional
        Seed of random projections; 0 if None.

    Returns
    -------
    TTTensor
        Of cores of shape (r_{m-1}, d_m, r_m), with its error and a bound in ``outcome``.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity.
    ValueError
        If the number of ranks, or the first or the last one, is wrong.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    Costs the SVDs of M - 1 matrices, the first of shape (d_1, d_2 ⋯ d_M). Oseledets, "Tensor-train decomposition" (SIAM
    J. Sci. Comput. 33, 2011).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_tt, tt_to_tensor
    >>> tensor = random_tt((3, 4, 5), (1, 2, 3, 1), full=True, random_state=0)
    >>> train = tensor_train(tensor, rank=[1, 2, 100, 1])
    >>> train.rank, abs(tt_to_tensor(train) - tensor).max() < 1e-10
    ((1, 2, 5, 1), np.True_)
    """
    _, array = as_tensor(input_tensor)
    shape = tuple(int(size) for size in array.shape)
    found = _train_decomposition.tensor_train(
        array, _bonds("validate_tt_rank", shape, shape, rank), svd=svd_method(svd), random_state=random_state
    )
    _report("TT", list(found), verbose)
    return found


def tensor_train_matrix(
    tensor: Any,
    rank: Any,
    svd: str = "truncated_svd",
    verbose: bool | int = False,
    random_state: Any = None,
) -> TTMatrix:
    """Decompose a matrix with divided rows and columns; :func:`tnadapt.tt_matrix` with TensorLy's keywords.

    Parameters
    ----------
    tensor : array, shape (rows_1, …, rows_M, cols_1, …, cols_M)
    rank, svd, verbose, random_state
        As for :func:`tensor_train`, of M modes.

    Returns
    -------
    TTMatrix
        Of cores of shape (r_{m-1}, rows_m, cols_m, r_m), with its error and a bound in ``outcome``.

    Raises
    ------
    ShapeError
        If the number of modes is odd, or the tensor has NaN or infinity.
    ValueError
        If the number of ranks, or the first or the last one, is wrong.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    A tensor train whose mode m is row m and column m together, and costs as much. Oseledets (SIAM J. Matrix Anal. 31,
    2010).

    Examples
    --------
    >>> import numpy as np
    >>> found = tensor_train_matrix(np.eye(6).reshape(2, 3, 2, 3), rank=1)
    >>> [core.shape for core in found], bool(np.allclose(found.to_matrix(), np.eye(6)))
    ([(1, 2, 2, 1), (1, 3, 3, 1)], True)
    """
    _, array = as_tensor(tensor)
    shape = tuple(int(size) for size in array.shape)
    half = len(shape) // 2
    merged = tuple(row * col for row, col in zip(shape[:half], shape[half:], strict=False))
    ranks = _bonds("validate_tt_matrix_rank", shape, merged, rank) if len(shape) == 2 * half else 1
    found = _train_decomposition.tt_matrix(array, ranks, svd=svd_method(svd), random_state=random_state)
    _report("TT-matrix", list(found), verbose)
    return found


def tensor_ring(
    input_tensor: Any,
    rank: Any,
    mode: int = 0,
    svd: str = "truncated_svd",
    verbose: bool | int = False,
    random_state: Any = None,
) -> TRTensor:
    """Decompose a tensor into a tensor ring by TR-SVD.

    Parameters
    ----------
    input_tensor : array, shape (d_1, …, d_M), M ≥ 2
        Real or complex.
    rank : int, sequence of int, float or "same"
        One for all bonds, one each with the first again at the end, or the share of the tensor's parameters. A rank
        above what is possible is cut to it.
    mode : int
        The mode whose core is computed first.
    svd, verbose, random_state
        As for :func:`tensor_train`.

    Returns
    -------
    TRTensor
        Of cores of shape (r_{m-1}, d_m, r_m), with its error in ``outcome``.

    Raises
    ------
    ShapeError
        If the product of the two ranks beside ``mode`` is above its size, or the tensor has NaN or infinity.
    ValueError
        If the number of ranks is wrong, or the first and the last one differ.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    Costs the SVDs of M - 1 matrices. :func:`tnadapt.tensor_ring` improves the result by alternating least squares, and
    takes any ranks. Zhao et al., "Tensor ring decomposition" (arXiv 1606.05535).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_tr
    >>> ring = tensor_ring(random_tr((6, 4, 5), (2, 3, 2, 2), full=True, random_state=0), rank=[2, 3, 2, 2])
    >>> ring.rank, ring.error < 0.05
    ((2, 3, 2, 2), True)
    """
    request = requested(input_tensor, rank, None, random_state=random_state, least_order=2)
    backend, shape = request.backend, request.shape
    ranks, first = _ring_ranks(shape, rank), mode_of(mode, shape)
    turned = [(first + step) % len(shape) for step in range(len(shape))]
    sizes, bonds = [shape[one] for one in turned], [ranks[one] for one in turned]
    product, most = bonds[0] * bonds[1], min(sizes[0], math.prod(sizes[1:]))
    if product > most:
        raise ShapeError(
            f"the ranks beside mode {first} multiply to {product}, above {most}, the largest that is possible: use "
            "smaller ranks, another mode=, or tensor_ring_als(), which takes any ranks"
        )
    truncation = MatrixTruncation(backend, request.tensor, svd_method(svd), request.seed)

    def truncated(matrix: Array, bond: int) -> Leading:
        return truncation.left_to_rank(matrix, product if bond == 0 else bonds[bond + 1])

    def closed(tensor: Array) -> TRTensor:
        cores = ring_svd(backend, backend.permute_dims(tensor, turned), bonds[0], truncated)
        return TRTensor([cores[turned.index(number)] for number in range(len(shape))])

    found = closed(request.tensor)
    _report("TR", list(found), verbose)
    return request.finished(found, "TR-SVD", closed=closed)


def tensor_ring_als(
    tensor: Any,
    rank: Any,
    ls_solve: str = "lstsq",
    n_iter_max: int = 100,
    tol: float | None = 1e-6,
    random_state: Any = None,
    verbose: bool | int = False,
    callback: Any = None,
) -> TRTensor:
    """Decompose a tensor into a tensor ring by ALS; :func:`tnadapt.tensor_ring` with TensorLy's keywords.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M), M ≥ 2
        Real or complex.
    rank : int, sequence of int, float or "same"
        As for :func:`tensor_ring`, but any rank is allowed. Ranks with which a ring represents every tensor are enough:
        larger ones are cut to them.
    ls_solve : {"lstsq", "normal_eq"}
        Accepted: both are solved by normal equations, with a small ridge if these are singular, and a step that
        increases the error is not taken.
    n_iter_max : int
        Maximum number of sweeps.
    tol : float or None
        The iteration stops when a sweep reduces the relative error by no more than this.
    random_state : int, RandomState or Generator, optional
        Seed of the start; 0 if None, so that results repeat.
    verbose : bool or int
        Whether to print the error of each sweep.
    callback : callable, optional
        Called with the result so far and its relative error; stops the iteration if it returns True.

    Returns
    -------
    TRTensor
        With its error and history in ``outcome``.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity.
    ValueError
        If the number of ranks is wrong, or the first and the last one differ.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    A sweep costs ``prod(d) r²`` multiply-adds for each mode. Zhao et al., "Tensor ring decomposition" (arXiv
    1606.05535).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_tr
    >>> tensor = random_tr((4, 5, 6), 2, full=True, random_state=0) - 1.0
    >>> ring, errors = tensor_ring_als(tensor, rank=2), []
    >>> again = tensor_ring_als(tensor, rank=2, callback=lambda found, error: errors.append(error))
    >>> ring.rank, errors == list(ring.history), ring.error < 0.1
    ((2, 2, 2, 2), True, True)
    """
    if ls_solve not in ("lstsq", "normal_eq"):
        raise ConfigError(f"ls_solve must be 'lstsq' or 'normal_eq'; got {safe_repr(ls_solve)}")
    _, array = as_tensor(tensor)
    shape = tuple(map(int, array.shape))
    sweeps = Sweeps(callback, verbose, TRTensor)
    found = _ring_decomposition.tensor_ring(
        array, ring_ranks(_ring_ranks(shape, rank), shape), init="random", random_state=random_state,
        tol=tolerance(tol),
        max_iterations=integer_of("n_iter_max", n_iter_max, 0), callback=sweeps.observer,
    )  # fmt: skip
    sweeps.finish(found)
    return found


def _bonds(function: str, shape: tuple[int, ...], modes: tuple[int, ...], rank: Any) -> list[int]:
    """Return the ranks of the inner bonds of a train, at most those that are possible."""
    rank = ranks_by_share(function, shape, rank)
    listed = list(rank) if isinstance(rank, (list, tuple, np.ndarray)) else rank
    if isinstance(listed, list):
        if len(listed) != len(modes) + 1 or (listed[0], listed[-1]) != (1, 1):
            raise ShapeError(
                f"rank must be a number, or {len(modes) + 1} of them of which the first and the last are 1; got "
                f"{safe_repr(rank)}"
            )
        listed = listed[1:-1]
    wanted, left, found = ranks_of(listed, len(modes) - 1, "bonds"), 1, []
    for bond, one in enumerate(wanted):
        left = min(one, left * modes[bond], math.prod(modes[bond + 1 :]))
        found.append(left)
    return found


def _ring_ranks(shape: tuple[int, ...], rank: Any) -> list[int]:
    rank = ranks_by_share("validate_tr_rank", shape, rank)
    listed = list(rank) if isinstance(rank, (list, tuple, np.ndarray)) else rank
    if isinstance(listed, list):
        if len(listed) != len(shape) + 1 or listed[0] != listed[-1]:
            raise ShapeError(
                f"rank must be a number, or {len(shape) + 1} of them of which the first and the last are the same; got "
                f"{safe_repr(rank)}"
            )
        listed = listed[:-1]
    return ranks_of(listed, len(shape), "bonds")


def _report(form: str, cores: Sequence[Array], verbose: bool | int) -> None:
    if verbose:
        for number, core in enumerate(cores):
            print(f"{form} factor {number} computed with shape {tuple(core.shape)}")

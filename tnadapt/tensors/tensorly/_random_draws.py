"""Random tensors in each form, with TensorLy's numbers, names and keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import load_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.tensorly_calls import call
from tnadapt.errors import ConfigError, safe_repr

from .._cp_tensor import CPTensor
from .._requests import seed_of
from .._tensor_chains import TRTensor, TTTensor
from .._tt_matrix import TTMatrix
from .._tucker_tensor import TuckerTensor

__all__ = ["random_cp", "random_tensor", "random_tr", "random_tt", "random_tt_matrix", "random_tucker"]


class _Context:
    """The library, dtype and device that TensorLy's ``**context`` asks for.

    The dtype may be a name, or a dtype of NumPy, torch or JAX; one of torch chooses torch.
    """

    def __init__(self, context: dict[str, Any]) -> None:
        words = dict(context)
        dtype, self.device = words.pop("dtype", "float64"), words.pop("device", None)
        owner = type(dtype).__module__.partition(".")[0]
        self.backend = load_backend(words.pop("backend", "torch" if owner == "torch" else "numpy"))
        if words.pop("requires_grad", False):
            raise ConfigError("requires_grad=True is not drawn: call requires_grad_() on the arrays that learn")
        if words:
            raise ConfigError(
                f"{', '.join(sorted(words))} is no part of a context; expected backend=, dtype= and device="
            )
        try:
            self.dtype = np.dtype(dtype).name
        except TypeError:
            self.dtype = str(dtype).rpartition(".")[2]

    def __call__(self, array: Array) -> Array:
        if self.dtype not in ("float32", "float64", "complex64", "complex128"):
            raise ConfigError(f"dtype must be a real or complex floating one; got {safe_repr(self.dtype)}")
        return self.backend.asarray(np.asarray(array), self.dtype, self.device)


def _drawn(name: str, shape: Sequence[int], random_state: Any, *given: Any, **words: Any) -> Any:
    """Call TensorLy on the host; None draws from NumPy's global generator, as there."""
    if isinstance(random_state, np.random.Generator):
        random_state = seed_of(random_state)
    return call(load_backend("numpy"), f"random.{name}", tuple(shape), *given, random_state=random_state, **words)


def random_tensor(shape: Sequence[int], random_state: Any = None, **context: Any) -> Array:
    """Draw a tensor of uniform numbers from 0 to 1.

    Parameters
    ----------
    shape : sequence of int
    random_state : int, RandomState or Generator, optional
        NumPy's global generator if None, as in TensorLy.
    **context
        ``dtype``, ``device``, and ``backend``, the name of a library ("numpy").

    Returns
    -------
    array, shape ``shape``

    Raises
    ------
    ConfigError
        If the context has something else.

    Examples
    --------
    >>> random_tensor((2, 3), random_state=0, dtype="float32").dtype
    dtype('float32')
    """
    place = _Context(context)
    return place(_drawn("random_tensor", shape, random_state))


def random_cp(
    shape: Sequence[int],
    rank: int,
    full: bool = False,
    orthogonal: bool = False,
    random_state: Any = None,
    normalise_factors: bool = True,
    **context: Any,
) -> Any:
    """Draw a CP tensor with uniform factors, by the same numbers as TensorLy.

    Parameters
    ----------
    shape : sequence of int
    rank : int
    full : bool
        Whether to return the tensor instead of its factors.
    orthogonal : bool
        Whether the columns of each factor are orthonormal.
    random_state, **context
        As for :func:`random_tensor`.
    normalise_factors : bool
        Whether the columns have norm 1, and the weights the norms.

    Returns
    -------
    CPTensor, or array if ``full``

    Raises
    ------
    ValueError
        If so many orthonormal columns do not fit.
    ConfigError
        If the context has something else.

    Examples
    --------
    >>> random_cp((3, 4, 5), 2, random_state=0).factors[1].shape
    (4, 2)
    """
    place = _Context(context)
    weights, factors = _drawn(
        "random_cp", shape, random_state, rank, orthogonal=orthogonal, normalise_factors=normalise_factors
    )
    found = CPTensor(place(weights), [place(factor) for factor in factors])
    return found.to_tensor() if full else found


def random_tucker(
    shape: Sequence[int],
    rank: int | Sequence[int],
    full: bool = False,
    orthogonal: bool = False,
    random_state: Any = None,
    non_negative: bool = False,
    **context: Any,
) -> Any:
    """Draw a Tucker tensor with a uniform core and factors, by the same numbers as TensorLy.

    Parameters
    ----------
    shape : sequence of int
    rank : int or sequence of int
        One for all modes, or one each.
    full, random_state, **context
        As for :func:`random_cp`.
    orthogonal : bool
        Whether the columns of each factor are orthonormal.
    non_negative : bool
        Whether orthonormal factors are replaced by their magnitudes; uniform numbers are not negative.

    Returns
    -------
    TuckerTensor, or array if ``full``

    Raises
    ------
    ConfigError
        If the context has something else.

    Examples
    --------
    >>> random_tucker((3, 4, 5), (2, 2, 3), random_state=0).rank
    (2, 2, 3)
    """
    place = _Context(context)
    ranks = [int(rank)] * len(shape) if isinstance(rank, (int, np.integer)) else rank
    core, factors = _drawn(
        "random_tucker", shape, random_state, ranks, orthogonal=orthogonal, non_negative=non_negative
    )
    found = TuckerTensor(place(core), [place(factor) for factor in factors])
    return found.to_tensor() if full else found


def random_tt(
    shape: Sequence[int], rank: int | Sequence[int], full: bool = False, random_state: Any = None, **context: Any
) -> Any:
    """Draw a tensor train with uniform cores, by the same numbers as TensorLy.

    Parameters
    ----------
    shape : sequence of int
    rank : int or sequence of int
        One for all bonds, or one each with the 1 at both ends.
    full, random_state, **context
        As for :func:`random_cp`.

    Returns
    -------
    TTTensor, or array if ``full``

    Raises
    ------
    ValueError
        If the ranks do not fit the shape.
    ConfigError
        If the context has something else.

    Examples
    --------
    >>> random_tt((3, 4, 5), (1, 2, 2, 1), random_state=0).rank
    (1, 2, 2, 1)
    """
    place = _Context(context)
    found = TTTensor([place(core) for core in _drawn("random_tt", shape, random_state, rank)])
    return found.to_tensor() if full else found


def random_tr(
    shape: Sequence[int], rank: int | Sequence[int], full: bool = False, random_state: Any = None, **context: Any
) -> Any:
    """Draw a tensor ring with uniform cores, by the same numbers as TensorLy.

    Parameters
    ----------
    shape : sequence of int
    rank : int or sequence of int
        One for all bonds, or one each with the first again at the end.
    full, random_state, **context
        As for :func:`random_cp`.

    Returns
    -------
    TRTensor, or array if ``full``

    Raises
    ------
    ValueError
        If the ranks do not fit the shape.
    ConfigError
        If the context has something else.

    Examples
    --------
    >>> random_tr((3, 4, 5), (2, 3, 2, 2), random_state=0).rank
    (2, 3, 2, 2)
    """
    place = _Context(context)
    found = TRTensor([place(core) for core in _drawn("random_tr", shape, random_state, rank)])
    return found.to_tensor() if full else found


def random_tt_matrix(
    shape: Sequence[int], rank: int | Sequence[int], full: bool = False, random_state: Any = None, **context: Any
) -> Any:
    """Draw a TT matrix with uniform cores, by the same numbers as TensorLy.

    Parameters
    ----------
    shape : sequence of int
        How the rows are divided into modes, then the columns.
    rank : int or sequence of int
        As for :func:`random_tt`.
    full, random_state, **context
        As for :func:`random_cp`.

    Returns
    -------
    TTMatrix, or array of shape ``shape`` if ``full``

    Raises
    ------
    ValueError
        If the ranks do not fit the shape.
    ConfigError
        If the context has something else.

    Examples
    --------
    >>> random_tt_matrix((2, 3, 4, 5), 2, random_state=0).shape
    (6, 20)
    """
    place = _Context(context)
    found = TTMatrix([place(core) for core in _drawn("random_tt_matrix", shape, random_state, rank)])
    return found.to_tensor() if full else found

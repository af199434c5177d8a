"""Checks of arguments: tensors, modes, ranks and errors; and the truncation of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Array, Backend, get_backend
from tnadapt.decomposition.linear_algebra import kept
from tnadapt.errors import BackendError, ShapeError, safe_repr

__all__ = [
    "alike",
    "as_tensor",
    "as_tensors",
    "error_limit",
    "finite",
    "inner_ranks",
    "integer_of",
    "mode_of",
    "numeric",
    "ranks_of",
    "ring_ranks",
    "rounded_cores",
    "scalar_of",
    "useful_rank",
]


# -- Tensors, modes and numbers ----------------------------------------------------------------------------------------


#: Dtypes that computations run in; others are converted to the first.
_NUMERIC = ("float64", "float32", "complex128", "complex64")
_HALF = ("float16", "bfloat16")


def as_tensor(given: Any, what: str = "the tensor") -> tuple[Backend, Array]:
    """Return the library of a tensor, and the tensor in a dtype that computations run in.

    Parameters
    ----------
    given : array, or nested lists of numbers
        Lists become NumPy arrays. Integers and booleans become float64 in NumPy, and float32 in other libraries; half
        precision becomes float32.
    what : str
        What the tensor is, for errors.

    Returns
    -------
    Backend
    array

    Raises
    ------
    BackendError
        If it is not an array of a known library, or holds something else than numbers.
    ShapeError
        If nested lists differ in length.

    Examples
    --------
    >>> as_tensor([[1, 2], [3, 4]])[1]
    array([[1., 2.],
           [3., 4.]])
    """
    if isinstance(given, (list, tuple, int, float, complex)):
        given = _from_lists(given, what)
    if isinstance(given, np.ma.MaskedArray):
        raise BackendError(f"{what} is a masked array: give its data, and mask=~array.mask to a decomposition")
    if type(given).__module__.partition(".")[0] == "dask":
        raise BackendError(
            f"{what} is a dask array, which tucker() and tensor_train() read in blocks; elsewhere pass x.compute()"
        )
    backend = get_backend(given, what=what)
    return backend, numeric(backend, given, what)


def numeric(backend: Backend, array: Array, what: str) -> Array:
    """Return an array in a dtype that computations run in; see :func:`as_tensor`."""
    name = backend.dtype_name(array)
    if name in _NUMERIC:
        return array
    if name in _HALF:
        return backend.astype(array, "float32")
    if name.startswith(("int", "uint", "bool")):
        return backend.astype(array, "float64" if backend.name == "numpy" else "float32")
    raise BackendError(f"{what} must hold numbers; got the dtype {name}")


def _from_lists(given: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError:
        raise ShapeError(f"{what} is a list whose parts differ in length; expected equal lengths") from None
    if array.dtype.kind not in "biufc":
        raise BackendError(f"{what} must hold numbers; got {safe_repr(given)}")
    return array


def as_tensors(given: Any, what: str) -> tuple[Backend, list[Array]]:
    """Return the library of several arrays, and the arrays; all of one library, dtype and device."""
    try:
        arrays = list(given)
    except TypeError:
        raise ShapeError(f"{what} must be a list of arrays; got {safe_repr(given)}") from None
    if not arrays:
        raise ShapeError(f"{what} must be a list of at least one array; got an empty one")
    found = [as_tensor(array, f"array {number} of {what}") for number, array in enumerate(arrays)]
    tensors = [array for _, array in found]
    return get_backend(*tensors), tensors


def alike(matrices: Sequence[Array], axis: int, what: str) -> None:
    """Raise a ShapeError unless all are matrices with the same number of rows (axis 0) or columns (axis 1)."""
    for number, matrix in enumerate(matrices):
        if len(matrix.shape) != 2:
            raise ShapeError(f"{what} {number} has shape {tuple(matrix.shape)}; expected a matrix")
        if matrix.shape[axis] != matrices[0].shape[axis]:
            raise ShapeError(
                f"{what} {number} has shape {tuple(matrix.shape)}; expected as many {('rows', 'columns')[axis]} as "
                f"{what} 0, of shape {tuple(matrices[0].shape)}"
            )


def finite(backend: Backend, tensor: Array, what: str = "the tensor", way: str = "") -> None:
    """Raise a ShapeError if a tensor has no elements, NaN or infinity; tracers are not looked at."""
    if not math.prod(tensor.shape):
        raise ShapeError(f"{what} has shape {tuple(tensor.shape)}, so there is nothing to decompose")
    if str(backend.device(tensor)) == "meta":
        raise BackendError(f"{what} is on the meta device and has no values: move it to a real device")
    if not backend.is_concrete(tensor):
        return
    if not backend.all_finite(tensor):
        kind = "NaN" if math.isnan(backend.largest(tensor)) else "infinity"
        raise ShapeError(f"{what} holds {kind}, so it cannot be decomposed{way}")


def integer_of(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an integer argument; raise a ShapeError unless it is one within the limits."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ShapeError(f"{name} must be an integer {limits}; got {safe_repr(value)}")
    return int(value)


def mode_of(mode: Any, shape: Sequence[int], what: str = "mode") -> int:
    """Return a mode as a number from 0; negative ones count from the last."""
    order = len(shape)
    if isinstance(mode, bool) or not isinstance(mode, (int, np.integer)) or not -order <= mode < order:
        raise ShapeError(
            f"{what} must be from 0 to {order - 1} for a tensor of shape {tuple(shape)}, or negative, counted from the "
            f"last; got {safe_repr(mode)}"
        )
    return int(mode) % order


def scalar_of(value: Any) -> Any:
    """Return a number, or an array without axes, that may multiply a tensor; None for anything else.

    Numbers of NumPy become Python's, which change no dtype.

    Examples
    --------
    >>> scalar_of(np.float64(2.0)), scalar_of(np.ones(2))
    (2.0, None)
    """
    if isinstance(value, (np.number, np.ndarray)) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, (int, float, complex)) or getattr(value, "shape", None) == () else None


# -- Ranks and errors --------------------------------------------------------------------------------------------------

# The Frobenius error of a sequence of truncations is at most the root of the sum of their squares, so each of n
# truncations may lose ``max_error / sqrt(n)``.


def error_limit(max_error: Any) -> float:
    """Return an allowed relative error; raise a ShapeError unless it is from 0 to below 1."""
    real = isinstance(max_error, (int, float, np.floating)) and not isinstance(max_error, bool)
    if not real or not 0.0 <= max_error < 1.0:
        raise ShapeError(f"max_error must be from 0 to below 1, a relative error; got {safe_repr(max_error)}")
    return float(max_error)


def _are_several(rank: Any) -> bool:
    """Return whether a rank is a sequence of ranks."""
    return isinstance(rank, (list, tuple)) or (isinstance(rank, np.ndarray) and rank.ndim == 1)


def ranks_of(rank: Any, count: int, what: str) -> list[int]:
    """Return one rank for each of ``count`` bonds or modes, from one number or a sequence of them."""
    if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool):
        return [integer_of("rank", rank, 1)] * count
    listed = list(rank) if _are_several(rank) else None
    if listed is None or len(listed) != count:
        raise ShapeError(f"rank must be a number or one for each of the {count} {what}; got {safe_repr(rank)}")
    return [integer_of(f"rank[{place}]", one, 1) for place, one in enumerate(listed)]


def inner_ranks(rank: Any, possible: Sequence[int]) -> list[int]:
    """Return the ranks of the bonds of a train.

    Parameters
    ----------
    rank : int or sequence of int
        One number is cut to what is possible. A sequence has one for each bond, with or without a 1 at both ends.
    possible : sequence of int
        The largest rank of each bond.

    Raises
    ------
    ShapeError
        If a rank of a sequence is above the possible.
    """
    listed = list(rank) if _are_several(rank) else rank
    if not isinstance(listed, list):
        return [min(one, most) for one, most in zip(ranks_of(listed, len(possible), "bonds"), possible, strict=True)]
    if len(listed) == len(possible) + 2 and (listed[0], listed[-1]) == (1, 1):
        listed = listed[1:-1]
    found = ranks_of(listed, len(possible), "bonds")
    for bond, (one, most) in enumerate(zip(found, possible, strict=True)):
        if one > most:
            raise ShapeError(f"rank {one} of bond {bond} is above {most}, the largest that is possible there")
    return found


def useful_rank(shape: Sequence[int]) -> int:
    """Return the rank with which every tensor of a shape is a CP tensor."""
    return math.prod(shape) // max(shape)


def ring_ranks(ranks: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Cut the ranks of a ring to what is useful.

    A ring that is opened at one bond is a train, and represents any tensor with the full ranks of a train; and no bond
    has more independent rows than the core on either side of it has columns.

    Parameters
    ----------
    ranks : sequence of int
        Of each bond, the first one left of the first core.
    shape : sequence of int

    Returns
    -------
    list of int

    Examples
    --------
    >>> ring_ranks([99, 99, 99], (5, 6, 7)), ring_ranks([99, 2, 2], (5, 6, 7)), ring_ranks([3, 4, 5], (5, 6, 7))
    ([6, 6, 6], [10, 2, 2], [3, 4, 5])
    """
    order, found = len(shape), list(ranks)
    turned = [[*shape[first:], *shape[:first]] for first in range(order)]
    most = min(max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, order)) for sizes in turned)
    if min(found) >= most:
        found = [most] * order
    while True:
        # Bond m lies between the cores m - 1 and m.
        cut = [min(found[m], found[m - 1] * shape[m - 1], found[(m + 1) % order] * shape[m]) for m in range(order)]
        if cut == found:
            return found
        found = cut


def rounded_cores(
    backend: Backend, cores: Sequence[Array], rank: int | Sequence[int] | None, max_error: float | None
) -> list[Array]:
    """Reduce the ranks of a train whose cores are orthogonal from the left.

    Parameters
    ----------
    backend : Backend
    cores : sequence of array, shape (r_{m-1}, d_m, r_m)
    rank, max_error
        As for :meth:`tnadapt.tensors.TTTensor.round`.

    Returns
    -------
    list of array
    """
    if (rank is None) == (max_error is None):
        raise ShapeError("give either rank= or max_error=, to say what to round to")
    cores, bonds = list(cores), len(cores) - 1
    limits = [0] * bonds if rank is None else ranks_of(rank, bonds, "bonds")
    loss = 0.0
    if max_error is not None:
        norm = float(np.linalg.norm(backend.to_numpy(cores[-1]).reshape(-1)))
        loss = error_limit(max_error) * norm / math.sqrt(max(1, bonds))
    for bond in range(bonds - 1, -1, -1):
        left, size, right = (int(one) for one in cores[bond + 1].shape)
        u, s, vh = backend.svd(backend.reshape(cores[bond + 1], (left, size * right)))
        most = int(s.shape[0])
        keep = min(limits[bond], most) if rank is not None else kept(backend.to_numpy(s), most, loss)
        cores[bond + 1] = backend.reshape(vh[:keep, :], (keep, size, right))
        before = cores[bond]
        flat = backend.reshape(before, (-1, left))
        cores[bond] = backend.reshape(backend.matmul(flat, u[:, :keep] * s[:keep]), (*before.shape[:2], keep))
    return cores

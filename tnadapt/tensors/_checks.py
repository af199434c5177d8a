"""What the functions of this package accept as a tensor, and how they refuse anything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError, ShapeError, safe_repr

__all__ = ["alike", "as_tensor", "as_tensors", "finite", "integer_of", "mode_of", "numeric", "scalar_of"]

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

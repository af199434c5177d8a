"""Backends: which array library an array belongs to, how libraries are loaded and registered.

Design requirements of this package:

* The backend is found from the *type* of the arrays, once per public call; there is no global
  ``set_backend`` and no environment variable.
* Importing tnadapt imports no framework: a library is considered only if it is already in
  ``sys.modules``, or if the caller requests it by name.
* An operation never branches on the backend. What differs between libraries is a method of
  :class:`~tnadapt.backends.backend.Backend`.
* Adding a library takes one class and one call of :func:`register_backend`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from tnadapt.errors import BackendError, safe_repr

from ._kernels import kernels
from .backend import Backend

__all__ = [
    "Backend",
    "available_backends",
    "get_backend",
    "kernels",
    "load_backend",
    "load_imported",
    "register_backend",
]


# For type checkers: nothing is imported when a program runs.
#: The arrays of one library: a function that takes them returns the same type.
ArrayT = TypeVar("ArrayT")

if TYPE_CHECKING:
    import jax
    import torch

    TorchArray: TypeAlias = torch.Tensor
    JaxArray: TypeAlias = jax.Array
else:
    TorchArray = JaxArray = Any


def _make_numpy() -> Backend:
    from ._numpy import NumpyBackend

    return NumpyBackend()


def _make_torch() -> Backend:
    from ._torch import TorchBackend

    return TorchBackend()


def _make_jax() -> Backend:
    from ._jax import JaxBackend

    return JaxBackend()


def _make_cupy() -> Backend:
    from ._cupy import CupyBackend

    return CupyBackend()


# The name is the library's top-level module, so that `name in sys.modules` tells whether it is loaded.
_factories: dict[str, Callable[[], Backend]] = {
    "numpy": _make_numpy,
    "torch": _make_torch,
    "jax": _make_jax,
    "cupy": _make_cupy,
}
BUILT_IN = tuple(_factories)
_instances: dict[str, Backend] = {}
_by_type: dict[type, Backend] = {}
#: Returns the backend of a type of arrays, or None if :func:`get_backend` has to look for it: one look-up, for calls
#: that take a microsecond.
known_backend = _by_type.get


def register_backend(name: str, factory: Callable[[], Backend]) -> None:
    """Register another array library.

    Parameters
    ----------
    name : str
        The library's top-level module, e.g. ``"array_api_strict"``.
    factory : callable
        Called without arguments when an array of that library is first seen, or the library is first
        requested by name; returns a :class:`Backend`.

    Raises
    ------
    BackendError
        If the name is a built-in backend, or the arguments are not a string and a callable.

    Notes
    -----
    Registering a name again replaces the earlier backend, so that a notebook cell can be rerun.

    Examples
    --------
    >>> import array_api_strict
    >>> import tnadapt as tna
    >>> from tnadapt.backends import Backend, register_backend
    >>> class Strict(Backend):
    ...     name = "array_api_strict"
    ...     def __init__(self):
    ...         super().__init__(array_api_strict)
    ...     def lacks(self, x):
    ...         return frozenset({"gradient", "fwht", "fastfood", "shuffle", "dft2"})
    >>> register_backend("array_api_strict", Strict)
    >>> tna.fwht(array_api_strict.asarray([1.0, 2.0]), normalize=False)
    Array([ 3., -1.], dtype=array_api_strict.float64)
    """
    if not isinstance(name, str) or not callable(factory):
        raise BackendError(
            f"register_backend takes a name and a callable; got {safe_repr(name)} and {safe_repr(factory)}"
        )
    if name in BUILT_IN:
        raise BackendError(f"{name!r} is a built-in backend and cannot be replaced; choose another name")
    _instances.pop(name, None)
    for kind in [kind for kind, backend in _by_type.items() if backend.name == name]:
        del _by_type[kind]
    _factories[name] = factory


def load_backend(name: str) -> Backend:
    """Return the backend with that name; import its library if necessary.

    Parameters
    ----------
    name : str
        ``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"`` or a registered name.

    Returns
    -------
    Backend

    Raises
    ------
    BackendError
        If the name is unknown or the library is not installed.

    Examples
    --------
    >>> load_backend("numpy").name
    'numpy'
    """
    if isinstance(name, str) and name in _instances:
        return _instances[name]
    if not isinstance(name, str) or name not in _factories:
        raise BackendError(
            f"no backend named {safe_repr(name)}; known: {', '.join(sorted(_factories))}; "
            "others can be added with register_backend(name, factory)"
        )
    try:
        backend = _factories[name]()
    except ImportError as error:
        raise BackendError(f"backend {name!r} needs a library that cannot be imported here: {error}") from error
    _instances[name] = backend
    # Registered before the first array of these types is seen, so that a compiled program does not depend on when this
    # happens.
    _by_type.update(dict.fromkeys(backend.types, backend))
    return backend


def load_imported() -> None:
    """Load the built-in backends of the libraries that this process has imported already.

    A compiler that meets the first array of a library would trace how its backend is loaded, and fail.

    Examples
    --------
    >>> import numpy
    >>> load_imported()
    >>> load_backend("numpy").name
    'numpy'
    """
    for name in BUILT_IN:
        if name in sys.modules and name not in _instances:
            # A library that is broken, or in the middle of its own import, is reported where it is used.
            with contextlib.suppress(BackendError, AttributeError):
                load_backend(name)


def available_backends() -> list[str]:
    """Return the names of the registered backends whose library can be used on this machine.

    This imports every library: use it in tests and in ``tnadapt verify``, not in hot paths.

    Examples
    --------
    >>> "numpy" in available_backends()
    True
    """
    names = []
    for name in _factories:
        try:
            usable = load_backend(name).usable()
        except BackendError:
            continue
        if usable:
            names.append(name)
    return names


def get_backend(*arrays: Any, what: str = "") -> Backend:
    """Return the backend of one or more arrays.

    Parameters
    ----------
    *arrays : array
        At least one array, all of the same library, dtype and device.
    what : str
        What the array is, for errors.

    Returns
    -------
    Backend

    Raises
    ------
    BackendError
        If an argument is not an array of a known library, or two of them differ in library, dtype or
        device; the message names both.

    Examples
    --------
    >>> import numpy as np
    >>> get_backend(np.zeros(2), np.ones(3)).name
    'numpy'
    >>> get_backend([1.0, 2.0])
    Traceback (most recent call last):
        ...
    tnadapt.errors.BackendError: expected an array of one of numpy, torch, jax, cupy...; got list: convert it
    first, e.g. by numpy.asarray
    """
    if not arrays:
        raise BackendError("expected at least one array; got none")
    # This runs in every public call, on small arrays as well: each attribute is read once.
    first = arrays[0]
    backend = _by_type.get(type(first)) or _backend_of(first, what)
    if len(arrays) == 1:
        return backend
    kind, dtype, place = type(first), first.dtype, backend.device(first)
    for other in arrays[1:]:
        found = backend if type(other) is kind else _backend_of(other, what)
        if found is not backend:
            raise BackendError(
                f"arrays of two libraries in one call: {backend.name} and {found.name}; convert one of them first"
            )
        if other.dtype != dtype:
            raise BackendError(
                f"arrays of two dtypes in one call: {backend.dtype_name(first)} and {backend.dtype_name(other)}; "
                "cast one of them first"
            )
        there = backend.device(other)
        if there != place and there is not None and place is not None:
            raise BackendError(f"arrays on two devices in one call: {place} and {there}; move one of them first")
    return backend


def _backend_of(array: Any, what: str) -> Backend:
    kind = type(array)
    backend = _by_type.get(kind)
    if backend is not None:
        return backend
    for name in _factories:
        if name in sys.modules:
            backend = load_backend(name)
            if backend.owns(array):
                _by_type[kind] = backend
                return backend
    wanted = f"{what} must be an array" if what else "expected an array"
    raise BackendError(
        f"{wanted} of one of {', '.join(_factories)}; got {kind.__name__}: convert it first, e.g. by numpy.asarray"
    )

"""Backends: one interface to every array library (NumPy, torch, JAX, CuPy), dispatch by array type, registration.

Design requirements of this package:

* The backend is found from the *type* of the arrays, once per public call; there is no global
  ``set_backend`` and no environment variable.
* Importing tnadapt imports no framework: a library is considered only if it is already in
  ``sys.modules``, or if the caller requests it by name.
* An operation never branches on the backend. What differs between libraries is a method of
  :class:`Backend`.
* Adding a library takes one class and one call of :func:`register_backend`.

:class:`Backend` is a working backend for any library that follows the Python array API standard (2022.12 or later); a
subclass overrides only what its library does differently. Everything outside this folder uses only these methods, the
operators ``+ - * /``, and basic slicing. :class:`FixedArrays` caches arrays that depend only on integers, such as
the draws of a map, on the devices of each library. The sections after it are steps that several backends share.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from tnadapt.errors import BackendError, safe_repr

from ._kernels import kernels

__all__ = [
    "Backend",
    "available_backends",
    "get_backend",
    "kernels",
    "load_backend",
    "load_imported",
    "register_backend",
]


Array = Any  # an array of any supported library
Map = Callable[[Array], Array]


# -- Backend: the interface of every array library ---------------------------------------------------------------------


FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
COMPLEX_DTYPES = ("complex128", "complex64")
#: Methods of a backend that may return None, if :meth:`Backend.lacks` lists them.
OPTIONAL = ("gradient", "fwht", "fastfood", "shuffle", "dft2")
#: What :meth:`Backend.at_once` returns on the CPU, where longer vectors gain nothing from being computed together.
CALLED_AT_ONCE = 1 << 16
#: And on a device: one pass over 64 MiB takes an estimated 50 µs there (not measured), longer than its launch, so more
#: elements would save no time and cost memory.
LAUNCHED_AT_ONCE = 1 << 24
#: The shortest transforms of F for which importing the compiled kernels pays off.
LEAST_FASTFOOD = 1 << 14


class Backend:
    """The operations that tnadapt needs of an array library.

    Parameters
    ----------
    namespace : module
        The library's array-API namespace.

    Attributes
    ----------
    name : str
        The library's top-level module.
    types : tuple of type
        The library's usual array types, if these are few; ``owns`` is called for all others.

    Notes
    -----
    Every method is differentiable if its library is, except for those under *In and out*.
    :class:`tnadapt.testing.BackendContract` is the test suite that a new backend inherits.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> x = np.arange(6.0)
    >>> get_backend(x).reshape(x, (2, 3))
    array([[0., 1., 2.],
           [3., 4., 5.]])
    """

    name: str = ""
    types: tuple[type, ...] = ()

    def __init__(self, namespace: Any) -> None:
        self.xp = namespace

    # -- Which arrays belong to the library --------------------------------------------------

    def owns(self, x: Any) -> bool:
        """Return whether x is an array of this library."""
        return hasattr(x, "__array_namespace__") and x.__array_namespace__() is self.xp

    def usable(self) -> bool:
        """Return whether the library can compute on this machine (a CUDA library needs a device)."""
        return True

    def is_concrete(self, x: Array) -> bool:
        """Return whether x holds numbers; False for the placeholders of a tracer or transformation."""
        return True

    def differentiates(self, x: Array) -> bool:
        """Return whether operations on x are traced or differentiated, so that only the library's own may run."""
        return not self.is_concrete(x)

    def dtype_name(self, x: Array) -> str:
        """Return the name of x's dtype, such as ``"float32"``; the same in every library."""
        return str(x.dtype).rpartition(".")[2]

    def device(self, x: Array) -> Any:
        """Return the device of x, an object that can be compared and printed; None if it is unknown."""
        return getattr(x, "device", None)

    # -- In and out --------------------------------------------------------------------------

    def dtype(self, name: str) -> Any:
        """Return the library's dtype with that name, or raise a BackendError."""
        dtype = getattr(self.xp, name, None) if name in FLOAT_DTYPES + COMPLEX_DTYPES else None
        if dtype is None:
            raise BackendError(
                f"{self.name} has no floating dtype {safe_repr(name)}; expected one of {', '.join(FLOAT_DTYPES)}"
            )
        return dtype

    def asarray(self, array: np.ndarray, dtype: str | None = None, device: Any = None) -> Array:
        """Convert a NumPy array to an array of this library, rounded to ``dtype``; never a view of the input."""
        library_dtype = None if dtype is None else self.dtype(dtype)
        values = array.tolist() if array.ndim == 0 else array
        return self.xp.asarray(values, dtype=library_dtype, device=device, copy=True)

    def constant(self, array: np.ndarray, device: Any) -> Array:
        """Convert a NumPy array without changing its dtype, on a device (None: the default); may share memory."""
        return self.xp.asarray(array, device=device)

    def fixed(self, source: FixedArrays, key: Hashable, device: Any, keep: bool = True) -> Array:
        """Return one of the arrays of ``source`` on a device: not differentiable, and a constant to a compiler."""
        return source.put_on(self, key, device, keep)

    def to_numpy(self, x: Array) -> np.ndarray:
        """Return x as a NumPy array on the host, detached from any gradient."""
        return np.asarray(x)

    def largest(self, x: Array) -> float:
        """Return the largest magnitude of the elements of x; 0 if x is empty, NaN if an element is NaN."""
        return float(self.to_numpy(self.xp.max(self.xp.abs(x)))) if all(x.shape) else 0.0

    def all_finite(self, x: Array) -> bool:
        """Return whether no element of x is NaN or infinite."""
        return math.isfinite(self.largest(x))

    def detached(self, x: Array) -> Array:
        """Return x on its device without any gradient; may share memory."""
        return x

    def with_pullback(
        self, x: Array, values: Sequence[Array], pullback: Callable[[Array, Sequence[Array]], Array]
    ) -> list[Array]:
        """Return arrays with these values and, where derivatives of x are recorded, with this derivative.

        ``pullback`` is called with x and the gradient with respect to each of the values, all detached, and returns the
        gradient with respect to x. Libraries that record no derivatives of arrays with values return the values.
        """
        if self.is_concrete(x) and self.differentiates(x):
            raise NotImplementedError(
                f"{type(self).__name__} records derivatives but defines no with_pullback: without it they would be zero"
            )
        return list(values)

    def astype(self, x: Array, dtype: str) -> Array:
        """Cast x to another floating dtype; return x itself if it already has that dtype."""
        return x if self.dtype_name(x) == dtype else self.xp.astype(x, self.dtype(dtype))

    def write(self, out: Array, x: Array) -> None:
        """Write the elements of x to an array of the same shape and dtype; BackendError if it cannot be written to."""
        raise BackendError(f"{self.name} has no arrays that can be written to here: leave out=… out")

    def zeros(self, shape: Sequence[int], like: Array) -> Array:
        """Return zeros of that shape, with like's dtype and device."""
        return self.xp.zeros(tuple(shape), dtype=like.dtype, device=self.device(like))

    # -- Shapes ------------------------------------------------------------------------------

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """Reshape x, in C order."""
        return self.xp.reshape(x, tuple(shape))

    def permute_dims(self, x: Array, axes: Sequence[int]) -> Array:
        """Permute the axes of x to that order."""
        return self.xp.permute_dims(x, tuple(axes))

    def matrix_transpose(self, x: Array) -> Array:
        """Swap the last two axes of x."""
        return self.xp.matrix_transpose(x)

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        """Move one axis of x to another position."""
        ndim = len(x.shape)
        axes = [axis for axis in range(ndim) if axis != source % ndim]
        axes.insert(destination % ndim, source % ndim)
        return self.permute_dims(x, axes)

    def concat(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Concatenate arrays along an axis; a single array is returned as it is."""
        return arrays[0] if len(arrays) == 1 else self.xp.concat(list(arrays), axis=axis)

    def split(self, x: Array, sizes: Sequence[int]) -> list[Array]:
        """Split a vector into consecutive pieces of these sizes."""
        stops = np.cumsum([0, *sizes]).tolist()
        return [x[start:stop] for start, stop in itertools.pairwise(stops)]

    def take(self, x: Array, indices: Array, axis: int = -1) -> Array:
        """Take the elements of x at these positions (an integer vector) along an axis."""
        return self.xp.take(x, indices, axis=axis)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """Select elements of a where the condition holds, otherwise of b."""
        return self.xp.where(condition, a, b)

    # -- Arithmetic --------------------------------------------------------------------------

    def matmul(self, a: Array, b: Array) -> Array:
        """Compute the matrix product over the last two axes, batched over the others."""
        return self.xp.matmul(a, b)

    def precise_matmul(self, a: Array, b: Array) -> Array:
        """Compute the same in the full precision of the dtype, also where a setting allows TF32 or less for products.

        For products with the fixed matrices of F, whose result is part of the format.
        """
        return self.matmul(a, b)

    def kron(self, a: Array, b: Array) -> Array:
        """Compute the Kronecker product of two arrays with the same number of axes."""
        return kron_plain(self, a, b)

    def sum(self, x: Array, axis: int) -> Array:
        """Sum x along one axis."""
        return self.xp.sum(x, axis=axis)

    def tanh(self, x: Array) -> Array:
        """Compute the hyperbolic tangent element by element."""
        return self.xp.tanh(x)

    def sqrt(self, x: Array) -> Array:
        """Compute the square root element by element, correctly rounded."""
        return self.xp.sqrt(x)

    def conj(self, x: Array) -> Array:
        """Compute the complex conjugate element by element; x itself if it is real."""
        return self.xp.conj(x) if self.is_complex(x) else x

    def apart(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the arrays behind an optimization barrier: no compiler merges their computation into what follows."""
        return list(arrays)

    # -- Linear algebra ----------------------------------------------------------------------

    def svd(self, x: Array) -> tuple[Array, Array, Array]:
        """Compute the reduced singular value decomposition of a matrix: u, s in descending order, and vh."""
        return tuple(self.xp.linalg.svd(x, full_matrices=False))

    def qr(self, x: Array) -> tuple[Array, Array]:
        """Compute the reduced QR decomposition of a matrix."""
        return tuple(self.xp.linalg.qr(x))

    def eigh(self, x: Array) -> tuple[Array, Array]:
        """Compute the eigenvalues of a symmetric or Hermitian matrix in ascending order, and its eigenvectors."""
        return tuple(self.xp.linalg.eigh(x))

    def solve(self, a: Array, b: Array) -> Array:
        """Solve ``a @ x = b`` for a square matrix a and a matrix b."""
        return self.xp.linalg.solve(a, b)

    # -- Optional features -------------------------------------------------------------------

    def lacks(self, x: Array) -> frozenset[str]:
        """Return the optional methods that are not available for float32 arrays on the device of x.

        The methods in :data:`OPTIONAL` return None in this class. A subclass that does not override one of them lists
        it here: :class:`tnadapt.testing.BackendContract` fails if a method returns None and is not listed, or is listed
        and returns something else.

        Parameters
        ----------
        x : array
            An array of this library.

        Returns
        -------
        frozenset of str

        Examples
        --------
        >>> import numpy as np
        >>> from tnadapt.backends import load_backend
        >>> "gradient" in load_backend("numpy").lacks(np.ones(1))
        True
        """
        return frozenset()

    # -- Kernels: faster implementations -----------------------------------------------------
    # These return None if there is no kernel for the array; the caller then runs the reference implementation, which
    # every kernel must match. It is passed as `fallback` (a pair for a map and its adjoint) for derivatives that the
    # kernel meets later and cannot handle, such as batches of gradients.

    def fwht(self, x: Array, scale: float, axis: int, fallback: Map) -> Array | None:
        """Compute ``scale * H x`` along one axis; the entries of H are 1 and -1.

        x is float32 or float64 and not empty. The axis is counted from the last; its length is a power of two, at
        least 2.
        """
        return None

    def fwht_at_once(self, x: Array, normalize: bool) -> Array | None:
        """Compute the transform of a small vector, for which the checks of :func:`tnadapt.fwht` take long; or None.

        x is any array of the library: a backend returns None unless its dtype and shape are such that it would accept
        it, and where derivatives are recorded. The bits are those of :meth:`fwht`.
        """
        return None

    def fwht_into(self, x: Array, scale: float, axis: int, out: Array) -> bool:
        """Compute :meth:`fwht` into an array of the same shape and dtype, which may be x; False if no kernel can.

        No derivatives are recorded: a backend raises a BackendError where they would be.
        """
        return False

    def fastfood(self, x: Array, f: Any, adjoint: bool) -> Array | None:
        """Compute the linear part of a projection F along the last axis, or its adjoint.

        ``f`` is the :class:`tnadapt.algebra.maps.fastfood.Linear`, and ``f.plain(self)`` its fallback.
        """
        return None

    def shuffle(self, x: Array, recipe: str, inverse: bool, fallback: tuple[Map, Map]) -> Array | None:
        """Permute the last axis of x by the fixed permutation of its length, or by its inverse.

        The recipe has seed and group, with a space between them.
        """
        return None

    def dft2(self, x: Array, fallback: Map) -> Array | None:
        """Compute ``Re(ifft2(x))`` of the real matrices in the last two axes by an FFT; this map is its own adjoint."""
        return None

    def at_once(self, x: Array) -> int:
        """Return how many elements of independent vectors to compute in one call, at most, on the device of x.

        Where the call of an operation, or the launch of a kernel, takes longer than a short vector, several vectors in
        one call are faster. More elements only need more memory. 0 means one vector after another.
        """
        return 0

    # -- Results -----------------------------------------------------------------------------

    def register_result(self, kind: type[tuple[Any, ...]]) -> None:
        """Let a subclass of tuple pass through the library's transformations with the arrays that it holds."""

    # -- Used by the checks of the laws ------------------------------------------------------

    def double_precision(self) -> AbstractContextManager[Any]:
        """Return a context in which float64 arrays can be created, for libraries that do not always allow it."""
        return nullcontext()

    def gradient(
        self, function: Callable[[dict[str, Array]], Array], arrays: dict[str, Array]
    ) -> dict[str, Array] | None:
        """Compute the derivatives of a scalar function of named arrays; None if :meth:`lacks` lists it."""
        return None

    # -- Derived from the methods above ------------------------------------------------------

    def is_float(self, x: Array) -> bool:
        """Return whether x has a real floating dtype that tnadapt computes in."""
        return self.dtype_name(x) in FLOAT_DTYPES

    def is_complex(self, x: Array) -> bool:
        """Return whether x has a complex dtype; only :mod:`tnadapt.tensors` computes in these."""
        return self.dtype_name(x) in COMPLEX_DTYPES

    def require_float(self, x: Array, what: str) -> None:
        """Raise a BackendError that names ``what`` unless x has a real floating dtype."""
        if not self.is_float(x):
            raise BackendError(
                f"{what} must have a real floating dtype ({', '.join(FLOAT_DTYPES)}); "
                f"got {self.dtype_name(x)}: cast it first"
            )

    def pad_last(self, x: Array, size: int) -> Array:
        """Pad the last axis of x with zeros at the end, up to ``size``."""
        missing = size - x.shape[-1]
        if missing == 0:
            return x
        return self.concat([x, self.zeros((*x.shape[:-1], missing), like=x)], axis=-1)

    def flatten(self, x: Array) -> Array:
        """Return vec(x): x flattened in C order."""
        return self.reshape(x, (math.prod(x.shape),))


# -- Fixed arrays: they depend only on integers, are computed when first needed, and cached for every library ----------


class FixedArrays:
    """Arrays that depend only on integers: computed on the host when first needed, and cached.

    A subclass defines them in ``make``. ``kept`` caches them on the host, ``placed`` on the devices of each library.
    Copies and pickles leave the arrays out, as they can be recomputed.
    """

    def __init__(self) -> None:
        self.kept: dict[Hashable, np.ndarray] = {}
        self.placed: dict[tuple[str, str, Hashable], Array] = {}

    def make(self, key: Hashable) -> np.ndarray:
        """Compute the array with that key as a NumPy array."""
        raise NotImplementedError

    def host(self, key: Hashable) -> np.ndarray:
        """Return the array with that key on the host, from the cache or computed, not cached. Do not write to it."""
        array = self.kept.get(key)
        return self.make(key) if array is None else array

    def held(self, key: Hashable) -> np.ndarray:
        """Return the array with that key on the host, computed once and cached. Do not write to it."""
        array = self.kept.get(key)
        if array is None:
            array = self.kept[key] = self.make(key)
        return array

    def on(self, backend: Any, key: Hashable, like: Array, dtype: str | None = None, keep: bool = True) -> Array:
        """Return the array with that key in like's library, on its device, and in ``dtype`` if one is given."""
        array = backend.fixed(self, key, backend.device(like), keep)
        return array if dtype is None else backend.astype(array, dtype)

    def put_on(self, backend: Any, key: Hashable, device: Any, keep: bool = True) -> Array:
        """Return the array with that key on a device of a library; cached if ``keep``, unless it is a placeholder."""
        where = (backend.name, str(device), key)
        array = self.placed.get(where)
        if array is None:
            host = self.host(key)
            array = backend.constant(host, device)
            if keep:
                self.kept[key] = host
                if backend.is_concrete(array):
                    self.placed[where] = array
        return array

    def free(self) -> None:
        """Give back the memory of everything that can be computed again."""
        # New dictionaries instead of clear(): another thread may be reading the old ones.
        self.kept, self.placed = {}, {}

    @property
    def spare_bytes(self) -> int:
        """Bytes of memory that is kept for the next call, beyond the arrays."""
        return 0

    def components(self) -> Iterator[FixedArrays]:
        """Yield this object and those that it is made of, such as the maps of a chain."""
        yield self
        for value in self.__dict__.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, FixedArrays):
                    yield from part.components()

    def name_of(self, backend: str, key: Hashable, device: Any) -> str:
        """Return the name of the attribute that is the array with that key on a device; create it if necessary.

        For a compiler that must not trace how an array is computed: it treats the returned name as a constant, and
        reads the attribute like any other tensor. Some compilers pass only constants to functions that they do not
        trace; this is why it is a method of this object, and the backend is given by name.
        """
        # The compiler splits attribute names at dots.
        name = f"placed on {device}: {key}".replace(".", "/")
        if name not in self.__dict__:
            self.__dict__[name] = self.put_on(load_backend(backend), key, device)
        return name

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("placed")}
        return {**state, "kept": {}, "placed": {}}


# -- Functions whose results compilers treat as constants --------------------------------------------------------------


_F = TypeVar("_F", bound=Callable[..., Any])


def constant_result(function: _F) -> _F:
    """Mark a function as :func:`torch.compiler.assume_constant_result` does.

    Parameters
    ----------
    function : callable
        Compiled programs contain its result as a constant.

    Returns
    -------
    callable
        The same function.

    Notes
    -----
    Torch's own function imports the compiler, which takes more than a second, and most processes compile nothing. A
    test compares the marks.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# -- Kronecker products: one product with broadcasting, or one over longer rows ----------------------------------------


def kron_plain(backend: Any, a: Any, b: Any) -> Any:
    """Compute the Kronecker product of two arrays with the same number of axes, in one product."""
    slow = [size for m in a.shape for size in (m, 1)]
    fast = [size for n in b.shape for size in (1, n)]
    shape = [m * n for m, n in zip(a.shape, b.shape, strict=True)]
    return backend.reshape(backend.reshape(a, slow) * backend.reshape(b, fast), shape)


def kron_by_rows(backend: Any, a: Any, b: Any) -> Any:
    """Compute :func:`kron_plain` with both arrays first expanded along the last axis, to rows of the result's length.

    With broadcasting, the innermost loop of many libraries is as short as b's rows.
    """
    *rows, n = a.shape
    *others, q = b.shape
    spread = backend.xp.broadcast_to(backend.reshape(a, (*rows, n, 1)), (*rows, n, q))
    tiled = backend.xp.broadcast_to(backend.reshape(b, (*others, 1, q)), (*others, n, q))
    slow = [size for m in rows for size in (m, 1)]
    fast = [size for p in others for size in (1, p)]
    product = backend.reshape(spread, (*slow, n * q)) * backend.reshape(tiled, (*fast, n * q))
    return backend.reshape(product, [*(m * p for m, p in zip(rows, others, strict=True)), n * q])


def short_rows(a: Sequence[int], b: Sequence[int], limit: int, least: int) -> bool:
    """Return whether :func:`kron_by_rows` pays for these shapes where rows of up to ``limit`` elements are slow.

    For a result of fewer than ``least`` elements the additional operations cost more than they save.
    """
    if len(a) < 2 or b[-1] > limit or math.prod(a) * math.prod(b) < least:
        return False
    # With a single row on either side there is nothing to save.
    return math.prod(a[:-1]) > 1 and math.prod(b[:-1]) > 1 and int(a[-1]) > 1


# -- The real part of an inverse Fourier transform ---------------------------------------------------------------------


#: The dtypes that the FFT of every library accepts and keeps.
FFT_DTYPES = ("float64", "float32")

# Elements that a CPU transforms at a time, but at least one matrix. All at once take up to twice as long: the
# temporary arrays are too large for the caches, and their memory is new from the system at each call.
_CHUNK = 1 << 20


def dft2_by_fft(xp: Any, x: Array) -> Array:
    """Return ``Re(ifft2(x))`` over the last two axes.

    Parameters
    ----------
    xp : module
        The array-API namespace of x, with its extension for FFTs.
    x : array, shape (…, rows, cols)
        Real, not complex, and not empty.
    """
    # The forward transform has the same real part, and its values at (j, k) and (-j, -k) are conjugate: the columns up
    # to the middle one determine the others.
    cols = x.shape[-1]
    half = xp.real(xp.fft.rfftn(x, axes=(-2, -1), norm="forward"))
    rest = xp.flip(half[..., 1 : cols - cols // 2], axis=-1)
    rest = xp.concat([rest[..., :1, :], xp.flip(rest[..., 1:, :], axis=-2)], axis=-2)
    return xp.concat([half, rest], axis=-1)


def dft2_in_chunks(xp: Any, x: Array, empty: Callable[[Array], Array]) -> Array:
    """Return :func:`dft2_by_fft` of x, for libraries that compute on a processor and can write to arrays.

    Parameters
    ----------
    xp : module
    x : array, shape (…, rows, cols)
    empty : callable
        Returns an uninitialized array of the shape of its argument.
    """
    size = math.prod(x.shape[-2:])
    some = max(1, _CHUNK // size)
    if math.prod(x.shape[:-2]) <= some:
        return dft2_by_fft(xp, x)
    matrices = xp.reshape(x, (-1, *x.shape[-2:]))
    transformed = empty(matrices)
    for first in range(0, transformed.shape[0], some):
        transformed[first : first + some] = dft2_by_fft(xp, matrices[first : first + some])
    return xp.reshape(transformed, x.shape)


# -- Matrix products in one thread -------------------------------------------------------------------------------------


def one_blas_thread() -> AbstractContextManager[Any]:
    """Return a context manager in which NumPy computes matrix products in the calling thread only.

    The last bits of a product depend on the number of threads. Products of a few rows do not gain from more threads.
    BLAS threads wait for each other in a busy loop: next to a thread that copies, and with no core to spare, products
    take up to six times as long.

    Notes
    -----
    The limit applies to the whole process and is reset at the end of the block. It needs threadpoolctl, which the extra
    ``cli`` installs. Without it nothing changes; setting ``OPENBLAS_NUM_THREADS=1`` (or ``OMP_NUM_THREADS=1``) in the
    environment has the same effect.

    Examples
    --------
    >>> import numpy as np
    >>> with one_blas_thread():
    ...     (np.ones((2, 3)) @ np.ones((3, 2))).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(1, "blas")  # type: ignore[no-any-return]


# -- Which library an array belongs to; loading and registering libraries ----------------------------------------------


# For type checkers only: nothing is imported at run time.
#: The arrays of one library: a function that takes them returns the same type.
ArrayT = TypeVar("ArrayT")

if TYPE_CHECKING:
    import jax
    import torch

    TorchArray: TypeAlias = torch.Tensor
    JaxArray: TypeAlias = jax.Array
else:
    TorchArray = JaxArray = Any


# Import statements, not importlib: a compiler traces them when it meets the first array of a library.


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
#: Returns the backend of a type of arrays, or None if :func:`get_backend` must find it: a single lookup, for calls that
#: take a microsecond.
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
    for array_type in [array_type for array_type, backend in _by_type.items() if backend.name == name]:
        del _by_type[array_type]
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
        with contextlib.suppress(BackendError):
            if load_backend(name).usable():
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
    array_type, dtype, place = type(first), first.dtype, backend.device(first)
    for other in arrays[1:]:
        library = backend if type(other) is array_type else _backend_of(other, what)
        if library is not backend:
            raise BackendError(
                f"arrays of two libraries in one call: {backend.name} and {library.name}; convert one of them first"
            )
        if other.dtype != dtype:
            raise BackendError(
                f"arrays of two dtypes in one call: {backend.dtype_name(first)} and {backend.dtype_name(other)}; "
                "cast one of them first"
            )
        other_place = backend.device(other)
        if other_place != place and other_place is not None and place is not None:
            raise BackendError(f"arrays on two devices in one call: {place} and {other_place}; move one of them first")
    return backend


def _backend_of(array: Any, what: str) -> Backend:
    array_type = type(array)
    backend = _by_type.get(array_type)
    if backend is not None:
        return backend
    for name in _factories:
        if name in sys.modules:
            backend = load_backend(name)
            if backend.owns(array):
                _by_type[array_type] = backend
                return backend
    wanted = f"{what} must be an array" if what else "expected an array"
    raise BackendError(
        f"{wanted} of one of {', '.join(_factories)}; got {array_type.__name__}: convert it first, e.g. by "
        "numpy.asarray"
    )

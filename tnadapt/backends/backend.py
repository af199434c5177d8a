"""The contract every array library fulfils: some twenty primitives under their array-API names.

The class below is a working backend for any library that follows the Python array API standard
(2022.12 or later); a subclass changes only what its library does differently. Everything outside this
folder uses these methods, the operators ``+ - * /``, and basic slicing; nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from tnadapt.errors import BackendError

Array = Any  # an array of any supported library
Map = Callable[[Array], Array]

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
#: Methods of a backend that may answer None, where :meth:`Backend.lacks` says so.
OPTIONAL = ("gradient", "fwht", "fastfood", "shuffle")


class FixedArrays:
    """Arrays that are functions of integers alone: made on the host when first asked for, and kept.

    A subclass says in ``make`` what they are. Copies and pickles leave the arrays behind: they can be
    recomputed.
    """

    def __init__(self) -> None:
        self.kept: dict[Hashable, np.ndarray] = {}
        self.placed: dict[tuple[str, str, Hashable], Array] = {}

    def make(self, key: Hashable) -> np.ndarray:
        """The array of that name, as NumPy makes it."""
        raise NotImplementedError

    def host(self, key: Hashable) -> np.ndarray:
        """The array of that name on the host; made if it is not kept. Not to be written to."""
        found = self.kept.get(key)
        return self.make(key) if found is None else found

    def held(self, key: Hashable) -> np.ndarray:
        """The array of that name on the host, made once and kept. Not to be written to."""
        found = self.kept.get(key)
        if found is None:
            found = self.kept[key] = self.make(key)
        return found

    def on(self, backend: Backend, key: Hashable, like: Array, dtype: str | None = None, keep: bool = True) -> Array:
        """The array of that name in like's library and on its device, in ``dtype`` where one is given."""
        found = backend.fixed(self, key, backend.device(like), keep)
        return found if dtype is None else backend.astype(found, dtype)

    def name_of(self, backend: str, key: Hashable, device: Any) -> str:
        """The name of an attribute that is the array of that name on a device; it is put there where it is not.

        For a compiler that must not trace how an array is made: it is told that this name is a constant, and reads
        the attribute as any tensor that a program finds. Some can hand over nothing but constants to what they do
        not trace: hence a method of the one object, and a backend by its name.
        """
        # An attribute's name, as the compiler reads it, has no dots.
        name = f"placed on {device}: {key}".replace(".", "/")
        if name not in self.__dict__:
            from . import load_backend

            self.__dict__[name] = Backend.fixed(load_backend(backend), self, key, device)
        return name

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("placed")}
        return {**state, "kept": {}, "placed": {}}


class Backend:
    """What tnadapt asks of an array library.

    Parameters
    ----------
    namespace : module
        The library's array-API namespace.

    Attributes
    ----------
    name : str
        The library's top-level module.
    types : tuple of type
        Its usual array types, if it has few; others are asked about by ``owns``.

    Notes
    -----
    Every method is differentiable where its library is, but for those under *In and out*.
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

    # -- Which arrays are ours ---------------------------------------------------------------

    def owns(self, x: Any) -> bool:
        """Whether x is an array of this library."""
        return hasattr(x, "__array_namespace__") and x.__array_namespace__() is self.xp

    def usable(self) -> bool:
        """Whether the library can compute here (a CUDA library wants a device)."""
        return True

    def is_concrete(self, x: Array) -> bool:
        """Whether x holds numbers (False for what a tracer or transformation hands in)."""
        return True

    def dtype_name(self, x: Array) -> str:
        """``"float32"`` and the like; the same names in every library."""
        return str(x.dtype).rpartition(".")[2]

    def device(self, x: Array) -> Any:
        """Where x lives: something that compares and prints; None where that cannot be known."""
        return getattr(x, "device", None)

    # -- In and out --------------------------------------------------------------------------

    def dtype(self, name: str) -> Any:
        """The library's dtype of that name; a BackendError where it has none."""
        found = getattr(self.xp, name, None) if name in FLOAT_DTYPES else None
        if found is None:
            raise BackendError(f"{self.name} has no floating dtype {name!r}; expected one of {', '.join(FLOAT_DTYPES)}")
        return found

    def asarray(self, array: np.ndarray, dtype: str | None = None, device: Any = None) -> Array:
        """A NumPy array as one of this library's, rounded to ``dtype``; never a view of the input."""
        kind = self.dtype(dtype) if dtype is not None else None
        return self.xp.asarray(array.tolist() if array.ndim == 0 else array, dtype=kind, device=device, copy=True)

    def constant(self, array: np.ndarray, device: Any) -> Array:
        """A NumPy array, in its own dtype, on a device (None: the default); may share memory."""
        return self.xp.asarray(array, device=device)

    def fixed(self, source: FixedArrays, key: Hashable, device: Any, keep: bool = True) -> Array:
        """One of the arrays of ``source`` on a device: not differentiable; to a compiler, a constant."""
        place = (self.name, str(device), key)
        found = source.placed.get(place)
        if found is None:
            host = source.host(key)
            found = self.constant(host, device)
            if keep:
                source.kept[key] = host
                if self.is_concrete(found):
                    source.placed[place] = found
        return found

    def to_numpy(self, x: Array) -> np.ndarray:
        """The numbers of x as a NumPy array on the host, detached from any gradient."""
        return np.asarray(x)

    def largest(self, x: Array) -> float:
        """The largest magnitude among the elements of x; 0 where it has none, NaN where one is NaN."""
        return float(self.to_numpy(self.xp.max(self.xp.abs(x)))) if all(x.shape) else 0.0

    def detached(self, x: Array) -> Array:
        """The numbers of x where they are, without any gradient; may share memory."""
        return x

    def astype(self, x: Array, dtype: str) -> Array:
        """x in another floating dtype; x itself where it is that already."""
        return x if self.dtype_name(x) == dtype else self.xp.astype(x, self.dtype(dtype))

    def zeros(self, shape: Sequence[int], like: Array) -> Array:
        """Zeros of that shape, with like's dtype and device."""
        return self.xp.zeros(tuple(shape), dtype=like.dtype, device=self.device(like))

    # -- Shapes ------------------------------------------------------------------------------

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """x with that shape, in C order."""
        return self.xp.reshape(x, tuple(shape))

    def permute_dims(self, x: Array, axes: Sequence[int]) -> Array:
        """x with its axes in that order."""
        return self.xp.permute_dims(x, tuple(axes))

    def matrix_transpose(self, x: Array) -> Array:
        """x with its last two axes exchanged."""
        return self.xp.matrix_transpose(x)

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        """x with one axis moved elsewhere."""
        ndim = len(x.shape)
        axes = [axis for axis in range(ndim) if axis != source % ndim]
        axes.insert(destination % ndim, source % ndim)
        return self.permute_dims(x, axes)

    def concat(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """The arrays one after another along an axis; the array itself where there is one."""
        return arrays[0] if len(arrays) == 1 else self.xp.concat(list(arrays), axis=axis)

    def split(self, x: Array, sizes: Sequence[int]) -> list[Array]:
        """A vector cut into consecutive pieces of these sizes."""
        stops = np.cumsum([0, *sizes]).tolist()
        return [x[start:stop] for start, stop in itertools.pairwise(stops)]

    def take(self, x: Array, indices: Array, axis: int = -1) -> Array:
        """The elements of x at these positions (an integer vector) along an axis."""
        return self.xp.take(x, indices, axis=axis)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """Elements of a where the condition holds, else of b."""
        return self.xp.where(condition, a, b)

    # -- Arithmetic --------------------------------------------------------------------------

    def matmul(self, a: Array, b: Array) -> Array:
        """Matrix product over the last two axes, batched over the others."""
        return self.xp.matmul(a, b)

    def sum(self, x: Array, axis: int) -> Array:
        """Sum along one axis."""
        return self.xp.sum(x, axis=axis)

    def tanh(self, x: Array) -> Array:
        """Hyperbolic tangent, element by element."""
        return self.xp.tanh(x)

    def apart(self, arrays: Sequence[Array]) -> list[Array]:
        """The same arrays, computed as if nothing were known of them: no compiler folds one into another."""
        return list(arrays)

    # -- What a library may not have ---------------------------------------------------------

    def lacks(self, x: Array) -> frozenset[str]:
        """Which of the optional methods there is none of, for float32 arrays on the device of x.

        The methods in :data:`OPTIONAL` return None in this class. A subclass that does not override one of them lists
        it here: :class:`tnadapt.testing.BackendContract` fails where a method returns None and is not listed, and
        where it is listed and returns something else.

        Parameters
        ----------
        x : array
            Of this library.

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

    # -- Kernels: faster ways to the same numbers --------------------------------------------
    # None where there is no kernel for this array: the reference implementation runs, which each kernel must equal.
    # It is passed as `fallback` (a pair for a map and its adjoint), for what a kernel meets later and cannot take, such
    # as batches of gradients.

    def fwht(self, x: Array, scale: float, axis: int, fallback: Map) -> Array | None:
        """``scale * H x`` along one axis, the entries of H being 1 and -1.

        x is float32 or float64 and not empty; the axis is counted from the last, and a power of two long, at least 2.
        """
        return None

    def fastfood(self, x: Array, draws: Any, n_in: int, adjoint: bool, fallback: tuple[Map, Map]) -> Array | None:
        """The linear part of a projection F along the last axis, or its adjoint.

        ``draws`` are the :class:`tnadapt.algebra.maps._fastfood_draws.FastfoodDraws` that make F.
        """
        return None

    def shuffle(self, x: Array, seed: int, group: int, inverse: bool, fallback: tuple[Map, Map]) -> Array | None:
        """The last axis of x in the order of the fixed permutation of its length, or of its inverse."""
        return None

    # -- What a check of the laws asks besides -----------------------------------------------

    def double_precision(self) -> AbstractContextManager[Any]:
        """A context in which float64 arrays can be made, where that is not always so."""
        return nullcontext()

    def gradient(
        self, function: Callable[[dict[str, Array]], Array], arrays: dict[str, Array]
    ) -> dict[str, Array] | None:
        """Derivatives of a scalar function of named arrays; None where :meth:`lacks` lists it."""
        return None

    # -- Built from the above, the same for all ----------------------------------------------

    def is_float(self, x: Array) -> bool:
        """Whether x is of a real floating dtype that tnadapt computes in."""
        return self.dtype_name(x) in FLOAT_DTYPES

    def require_float(self, x: Array, what: str) -> None:
        """A BackendError naming ``what`` unless x is of a real floating dtype."""
        if not self.is_float(x):
            raise BackendError(
                f"{what} must be of a real floating dtype ({', '.join(FLOAT_DTYPES)}); "
                f"got {self.dtype_name(x)}: cast it first"
            )

    def pad_last(self, x: Array, size: int) -> Array:
        """x with zeros appended to its last axis up to ``size``."""
        missing = size - x.shape[-1]
        if missing == 0:
            return x
        return self.concat([x, self.zeros((*x.shape[:-1], missing), like=x)], axis=-1)

    def flatten(self, x: Array) -> Array:
        """vec(x): one axis, the last of x fastest."""
        return self.reshape(x, (math.prod(x.shape),))

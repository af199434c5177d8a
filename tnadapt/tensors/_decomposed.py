"""Results of decompositions: their base class, how a fit becomes a result, CP tensors, and Tucker tensors."""

from __future__ import annotations

import abc
import copy
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from tnadapt.algebra.products import cp_to_tensor, hadamard_tensor, kronecker_tensor, tucker_to_tensor
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, Backend, get_backend, load_backend
from tnadapt.decomposition.fits import OPEN, Contraction, Fit, FitOutcome, holds, smallest_within
from tnadapt.decomposition.linear_algebra import Algebra, norm_of, with_value
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._matrix_products import as_matrix, mode_dot, row_khatri_rao, unfold
from ._requests import (
    NUMERIC,
    Request,
    alike,
    as_tensor,
    as_tensors,
    from_lists,
    integer_of,
    mode_of,
    numeric,
    scalar_of,
)
from ._tensor_file import write

# -- Base class of all results -----------------------------------------------------------------------------------------


class Result(abc.ABC):
    """Base of what decompositions return: arrays of one library, and how the decomposition found them."""

    outcome: FitOutcome | None = None

    # NumPy's numbers and arrays leave products to __rmul__ instead of reading a result as an array of its parts.
    __array_ufunc__ = None

    @classmethod
    def of(cls, backend: Backend, parts: Sequence[Any]) -> Self:
        """Make one of checked parts."""
        backend.register_result(cls)  # type: ignore[arg-type]
        return tuple.__new__(cls, tuple(parts))  # type: ignore[type-var]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[Any, ...]:
        """Shape of the tensor, or of its slices."""

    @property
    @abc.abstractmethod
    def rank(self) -> Any:
        """The rank, or the ranks."""

    @property
    @abc.abstractmethod
    def arrays(self) -> list[Array]:
        """All arrays of the network."""

    @abc.abstractmethod
    def to_tensor(self) -> Array:
        """Form the tensor."""

    @abc.abstractmethod
    def norm(self) -> Array:
        """Compute the Frobenius norm without forming the tensor."""

    @abc.abstractmethod
    def _times(self, number: Any) -> Self:
        """Multiply by a number."""

    @property
    def backend(self) -> Backend:
        """The library of the arrays."""
        return get_backend(*self.arrays)

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all arrays."""
        return sum(math.prod(array.shape) for array in self.arrays)

    @property
    def error(self) -> float | None:
        """Relative Frobenius error of the decomposition that made this; None if none did, or inside a trace."""
        return None if self.outcome is None else self.outcome.error

    @property
    def bound(self) -> float | None:
        """A lower bound on the error at these ranks."""
        return None if self.outcome is None else self.outcome.bound

    @property
    def certified(self) -> bool | None:
        """Whether the error is the least possible one at these ranks."""
        return None if self.outcome is None else self.outcome.certified

    @property
    def converged(self) -> bool | None:
        """Whether the iteration stopped because it improved no more; ``outcome.reason`` says why it did otherwise."""
        return None if self.outcome is None else self.outcome.converged

    @property
    def history(self) -> tuple[float, ...]:
        """The least error after each iteration, of all starts; empty without iterations."""
        return () if self.outcome is None else self.outcome.history

    def with_arrays(self, arrays: Sequence[Array]) -> Self:
        """Return one with other arrays in the places of :attr:`arrays`."""
        rest = iter(arrays)

        def replaced(part: Any) -> Any:
            if isinstance(part, Decomposed):
                return part.with_arrays([next(rest) for _ in part.arrays])
            if isinstance(part, (list, tuple)):
                return [replaced(item) for item in part]
            return None if part is None else next(rest)

        return self.of(self.backend, [replaced(part) for part in self])  # type: ignore[attr-defined]

    def with_outcome(self, outcome: FitOutcome | None) -> Self:
        """Attach how a decomposition found it; return the object itself."""
        self.outcome = outcome
        return self

    def __mul__(self, other: Any) -> Any:
        """Multiply by a number; a complex one makes a real result complex."""
        number = scalar_of(other)
        if number is None:
            return NotImplemented
        dtype = self.backend.dtype_name(self.arrays[0])
        if isinstance(number, complex) or "complex" in str(getattr(number, "dtype", "")):
            return self.to(dtype=np.result_type(dtype, np.complex64).name)._times(number)
        return self._times(number)

    def __rmul__(self, other: Any) -> Any:
        return self.__mul__(other)

    def __truediv__(self, other: Any) -> Any:
        number = scalar_of(other)
        return NotImplemented if number is None else self * (1.0 / number)

    def __neg__(self) -> Self:
        return self._times(-1.0)

    @checks_arguments
    def to(self, *, backend: str | None = None, dtype: str | None = None, device: Any = None) -> Self:
        """Return the same result in another library, dtype or device.

        Parameters
        ----------
        backend : str, optional
            Name of the library; that of the arrays if None.
        dtype : str, optional
            ``"float64"``, ``"float32"``, ``"complex128"`` or ``"complex64"``; that of the arrays if None. A complex
            tensor does not become real.
        device : optional
            Device of the library; if None, that of the arrays, or the default one of another library.

        Returns
        -------
        Decomposed or Parafac2Tensor
            Of the same class, with the same outcome. Derivatives are recorded if only the dtype changes.

        Raises
        ------
        BackendError
            If the library is unknown or lacks the dtype or the device, or a complex tensor would become real.

        Examples
        --------
        >>> import torch
        >>> from tnadapt.tensors import random_cp
        >>> random_cp((3, 4), 2).to(backend="torch", dtype="float32").factors[0].dtype
        torch.float32
        """
        source, before = self.backend, self.backend.dtype_name(self.arrays[0])
        target, name = source if backend is None else load_backend(backend), before if dtype is None else dtype
        if name not in NUMERIC:
            raise BackendError(f"tensors compute in one of {', '.join(NUMERIC)}; got the dtype {safe_repr(dtype)}")
        if before.startswith("complex") and not name.startswith("complex"):
            raise BackendError(
                f"a tensor in {before} does not become {name}: take the real or the imaginary part of one"
            )
        if target is source and device is None:
            arrays = [source.astype(array, name) for array in self.arrays]
        else:
            arrays = [target.asarray(source.to_numpy(array), name, device) for array in self.arrays]
        target.register_result(type(self))  # type: ignore[arg-type]
        return self.with_arrays(arrays).with_outcome(self.outcome)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file, which :func:`tnadapt.tensors.load` reads, on any library.

        Parameters
        ----------
        path : str or PathLike
            A file of that name is replaced, at once and whole.

        Raises
        ------
        FileError
            If it cannot be written.

        Notes
        -----
        One safetensors file, of the kind and the arrays. How a decomposition found them is not in it.
        """
        write(path, self)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts())
        return f"<{type(self).__name__}: {facts}>"

    def _repr_html_(self) -> str:
        from tnadapt.report import TextTable

        return TextTable(self._facts(), caption=type(self).__name__).html()

    def _described(self) -> str:
        return str(self.shape)

    def _facts(self) -> list[tuple[str, str]]:
        share = self.num_parameters / max(1, self.size)
        facts = [
            ("shape", self._described()),
            ("rank", str(self.rank)),
            ("parameters", f"{self.num_parameters:,} ({share:.3g} of {self.size:,})"),
        ]
        if self.outcome is not None:
            limit = " (the least possible)" if self.outcome.certified else f" (at least {self.outcome.bound:.3g})"
            method = self.outcome.method
            if self.outcome.calls:
                limit, method = " (estimated)", f"{method} from {self.outcome.calls:,} values"
            facts += [("error", f"{self.outcome.error:.3g}{limit}"), ("method", method)]
            if not self.outcome.converged:
                facts.append(("converged", f"no ({self.outcome.stopped})"))
            if self.outcome.stopped == "degenerate":
                facts.append(("degenerate", self.outcome.reason))
        return facts


class Decomposed(Result):
    """A tensor that is held as the arrays of a small network.

    The result of a function such as :func:`tnadapt.tensors.cp`. A result unpacks as TensorLy's do. Make one from arrays
    of your own by its class, ``CPTensor(weights, factors)``.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it; None for one that was made otherwise.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def contraction(self) -> Contraction:
        """Indices of the axes of each of :attr:`arrays`, and of those of the tensor, which is their contraction."""
        raise BackendError(f"a {type(self).__name__} that an iteration finds has no derivative: detach the tensor")

    @abc.abstractmethod
    def entries(self, indices: Any) -> Array:
        """Compute single elements without forming the tensor.

        Parameters
        ----------
        indices : array of int, shape (n, M)
            One row of indices per element; negative ones count from the end.

        Returns
        -------
        array, shape (n,)
        """

    @abc.abstractmethod
    def part(self, *index: int | slice) -> Self:
        """Take a slice of the tensor, in the same form and without forming the tensor.

        Parameters
        ----------
        *index : slice or int
            One for each mode, or for the first modes. An integer keeps its mode, with one element.

        Returns
        -------
        Decomposed
        """

    @abc.abstractmethod
    def _sum(self, other: Self) -> Self:
        """Add another tensor of the same shape."""

    @abc.abstractmethod
    def _product(self, other: Self) -> Self:
        """Multiply by another tensor of the same shape, element by element."""

    @abc.abstractmethod
    def _inner(self, other: Any) -> Array:
        """Return the inner product with another tensor of the same form and shape."""

    # -- Forms in which two tensors meet ---------------------------------------------------------

    # The more general a form is, the higher: a tensor projects those of more general forms on its own arrays.
    _level = 0

    @classmethod
    def _converted(cls, other: Decomposed) -> Self | None:
        """Return a tensor of a less general form in this one; None for others."""
        return None

    def _simplified(self, other: Decomposed) -> Decomposed:
        """Return the same tensor in one of the common forms, for meeting another one."""
        return self

    def _projected(self, other: Any) -> Array:
        """Return the inner product with a tensor of a more general form."""
        raise NotImplementedError

    def _paired(self, other: Decomposed) -> tuple[Any, Any]:
        """Return two tensors of one shape in one form, the more general of theirs."""
        self.same_shape(other)
        get_backend(self.arrays[0], other.arrays[0])
        if type(self) is type(other):
            return self, other
        mine, theirs = self._simplified(other), other._simplified(self)
        if type(mine) is type(theirs):
            return mine, theirs
        if (converted := type(theirs)._converted(mine)) is not None:
            return converted, theirs
        if (converted := type(mine)._converted(theirs)) is not None:
            return mine, converted
        raise ShapeError(
            f"a {type(self).__name__} and a {type(other).__name__} have no common form that is smaller than the whole: "
            "form one of them, as by to_tensor() or to_matrix()"
        )

    def _formed(self) -> Array:
        """Form the tensor, in its shape."""
        return self.to_tensor()

    def _dense(self, other: Any) -> Array | None:
        """Return an array of the tensor's library and shape; None for what is no array, or has no axes."""
        if isinstance(other, (list, tuple)) or scalar_of(other) is not None:
            return None
        try:
            get_backend(other)
        except BackendError:
            return None
        array = as_tensor(other, "other")[1]
        get_backend(self.arrays[0], array)
        if tuple(array.shape) != self.shape:
            raise ShapeError(f"other has shape {tuple(array.shape)}; expected {self.shape}, that of the tensor")
        return array

    # -- Shared ----------------------------------------------------------------------------------

    def inner(self, other: Any) -> Array:
        """Compute the inner product with another tensor of any form, without forming either; or with an array.

        Parameters
        ----------
        other : Decomposed or array
            Of the same shape, library, dtype and device.

        Returns
        -------
        array
            Without axes. The first tensor is conjugated if it is complex.
        """
        backend = self.backend
        if not isinstance(other, Decomposed):
            array = self._dense(other)
            if array is None:
                raise ShapeError(f"other must be a tensor or an array of shape {self.shape}; got {safe_repr(other)}")
            return backend.sum(backend.flatten(backend.conj(self._formed()) * array), axis=0)
        self.same_shape(other)
        get_backend(self.arrays[0], other.arrays[0])
        mine, theirs = (
            (self, other) if type(self) is type(other) else (self._simplified(other), other._simplified(self))
        )
        if mine._level == theirs._level:
            return mine._inner(theirs)
        if mine._level < theirs._level:
            return mine._projected(theirs)
        return backend.conj(theirs._projected(mine))

    def conj(self) -> Self:
        """Return the complex conjugate, in the same form."""
        backend = self.backend
        return self.with_arrays([backend.conj(array) for array in self.arrays])

    @property
    def order(self) -> int:
        """Number of modes."""
        return len(self.shape)

    def norm(self) -> Array:
        """Compute the Frobenius norm without forming the tensor, for numbers of any magnitude.

        Returns
        -------
        array
            Without axes; differentiable. It is the square root of an inner product, so that norms below the square
            root of the dtype's epsilon times those of the arrays are rounding; of trains and TT matrices it comes from
            QR decompositions, to full precision. Inside a trace, where values are unknown, squares may overflow.
        """
        algebra, exponents = exponents_of(self.backend, self.arrays)
        if not any(exponents):
            return self._norm()
        scaled = [algebra.scaled(array, -exponent) for array, exponent in zip(self.arrays, exponents, strict=True)]
        return algebra.scaled(self.with_arrays(scaled)._norm(), sum(exponents))

    def _norm(self) -> Array:
        """Compute the norm of a tensor that is a product of its arrays, whose squares neither overflow nor vanish."""
        backend = self.backend
        square = self.inner(self)
        real = backend.xp.real(square) if backend.is_complex(square) else square
        return backend.sqrt(backend.where(real > 0.0, real, real * 0.0))

    def to_vec(self) -> Array:
        """Form the tensor, flattened in row-major order: a vector of :attr:`size` elements."""
        return self.backend.flatten(self.to_tensor())

    def to_unfolded(self, mode: int) -> Array:
        """Form the tensor, unfolded in one mode as :func:`tnadapt.tensors.unfold` does."""
        return unfold(self.to_tensor(), mode)

    def entry(self, *index: int) -> Array:
        """Compute one element without forming the tensor, as an array without axes; one index for each mode."""
        if len(index) != self.order:
            raise ShapeError(
                f"index must be {self.order} integers for a tensor of shape {self.shape}; got {len(index)}"
            )
        return self.entries(np.asarray([index]))[0]

    def places(self, indices: Any) -> list[np.ndarray]:
        """Return one vector of indices for each mode, from an array with one row per element."""
        rows = from_lists(indices, "indices are")
        if rows.ndim != 2 or rows.shape[1] != self.order or rows.dtype.kind not in "iu":
            raise ShapeError(
                f"indices must be integers of shape (n, {self.order}) for a tensor of shape {self.shape}; got "
                f"{rows.dtype} of shape {rows.shape}"
            )
        for mode, size in enumerate(self.shape):
            outside = (rows[:, mode] < -size) | (rows[:, mode] >= size)
            if outside.any():
                raise ShapeError(
                    f"index {int(rows[outside, mode][0])} is out of range for mode {mode} of a tensor of shape "
                    f"{self.shape}"
                )
        return [np.ascontiguousarray(rows[:, mode] % size) for mode, size in enumerate(self.shape)]

    def slices(self, index: Sequence[int | slice]) -> list[slice]:
        """Return one slice for each mode."""
        if len(index) > self.order:
            raise ShapeError(f"a tensor of shape {self.shape} has {self.order} modes; got {len(index)} slices")
        slices = []
        for mode, (size, item) in enumerate(zip(self.shape, [*index, *[slice(None)] * self.order], strict=False)):
            if isinstance(item, slice):
                start, stop, step = item.indices(size)
                if step < 1 or not len(range(start, stop, step)):
                    raise ShapeError(
                        f"the slice {item} of mode {mode} with {size} elements must take some, with a positive step"
                    )
                slices.append(slice(start, stop, step))
                continue
            whole = isinstance(item, (int, np.integer)) and not isinstance(item, bool)
            if not whole or not -size <= item < size:
                raise ShapeError(f"index {safe_repr(item)} is no index of mode {mode} with {size} elements")
            slices.append(slice(int(item) % size, int(item) % size + 1, 1))
        return slices

    def _whole(self, index: Sequence[int | slice]) -> Self:
        """Return the tensor itself if the slices select all of it; parts do not have this form."""
        if any(span != slice(0, size, 1) for span, size in zip(self.slices(index), self.shape, strict=True)):
            raise ShapeError(f"a {type(self).__name__} has no such part: take entries, or multiply by unit vectors")
        return self

    def same_shape(self, other: Decomposed) -> None:
        """Raise a ShapeError unless another tensor has the same shape."""
        if other.shape != self.shape:
            raise ShapeError(f"the tensors have shapes {self.shape} and {other.shape}; expected the same shape")

    def scaled_alike(self, other: Self) -> Self:
        """Return the same tensor in arrays of which no scale is free, with the values of another result's arrays."""
        return self

    def __add__(self, other: Any) -> Any:
        """Add another tensor of the same shape without forming either, or an array, which gives an array."""
        if isinstance(other, Decomposed):
            mine, theirs = self._paired(other)
            return mine._sum(theirs)
        array = self._dense(other)
        return NotImplemented if array is None else self._formed() + array

    def __radd__(self, other: Any) -> Array:
        array = self._dense(other)
        return NotImplemented if array is None else array + self._formed()

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Decomposed):
            return self + -other
        array = self._dense(other)
        return NotImplemented if array is None else self._formed() - array

    def __rsub__(self, other: Any) -> Array:
        array = self._dense(other)
        return NotImplemented if array is None else array - self._formed()

    def __mul__(self, other: Any) -> Any:
        """Multiply by a number or, element by element, by another tensor of the same shape, without forming either.

        A complex number makes a real tensor complex.
        """
        if not isinstance(other, Decomposed):
            return super().__mul__(other)
        mine, theirs = self._paired(other)
        return mine._product(theirs)


def exponents_of(backend: Backend, arrays: Sequence[Array]) -> tuple[Algebra, list[int]]:
    """Return the powers of two to divide arrays by for squares of their products to fit the dtype; 0 if they do."""
    algebra = Algebra(backend, arrays[0])
    # In a trace, values are unknown.
    known = all(map(backend.is_concrete, arrays))
    exponents = [math.frexp(algebra.largest(array))[1] if known else 0 for array in arrays]
    fit = sum(map(abs, exponents)) <= np.finfo(backend.dtype_name(arrays[0])).maxexp // 4
    return algebra, [0 if fit else exponent for exponent in exponents]


# -- From a fit to its result ------------------------------------------------------------------------------------------


D = TypeVar("D", bound=Decomposed)


def finished(
    request: Request,
    fit: Fit,
    result_of: Callable[[Mapping[str, Array]], D],
    fixed: Collection[int] = (),
    ridge: float = 0.0,
) -> D:
    """Return the result of a fit, with how good it is, and with its derivative if it is recorded.

    Parameters
    ----------
    request : Request
    fit : Fit
    result_of : callable
        Makes the result from the fit's arrays.
    fixed : collection of int
        Which of the result's ``arrays`` do not depend on the tensor.
    ridge : float
        The penalty that the fit of a CP tensor had.

    Returns
    -------
    Decomposed
        Inside a trace without an outcome.
    """
    result = result_of(fit.arrays)
    if not request.concrete:
        return result
    rounding = 64.0 * request.algebra().eps
    certain, factor, bound, optimal = fit.factor <= 1.0, fit.factor, fit.bound, fit.optimal

    def optimum(error: float) -> tuple[float, bool]:
        known = holds(optimal)
        least = error * (1.0 - OPEN) - rounding if certain else error / factor
        least = max(0.0, min(error, max(bound, least if known else 0.0)))
        return least, bool((known and certain) or error <= rounding or error <= least * (1.0 + 1e-6))

    error: float | Callable[[], float]
    if request.settled:
        # The caller may change the arrays before the error is read.
        copied: D = tuple.__new__(type(result), _copied(result))  # type: ignore[type-var]
        error = functools.partial(error_of, request, copied)
    else:
        error = fit.error if request.blocks else error_of(request, result)
    outcome = FitOutcome.computed_later(
        optimum, error=error, stopped=fit.stopped, history=fit.history, method=fit.method
    )
    compute = fit.closed
    closed = None if compute is None else lambda tensor: result_of(compute(tensor))
    result = with_derivative(request, result, fit.converged, closed, fixed, ridge)
    if request.exponent:
        arrays = result.arrays
        place = next(place for place in range(len(arrays)) if place not in fixed)
        arrays[place] = request.algebra().scaled(arrays[place], request.exponent)
        result = result.with_arrays(arrays)
    return result.with_outcome(outcome)


def scaled_start(request: Request, init: Any, held: Collection[int] = ()) -> Any:
    """Divide a given start by the power of two by which a request's tensor was divided."""
    if not request.exponent or init is None or isinstance(init, str):
        return init
    algebra, arrays = request.algebra(), init.arrays
    sizes = [math.frexp(algebra.largest(array))[1] for array in arrays]
    before = len(arrays) - len(request.shape)
    free = [place for place in range(len(arrays)) if place - before not in held]
    # In the array that is farthest from numbers near one.
    place = max(free, key=lambda place: sizes[place] * request.exponent)
    arrays[place] = algebra.scaled(arrays[place], -request.exponent)
    return init.with_arrays(arrays)


def error_of(request: Request, result: Decomposed) -> float:
    """Relative Frobenius error of a decomposition, from its tensor."""
    backend = request.backend
    if request.sparse:
        residual = request.tensor.distance(result.entries, float(result.norm()), result.to_tensor)
    else:
        left = request.weighted(request.tensor - backend.reshape(result.to_tensor(), request.shape))
        residual = norm_of(backend, left)
    return residual / request.norm if request.norm else float(residual > 0.0)


def with_derivative(
    request: Request,
    result: D,
    converged: bool,
    closed: Callable[[Array], D] | None = None,
    fixed: Collection[int] = (),
    ridge: float = 0.0,
) -> D:
    """Return a result with the same values, and with its derivative if it is recorded.

    That of ``closed``, which computes the result from the tensor; otherwise that of a minimum of the error.
    """
    if request.source is None:
        return result
    backend, values = request.backend, result.arrays
    if closed is not None:
        expressed = closed(request.source).arrays
        return result.with_arrays(
            [with_value(backend, value, array) for value, array in zip(values, expressed, strict=True)]
        )
    from tnadapt.decomposition.implicit_gradient import implicit_gradient

    dtype = backend.dtype_name(request.tensor)
    hosts, contraction = [backend.to_numpy(value) for value in values], result.contraction

    def pullback(tensor: Array, cotangents: Sequence[Array]) -> Array:
        gradient = implicit_gradient(
            contraction, hosts, backend.to_numpy(tensor), [backend.to_numpy(x) for x in cotangents], fixed,
            float(np.finfo(dtype).eps), converged, ridge,
        )  # fmt: skip
        return backend.asarray(gradient, dtype, backend.device(tensor))

    arrays = backend.with_pullback(request.source, values, pullback)
    for place in fixed:
        arrays[place] = values[place]
    return result.with_arrays(arrays).scaled_alike(result)


def _copied(parts: Any) -> list[Any]:
    """Copy the arrays in nested sequences."""
    return [_copied(part) if isinstance(part, (list, tuple)) else None if part is None else part * 1 for part in parts]


# -- The smallest rank for an error ------------------------------------------------------------------------------------


def smallest_rank(
    fitted: Callable[[int], D],
    limit: float,
    most: int,
    shape: Sequence[int],
    init: Any = "svd",
    nonnegative: bool = False,
) -> D:
    """Return the fit of the smallest rank that is found to keep to an error.

    Parameters
    ----------
    fitted : callable
        Returns the fit of a rank.
    limit : float
        The relative error that is allowed.
    most : int
        The rank that represents any tensor of the shape.
    shape : sequence of int
    init : object
        What the fits start from, which must be named.
    nonnegative : bool
        Whether factors may not have negative elements.

    Raises
    ------
    ConfigError
        If a start is given, since it has one rank only.
    ShapeError
        If the fit of the largest rank has a larger error.
    """
    if not isinstance(init, str):
        raise ConfigError("max_error= tries several ranks: use init='svd' or 'random', or give rank=")
    best = smallest_within(fitted, lambda fit: fit.error or 0.0, limit, most)
    if (best.error or 0.0) > limit and nonnegative:
        raise ShapeError(
            f"rank {most}, the largest, was fitted with an error of {best.error:.2g} only, as nonnegative= excludes "
            "closer factors: allow a larger max_error, or leave nonnegative= out"
        )
    if (best.error or 0.0) > limit:
        raise ShapeError(
            f"rank {most}, which represents any tensor of shape {tuple(shape)}, was fitted with an error of "
            f"{best.error:.2g} only: allow a larger max_error, more max_iterations or more starts"
        )
    return best


# -- CP tensors: sums of outer products of vectors ---------------------------------------------------------------------


class Multilinear(Decomposed):
    """Base class of the forms that have an array for each mode: CP and Tucker tensors, trains and rings."""

    @checks_arguments
    def mode_dot(self, matrix_or_vector: Any, mode: int, keep_dim: bool = False) -> Any:
        """Multiply by a matrix or a vector along one mode, without forming the tensor.

        Parameters
        ----------
        matrix_or_vector : array, shape (n, d_mode) or (d_mode,)
            Of the tensor's library, dtype and device.
        mode : int
            Negative ones count from the last.
        keep_dim : bool
            Whether the mode stays, with one element, when a vector contracts it.

        Returns
        -------
        Decomposed
            Of the same class, with ``n`` elements along that mode, or without that mode for a vector. An array without
            axes if there was no other mode. Differentiable.

        Raises
        ------
        ShapeError
            If the sizes do not match, or there is no such mode.
        BackendError
            If libraries, dtypes or devices are mixed.

        Examples
        --------
        >>> import numpy as np
        >>> from tnadapt.tensors import random_tt
        >>> train = random_tt((3, 4, 5), 2)
        >>> train.mode_dot(np.ones((2, 4)), 1).shape, train.mode_dot(np.ones(4), 1).shape
        ((3, 2, 5), (3, 5))
        >>> train.mode_dot(np.ones(4), 1, keep_dim=True).shape
        (3, 1, 5)
        """
        number, what = mode_of(mode, self.shape), "matrix_or_vector"
        factor = numeric(get_backend(matrix_or_vector, what=what), matrix_or_vector, what)
        get_backend(self.arrays[0], factor)
        product = self._along(as_matrix(self.backend, factor, self.shape, number), number)
        return product if keep_dim or len(factor.shape) == 2 else product._dropped(number)

    @abc.abstractmethod
    def _along(self, matrix: Array, mode: int) -> Self:
        """Multiply by a matrix along one mode."""

    @abc.abstractmethod
    def _dropped(self, mode: int) -> Any:
        """Return the tensor without a mode of one element."""


class _Factored(Multilinear):
    """Base class of CP and Tucker tensors: weights or a core, and a matrix for each mode."""

    factors: list[Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(factor.shape[0]) for factor in self.factors)

    def part(self, *index: int | slice) -> Self:
        return self._with([factor[rows] for factor, rows in zip(self.factors, self.slices(index), strict=True)])

    def _along(self, matrix: Array, mode: int) -> Self:
        return self._with([mode_dot(x, matrix, 0) if m == mode else x for m, x in enumerate(self.factors)])

    def _with(self, factors: Sequence[Array]) -> Self:
        """Return a tensor with other factors."""
        return type(self)(self[0], factors)  # type: ignore[call-arg, index]

    def _pairs(self, other: Self) -> Iterator[tuple[Array, Array]]:
        """Yield the factors of two tensors in pairs, mode by mode."""
        return zip(self.factors, other.factors, strict=True)

    def _side_by_side(self, backend: Backend, other: Self) -> list[Array]:
        return [backend.concat(pair, axis=1) for pair in self._pairs(other)]

    def _overlaps(self, backend: Backend, other: Self) -> list[Array]:
        """Return ``Uᴴ V`` for the factors of each mode."""
        return [backend.matmul(backend.conj(backend.matrix_transpose(u)), v) for u, v in self._pairs(other)]

    def _rows(self, backend: Backend, indices: Any) -> list[Array]:
        """Return the rows of each factor that single elements select."""
        pairs = zip(self.factors, self.places(indices), strict=True)
        return [
            backend.take(factor, backend.constant(place, backend.device(factor)), axis=0) for factor, place in pairs
        ]


class _CPParts(NamedTuple):
    weights: Array | None
    factors: list[Array]


class CPTensor(_Factored, _CPParts):
    """A tensor ``sum_r weights[r] * outer(factors[0][:, r], …)``.

    Parameters
    ----------
    weights : array, shape (r,), or None
        None stands for ones.
    factors : sequence of array, shape (d_m, r)

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a factor is not a matrix, or the ranks differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Unpacks as ``weights, factors``, like TensorLy's CPTensor. ``a + b``, ``a - b`` and ``a * b`` (element by element)
    are CP tensors again, whose ranks are sums and products of ranks; so are products with numbers.

    Examples
    --------
    >>> import numpy as np
    >>> cp = CPTensor(None, [np.ones((2, 1)), np.ones((3, 1))])
    >>> (cp + cp).to_tensor()
    array([[2., 2., 2.],
           [2., 2., 2.]])
    >>> float(cp.entry(1, 2)), cp.part(0).shape, float(cp.inner(cp))
    (1.0, (1, 3), 6.0)
    """

    @checks_arguments
    def __new__(cls, weights: Any, factors: Sequence[Any]) -> Self:
        backend, arrays = as_tensors(factors, "factors")
        if weights is not None:
            weights = as_tensor(weights, "weights")[1]
            get_backend(*arrays, weights)
        alike(arrays, 1, "CP factor")
        if weights is not None and tuple(weights.shape) != (arrays[0].shape[1],):
            raise ShapeError(f"CP weights have shape {tuple(weights.shape)}; expected ({arrays[0].shape[1]},)")
        return cls.of(backend, (weights, arrays))

    @property
    def rank(self) -> int:
        return int(self.factors[0].shape[1])

    @property
    def arrays(self) -> list[Array]:
        return [*self.factors] if self.weights is None else [self.weights, *self.factors]

    @property
    def contraction(self) -> Contraction:
        modes = list(range(1, 1 + self.order))
        factors = [[mode, 0] for mode in modes]
        return (factors if self.weights is None else [[0], *factors]), modes

    def scaled_alike(self, other: Self) -> Self:
        if self.weights is None:
            return self
        return self.with_arrays(
            [with_value(self.backend, *pair) for pair in zip(other.arrays, self.normalized().arrays, strict=True)]
        )

    def to_tensor(self) -> Array:
        return cp_to_tensor((self.weights, self.factors))

    def entries(self, indices: Any) -> Array:
        backend = self.backend
        terms = hadamard_tensor(self._rows(backend, indices))
        return backend.sum(terms if self.weights is None else terms * self.weights, axis=1)

    def _projected(self, other: Any) -> Array:
        # Of the tensor in the basis of the factors' columns, component r takes the element (r, …, r).
        backend = self.backend
        for mode, factor in enumerate(self.factors):
            other = other.mode_dot(backend.conj(backend.matrix_transpose(factor)), mode)
        diagonal = other.entries(np.repeat(np.arange(self.rank)[:, None], self.order, axis=1))
        return backend.sum(diagonal if self.weights is None else backend.conj(self.weights) * diagonal, axis=0)

    def _inner(self, other: Self) -> Array:
        backend = self.backend
        overlaps = hadamard_tensor(self._overlaps(backend, other))
        if self.weights is not None:
            overlaps = overlaps * backend.reshape(backend.conj(self.weights), (-1, 1))
        if other.weights is not None:
            overlaps = overlaps * other.weights
        return backend.sum(backend.flatten(overlaps), axis=0)

    def _sum(self, other: Self) -> Self:
        backend, weights = self.backend, None
        if self.weights is not None or other.weights is not None:
            weights = backend.concat([self._weights(), other._weights()])
        return type(self)(weights, self._side_by_side(backend, other))

    def _times(self, number: Any) -> Self:
        return type(self)(self._weights() * number, self.factors)

    def _product(self, other: Self) -> Self:
        backend = self.backend
        weights = backend.flatten(backend.reshape(self._weights(), (-1, 1)) * other._weights())
        return type(self)(weights, [row_khatri_rao(pair) for pair in self._pairs(other)])

    def normalized(self) -> Self:
        """Return the same tensor with factors whose columns have norm 1; the weights hold the norms.

        Columns of zeros stay, and so does the sign of a weight.
        """
        backend, factors = self.backend, []
        algebra, exponents = exponents_of(backend, [self._weights(), *self.factors])
        weights = algebra.scaled(self._weights(), -exponents[0])
        for array, exponent in zip(self.factors, exponents[1:], strict=True):
            factor = algebra.scaled(array, -exponent)
            squares = factor * backend.conj(factor)
            real = backend.xp.real(squares) if backend.is_complex(factor) else squares
            norms = backend.sqrt(backend.sum(real, axis=0))
            factors.append(factor / backend.where(norms > 0.0, norms, norms * 0.0 + 1.0))
            weights = weights * norms
        return self.of(backend, (algebra.scaled(weights, sum(exponents)), factors)).with_outcome(self.outcome)

    def _dropped(self, mode: int) -> Any:
        row, rest = self.factors[mode][0, :], [*self.factors[:mode], *self.factors[mode + 1 :]]
        weights = row if self.weights is None else self.weights * row
        return type(self)(weights, rest) if rest else self.backend.sum(weights, axis=0)

    def truncated(self, rank: int) -> Self:
        """Keep the components with the largest norms, in descending order.

        Parameters
        ----------
        rank : int
            How many. Components are not fitted again: pass the result to :func:`tnadapt.tensors.cp` as ``init=`` for
            that.

        Returns
        -------
        CPTensor
            With factors whose columns have norm 1.

        Raises
        ------
        ShapeError
            If there are not so many.
        """
        keep = integer_of("rank", rank, 1, self.rank)
        backend, unit = self.backend, self.normalized()
        assert unit.weights is not None
        sizes = abs(backend.to_numpy(unit.weights))
        order = sizes.argsort(kind="stable")[::-1][:keep]
        places = backend.constant(order.copy(), backend.device(unit.weights))
        factors = [backend.take(factor, places, axis=1) for factor in unit.factors]
        return self.of(backend, (backend.take(unit.weights, places), factors))

    def cp_copy(self) -> Self:
        """Return a copy of the object and its arrays, as the method of this name in TensorLy does."""
        return copy.deepcopy(self)

    def _weights(self) -> Array:
        if self.weights is not None:
            return self.weights
        return self.backend.zeros((self.rank,), like=self.factors[0]) + 1.0


# -- Tucker tensors: a small core, multiplied by a matrix along each mode ----------------------------------------------


class _TuckerParts(NamedTuple):
    core: Array
    factors: list[Array]


class TuckerTensor(_Factored, _TuckerParts):
    """A tensor ``core x_1 factors[0] x_2 factors[1] …``.

    Parameters
    ----------
    core : array, shape (r_1, …, r_M)
    factors : sequence of array, shape (d_m, r_m)

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a factor does not fit the core.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Unpacks as ``core, factors``, like TensorLy's TuckerTensor. ``a + b``, ``a - b`` and ``a * b`` (element by element)
    are Tucker tensors again, whose ranks are sums and products of ranks.

    Examples
    --------
    >>> import numpy as np
    >>> tucker = TuckerTensor(np.array([[2.0]]), [np.ones((2, 1)), np.ones((3, 1))])
    >>> tucker.to_tensor()
    array([[2., 2., 2.],
           [2., 2., 2.]])
    >>> (tucker + tucker).rank, float(tucker.inner(tucker))
    ((2, 2), 24.0)
    """

    @checks_arguments
    def __new__(cls, core: Any, factors: Sequence[Any]) -> Self:
        backend, (core, *arrays) = as_tensors([core, *factors], "core and factors")
        if len(arrays) != len(core.shape):
            raise ShapeError(f"a core of shape {tuple(core.shape)} needs {len(core.shape)} factors; got {len(arrays)}")
        for mode, factor in enumerate(arrays):
            if len(factor.shape) != 2 or factor.shape[1] != core.shape[mode]:
                raise ShapeError(
                    f"Tucker factor {mode} has shape {tuple(factor.shape)}; expected (size, {core.shape[mode]}), for a "
                    f"core of shape {tuple(core.shape)}"
                )
        return cls.of(backend, (core, arrays))

    @property
    def rank(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.core.shape)

    @property
    def arrays(self) -> list[Array]:
        return [self.core, *self.factors]

    @property
    def contraction(self) -> Contraction:
        ranks, modes = list(range(self.order)), list(range(self.order, 2 * self.order))
        return [ranks, *([mode, rank] for mode, rank in zip(modes, ranks, strict=True))], modes

    def to_tensor(self) -> Array:
        return tucker_to_tensor((self.core, self.factors))

    def entries(self, indices: Any) -> Array:
        backend = self.backend
        values = backend.reshape(self.core, (1, *self.core.shape))
        for factor, rows in zip(self.factors, self._rows(backend, indices), strict=True):
            # Contract the first remaining mode, batched over the elements.
            rest = tuple(values.shape)[2:]
            flat = backend.reshape(values, (values.shape[0], factor.shape[1], -1 if rest else 1))
            count = int(rows.shape[0])
            values = backend.reshape(backend.matmul(backend.reshape(rows, (count, 1, -1)), flat), (count, *rest))
        return values

    _level = 1

    @classmethod
    def _converted(cls, other: Decomposed) -> Self | None:
        if not isinstance(other, CPTensor):
            return None
        # Where components are more than elements, the core has the factor, so that it is no larger than the tensor.
        backend, rank, dtype = other.backend, other.rank, other.backend.dtype_name(other.factors[0])
        device, inner, outer = backend.device(other.factors[0]), list[Array](), list[Array]()
        for factor in other.factors:
            size = int(factor.shape[0])
            identity = backend.asarray(np.eye(min(rank, size)), dtype, device)
            pair = (factor, identity) if rank > size else (identity, factor)
            inner, outer = [*inner, pair[0]], [*outer, pair[1]]
        return cls(cp_to_tensor((other.weights, inner)), outer)

    def _projected(self, other: Any) -> Array:
        # In the basis of the factors' columns, the other tensor is no larger than the core.
        backend = self.backend
        for mode, factor in enumerate(self.factors):
            other = other.mode_dot(backend.conj(backend.matrix_transpose(factor)), mode)
        return backend.sum(backend.flatten(backend.conj(self.core) * other.to_tensor()), axis=0)

    def _inner(self, other: Self) -> Array:
        backend, moved = self.backend, other.core
        for mode, overlap in enumerate(self._overlaps(backend, other)):
            moved = mode_dot(moved, overlap, mode)
        return backend.sum(backend.flatten(backend.conj(self.core) * moved), axis=0)

    def _sum(self, other: Self) -> Self:
        backend = self.backend
        core = block_diagonal(backend, self.core, other.core, range(self.order))
        return type(self)(core, self._side_by_side(backend, other))

    def _times(self, number: Any) -> Self:
        return type(self)(self.core * number, self.factors)

    def _product(self, other: Self) -> Self:
        core = kronecker_tensor(self.backend, [self.core, other.core])
        return type(self)(core, [row_khatri_rao(pair) for pair in self._pairs(other)])

    def _dropped(self, mode: int) -> Any:
        core = mode_dot(self.core, self.factors[mode][0, :], mode)
        rest = [*self.factors[:mode], *self.factors[mode + 1 :]]
        return type(self)(core, rest) if rest else core

    def tucker_copy(self) -> Self:
        """Return a copy of the object and its arrays, as the method of this name in TensorLy does."""
        return copy.deepcopy(self)

    def orthogonal(self) -> Self:
        """Return the same tensor with factors that have orthonormal columns, at most as many as rows.

        Its norm is then that of the core. By a QR decomposition of each factor.
        """
        backend, core, factors = self.backend, self.core, []
        for mode, factor in enumerate(self.factors):
            q, r = backend.qr(factor)
            factors.append(q)
            core = mode_dot(core, r, mode)
        return type(self)(core, factors).with_outcome(self.outcome)


# -- Block-diagonal joins of arrays, for sums of networks --------------------------------------------------------------


def block_diagonal(backend: Backend, a: Array, b: Array, axes: Collection[int]) -> Array:
    """Join two arrays so that along some axes each has its own block, with zeros elsewhere.

    Parameters
    ----------
    backend : Backend
    a, b : array
        With the same sizes along the other axes.
    axes : collection of int
        The axes that are joined.

    Returns
    -------
    array

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> block_diagonal(get_backend(np.ones(1)), np.ones((1, 2)), np.ones((1, 1)), [0, 1])
    array([[1., 1., 0.],
           [0., 0., 1.]])
    """
    first, second = a, b
    for axis in sorted(axes):
        before = [int(size) for size in first.shape]
        after = [int(size) for size in second.shape]
        trailing, leading = before.copy(), after.copy()
        trailing[axis], leading[axis] = int(b.shape[axis]), int(a.shape[axis])
        first = backend.concat([first, backend.zeros(trailing, like=a)], axis=axis)
        second = backend.concat([backend.zeros(leading, like=a), second], axis=axis)
    return first + second

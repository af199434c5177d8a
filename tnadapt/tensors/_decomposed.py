"""What the results of all decompositions have in common."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.implicit_gradient import Contraction
from tnadapt.decomposition.optimality import Optimality
from tnadapt.errors import BackendError, ShapeError, safe_repr
from tnadapt.report import fact_table

from ._checks import scalar_of
from ._modes import unfold

__all__ = ["Decomposed", "FitOutcome"]


@dataclasses.dataclass(frozen=True)
class FitOutcome(Optimality):
    """How a decomposition was found, and how good it is.

    Attributes
    ----------
    error : float
        Frobenius norm of the residual over that of the tensor; of the observed elements if there is a mask.
    bound : float
        A lower bound on the error that any decomposition of that form and those ranks has; 0 if none is known.
    certified : bool
        Whether the error is the least possible one, up to rounding.
    converged : bool
        Whether an iteration stopped because it improved no more; True if there was no iteration.
    history : tuple of float
        The error after each iteration.
    method : str
        Short description of the method.

    Notes
    -----
    The bound and the certificate may take longer than the decomposition: they are computed when they are first read,
    and so is the error where no iteration needs it. Until then a copy of the tensor is held, of up to 2^24 elements.
    """

    error: float = dataclasses.field()
    bound: float = dataclasses.field()
    certified: bool = dataclasses.field()
    converged: bool
    history: tuple[float, ...]
    method: str


class Decomposed(abc.ABC):
    """A tensor that is held as the arrays of a small network.

    The result of a function such as :func:`tnadapt.tensors.cp`. A result unpacks as TensorLy's do. Make one from arrays
    of your own by its class, ``CPTensor(weights, factors)``.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it; None for one that was made otherwise.
    """

    outcome: FitOutcome | None = None
    # NumPy's numbers and arrays leave products to __rmul__, rather than read a result as an array of its parts.
    __array_ufunc__ = None

    @classmethod
    def of(cls, backend: Backend, parts: Sequence[Any]) -> Self:
        """Make one of checked parts."""
        backend.register_result(cls)  # type: ignore[arg-type]
        return tuple.__new__(cls, tuple(parts))  # type: ignore[type-var]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    @abc.abstractmethod
    def rank(self) -> Any:
        """The rank, or the ranks."""

    @property
    @abc.abstractmethod
    def arrays(self) -> list[Array]:
        """All arrays of the network."""

    @property
    def contraction(self) -> Contraction:
        """Indices of the axes of each of :attr:`arrays`, and of those of the tensor, which is their contraction."""
        raise BackendError(f"a {type(self).__name__} that an iteration finds has no derivative: detach the tensor")

    @abc.abstractmethod
    def to_tensor(self) -> Array:
        """Form the tensor."""

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
    def __add__(self, other: Any) -> Self:
        """Add another tensor of the same form and shape, without forming either."""

    @abc.abstractmethod
    def __mul__(self, other: Any) -> Self:
        """Multiply by a number or, element by element, by another tensor of the same form, without forming either."""

    @abc.abstractmethod
    def inner(self, other: Self) -> Array:
        """Compute the inner product with another tensor of the same form, without forming either.

        Returns
        -------
        array
            Without axes. The first tensor is conjugated if it is complex.
        """

    # -- Shared ----------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """The library of the arrays."""
        return get_backend(*self.arrays)

    @property
    def order(self) -> int:
        """Number of modes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all arrays."""
        return sum(math.prod(array.shape) for array in self.arrays)

    def norm(self) -> Array:
        """Compute the Frobenius norm without forming the tensor.

        Returns
        -------
        array
            Without axes; differentiable. It is the square root of an inner product, so that norms below the square
            root of the dtype's epsilon times those of the arrays are rounding.
        """
        backend = self.backend
        square = self.inner(self)
        real = backend.xp.real(square) if backend.is_complex(square) else square
        return backend.sqrt(backend.where(real > 0.0, real, real * 0.0))

    def to_vec(self) -> Array:
        """Form the tensor, flattened in row-major order."""
        return self.backend.flatten(self.to_tensor())

    def to_unfolded(self, mode: int) -> Array:
        """Form the tensor, unfolded in one mode."""
        return unfold(self.to_tensor(), mode)

    def entry(self, *index: int) -> Array:
        """Compute one element without forming the tensor; an array without axes."""
        if len(index) != self.order:
            raise ShapeError(
                f"index must be {self.order} integers for a tensor of shape {self.shape}; got {len(index)}"
            )
        return self.entries(np.asarray([index]))[0]

    def places(self, indices: Any) -> list[np.ndarray]:
        """Return one vector of indices for each mode, from an array with one row per element."""
        try:
            rows = np.asarray(indices)
        except ValueError:
            raise ShapeError("indices are a list whose parts differ in length; expected equal lengths") from None
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
        found = []
        for mode, (size, one) in enumerate(zip(self.shape, [*index, *[slice(None)] * self.order], strict=False)):
            if isinstance(one, slice):
                start, stop, step = one.indices(size)
                if step < 1 or not len(range(start, stop, step)):
                    raise ShapeError(
                        f"the slice {one} of mode {mode} with {size} elements must take some, with a positive step"
                    )
                found.append(slice(start, stop, step))
                continue
            whole = isinstance(one, (int, np.integer)) and not isinstance(one, bool)
            if not whole or not -size <= one < size:
                raise ShapeError(f"index {safe_repr(one)} is no index of mode {mode} with {size} elements")
            found.append(slice(int(one) % size, int(one) % size + 1, 1))
        return found

    def same_shape(self, other: Any) -> None:
        """Raise a ShapeError unless another tensor has the same form and shape."""
        if type(other) is not type(self):
            raise ShapeError(f"other must be another {type(self).__name__}; got {type(other).__name__}")
        if other.shape != self.shape:
            raise ShapeError(f"the tensors have shapes {self.shape} and {other.shape}; expected the same shape")

    def with_arrays(self, arrays: Sequence[Array]) -> Self:
        """Return one with other arrays in the places of :attr:`arrays`."""
        rest = iter(arrays)

        def replaced(part: Any) -> Any:
            if isinstance(part, Decomposed):
                return part.with_arrays([next(rest) for _ in part.arrays])
            if isinstance(part, (list, tuple)):
                return [replaced(one) for one in part]
            return None if part is None else next(rest)

        return self.of(self.backend, [replaced(part) for part in self])  # type: ignore[attr-defined]

    def scaled_alike(self, other: Self) -> Self:
        """Return the same tensor in arrays of which no scale is free, with the values of another result's arrays."""
        return self

    def with_outcome(self, outcome: FitOutcome | None) -> Self:
        """Attach how a decomposition found it; return the object itself."""
        self.outcome = outcome
        return self

    def __sub__(self, other: Any) -> Self:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self + -other

    def __rmul__(self, other: Any) -> Self:
        found: Self = self.__mul__(other)
        return found

    def __truediv__(self, other: Any) -> Self:
        number = scalar_of(other)
        return NotImplemented if number is None else self * (1.0 / number)

    def __neg__(self) -> Self:
        return self * -1.0

    # -- What a decomposition found ---------------------------------------------------------------

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
        """Whether the iteration stopped because it improved no more."""
        return None if self.outcome is None else self.outcome.converged

    @property
    def history(self) -> tuple[float, ...]:
        """The error after each iteration."""
        return () if self.outcome is None else self.outcome.history

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts())
        return f"<{type(self).__name__}: {facts}>"

    def _repr_html_(self) -> str:
        return fact_table(type(self).__name__, self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        share = self.num_parameters / max(1, self.size)
        facts = [
            ("shape", str(self.shape)),
            ("rank", str(self.rank)),
            ("parameters", f"{self.num_parameters:,} ({share:.3g} of {self.size:,})"),
        ]
        if self.outcome is not None:
            limit = " (the least possible)" if self.outcome.certified else f" (at least {self.outcome.bound:.3g})"
            facts += [("error", f"{self.outcome.error:.3g}{limit}"), ("method", self.outcome.method)]
            if not self.outcome.converged:
                facts.append(("converged", "no"))
        return facts

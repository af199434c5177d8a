"""How ΔW is applied to W: added, multiplied elementwise (HiRA), or as a new direction with a trained magnitude (DoRA).

One class for each value of ``Config.apply``. All have the same form, ``W' = q ∘ (W + C)``: C is ΔW or W ∘ ΔW, and q is
absent or ``m / ‖W + C‖``, one number for each row or column. This order of operations makes the start exact: for ΔW = 0
the sum is exactly W, and so is its product with a q of 1.

**The norm.** q is exactly 1 at the start only if every library and device computes the norm with the same bits as the
initial m. So the arithmetic of the norm is fixed: squares in float64 (exact for numbers of float32 and narrower),
summed by halving (:func:`norms`), the square root, rounded to float32 and then to the dtype in which m is trained. For
a row of zeros, q is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from tnadapt.backends import FLOAT_DTYPES, Array, Backend, load_backend
from tnadapt.backends.stored_floats import rounded_to
from tnadapt.errors import BackendError, safe_repr
from tnadapt.plugins import Registry

__all__ = ["APPLYING", "AXES", "Add", "Applying", "Hadamard", "Magnitude", "Rescaling", "applying_of", "norms"]

#: What a magnitude belongs to, and the axis over which the norm sums.
AXES = {"rows": 1, "cols": 0}

# Elements whose norms are computed at once, for concrete arrays: their squares fit in the cache.
_PIECE = 1 << 18
_NARROW = 64


class Rescaling(NamedTuple):
    """The quotient q of a weight, and the norms that it divides by.

    Attributes
    ----------
    quotient, norms : array, shape (rows, 1) or (1, cols)
        In the dtype of the matrix. The norms are infinite where the quotient is 1 because the matrix is zero there.
    """

    quotient: Array
    norms: Array


class Applying:
    """One way in which ΔW changes W.

    A subclass overrides what differs from a sum. All methods take matrices ``(rows, cols)`` of one dtype, and are
    differentiable if the library is.

    Parameters
    ----------
    axis : {"rows", "cols"}
        What a magnitude belongs to.

    Attributes
    ----------
    kind : str
        The value of ``Config.apply``.
    additive : bool
        Whether W' is W + ΔW, so that the updates of several adapters add up.
    """

    kind: ClassVar[str]
    additive: ClassVar[bool] = False

    def __init__(self, axis: str = "rows") -> None:
        self.axis = axis

    # -- Parameters --------------------------------------------------------------------------

    def param_shapes(self, index: int, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the trained parameters that a weight has next to the arrays of ΔW."""
        return {}

    def starts(self, index: int, weight: np.ndarray) -> dict[str, np.ndarray]:
        """Return the initial values of these parameters for a base weight in float64, in float64."""
        return {}

    # -- W' ----------------------------------------------------------------------------------

    @property
    def rescales(self) -> bool:
        """Whether there is a quotient q."""
        return False

    @property
    def scales_outputs(self) -> bool:
        """Whether ``x W'ᵀ`` is ``x (W + C)ᵀ`` with each feature times a number, or unchanged: q belongs to rows."""
        return True

    @property
    def takes_factors(self) -> bool:
        """Whether factors of ΔW are factors of C, too, and outputs are scaled: W' need not be formed."""
        return self.scales_outputs

    def of_rows(self, own: Sequence[Array], start: int, stop: int) -> Sequence[Array]:
        """Return the own parameters of a run of the weight's rows."""
        return own

    def span(self, shape: tuple[int, int]) -> int:
        """Return how many consecutive elements of the weight in C order have to be known together to compute W'."""
        return 1

    def change(self, backend: Backend, weight: Array, delta: Array) -> Array:
        """Return C, which is added to W."""
        return delta

    def rescaling(
        self, backend: Backend, total: Array, own: Sequence[Array], trained: str | None = None
    ) -> Rescaling | None:
        """Return q for the sum W + C; None if there is none.

        Parameters
        ----------
        backend : Backend
        total : array, shape (rows, cols)
        own : sequence of array
            The weight's own parameters, in the order of :meth:`param_shapes`.
        trained : str, optional
            The dtype in which they were trained, if they have been cast since.
        """
        return None

    def merged(
        self,
        backend: Backend,
        weight: Array,
        delta: Array,
        own: Sequence[Array],
        trained: str | None = None,
        detach: bool = False,
    ) -> Array:
        """Return W'.

        Parameters
        ----------
        backend, own, trained
            As for :meth:`rescaling`.
        weight, delta : array, shape (rows, cols)
        detach : bool
            Whether the norm counts as a constant for the gradient.
        """
        total = weight + self.change(backend, weight, delta)
        rescaling = self.rescaling(backend, backend.detached(total) if detach else total, own, trained)
        return total if rescaling is None else total * rescaling.quotient

    # -- Gradients, for callers that differentiate by hand -----------------------------------

    def change_pulled(self, backend: Backend, weight: Array, delta: Array, gradient: Array) -> tuple[Array, Array]:
        """Return the gradients of W and ΔW, given that of W + C."""
        return gradient, gradient

    def divided(
        self, backend: Backend, magnitude: Array, norm: Array, dtype: str, trained: str | None = None
    ) -> tuple[Array, Array]:
        """Return q for norms in float64, of any shape, and the norms that it divides by, as in :class:`Rescaling`."""
        raise NotImplementedError(f"{type(self).__name__} has no quotient")

    def rescaling_pulled(
        self, backend: Backend, total: Array, found: Rescaling, gradient: Array
    ) -> tuple[Array, list[Array]]:
        """Return the gradients of W + C and of the own parameters, given that of q."""
        raise NotImplementedError(f"{type(self).__name__} has no quotient")

    def pulled(
        self,
        backend: Backend,
        weight: Array,
        delta: Array,
        own: Sequence[Array],
        gradient: Array,
        detach: bool = False,
    ) -> tuple[Array, Array, list[Array]]:
        """Return the gradients of W, ΔW and the own parameters, given that of W'."""
        total = weight + self.change(backend, weight, delta)
        rescaling, own_gradients = self.rescaling(backend, total, own), list[Array]()
        if rescaling is not None:
            of_quotient = _summed(backend, gradient * total, AXES[self.axis])
            through, own_gradients = self.rescaling_pulled(backend, total, rescaling, of_quotient)
            gradient = gradient * rescaling.quotient
            gradient = gradient if detach else gradient + through
        return *self.change_pulled(backend, weight, delta, gradient), own_gradients


class Add(Applying):
    """``W + ΔW``.

    Examples
    --------
    >>> w, d = np.array([[3.0, 4.0]]), np.array([[3.0, 4.0]])
    >>> Add().merged(load_backend("numpy"), w, d, [])
    array([[6., 8.]])
    """

    kind = "add"
    additive = True


class Hadamard(Applying):
    """``W + W ∘ ΔW``: HiRA (Huang et al., ICLR 2025).

    Examples
    --------
    >>> w, d = np.array([[3.0, 4.0]]), np.array([[0.0, 1.0]])
    >>> Hadamard().merged(load_backend("numpy"), w, d, [])
    array([[3., 8.]])
    """

    kind = "hadamard"

    @property
    def takes_factors(self) -> bool:
        return False

    def change(self, backend: Backend, weight: Array, delta: Array) -> Array:
        return weight * delta

    def change_pulled(self, backend: Backend, weight: Array, delta: Array, gradient: Array) -> tuple[Array, Array]:
        return gradient + gradient * delta, gradient * weight


class Magnitude(Applying):
    """``m ∘ (W + ΔW) / ‖W + ΔW‖`` with a trained m that starts at ‖W‖: DoRA (Liu et al., arXiv 2402.09353).

    Examples
    --------
    >>> w, d = np.array([[3.0, 4.0]]), np.array([[3.0, 4.0]])
    >>> Magnitude().starts(0, w)
    {'weight0.magnitude': array([5.])}
    >>> Magnitude().merged(load_backend("numpy"), w, d, [np.array([1.0])])
    array([[0.6, 0.8]])
    """

    kind = "magnitude"

    def param_shapes(self, index: int, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        return {f"weight{index}.magnitude": (shape[1 - AXES[self.axis]],)}

    def starts(self, index: int, weight: np.ndarray) -> dict[str, np.ndarray]:
        (name,) = self.param_shapes(index, (weight.shape[0], weight.shape[1]))
        return {name: norms(load_backend("numpy"), weight, AXES[self.axis])}

    @property
    def rescales(self) -> bool:
        return True

    @property
    def scales_outputs(self) -> bool:
        return self.axis == "rows"

    def of_rows(self, own: Sequence[Array], start: int, stop: int) -> Sequence[Array]:
        return [array[start:stop] for array in own] if self.axis == "rows" else own

    def span(self, shape: tuple[int, int]) -> int:
        return shape[1] if self.axis == "rows" else shape[0] * shape[1]

    def rescaling(
        self, backend: Backend, total: Array, own: Sequence[Array], trained: str | None = None
    ) -> Rescaling | None:
        (magnitude,) = own
        norm = norms(backend, total, AXES[self.axis])
        shape = (-1, 1) if self.axis == "rows" else (1, -1)
        both = self.divided(backend, magnitude, norm, backend.dtype_name(total), trained)
        return Rescaling(*(backend.reshape(numbers, shape) for numbers in both))

    def divided(
        self, backend: Backend, magnitude: Array, norm: Array, dtype: str, trained: str | None = None
    ) -> tuple[Array, Array]:
        norm = backend.astype(_stored(backend, norm, trained or backend.dtype_name(magnitude)), dtype)
        zero = norm == 0.0
        ones = backend.detached(norm) * 0.0 + 1.0
        quotient = backend.where(zero, ones, backend.astype(magnitude, dtype) / backend.where(zero, ones, norm))
        return quotient, backend.where(zero, ones * float("inf"), norm)

    def rescaling_pulled(
        self, backend: Backend, total: Array, found: Rescaling, gradient: Array
    ) -> tuple[Array, list[Array]]:
        # d(m / n) = dm / n - (q / n) dn, and dn = <total, d total> / n. Where total is zero, 1 / n is 0.
        of_magnitude = gradient / found.norms
        through = total * (0.0 - of_magnitude * found.quotient / found.norms)
        return through, [backend.reshape(of_magnitude, (-1,))]


APPLYING: Registry[Applying] = Registry("apply", Applying, {cls.kind: cls for cls in (Add, Hadamard, Magnitude)})


def applying_of(kind: str, axis: str = "rows") -> Applying:
    """Return the way that ``Config.apply`` names.

    Examples
    --------
    >>> applying_of("hadamard").additive
    False
    """
    return APPLYING.find(kind)(axis)


# -- Norms ---------------------------------------------------------------------------------------


def norms(backend: Backend, matrix: Array, axis: int) -> Array:
    """Return the Euclidean norms of the rows (axis 1) or columns (axis 0) in float64, with the same bits everywhere.

    Notes
    -----
    The order of the sum is part of the definition, because libraries and devices sum in orders of their own: the first
    half of the squares is added to the second, element by element, until one number is left; the middle one of an odd
    number of them is carried over. Squares of numbers that float32 represents are exact in float64, so that a compiler
    that fuses the product with the sum does not change them.

    Examples
    --------
    >>> norms(load_backend("numpy"), np.array([[3.0, 4.0], [0.0, 0.0]]), 1)
    array([5., 0.])
    """
    rows, cols = matrix.shape
    # Narrower pieces of columns would read too little of each row at a time.
    step = max(1, _PIECE // cols) if axis == 1 else max(_NARROW, _PIECE // rows)
    if matrix.shape[1 - axis] > step and backend.is_concrete(matrix):
        # Rows do not depend on each other, nor do columns: in pieces, all intermediate results stay in the cache.
        starts = range(0, matrix.shape[1 - axis], step)
        return backend.concat([norms(backend, _cut(matrix, 1 - axis, at, at + step), axis) for at in starts])
    wide = backend.astype(matrix, "float64")
    squares = wide * wide
    size = squares.shape[axis]
    while size > 1:
        half = size // 2
        paired = _cut(squares, axis, 0, half) + _cut(squares, axis, size - half, size)
        odd = [_cut(squares, axis, half, half + 1)] if size % 2 else []
        squares = backend.concat([paired, *odd], axis=axis)
        size -= half
    total = backend.reshape(squares, (-1,))
    # The root has no derivative at zero.
    zero = total == 0.0
    return backend.where(zero, total, backend.sqrt(backend.where(zero, total + 1.0, total)))


def _cut(matrix: Array, axis: int, start: int, stop: int) -> Array:
    return matrix[:, start:stop] if axis == 1 else matrix[start:stop]


def _summed(backend: Backend, matrix: Array, axis: int) -> Array:
    """Sum along an axis and keep it."""
    return backend.reshape(backend.sum(matrix, axis=axis), (-1, 1) if axis == 1 else (1, -1))


def _stored(backend: Backend, numbers: Array, dtype: str) -> Array:
    """Round float64 numbers to float32 and then to a dtype that the library may lack."""
    if dtype not in FLOAT_DTYPES:
        raise BackendError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {safe_repr(dtype)}")
    if dtype == "float64":
        return numbers
    single = backend.astype(numbers, "float32")
    if dtype == "float32":
        return single
    if getattr(backend.xp, dtype, None) is None:
        host = rounded_to(backend.to_numpy(single), dtype)
        return backend.asarray(host, "float32", backend.device(single))
    return backend.astype(single, dtype)

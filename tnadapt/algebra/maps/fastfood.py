"""Fastfood, the paper's F, and the fast Walsh–Hadamard transform: draws, linear maps, and the nonlinearity after them.

F is two Walsh-Hadamard transforms with a normal diagonal, a permutation, and signs or a second diagonal. Paper symbols
(equation 4, appendix A.6): H the Walsh-Hadamard matrix, G the Gaussian diagonal, Π the permutation, B the signs (G' in
the v2 kind).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tnadapt.algebra import rng
from tnadapt.argument_checks import flag, integer
from tnadapt.backends import FLOAT_DTYPES, Array, Backend, FixedArrays, get_backend, kernels, known_backend
from tnadapt.errors import ShapeError

from ._map import Map, digest_of, sum_of_runs

# -- The fast Walsh–Hadamard transform H -------------------------------------------------------------------------------


class _HadamardRows(FixedArrays):
    """Blocks of orthonormal Hadamard matrices: entry (i, j) is (-1) ** popcount(i & j) / sqrt(size).

    Keys are (first row, last row + 1, first column, last column + 1, size).
    """

    def make(self, key: Any) -> np.ndarray:
        row_start, row_stop, col_start, col_stop, size = key
        bits: np.ndarray = np.bitwise_and.outer(np.arange(row_start, row_stop), np.arange(col_start, col_stop))
        # Fold the bits of i & j onto the lowest one by XOR: the parity of the number of set bits.
        for shift in (32, 16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return np.asarray((1 - 2 * (bits & 1)) / math.sqrt(size))


hadamard_rows = _HadamardRows()

# Radix 16: one pass over memory does four butterfly stages as a product with a small matrix.
_RADIX_BITS = 4
# Rows per product. OpenBLAS splits larger products among threads, which takes up to fourteen times as long.
_ROWS = 1 << 11
_LAST = -1
_HALF = ("float16", "bfloat16")


def fwht(x: Array, axis: int = -1, normalize: bool = True, *, out: Array | None = None) -> Array:
    """Compute the fast Walsh–Hadamard transform along one axis, in natural (Hadamard) order.

    Parameters
    ----------
    x : array, any shape
        Real floating dtype; the length of the axis is a power of two (1 is allowed).
    axis : int
        The axis to transform; the others are a batch.
    normalize : bool
        True for the orthonormal transform (which is its own inverse), False for entries of 1 and -1.
    out : array, optional
        Receives the result, and is returned; of the library, shape, dtype and device of x. It may be x itself, or have
        no memory in common with x. No derivatives are recorded through it. NumPy, torch and CuPy only.

    Returns
    -------
    array, the shape of x
        ``H x`` in the library, dtype and device of x. Differentiable without ``out``; the gradient is the same
        transform. Half precision is computed in float32 and rounded once.

    Raises
    ------
    ShapeError
        If the axis does not exist or its length is not a power of two, or ``out`` has another shape.
    BackendError
        If x is not an array of a known library or not real floating; if ``out`` cannot be written to, is of another
        library, dtype or device, or is given where derivatives are recorded.

    Notes
    -----
    ``H_{2n} = [[H_n, H_n], [H_n, -H_n]]``; the paper's Walsh–Hadamard matrix of appendix A.6. Costs
    ``n log2 n`` additions, and as much additional memory as x. Finding new memory for a large result takes about as
    long as a copy; ``out`` saves it where a compiled kernel runs and both arrays are contiguous. With a compiled kernel
    (NumPy arrays and torch tensors on the CPU, with the extra ``fast``) the transform takes two passes over memory for
    n up to 2**26, otherwise ``log16 n`` passes.

    Examples
    --------
    >>> import numpy as np
    >>> fwht(np.array([1.0, 0.0, 0.0, 0.0]))
    array([0.5, 0.5, 0.5, 0.5])
    >>> fwht(np.array([1.0, 2.0, 3.0, 4.0]), normalize=False)
    array([10., -2., -4.,  0.])
    >>> x = np.array([1.0, 2.0, 3.0, 4.0])
    >>> fwht(x, out=x) is x
    True
    """
    # This also runs on small arrays, whose transform takes less than a microsecond: each attribute is read once.
    backend = known_backend(type(x)) or get_backend(x, what="x")
    if out is not None:
        get_backend(out, what="out")
        get_backend(x, out)
    if normalize is not True and normalize is not False:
        normalize = flag("normalize", normalize)  # type: ignore[unreachable]
    if out is None and axis is _LAST:  # small integers are singletons
        result = backend.fwht_at_once(x, normalize)
        if result is not None:
            return result
    dtype, shape = backend.dtype_name(x), x.shape
    if dtype not in FLOAT_DTYPES:
        backend.require_float(x, "x, the input of fwht,")
    ndim = len(shape)
    if type(axis) is not int or not -ndim <= axis < ndim:
        axis = _checked_axis(shape, axis)
    length = shape[axis]
    if length < 1 or length & (length - 1):
        raise ShapeError(
            f"fwht needs a length that is a power of two; axis {axis} of x, of shape {tuple(shape)}, has {length}: "
            f"pad it with zeros to {1 << (length - 1).bit_length() if length > 1 else 1}"
        )
    axis = axis - ndim if axis >= 0 else axis
    if out is None:
        return _fwht_along(backend, x, dtype, axis, normalize)
    if tuple(out.shape) != tuple(shape):
        raise ShapeError(f"out has shape {tuple(out.shape)}; expected that of the input, {tuple(shape)}")
    if dtype in _HALF or length == 1 or not backend.fwht_into(x, _scale(length, normalize), axis, out):
        backend.write(out, _fwht_along(backend, x, dtype, axis, normalize))
    return out


def fwht_last(backend: Backend, x: Array, normalize: bool = True) -> Array:
    """:func:`fwht` of a validated array along its last axis."""
    return _fwht_along(backend, x, backend.dtype_name(x), -1, normalize)


def _checked_axis(shape: Sequence[int], axis: Any) -> int:
    ndim = len(shape)
    if ndim == 0:
        raise ShapeError("x has shape (), which has no axis for fwht to transform")
    return integer(f"axis, in an array of shape {tuple(shape)},", axis, -ndim, ndim - 1, ShapeError)


def _scale(length: int, normalize: bool) -> float:
    return 1.0 / math.sqrt(length) if normalize else 1.0


def _fwht_along(backend: Backend, x: Array, dtype: str, axis: int, normalize: bool) -> Array:
    """Transform along an axis that is counted from the last."""
    if dtype in _HALF:
        return backend.astype(_fwht_along(backend, backend.astype(x, "float32"), "float32", axis, normalize), dtype)
    shape = x.shape
    length = shape[axis]
    if length == 1 or 0 in shape:
        return x

    def plain(x: Array) -> Array:
        return backend.moveaxis(fwht_plain(backend, backend.moveaxis(x, axis, -1), normalize), -1, axis)

    transformed = backend.fwht(x, _scale(length, normalize), axis, plain)
    return plain(x) if transformed is None else transformed


def fwht_plain(backend: Backend, x: Array, normalize: bool) -> Array:
    """Compute :func:`fwht_last` by matrix products of the library: the reference implementation for every kernel.

    For float32 and float64 and a batch that is not empty.
    """
    dtype = backend.dtype_name(x)
    shape = x.shape
    length = shape[-1]
    bits = length.bit_length() - 1
    batch = tuple(shape[:-1])
    # The axis is seen as base-16 digits of the position. Each step transforms the leading digit and moves it to the
    # end; after the last step the digits are in order again. The last small matrix includes the scale.
    while bits:
        step = min(_RADIX_BITS, bits)
        bits -= step
        radix = 1 << step
        key = (0, radix, 0, radix, length if normalize and not bits else 1)
        matrix = hadamard_rows.on(backend, key, x, dtype)
        rows = min(length >> step, _ROWS)
        x = backend.reshape(x, (*batch, radix, (length >> step) // rows, rows))
        x = backend.precise_matmul(backend.moveaxis(x, -3, -1), matrix)
    return backend.reshape(x, shape)


# -- The linear maps ---------------------------------------------------------------------------------------------------

# Elements of the long vector that a slice draws at a time: several short blocks, or part of a long one.
_SLICE_CHUNK = 1 << 16
_SLICE_PART = 1 << 18
# Shorter slices are cut from a block of this length, so that the matrix products are not too thin.
_LEAST_BLOCK = 1 << 10


class Linear(Map):
    """``v = H pad(x);  z[j] = (g v)[perm[j]];  y = (H z)[:n_out] * signs``.

    ``H pad(x)`` repeats one period h, so ``z[j] = gain[j] * h[index[j]]`` with ``index = perm`` modulo the period and
    ``gain = g[perm]``. Its fixed arrays are ``perm``, ``inverse``, ``g`` and ``diagonal`` as drawn; ``index`` and
    ``gain`` as used.

    Compiled kernels regenerate the permutation in every call from its ``keys``, read signs from the bits of ``words``,
    and use further arrays of their own (``buckets``, ``starts``, ``order``; see
    :mod:`tnadapt.backends._kernels.fastfood`).

    Attributes
    ----------
    padded : int
        L, the length of the transforms: the least power of two that is at least ``max(n_in, n_out)``.
    period : int
        Length of the transform in ``H pad(x)`` after pruning: H of a zero-padded vector repeats a shorter transform.
    recipe : str
        The integers that define the draws. A compiler takes text for a constant, not always a number.
    space : WorkSpace, optional
        Memory that the compiled kernels reuse; it ends with the map.
    """

    kind = "linear"
    full_rank = exact_in_batches = True
    #: Whether a second normal diagonal replaces the signs.
    normal = False

    def __init__(self, n_in: int, n_out: int, seed: int = 0, group: int = 0) -> None:
        super().__init__(n_in, n_out, seed, group)
        self.padded = 1 << (max(n_in, n_out) - 1).bit_length()
        self.period = 1 << (n_in - 1).bit_length()
        self.recipe = f"{self.padded} {self.period} {seed} {group} {int(not self.normal)}"
        self.space: Any = None

    # -- Draws: permutation Π, normal diagonals 𝒢 and 𝒢', signs ℬ, whole or in pieces ----------

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of one of the vectors without the rest."""
        stream = self.seed, self.group
        if name in ("perm", "inverse"):
            return rng.permutation(self.padded, *stream, start, stop, inverse=name == "inverse")
        if name == "g":
            return rng.normals(*stream, rng.PURPOSE["gaussian"], start, stop)
        if name == "index":
            return self.part("perm", start, stop) & (self.period - 1)
        if name == "gain":
            return rng.normals_at(*stream, rng.PURPOSE["gaussian"], self.part("perm", start, stop))
        if self.normal:
            return rng.normals(*stream, rng.PURPOSE["gaussian_v2"], start, stop)
        return rng.signs(*stream, start, stop)

    def make(self, key: Any) -> np.ndarray:
        if isinstance(key, tuple):
            return self.part(*key)
        if key in _FOR_KERNELS:
            return _FOR_KERNELS[key](self)
        length = self.n_out if key == "diagonal" else self.padded
        if key == "gain":
            # Drawing g in order and then gathering costs a quarter of drawing it at scattered positions.
            compiled = kernels("fastfood") if length >= _FAR else None
            if compiled is not None and compiled.permutes(length):
                return compiled.permuted(self.part("g", 0, length), self.held("keys"))  # type: ignore[no-any-return]
            return np.take(self.part("g", 0, length), self.part("perm", 0, length))
        whole = self.part(key, 0, length)
        # Half the memory if positions fit in 32 bits.
        return whole.astype(np.int32) if whole.dtype == np.int64 and self.padded <= 1 << 31 else whole

    def free(self) -> None:
        super().free()
        self.space = None

    @property
    def spare_bytes(self) -> int:
        return 0 if self.space is None else int(self.space.nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "space": None}

    # -- What it computes ----------------------------------------------------------------------

    def forward(self, backend: Backend, x: Array) -> Array:
        y = backend.fastfood(x, self, adjoint=False)
        return self.forward_plain(backend, x) if y is None else y

    def adjoint(self, backend: Backend, y: Array) -> Array:
        x = backend.fastfood(y, self, adjoint=True)
        return self.adjoint_plain(backend, y) if x is None else x

    def plain(self, backend: Backend) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """Return F and its adjoint in the library's own operations, for derivatives that a kernel cannot handle."""
        return functools.partial(self.forward_plain, backend), functools.partial(self.adjoint_plain, backend)

    def forward_plain(self, backend: Backend, x: Array) -> Array:
        """Compute F in the library's own operations: the reference implementation for every kernel."""
        dtype = backend.dtype_name(x)
        z = backend.take(self._small_transform(backend, x), self.on(backend, "index", x))
        z = z * self.on(backend, "gain", x, dtype)
        return fwht_last(backend, z)[..., : self.n_out] * self.on(backend, "diagonal", x, dtype)

    def _small_transform(self, backend: Backend, x: Array) -> Array:
        """Compute one period of ``H pad(x)``, which is periodic because the padding is zero."""
        return fwht_last(backend, backend.pad_last(x, self.period)) * math.sqrt(self.period / self.padded)

    def adjoint_plain(self, backend: Backend, y: Array) -> Array:
        dtype = backend.dtype_name(y)
        u = fwht_last(backend, backend.pad_last(y * self.on(backend, "diagonal", y, dtype), self.padded))
        v = backend.take(u * self.on(backend, "gain", y, dtype), self.on(backend, "inverse", y))
        v = sum_of_runs(backend, v, self.period) * math.sqrt(self.period / self.padded)
        return fwht_last(backend, v)[..., : self.n_in]

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        """Compute a slice with ``H = H_high ⊗ H_low``, ``H_low`` as long as the slice.

        Rows of ``H_high`` combine the blocks of z; ``H_low`` then transforms only the combined blocks.
        """
        dtype = backend.dtype_name(x)
        low = min(self.padded, max(_LEAST_BLOCK, 1 << (stop - start).bit_length() - 1))
        first, end = start // low, (stop - 1) // low + 1
        y = fwht_last(backend, self._mixed(backend, x, low, first, end))
        y = backend.reshape(y, (*x.shape[:-1], (end - first) * low))[..., start - first * low : stop - first * low]
        return y * self._piece(backend, "diagonal", x, start, stop, dtype)

    def _mixed(self, backend: Backend, x: Array, low: int, first: int, end: int) -> Array:
        """Multiply rows ``first`` to ``end - 1`` of H_high by z in blocks of ``low``: shape (…, end - first, low)."""
        dtype, high = backend.dtype_name(x), self.padded // low
        small = self._small_transform(backend, x)
        # One part of the columns at a time, so that besides the sum only part of a block is in memory.
        step, width = max(1, _SLICE_CHUNK // low), min(low, _SLICE_PART)
        parts = []
        for column in range(0, low, width):
            mixed = None
            for block in range(0, high, step):
                blocks = min(step, high - block)
                lo = block * low + column
                # Contiguous: either there is one block (step is 1), or it has all of its columns (width is low).
                hi = lo + blocks * width
                z = backend.take(small, self._piece(backend, "index", x, lo, hi))
                z = z * self._piece(backend, "gain", x, lo, hi, dtype)
                z = backend.reshape(z, (*x.shape[:-1], blocks, width))
                rows = hadamard_rows.on(backend, (first, end, block, block + blocks, high), x, dtype, keep=False)
                part = backend.precise_matmul(rows, z)
                mixed = part if mixed is None else mixed + part
            parts.append(mixed)
        return backend.concat(parts, axis=-1)

    def gain(self) -> float:
        return math.sqrt(self.n_in * self.n_out) / self.padded

    def variance(self) -> float:
        return self.n_in / self.padded

    def squared_norm(self) -> float:
        return self.n_in * self.n_out / self.padded

    def cost(self) -> int:
        """Return ``L log2 L`` additions per transform, the first one of F's input only, and three products per element.

        ``L`` of the first transform is the least power of two that ``n_in`` fits in.
        """
        small, length = 1 << (self.n_in - 1).bit_length(), self.padded
        return small * (small.bit_length() - 1) + length * (length.bit_length() - 1) + 3 * length

    def matrix(self) -> np.ndarray:
        """Return F, or its linear part, as a matrix, by SciPy's Hadamard matrix."""
        # diag(B) H[:n] Π diag(G) H[:, :n_in], the transpose of the paper's equation (4): it applies F from the right.
        from scipy.linalg import hadamard

        length = 2 ** math.ceil(math.log2(max(self.n_in, self.n_out)))
        h = hadamard(length) / math.sqrt(length)
        g = rng.normals(self.seed, self.group, rng.PURPOSE["gaussian"], 0, length).astype(np.float64)
        permuted = (g[:, None] * h[:, : self.n_in])[rng.permutation(length, self.seed, self.group)]
        if self.normal:
            b = rng.normals(self.seed, self.group, rng.PURPOSE["gaussian_v2"], 0, self.n_out).astype(np.float64)
        else:
            b = rng.signs(self.seed, self.group, 0, self.n_out).astype(np.float64)
        return np.asarray(b[:, None] * (h @ permuted)[: self.n_out])

    def digest(self) -> str:
        return digest_of(self, self.part, {"perm": self.padded, "g": self.padded, "diagonal": self.n_out})


# From this length on, a gather misses the caches.
_FAR = 1 << 19
# Arrays that only the compiled kernels use.
_FOR_KERNELS: dict[str, Callable[[Linear], np.ndarray]] = {
    "keys": lambda f: rng.words(f.seed, f.group, rng.PURPOSE["permutation"], 0, 8),
    # Vectors of the full padded length: the kernels multiply by signs without checking where the output ends.
    "words": lambda f: rng.words(f.seed, f.group, rng.PURPOSE["signs"], 0, max(1, f.padded // 32)),
    "buckets": lambda f: kernels("fastfood").buckets_of(f.padded, f.held("keys")),
    "starts": lambda f: kernels("fastfood").starts_of(f.held("buckets")),
    "order": lambda f: kernels("fastfood").order_of(f.padded, f.held("keys"), f.held("starts")),
}


class LinearV2(Linear):
    """:class:`Linear` with a normal vector g' instead of the signs."""

    kind = "linear_v2"
    normal = True


# -- The nonlinear maps: followed by t - tanh(t) -----------------------------------------------------------------------


class Nonlinear(Linear):
    """``tanhshrink(linear)``; its adjoint at a point uses the slope ``tanh(t)**2`` of ``t - tanh(t)``."""

    kind = "nonlinear"
    linear = False
    _linear_kind: type[Linear] = Linear

    @property
    def linear_part(self) -> Map:
        return self._linear_kind(self.n_in, self.n_out, self.seed, self.group)

    def forward(self, backend: Backend, x: Array) -> Array:
        return tanhshrink(backend, super().forward(backend, x))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return tanhshrink(backend, super().slice(backend, x, start, stop))

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        slope = backend.tanh(super().forward(backend, at))
        return self.adjoint(backend, y * slope * slope)

    def fourth_moment(self) -> float:
        # t is normal; for the v2 kind it is a normal number times the normal diagonal g'.
        return 45.0 if self.normal else 3.0


class NonlinearV2(Nonlinear):
    """``tanhshrink(linear_v2)``."""

    kind = "nonlinear_v2"
    normal = True
    _linear_kind = LinearV2


def tanhshrink(backend: Backend, t: Array) -> Array:
    """Compute ``t - tanh(t)``; near 0, where the difference would cancel, by its series in odd powers."""
    none = t * 0.0

    def near(inside: Array, outside: Array) -> Array:
        return backend.where(t > -0.25, backend.where(t < 0.25, inside, outside), outside)

    # Zero where the series is not used: its powers would overflow there and make the gradient NaN.
    small = near(t, none)
    square = small * small
    series = square * 0.0 + _SHRINK_SERIES[-1]
    for coefficient in reversed(_SHRINK_SERIES[:-1]):
        series = series * square + coefficient
    return near(small * square * series, t - backend.tanh(t))


def _shrink_series(terms: int) -> list[float]:
    """Return the coefficients of ``t**3, t**5, …`` in ``t - tanh(t)``, from ``tanh' = 1 - tanh**2``."""
    odd = [Fraction(1)]
    for k in range(1, terms + 1):
        odd.append(-sum((odd[i] * odd[k - 1 - i] for i in range(k)), Fraction(0)) / (2 * k + 1))
    return [float(-coefficient) for coefficient in odd[1:]]


# For |t| < 1/4 the truncation error is below 1e-15 of the sum: each term is at most 0.026 of the one before.
_SHRINK_SERIES = _shrink_series(9)

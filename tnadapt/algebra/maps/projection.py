"""The fixed projections F, their adjoints and their slices.

Paper symbols (equation 4, appendix A.6): H the Walsh–Hadamard matrix, G the Gaussian diagonal, Π the
permutation, B the signs (G' in the v2 kinds), ρ = n_in / n_out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError, integer, shown

from .. import rng
from ..folding import MAX_SIZE
from ._fastfood_draws import ProjectionDraws, hadamard_rows
from .hadamard import fwht_last

__all__ = ["KINDS", "NONLINEAR", "Projection", "tanhshrink"]

KINDS = ("identity", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2")
SQUARE = ("identity", "shuffle")  # ρ = 1 only
NONLINEAR = ("nonlinear", "nonlinear_v2")

# How much of the long vector a slice draws at a time: of short blocks several, of long ones a part.
_SLICE_CHUNK = 1 << 16
_SLICE_PART = 1 << 18
# Shorter slices than this are cut from a block of this length, to keep the matrix products thick.
_LEAST_BLOCK = 1 << 10
# Streams longer than this are digested by their two ends: each element is a pure function of its index.
_DIGEST_ENDS = 1 << 19


class Projection:
    """A fixed map F from a vector of ``n_in`` elements to one of ``n_out``, made again from a seed.

    Parameters
    ----------
    kind : {"identity", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2"}
        Which of the paper's six.
    n_in, n_out : int
        Lengths, at least 1. Identity and shuffle need ``n_in == n_out``. ``n_in > n_out`` is allowed
        for the others: the projection then reduces.
    seed : int
        0 to 2**64 - 1.
    group : int
        Stream of the draws: 0 where all groups share one F.

    Attributes
    ----------
    padded : int
        L, the length of the Hadamard transforms: the least power of two that is at least
        ``max(n_in, n_out)``.
    digest : str
        SHA-256 of the draws.

    Raises
    ------
    ConfigError
        If the kind is unknown, lengths do not suit it, or seed or group is out of range.

    Notes
    -----
    With H orthonormal of size L, g normal and Π a permutation (all from :mod:`tnadapt.algebra.rng`)::

        linear     v = H pad(x);  z[j] = (g v)[perm[j]];  y = (H z)[:n_out] * signs
        linear_v2  the same with a normal vector g' in place of signs
        nonlinear, nonlinear_v2   t - tanh(t) of those (near 0 by its series, which does not cancel)

    The transform of the zero-padded x is computed as the small transform of x, repeated; it is exactly
    equal. One call costs ``L log2 L`` additions and a gather. Half precision is computed in float32.

    What is drawn at the first call and kept, in bytes an element of L: 9 (permutation 4, gain ``g[perm]`` 4, signs 1;
    12 for the v2 kinds). Compiled kernels (float32 on the CPU, L from 2**14 on, the extra ``fast``) keep the signs
    as bits, and 4 bytes where n_in is at most 2**18, as they draw the permutation anew in every call; else 7 (g 4,
    the permutation in two steps 3; for L up to 2**26); 4 more for the v2 kinds. A call then needs, beside its
    result, memory for one vector of L, for two where n_in is larger. On a CUDA device (torch with Triton, CuPy)
    nothing is kept.

    References
    ----------
    Le, Sarlós, Smola, "Fastfood: approximating kernel expansions in loglinear time" (ICML 2013).

    Examples
    --------
    >>> import numpy as np
    >>> f = Projection("linear", n_in=3, n_out=5, seed=0)
    >>> x, y = np.array([1.0, 2.0, 3.0]), np.arange(5.0)
    >>> f(x).shape
    (5,)
    >>> bool(np.isclose(f(x) @ y, x @ f.adjoint(y)))
    True
    """

    def __init__(self, kind: str, n_in: int, n_out: int, seed: int = 0, group: int = 0) -> None:
        if kind not in KINDS:
            raise ConfigError(f"no projection {shown(kind)}; expected one of {', '.join(KINDS)}")
        n_in = integer("n_in", n_in, 1, MAX_SIZE, ConfigError)
        n_out = integer("n_out", n_out, 1, MAX_SIZE, ConfigError)
        seed = integer("seed", seed, 0, (1 << 64) - 1, ConfigError)
        group = integer("group", group, 0, (1 << 32) - 1, ConfigError)
        if kind in SQUARE and n_in != n_out:
            raise ConfigError(f"{kind!r} keeps the length; got n_in={n_in}, n_out={n_out}: use 'linear'")
        self.kind, self.n_in, self.n_out, self.seed, self.group = kind, n_in, n_out, seed, group
        self.padded = 1 << (max(n_in, n_out) - 1).bit_length()
        # Length of the transform that is left of H pad(x) once its zeros are pruned.
        self._pruned = 1 << (n_in - 1).bit_length()
        self._draws = ProjectionDraws(kind, n_out, self.padded, self._pruned, seed, group)

    def __repr__(self) -> str:
        return f"Projection({self.kind!r}, n_in={self.n_in}, n_out={self.n_out}, seed={self.seed}, group={self.group})"

    @property
    def linear(self) -> bool:
        """Whether F is a linear map."""
        return self.kind not in NONLINEAR

    @property
    def linear_part(self) -> Projection:
        """F without the nonlinearity that ends it: the same draws."""
        kind = self.kind.replace("nonlinear", "linear")
        return self if kind == self.kind else Projection(kind, self.n_in, self.n_out, self.seed, self.group)

    # -- F -----------------------------------------------------------------------------------

    def __call__(self, x: Array) -> Array:
        """F(x).

        Parameters
        ----------
        x : array, shape (…, n_in)
            Leading axes are a batch; real floating dtype.

        Returns
        -------
        array, shape (…, n_out)
            In the library, dtype and device of x; differentiable.

        Raises
        ------
        ShapeError
            If the last axis is not ``n_in`` long.
        BackendError
            If x is no array of a known library or not real floating.

        Examples
        --------
        >>> import numpy as np
        >>> Projection("shuffle", 4, 4, seed=0)(np.array([0.0, 1.0, 2.0, 3.0]))
        array([3., 1., 2., 0.])
        """
        return _in_float32(self._apply, self._checked(x, self.n_in))

    def slice(self, x: Array, start: int, stop: int) -> Array:
        """``F(x)[..., start:stop]`` without the rest.

        Parameters
        ----------
        x : array, shape (…, n_in)
            As for a call.
        start, stop : int
            ``0 <= start < stop <= n_out``.

        Returns
        -------
        array, shape (…, stop - start)
            Equal to the slice of the whole but for the order of summation.

        Raises
        ------
        ShapeError
            If the slice is empty or leaves the output, or x does not fit.

        Notes
        -----
        ``H = H_high ⊗ H_low`` with ``H_low`` as long as the slice: rows of ``H_high`` combine the blocks
        of z, which are drawn and dropped a piece at a time, and one transform by ``H_low`` ends it.
        Memory is the slice and x; the draws of all of z are gone through, which takes time in
        proportion to L.

        Examples
        --------
        >>> import numpy as np
        >>> f, x = Projection("linear", 3, 100, seed=1), np.array([1.0, 2.0, 3.0])
        >>> bool(np.allclose(f.slice(x, 30, 40), f(x)[30:40]))
        True
        """
        x = self._checked(x, self.n_in)
        start = integer("start", start, 0, self.n_out - 1, ShapeError)
        stop = integer("stop", stop, 1, self.n_out, ShapeError)
        if start >= stop:
            raise ShapeError(f"no slice {start}:{stop} of the {self.n_out} outputs of {self!r}")
        if (start, stop) == (0, self.n_out):
            return self(x)
        return _in_float32(functools.partial(self._slice, start=start, stop=stop), x)

    def adjoint(self, y: Array, at: Array | None = None) -> Array:
        """``Fᵀ y``; for the nonlinear kinds the adjoint of F's derivative at a point.

        Parameters
        ----------
        y : array, shape (…, n_out)
            What the adjoint is applied to.
        at : array, shape (…, n_in), optional
            The point x at which a nonlinear F is differentiated; required for those, unused by the others.

        Returns
        -------
        array, shape (…, n_in)
            In the library, dtype and device of y; differentiable.

        Raises
        ------
        ShapeError
            If an array does not fit.
        ConfigError
            If F is nonlinear and no point is given.

        Notes
        -----
        ``<F x, y> = <x, Fᵀ y>``. The derivative of ``t - tanh(t)`` is ``tanh(t)**2``.

        Examples
        --------
        >>> import numpy as np
        >>> Projection("shuffle", 4, 4, seed=0).adjoint(np.array([3.0, 1.0, 2.0, 0.0]))
        array([0., 1., 2., 3.])
        """
        y = self._checked(y, self.n_out)
        if self.linear:
            return _in_float32(self._adjoint, y)
        if at is None:
            raise ConfigError(f"{self.kind!r} has an adjoint at a point only: give adjoint(y, at=x)")
        get_backend(y, at)
        at = self._checked(at, self.n_in)
        if tuple(at.shape[:-1]) not in ((), tuple(y.shape[:-1])):
            raise ShapeError(
                f"at has shape {tuple(at.shape)}; expected ({self.n_in},) or the batch of y, {tuple(y.shape)}"
            )
        return _in_float32(self._adjoint_at, y, at)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of kind, sizes and draws: equal where F is the same map.

        Streams of more than 2**20 elements are digested by their first and last 2**19: every element is
        computed from its index alone, in the same way.
        """
        lengths = {"identity": {}, "shuffle": {"perm": self.n_out}}.get(
            self.kind, {"perm": self.padded, "g": self.padded, "diagonal": self.n_out}
        )
        head = f"tnadapt {self.kind} {self.n_in} {self.n_out}".encode()
        return rng.digest(iter([head]), *(self._stream_bytes(*stream) for stream in lengths.items()))

    def _stream_bytes(self, name: str, length: int) -> Iterator[bytes]:
        ends = [(0, length)]
        if length > 2 * _DIGEST_ENDS:
            ends = [(0, _DIGEST_ENDS), (length - _DIGEST_ENDS, length)]
        for first, last in ends:
            for lo, hi in rng.chunks(first, last):
                yield self._draws.part(name, lo, hi).astype("<i8" if name == "perm" else "<f4").tobytes()

    # -- What they compute -------------------------------------------------------------------

    def _checked(self, x: Array, length: int) -> Array:
        backend = get_backend(x)
        backend.require_float(x, "the input of a projection")
        if len(x.shape) < 1 or x.shape[-1] != length:
            raise ShapeError(f"{self!r} got an array of shape {tuple(x.shape)}; expected (…, {length})")
        return x

    def _apply(self, backend: Backend, x: Array) -> Array:
        y = self._linear_part(backend, x)
        return y if self.linear else tanhshrink(backend, y)

    def _linear_part(self, backend: Backend, x: Array) -> Array:
        if self.kind == "identity":
            return x
        if self.kind == "shuffle":
            return self._shuffled(backend, x, inverse=False)
        found = backend.fastfood(x, self._draws, self.n_in, adjoint=False, plain=self._twins(backend))
        return self._linear_plain(backend, x) if found is None else found

    def _twins(self, backend: Backend) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        return functools.partial(self._linear_plain, backend), functools.partial(self._adjoint_plain, backend)

    def _shuffled(self, backend: Backend, x: Array, inverse: bool) -> Array:
        def there(x: Array) -> Array:
            return backend.take(x, self._draws.on(backend, "perm", x))

        def back(x: Array) -> Array:
            return backend.take(x, self._draws.on(backend, "inverse", x))

        found = backend.shuffle(x, self.seed, self.group, inverse, plain=(there, back))
        return (back if inverse else there)(x) if found is None else found

    def _linear_plain(self, backend: Backend, x: Array) -> Array:
        """The linear part in the library's own operations: what every kernel must equal."""
        kind = backend.dtype_name(x)
        z = backend.take(self._small_transform(backend, x), self._draws.on(backend, "index", x))
        z = z * self._draws.on(backend, "gain", x, kind)
        return fwht_last(backend, z)[..., : self.n_out] * self._draws.on(backend, "diagonal", x, kind)

    def _small_transform(self, backend: Backend, x: Array) -> Array:
        """One period of ``H pad(x)``, which repeats itself where the padding was zero."""
        return fwht_last(backend, backend.pad_last(x, self._pruned)) * math.sqrt(self._pruned / self.padded)

    def _adjoint(self, backend: Backend, y: Array) -> Array:
        if self.kind == "identity":
            return y
        if self.kind == "shuffle":
            return self._shuffled(backend, y, inverse=True)
        found = backend.fastfood(y, self._draws, self.n_in, adjoint=True, plain=self._twins(backend))
        return self._adjoint_plain(backend, y) if found is None else found

    def _adjoint_plain(self, backend: Backend, y: Array) -> Array:
        kind = backend.dtype_name(y)
        u = fwht_last(backend, backend.pad_last(y * self._draws.on(backend, "diagonal", y, kind), self.padded))
        v = backend.take(u * self._draws.on(backend, "gain", y, kind), self._draws.on(backend, "inverse", y))
        # The adjoint of repeating is summing over the repeats.
        v = backend.reshape(v, (*v.shape[:-1], self.padded // self._pruned, self._pruned))
        v = backend.sum(v, axis=-2) * math.sqrt(self._pruned / self.padded)
        return fwht_last(backend, v)[..., : self.n_in]

    def _adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        slope = backend.tanh(self._linear_part(backend, at))
        return self._adjoint(backend, y * slope * slope)

    def _slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        if self.kind == "identity":
            return x[..., start:stop]
        if self.kind == "shuffle":
            return backend.take(x, self._draws.piece(backend, "perm", start, stop, x))
        kind = backend.dtype_name(x)
        low = min(self.padded, max(_LEAST_BLOCK, 1 << (stop - start).bit_length() - 1))
        first, end = start // low, (stop - 1) // low + 1
        y = fwht_last(backend, self._mixed(backend, x, low, first, end))
        y = backend.reshape(y, (*x.shape[:-1], (end - first) * low))[..., start - first * low : stop - first * low]
        y = y * self._draws.piece(backend, "diagonal", start, stop, x, kind)
        return y if self.linear else tanhshrink(backend, y)

    def _mixed(self, backend: Backend, x: Array, low: int, first: int, end: int) -> Array:
        """Rows ``first`` to ``end - 1`` of H_high times z in blocks of ``low``: shape (…, end - first, low)."""
        kind, high = backend.dtype_name(x), self.padded // low
        small = self._small_transform(backend, x)
        # Of one part of the columns after another, so that beside the sum no more than a part of a block is there.
        step, width = max(1, _SLICE_CHUNK // low), min(low, _SLICE_PART)
        parts = []
        for column in range(0, low, width):
            mixed = None
            for block in range(0, high, step):
                blocks = min(step, high - block)
                lo = block * low + column
                hi = lo + blocks * width  # a part is of one block, and several blocks are whole
                z = backend.take(small, self._draws.piece(backend, "index", lo, hi, x))
                z = z * self._draws.piece(backend, "gain", lo, hi, x, kind)
                z = backend.reshape(z, (*x.shape[:-1], blocks, width))
                rows = hadamard_rows.on(backend, (first, end, block, block + blocks, high), x, kind, keep=False)
                part = backend.matmul(rows, z)
                mixed = part if mixed is None else mixed + part
            parts.append(mixed)
        return backend.concat(parts, axis=-1)


def _in_float32(compute: Callable[..., Array], *arrays: Array) -> Array:
    """``compute`` on arrays of at least single precision; half precision is rounded once, at the end."""
    backend = get_backend(*arrays)
    kind = backend.dtype_name(arrays[0])
    if kind in ("float16", "bfloat16"):
        return backend.astype(compute(backend, *(backend.astype(x, "float32") for x in arrays)), kind)
    return compute(backend, *arrays)


def tanhshrink(backend: Backend, t: Array) -> Array:
    """``t - tanh(t)``; near 0, where that would cancel to nothing, its series in odd powers."""
    none = t * 0.0

    def near(inside: Array, outside: Array) -> Array:
        return backend.where(t > -0.25, backend.where(t < 0.25, inside, outside), outside)

    # Zero where the series is not used: its powers would be beyond all numbers there.
    small = near(t, none)
    square = small * small
    series = square * 0.0 + _SHRINK_SERIES[-1]
    for coefficient in reversed(_SHRINK_SERIES[:-1]):
        series = series * square + coefficient
    return near(small * square * series, t - backend.tanh(t))


def _shrink_series(terms: int) -> list[float]:
    """Coefficients of ``t**3, t**5, …`` in ``t - tanh(t)``, from ``tanh' = 1 - tanh**2``."""
    odd = [Fraction(1)]
    for k in range(1, terms + 1):
        odd.append(-sum((odd[i] * odd[k - 1 - i] for i in range(k)), Fraction(0)) / (2 * k + 1))
    return [float(-coefficient) for coefficient in odd[1:]]


# For |t| < 1/4 what is left out is below 1e-15 of the sum: each term is at most 0.026 of the one before.
_SHRINK_SERIES = _shrink_series(9)

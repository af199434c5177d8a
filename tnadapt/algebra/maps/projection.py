"""A map F as users call it: inputs checked, half precision computed in single, the map found by its name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError, integer

from ..folding import MAX_SIZE
from . import MAPS, make_map

__all__ = ["Projection"]


class Projection:
    """A fixed map F from a vector of ``n_in`` elements to one of ``n_out``, regenerated from a seed.

    Parameters
    ----------
    kind : str
        One of the paper's six, "identity", "shuffle", "linear", "linear_v2", "nonlinear" and "nonlinear_v2", or a name
        given to :func:`tnadapt.register_map`.
    n_in, n_out : int
        Lengths, at least 1. Identity and shuffle need ``n_in == n_out``. ``n_in > n_out`` is allowed
        for the others: the projection then reduces.
    seed : int
        0 to 2**64 - 1.
    group : int
        Stream of the draws: 0 where all groups share one F.

    Attributes
    ----------
    map : Map
        What computes it.
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
    as bits, and 4 bytes where n_in is at most 2**18, as they regenerate the permutation in every call; else 7 (g 4,
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
        found = MAPS.find(kind)
        n_in = integer("n_in", n_in, 1, MAX_SIZE, ConfigError)
        n_out = integer("n_out", n_out, 1, MAX_SIZE, ConfigError)
        seed = integer("seed", seed, 0, (1 << 64) - 1, ConfigError)
        group = integer("group", group, 0, (1 << 32) - 1, ConfigError)
        if found.square and n_in != n_out:
            raise ConfigError(f"{kind!r} keeps the length; got n_in={n_in}, n_out={n_out}: use 'linear'")
        self.kind, self.n_in, self.n_out, self.seed, self.group = kind, n_in, n_out, seed, group
        self.map = make_map(kind, n_in, n_out, seed, group)

    def __repr__(self) -> str:
        return f"Projection({self.kind!r}, n_in={self.n_in}, n_out={self.n_out}, seed={self.seed}, group={self.group})"

    @property
    def padded(self) -> int:
        """L, the least power of two that is at least ``max(n_in, n_out)``: the length of fastfood's transforms."""
        return 1 << (max(self.n_in, self.n_out) - 1).bit_length()

    @property
    def linear(self) -> bool:
        """Whether F is a linear map."""
        return self.map.linear

    @property
    def linear_part(self) -> Projection:
        """F without the nonlinearity that ends it: the same draws."""
        part = self.map.linear_part
        return self if part is self.map else Projection(part.kind, self.n_in, self.n_out, self.seed, self.group)

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
        return _in_float32(self.map.forward, self._checked(x, self.n_in))

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
        return _in_float32(functools.partial(self.map.slice, start=start, stop=stop), x)

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
            return _in_float32(self.map.adjoint, y)
        if at is None:
            raise ConfigError(f"{self.kind!r} has an adjoint at a point only: give adjoint(y, at=x)")
        get_backend(y, at)
        at = self._checked(at, self.n_in)
        if tuple(at.shape[:-1]) not in ((), tuple(y.shape[:-1])):
            raise ShapeError(
                f"at has shape {tuple(at.shape)}; expected ({self.n_in},) or the batch of y, {tuple(y.shape)}"
            )
        return _in_float32(self.map.adjoint_at, y, at)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of kind, sizes and draws: equal where F is the same map.

        Streams of more than 2**20 elements are digested by their first and last 2**19: every element is
        computed from its index alone, in the same way.
        """
        return self.map.digest()

    def _checked(self, x: Array, length: int) -> Array:
        backend = get_backend(x)
        backend.require_float(x, "the input of a projection")
        if len(x.shape) < 1 or x.shape[-1] != length:
            raise ShapeError(f"{self!r} got an array of shape {tuple(x.shape)}; expected (…, {length})")
        return x


def _in_float32(compute: Callable[..., Array], *arrays: Array) -> Array:
    """``compute`` on arrays of at least single precision; half precision is rounded once, at the end."""
    backend = get_backend(*arrays)
    kind = backend.dtype_name(arrays[0])
    if kind in ("float16", "bfloat16"):
        return backend.astype(compute(backend, *(backend.astype(x, "float32") for x in arrays)), kind)
    return compute(backend, *arrays)

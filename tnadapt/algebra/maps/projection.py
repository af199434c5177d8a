"""The user-facing class of a map F: it validates inputs, and computes half precision in single precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError, integer

from ..folding import MAX_SIZE
from ._map import Map
from ._map_recipe import checked_projection, make_map, make_map_on_weights, projection_name

__all__ = ["Projection"]


class Projection:
    """A fixed map F from a vector of ``n_in`` elements to one of ``n_out``, regenerated from a seed.

    Parameters
    ----------
    kind : str, settings of a map, or list of these
        As ``Config.projection``: one of the paper's six maps ("identity", "shuffle", "linear", "linear_v2",
        "nonlinear", "nonlinear_v2"), a name registered with :func:`tnadapt.register_map`, settings such as
        ``tnadapt.maps.Scatter(size=1000)``, or a list of maps that are applied one after another.
    n_in, n_out : int
        Lengths, at least 1. ``n_in`` may be left out if the map determines it, or preserves the length. Identity and
        shuffle need ``n_in == n_out``. The paper's others also allow ``n_in > n_out``: the projection then reduces the
        length.
    seed : int
        0 to 2**64 - 1.
    group : int
        Stream of the draws: 0 if all groups share one F.

    Attributes
    ----------
    map : Map
        The implementation.
    key : tuple
        What determines the map: equal for equal maps.
    digest : str
        SHA-256 of the draws.

    Raises
    ------
    ConfigError
        If the kind is unknown, does not allow these lengths, or seed or group is out of range.

    Notes
    -----
    With H orthonormal of size L, g normal and Π a permutation (all from :mod:`tnadapt.algebra.rng`)::

        linear     v = H pad(x);  z[j] = (g v)[perm[j]];  y = (H z)[:n_out] * signs
        linear_v2  the same with a normal vector g' instead of the signs
        nonlinear, nonlinear_v2   t - tanh(t) of these (near 0 by its series, to avoid cancellation)

    The transform of the zero-padded x is computed as the shorter transform of x, repeated; the two are exactly
    equal. One call costs ``L log2 L`` additions and a gather. Half precision is computed in float32.

    The arrays drawn in the first call are kept. They take 9 bytes per element of L: permutation 4, gain ``g[perm]``
    4, signs 1 (12 bytes for the v2 kinds). The compiled kernels (on the CPU, L from 2**14 on, the extra ``fast``) keep
    the signs as bits. If n_in is at most 2**18, they keep 4 bytes in float32, as they regenerate the permutation in
    every call; otherwise, for L up to 2**26, 7 bytes (g 4, the permutation in two steps 3). The v2 kinds need 4
    more. A call then needs memory for one vector of length L, of which its result is a part if it is about as long, or
    for two if n_in is larger than 2**18. The first of them is kept for the next call when nothing uses it any more, and
    freed with F. With Triton, CUDA devices keep nothing, or 4 bytes where float64 is slow (:doc:`/gpu`).

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

    def __init__(
        self, kind: Any, n_in: int | None = None, n_out: int | None = None, seed: int = 0, group: int = 0
    ) -> None:
        kind = checked_projection(kind)
        n_in = None if n_in is None else integer("n_in", n_in, 1, MAX_SIZE, ConfigError)
        n_out = integer("n_out", n_out, 1, MAX_SIZE, ConfigError)
        self._hold(kind, make_map(kind, n_in, n_out, *_stream(seed, group)))
        self.key: tuple[Any, ...] = (kind, self.n_in, self.n_out, seed, group)

    @classmethod
    @checks_arguments
    def on_weights(
        cls, kind: Any, shapes: Sequence[tuple[int, int]], ratio: float = 1.0, seed: int = 0, group: int = 0
    ) -> Projection:
        """Return the projection of a group of whole weights that is applied to each weight as a matrix.

        Parameters
        ----------
        kind
            As for the class.
        shapes : sequence of (rows, cols)
            The weights of the group; the output is their updates, one after another.
        ratio : float
            ρ of each weight, for a map that does not determine the length of its input.
        seed, group : int
            As for the class. All weights of the group use the same streams.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> f = Projection.on_weights([tna.maps.Scatter(size=2), "dct2"], [(2, 3), (4, 2)])
        >>> f.n_in, f(np.ones(4)).shape
        (4, (14,))
        """
        kind = checked_projection(kind)
        found = cls.__new__(cls)
        found._hold(kind, make_map_on_weights(kind, shapes, ratio, *_stream(seed, group)))
        found.key = (kind, tuple(shapes), ratio, seed, group)
        return found

    def _hold(self, kind: Any, found: Map) -> None:
        self.kind, self.map = kind, found
        self.n_in, self.n_out, self.seed, self.group = found.n_in, found.n_out, found.seed, found.group

    @checks_arguments
    def share(self, other: Projection, digest: bool = False) -> None:
        """Use the map of another projection with the same ``key``, and with ``digest`` its digest."""
        self.map = other.map
        if digest:
            self.__dict__["digest"] = other.digest

    def __repr__(self) -> str:
        kind = self.kind if isinstance(self.kind, str) else projection_name(self.kind)
        return f"Projection({kind!r}, n_in={self.n_in}, n_out={self.n_out}, seed={self.seed}, group={self.group})"

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
        """F without its final nonlinearity, with the same draws."""
        part = self.map.linear_part
        if part is self.map:
            return self
        found = Projection.__new__(Projection)
        found._hold(part.kind, part)
        found.key = ("linear part", *self.key)
        return found

    # -- F -----------------------------------------------------------------------------------

    def __call__(self, x: Array) -> Array:
        """Compute F(x).

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
            If the length of the last axis is not ``n_in``.
        BackendError
            If x is not an array of a known library or not real floating.

        Examples
        --------
        >>> import numpy as np
        >>> Projection("shuffle", 4, 4, seed=0)(np.array([0.0, 1.0, 2.0, 3.0]))
        array([3., 1., 2., 0.])
        """
        return _in_float32(self.map.forward, self._checked(x, self.n_in))

    def slice(self, x: Array, start: int, stop: int) -> Array:
        """Compute ``F(x)[..., start:stop]`` without the rest.

        Parameters
        ----------
        x : array, shape (…, n_in)
            As for a call.
        start, stop : int
            ``0 <= start < stop <= n_out``.

        Returns
        -------
        array, shape (…, stop - start)
            Equal to the slice of the whole output up to the order of summation.

        Raises
        ------
        ShapeError
            If the slice is empty or extends beyond the output, or x does not fit.

        Notes
        -----
        ``H = H_high ⊗ H_low`` with ``H_low`` as long as the slice: rows of ``H_high`` combine the blocks
        of z, which are drawn and discarded piece by piece, and a final transform by ``H_low`` follows.
        Memory is in proportion to the slice and x. Time is in proportion to L, as all of z is drawn.

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
            raise ShapeError(f"slice {start}:{stop} of the {self.n_out} outputs of {self!r} is empty")
        if (start, stop) == (0, self.n_out):
            return self(x)
        return _in_float32(functools.partial(self.map.slice, start=start, stop=stop), x)

    def adjoint(self, y: Array, at: Array | None = None) -> Array:
        """Compute ``Fᵀ y``; for the nonlinear kinds, the adjoint of F's derivative at a point.

        Parameters
        ----------
        y : array, shape (…, n_out)
            The vector, or batch of vectors.
        at : array, shape (…, n_in), optional
            The point x at which a nonlinear F is differentiated; required for the nonlinear kinds, otherwise unused.

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
        y = self._checked(y, self.n_out, "y")
        if self.linear:
            return _in_float32(self.map.adjoint, y)
        if at is None:
            raise ConfigError(f"{self.kind!r} is nonlinear: give the point of its adjoint, adjoint(y, at=x)")
        at = self._checked(at, self.n_in, "at")
        get_backend(y, at)
        if tuple(at.shape[:-1]) not in ((), tuple(y.shape[:-1])):
            raise ShapeError(
                f"at has shape {tuple(at.shape)}; expected ({self.n_in},) or the batch of y, {tuple(y.shape)}"
            )
        return _in_float32(self.map.adjoint_at, y, at)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of kind, lengths and draws, the same for equal maps.

        Streams of more than 2**20 elements are digested by their first and last 2**19 elements, as every
        element is a function of its index alone.
        """
        return self.map.digest()

    def _checked(self, x: Array, length: int, what: str = "x") -> Array:
        backend = get_backend(x, what=what)
        backend.require_float(x, f"{what}, the input of a projection,")
        if len(x.shape) < 1 or x.shape[-1] != length:
            raise ShapeError(f"{self!r} got {what} of shape {tuple(x.shape)}; expected (…, {length})")
        return x


def _stream(seed: int, group: int) -> tuple[int, int]:
    return (
        integer("seed", seed, 0, (1 << 64) - 1, ConfigError),
        integer("group", group, 0, (1 << 32) - 1, ConfigError),
    )


def _in_float32(compute: Callable[..., Array], *arrays: Array) -> Array:
    """Call ``compute`` on arrays of at least single precision; round half precision once, at the end."""
    backend = get_backend(*arrays)
    kind = backend.dtype_name(arrays[0])
    if kind in ("float16", "bfloat16"):
        return backend.astype(compute(backend, *(backend.astype(x, "float32") for x in arrays)), kind)
    return compute(backend, *arrays)

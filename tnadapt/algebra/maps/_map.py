"""The contract of a map F: from a vector of ``n_in`` elements to one of ``n_out``, fixed by a seed.

A linear map has to say one thing, :meth:`Map.forward`, and which fixed arrays it draws, :attr:`Map.fixed` and
:meth:`Map.make`. Adjoint, slices, digest, gain and cost follow from these by computation; a class overrides what it
has a faster way for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array, FixedArrays
from tnadapt.errors import ConfigError

from .. import rng

__all__ = ["Map"]

# Elements of F as a matrix, up to which its adjoint is that matrix, transposed.
FORMED = 1 << 22
# Probes of the squared norm: of a long map one is enough, of a short one some.
_PROBED = 1 << 16
_MOST_PROBES = 64


class Map(FixedArrays):
    """A fixed map from vectors of ``n_in`` elements to vectors of ``n_out``.

    Parameters
    ----------
    n_in, n_out : int
        Lengths, at least 1.
    seed : int
        0 to 2**64 - 1.
    group : int
        Stream of the draws: 0 where all groups share one map.

    Attributes
    ----------
    kind : str
        The name it is registered by.
    square : bool
        Whether it keeps the length; a config then refuses ``ratio`` below 1.
    linear : bool
        Whether ``F(x + y) = F(x) + F(y)``.
    isometry : bool
        Whether it is linear and keeps the length, and ``F Fᵀ = 1``: distances before and after are the same, and so
        are bounds of a fit.
    full_rank : bool
        Whether, over its own draws, almost every vector becomes one whose matrices have full rank. False is always
        right: the planner then computes the rank.
    fixed : tuple of str
        Names of the arrays that :meth:`make` draws, in the order in which they are digested.

    Notes
    -----
    ``make(name)`` returns an array of integers or float32 numbers that depends on ``n_in``, ``n_out``, ``seed`` and
    ``group`` alone, drawn by :mod:`tnadapt.algebra.rng`, so that it has the same bits everywhere. ``self.on(backend,
    name, x)`` is that array in x's library and on its device, made once.

    Examples
    --------
    Each element of the output is one of the input, or its negative:

    >>> import numpy as np
    >>> from tnadapt.algebra import rng
    >>> from tnadapt.algebra.maps import Map
    >>> class Signs(Map):
    ...     square = isometry = True
    ...     fixed = ("signs",)
    ...     def make(self, name):
    ...         return rng.signs(self.seed, self.group, 0, self.n_out)
    ...     def forward(self, backend, x):
    ...         return x * self.on(backend, "signs", x, backend.dtype_name(x))
    """

    kind: str = ""
    square: bool = False
    linear: bool = True
    isometry: bool = False
    full_rank: bool = False
    fixed: tuple[str, ...] = ()

    def __init__(self, n_in: int, n_out: int, seed: int = 0, group: int = 0) -> None:
        super().__init__()
        self.n_in, self.n_out, self.seed, self.group = n_in, n_out, seed, group

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(n_in={self.n_in}, n_out={self.n_out}, seed={self.seed}, group={self.group})"

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"map {self.kind or type(self).__name__!r} does not define {what}")

    # -- What it computes ----------------------------------------------------------------------

    def forward(self, backend: Backend, x: Array) -> Array:
        """F(x).

        Parameters
        ----------
        backend : Backend
            Of x. Its operations alone are used, so that the map runs on every library.
        x : array, shape (…, n_in)
            Single precision or better.

        Returns
        -------
        array, shape (…, n_out)
        """
        raise self._lacks("forward(backend, x)")

    def adjoint(self, backend: Backend, y: Array) -> Array:
        """``Fᵀ y`` of a linear map, ``(…, n_out)`` to ``(…, n_in)``.

        By default by F as a matrix, up to 2**22 elements; a longer map has to define its own.
        """
        if not self.linear:
            raise self._lacks("adjoint_at(backend, y, at), which a map that is not linear needs")
        if self.n_in * self.n_out > FORMED:
            raise self._lacks(
                f"adjoint(backend, y); the general one forms a matrix, and {self.n_out} x {self.n_in} elements are too "
                "many"
            )
        unit = backend.asarray(np.eye(self.n_in), backend.dtype_name(y), backend.device(y))
        return backend.matmul(y, backend.matrix_transpose(self.forward(backend, unit)))

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        """The adjoint of F's derivative at a point; of a linear map its adjoint."""
        return self.adjoint(backend, y)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        """``F(x)[..., start:stop]``; by default cut from the whole."""
        return self.forward(backend, x)[..., start:stop]

    @property
    def linear_part(self) -> Map:
        """The map without a nonlinearity that ends it: the same draws. A linear map is its own."""
        if self.linear:
            return self
        raise self._lacks("linear_part, which a map that is not linear needs")

    # -- What is known of it -------------------------------------------------------------------

    def streams(self) -> Iterator[np.ndarray]:
        """The fixed numbers, in order; integers as int64 and the others as float32."""
        for name in self.fixed:
            array = np.ravel(self.host(name))
            yield array.astype("<i8" if array.dtype.kind in "iu" else "<f4")

    def digest(self) -> str:
        """SHA-256, in hex, of kind, lengths and draws: equal where F is the same map."""
        total = hashlib.sha256(f"tnadapt {self.kind} {self.n_in} {self.n_out}".encode())
        for stream in self.streams():
            total.update(hashlib.sha256(stream.tobytes()).digest())
        return total.hexdigest()

    def gain(self) -> float:
        """Root mean square of ``F δ``, of a white δ as large as ``Fᵀ g`` of white g.

        The two passes are taken as independent. The random arrays of the start are scaled by it.
        """
        return self.squared_norm() / math.sqrt(self.n_in * self.n_out)

    def variance(self) -> float:
        """Mean square of ``F x``, before a nonlinearity, of white x of variance 1."""
        return self.squared_norm() / self.n_out

    def squared_norm(self) -> float:
        """The sum of the squares of F's entries, as a linear map.

        By default estimated by ``|F s|²`` of seeded signs s, whose mean it is, and rounded to eight bits, so that all
        machines agree.
        """
        backend = load_backend("numpy")
        probes = max(1, min(_MOST_PROBES, _PROBED // self.n_in))
        part, total = self.linear_part, 0.0
        for probe in range(probes):
            signs = rng.signs(self.seed, self.group, probe * self.n_in, (probe + 1) * self.n_in)
            made = np.asarray(part.forward(backend, signs.astype(np.float64)))
            total += float(made @ made)
        mantissa, exponent = math.frexp(total / probes)
        return math.ldexp(round(mantissa * 256.0), exponent - 8)

    def fourth_moment(self) -> float:
        """Of a nonlinear map, ``E[g'² t⁴] / E[t²]²`` as :mod:`tnadapt.algebra.init` uses it; no other has one."""
        raise self._lacks("fourth_moment(), which the start of a map that is not linear needs")

    def cost(self) -> int | None:
        """Multiply-adds of one call; None for the planner to count those of :meth:`forward`."""
        return None

    def matrix(self) -> np.ndarray:
        """F as a matrix in float64, by a formula of its own and not by :meth:`forward`: what ``verify`` compares with.

        Returns
        -------
        ndarray, shape (n_out, n_in)
        """
        raise self._lacks("matrix(), an independent reference; verify compares with it")

"""Base class of maps F: adjoint, slices, cached draws, digest; and the simplest maps: identity, given arrays.

A linear map must define :meth:`Map.forward`, and its fixed arrays, if any, by :attr:`Map.fixed` and :meth:`Map.make`.
Adjoint, slices, digest, gain and cost are derived from these; a class overrides a method where it has a faster
algorithm. A map whose settings determine the length of its input also defines :meth:`Map.fixes_length` and
:meth:`Map.domain`. The vectors have ``n_in`` and ``n_out`` elements, and a seed fixes the map.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.argument_checks import integer, require_frozen, require_plain, wrong_argument
from tnadapt.backends import Array, Backend, FixedArrays, load_backend
from tnadapt.errors import ConfigError, ShapeError, safe_repr

# -- Settings: a frozen dataclass, which configs hold and adapter files store ------------------------------------------


# Longer settings, such as lists of positions, are elided in texts.
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class MapSettings:
    """The settings of a map, as ``Config.projection`` takes them.

    A subclass is a frozen dataclass whose fields are the settings. They are written into adapter files, so that their
    values must be ``None``, booleans, numbers, strings, or tuples of these. The map's class names it as its
    ``settings_class``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.maps.Scatter(size=1000)
    Scatter(size=1000, positions=None)

    A map that repeats one row, times a factor, for all rows of a weight:

    >>> import dataclasses, numpy as np
    >>> from tnadapt.algebra.maps import Map, Space
    >>> @dataclasses.dataclass(frozen=True)
    ... class RowSettings(tna.maps.MapSettings):
    ...     factor: float = 1.0
    >>> class SameRow(Map):
    ...     settings_class = RowSettings
    ...     two_sided = True
    ...     @classmethod
    ...     def fixes_length(cls, settings):
    ...         return True
    ...     @classmethod
    ...     def domain(cls, codomain, settings):
    ...         return Space(codomain.shape[1])
    ...     def forward(self, backend, x):
    ...         return backend.concat([x * self.settings.factor] * self.shape[0], axis=-1)
    ...     def matrix(self):
    ...         return self.settings.factor * np.tile(np.eye(self.n_in), (self.shape[0], 1))
    >>> tna.register_map("same-row", SameRow)
    >>> config = tna.Config(order=1, format="dense", projection=RowSettings(0.5), on="weight")
    >>> tna.UpdatePlan(config, [(12, 10)] * 2).num_parameters
    20
    >>> tna.verify(config, [(12, 10)] * 2, backends=["numpy"]).holds
    True
    """

    #: Fields that are positive integers, or None if that is their default, and fields that are booleans.
    _sizes: ClassVar[tuple[str, ...]] = ()
    _flags: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        name = type(self).__name__
        optional = {field.name for field in dataclasses.fields(self) if field.default is None}
        for field in self._sizes:
            size = getattr(self, field)
            if size is not None or field not in optional:
                object.__setattr__(self, field, integer(f"{name}'s {field}", size, 1, MAX_SIZE, ConfigError))
        for field in self._flags:
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise wrong_argument(f"{name}'s {field}", "True or False", value)
        require_plain(self, name)


def check_settings_class(kind: str, cls: Any) -> None:
    """Raise a ConfigError unless a map's settings are a frozen dataclass whose fields a file can hold."""
    if not (isinstance(cls, type) and issubclass(cls, MapSettings)):
        raise ConfigError(
            f"map {kind!r}: settings_class must inherit from tnadapt.maps.MapSettings; got {safe_repr(cls)}"
        )
    require_frozen(cls, f"map {kind!r}: the settings class {cls.__name__}", "map")


def settings_text(settings: MapSettings, short: bool = False) -> str:
    """Return the settings that differ from their defaults, such as ``"size=1000"``; long tuples elided if ``short``."""
    told = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        long = short and isinstance(value, tuple) and len(value) > _SHOWN
        told.append(f"{field.name}={f'({len(value)} given)' if long else repr(value)}")
    return ", ".join(told)


# -- The base class of maps --------------------------------------------------------------------------------------------


# The default adjoint forms F as a matrix and transposes it, up to this number of elements.
FORMED = 1 << 22
# Probes for the squared norm: 2**16 / n_in of them, at least 1 and at most 64.
_PROBED = 1 << 16
_MOST_PROBES = 64


class Space(NamedTuple):
    """Vectors that a map takes or returns.

    Attributes
    ----------
    length : int
        Number of elements.
    shape : (int, int), optional
        Rows and columns, if a vector is a matrix in C order; None if it has no such meaning.
    """

    length: int
    shape: tuple[int, int] | None = None


class Map(FixedArrays):
    """A fixed map from vectors of ``n_in`` elements to vectors of ``n_out``.

    Parameters
    ----------
    n_in, n_out : int
        Lengths, at least 1.
    seed : int
        0 to 2**64 - 1.
    group : int
        Stream of the draws: 0 if all groups share one map.
    settings : MapSettings, optional
        An instance of ``settings_class``.
    shape : (int, int), optional
        Rows and columns of the output as a matrix, for a two-sided map.

    Attributes
    ----------
    kind : str
        The name under which it is registered.
    settings_class : type of MapSettings, optional
        The class of its settings; None if it has none.
    two_sided : bool
        Whether it works on the rows and columns of a matrix, so that a config needs ``on="weight"``.
    identity : bool
        Whether ``F(x) = x``: nothing then calls it.
    square : bool
        Whether it preserves the length; a config then refuses ``ratio`` below 1.
    linear : bool
        Whether ``F(x + y) = F(x) + F(y)``.
    isometry : bool
        Whether it is linear, preserves the length, and ``F Fᵀ = 1``: it then preserves distances, and with them the
        bounds of a fit.
    full_rank : bool
        Whether, with probability one over its draws, it maps a vector to one whose matrices have full rank. False is
        always safe: the planner then computes the rank.
    exact_in_batches : bool
        Whether each row of a batch has the bits that it has alone: groups that share F are then computed in one call.
        False is always safe. A product of the batch with a matrix, for one, is summed in another order for one row.
    even_columns : bool
        Whether it is linear and all columns of its matrix have nearly the same norm. The norm of the map after random
        positions (:attr:`samples`) is then known from this one's, and is not estimated. False is always safe.
    fixed : tuple of str
        Names of the arrays that :meth:`make` draws, in the order in which they are digested.

    Notes
    -----
    ``make(name)`` returns an array of integers or float32 numbers that depends only on ``n_in``, ``n_out``, ``seed``
    and ``group``, drawn by :mod:`tnadapt.algebra.rng`, so that its bits are the same everywhere.
    ``self.on(backend, name, x)`` is that array in x's library and on its device, computed once.

    Examples
    --------
    Each element of the output is the input element or its negative:

    >>> import numpy as np
    >>> from tnadapt.algebra import rng
    >>> from tnadapt.algebra.maps import Map
    >>> class Signs(Map):
    ...     square = isometry = True
    ...     fixed = ("signs",)
    ...     def make(self, name):
    ...         return 1 - 2 * (rng.words(self.seed, self.group, 1 << 24, 0, self.n_out) >> 31).astype(np.int8)
    ...     def forward(self, backend, x):
    ...         return x * self.on(backend, "signs", x, backend.dtype_name(x))
    """

    kind: str = ""
    settings_class: ClassVar[type[MapSettings] | None] = None
    two_sided: bool = False
    identity: bool = False
    square: bool = False
    linear: bool = True
    isometry: bool = False
    full_rank: bool = False
    exact_in_batches: bool = False
    even_columns: bool = False
    fixed: tuple[str, ...] = ()
    # Whether the settings always determine the length of the input.
    _sized_by_settings: ClassVar[bool] = False

    def __init__(
        self,
        n_in: int,
        n_out: int,
        seed: int = 0,
        group: int = 0,
        *,
        settings: Any = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.n_in, self.n_out, self.seed, self.group = n_in, n_out, seed, group
        self.settings, self.shape = settings, shape

    def __repr__(self) -> str:
        name = type(self).__name__
        extra = "" if self.settings is None else f", settings={settings_text(self.settings)}"
        extra += "" if self.shape is None else f", shape={self.shape}"
        return f"{name}(n_in={self.n_in}, n_out={self.n_out}, seed={self.seed}, group={self.group}{extra})"

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"map {self.kind or type(self).__name__!r} does not define {what}")

    # -- Lengths -------------------------------------------------------------------------------

    @classmethod
    def fixes_length(cls, settings: Any) -> bool:
        """Return whether the output and the settings determine the length of the input; else ``ratio`` does."""
        return cls.square or cls._sized_by_settings

    @classmethod
    def domain(cls, codomain: Space, settings: Any) -> Space:
        """Return the space of the input, if :meth:`fixes_length`; raise a ConfigError if the settings do not fit.

        Parameters
        ----------
        codomain : Space
            The space of the output; a two-sided map always gets one with a shape.
        settings : MapSettings or None
        """
        return codomain

    # -- What it computes ----------------------------------------------------------------------

    def forward(self, backend: Backend, x: Array) -> Array:
        """Compute F(x). Default: the slice that is the whole output, of a map that defines :meth:`slice`.

        Parameters
        ----------
        backend : Backend
            Backend of x. Use only its operations, so that the map runs on every library.
        x : array, shape (…, n_in)
            Single precision or better.

        Returns
        -------
        array, shape (…, n_out)
        """
        if type(self).slice is Map.slice:
            raise self._lacks("forward(backend, x)")
        return self.slice(backend, x, 0, self.n_out)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        """Compute ``Fᵀ y`` of a linear map, ``(…, n_out)`` to ``(…, n_in)``.

        The default forms F as a matrix of at most 2**22 elements; a larger map must override this method.
        """
        if not self.linear:
            raise self._lacks("adjoint_at(backend, y, at), which a map that is not linear needs")
        if self.n_in * self.n_out > FORMED:
            raise self._lacks(
                f"adjoint(backend, y); the default forms a matrix, and {self.n_out} x {self.n_in} elements are too many"
            )
        unit = backend.asarray(np.eye(self.n_in), backend.dtype_name(y), backend.device(y))
        return backend.precise_matmul(y, backend.matrix_transpose(self.forward(backend, unit)))

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        """Compute the adjoint of F's derivative at a point; for a linear map, the adjoint."""
        return self.adjoint(backend, y)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        """Compute ``F(x)[..., start:stop]``. Default: a slice of the whole output."""
        return self.forward(backend, x)[..., start:stop]

    def _piece(self, backend: Backend, name: str, x: Array, start: int, stop: int, dtype: str | None = None) -> Array:
        """Return a part of a fixed array, which ``make`` draws without the rest if the array is not cached."""
        if name not in self.kept:
            return self.on(backend, (name, start, stop), x, dtype, keep=False)
        whole = self.on(backend, name, x)[start:stop]
        return whole if dtype is None else backend.astype(whole, dtype)

    @property
    def linear_part(self) -> Map:
        """The map without its final nonlinearity, with the same draws; a linear map itself."""
        if self.linear:
            return self
        raise self._lacks("linear_part, which a map that is not linear needs")

    def sides(self) -> Sequence[tuple[Map, Map]]:
        """Return maps (A_t, B_t) with ``Y = sum_t A_t X B_tᵀ``; none if the map is no such sum, which is the default.

        X and Y are the input and the output as matrices: A_t maps each column of X, and B_t each row. A map that
        repeats, permutes or scales rows and columns has one pair. The update behind it needs not be formed: its factors
        are those of X, mapped, or else B_tᵀ is applied to what a layer multiplies by it.
        """
        return ()

    # -- Properties ----------------------------------------------------------------------------

    def streams(self) -> Iterator[np.ndarray]:
        """Yield the fixed arrays, in order; integers as int64 and the others as float32."""
        for name in self.fixed:
            array = np.ravel(self.host(name))
            yield array.astype("<i8" if array.dtype.kind in "iu" else "<f4")

    def digest(self) -> str:
        """Return the hex SHA-256 of kind, lengths, settings, shape and draws, the same for equal maps."""
        head = f"tnadapt {self.kind} {self.n_in} {self.n_out}"
        if self.settings is not None:
            head += f" {settings_text(self.settings)}"
        if self.shape is not None:
            head += f" {self.shape[0]}x{self.shape[1]}"
        total = hashlib.sha256(head.encode())
        for stream in self.streams():
            total.update(hashlib.sha256(stream.tobytes()).digest())
        return total.hexdigest()

    def gain(self) -> float:
        """Return the root mean square of ``F δ`` for white noise δ with the mean square of ``Fᵀ g``, g white.

        It is the gain of a gradient step through F, with the two passes treated as independent. The initialization
        scales the random arrays by it.
        """
        return self.squared_norm() / math.sqrt(self.n_in * self.n_out)

    def variance(self) -> float:
        """Return the mean square of ``F x``, before a nonlinearity, for white x of variance 1."""
        return self.squared_norm() / self.n_out

    def squared_norm(self) -> float:
        """Return the sum of the squares of the entries of F (of its linear part) as a matrix.

        The default estimates it by the mean of ``|F s|²`` over seeded random signs s, whose expectation it is, rounded
        to eight bits so that all machines agree.
        """
        backend = load_backend("numpy")
        probes = max(1, min(_MOST_PROBES, _PROBED // self.n_in))
        part, total = self.linear_part, 0.0
        for probe in range(probes):
            signs = rng.signs(self.seed, self.group, probe * self.n_in, (probe + 1) * self.n_in)
            image = np.asarray(part.forward(backend, signs.astype(np.float64)))
            total += float(image @ image)
        mantissa, exponent = math.frexp(total / probes)
        return math.ldexp(round(mantissa * 256.0), exponent - 8)

    @property
    def samples(self) -> bool:
        """Whether it puts the elements at random positions, all equally probable, and zeros elsewhere."""
        return False

    def freedom(self) -> int:
        """Return the rank of F (of its linear part), or an upper bound on it. Default: the smaller length."""
        return min(self.n_in, self.n_out)

    def fourth_moment(self) -> float:
        """Return ``E[g'² t⁴] / E[t²]²``, for :mod:`tnadapt.algebra.init`; only nonlinear maps define it."""
        raise self._lacks("fourth_moment(), which the start of a map that is not linear needs")

    def cost(self) -> int | None:
        """Return the multiply-adds of one call; None to let the planner count those of :meth:`forward`."""
        return None

    def matrix(self) -> np.ndarray:
        """Return F as a matrix in float64, computed independently of :meth:`forward`, for ``verify`` to compare with.

        Returns
        -------
        ndarray, shape (n_out, n_in)
        """
        raise self._lacks("matrix(), an independent reference; verify compares with it")


# -- Maps to a matrix that compute any of its rows alone ---------------------------------------------------------------


class ByRows(Map):
    """A map to a matrix Y of which a subclass computes rows: a slice costs the rows that it cuts."""

    two_sided = True
    shape: tuple[int, int]

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._rows(backend, x, 0, self.shape[0])

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        cols = self.shape[1]
        first, last = start // cols, -(-stop // cols)
        return self._rows(backend, x, first, last)[..., start - first * cols : stop - first * cols]

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        """Compute rows ``first`` to ``last`` of Y, flattened."""
        raise self._lacks("_rows")


# -- Digests of draws; long streams are digested by their two ends -----------------------------------------------------


# Streams longer than twice this are digested by their two ends. That is enough to identify a stream, since each element
# is a pure function of its index.
ENDS = 1 << 19


# Draws elements ``start`` to ``stop - 1`` of the named stream.
_Part = Callable[[str, int, int], np.ndarray]


def digest_of(f: Map, part: _Part, lengths: Mapping[str, int]) -> str:
    """Return the hex SHA-256 of kind, lengths and streams; beyond 2**20 elements, of the first and last 2**19."""
    head = f"tnadapt {f.kind} {f.n_in} {f.n_out}".encode()
    return rng.digest(iter([head]), *(_bytes(part, *stream) for stream in lengths.items()))


def _bytes(part: _Part, name: str, length: int) -> Iterator[bytes]:
    ends = [(0, ENDS), (length - ENDS, length)] if length > 2 * ENDS else [(0, length)]
    for first, last in ends:
        for lo, hi in rng.chunks(first, last):
            yield part(name, lo, hi).astype("<i8" if name == "perm" else "<f4").tobytes()


# -- Maps that copy elements, and the identity map ---------------------------------------------------------------------


def sum_of_runs(backend: Backend, y: Array, length: int) -> Array:
    """Sum the runs of so many elements that y consists of, the last one padded with zeros: the adjoint of repeating."""
    runs = -(-y.shape[-1] // length)
    padded = backend.pad_last(y, runs * length)
    return backend.sum(backend.reshape(padded, (*y.shape[:-1], runs, length)), axis=-2)


class Copying(Map):
    """A map each of whose outputs is one of the inputs."""

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0


class Identity(Copying):
    """``y = x``; ρ = 1 only."""

    kind = "identity"
    square = isometry = identity = True

    def forward(self, backend: Backend, x: Array) -> Array:
        return x

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return y

    def matrix(self) -> np.ndarray:
        return np.eye(self.n_out)


# -- Maps with an array that the caller gives --------------------------------------------------------------------------


class BroughtMap(Map):
    """A map with one array that the caller brings and files store; ``Config.before`` takes it, alone.

    Attributes
    ----------
    brings : str
        Name of the array: a plan calls it ``theta.`` and this name.
    """

    brings: str = ""
    _brought: np.ndarray | None = None

    @property
    def brought_shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        raise self._lacks("brought_shape")

    def bring(self, array: np.ndarray, label: str = "the array") -> None:
        """Set the array; raise a ConfigError or ShapeError that names it by ``label`` if it does not fit.

        Parameters
        ----------
        array : ndarray, shape ``brought_shape``
            Finite float32 numbers.
        label : str
        """
        if array.shape != self.brought_shape:
            raise ShapeError(f"{label} has shape {array.shape}; expected {self.brought_shape}")
        self.check(array, label)
        self._brought = array
        self.kept.clear()

    def check(self, array: np.ndarray, label: str) -> None:
        """Raise a ConfigError if the values do not fit. Default: all do."""

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random array that fits, for what depends on shapes alone."""
        raise self._lacks("stand_in(rng)")

    @property
    def brought(self) -> np.ndarray:
        """The array."""
        if self._brought is None:
            raise ConfigError(
                f"map {self.kind!r} has no {self.brings} yet, an array of shape {self.brought_shape}: use "
                f"Config(before={self.kind!r}), whose plan takes it as given={{'theta.{self.brings}': array}}"
            )
        return self._brought

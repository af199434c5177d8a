"""Projection, the map F that users call, and the maps that ``Config.projection`` names: single, chained, per weight.

:data:`MAPS` is the registry of maps by name. A *recipe* is what ``Config.projection`` says, and makes a :class:`Map`,
which may be a :class:`Chain` or :class:`PerWeight`. :class:`Projection` checks inputs, and computes half precision in
single precision.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.argument_checks import checks_arguments, from_stored, integer
from tnadapt.backends import Array, Backend, get_backend
from tnadapt.errors import ConfigError, ShapeError, TnadaptError, safe_repr
from tnadapt.plugins import Registry

from ._map import BroughtMap, Identity, Map, MapSettings, Space, settings_text
from ._matrices import CirculantMap, GivenMatrix, Normal, TileMap
from ._positions import GatherMap, OneHot, ScatterMap, Shuffle, SignedOneHot, SignGatherMap, TiedMap, TorchScatterMap
from ._transforms import CenteredWaveletMap, Dct2, Dft2, WaveletMap
from .fastfood import Linear, LinearV2, Nonlinear, NonlinearV2

# -- Maps that are made of maps: one after another, or side by side ----------------------------------------------------


class _Composed(Map):
    """Base class of chains and maps per weight, in which only the last part may be nonlinear."""

    _title: str

    def __init__(self, parts: tuple[Map, ...], n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, parts[0].seed, parts[0].group)
        self.parts, self.linear = parts, parts[-1].linear
        for name in ("identity", "square", "isometry", "exact_in_batches"):
            setattr(self, name, all(getattr(part, name) for part in parts))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.parts)!r})"

    def digest(self) -> str:
        digests = {part: part.digest() for part in self.parts}
        return hashlib.sha256(" ".join([self._title, *(digests[part] for part in self.parts)]).encode()).hexdigest()

    def fourth_moment(self) -> float:
        return self.parts[-1].fourth_moment()

    def cost(self) -> int | None:
        costs = [part.cost() for part in self.parts]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None


def _checked_parts(parts: Sequence[Map]) -> tuple[Map, ...]:
    parts = tuple(parts)
    if not parts or not all(isinstance(part, Map) for part in parts):
        raise ConfigError(f"parts must be one or more maps; got {safe_repr(parts)}")
    return parts


class Chain(_Composed):
    """The composition of maps, the first one applied first. Only the last one may be nonlinear.

    Parameters
    ----------
    parts : sequence of Map
        Two or more; the length of each one's output is that of the next one's input.
    """

    _title = "tnadapt chain"

    @checks_arguments
    def __init__(self, parts: Sequence[Map]) -> None:
        parts = _checked_parts(parts)
        super().__init__(parts, parts[0].n_in, parts[-1].n_out)
        for before, after in itertools.pairwise(parts):
            if before.n_out != after.n_in:
                raise ConfigError(
                    f"parts must fit each other; {before.kind!r} makes {before.n_out} elements, and {after.kind!r} "
                    f"takes {after.n_in}"
                )
        self.kind = " → ".join(part.kind for part in parts)
        for part in parts[:-1]:
            if not part.linear:
                raise ConfigError(
                    f"{part.kind!r} is not linear, and only the last map of a chain may be nonlinear: put it last"
                )
        # If the last map gives any vector full rank, it does so for the output of the others.
        self.full_rank = parts[-1].full_rank

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.parts[-1].forward(backend, self._before_last(backend, x))

    def _before_last(self, backend: Backend, x: Array) -> Array:
        for part in self.parts[:-1]:
            x = part.forward(backend, x)
        return x

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return self.parts[-1].slice(backend, self._before_last(backend, x), start, stop)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        for part in reversed(self.parts):
            y = part.adjoint(backend, y)
        return y

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        if self.linear:
            return self.adjoint(backend, y)
        y = self.parts[-1].adjoint_at(backend, y, self._before_last(backend, at))
        for part in reversed(self.parts[:-1]):
            y = part.adjoint(backend, y)
        return y

    def sides(self) -> Sequence[tuple[Map, Map]]:
        terms = itertools.product(*(part.sides() for part in self.parts))
        return [(_composed([a for a, _ in pairs]), _composed([b for _, b in pairs])) for pairs in terms]

    @property
    def linear_part(self) -> Map:
        return self if self.linear else Chain([*self.parts[:-1], self.parts[-1].linear_part])

    def squared_norm(self) -> float:
        # A map that preserves distances, before or after another one, does not change the sum of squares.
        others = [part for part in self.parts if not part.isometry]
        if len(others) < 2:
            return others[0].linear_part.squared_norm() if others else float(self.n_out)
        first, *rest = others
        if first.samples and len(rest) == 1 and rest[0].even_columns:
            # Columns taken at random have their share of the sum, as a mean over the draws.
            return rest[0].squared_norm() * first.n_in / first.n_out
        return super().squared_norm()  # an estimate

    def freedom(self) -> int:
        return min(part.freedom() for part in self.parts)

    def matrix(self) -> np.ndarray:
        matrix = self.parts[0].matrix()
        for part in self.parts[1:]:
            matrix = part.matrix() @ matrix
        return np.asarray(matrix)


def _composed(parts: Sequence[Map]) -> Map:
    moving = [part for part in parts if not part.identity]
    if len(moving) > 1:
        return Chain(moving)
    return moving[0] if moving else parts[0]


# -- The maps by name --------------------------------------------------------------------------------------------------


_BUILT_IN: tuple[type[Map], ...] = (
    Identity, Shuffle, Linear, LinearV2, Nonlinear, NonlinearV2, ScatterMap, TorchScatterMap, GatherMap, SignGatherMap,
    TileMap, CirculantMap, Dct2, Dft2, WaveletMap, CenteredWaveletMap, OneHot, SignedOneHot, Normal, TiedMap,
    GivenMatrix,
)  # fmt: skip
MAPS: Registry[Map] = Registry("projection", Map, {cls.kind: cls for cls in _BUILT_IN}, {"fastfood": "linear"})

#: The paper's six maps, and those of them that preserve the length.
KINDS = ("identity", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2")
SQUARE = tuple(name for name in KINDS if MAPS[name].square)


# -- A map on each weight of a group: blocks along the diagonal --------------------------------------------------------


class PerWeight(_Composed):
    """Maps of the weights of a group: the input is the concatenation of their inputs, and so is the output.

    Parameters
    ----------
    parts : sequence of Map
        One per weight, of one kind. Weights of equal shape share one object, and are computed together if all do.
    """

    _title = "tnadapt per weight"

    @checks_arguments
    def __init__(self, parts: Sequence[Map]) -> None:
        parts = _checked_parts(parts)
        super().__init__(parts, sum(part.n_in for part in parts), sum(part.n_out for part in parts))
        self.kind = parts[0].kind
        self.full_rank = all(part.full_rank for part in parts)
        self._alike = all(part is parts[0] for part in parts)

    def part_at(self, start: int) -> tuple[int, Map]:
        """Return where the input of the weight whose output begins at ``start`` begins, and the weight's map."""
        if self._alike:
            first = self.parts[0]
            return start // first.n_out * first.n_in, first
        return self._places[start]

    @functools.cached_property
    def _places(self) -> dict[int, tuple[int, Map]]:
        places, first_in, first_out = dict[int, tuple[int, Map]](), 0, 0
        for part in self.parts:
            places[first_out] = first_in, part
            first_in, first_out = first_in + part.n_in, first_out + part.n_out
        return places

    def _blockwise(self, backend: Backend, method: str, length: str, *arrays: tuple[Array, str]) -> Array:
        """Apply a method of each part to its pieces of arrays, and concatenate the results to ``length``."""
        batch = tuple(arrays[0][0].shape[:-1])
        if self._alike:
            first, count = self.parts[0], len(self.parts)
            split = [backend.reshape(array, (*array.shape[:-1], count, getattr(first, name))) for array, name in arrays]
            return backend.reshape(getattr(first, method)(backend, *split), (*batch, getattr(self, length)))
        starts = [
            list(itertools.accumulate((getattr(part, name) for part in self.parts), initial=0)) for _, name in arrays
        ]
        pieces = []
        for number, part in enumerate(self.parts):
            blocks = [
                array[..., edges[number] : edges[number + 1]] for (array, _), edges in zip(arrays, starts, strict=True)
            ]
            pieces.append(getattr(part, method)(backend, *blocks))
        return backend.concat(pieces, axis=-1)

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._blockwise(backend, "forward", "n_out", (x, "n_in"))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self._blockwise(backend, "adjoint", "n_in", (y, "n_out"))

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        if self.linear:
            return self.adjoint(backend, y)
        return self._blockwise(backend, "adjoint_at", "n_in", (y, "n_out"), (at, "n_in"))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        pieces, first_in, first_out = [], 0, 0
        for part in self.parts:
            lo, hi = max(start - first_out, 0), min(stop - first_out, part.n_out)
            if lo < hi:
                block = x[..., first_in : first_in + part.n_in]
                whole = (lo, hi) == (0, part.n_out)
                pieces.append(part.forward(backend, block) if whole else part.slice(backend, block, lo, hi))
            first_in, first_out = first_in + part.n_in, first_out + part.n_out
        return backend.concat(pieces, axis=-1)

    @property
    def linear_part(self) -> Map:
        if self.linear:
            return self
        distinct = {part: part.linear_part for part in self.parts}
        return PerWeight([distinct[part] for part in self.parts])

    def squared_norm(self) -> float:
        distinct = {part: part.squared_norm() for part in self.parts}
        return sum(distinct[part] for part in self.parts)

    def freedom(self) -> int:
        return sum(part.freedom() for part in self.parts)

    def matrix(self) -> np.ndarray:
        from scipy.linalg import block_diag

        return np.asarray(block_diag(*(part.matrix() for part in self.parts)))


# -- Recipes: what Config.projection says, and the map that it makes ---------------------------------------------------


#: What a map is applied to: the vector of a group, or each weight of it as a matrix.
ON = ("vector", "weight")
# Element k of a chain draws with the group plus k times this, so that equal maps in a chain have different draws.
_STREAMS = 1 << 28
_MOST = 16
#: Group indices from here on belong to maps before the network (:mod:`tnadapt.algebra.theta`), chains of up to 8 maps.
THETA_STREAMS = 1 << 31

Recipe = str | MapSettings | tuple[str | MapSettings, ...]


class _Step(NamedTuple):
    """One map of a chain, where ``fixes_length`` is :meth:`Map.fixes_length` of its settings."""

    name: str
    cls: type[Map]
    settings: Any
    fixes_length: bool


def _step_of(given: str | MapSettings, other: str = "") -> _Step:
    name = _name_of(given) if isinstance(given, MapSettings) else given
    name = MAPS.aliases.get(name, name) if isinstance(name, str) else name
    cls = MAPS.find(name, other)
    settings = given if isinstance(given, MapSettings) else cls.settings_class and _defaults(name, cls.settings_class)
    return _Step(name, cls, settings, cls.fixes_length(settings))


def _name_of(settings: MapSettings) -> str:
    for name, cls in MAPS.items():
        if cls.settings_class is type(settings):
            return name
    raise ConfigError(
        f"{safe_repr(settings)} are the settings of no registered map; call tnadapt.register_map(name, cls) with their "
        "map. If a class of this name was registered again since, create the settings again"
    )


def _defaults(name: str, cls: type[MapSettings]) -> MapSettings:
    try:
        return cls()
    except (TypeError, TnadaptError):
        fields, none = dataclasses.fields(cls), dataclasses.MISSING
        required = [field for field in fields if field.default is field.default_factory is none] or fields
        shown = f"{cls.__name__}({', '.join(f'{field.name}=…' for field in required)})"
        raise ConfigError(f"map {name!r} needs settings: projection=tnadapt.maps.{shown}") from None


def _steps(projection: Recipe) -> list[_Step]:
    return [_step_of(step) for step in (projection if isinstance(projection, tuple) else (projection,))]


# -- Configs ---------------------------------------------------------------------------------------


def checked_projection(given: Any) -> Recipe:
    """Return a projection in its canonical form: names for settings that are the default, and no "identity" in chains.

    Parameters
    ----------
    given : str, MapSettings, mapping, or list or tuple of these
        A mapping is settings as :func:`projection_to_json` writes them.

    Raises
    ------
    ConfigError
        If it is none of these, names no map, or has too many elements.

    Examples
    --------
    >>> from tnadapt.algebra.maps import Scatter
    >>> checked_projection([{"map": "scatter", "size": 5, "positions": None}, "identity", "shuffle"])
    (Scatter(size=5, positions=None), 'shuffle')
    >>> checked_projection(["linear"])
    'linear'
    """
    if not isinstance(given, (list, tuple)):
        return _checked_step(given)
    if not 1 <= len(given) <= _MOST:
        raise ConfigError(f"a projection that is a list composes 1 to {_MOST} maps; got {len(given)}")
    steps = [step for step in map(_checked_step, given) if step != "identity"]
    for step in map(_step_of, steps[:-1]):
        if not step.cls.linear:
            raise ConfigError(
                f"projection {step.name!r} is not linear, and only the last map of a chain may be nonlinear: put it "
                "last"
            )
    return tuple(steps) if len(steps) > 1 else (steps or ["identity"])[0]


def _checked_step(value: Any) -> str | MapSettings:
    if isinstance(value, Mapping):
        value = _settings_of(value)
    if not isinstance(value, MapSettings):
        return _step_of(
            value, "or the settings of a map, such as tnadapt.maps.Scatter(size=1000), or a list of these"
        ).name
    name = _name_of(value)
    try:
        return name if type(value)() == value else value
    except (TypeError, TnadaptError):  # it has no defaults
        return value


def _settings_of(stored: Mapping[str, Any]) -> MapSettings:
    if "map" not in stored:
        raise ConfigError(f"the settings of a map must be a mapping with its name as 'map'; got {safe_repr(stored)}")
    name = stored["map"]
    cls = MAPS.find(name).settings_class
    if cls is None:
        raise ConfigError(f"map {name!r} has no settings; give its name, projection={name!r}")
    return from_stored(cls, {key: value for key, value in stored.items() if key != "map"}, f"map {name!r}")


def projection_to_json(projection: Recipe) -> Any:
    """Return a projection as JSON knows it: a name, an object with the name as ``"map"``, or a list of these.

    Examples
    --------
    >>> from tnadapt.algebra.maps import Gather
    >>> projection_to_json((Gather(5), "dct2"))
    [{'map': 'gather', 'size': 5}, 'dct2']
    """
    if isinstance(projection, str):
        return projection
    if isinstance(projection, tuple):
        return [projection_to_json(step) for step in projection]
    fields = {field.name: getattr(projection, field.name) for field in dataclasses.fields(projection)}
    return {"map": _name_of(projection), **{name: _lists(value) for name, value in fields.items()}}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def projection_name(projection: Recipe) -> str:
    """Return a projection as a short text.

    Examples
    --------
    >>> from tnadapt.algebra.maps import Scatter
    >>> projection_name((Scatter(5), "dct2"))
    'scatter(size=5) → dct2'
    """
    if isinstance(projection, tuple):
        return " → ".join(projection_name(step) for step in projection)
    step = _step_of(projection)
    told = "" if step.settings is None else settings_text(step.settings, short=True)
    return f"{step.name}({told})" if told else step.name


def takes_ratio(projection: Recipe) -> bool:
    """Return whether ``Config.ratio`` determines the length before F; otherwise it must be 1.

    Examples
    --------
    >>> from tnadapt.algebra.maps import Scatter
    >>> takes_ratio((Scatter(5), "dct2")), takes_ratio("linear"), takes_ratio("shuffle")
    (False, True, False)
    """
    return _free(_steps(projection)) is not None


def is_linear(projection: Recipe) -> bool:
    """Return whether all maps of a projection are linear.

    Examples
    --------
    >>> is_linear(("shuffle", "linear")), is_linear("nonlinear")
    (True, False)
    """
    return all(step.cls.linear for step in _steps(projection))


def is_brought(projection: Recipe) -> bool:
    """Return whether a map of a projection has an array that the caller brings.

    Examples
    --------
    >>> is_brought("tied"), is_brought(("shuffle", "linear"))
    (True, False)
    """
    return any(issubclass(step.cls, BroughtMap) for step in _steps(projection))


def require_ratio_fits(projection: Recipe, on: str, ratio: float) -> None:
    """Raise a ConfigError if these fields of a config contradict each other."""
    steps = _steps(projection)
    for step in steps:
        if issubclass(step.cls, BroughtMap):
            raise ConfigError(
                f"projection {step.name!r} has an array that the caller brings, and only the map before the network "
                f"can have one: set before={step.name!r}, or use a map that is drawn, such as 'gather'"
            )
    if on == "vector":
        for step in steps:
            if step.cls.two_sided:
                raise ConfigError(
                    f"projection {step.name!r} works on the rows and columns of a weight, and on='vector' gives it the "
                    "long vector of a group: set on='weight'"
                )
    if ratio == 1.0 or _free(steps) is not None:
        return
    if all(step.cls.square for step in steps):
        raise ConfigError(
            f"ratio={ratio} needs a projection that changes the length; "
            f"projection={projection!r} does not: use projection='linear', or ratio=1"
        )
    raise ConfigError(
        f"ratio={ratio} sets the length before F, and the projection {projection_name(projection)} determines it by "
        "its own settings: leave ratio out"
    )


def _free(steps: Sequence[_Step]) -> int | None:
    """Return the index of the map in a chain whose input length ``ratio`` determines, or None if there is none."""
    # The first one that does not determine its own, if all before it preserve any length. Maps of matrices do not:
    # their length is that of a weight.
    for number, step in enumerate(steps):
        if not step.fixes_length:
            return number
        if not step.cls.square or step.cls.two_sided:
            return None
    return None


# -- Maps ------------------------------------------------------------------------------------------


def _build(steps: Sequence[_Step], codomain: Space, n_in: int | None, ratio: float, seed: int, group: int) -> Map:
    """Build the map of a chain with this output, where n_in or else the ratio sets the length of :func:`_free`."""
    seed, group = (
        integer("seed", seed, 0, (1 << 64) - 1, ConfigError),
        integer("group", group, 0, (1 << 32) - 1, ConfigError),
    )
    if len(steps) > 1 and group % THETA_STREAMS >= _STREAMS:
        raise ConfigError(f"a chain of maps can be drawn for {_STREAMS} groups, and {group} is beyond: use shared=True")
    if n_in is None:
        # The ratio is the decimal it prints as: 0.07 of 100 is 7, not 8.
        if not math.isfinite(ratio) or ratio <= 0.0:
            raise ConfigError(f"ratio must be finite and above 0; got {safe_repr(ratio)}")
        n_in = max(1, math.ceil(Fraction(str(ratio)) * codomain.length))
    free, parts = _free(steps), list[Map]()
    for number in reversed(range(len(steps))):
        name, cls, settings, fixes_length = steps[number]
        if cls.two_sided and codomain.shape is None:
            raise ConfigError(
                f"projection {name!r} works on the rows and columns of a weight, and its output is a vector of "
                f"{codomain.length} elements: set on='weight', and let only maps that preserve the length follow it"
            )
        if fixes_length:
            domain = cls.domain(codomain, settings)
        else:
            length = n_in if number == free else codomain.length
            domain = Space(length, codomain.shape if length == codomain.length else None)
        extra: dict[str, Any] = {} if settings is None else {"settings": settings}
        if cls.two_sided:
            extra["shape"] = codomain.shape
        part = cls(domain.length, codomain.length, seed, group + number * _STREAMS, **extra)
        part.kind = name
        parts.insert(0, part)
        codomain = domain
    return parts[0] if len(parts) == 1 else Chain(parts)


@checks_arguments
def input_length(projection: Recipe, size: int, ratio: float, shapes: Sequence[tuple[int, int]] | None = None) -> int:
    """Return the length before F of a group of so many elements, or of weights of these shapes.

    Examples
    --------
    >>> input_length("linear", 100, 0.07), input_length("wavelet", 30, 1.0, [(5, 6)])
    (7, 36)
    """
    if shapes is not None:
        return make_map_on_weights(projection, shapes, ratio).n_in
    return make_map(projection, None, integer("size", size, 1, MAX_SIZE, ConfigError), ratio=ratio).n_in


@checks_arguments
def make_map(
    kind: Recipe, n_in: int | None, n_out: int | None, seed: int = 0, group: int = 0, ratio: float = 1.0
) -> Map:
    """Return the map of a projection on vectors of these lengths.

    Parameters
    ----------
    kind : str, MapSettings or tuple of these
    n_in : int or None
        None if the projection or the ratio determines it.
    n_out, seed, group : int
    ratio : float
        Determines ``n_in`` if it is None and the projection does not.

    Raises
    ------
    ConfigError
        If there is no map with that name, or the lengths do not fit.

    Examples
    --------
    >>> make_map("shuffle", 4, 4, seed=1)
    Shuffle(n_in=4, n_out=4, seed=1, group=0)
    """
    steps = _steps(kind)
    n_in = None if n_in is None else integer("n_in", n_in, 1, MAX_SIZE, ConfigError)
    f = _build(steps, Space(integer("n_out", n_out, 1, MAX_SIZE, ConfigError)), n_in, ratio, seed, group)
    if n_in not in (None, f.n_in):
        if all(step.cls.square for step in steps):
            raise ConfigError(f"{kind!r} keeps the length; got n_in={n_in}, n_out={n_out}: use 'linear'")
        raise ConfigError(f"{projection_name(kind)} takes n_in={f.n_in}; got n_in={n_in}: leave n_in out")
    return f


@checks_arguments
def make_map_on_weights(
    kind: Recipe, shapes: Sequence[tuple[int, int]], ratio: float = 1.0, seed: int = 0, group: int = 0
) -> Map:
    """Return the map that applies a projection to each of these weights as a matrix.

    Parameters
    ----------
    kind : str, MapSettings or tuple of these
    shapes : sequence of (rows, cols)
    ratio : float
        ρ of each weight.
    seed, group : int

    Examples
    --------
    >>> make_map_on_weights("dct2", [(2, 3), (4, 4)]).n_in
    22
    """
    steps, shapes = _steps(kind), list(shapes)
    if not shapes:
        raise ConfigError("shapes must be those of at least one weight; got none")
    map_of = {
        (rows, cols): _build(steps, Space(rows * cols, (rows, cols)), None, ratio, seed, group)
        for rows, cols in dict.fromkeys(shapes)
    }
    parts = [map_of[shape] for shape in shapes]
    return parts[0] if len(parts) == 1 else PerWeight(parts)


# -- Projection: the class that users call -----------------------------------------------------------------------------


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
    freed with F. With Triton, CUDA devices keep nothing, or 4 bytes where float64 is slow (:doc:`/backends`).

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
        self._hold(kind, make_map(kind, n_in, n_out, seed, group))
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
        projection = cls.__new__(cls)
        projection._hold(kind, make_map_on_weights(kind, shapes, ratio, seed, group))
        projection.key = (kind, tuple(shapes), ratio, seed, group)
        return projection

    def _hold(self, kind: Any, map: Map) -> None:
        self.kind, self.map = kind, map
        self.n_in, self.n_out, self.seed, self.group = map.n_in, map.n_out, map.seed, map.group

    @checks_arguments
    def share(self, other: Projection, digest: bool = False) -> None:
        """Use the map of another projection with the same ``key``, and with ``digest`` its digest."""
        self.map = other.map
        if digest:
            self.__dict__["digest"] = other.digest

    def __repr__(self) -> str:
        recipe = self.kind if isinstance(self.kind, str) else projection_name(self.kind)
        return f"Projection({recipe!r}, n_in={self.n_in}, n_out={self.n_out}, seed={self.seed}, group={self.group})"

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
        projection = Projection.__new__(Projection)
        projection._hold(part.kind, part)
        projection.key = ("linear part", *self.key)
        return projection

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


#: The maps that :func:`fastfood` computes.
FASTFOOD = tuple(name for name in KINDS if not MAPS[name].square)


@checks_arguments
def fastfood(x: Array, size: int, *, seed: int = 0, kind: str = "linear", adjoint: bool = False) -> Array:
    """Compute fastfood, the paper's F, of a vector or a batch of vectors.

    Parameters
    ----------
    x : array, shape (…, n)
        Leading axes are a batch; real floating dtype.
    size : int
        Number of elements of the result.
    seed : int
        Seed of the draws.
    kind : {"linear", "linear_v2", "nonlinear", "nonlinear_v2"}
        As for :class:`Projection`.
    adjoint : bool
        Whether to compute ``Fᵀ x`` of the F that maps ``size`` to n elements; for the linear kinds.

    Returns
    -------
    array, shape (…, size)
        In the library, dtype and device of x; differentiable.

    Raises
    ------
    ShapeError
        If x has no axis, or no elements along the last one.
    ConfigError
        If size, seed or kind is none, or the adjoint of a nonlinear kind is asked for.
    BackendError
        If x is not an array of a known library or not real floating.

    Notes
    -----
    Equation (4) of the paper. This is ``Projection(kind, n, size, seed)(x)``, which draws F in every call; an object of
    that class draws it once, and has the other maps.

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.array([1.0, 2.0, 3.0]), np.arange(5.0)
    >>> bool(np.isclose(fastfood(x, 5) @ y, x @ fastfood(y, 3, adjoint=True)))
    True
    """
    get_backend(x, what="x").require_float(x, "x, the input of fastfood,")
    if not x.shape or x.shape[-1] < 1:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected (…, n), with one or more elements on the last axis")
    size = integer("size", size, 1, MAX_SIZE, ConfigError)
    name = MAPS.aliases.get(kind, kind)
    if name not in FASTFOOD:
        others = "; tnadapt.Projection has the other maps" if name in MAPS else ""
        raise ConfigError(f"kind must be one of {', '.join(map(repr, FASTFOOD))}; got {safe_repr(kind)}{others}")
    if not adjoint:
        return Projection(name, x.shape[-1], size, seed)(x)
    f = Projection(name, size, x.shape[-1], seed)
    if not f.linear:
        raise ConfigError(
            f"kind={kind!r} is nonlinear, and has an adjoint at a point only: use tnadapt.Projection({kind!r}, "
            f"n_in={size}, n_out={x.shape[-1]}, seed={seed}).adjoint(y, at=x)"
        )
    return f.adjoint(x)


def _in_float32(compute: Callable[..., Array], *arrays: Array) -> Array:
    """Call ``compute`` on arrays of at least single precision; round half precision once, at the end."""
    backend = get_backend(*arrays)
    dtype = backend.dtype_name(arrays[0])
    if dtype in ("float16", "bfloat16"):
        return backend.astype(compute(backend, *(backend.astype(x, "float32") for x in arrays)), dtype)
    return compute(backend, *arrays)


# -- F on several vectors at once, as the rows of one array ------------------------------------------------------------


def slices(backend: Backend, projection: Projection, vectors: Sequence[Array], start: int, stop: int) -> list[Array]:
    """Return elements ``start`` to ``stop - 1`` of F of each vector, by one call of F.

    Parameters
    ----------
    backend : Backend
    projection : Projection
    vectors : sequence of array, shape (n_in,)
    start, stop : int

    Returns
    -------
    list of array, shape (stop - start,)
        They may share memory with each other.
    """
    return _by_rows(backend, lambda x: projection.slice(x, start, stop), vectors)


def adjoints(backend: Backend, projection: Projection, vectors: Sequence[Array]) -> list[Array]:
    """Return the adjoint of a linear F of each vector, by one call, as :func:`slices`."""
    return _by_rows(backend, projection.adjoint, vectors)


def _by_rows(backend: Backend, compute: Callable[[Array], Array], vectors: Sequence[Array]) -> list[Array]:
    if len(vectors) == 1:
        return [compute(vectors[0])]
    rows = compute(backend.reshape(backend.concat(vectors), (len(vectors), vectors[0].shape[0])))
    return backend.split(backend.flatten(rows), [rows.shape[1]] * len(vectors))

"""What ``Config.projection`` says: a map's name, its settings, or a chain of these; and the map that it makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, TnadaptError, integer, safe_repr

from ..folding import MAX_SIZE
from ._brought import BroughtMap
from ._chain import Chain
from ._map import Map, Space
from ._map_registry import MAPS
from ._map_settings import MapSettings, settings_text
from ._per_weight import PerWeight

__all__ = [
    "ON",
    "Recipe",
    "checked_projection",
    "input_length",
    "is_brought",
    "is_linear",
    "make_map",
    "make_map_on_weights",
    "projection_name",
    "projection_to_json",
    "require_ratio_fits",
    "takes_ratio",
]

#: What a map is applied to: the vector of a group, or each of its weights as a matrix.
ON = ("vector", "weight")
# Element k of a chain draws with the group plus k times this, so that equal maps in a chain have different draws.
_STREAMS = 1 << 28
_MOST = 16
# Groups from here on are those of maps before the network (:mod:`tnadapt.algebra.theta`), of chains of up to 8 maps.
_THETA = 1 << 31

Recipe = str | MapSettings | tuple[str | MapSettings, ...]


class _Step(NamedTuple):
    """One map of a chain."""

    name: str
    settings: Any

    @property
    def cls(self) -> type[Map]:
        return MAPS.find(self.name)

    @property
    def fixes_length(self) -> bool:
        return self.cls.fixes_length(self.settings)


def _step_of(given: str | MapSettings) -> _Step:
    if isinstance(given, str):
        cls = MAPS.find(given)
        return _Step(given, None if cls.settings_class is None else _defaults(given, cls.settings_class))
    for name, cls in MAPS.items():
        if cls.settings_class is type(given):
            return _Step(name, given)
    raise ConfigError(
        f"{safe_repr(given)} are the settings of no registered map; call tnadapt.register_map(name, cls) with their "
        "map. If a class of this name was registered again since, create the settings again"
    )


def _defaults(name: str, cls: type[MapSettings]) -> MapSettings:
    required = [field.name for field in dataclasses.fields(cls) if _has_no_default(field)]
    try:
        return cls()
    except (TypeError, TnadaptError):
        shown = f"{cls.__name__}({', '.join(f'{field}=…' for field in required or _fields(cls))})"
        raise ConfigError(f"map {name!r} needs settings: projection=tnadapt.maps.{shown}") from None


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fields(cls: type[MapSettings]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _steps(projection: Recipe) -> list[_Step]:
    listed = projection if isinstance(projection, tuple) else (projection,)
    return [_step_of(given) for given in listed]


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
    found = [step for step in map(_checked_step, given) if step != "identity"]
    for step in map(_step_of, found[:-1]):
        if not step.cls.linear:
            raise ConfigError(
                f"projection {step.name!r} is not linear, and only the last map of a chain may be nonlinear: put it "
                "last"
            )
    if len(found) > 1:
        return tuple(found)
    return found[0] if found else "identity"


def _checked_step(given: Any) -> str | MapSettings:
    if isinstance(given, Mapping):
        given = _settings_of(given)
    if isinstance(given, MapSettings):
        step = _step_of(given)
        try:
            return step.name if type(given)() == given else given
        except (TypeError, TnadaptError):  # it has no defaults
            return given
    MAPS.find(given, "or the settings of a map, such as tnadapt.maps.Scatter(size=1000), or a list of these")
    _step_of(given)
    return str(given)


def _settings_of(stored: Mapping[str, Any]) -> MapSettings:
    if "map" not in stored:
        raise ConfigError(f"the settings of a map must be a mapping with its name as 'map'; got {safe_repr(stored)}")
    name = stored["map"]
    cls = MAPS.find(name).settings_class
    if cls is None:
        raise ConfigError(f"map {name!r} has no settings; give its name, projection={name!r}")
    known = _fields(cls)
    for key in stored:
        if key not in ("map", *known):
            there = f"its settings are {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"map {name!r} has no setting {safe_repr(key)}; {there}")
    try:
        return cls(**{key: _tuples(value) for key, value in stored.items() if key != "map"})
    except TnadaptError:
        raise
    except Exception as error:  # a field is missing, or the class refuses a value
        raise ConfigError(f"map {name!r}: {type(error).__name__}: {error}") from error


def _tuples(value: Any, depth: int = 4) -> Any:
    """Convert lists to tuples; a value that is nested more deeply stays a list, which no field may be."""
    if isinstance(value, list) and depth > 0:
        return tuple(_tuples(item, depth - 1) for item in value)
    return value


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
        return [projection_to_json(given) for given in projection]
    name = _step_of(projection).name
    return {"map": name, **{field: _lists(getattr(projection, field)) for field in _fields(type(projection))}}


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
        return " → ".join(projection_name(given) for given in projection)
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
    """Return which map of a chain has the length that ``ratio`` determines; None if the chain determines its own.

    It is the first one that does not determine the length of its input, if those before it preserve any length (which a
    map of matrices does not: its length is that of a weight).
    """
    for number, step in enumerate(steps):
        if not step.fixes_length:
            return number
        if not step.cls.square or step.cls.two_sided:
            return None
    return None


# -- Maps ------------------------------------------------------------------------------------------


def _length(ratio: float, size: int) -> int:
    # The ratio is the decimal it prints as: 0.07 of 100 is 7, not 8.
    if not math.isfinite(ratio) or ratio <= 0.0:
        raise ConfigError(f"ratio must be finite and above 0; got {safe_repr(ratio)}")
    return max(1, math.ceil(Fraction(str(ratio)) * size))


def _build(steps: Sequence[_Step], codomain: Space, free_length: int | None, seed: int, group: int) -> Map:
    """Return the map of a chain with this output; ``free_length`` is that before the map that :func:`_free` returns."""
    free, parts = _free(steps), list[Map]()
    if len(steps) > 1 and group % _THETA >= _STREAMS:
        raise ConfigError(f"a chain of maps can be drawn for {_STREAMS} groups, and {group} is beyond: use shared=True")
    for number in reversed(range(len(steps))):
        step = steps[number]
        cls, settings = step.cls, step.settings
        if cls.two_sided and codomain.shape is None:
            raise ConfigError(
                f"projection {step.name!r} works on the rows and columns of a weight, and its output is a vector of "
                f"{codomain.length} elements: set on='weight', and let only maps that preserve the length follow it"
            )
        if step.fixes_length:
            domain = cls.domain(codomain, settings)
        else:
            length = codomain.length if number != free or free_length is None else free_length
            domain = Space(length, codomain.shape if length == codomain.length else None)
        extra: dict[str, Any] = {} if settings is None else {"settings": settings}
        if cls.two_sided:
            extra["shape"] = codomain.shape
        made = cls(domain.length, codomain.length, seed, group + number * _STREAMS, **extra)
        made.kind = step.name
        parts.insert(0, made)
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
    kind: Recipe, n_in: int | None, n_out: int, seed: int = 0, group: int = 0, ratio: float | None = None
) -> Map:
    """Return the map of a projection on vectors of these lengths.

    Parameters
    ----------
    kind : str, MapSettings or tuple of these
    n_in : int or None
        None if the projection or the ratio determines it.
    n_out, seed, group : int
    ratio : float, optional
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
    n_out = integer("n_out", n_out, 1, MAX_SIZE, ConfigError)
    length = _length(1.0 if ratio is None else ratio, n_out) if n_in is None else n_in
    found = _build(steps, Space(n_out), length, seed, group)
    if n_in is not None and found.n_in != n_in:
        if all(step.cls.square for step in steps):
            raise ConfigError(f"{kind!r} keeps the length; got n_in={n_in}, n_out={n_out}: use 'linear'")
        raise ConfigError(f"{projection_name(kind)} takes n_in={found.n_in}; got n_in={n_in}: leave n_in out")
    return found


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
    steps, made, shapes = _steps(kind), dict[tuple[int, int], Map](), list(shapes)
    if not shapes:
        raise ConfigError("shapes must be those of at least one weight; got none")
    for rows, cols in shapes:
        if (rows, cols) not in made:
            size = rows * cols
            made[rows, cols] = _build(steps, Space(size, (rows, cols)), _length(ratio, size), seed, group)
    parts = [made[shape] for shape in shapes]
    return parts[0] if len(parts) == 1 else PerWeight(parts)

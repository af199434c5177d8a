"""Where the numbers of an array come from: trained, or frozen (from a seed, the base weights, the caller), or tied.

Each source is one class: those that compute an array from the base weights are in ``_from_base``, the others and their
contract in ``_source``. A new built-in source is one more class and one more line in :data:`SOURCES`; another package
calls ``tnadapt.register_source``. :class:`tnadapt.testing.SourceContract` checks both kinds. Users find the classes in
``tnadapt.sources``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tnadapt.errors import ConfigError, TnadaptError, safe_repr
from tnadapt.plugins import Registry

from ._from_base import OVERSAMPLING, BaseCore, FromBase, dominant_svd, leading_qr, minor_svd
from ._source import (
    FrozenArray,
    FrozenArrays,
    Given,
    Mixed,
    Multiplied,
    Origin,
    Place,
    Scaled,
    Seeded,
    Source,
    SourceMap,
    Stream,
    Tied,
    Trained,
    check_class,
    check_term,
    inner_source,
    origins_of,
)

__all__ = [
    "OVERSAMPLING",
    "SOURCES",
    "BaseCore",
    "FromBase",
    "FrozenArray",
    "FrozenArrays",
    "Given",
    "Mixed",
    "Multiplied",
    "Origin",
    "Place",
    "Scaled",
    "Seeded",
    "Source",
    "SourceMap",
    "Stream",
    "Tied",
    "Trained",
    "check_term",
    "dominant_svd",
    "inner_source",
    "leading_qr",
    "minor_svd",
    "origins_of",
    "register_source",
    "source_from_dict",
    "source_to_dict",
]

SOURCES: Registry[Source] = Registry(
    "source",
    Source,
    {
        "trained": Trained,
        "seeded": Seeded,
        "from-base": FromBase,
        "base-core": BaseCore,
        "given": Given,
        "tied": Tied,
        "scaled": Scaled,
        "mixed": Mixed,
    },
)
# A source within a source within …, as a hostile file may have it.
_MAX_DEPTH = 4


def register_source(name: str, cls: type[Source]) -> None:
    """Make a source known by a name, for ``Config(sources={array: cls(…)})`` and adapter files.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.sources.Source`: a frozen dataclass.

    Raises
    ------
    ConfigError
        If the name is not of that form, is built in, or registered by another module, or the class is not a Source, or
        not a frozen dataclass.

    See Also
    --------
    tnadapt.testing.SourceContract : The tests that such a class has to pass.

    Examples
    --------
    LoRA with a frozen factor, so that half of the numbers are trained:

    >>> import dataclasses
    >>> import tnadapt as tna
    >>> from tnadapt.algebra import rng
    >>> @dataclasses.dataclass(frozen=True)
    ... class Normal(tna.sources.Source):
    ...     std: float = 1.0
    ...     def array(self, shape, stream):
    ...         drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, shape[0] * shape[1])
    ...         return self.std * drawn.reshape(shape)
    >>> tna.register_source("normal", Normal)
    >>> plan = tna.SuperLoRA(tna.Config(rank=2, sources={"factor1": Normal(0.1)}), [(6, 4)])
    >>> plan.param_shapes, plan.frozen_shapes
    ({'group0.split0.factor0': (6, 2)}, {'group0.split0.factor1': (4, 2)})
    """
    SOURCES.check(name, cls)
    check_class(cls)
    SOURCES.register(name, cls)


def source_to_dict(source: Source) -> dict[str, Any]:
    """Return a source as JSON knows it: its registered name as ``"source"``, and its fields.

    Raises
    ------
    ConfigError
        If its class is not registered.

    Examples
    --------
    >>> source_to_dict(Trained())
    {'source': 'trained'}
    """
    name = next((name for name, cls in SOURCES.items() if cls is type(source)), None)
    if name is None:
        raise ConfigError(
            f"{safe_repr(source)} cannot be written: its class is not registered; call tnadapt.register_source(name, "
            f"{type(source).__name__}). If a class of this name was registered again since, create the source again"
        )
    fields = {field.name: _lists(getattr(source, field.name)) for field in dataclasses.fields(source)}
    return {"source": name, **fields}


def source_from_dict(settings: Mapping[str, Any]) -> Source:
    """Return the source of a dictionary that :func:`source_to_dict` wrote.

    Raises
    ------
    ConfigError
        If it is not a mapping, its name is not registered, or its fields are not those of the source.

    Examples
    --------
    >>> source_from_dict({"source": "trained"})
    Trained()
    >>> source_from_dict({"source": "trained", "seed": 1})
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: source 'trained' has no field 'seed'; it has no fields
    """
    return _from_dict(settings, _MAX_DEPTH)


def _from_dict(settings: Any, depth: int) -> Source:
    if depth == 0:
        raise ConfigError(f"sources are nested more than {_MAX_DEPTH} deep")
    if not isinstance(settings, Mapping) or "source" not in settings:
        raise ConfigError(f"a source must be a mapping with its name as 'source'; got {safe_repr(settings)}")
    name = settings["source"]
    cls = SOURCES.find(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in settings:
        if key not in ("source", *known):
            advice = f"its fields are {', '.join(known)}" if known else "it has no fields"
            raise ConfigError(f"source {name!r} has no field {safe_repr(key)}; {advice}")
    try:
        return cls(**{key: _read(value, depth) for key, value in settings.items() if key != "source"})
    except TnadaptError:
        raise
    except Exception as error:  # a field is missing, or the class refuses a value
        raise ConfigError(f"source {name!r}: {type(error).__name__}: {error}") from error


def _lists(value: Any) -> Any:
    if isinstance(value, Source):
        return source_to_dict(value)
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _read(value: Any, depth: int) -> Any:
    """Return the value of a field: a source for a mapping, a tuple for a list."""
    return _from_dict(value, depth - 1) if isinstance(value, Mapping) else _tuples(value)


def _tuples(value: Any, depth: int = 4) -> Any:
    """Convert lists to tuples; a value that is nested more deeply stays a list, which no field may be."""
    if isinstance(value, list) and depth > 0:
        return tuple(_tuples(item, depth - 1) for item in value)
    return value

"""The sources that a config names: array names to sources, immutable and hashable."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tnadapt.algebra._settings_class import require_frozen
from tnadapt.errors import ConfigError, safe_repr, summarize

from ._source import Source

__all__ = ["SourceMap", "check_class"]

# factor0, split1.factor0, term2.split1.factor0: the last part is the format's own name of the array.
_KEY = re.compile(r"(?:(?:term(?:0|[1-9]\d*)\.)?split(?:0|[1-9]\d*)\.)?[A-Za-z_]\w*")
_MAX_ENTRIES = 1 << 12


class SourceMap(Mapping[str, Source]):
    """Sources by the names of arrays; arrays without an entry are trained.

    Parameters
    ----------
    sources : mapping of str to Source
        A key is an array's last name (``"factor0"``, for that array in every split and term), or begins with its split
        (``"split0.factor0"``), or with its term and split (``"term1.split0.factor0"``). The longest key that fits an
        array counts.

    Raises
    ------
    ConfigError
        If a key is not such a name, a value is not a source, or a setting of a source cannot be stored in a file.

    Examples
    --------
    >>> from tnadapt.algebra.sources import Trained
    >>> found = SourceMap({"factor0": Trained()})
    >>> found.of("split2.factor0"), found == {"factor0": Trained()}
    (Trained(), True)
    """

    def __init__(self, sources: Mapping[str, Source] = types.MappingProxyType({})) -> None:
        if not isinstance(sources, Mapping):
            raise ConfigError(f"sources must be a mapping of names to sources; got {safe_repr(sources)}")
        self._sources = dict(sources)
        if len(self._sources) > _MAX_ENTRIES:
            raise ConfigError(f"sources has {len(self._sources)} entries; at most {_MAX_ENTRIES} are allowed")
        for key, source in self._sources.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ConfigError(
                    "a key of sources is the name of an array, such as 'factor0', 'split0.factor0' or "
                    f"'term0.split0.factor0'; got {safe_repr(key)}"
                )
            if not isinstance(source, Source):
                raise ConfigError(
                    f"sources[{key!r}] must be a source, such as tnadapt.sources.Trained(); got {safe_repr(source)}"
                )
            check_class(type(source))
            for field in dataclasses.fields(source):
                if not _is_plain(getattr(source, field.name)):
                    raise ConfigError(
                        f"sources[{key!r}]: {field.name} must be None, a boolean, an integer, a finite float, a "
                        f"string, a source or a tuple of these; got {safe_repr(getattr(source, field.name))}"
                    )

    def __getitem__(self, key: str) -> Source:
        return self._sources[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __hash__(self) -> int:
        return hash(frozenset(self._sources.items()))

    def __repr__(self) -> str:
        return repr(self._sources)

    def of(self, name: str) -> Source | None:
        """Return the source of a network's array, such as ``"term0.split1.factor0"``; None if no key fits."""
        keys = _keys_of(name)
        return next((self._sources[key] for key in keys if key in self._sources), None)

    def check_names(self, names: Collection[str]) -> None:
        """Raise a ConfigError if a key fits none of a network's arrays."""
        known = dict.fromkeys(key for name in names for key in _keys_of(name)[::-1])
        for key in self:
            if key not in known:
                raise ConfigError(
                    f"sources names {safe_repr(key)}, which fits no array; the arrays are "
                    f"{summarize([name for name in known if '.' not in name])}, in {summarize(list(names))}"
                )


def _keys_of(name: str) -> list[str]:
    """The keys that fit an array, the longest first."""
    parts = name.split(".")
    return [".".join(parts[skipped:]) for skipped in range(len(parts))]


def check_class(cls: type[Source]) -> None:
    """Raise a ConfigError unless the settings of a class are the fields of a frozen dataclass."""
    require_frozen(cls, f"source {cls.__name__}", "source")


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Return whether a file can hold a value and give it back."""
    if isinstance(value, tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, Source):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return depth > 0 and all(_is_plain(item, depth - 1) for item in fields)
    if isinstance(value, float):
        return type(value) is float and math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 64
    return value is None or type(value) in (bool, str)

"""Where each array of a group comes from in the end, after following ties and multipliers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from tnadapt.errors import ConfigError, safe_repr, summarize

from ._multiplied import Multiplied
from ._source import Source
from ._source_map import SourceMap
from ._tied import Tied
from ._trained import Trained

__all__ = ["Origin", "check_term", "inner_source", "origins_of"]


class Origin(NamedTuple):
    """Origin of the numbers of one array.

    Attributes
    ----------
    group : int
        Group of the array that has the numbers: another one's if the array is tied to it.
    name : str
        The network's name of that array.
    source : Source
        That array's source: trained, or one that computes it or takes it from the caller.
    multiplied : Multiplied or None
        The source whose multipliers multiply it, if there are any.
    owner : (int, str)
        Group and network's name of the array that the multipliers belong to.
    """

    group: int
    name: str
    source: Source
    multiplied: Multiplied | None
    owner: tuple[int, str]

    @property
    def key(self) -> tuple[int, str]:
        """Group and name of the array that has the numbers."""
        return self.group, self.name

    @property
    def learns(self) -> bool:
        """Whether anything of the array is trained."""
        return self.source.trained or self.multiplied is not None


def origins_of(sources: SourceMap, group: int, names: Collection[str], num_groups: int) -> dict[str, Origin]:
    """Return the origin of each array of a group, in order.

    Parameters
    ----------
    sources : SourceMap
    group : int
    names : collection of str
        The network's names of the arrays, the same for all groups.
    num_groups : int

    Raises
    ------
    ConfigError
        If an array is tied to one that does not exist, or in a circle.

    Notes
    -----
    An array that is tied to a scaled one shares its multipliers; one that is scaled itself, ``Scaled(Tied(…))``, has
    its own.

    Examples
    --------
    >>> names = ["split0.factor0", "split0.factor1"]
    >>> tied = SourceMap({"factor1": Tied("group0.split0.factor1")})
    >>> origins_of(tied, 3, names, 5)["split0.factor1"].key
    (0, 'split0.factor1')
    """
    return {name: _origin(sources, (group, name), names, num_groups) for name in names}


def _origin(sources: SourceMap, array: tuple[int, str], names: Collection[str], num_groups: int) -> Origin:
    source = sources.of(array[1]) or Trained()
    scaled = source if isinstance(source, Multiplied) else None
    root, own, ended, owner = _root(sources, array, source if scaled is None else scaled.of, names, num_groups)
    if scaled is None and ended is not None:
        return Origin(*root, own, ended, owner)
    return Origin(*root, own, scaled, array)


def _root(
    sources: SourceMap, array: tuple[int, str], source: Source, names: Collection[str], num_groups: int
) -> tuple[tuple[int, str], Source, Multiplied | None, tuple[int, str]]:
    """Follow ties: return the array that has the numbers, its source, and the multipliers on the way with owner."""
    seen = [array]
    while isinstance(source, Tied):
        group, name = source.target(array[0])
        if name not in names or group >= num_groups:
            raise ConfigError(
                f"sources ties {array[1]!r} to {safe_repr(source.to)}, which is not there: there are groups 0 to "
                f"{num_groups - 1} with the arrays {summarize(list(names))}"
            )
        if (group, name) == array:
            return array, Trained(), None, array  # the array that the others are tied to
        array = group, name
        if array in seen:
            circle = ", ".join(repr(name) for _, name in seen)
            raise ConfigError(f"sources ties {circle} in a circle, so that none of them has numbers: train one of them")
        seen.append(array)
        source = sources.of(name) or Trained()
        if isinstance(source, Multiplied):
            inner, own, _, _ = _root(sources, array, source.of, names, num_groups)
            return inner, own, source, array
    return array, source, None, array


def inner_source(source: Source) -> Source:
    """Return the source without its multipliers."""
    return source.of if isinstance(source, Multiplied) else source


def check_term(origins: Mapping[str, Origin], term: Collection[str]) -> None:
    """Raise a ConfigError if nothing of a term's arrays is trained."""
    if not any(origins[name].learns for name in term):
        raise ConfigError(
            f"sources freezes all of {', '.join(term)}, and nothing is left to train there: give one of them "
            "tnadapt.sources.Trained()"
        )

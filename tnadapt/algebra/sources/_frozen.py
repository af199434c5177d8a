"""The frozen arrays of one group: computed by their sources when they are first used, or brought by the caller."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.norms import rounded_to
from tnadapt.backends.fixed_arrays import FixedArrays
from tnadapt.errors import ConfigError, TnadaptError, safe_repr, summarize

from ._multiplied import Multiplied
from ._source import Source, SourceMap, Stream, Tied, Trained

__all__ = [
    "FrozenArray",
    "FrozenArrays",
    "Origin",
    "check_term",
    "inner_source",
    "origins_of",
]


# -- The frozen arrays of one group: computed by their sources when they are first used, or brought by the caller ------


class FrozenArray(NamedTuple):
    """One frozen array: what computes it.

    Attributes
    ----------
    full : str
        Name of the array in the plan's ``frozen_shapes``; that of the array it is tied to, if it is.
    source : Source
    shape : tuple of int
    stream : Stream
    """

    full: str
    source: Source
    shape: tuple[int, ...]
    stream: Stream

    def compute(self, stream: Stream | None = None) -> np.ndarray:
        """Compute the array in float32, or raise a ConfigError that names it; with another stream if one is given."""
        source, shape = self.source, self.shape
        try:
            found = np.asarray(source.array(shape, self.stream if stream is None else stream))
        except TnadaptError:
            raise
        except Exception as error:  # whatever another package raises
            raise ConfigError(
                f"{safe_repr(source)} failed to compute {self.full!r}: {type(error).__name__}: {error}"
            ) from error
        if found.shape != shape or found.dtype.kind != "f":
            raise ConfigError(
                f"{safe_repr(source)} must compute floating-point numbers of shape {shape} for {self.full!r}; it "
                f"returned {found.dtype} of shape {found.shape}"
            )
        with np.errstate(over="ignore"):
            single = found.astype(np.float32)
        if not np.isfinite(single).all():
            raise ConfigError(
                f"{safe_repr(source)} computes NaN, infinity, or numbers beyond float32 for {self.full!r}"
            )
        if not single.any():
            raise ConfigError(
                f"{safe_repr(source)} computes only zeros for {self.full!r}, so that nothing could be trained"
            )
        return single


class FrozenArrays(FixedArrays):
    """The frozen arrays of one group, by the network's names.

    Parameters
    ----------
    entries : mapping of str to FrozenArray
    given : mapping of str to ndarray, optional
        Arrays that are not computed, by their full names, in float32.

    Examples
    --------
    >>> FrozenArrays({}).entries
    {}
    """

    def __init__(self, entries: Mapping[str, FrozenArray], given: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.entries = dict(entries)
        self._given = {} if given is None else given  # filled in later if it is empty
        self._squares: dict[str, float] = {}  # of arrays that depend on the seed alone, which never change

    def make(self, key: Any) -> np.ndarray:
        """Return an array in float32, by its name, or by (name, dtype) with its values rounded to that dtype."""
        if isinstance(key, tuple):
            name, dtype = key
            rounded = rounded_to(self.make(name), dtype)
            if not np.isfinite(rounded).all():
                raise ConfigError(
                    f"{safe_repr(self.entries[name].source)} computes numbers for {name!r} that {dtype} cannot "
                    "represent; use float32"
                )
            return rounded
        entry = self.entries[key]
        given = self._given.get(entry.full)
        if given is not None:
            return given[tuple(map(slice, entry.shape))]
        if entry.source.brought:
            raise ConfigError(
                f"{entry.full!r} is an array that the caller brings: tnadapt.SuperLoRA(…, given={{{entry.full!r}: "
                "array}), or tnadapt.torch.attach(…, given=…)"
            )
        if entry.source.needs_base:
            raise ConfigError(
                f"{entry.full!r} is computed from the base weights: bind the plan to them with "
                "plan.with_base(weights); on a model that was on the meta device, call adapter.reset() once it has "
                "its weights"
            )
        return entry.compute()

    def mean_square(self, name: str) -> float:
        """Return the mean square of an array, rounded to eight bits so that all machines agree."""
        return self._square(name, self.entries[name].source.mean_square(self.entries[name].shape))

    def expected_square(self, name: str) -> float:
        """Return the same of an array, but for any base; see :meth:`Source.expected_square`."""
        return self._square(name, self.entries[name].source.expected_square(self.entries[name].shape))

    def _square(self, name: str, known: float | None) -> float:
        if known is None:
            entry = self.entries[name]
            changes = entry.full in self._given or entry.source.brought or entry.source.needs_base
            known = None if changes else self._squares.get(name)
            if known is None:
                known = _mean_square(self.host(name))
                if not changes:
                    self._squares[name] = known
        mantissa, exponent = math.frexp(known)
        return math.ldexp(round(mantissa * 256.0), exponent - 8)


def _mean_square(array: np.ndarray) -> float:
    wide = array.astype(np.float64).reshape(-1)
    return float(wide @ wide) / wide.size


# -- Where each array of a group comes from in the end, after following ties and multipliers ---------------------------


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

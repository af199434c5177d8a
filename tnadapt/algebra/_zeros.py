"""Which array of each term is zero at the start, so that ΔW is zero and its gradient is not.

The rules are those of :mod:`tnadapt.algebra.init`. An array is zero by itself, or by one of its trained multipliers.
Groups whose arrays are tied are decided together, in their order: what one group has chosen counts for the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from tnadapt.errors import ConfigError

from .network import Network
from .sources import Origin

__all__ = ["StartingGroup", "ZeroArray", "zero_arrays"]

# A group, and the network's name of an array or multiplier in it.
_Part = tuple[int, str]


class StartingGroup(NamedTuple):
    """What decides which arrays of a group are zero.

    Attributes
    ----------
    number : int
    network : Network
    origins : mapping of str to Origin
        Origin of each array; empty if the config has no sources.
    trained : collection of str or None
        The group's arrays and multipliers that are trained; None for all that are not frozen.
    """

    number: int
    network: Network
    origins: Mapping[str, Origin]
    trained: Collection[str] | None


class ZeroArray(NamedTuple):
    """The zero of one term of a group.

    Attributes
    ----------
    split : int
        Index of the array's split.
    name : str
        Its name in that split.
    multiplier : str
        The multiplier that is zero, ``"size"`` or ``"rank"``; empty if it is the array itself.
    part : (int, str)
        Group and name of the array or multiplier that is zero: in another group if it is tied to one there.
    """

    split: int
    name: str
    multiplier: str
    part: _Part


def zero_arrays(groups: Sequence[StartingGroup]) -> dict[int, list[ZeroArray]]:
    """Return the zero of each term of each group, by the groups' indices.

    Parameters
    ----------
    groups : sequence of StartingGroup
        All groups that have tied arrays in common, for a linear F.

    Raises
    ------
    ConfigError
        If more than one array of a term is zero, or none can be.

    Examples
    --------
    >>> from tnadapt import Config
    >>> zero_arrays([StartingGroup(0, Network(Config(rank=2), 24, 4), {}, None)])
    {0: [ZeroArray(split=0, name='factor0', multiplier='', part=(0, 'split0.factor0'))]}
    """
    choices = [_GroupChoice(group) for group in groups]
    zero = {part for choice in choices for part in choice.by_start()}
    # What occurs in a term that has its zero must not become another one.
    settled = set[_Part]()
    found = {choice.group.number: choice.chosen(zero, settled) for choice in choices}
    for choice in choices:
        choice.check(zero)
    return found


class _GroupChoice:
    """The choice for one group, given what is zero already."""

    def __init__(self, group: StartingGroup) -> None:
        self.group = group
        #: Prefixes of the terms of which something is trained.
        self._terms = None if group.trained is None else {name.partition("split")[0] for name in group.trained}

    def by_start(self) -> list[_Part]:
        """Return the multipliers that the ``start`` of their source makes zero, if they are trained."""
        found = []
        for array, origin in self.group.origins.items():
            if (
                origin.multiplied is not None
                and origin.multiplied.zero is not None
                and origin.owner == (self.group.number, array)
            ):
                part = f"{array}.{origin.multiplied.zero}"
                if self._trains(part):
                    found.append((self.group.number, part))
        return found

    def chosen(self, zero: set[_Part], settled: set[_Part]) -> list[ZeroArray]:
        """Return the zero of each term, and add what is chosen here to the two sets."""
        found = []
        for prefixes in self.group.network.prefixes:
            one = self._of_term(prefixes, zero, settled)
            zero.add(one.part)
            if self.group.origins:
                settled |= {part for array, _, _ in self._arrays(prefixes) for _, part in self._parts(array)}
            found.append(one)
        return found

    def check(self, zero: Collection[_Part]) -> None:
        """Raise a ConfigError if a term has more than one array that is zero."""
        for prefixes in self.group.network.prefixes if self.group.origins else ():
            arrays = [array for array, _, _ in self._arrays(prefixes) if self._zero_part(array, zero) is not None]
            if len(arrays) > 1:
                raise ConfigError(
                    f"sources makes {', '.join(arrays)} of group {self.group.number} all zero at the start, so that "
                    "their gradients are zero and nothing would learn; only one of them may be"
                )

    def _arrays(self, prefixes: Sequence[str]) -> list[tuple[str, int, str]]:
        """The arrays of a term in the order of preference: the network's name, the split, the name in the split."""
        splits = self.group.network.splits
        last = len(splits) - 1
        usual = prefixes[last] + splits[last].zero, last, splits[last].zero
        # CP weights are one number per component: make them zero only if nothing else is trained.
        others = [
            (prefixes[k] + name, k, name)
            for k in range(last, -1, -1)
            for name in sorted(splits[k].shapes, key=lambda name: name in splits[k].ones)
        ]
        return [usual, *(other for other in others if other != usual)]

    def _of_term(self, prefixes: Sequence[str], zero: Collection[_Part], settled: Collection[_Part]) -> ZeroArray:
        arrays = self._arrays(prefixes)
        for array, k, name in arrays:
            part = self._zero_part(array, zero)
            if part is not None:
                return ZeroArray(k, name, self._multiplier(array, part), part)
        # If none that is trained can be zero, another one must be nevertheless, so that the term contributes nothing.
        for trained_only in (True, False):
            for array, k, name in arrays:
                able = self._candidates(prefixes, array, trained_only)
                part = next((part for part in able if part not in settled), None)
                if part is not None:
                    return ZeroArray(k, name, self._multiplier(array, part), part)
        raise ConfigError(
            f"none of {', '.join(array for array, _, _ in arrays)} can be zero at the start: each one that is trained "
            "occurs twice in the product, or in another one that has its zero. Tie fewer of them"
        )

    def _multiplier(self, array: str, part: _Part) -> str:
        origin = self.group.origins.get(array)
        if origin is None or origin.multiplied is None or (origin.source.trained and part == origin.key):
            return ""
        return part[1].rpartition(".")[2]

    def _parts(self, array: str) -> list[tuple[str, _Part]]:
        """The trained array and multipliers of an array: their names in the group, and where they are."""
        origin = self.group.origins.get(array)
        if origin is None:
            return [(array, (self.group.number, array))]
        found = [(array, origin.key)] if origin.source.trained else []
        if origin.multiplied is not None:
            group, owner = origin.owner
            found += [(f"{array}.{name}", (group, f"{owner}.{name}")) for name in origin.multiplied.multipliers]
        return found

    def _zero_part(self, array: str, zero: Collection[_Part]) -> _Part | None:
        """Return what makes an array zero already; None if nothing does."""
        return next((part for _, part in self._parts(array) if part in zero), None)

    def _candidates(self, prefixes: Sequence[str], array: str, trained_only: bool) -> list[_Part]:
        """Return what of an array can be chosen as zero: itself, and its multipliers."""
        origin = self.group.origins.get(array)
        if origin is not None and origin.source.trained:
            term = [self.group.origins[other].key for other, _, _ in self._arrays(prefixes)]
            if term.count(origin.key) > 1:
                return []  # a product of an array with itself has no gradient where the array is zero
        return [part for name, part in self._parts(array) if self._trains(name) or not trained_only]

    def _trains(self, name: str) -> bool:
        """Return whether an array or multiplier is trained; in a term of which nothing is, all count as trained."""
        if self._terms is None or self.group.trained is None or name in self.group.trained:
            return True
        return name.partition("split")[0] not in self._terms

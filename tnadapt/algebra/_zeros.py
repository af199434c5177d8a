"""Which array of each term is zero at the start, so that ΔW is zero and its gradient is not.

The rules are those of :mod:`tnadapt.algebra.init`. An array is zero by itself, or by one of its trained diagonals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from tnadapt.errors import ConfigError

from .network import Network
from .sources import Origin

__all__ = ["ZeroArray", "ZeroChoice"]


class ZeroArray(NamedTuple):
    """The zero of one term.

    Attributes
    ----------
    split : int
        Index of the array's split.
    name : str
        Its name in that split.
    part : str or None
        The group's own array or diagonal that is zero, by its name in the group; None if the array is tied to one that
        is zero.
    """

    split: int
    name: str
    part: str | None

    @property
    def diagonal(self) -> str:
        """The diagonal that is zero, ``"size"`` or ``"rank"``; empty if it is the array itself."""
        last = "" if self.part is None else self.part.rpartition(".")[2]
        return "" if last == self.name else last


class ZeroChoice:
    """The choice of the zero arrays of a group with a linear F.

    Parameters
    ----------
    network : Network
    group : int
    trained : collection of str or None
        The group's arrays and diagonals that are trained; None for all that are not frozen.
    origins : mapping of str to Origin
        Origin of each array; empty if the config has no sources.
    zeros_of : callable
        Returns what is zero in another group, by its index.

    Attributes
    ----------
    terms : list of ZeroArray
        One for each term.

    Raises
    ------
    ConfigError
        If more than one array of a term is zero, or none can be.

    Examples
    --------
    >>> from tnadapt import Config
    >>> ZeroChoice(Network(Config(rank=2), 24, 4), 0, None, {}, lambda group: ()).terms
    [ZeroArray(split=0, name='factor0', part='split0.factor0')]
    """

    def __init__(
        self,
        network: Network,
        group: int,
        trained: Collection[str] | None,
        origins: Mapping[str, Origin],
        zeros_of: Callable[[int], Collection[str]],
    ) -> None:
        self.network, self.group, self.trained, self.origins = network, group, trained, origins
        self._elsewhere = zeros_of
        self._parts = set[str]()
        self.terms: list[ZeroArray] = []
        for prefixes in network.prefixes:
            found = self._of_term(prefixes)
            self.terms.append(found)
            if found.part is not None:
                self._parts.add(found.part)
        # A later term may have made a second array of an earlier one zero.
        for prefixes in network.prefixes if origins else ():
            self._need_one([array for array, _, _ in self._arrays(prefixes) if self._is_zero(array)])

    def _arrays(self, prefixes: Sequence[str]) -> list[tuple[str, int, str]]:
        """The arrays of a term in the order of preference: the network's name, the split, the name in the split."""
        splits = self.network.splits
        last = len(splits) - 1
        usual = prefixes[last] + splits[last].zero, last, splits[last].zero
        # CP weights are one number per component: make them zero only if nothing else is trained.
        others = [
            (prefixes[k] + name, k, name)
            for k in range(last, -1, -1)
            for name in sorted(splits[k].shapes, key=lambda name: name in splits[k].ones)
        ]
        return [usual, *(other for other in others if other != usual)]

    def _of_term(self, prefixes: Sequence[str]) -> ZeroArray:
        arrays = self._arrays(prefixes)
        zero = [(array, k, name) for array, k, name in arrays if self._is_zero(array) or self._by_start(array)]
        self._need_one([array for array, _, _ in zero])
        for array, k, name in zero:
            return ZeroArray(k, name, self._by_start(array))
        # If none that is trained can be, another one must be zero nevertheless, so that the term contributes nothing.
        for trained_only in (True, False):
            for array, k, name in arrays:
                part = self._candidate(prefixes, array, trained_only)
                if part is not None:
                    return ZeroArray(k, name, part)
        raise ConfigError(
            f"none of {', '.join(array for array, _, _ in arrays)} can be zero at the start: each one that is trained "
            "is tied to an array that is not zero, or occurs twice. Tie fewer of them"
        )

    @staticmethod
    def _need_one(zero: Sequence[str]) -> None:
        if len(zero) > 1:
            raise ConfigError(
                f"sources makes {', '.join(zero)} all zero at the start, so that their gradients are zero and nothing "
                "would learn; only one of them may be"
            )

    def _is_zero(self, array: str) -> bool:
        """Return whether an array is zero by what has been chosen so far, here or in the group it is tied to."""
        origin = self.origins.get(array)
        if origin is None:
            return array in self._parts
        if origin.source.trained and origin.name in self._zeros_of(origin.group):
            return True
        if origin.scaled is None:
            return False
        group, owner = origin.owner
        return any(f"{owner}.{diagonal}" in self._zeros_of(group) for diagonal in origin.scaled.diagonals)

    def _zeros_of(self, group: int) -> Collection[str]:
        return self._parts if group == self.group else self._elsewhere(group)

    def _by_start(self, array: str) -> str | None:
        """Return the diagonal of an array of this group that the ``start`` of its source makes zero, if any."""
        origin = self.origins.get(array)
        if origin is None or origin.scaled is None or origin.owner != (self.group, array):
            return None
        part = f"{array}.{origin.scaled.zero}"
        return part if origin.scaled.zero is not None and self._trains(part) else None

    def _candidate(self, prefixes: Sequence[str], array: str, trained_only: bool) -> str | None:
        """Return the array, or the diagonal of it, that can be chosen as zero; None if there is none."""
        origin = self.origins.get(array)
        if origin is None:
            return array if self._trains(array) or not trained_only else None
        term = [self.origins[other].key for other, _, _ in self._arrays(prefixes)]
        if origin.source.trained and term.count(origin.key) > 1:
            return None  # a product of an array with itself has no gradient where the array is zero
        own = [array] if origin.source.trained and origin.key == (self.group, array) else []
        if origin.scaled is not None and origin.owner == (self.group, array):
            own += [f"{array}.{diagonal}" for diagonal in origin.scaled.diagonals]
        return next((part for part in own if self._trains(part) or not trained_only), None)

    def _trains(self, part: str) -> bool:
        """Return whether an array or diagonal is trained; in a term of which nothing is, all count as trained."""
        if self.trained is None or part in self.trained:
            return True
        term = part.partition("split")[0]
        return not any(other.startswith(f"{term}split") for other in self.trained)

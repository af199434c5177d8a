"""Families of settings of growing size, and the largest of one that a budget has room for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA, parameter_count
from tnadapt.errors import TnadaptError

from ._freedom import degrees_of_freedom

__all__ = ["Family", "Found", "Ladder", "Search"]


class Ladder(NamedTuple):
    """Settings by a size from 1 upward, with which their parameters grow.

    Attributes
    ----------
    config : callable
        The setting of a size.
    most : callable
        From the plan of size 1, the size beyond which more parameters buy nothing.
    """

    config: Callable[[int], Config]
    most: Callable[[SuperLoRA], int]


Family = Sequence[Ladder]


class Found(NamedTuple):
    """A setting and what it costs.

    Attributes
    ----------
    config : Config
    parameters : int
    """

    config: Config
    parameters: int


def _parameters(found: Found) -> int:
    return found.parameters


class Search:
    """Settings on given weights, each counted once.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
    layers : sequence of hashable, optional
        One key a weight.

    Examples
    --------
    >>> from tnadapt import presets
    >>> lora = Ladder(presets.lora, lambda plan: 768)
    >>> search = Search([(768, 768)] * 24)
    >>> search.largest([lora], 100_000)
    Found(config=Config(rank=2, ...), parameters=73728)
    >>> search.least([lora]).parameters
    36864
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], layers: Sequence[Hashable] | None = None) -> None:
        self.shapes, self.layers = shapes, layers
        self._counted = functools.cache(self._count)
        self._most = functools.cache(self._at_most)

    def least(self, family: Family) -> Found | None:
        """The smallest setting of a family; None where none suits the weights."""
        firsts = [found for ladder in family if (found := self._counted(ladder, 1))]
        return min(firsts, key=lambda found: found.parameters, default=None)

    def largest(self, family: Family, allowed: int, worth: Callable[[Found], int] = _parameters) -> Found | None:
        """Of each ladder of a family the setting with the most parameters that are no more than allowed; of these the
        one that is worth most, by its parameters or as given. None if there is none."""
        found = [one for ladder in family if (one := self._largest(ladder, allowed))]
        return max(found, key=worth) if len(found) > 1 else next(iter(found), None)

    def adapter(self, config: Config) -> SuperLoRA:
        """A setting on these weights."""
        return SuperLoRA(config, self.shapes, self.layers)

    def freedom(self, found: Found) -> int:
        """What a setting may be worth: its degrees of freedom."""
        return degrees_of_freedom(self.adapter(found.config))

    def _largest(self, ladder: Ladder, allowed: int) -> Found | None:
        best = self._counted(ladder, 1)
        if best is None or best.parameters > allowed:
            return None
        low, high = 1, self._most(ladder)
        while low < high:
            middle = (low + high + 1) // 2
            found = self._counted(ladder, middle)
            if found is not None and found.parameters <= allowed:
                best, low = found, middle
            else:
                high = middle - 1
        return best

    def _count(self, ladder: Ladder, size: int) -> Found | None:
        try:
            config = ladder.config(size)
            return Found(config, parameter_count(config, self.shapes, self.layers))
        except TnadaptError:  # a setting that does not suit these weights
            return None

    def _at_most(self, ladder: Ladder) -> int:
        return max(1, ladder.most(self.adapter(ladder.config(1))))

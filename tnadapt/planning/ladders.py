"""The settings of a family in order of size, and the search for the largest within a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from tnadapt.algebra.config import Config
from tnadapt.algebra.known_weights import KnownWeights
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import TnadaptError

from ._freedom import degrees_of_freedom

__all__ = ["Family", "Found", "Ladder", "Search", "by_factors"]


class Ladder(NamedTuple):
    """Settings indexed by a size from 1 upward, with a growing number of parameters.

    Attributes
    ----------
    config : callable
        Returns the setting of a size.
    most : callable
        Returns, given the plan of size 1, the size beyond which more parameters gain nothing.
    """

    config: Callable[[int], Config]
    most: Callable[[SuperLoRA], int]


Family = Sequence[Ladder]


def by_factors(plan: SuperLoRA) -> int:
    """Return the smallest size of a factored mode, beyond which a rank gains nothing."""
    return min(shape[0] for group, _ in plan.alike for name, shape in group.network.shapes.items() if ".factor" in name)


class CountedPlan(SuperLoRA):
    """A plan whose arrays are counted, and whose groups are laid out only when they are used.

    A search makes thousands of plans, of which it lays out a few.

    Examples
    --------
    >>> from tnadapt import presets
    >>> CountedPlan(presets.lora(4), [(768, 768)] * 10_000).num_parameters
    61440000
    """

    def _lay_out(self) -> None:
        """Do nothing."""


class Found(NamedTuple):
    """A setting and its number of parameters.

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
    """Search for settings on given weights; the parameters of each setting are counted once and cached.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
    layers : sequence of hashable, optional
        One key per weight.
    roles : sequence of hashable, optional
        One key per weight.

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

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        layers: Sequence[Hashable] | None = None,
        roles: Sequence[Hashable] | None = None,
    ) -> None:
        self.shapes = shapes if isinstance(shapes, KnownWeights) else KnownWeights(shapes, layers, roles)
        self.layers, self.roles = layers, roles
        self._counted = functools.cache(self._count)
        self._most = functools.cache(self._at_most)

    def least(self, family: Family) -> Found | None:
        """Return the smallest setting of a family; None if no setting fits the weights."""
        firsts = [found for ladder in family if (found := self._counted(ladder, 1))]
        return min(firsts, key=lambda found: found.parameters, default=None)

    def largest(self, family: Family, allowed: int, worth: Callable[[Found], int] = _parameters) -> Found | None:
        """Return the largest setting of a family within a number of parameters; None if there is none.

        If the family has several ladders, return the one of their largest settings with the highest ``worth``, by
        default the number of parameters.
        """
        found = [one for ladder in family if (one := self._largest(ladder, allowed))]
        return max(found, key=worth) if len(found) > 1 else next(iter(found), None)

    def adapter(self, config: Config) -> SuperLoRA:
        """Return the plan of a setting on these weights, whose groups are laid out when they are used."""
        return CountedPlan(config, self.shapes, self.layers, self.roles)

    def freedom(self, found: Found) -> int:
        """Return the degrees of freedom of a setting; a ``worth`` for :meth:`largest`."""
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
            return Found(config, self.adapter(config).num_parameters)
        except TnadaptError:  # the setting does not fit these weights
            return None

    def _at_most(self, ladder: Ladder) -> int:
        return max(1, ladder.most(self.adapter(ladder.config(1))))

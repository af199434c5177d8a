"""The user's choice of the methods that a study compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError

from ._budget import check_budget, within
from .grid import Method, Shapes, check_settings, default_methods, head_alone, methods_of

__all__ = ["Choice", "Chooser"]


class Chooser(Protocol):
    """The interface of a choice of methods."""

    def methods(self, shapes: Shapes, layers: int) -> list[Method]:
        """Return the methods to compare on weights of these shapes in ``layers`` layers."""
        ...


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Choice:
    """The methods to compare; the head alone is always included.

    Attributes
    ----------
    presets : tuple of str
    ranks : tuple of int
    changes : mapping
        Other fields of the config.
    budgets : tuple of int
        Instead of the three above: see :func:`within`.
    short : bool
        Use the shorter default grid if nothing else is chosen.
    """

    presets: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    short: bool = False

    @property
    def _named(self) -> bool:
        return bool(self.presets or self.ranks or self.changes)

    def check(self) -> None:
        """Refuse what no weights could fit.

        Raises
        ------
        TnadaptError
            If a preset or a setting is unknown or out of range, or budgets and settings are given.

        Examples
        --------
        >>> Choice(budgets=(100,), ranks=(3,)).check()
        Traceback (most recent call last):
        tnadapt.errors.TnadaptError: a budget finds the settings itself; give a budget or settings, not both
        """
        if self.budgets and self._named:
            raise TnadaptError("a budget finds the settings itself; give a budget or settings, not both")
        for budget in self.budgets:
            check_budget(budget)
        if self._named:
            check_settings(self.presets, self.ranks, self.changes)

    def methods(self, shapes: Shapes, layers: int) -> list[Method]:
        """Return the methods to compare on weights of these shapes in ``layers`` layers.

        Raises
        ------
        TnadaptError
            If a preset is unknown, a setting does not fit, or a budget is too small.
        """
        self.check()
        if self.budgets:
            found = [method for budget in self.budgets for method in within(budget, shapes)]
            return [head_alone(), *found]
        if self._named:
            return [head_alone(), *methods_of(self.presets, self.ranks, self.changes, shapes, layers)]
        return default_methods(self.short)

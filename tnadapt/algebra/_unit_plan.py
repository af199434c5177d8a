"""Units of the parameters of a plan, and the plan whose parameters are in these units."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, Self

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends.array_types import ArrayT
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr, summarize

from ._adam_units import term_product
from ._rank_plan import RankPlan
from ._rates import RATES
from .group import Group
from .network import Network

__all__ = ["UnitPlan"]


class UnitPlan(RankPlan):
    """A plan with units, in which its parameters are trained.

    Files, :meth:`init` and :meth:`deltas` have the arrays themselves. ``training_plan`` is the same plan in units:
    ``array = unit * parameter``.
    """

    _in_units = False

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """The unit of each parameter, by its name in ``param_shapes``: a power of two, as ``config.rate`` says.

        Adam at the rate η in ``training_plan`` is Adam at the rate ``η * unit`` of each parameter in this plan. All are
        1 for ``rate="sgd"``; docs/learning_rate.rst has the rule for "adam".

        Examples
        --------
        >>> import tnadapt as tna
        >>> tna.SuperLoRA(tna.presets.lora(4), [(64, 64)] * 8).units["group0.split0.factor0"]
        2.0
        """
        return self.units_for(self.config.rate)

    @checks_arguments
    def units_for(self, rate: str) -> dict[str, float]:
        """Return the units of another value of ``config.rate``.

        Parameters
        ----------
        rate : "adam" or "sgd"

        Returns
        -------
        dict of str to float
            Powers of two, by the names in ``param_shapes``.
        """
        if rate not in RATES:
            raise ConfigError(f"rate must be one of {', '.join(map(repr, RATES))}; got {safe_repr(rate)}")
        return RATES[rate](self, self.shapes)

    @functools.cached_property
    def file_plan(self) -> Self:
        """The plan whose parameters are the arrays in files: itself, unless it is a ``training_plan``."""
        return self

    @functools.cached_property
    def training_plan(self) -> Self:
        """The plan whose parameters an optimizer trains: ``array = unit * parameter``; itself if all units are 1.

        It computes the same updates at the same cost, as the units become part of the scale of its networks.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.SuperLoRA(tna.presets.lora(4), [(64, 64)] * 8)
        >>> training = plan.training_plan
        >>> params = training.init()
        >>> deltas = training.deltas(params)  # and after some steps of an optimizer
        >>> arrays = training.to_arrays(params)  # for tnadapt.save
        >>> bool(np.array_equal(plan.deltas(arrays)[0], deltas[0])), list(arrays) == list(plan.init())
        (True, True)
        """
        if self._in_units or all(unit == 1.0 for unit in self.units.values()):
            return self
        return self.with_units(self.units)

    @checks_arguments
    def with_units(self, units: Mapping[str, float]) -> Self:
        """Return the plan whose parameters are in these units; see :attr:`training_plan`.

        Parameters
        ----------
        units : mapping of str to float
            A power of two for each name in ``param_shapes``.

        Raises
        ------
        ConfigError
            If the units of the arrays of a term have another product than those of the other terms of its group.
        """
        if missing := self.param_shapes.keys() - units:
            raise ConfigError(f"units must have each name of param_shapes; missing: {summarize(missing)}")
        found = object.__new__(type(self))
        own = {"units", "training_plan", "file_plan", "arrays_plan", "alike", "groups", "theta"}
        found.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        found._in_units, found._units, found.file_plan = True, dict(units), self
        found.units = dict.fromkeys(self.param_shapes, 1.0)
        found.theta = None if self.theta is None else self.theta.in_units(units)
        found.groups = self._groups_in(units)
        return found

    @functools.cached_property
    def arrays_plan(self) -> Self:
        """The plan of the updates alone, whose parameters are the arrays of this one, in their units.

        Itself, unless ``config.before`` makes them from θ, or ``config.apply`` adds parameters of the weights.
        """
        if not self._in_units:
            return super().arrays_plan
        alone = self.file_plan.arrays_plan
        if alone is self.file_plan:
            return self
        if self.theta is not None:
            return alone  # θ has a unit, and the arrays that it makes have none
        return alone.with_units({name: self._units[name] for name in alone.param_shapes})

    def _groups_in(self, units: Mapping[str, float]) -> list[Group]:
        if self.theta is not None:
            return self.groups
        networks: dict[tuple[int, float], Network] = {}
        return [_in_units(group, units, networks) for group in self.groups]

    @checks_arguments
    def to_arrays(self, params: Mapping[str, ArrayT]) -> dict[str, ArrayT]:
        """Return the arrays of the ``file_plan`` from the parameters of this plan, exactly.

        Parameters
        ----------
        params : mapping of str to array
            For all or some names in ``param_shapes``, of any library.

        Returns
        -------
        dict of str to array
            Of the same library and dtype; differentiable.

        Notes
        -----
        Units are powers of two: nothing is rounded, unless a number leaves the range of its dtype (float16).
        """
        return {name: _times(param, self._units.get(name, 1.0)) for name, param in params.items()}

    @checks_arguments
    def from_arrays(self, arrays: Mapping[str, ArrayT]) -> dict[str, ArrayT]:
        """Return the parameters of this plan from the arrays of its ``file_plan``: the inverse of :meth:`to_arrays`.

        Parameters
        ----------
        arrays : mapping of str to array
            For all or some names in ``param_shapes``, of any library.

        Returns
        -------
        dict of str to array
            Of the same library and dtype; differentiable.
        """
        return {name: _times(array, 1.0 / self._units.get(name, 1.0)) for name, array in arrays.items()}

    _units: Mapping[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        if self._in_units:
            return _with_units, (self.file_plan, dict(self._units))
        return self._reduced()

    def _reduced(self) -> tuple[Any, ...]:
        raise NotImplementedError


def _with_units(plan: UnitPlan, units: Mapping[str, float]) -> UnitPlan:
    return plan.with_units(units)


def _times(array: Array, factor: float) -> Array:
    return array if factor == 1.0 else array * factor


def _in_units(group: Group, units: Mapping[str, float], networks: dict[tuple[int, float], Network]) -> Group:
    product = term_product(group, units)
    key = id(group.network), product
    network = networks.get(key)
    if network is None:
        network = networks[key] = copy.copy(group.network)
        network.scale = group.network.scale * product
    own = {name: units[full] for name, full in group.names.items()}
    return group._replace(network=network, start=group.start.in_units(own))

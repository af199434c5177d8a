"""The settings that ``plan`` compares, as families in order of size, and the search for the largest within a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.layout import KnownWeights
from tnadapt.algebra.presets import PRESETS, AdaptedWeights, Ladder, by_factors
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.errors import TnadaptError

from ._matrix_rank import degrees_of_freedom

# -- The search for the largest setting within a budget ----------------------------------------------------------------


Family = Sequence[Ladder]


class Found(NamedTuple):
    """A setting and its number of parameters.

    Attributes
    ----------
    config : Config
    parameters : int
    """

    config: Config
    parameters: int


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
        self._most = functools.cache(lambda ladder: max(1, ladder.most(self.adapter(ladder.config(1)))))

    def least(self, family: Family) -> Found | None:
        """Return the smallest setting of a family; None if no setting fits the weights."""
        firsts = [setting for ladder in family if (setting := self._counted(ladder, 1))]
        return min(firsts, key=lambda setting: setting.parameters, default=None)

    def largest(
        self, family: Family, allowed: int, worth: Callable[[Found], int] = attrgetter("parameters")
    ) -> Found | None:
        """Return the largest setting of a family within a number of parameters; None if there is none.

        If the family has several ladders, return the one of their largest settings with the highest ``worth``, by
        default the number of parameters.
        """
        settings = [setting for ladder in family if (setting := self._largest(ladder, allowed))]
        return max(settings, key=worth) if len(settings) > 1 else next(iter(settings), None)

    def adapter(self, config: Config) -> UpdatePlan:
        """Return the plan of a setting on these weights, whose groups are laid out when they are used."""
        return UpdatePlan(config, self.shapes, self.layers, self.roles, lay_out=False)

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
            setting = self._counted(ladder, middle)
            if setting is not None and setting.parameters <= allowed:
                best, low = setting, middle
            else:
                high = middle - 1
        return best

    def _count(self, ladder: Ladder, size: int) -> Found | None:
        try:
            config = ladder.config(size)
            return Found(config, self.adapter(config).num_parameters)
        except TnadaptError:  # the setting does not fit these weights
            return None


# -- The families that plan compares: table 1 of the paper, between them, and others -----------------------------------


Shapes = Sequence[tuple[int, int]]

ORDERS = (3, 4, 5)
RATIOS = (0.1, 0.01, 0.001)


def usual(shapes: Shapes) -> list[Family]:
    """Return the families of the most common methods: one per method, with a single group.

    Examples
    --------
    >>> len(usual([(768, 768)] * 24))
    8
    """
    weights = AdaptedWeights(shapes)
    lorta = PRESETS["lorta"].ladders(weights)  # of orders 3, 4 and 5
    lora, lokr, lonkr, superlora, fastfood = (
        PRESETS[name].ladders(weights) for name in ("lora", "lokr", "lonkr", "superlora", "fastfood")
    )
    return [lora, lokr, lonkr, lorta[:1], lorta[2:], superlora, projected(weights), fastfood]


def families(
    shapes: Shapes, layers: Sequence[Hashable] | None = None, roles: Sequence[Hashable] | None = None
) -> list[Family]:
    """Return all families: the usual ones, related methods, other orders and formats, more groups, and others.

    Examples
    --------
    >>> len(families([(768, 768)] * 24))
    35
    """
    weights = AdaptedWeights(shapes, layers, roles)
    families = [*usual(shapes), PRESETS["loha"].ladders(weights), PRESETS["krona"].ladders(weights)]
    if weights.uniform and len(shapes) > 1:
        rows, cols = shapes[0]
        lotr = functools.partial(presets.lotr, weights=len(shapes), rows=rows, cols=cols)
        families.append([Ladder(lotr, by_factors)])
    if roles is not None and 1 < len(set(roles)) < len(shapes):
        # The search omits these if the weights of a role differ in shape.
        families.append([Ladder(functools.partial(presets.lotr, groups="role"), by_factors)])
    lorta = PRESETS["lorta"].ladders(weights)
    families += [lorta[1:2], _changed(lorta[2:], projection="linear", ratio=0.01)]
    families += [[_hypercube(form, order, 1)] for form in ("cp", "tt") for order in ORDERS]
    for groups in _groups(shapes, layers, roles):
        # For square weights, one group per weight is LoRA.
        if groups != "weight" or any(rows != cols for rows, cols in shapes):
            families.append(_changed(PRESETS["superlora"].ladders(weights), groups=groups))
        families += [[_hypercube("cp", 3, groups)], _changed(lorta[:1], groups=groups)]
        families.append(_changed(PRESETS["lonkr"].ladders(weights), groups=groups))
    return [*families, *few(weights), PRESETS["dense"].ladders(weights)]


def few(weights: AdaptedWeights) -> list[Family]:
    """Return the families of presets that join the paper's methods, and of those of other packages.

    The built-in ones have few parameters, and a largest rank that is known without arrays of the weights' size.
    """
    return [
        PRESETS[name].ladders(weights)
        for name in PRESETS.installed()
        if PRESETS[name].planned or name not in PRESETS.built_in
    ]


def groups_between(weights: int) -> list[int]:
    """Return numbers of groups between one and one per weight: the divisors nearest to weights^(1/3) and weights^(2/3).

    Examples
    --------
    >>> groups_between(24), groups_between(2), groups_between(7)
    ([3, 8], [], [])
    """
    divisors = [g for g in range(2, weights) if weights % g == 0]
    ideal = (weights ** (1 / 3), weights ** (2 / 3))
    return sorted({min(divisors, key=lambda g: abs(math.log(g / wish))) for wish in ideal}) if divisors else []


def _groups(shapes: Shapes, layers: Sequence[Hashable] | None, roles: Sequence[Hashable] | None) -> list[Any]:
    """Return the values of ``Config.groups`` to compare, except 1."""
    if len(shapes) == 1:
        return []
    keys = {"layer": layers, "role": roles}
    several = [name for name, values in keys.items() if values is not None and 1 < len(set(values)) < len(shapes)]
    return [*groups_between(len(shapes)), *several, "weight"]


def projected(weights: AdaptedWeights) -> Family:
    """Return SuperLoRA with the linear F, at several ratios."""
    ladders = PRESETS["superlora"].ladders(weights)
    return [ladder for ratio in RATIOS for ladder in _changed(ladders, projection="linear", ratio=ratio)]


def _changed(family: Family, **changes: Any) -> Family:
    return [Ladder(functools.partial(ladder.config, **changes), ladder.most) for ladder in family]


def _hypercube(form: str, order: int, groups: Any) -> Ladder:
    """Return CP or tensor trains of some order."""
    most = _by_count if form == "cp" else _by_bonds
    return Ladder(lambda rank: Config(rank, order, groups=groups, fold="hypercube", format=form, rate="adam"), most)


def _by_count(plan: UpdatePlan) -> int:
    """Return the rank at which all elements of CP of order 3 or more are free; ranks above the sizes still help."""
    networks = [group.network for group, _ in plan.alike]
    return max(network.size // (sum(network.sizes) - len(network.sizes) + 1) for network in networks)


def _by_bonds(plan: UpdatePlan) -> int:
    """Return the largest useful rank of a tensor train: the elements on the smaller side of a bond."""
    sizes = max(group.network.sizes for group, _ in plan.alike)
    cuts = range(1, len(sizes))
    return max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in cuts)

"""The settings that ``plan`` compares, as families in order of size: the paper's methods, and all presets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.layout import KnownWeights
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import TnadaptError

from ._matrix_rank import degrees_of_freedom

__all__ = [
    "FEWEST",
    "LARGEST_DENSE",
    "PRESET_FAMILIES",
    "AdaptedWeights",
    "Family",
    "Found",
    "Ladder",
    "Search",
    "families",
    "usual",
]


# -- A family: settings in order of size, and the search for the largest within a budget -------------------------------


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
        return SuperLoRA(config, self.shapes, self.layers, self.roles, lay_out=False)

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


# -- All presets as families -------------------------------------------------------------------------------------------


#: The largest θ of TinyLoRA, whose random matrix is dense and is drawn in each step.
LARGEST_DENSE = 4096


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """What families are made for.

    Attributes
    ----------
    shapes : sequence of (rows, cols)
    layers, roles : sequence of hashable, optional
        One key per weight.
    head_size : int, optional
        Rows of an attention head, if every weight consists of heads.
    """

    shapes: Sequence[tuple[int, int]]
    layers: Sequence[Hashable] | None = None
    roles: Sequence[Hashable] | None = None
    head_size: int | None = None

    @functools.cached_property
    def size(self) -> int:
        """Number of elements of all weights."""
        return sum(rows * cols for rows, cols in self.shapes)

    @functools.cached_property
    def side(self) -> int:
        """The shorter side of the smallest weight, beyond which a matrix rank gains nothing."""
        return min(min(shape) for shape in self.shapes)

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether all weights have one shape."""
        return len(set(self.shapes)) == 1


class PresetFamily(NamedTuple):
    """A preset as a family.

    Attributes
    ----------
    title : str
        As its paper writes it.
    family : callable
        Returns the settings for given weights; none if it does not fit them.
    """

    title: str
    family: Callable[[AdaptedWeights], Family]


# -- Settings in order of size --------------------------------------------------------------------


def _up_to(most: int) -> Callable[[SuperLoRA], int]:
    return lambda plan: most


def _single(make: Callable[[], Config]) -> Ladder:
    return Ladder(lambda _: make(), _up_to(1))


def _ranks(preset: Callable[..., Config]) -> Callable[[AdaptedWeights], Family]:
    """Return the ranks up to the shorter side of the weights."""
    return lambda weights: [Ladder(preset, _up_to(weights.side))]


def _joint(preset: Callable[..., Config], **more: Any) -> Callable[[AdaptedWeights], Family]:
    """Return the ranks of a preset that stacks the weights of a group, which have one shape."""

    def family(weights: AdaptedWeights) -> Family:
        groups: Any = 1 if weights.uniform else "role"
        return [Ladder(functools.partial(preset, groups=groups, **more), _up_to(4 * weights.side))]

    return family


def _heads(preset: Callable[..., Config]) -> Callable[[AdaptedWeights], Family]:
    return lambda weights: [] if weights.head_size is None else _joint(preset, head_size=weights.head_size)(weights)


def _values(preset: Callable[..., Config]) -> Callable[[AdaptedWeights], Family]:
    """Return the numbers of values of each weight, as many as the smallest weight has elements."""
    return lambda weights: [Ladder(preset, _up_to(min(rows * cols for rows, cols in weights.shapes)))]


def _of_theta(
    preset: Callable[..., Config], dimensions: Callable[[AdaptedWeights, int], int], first: int, most: int = 1 << 40
) -> Callable[[AdaptedWeights], Family]:
    """Return the sizes of θ, up to the dimensions of what it determines; ranks from ``first`` in powers of two.

    Of equal sizes, the search takes the first: the smallest rank with enough dimensions.
    """

    def family(weights: AdaptedWeights) -> Family:
        ranks = [first << step for step in range(16) if first << step <= max(first, weights.side)]
        return [
            Ladder(functools.partial(_swapped, preset, rank), _up_to(min(most, dimensions(weights, rank))))
            for rank in ranks
            if dimensions(weights, rank) >= 1
        ]

    return family


def _swapped(preset: Callable[..., Config], rank: int, parameters: int) -> Config:
    return preset(parameters, rank)


def _of_factors(weights: AdaptedWeights, rank: int) -> int:
    return sum(rank * (rows + cols) for rows, cols in weights.shapes)


def _of_cores(weights: AdaptedWeights, rank: int) -> int:
    return len(weights.shapes) * rank * rank


def _of_one_array(weights: AdaptedWeights, rank: int) -> int:
    return rank * weights.side


def _divisors(weights: AdaptedWeights) -> list[int]:
    common = math.gcd(*itertools.chain(*weights.shapes))
    return [size for size in range(1, common + 1) if common % size == 0]


def _lonkr_family(weights: AdaptedWeights) -> Family:
    side = math.isqrt(weights.size - 1) + 1
    return [
        Ladder(functools.partial(presets.lonkr, splits=splits, split_size=f), by_factors)
        for splits in (2, 3, 4)
        for f in range(2, min(33, side + 1))
        if f ** (splits - 1) <= side
    ]


def _lorta_family(weights: AdaptedWeights) -> Family:
    return [Ladder(functools.partial(presets.lorta, order=order), by_factors) for order in (3, 4, 5)]


def _projected_family(weights: AdaptedWeights) -> Family:
    return [
        Ladder(functools.partial(presets.superlora, projection="linear", ratio=ratio), by_factors)
        for ratio in (0.1, 0.01, 0.001)
    ]


def _fastfood(weights: AdaptedWeights) -> Family:
    # With ten decimals of ρ, the number of parameters is within one of the budget for 10^10 elements.
    def config(size: int) -> Config:
        return presets.fastfood(math.floor(size / weights.size * 1e10) / 1e10 or 1e-10)

    return [Ladder(config, _up_to(weights.size))]


def _gralora(weights: AdaptedWeights) -> Family:
    return [Ladder(lambda size: presets.gralora(2 * size, 2), _up_to(max(1, weights.side // 2)))]


def _compacter(weights: AdaptedWeights) -> Family:
    return [
        Ladder(functools.partial(presets.compacter, terms=terms), _up_to(max(1, weights.side // terms)))
        for terms in (2, 4, 8)
        if weights.side >= terms
    ]


def _quanta(weights: AdaptedWeights) -> Family:
    """Return circuits of two to four digits, as balanced as the common divisors of the sides allow."""
    divisors = [size for size in _divisors(weights) if size > 1]
    several = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(divisors, number) for number in (1, 2, 3)
    )
    fitting = [digits for digits in several if weights.side % math.prod(digits) == 0]
    return [_single(functools.partial(presets.quanta, digits)) for digits in fitting]


def _c3a(weights: AdaptedWeights) -> Family:
    return [_single(functools.partial(presets.c3a, block)) for block in _divisors(weights)]


def _miss(weights: AdaptedWeights) -> Family:
    return [_single(functools.partial(presets.miss, size)) for size in _divisors(weights)]


def _randlora(weights: AdaptedWeights) -> Family:
    rows, cols = max(weights.shapes, key=lambda shape: shape[0] * shape[1])

    def config(terms: int) -> Config:
        return presets.randlora(-(-weights.side // terms), rows=rows, cols=cols)

    return [Ladder(config, _up_to(min(weights.side, 64)))]


def _svft(weights: AdaptedWeights) -> Family:
    return [Ladder(presets.svft, _up_to(weights.side))]


def _vera(weights: AdaptedWeights) -> Family:
    # Its rank only sets the length of a diagonal: its paper goes beyond the sides of the weights.
    return [Ladder(presets.vera, _up_to(4 * max(max(shape) for shape in weights.shapes)))]


def _square(preset: Callable[..., Config]) -> Callable[[AdaptedWeights], Family]:
    return lambda weights: [Ladder(preset, by_factors)]


#: By the name of the preset.
PRESET_FAMILIES: Mapping[str, PresetFamily] = MappingProxyType(
    {
        "lora": PresetFamily("LoRA", _ranks(presets.lora)),
        "lokr": PresetFamily("LoKr", _square(presets.lokr)),
        "krona": PresetFamily("KronA", lambda weights: [_single(presets.krona)]),
        "loha": PresetFamily("LoHa", _ranks(presets.loha)),
        "lonkr": PresetFamily("LoNKr", _lonkr_family),
        "lotr": PresetFamily("LoTR", _joint(presets.lotr)),
        "lorta": PresetFamily("LoRTA", _lorta_family),
        "lorta_cp": PresetFamily("LoRTA (CP)", _heads(presets.lorta_cp)),
        "fastfood": PresetFamily("fastfood", _fastfood),
        "superlora": PresetFamily("SuperLoRA", _square(presets.superlora)),
        "superlora-projected": PresetFamily("SuperLoRA + F", _projected_family),
        "fact_tt": PresetFamily("FacT-TT", _joint(presets.fact_tt)),
        "fact_tk": PresetFamily("FacT-TK", _joint(presets.fact_tk)),
        "cara": PresetFamily("CaRA", _heads(presets.cara)),
        "metatt": PresetFamily("MetaTT", _joint(presets.metatt)),
        "gralora": PresetFamily("GraLoRA", _gralora),
        "compacter": PresetFamily("Compacter", _compacter),
        "quanta": PresetFamily("QuanTA", _quanta),
        "shira": PresetFamily("SHiRA", _values(presets.shira)),
        "fourierft": PresetFamily("FourierFT", _values(presets.fourierft)),
        "loca": PresetFamily("LoCA", _values(presets.loca)),
        "waveft": PresetFamily("WaveFT", _values(presets.waveft)),
        "c3a": PresetFamily("C3A", _c3a),
        "miss": PresetFamily("MiSS", _miss),
        "lora_fa": PresetFamily("LoRA-FA", _ranks(presets.lora_fa)),
        "share_lora": PresetFamily("ShareLoRA", _ranks(presets.share_lora)),
        "tied_lora": PresetFamily("Tied-LoRA", _ranks(presets.tied_lora)),
        "vera": PresetFamily("VeRA", _vera),
        "randlora": PresetFamily("RandLoRA", _randlora),
        "lora_xs": PresetFamily("LoRA-XS", _ranks(presets.lora_xs)),
        "svft": PresetFamily("SVFT", _svft),
        "craft": PresetFamily("CRAFT", _ranks(presets.craft)),
        "tinylora": PresetFamily("TinyLoRA", _of_theta(presets.tinylora, _of_cores, 2, LARGEST_DENSE)),
        "unilora": PresetFamily("Uni-LoRA", _of_theta(presets.unilora, _of_factors, 4)),
        "nola": PresetFamily("NOLA", _of_theta(presets.nola, _of_one_array, 4)),
        "dora": PresetFamily("DoRA", _ranks(presets.dora)),
        "hira": PresetFamily("HiRA", _ranks(presets.hira)),
    }
)


# -- The families that plan compares: table 1 of the paper, between them, and others -----------------------------------


Shapes = Sequence[tuple[int, int]]

ORDERS = (3, 4, 5)
RATIOS = (0.1, 0.01, 0.001)
#: Presets of the literature with very few parameters whose largest rank is known without arrays of the weights' size.
FEWEST = ("lora_xs", "tinylora", "unilora", "vera")


def usual(shapes: Shapes) -> list[Family]:
    """Return the families of the most common methods: one per method, with a single group.

    Examples
    --------
    >>> len(usual([(768, 768)] * 24))
    8
    """
    size = sum(rows * cols for rows, cols in shapes)
    return [
        [Ladder(presets.lora, by_factors)],
        [Ladder(presets.lokr, by_factors)],
        _lonkr(1, size),
        [_lorta(3, 1)],
        [_lorta(5, 1)],
        [Ladder(presets.superlora, by_factors)],
        [_projected(presets.superlora, ratio) for ratio in RATIOS],
        # With ten decimals of ρ, the number of parameters is within one of the budget for 10^10 elements.
        [Ladder(lambda n: presets.fastfood(math.floor(n / size * 1e10) / 1e10 or 1e-10), lambda plan: plan.size)],
    ]


def families(
    shapes: Shapes, layers: Sequence[Hashable] | None = None, roles: Sequence[Hashable] | None = None
) -> list[Family]:
    """Return all families: the usual ones, related methods, other orders and formats, more groups, and others.

    Examples
    --------
    >>> len(families([(768, 768)] * 24))
    35
    """
    size = sum(rows * cols for rows, cols in shapes)
    found = [*usual(shapes), [Ladder(presets.loha, by_factors)], [Ladder(lambda _: presets.krona(), lambda _: 1)]]
    if len(set(shapes)) == 1 and len(shapes) > 1:
        (rows, cols), weights = shapes[0], len(shapes)
        lotr = functools.partial(presets.lotr, weights=weights, rows=rows, cols=cols)
        found.append([Ladder(lotr, by_factors)])
    if roles is not None and 1 < len(set(roles)) < len(shapes):
        # Left out by the search where the weights of a role differ in shape.
        found.append([Ladder(functools.partial(presets.lotr, groups="role"), by_factors)])
    found += [[_lorta(4, 1)], [_projected(functools.partial(presets.lorta, order=5), 0.01)]]
    found += [[_cp(order, 1)] for order in ORDERS] + [[_train(order, 1)] for order in ORDERS]
    for groups in _groups(shapes, layers, roles):
        # For square weights, one group per weight is LoRA.
        if groups != "weight" or any(rows != cols for rows, cols in shapes):
            found.append([Ladder(functools.partial(presets.superlora, groups=groups), by_factors)])
        found += [[_cp(3, groups)], [_lorta(3, groups)], _lonkr(groups, size)]
    own = AdaptedWeights(shapes, layers, roles)
    found += [PRESET_FAMILIES[name].family(own) for name in FEWEST]
    return [*found, [Ladder(lambda _: presets.dense(), lambda _: 1)]]


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
    """Return the values of ``Config.groups`` to compare other than 1."""
    if len(shapes) == 1:
        return []
    keys = {"layer": layers, "role": roles}
    several = [name for name, given in keys.items() if given is not None and 1 < len(set(given)) < len(shapes)]
    return [*groups_between(len(shapes)), *several, "weight"]


def _lonkr(groups: Any, size: int) -> Family:
    """Return ladders for several K and f whose dense splits together are no larger than the hypercube."""
    side = math.isqrt(size - 1) + 1
    factors = [f for f in (*range(2, 33), *range(33, 257, 4)) if f <= side]
    return [
        Ladder(functools.partial(presets.lonkr, groups=groups, splits=k, split_size=f), by_factors)
        for k in (2, 3, 4)
        for f in factors
        if f ** (k - 1) <= side
    ]


def _lorta(order: int, groups: Any) -> Ladder:
    return Ladder(functools.partial(presets.lorta, order=order, groups=groups), by_factors)


def _projected(preset: Any, ratio: float) -> Ladder:
    return Ladder(functools.partial(preset, projection="linear", ratio=ratio), by_factors)


def _cp(order: int, groups: Any) -> Ladder:
    return Ladder(
        lambda rank: Config(rank, order, groups=groups, fold="hypercube", format="cp", rate="adam"), _by_count
    )


def _train(order: int, groups: Any) -> Ladder:
    return Ladder(
        lambda rank: Config(rank, order, groups=groups, fold="hypercube", format="tt", rate="adam"), _by_bonds
    )


def _by_count(plan: SuperLoRA) -> int:
    """Return the rank of CP of an order above 2 at which all elements are free; ranks above the sizes still help."""
    networks = [group.network for group, _ in plan.alike]
    return max(network.size // (sum(network.sizes) - len(network.sizes) + 1) for network in networks)


def _by_bonds(plan: SuperLoRA) -> int:
    """Return the largest useful rank of a tensor train: the number of elements on the smaller side of a bond."""
    sizes = max(group.network.sizes for group, _ in plan.alike)
    cuts = range(1, len(sizes))
    return max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in cuts)

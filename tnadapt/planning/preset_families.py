"""All presets as families: for each, its settings in order of size on given weights."""

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
from tnadapt.algebra.superlora import SuperLoRA

from .ladders import Family, Ladder, by_factors

__all__ = ["LARGEST_DENSE", "PRESET_FAMILIES", "AdaptedWeights", "PresetFamily"]

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


def _lonkr(weights: AdaptedWeights) -> Family:
    side = math.isqrt(weights.size - 1) + 1
    return [
        Ladder(functools.partial(presets.lonkr, splits=splits, split_size=f), by_factors)
        for splits in (2, 3, 4)
        for f in range(2, min(33, side + 1))
        if f ** (splits - 1) <= side
    ]


def _lorta(weights: AdaptedWeights) -> Family:
    return [Ladder(functools.partial(presets.lorta, order=order), by_factors) for order in (3, 4, 5)]


def _projected(weights: AdaptedWeights) -> Family:
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
        "lonkr": PresetFamily("LoNKr", _lonkr),
        "lotr": PresetFamily("LoTR", _joint(presets.lotr)),
        "lorta": PresetFamily("LoRTA", _lorta),
        "lorta_cp": PresetFamily("LoRTA (CP)", _heads(presets.lorta_cp)),
        "fastfood": PresetFamily("fastfood", _fastfood),
        "superlora": PresetFamily("SuperLoRA", _square(presets.superlora)),
        "superlora-projected": PresetFamily("SuperLoRA + F", _projected),
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

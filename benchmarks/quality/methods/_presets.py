"""The presets of tnadapt: for each, its settings in order of size, searched by :mod:`tnadapt.planning`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from tnadapt import presets
from tnadapt import torch as tnt
from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.planning import known_as
from tnadapt.planning.ladders import Family, Ladder, Search

from ..facts import Facts
from ._method import Method, Setting, UnfitError

__all__ = ["LARGEST_DENSE", "PRESETS", "Preset"]

#: The largest θ of TinyLoRA, whose random matrix is dense and is drawn in each step.
LARGEST_DENSE = 4096


class Preset(Method):
    """A preset with the settings that it offers for given weights."""

    library = "tnadapt"

    def __init__(self, name: str, title: str, family: Callable[[Facts], Family]) -> None:
        self.name, self.title, self.family = name, title, family

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        family = self.family(facts)
        search = _search(facts)
        found = search.largest(family, budget) if family else None
        if found is None:
            least = search.least(family) if family else None
            raise UnfitError(
                f"needs at least {least.parameters:,} parameters" if least else "does not fit the shapes of the weights"
            )
        return self.setting(budget, _short(known_as(found.config).label), found.parameters, found.config.to_dict())

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        config = Config.from_dict(setting.values).replace(seed=seed)
        tnt.attach(model, config, targets)
        return model


def _short(label: str) -> str:
    """Return the rank alone of a setting that has no name, whose other fields say which preset it is.

    Examples
    --------
    >>> _short("TT, M = 4, weights/2 × 2 × rows × cols, axes 3, 0, 1, 2, r = 6"), _short("K = 2, f = 30, r = 7")
    ('r = 6', 'K = 2, f = 30, r = 7')
    """
    return label.rpartition(", ")[2] if label.startswith(("TT", "Tucker", "batched", "weighted", "M = 5, w")) else label


@functools.lru_cache(maxsize=8)
def _search(facts: Facts) -> Search:
    return Search(facts.shapes, facts.layers, facts.roles)


# -- Settings in order of size --------------------------------------------------------------------


def _up_to(most: int) -> Callable[[SuperLoRA], int]:
    return lambda plan: most


def _by_factors(plan: SuperLoRA) -> int:
    """Return the smallest size of a factored mode, beyond which a rank gains nothing."""
    return min(shape[0] for group, _ in plan.alike for name, shape in group.network.shapes.items() if ".factor" in name)


def _single(make: Callable[[], Config]) -> Ladder:
    return Ladder(lambda _: make(), _up_to(1))


def _ranks(preset: Callable[..., Config]) -> Callable[[Facts], Family]:
    """Return the ranks up to the shorter side of the weights."""
    return lambda facts: [Ladder(preset, _up_to(facts.side))]


def _joint(preset: Callable[..., Config], **more: Any) -> Callable[[Facts], Family]:
    """Return the ranks of a preset that stacks the weights of a group, which have one shape."""

    def family(facts: Facts) -> Family:
        groups: Any = 1 if facts.uniform else "role"
        return [Ladder(functools.partial(preset, groups=groups, **more), _up_to(4 * facts.side))]

    return family


def _heads(preset: Callable[..., Config]) -> Callable[[Facts], Family]:
    return lambda facts: [] if facts.head_size is None else _joint(preset, head_size=facts.head_size)(facts)


def _values(preset: Callable[..., Config]) -> Callable[[Facts], Family]:
    """Return the numbers of values of each weight, as many as the smallest weight has elements."""
    return lambda facts: [Ladder(preset, _up_to(min(rows * cols for rows, cols in facts.shapes)))]


def _of_theta(
    preset: Callable[..., Config], dimensions: Callable[[Facts, int], int], first: int, most: int = 1 << 40
) -> Callable[[Facts], Family]:
    """Return the sizes of θ, up to the dimensions of what it determines; ranks from ``first`` in powers of two.

    Of equal sizes, the search takes the first: the smallest rank with enough dimensions.
    """

    def family(facts: Facts) -> Family:
        ranks = [first << step for step in range(16) if first << step <= max(first, facts.side)]
        return [
            Ladder(functools.partial(_swapped, preset, rank), _up_to(min(most, dimensions(facts, rank))))
            for rank in ranks
            if dimensions(facts, rank) >= 1
        ]

    return family


def _swapped(preset: Callable[..., Config], rank: int, parameters: int) -> Config:
    return preset(parameters, rank)


def _of_factors(facts: Facts, rank: int) -> int:
    return sum(rank * (rows + cols) for rows, cols in facts.shapes)


def _of_cores(facts: Facts, rank: int) -> int:
    return len(facts.shapes) * rank * rank


def _of_one_array(facts: Facts, rank: int) -> int:
    return rank * facts.side


def _divisors(facts: Facts) -> list[int]:
    common = math.gcd(*itertools.chain(*facts.shapes))
    return [size for size in range(1, common + 1) if common % size == 0]


def _lonkr(facts: Facts) -> Family:
    side = math.isqrt(facts.size - 1) + 1
    return [
        Ladder(functools.partial(presets.lonkr, splits=splits, split_size=f), _by_factors)
        for splits in (2, 3, 4)
        for f in range(2, min(33, side + 1))
        if f ** (splits - 1) <= side
    ]


def _lorta(facts: Facts) -> Family:
    return [Ladder(functools.partial(presets.lorta, order=order), _by_factors) for order in (3, 4, 5)]


def _projected(facts: Facts) -> Family:
    return [
        Ladder(functools.partial(presets.superlora, projection="linear", ratio=ratio), _by_factors)
        for ratio in (0.1, 0.01, 0.001)
    ]


def _fastfood(facts: Facts) -> Family:
    # With ten decimals of ρ, the number of parameters is within one of the budget for 10^10 elements.
    def config(size: int) -> Config:
        return presets.fastfood(math.floor(size / facts.size * 1e10) / 1e10 or 1e-10)

    return [Ladder(config, _up_to(facts.size))]


def _gralora(facts: Facts) -> Family:
    return [Ladder(lambda size: presets.gralora(2 * size, 2), _up_to(max(1, facts.side // 2)))]


def _compacter(facts: Facts) -> Family:
    return [
        Ladder(functools.partial(presets.compacter, terms=terms), _up_to(max(1, facts.side // terms)))
        for terms in (2, 4, 8)
        if facts.side >= terms
    ]


def _quanta(facts: Facts) -> Family:
    """Return circuits of two to four digits, as balanced as the common divisors of the sides allow."""
    divisors = [size for size in _divisors(facts) if size > 1]
    several = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(divisors, number) for number in (1, 2, 3)
    )
    fitting = [digits for digits in several if facts.side % math.prod(digits) == 0]
    return [_single(functools.partial(presets.quanta, digits)) for digits in fitting]


def _c3a(facts: Facts) -> Family:
    return [_single(functools.partial(presets.c3a, block)) for block in _divisors(facts)]


def _miss(facts: Facts) -> Family:
    return [_single(functools.partial(presets.miss, size)) for size in _divisors(facts)]


def _randlora(facts: Facts) -> Family:
    rows, cols = max(facts.shapes, key=lambda shape: shape[0] * shape[1])

    def config(terms: int) -> Config:
        return presets.randlora(-(-facts.side // terms), rows=rows, cols=cols)

    return [Ladder(config, _up_to(min(facts.side, 64)))]


def _svft(facts: Facts) -> Family:
    return [Ladder(presets.svft, _up_to(facts.side))]


def _vera(facts: Facts) -> Family:
    # Its rank only sets the length of a diagonal: its paper goes beyond the sides of the weights.
    return [Ladder(presets.vera, _up_to(4 * max(max(shape) for shape in facts.shapes)))]


def _square(preset: Callable[..., Config]) -> Callable[[Facts], Family]:
    return lambda facts: [Ladder(preset, _by_factors)]


_TABLE: tuple[tuple[str, str, Callable[[Facts], Family]], ...] = (
    ("lora", "LoRA", _ranks(presets.lora)),
    ("lokr", "LoKr", _square(presets.lokr)),
    ("krona", "KronA", lambda facts: [_single(presets.krona)]),
    ("loha", "LoHa", _ranks(presets.loha)),
    ("lonkr", "LoNKr", _lonkr),
    ("lotr", "LoTR", _joint(presets.lotr)),
    ("lorta", "LoRTA", _lorta),
    ("lorta_cp", "LoRTA (CP)", _heads(presets.lorta_cp)),
    ("fastfood", "fastfood", _fastfood),
    ("superlora", "SuperLoRA", _square(presets.superlora)),
    ("superlora-projected", "SuperLoRA + F", _projected),
    ("fact_tt", "FacT-TT", _joint(presets.fact_tt)),
    ("fact_tk", "FacT-TK", _joint(presets.fact_tk)),
    ("cara", "CaRA", _heads(presets.cara)),
    ("metatt", "MetaTT", _joint(presets.metatt)),
    ("gralora", "GraLoRA", _gralora),
    ("compacter", "Compacter", _compacter),
    ("quanta", "QuanTA", _quanta),
    ("shira", "SHiRA", _values(presets.shira)),
    ("fourierft", "FourierFT", _values(presets.fourierft)),
    ("loca", "LoCA", _values(presets.loca)),
    ("waveft", "WaveFT", _values(presets.waveft)),
    ("c3a", "C3A", _c3a),
    ("miss", "MiSS", _miss),
    ("lora_fa", "LoRA-FA", _ranks(presets.lora_fa)),
    ("share_lora", "ShareLoRA", _ranks(presets.share_lora)),
    ("tied_lora", "Tied-LoRA", _ranks(presets.tied_lora)),
    ("vera", "VeRA", _vera),
    ("randlora", "RandLoRA", _randlora),
    ("lora_xs", "LoRA-XS", _ranks(presets.lora_xs)),
    ("svft", "SVFT", _svft),
    ("craft", "CRAFT", _ranks(presets.craft)),
    ("tinylora", "TinyLoRA", _of_theta(presets.tinylora, _of_cores, 2, LARGEST_DENSE)),
    ("unilora", "Uni-LoRA", _of_theta(presets.unilora, _of_factors, 4)),
    ("nola", "NOLA", _of_theta(presets.nola, _of_one_array, 4)),
    ("dora", "DoRA", _ranks(presets.dora)),
    ("hira", "HiRA", _ranks(presets.hira)),
)

PRESETS = tuple(Preset(*row) for row in _TABLE)

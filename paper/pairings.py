"""Pairs of settings that differ in one respect: what each claim compares in a study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from tnadapt import Config

from .compared_studies import ComparedPair, ComparedStudy

__all__ = [
    "few_parameters",
    "fewer_factors",
    "living",
    "more_groups",
    "nonlinear",
    "pairs_with",
    "second_version",
    "unreshaped",
    "unshuffled",
    "untrained",
    "where",
    "within",
]

# The stacks of recipes whose weights have several widths: as wide as the widest weight.
STACKS = ((2208, 64),)
REFERENCES = ("head alone", "as pretrained", "dense")


def pairs_with(study: ComparedStudy, other: Callable[[Config], Iterable[Config]]) -> list[ComparedPair]:
    """Pair every setting with those that, according to ``other``, it should be better than."""
    found = []
    for one in study.settings:
        if one.config is not None and one.arm not in REFERENCES:
            against = [study.of(config) for config in other(one.config)]
            found += [ComparedPair(one, two) for two in against if two is not None]
    return found


def unreshaped(config: Config) -> Iterable[Config]:
    """Yield the same config with stacking instead of reshaping, also for stacks of several widths."""
    if config.fold == "hypercube" and config.order == 2 and config.format == "cp" and config.splits == 1:
        yield config.replace(fold="stack")
        yield from (config.replace(fold=fold) for fold in STACKS)


def few_parameters(study: ComparedStudy) -> int:
    """Return the limit of "few parameters": those of the smallest LoRA."""
    return min((one.parameters for one in study.settings if one.arm == "LoRA"), default=0)


def more_groups(study: ComparedStudy) -> list[ComparedPair]:
    """Pair one group with several, of the same format and fold and about the same number of parameters."""
    found = []
    for one in study.settings:
        if one.config is not None and one.config.groups == 1 and one.arm not in REFERENCES:
            found += [
                ComparedPair(one, two)
                for two in study.settings
                if two.config is not None
                and isinstance(two.config.groups, int)
                and two.config.groups > 1
                and abs(two.parameters / one.parameters - 1) < 0.03
                and two.config.replace(groups=1, rank=1) == one.config.replace(rank=1)
            ]
    return found


def where(study: ComparedStudy, pairs: Iterable[ComparedPair], few: bool) -> list[ComparedPair]:
    """Select the pairs whose first setting has few parameters, or those where it has more."""
    return [pair for pair in pairs if (pair.first.parameters <= few_parameters(study)) == few]


def fewer_factors(config: Config) -> Iterable[Config]:
    """Yield the same config with one Kronecker factor fewer."""
    if config.splits > 2:
        yield config.replace(splits=config.splits - 1)


def nonlinear(config: Config) -> Iterable[Config]:
    """Yield the same config with the nonlinear version of its projection."""
    if config.projection in ("linear", "linear_v2"):
        yield config.replace(projection="non" + config.projection)


def second_version(config: Config) -> Iterable[Config]:
    """Yield the same config with linear_v2 instead of linear."""
    if config.projection == "linear":
        yield config.replace(projection="linear_v2")


def unshuffled(config: Config) -> Iterable[Config]:
    """Yield the same config without a shuffle."""
    if config.projection == "shuffle":
        yield config.replace(projection="identity")


def living(study: ComparedStudy) -> list[ComparedPair]:
    """Pair the settings with a nonlinear projection with the model without an adapter."""
    base = next((one for one in study.settings if one.config is None), None)
    return [
        ComparedPair(one, base)
        for one in study.settings
        if base is not None and one.config is not None and str(one.config.projection).startswith("nonlinear")
    ]


def untrained(study: ComparedStudy, least: int, arms: tuple[str, ...] = ("",)) -> list[ComparedPair]:
    """Pair the settings of these arms with at most ``least`` parameters with the model without an adapter."""
    base = next((one for one in study.settings if one.config is None), None)
    few = [
        one for one in study.settings if one.config is not None and one.parameters <= least and one.arm.startswith(arms)
    ]
    return [] if base is None else [ComparedPair(one, base) for one in sorted(few, key=lambda one: one.parameters)]


def within(study: ComparedStudy, times: int) -> list[ComparedPair]:
    """Pair every rank of LoRA with the best setting, on held-out samples, of ``times`` times fewer parameters."""
    found = []
    for one in study.settings:
        if one.arm == "LoRA":
            small = [
                other
                for other in study.settings
                if other.config is not None
                and other.arm not in (*REFERENCES, "LoRA")
                and times * other.parameters <= one.parameters
            ]
            if small:
                found.append(ComparedPair(max(small, key=lambda other: statistics.fmean(other.held_out)), one))
    return found

"""Every way to make a group, in every fold, through every projection: what the laws are held over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

import tnadapt as tna
from tests.support.depth import in_depth
from tnadapt.algebra.folding import FOLDS
from tnadapt.algebra.maps import KINDS, SQUARE

__all__ = [
    "KINDS_OF_GROUP",
    "SHAPES",
    "SORTS",
    "config_of",
    "every_group",
    "everything",
    "everything_in_depth",
]

#: Wide, tall and square; their 106 elements are cut in two groups of 53, a prime. Half of each is a multiple of its
#: columns, as a stack through a projection must be.
SHAPES = [(6, 4), (2, 5), (6, 6), (4, 9)]
#: An F of each sort.
SORTS = ("identity", "linear", "nonlinear")
#: What a group is made of.
KINDS_OF_GROUP: dict[str, dict[str, Any]] = {
    "dense": {"format": "dense"},
    "cp": {"format": "cp", "alpha": 3.0},
    "cp-weighted": {"format": "cp-weighted"},
    "tucker": {"format": "tucker"},
    "tt": {"format": "tt"},
    "kronecker": {"format": "cp", "splits": 3, "split_size": 2},
    "hadamard": {"format": "tucker", "splits": 2, "combine": "hadamard"},
    "terms": {"format": "tt", "splits": 2, "split_size": "balanced", "leading": "same", "terms": 2},
}


def config_of(kind: str, fold: str, projection: str) -> tna.Config:
    """One of them, in two groups, or where weights are stacked in one a weight."""
    settings: dict[str, Any] = {"order": 2, "groups": "weight"} if fold == "stack" else {"order": 3, "groups": 2}
    if projection not in SQUARE:
        settings["ratio"] = 0.5
    return tna.Config(rank=2, fold=fold, projection=projection, seed=11, **settings, **KINDS_OF_GROUP[kind])


def everything(test: Callable[..., None]) -> Callable[..., None]:
    """The test over all of them."""
    return _over(test, KINDS)


def everything_in_depth(test: Callable[..., None]) -> Callable[..., None]:
    """The test over all of them in the long profile, and else over one F of each sort: of what takes long."""
    return _over(test, in_depth(KINDS, SORTS))


def every_group(test: Callable[..., None]) -> Callable[..., None]:
    """The test over all of them but for the F that are alike to it: one of each sort is enough."""
    return _over(test, SORTS)


def _over(test: Callable[..., None], projections: Iterable[str]) -> Callable[..., None]:
    for name, values in (("projection", projections), ("fold", FOLDS), ("kind", KINDS_OF_GROUP)):
        test = pytest.mark.parametrize(name, values)(test)
    return test

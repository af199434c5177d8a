"""What is frozen: presets with their variations, and products of the fields of Config."""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tnadapt as tna
from tnadapt.maps import (
    CenteredWavelet,
    Circulant,
    Gather,
    Scatter,
    SignGather,
    TiedElements,
    Tile,
    TorchScatter,
    Wavelet,
)
from tnadapt.sources import BaseCore, FromBase, Given, Mixed, Scaled, Seeded, Source, Tied

__all__ = ["Setting", "maps", "preset_calls", "settings"]

Options = Mapping[str, Any]
Shapes = tuple[tuple[int, int], ...]

ALIKE, SMALL = ((12, 8),) * 4, ((6, 4),) * 4
UNLIKE = ((6, 4), (2, 5), (6, 6), (4, 9))


class Setting(NamedTuple):
    """A config, and the weights that it updates: the query and the value of two layers."""

    config: tna.Config
    shapes: Shapes
    layers = (0, 0, 1, 1)
    roles = "qvqv"

    def plan(self, given: Mapping[str, Any] | None = None) -> tna.UpdatePlan:
        count = len(self.shapes)
        return tna.UpdatePlan(self.config, self.shapes, self.layers[:count], self.roles[:count], given=given)


#: Arguments of each preset.
CALLS: dict[str, list[Options]] = {
    "c3a": [{"block": 2}, {"block": 4}],
    "cara": [{"rank": 2, "heads": 2}, {"rank": 3, "head_size": 3}],
    "compacter": [{"rank": 1, "terms": 2}, {"rank": 2, "terms": 3}],
    "craft": [{"rank": 2}, {"rank": (2, 3, 2)}],
    "dense": [{}],
    "dora": [{"rank": 1}, {"rank": 3}],
    "fact_tk": [{"rank": 2}, {"rank": 3, "weights": 4, "rows": 12, "cols": 8}],
    "fact_tt": [{"rank": 2}, {"rank": 3, "weights": 4, "rows": 12, "cols": 8}],
    "fastfood": [{"ratio": 0.1}, {"ratio": 0.5}],
    "fourierft": [{"n": 5}, {"n": 3, "positions": (7, 0, 20)}],
    "gralora": [{"rank": 2, "blocks": 2}, {"rank": 4, "blocks": 4}],
    "hira": [{"rank": 1}, {"rank": 3}],
    "krona": [{}, {"split_size": (2, 4)}],
    "loca": [{"n": 5}, {"n": 3, "positions": (7, 0, 20)}],
    "loha": [{"rank": 1}, {"rank": 3}],
    "lokr": [{"rank": 1}, {"rank": 2, "leading": "same"}, {"rank": 2, "split_size": 2}],
    "lonkr": [{"rank": 1, "split_size": 2}, {"rank": 2, "splits": 4, "split_size": 2, "groups": 2}],
    "lora": [{"rank": 1}, {"rank": 3}],
    "lora_fa": [{"rank": 1}, {"rank": 3}],
    "lora_xs": [{"rank": 1}, {"rank": 3}],
    "lorta": [{"rank": 1}, {"rank": 2, "order": 5, "groups": 2}],
    "lorta_cp": [{"rank": 2, "heads": 2}, {"rank": 3, "head_size": 3, "matrices": 2}],
    "lotr": [{"rank": 2}, {"rank": 3, "train": True}],
    "metatt": [{"rank": 2}, {"rank": 3, "heads": 2, "matrices": 2}],
    "miss": [{"r": 2}, {"r": 4, "mini": 2}],
    "nola": [{"parameters": 3, "rank": 2}, {"parameters": 7, "rank": 1}],
    "quanta": [{"digits": (2, 2)}, {"digits": (2, 1)}],
    "randlora": [{"rank": 2, "rows": 12, "cols": 8}, {"rank": 3, "rows": 12, "cols": 8}],
    "share_lora": [{"rank": 1}, {"rank": 3}],
    "shira": [{"n": 5}, {"n": 3, "positions": (7, 0, 20)}],
    "superlora": [{"rank": 2}, {"rank": 3, "groups": 3, "projection": "linear", "ratio": 0.5}],
    "svft": [{"rank": 2}, {}],
    "tied_lora": [{"rank": 1}, {"rank": 3}],
    "tinylora": [{"parameters": 5}, {"parameters": 3, "rank": 3}],
    "unilora": [{"parameters": 5, "rank": 2}, {"parameters": 16, "rank": 3}],
    "vera": [{"rank": 2}, {"rank": 5, "d_initial": 0.3}],
    "waveft": [{"n": 5}, {"n": 3, "family": "db2"}],
}
#: What is changed in each preset; those that a preset refuses are left out.
CHANGES: dict[str, Options] = {
    "as it is": {},
    "alpha,seed": {"alpha": 3.0, "seed": 2**40 + 7},
    "sgd": {"rate": "sgd"},
    "given start": {"start": "given"},
    "random start": {"start": "random"},
    "hadamard": {"apply": "hadamard"},
    "magnitude": {"apply": "magnitude"},
    "magnitude of columns": {"apply": "magnitude", "magnitude_axis": "cols"},
    "linear": {"projection": "linear", "ratio": 0.5, "shared": False},
    "nonlinear": {"projection": "nonlinear"},
    "by role": {"groups": "role"},
    "one group": {"groups": 1},
    "two terms": {"terms": 2},
    "theta": {"before": "one-hot", "parameters": 4},
}
FORMATS: dict[str, Options] = {
    name: {"format": name, "rank": 2}
    for name in ("dense", "cp", "cp-weighted", "tucker", "tt", "cp-batched", "circuit")
}
#: Folds with their order; two groups where they may straddle weights.
FOLDS: dict[str, Options] = {
    "vector": {"order": 1, "fold": "hypercube", "groups": 2},
    "stack": {"order": 2, "fold": "stack"},
    "square": {"order": 2, "fold": "hypercube", "groups": 2},
    "cube": {"order": 3, "fold": "hypercube", "groups": 2},
    "balanced2": {"order": 2, "fold": "balanced"},
    "balanced4": {"order": 4, "fold": "balanced", "groups": 1},
    "sizes": {"order": 3, "fold": (4, 5, 6), "groups": 2},
    "named": {"order": 3, "fold": ("weights", "rows", "cols"), "groups": "role"},
    "heads": {"order": 4, "fold": ("weights", "rows/2", 2, "cols"), "groups": "role", "axes": (1, 0, 3, 2)},
    "paired": {"order": 2, "fold": (4, 2, 3, 4), "groups": 1, "axes": ((0, 2), (1, 3))},
}
#: Every map that follows a network, and chains of them.
PROJECTIONS: dict[str, Options] = {
    "identity": {},
    "shuffle": {"projection": "shuffle"},
    "linear": {"projection": "linear"},
    "linear,half": {"projection": "linear", "ratio": 0.5},
    "linear_v2": {"projection": "linear_v2", "ratio": 0.5},
    "nonlinear": {"projection": "nonlinear", "ratio": 0.5},
    "nonlinear_v2": {"projection": "nonlinear_v2", "ratio": 0.5},
    "gather": {"projection": "gather", "ratio": 0.5},
    "sign-gather": {"projection": "sign-gather", "ratio": 0.5},
    "gather of 8": {"projection": Gather(8)},
    "signs of 8": {"projection": SignGather(8), "on": "weight"},
    "scatter": {"projection": Scatter(8)},
    "positions": {"projection": Scatter(positions=(7, 0, 5, 9)), "on": "weight"},
    "torch-scatter": {"projection": TorchScatter(8, 777), "on": "weight"},
    "tile": {"projection": Tile(cols=4), "on": "weight"},
    "circulant": {"projection": Circulant(2), "on": "weight"},
    "dct2": {"projection": "dct2", "on": "weight"},
    "dft2": {"projection": "dft2", "on": "weight"},
    "wavelet": {"projection": "wavelet", "on": "weight"},
    "wavelet,db2": {"projection": Wavelet("db2", periodic=True), "on": "weight"},
    "centered-wavelet": {"projection": [Scatter(8), CenteredWavelet("db3")], "on": "weight"},
    "scatter,dft2": {"projection": [Scatter(8), "dft2"], "on": "weight"},
    "linear,shuffle,tanhshrink": {"projection": ["linear", "shuffle", "nonlinear_v2"], "ratio": 0.5},
}
SPLITS: dict[str, Options] = {
    "kronecker": {"splits": 2},
    "kronecker3": {"splits": 3, "split_size": 2},
    "kronecker,same": {"splits": 2, "leading": "same"},
    "kronecker,sizes": {"splits": 2, "split_size": (2, 3), "alpha": 5.0},
    "hadamard": {"splits": 2, "combine": "hadamard"},
    "hadamard3,same": {"splits": 3, "combine": "hadamard", "leading": "same"},
    "terms": {"terms": 3, "alpha": 0.5},
    "terms,kronecker": {"terms": 2, "splits": 2, "leading": "same"},
}
GROUPS: dict[str, Options] = {
    "weight": {"groups": "weight"},
    "layer": {"groups": "layer"},
    "role": {"groups": "role"},
    "one": {"groups": 1},
    "three": {"groups": 3},
    "ten": {"groups": 10},
    "listed": {"groups": ((2, 0), (3,), (1,))},
}
RANKS: dict[str, Options] = {
    str(rank).replace(" ", ""): {"rank": rank}
    for rank in (1, 3, 5, 9, (2,), (2, 3), (None, 2), (1, 2, 3), (2, None, 2), (2, 1, 2, 3))
}
DISTRIBUTIONS = ("normal", "uniform", "signs", "orthonormal", "one-hot", "eye")
SOURCES: dict[str, Source] = {
    **{name: Seeded(name) for name in DISTRIBUTIONS},
    "normal,own,scale": Seeded("normal", shared=False, scale=0.3),
    "base rows": FromBase("rows"),
    "base cols": FromBase("cols"),
    "base mode": FromBase("mode"),
    "base vectors": FromBase("rows", vectors=True),
    "given": Given(),
    "given,shared": Given(shared=True),
    "tied factor": Tied("split0.factor0"),
    "tied to group 0": Tied("group0.split0.factor1"),
    "sizes": Scaled(Seeded("uniform")),
    "ranks": Scaled(Seeded("normal"), size=False, rank=True, start=0.1),
    "sizes,ranks": Scaled(Seeded("signs"), size=True, rank=True),
    "mixed": Mixed(Seeded("orthonormal")),
    "mixed base": Mixed(FromBase("cols")),
}
ARRAYS = ("dense", "factor0", "factor1", "weights", "core", "core0", "core1", "split0.factor0")
APPLY: dict[str, Options] = {
    "add": {},
    "hadamard": {"apply": "hadamard"},
    "magnitude": {"apply": "magnitude"},
    "magnitude of columns": {"apply": "magnitude", "magnitude_axis": "cols"},
}
STARTS: dict[str, Options] = {name: {"start": name} for name in ("zero", "given", "random", "pissa", "milora", "olora")}
BEFORE: dict[str, Options] = {
    **{name: {"before": name} for name in ("one-hot", "signed-one-hot", "normal", "linear", "tied", "given")},
    "tied,normalized": {"before": TiedElements(normalized=True)},
    "shuffle,one-hot": {"before": ("shuffle", "one-hot")},
}
SCOPES: dict[str, Options] = {
    **{scope: {"scope": scope, "parameters": 5} for scope in ("plan", "group", "array")},
    "without offset": {"parameters": 4, "offset": False},
}
NETWORKS: dict[str, Options] = {
    "lora": {"rank": 2},
    "tucker": {"rank": 2, "format": "tucker", "groups": "role", "alpha": 3.0},
    "train": {"rank": 2, "format": "tt", "order": 3, "fold": "balanced"},
    "kronecker": {"rank": 2, "splits": 2, "leading": "same"},
    "vera": {"rank": 3, "sources": {"factor0": SOURCES["sizes"], "factor1": SOURCES["ranks"]}},
    "nonlinear": {"rank": 2, "fold": "hypercube", "projection": "nonlinear", "ratio": 0.5},
}


SOURCES_OF_ARRAYS: dict[str, Options] = {
    f"{array}={name}": {"sources": {array: source}} for array in ARRAYS for name, source in SOURCES.items()
}
HOSVD = {"core": BaseCore(), "factor0": Mixed(FromBase("rows")), "factor1": FromBase("cols")}
SOURCES_OF_ARRAYS["core=base core"] = {"sources": HOSVD}
SHARED = {"shared": {}, "own": {"shared": False}}
SOURCED = {"weight": {}, "role": FOLDS["named"], "linear": {"projection": "linear", "fold": "balanced"}}


def some(axis: Mapping[str, Options], *labels: str) -> dict[str, Options]:
    return {label: axis[label] for label in labels}


THREE = some(PROJECTIONS, "identity", "linear,half", "nonlinear")
SIZES = (8, 60, 1000)
STREAMS: dict[str, Options] = {"seed 0": {}, "group 3": {"seed": 2**40 + 7, "group": 3}}
#: Sections with their weights, and the axes of which they are the product.
PRODUCTS: list[tuple[Any, ...]] = [
    ("F", SMALL, FORMATS, FOLDS, THREE),
    ("F", SMALL, FORMATS, some(FOLDS, "stack", "cube"), PROJECTIONS),
    ("F", SMALL, some(FORMATS, "cp", "tt"), FOLDS, PROJECTIONS),
    ("splits", UNLIKE, FORMATS, some(FOLDS, "stack", "cube"), SPLITS, THREE),
    ("groups", UNLIKE, FORMATS, some(FOLDS, "stack", "balanced2"), GROUPS, THREE, SHARED),
    ("rank", UNLIKE, FORMATS, some(FOLDS, "stack", "cube", "balanced4"), RANKS),
    ("source", SMALL, FORMATS, SOURCED, SOURCES_OF_ARRAYS),
    ("apply", SMALL, NETWORKS, APPLY, STARTS, {"seed 0": {}, "last seed": {"seed": 2**64 - 1}}),
    ("theta", UNLIKE, NETWORKS, BEFORE, SCOPES),
]


def settings() -> dict[str, Callable[[], Setting]]:
    """Return what makes each setting, by its name, such as ``F/cp/cube/linear``; ConfigError if it is no valid one."""
    found: dict[str, Callable[[], Setting]] = {}
    for (name, (preset, call)), (change, options) in itertools.product(preset_calls().items(), CHANGES.items()):
        found[f"{name}/{change}"] = functools.partial(_made, preset, ALIKE, [call, options])
    for section, weights, *axes in PRODUCTS:
        for labels in itertools.product(*axes):
            options = [axis[label] for axis, label in zip(axes, labels, strict=True)]
            found["/".join((section, *labels))] = functools.partial(_made, tna.Config, weights, options)
    for (first, one), (second, two) in itertools.pairwise(preset_calls().items()):
        found[f"parts/{first}+{second}"] = functools.partial(_in_parts, one, two)
    return found


def preset_calls() -> dict[str, tuple[Callable[..., tna.Config], Options]]:
    """Return presets with arguments by names such as ``lora(rank=3)``."""
    return {
        f"{name}({','.join(f'{key}={value}' for key, value in call.items())})".replace(" ", ""): (
            getattr(tna.presets, name),
            call,
        )
        for name, calls in CALLS.items()
        for call in calls
    }


def maps() -> dict[str, Callable[[], tna.Projection]]:
    """Return what makes each map, for vectors and matrices of several sizes, from two streams."""
    before = {name: {"projection": name, "ratio": 0.5} for name in ("one-hot", "signed-one-hot", "normal")}
    axes = {**PROJECTIONS, **before}.items(), SIZES, STREAMS.items()
    return {
        f"map/{name}/{size}/{stream}": functools.partial(_map, size, draw, **options)
        for (name, options), size, (stream, draw) in itertools.product(*axes)
    }


def _made(make: Callable[..., tna.Config], weights: Shapes, options: Sequence[Options]) -> Setting:
    return Setting(make(**collections.ChainMap(*map(dict, reversed(options)))), weights)


def _in_parts(*calls: tuple[Callable[..., tna.Config], Options]) -> Setting:
    return Setting(tna.CompositeConfig([(make(**call), 2) for make, call in calls]), ALIKE)


def _map(size: int, draw: Options, projection: Any = "identity", ratio: float = 1.0, on: str = "vector") -> Any:
    if on == "weight":
        return tna.Projection.on_weights(projection, [(size, 4), (8, size)], ratio, **draw)
    n_in = math.ceil(ratio * size) if ratio < 1.0 or isinstance(projection, str) else None
    return tna.Projection(projection, n_in, size, **draw)

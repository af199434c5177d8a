"""Reference for the arrays of a plan: sources and the map before the network, written out in float64 NumPy.

Names are followed one by one, and P is a dense matrix. What a source computes for a frozen array is given: it has no
second definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import BroughtMap, make_map
from tnadapt.algebra.sources import Mixed, Multiplied, Scaled, Source, Tied, Trained

from ._reference_maps import matrix_of

__all__ = ["network_arrays", "trained_shapes"]

Float = NDArray[np.floating[Any]]
Arrays = Mapping[str, Float]
Names = Sequence[Mapping[str, tuple[int, ...]]]

# Group index of the draws of the first map before a network.
_FIRST_STREAM = 2**31


def network_arrays(config: Config, names: Names, params: Arrays, frozen: Arrays, begun: Arrays) -> dict[str, Float]:
    """Return all arrays of all networks by their full names.

    Parameters
    ----------
    config : Config
    names : sequence of dict of str to tuple of int
        For each group, the network's arrays and their shapes, in order.
    params : mapping of str to ndarray of float64
        The parameters.
    frozen : mapping of str to ndarray
        What sources compute, and what the map before the network is given, by full names.
    begun : mapping of str to ndarray
        Initial arrays, which θ moves.

    Examples
    --------
    >>> tied = Config(rank=1, sources={"factor1": Tied("group0.split0.factor1")})
    >>> shapes = [{"split0.factor0": (2, 1), "split0.factor1": (3, 1)}] * 2
    >>> params = {name: np.ones(shape) for name, shape in trained_shapes(tied, shapes).items()}
    >>> list(network_arrays(tied, shapes, params, {}, {}))
    ['group0.split0.factor0', 'group0.split0.factor1', 'group1.split0.factor0', 'group1.split0.factor1']
    """
    if config.before is not None:
        params = _from_theta(config, trained_shapes(config, names), params, frozen, begun)
    return {
        f"group{group}.{name}": _value(config, group, name, _source(config, name), params, frozen)
        for group, arrays in enumerate(names)
        for name in arrays
    }


def trained_shapes(config: Config, names: Names) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the arrays and diagonals that are trained, or made from θ, in order."""
    found: dict[str, tuple[int, ...]] = {}
    for group, arrays in enumerate(names):
        for name, shape in arrays.items():
            full, source = f"group{group}.{name}", _source(config, name)
            inner = source.of if isinstance(source, Multiplied) else source
            if isinstance(inner, Trained) or (isinstance(inner, Tied) and _target(inner, group) == (group, name)):
                found[full] = shape
            if isinstance(source, Scaled):
                found |= {f"{full}.size": shape[:1]} if source.size else {}
                found |= {f"{full}.rank": shape[1:]} if source.rank else {}
            if isinstance(source, Mixed):
                found[f"{full}.mix"] = shape[1], shape[1]
    return found


def _source(config: Config, name: str) -> Source:
    words = name.split(".")
    keys = [".".join(words[start:]) for start in range(len(words))]
    return next((config.sources[key] for key in keys if key in config.sources), Trained())


def _target(tied: Tied, group: int) -> tuple[int, str]:
    first, _, rest = tied.to.partition(".")
    return (int(first.removeprefix("group")), rest) if first.startswith("group") else (group, tied.to)


def _value(config: Config, group: int, name: str, source: Source, params: Arrays, frozen: Arrays) -> Float:
    full = f"group{group}.{name}"
    if isinstance(source, Scaled):
        array = _value(config, group, name, source.of, params, frozen)
        if source.size:
            array = np.diag(params[f"{full}.size"]) @ array
        return array @ np.diag(params[f"{full}.rank"]) if source.rank else array
    if isinstance(source, Mixed):
        return _value(config, group, name, source.of, params, frozen) @ params[f"{full}.mix"]
    if isinstance(source, Tied):
        other, theirs = _target(source, group)
        if (other, theirs) == (group, name):
            return params[full]
        own = _source(config, theirs)
        # What has multipliers itself is tied to the array under the other one's multipliers.
        if isinstance(own, Multiplied) and isinstance(_source(config, name), Multiplied):
            own = own.of
        return _value(config, other, theirs, own, params, frozen)
    return params[full] if source.trained else frozen[full]


def _from_theta(
    config: Config, shapes: Mapping[str, tuple[int, ...]], params: Arrays, frozen: Arrays, begun: Arrays
) -> dict[str, Float]:
    scopes: dict[str, list[str]] = {}
    for full in shapes:
        scope = {"plan": "", "group": full.split(".")[0] + ".", "array": full + "."}[config.scope]
        scopes.setdefault(scope + "theta", []).append(full)
    found: dict[str, Float] = {}
    assert config.before is not None
    for stream, (theta, made) in enumerate(scopes.items()):
        sizes = [math.prod(shapes[full]) for full in made]
        taken = make_map(config.before, len(params[theta]), sum(sizes), config.seed, _FIRST_STREAM + stream)
        if isinstance(taken, BroughtMap):
            taken.bring(frozen[f"{theta}.{taken.brings}"])
        parts = np.split(matrix_of(taken) @ params[theta], np.cumsum(sizes)[:-1])
        for full, part in zip(made, parts, strict=True):
            found[full] = part.reshape(shapes[full]) + (begun[full] if config.offset else 0.0)
    return found

"""How the formulas of methods are written: types, and functions that apply the formula of one weight to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config

__all__ = ["Float", "Method", "Named", "Params", "Shapes", "alpha_over_rank", "each", "each_shape", "lora"]

Float = NDArray[np.floating[Any]]
Params = Mapping[str, Float]
Shapes = Sequence[tuple[int, int]]
Method = Callable[[Params, Config, Shapes], list[Float]]
Named = Callable[[str], Float]


def each(formula: Callable[[Named, Config], Float]) -> Method:
    """Return a weight-wise method that applies the formula of one weight to all."""
    return each_shape(lambda own, config, shape: formula(own, config))


def each_shape(formula: Callable[[Named, Config, tuple[int, int]], Float]) -> Method:
    """Return a weight-wise method that applies the formula of one weight, which depends on its shape, to all."""

    def all_weights(params: Params, config: Config, shapes: Shapes) -> list[Float]:
        found = []
        for group, shape in enumerate(shapes):
            prefix = f"group{group}."
            own = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
            found.append(formula(own.__getitem__, config, shape).reshape(shape))
        return found

    return all_weights


def alpha_over_rank(config: Config) -> float:
    assert isinstance(config.rank, int)
    return 1.0 if config.alpha is None else config.alpha / config.rank


def lora(p: Named, config: Config) -> Float:
    # ΔW = (alpha / r) B A; Hu et al.
    lora_b, lora_a = p("split0.factor0"), p("split0.factor1").T
    return alpha_over_rank(config) * lora_b @ lora_a

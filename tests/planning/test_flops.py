"""The cost of a step against the multiplications that the products really do."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.algebra.applying import APPLYING, AXES, applying_of
from tnadapt.backends import Backend, load_backend
from tnadapt.planning import padding_waste, step_cost


class Counted(np.ndarray):
    """An array whose products are counted."""

    made = 0

    def _counted(self, name: str, other: Any) -> Any:
        result = getattr(super(), name)(other)
        # Of two elements: a product with a number, as the scale, is not counted.
        Counted.made += result.size if isinstance(other, np.ndarray) else 0
        return result

    __mul__ = functools.partialmethod(_counted, "__mul__")
    __truediv__ = functools.partialmethod(_counted, "__truediv__")


class CountingBackend(type(load_backend("numpy"))):  # type: ignore[misc]
    def matmul(self, a: Any, b: Any) -> Any:
        result = super().matmul(a, b)
        Counted.made += result.size * a.shape[-1]
        return result


def counted(group: Any) -> int:
    """The products of a step: forward, twice as many backward, and those of a start that is subtracted."""
    backend: Backend = CountingBackend()
    arrays = {name: np.ones(shape).view(Counted) for name, shape in group.network.shapes.items()}
    Counted.made = 0
    group.network.whole(backend, arrays)
    return (3 + group.start.subtracts) * Counted.made


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("combine", ["kronecker", "hadamard"])
@pytest.mark.parametrize("leading", ["dense", "same"])
@pytest.mark.parametrize("name", ["dense", "cp", "cp-weighted", "tucker", "tt"])
@pytest.mark.parametrize("sizes", [(64,), (64, 16), (8, 24, 16), (8, 4, 16, 8), (8, 8, 2, 2, 16)], ids=str)
def test_products_are_counted(
    sizes: tuple[int, ...], name: str, leading: str, combine: str, splits: int, terms: int
) -> None:
    config = tna.Config(
        3, len(sizes), splits, groups=1, fold=sizes, format=name, combine=combine, leading=leading, terms=terms
    )
    plan = tna.UpdatePlan(config, [(1, math.prod(sizes))])
    assert step_cost(plan) == counted(plan.groups[0])


@pytest.mark.parametrize(
    "config", [tna.presets.lotr(3, weights=4, rows=6, cols=5), tna.presets.metatt(2, groups=[[0, 1, 2, 3]])]
)
def test_partial_tucker_and_axes_in_another_order(config: tna.Config) -> None:
    plan = tna.UpdatePlan(config, [(6, 5)] * 4, layers=[0, 0, 1, 1])
    assert step_cost(plan) == counted(plan.groups[0])


@pytest.mark.parametrize("base", [tna.presets.lora(2), tna.presets.superlora(2, projection="linear", ratio=0.5)])
@pytest.mark.parametrize("shape", [(5, 7), (8, 8), (1, 3), (9, 1)], ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", APPLYING.built_in)
def test_products_of_changed_weights_are_counted(
    kind: str, axis: str, shape: tuple[int, int], base: tna.Config
) -> None:
    applying, backend = applying_of(kind, axis), load_backend("numpy")
    weight, delta, gradient = (np.ones(shape).view(Counted) for _ in range(3))
    own = [np.ones(size).view(Counted) for size in applying.param_shapes(0, shape).values()]

    def made(call: Any) -> int:
        Counted.made = 0
        call()
        return Counted.made

    again = made(lambda: applying.rescaling(backend, weight + applying.change(backend, weight, delta), own))
    forward = made(lambda: applying.merged(backend, weight, delta, own))
    backward = made(lambda: applying.pulled(backend, weight, delta, own, gradient))
    config = base.replace(apply=kind, magnitude_axis=axis if kind == "magnitude" else "rows")
    # Of three weights each has its own.
    changed, plain = (step_cost(tna.UpdatePlan(one, [shape] * 3)) for one in (config, base))
    assert changed - plain == 3 * (forward + backward - again)


def test_a_step() -> None:
    def of(config: tna.Config) -> int:
        return step_cost(tna.UpdatePlan(config, [(16, 16)] * 3))

    assert of(tna.presets.dense()) == 0
    assert of(tna.presets.dora(2)) == 3 * (3 * 2 * 256 + 5 * 256 + 4 * 16)
    # 768 elements: a transform of 1024 and one of 128, which holds 77; and their adjoints.
    assert of(tna.presets.fastfood(0.1)) == 2 * (1024 * 10 + 128 * 7 + 3 * 1024)
    assert of(tna.presets.superlora(1, projection="shuffle")) == of(tna.presets.superlora(1))


@pytest.mark.parametrize(
    ("config", "shape", "waste"),
    [
        (tna.presets.lora(1), (5, 7), 0.0),
        (tna.presets.superlora(1), (5, 7), 1 / 36),
        # Two groups of 18 of 35: one of 18 and one of 17, in squares of 5.
        (tna.presets.superlora(1, groups=2), (5, 7), 15 / 50),
        # 6 × 6 by Kronecker factors of 4: 4 · 2 a side.
        (tna.presets.lonkr(1, splits=2, split_size=4), (6, 6), 28 / 64),
        # F of a tenth: ten elements in a square of four.
        (tna.presets.superlora(1, projection="linear", ratio=0.1), (10, 10), 6 / 16),
    ],
)
def test_waste(config: tna.Config, shape: tuple[int, int], waste: float) -> None:
    assert padding_waste(tna.UpdatePlan(config, [shape])) == waste

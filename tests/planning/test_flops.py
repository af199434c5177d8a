"""The cost of a step against the multiplications that the products really do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import tnadapt as tna
from tests.planning.internals import applied_cost, forward_cost
from tnadapt.algebra.applying import APPLYING, AXES, applying_of
from tnadapt.backends import Backend, load_backend
from tnadapt.planning import padding_waste, step_cost
from tnadapt.testing.strategies import plans


class Counted(np.ndarray):
    """An array whose products are counted."""

    made = 0

    def __mul__(self, other: Any) -> Any:
        result = super().__mul__(other)
        # Of two elements: a product with a number, as the scale, is not counted.
        Counted.made += result.size if isinstance(other, np.ndarray) else 0
        return result

    def __truediv__(self, other: Any) -> Any:
        result = super().__truediv__(other)
        Counted.made += result.size if isinstance(other, np.ndarray) else 0
        return result


class CountingBackend(type(load_backend("numpy"))):  # type: ignore[misc]
    def matmul(self, a: Any, b: Any) -> Any:
        result = super().matmul(a, b)
        Counted.made += result.size * a.shape[-1]
        return result


def counted(network: Any) -> int:
    backend: Backend = CountingBackend()
    arrays = {name: np.ones(shape).view(Counted) for name, shape in network.shapes.items()}
    Counted.made = 0
    network.whole(backend, arrays)
    return Counted.made


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
    (group,) = tna.SuperLoRA(config, [(1, math.prod(sizes))]).groups
    assert forward_cost(group.network) == counted(group.network)


def test_partial_tucker() -> None:
    (group,) = tna.SuperLoRA(tna.presets.lotr(3, weights=4, rows=6, cols=5), [(6, 5)] * 4).groups
    assert forward_cost(group.network) == counted(group.network)


@pytest.mark.parametrize("shape", [(5, 7), (8, 8), (1, 3), (9, 1)], ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", APPLYING.built_in)
def test_products_of_changed_weights_are_counted(kind: str, axis: str, shape: tuple[int, int]) -> None:
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
    assert applied_cost(applying, shape) == forward + backward - again
    elements, quotients = math.prod(shape), shape[1 - AXES[axis]]
    assert applied_cost(applying, shape) == {
        "add": 0, "hadamard": 3 * elements, "magnitude": 5 * elements + 4 * quotients,
    }[kind]  # fmt: skip


@pytest.mark.parametrize("config", [tna.presets.lora(2), tna.presets.superlora(2, projection="linear", ratio=0.5)])
def test_a_change_that_is_no_sum_costs_more(config: tna.Config) -> None:
    shapes = [(6, 4), (4, 6), (6, 4)]
    add, *others = (
        step_cost(tna.SuperLoRA(config.replace(apply=kind), shapes)) for kind in ("add", "hadamard", "magnitude")
    )
    assert [other - add for other in others] == [3 * 3 * 24, 3 * 5 * 24 + 4 * (6 + 4 + 6)]


@given(plans())
def test_a_step_of_any_plan_is_that_of_its_updates_and_of_its_weights(plan: tna.SuperLoRA) -> None:
    of_weights = step_cost(plan) - step_cost(plan.arrays_plan)
    assert of_weights == sum(applied_cost(plan.applying, shape) for shape in plan.shapes)
    assert (of_weights > 0) == (plan.config.apply != "add")


def test_a_step() -> None:
    def of(config: tna.Config) -> int:
        return step_cost(tna.SuperLoRA(config, [(16, 16)] * 3))

    n = 16 * 16
    assert of(tna.presets.dense()) == 0
    assert of(tna.presets.lora(2)) == 3 * 3 * 2 * n
    assert of(tna.presets.hira(2)) == 3 * 3 * (2 + 1) * n
    assert of(tna.presets.dora(2)) == 3 * (3 * 2 * n + 5 * n + 4 * 16)
    # 768 elements: a transform of 1024 and one of 128, which holds 77; and their adjoints.
    assert of(tna.presets.fastfood(0.1)) == 2 * (1024 * 10 + 128 * 7 + 3 * 1024)
    assert of(tna.presets.superlora(1, projection="shuffle")) == of(tna.presets.superlora(1))


def test_waste() -> None:
    def of(config: tna.Config, shapes: list[tuple[int, int]]) -> float:
        return padding_waste(tna.SuperLoRA(config, shapes))

    assert of(tna.presets.lora(1), [(5, 7)]) == 0.0
    assert of(tna.presets.superlora(1), [(5, 7)]) == 1 / 36
    # Two groups of 18 of 35: one of 18 and one of 17, in squares of 5.
    assert of(tna.presets.superlora(1, groups=2), [(5, 7)]) == 15 / 50
    # 6 × 6 by Kronecker factors of 4: 4 · 2 a side.
    assert of(tna.presets.lonkr(1, splits=2, split_size=4), [(6, 6)]) == 28 / 64
    # F of a tenth: ten elements in a square of four.
    assert of(tna.presets.superlora(1, projection="linear", ratio=0.1), [(10, 10)]) == 6 / 16

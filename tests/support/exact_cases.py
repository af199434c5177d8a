"""Updates that a network represents exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import tnadapt as tna
from tnadapt.errors import TnadaptError


def padded_plans(fmt: str, order: int, fold: str, count: int) -> Iterator[tna.UpdatePlan]:
    """Yield random plans whose fold ends in the midst of a row, and that have fewer parameters than elements."""
    for seed in range(100 * count):
        rng = np.random.default_rng(1000 * order + seed)
        shapes = [(int(rng.integers(3, 15)), int(rng.integers(3, 15))) for _ in range(int(rng.integers(1, 4)))]
        config = {"rank": int(rng.integers(1, 4)), "order": order, "groups": 1, "fold": fold, "format": fmt}
        try:
            plan = tna.UpdatePlan(tna.Config(**config), shapes)
        except TnadaptError:
            continue
        network = plan.groups[0].network
        if network.size % int(np.prod(network.sizes[1:])) and plan.num_parameters < plan.size:
            yield plan
            count -= 1
            if not count:
                return


def random_deltas(plan: tna.UpdatePlan, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the updates of normal parameters."""
    return plan.deltas({name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()})


def cp_tensor(sizes: tuple[int, ...], rank: int, seed: int) -> np.ndarray:
    """Return a tensor of three modes and of a rank, with normal factors."""
    rng = np.random.default_rng(seed)
    found: np.ndarray = np.einsum("ar,br,cr->abc", *(rng.normal(size=(size, rank)) for size in sizes))
    return found

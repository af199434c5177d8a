"""Degrees of freedom of a small network: the rank of its Jacobian at random arrays, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tnadapt.backends import load_backend

__all__ = ["jacobian_rank"]

# The Jacobian is formed up to this number of elements.
_FORMED = 1 << 20
# Singular values below this fraction of the largest one are rounding errors.
_ROUNDING = 1e-10


class _Network(Protocol):
    sizes: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_parameters(self) -> int: ...

    def tensor(self, backend: Any, arrays: Mapping[str, Any], ranges: Sequence[tuple[int, int]]) -> Any: ...


def jacobian_rank(network: _Network, times: int) -> int | None:
    """Return the rank of the Jacobian of a sum of ``times`` tensors of a network; None if it is too large to form.

    The rank is maximal at almost every point, so at a random point it is the dimension of the set of all such sums with
    probability one.
    """
    elements = math.prod(network.sizes)
    if times * network.num_parameters * elements > _FORMED:
        return None
    backend, rng = load_backend("numpy"), np.random.default_rng(0)
    whole = [(0, size) for size in network.sizes]
    rows = []
    for _ in range(times):
        arrays = {name: rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape) for name, shape in
                  network.shapes.items()}  # fmt: skip
        for name, shape in network.shapes.items():
            for place in np.ndindex(*shape):
                unit = np.zeros(shape)
                unit[place] = 1.0
                rows.append(np.ravel(network.tensor(backend, {**arrays, name: unit}, whole)))
    values = np.linalg.svd(np.array(rows), compute_uv=False)
    return int(np.sum(values > _ROUNDING * values[0]))

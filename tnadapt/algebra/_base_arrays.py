"""Computes what comes from base weights: frozen arrays, of a group's weights folded as its network is; magnitudes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.blas_threads import one_blas_thread
from tnadapt.errors import ConfigError, ShapeError

from ._group_plan import GroupPlan
from .sources import FrozenArray

__all__ = ["base_starts", "base_weight", "from_base"]


def from_base(
    plan: GroupPlan,
    weights: Sequence[Any] | Callable[[int], Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Compute the arrays in ``plan.base_shapes``; see :meth:`tnadapt.SuperLoRA.with_base`."""
    if not callable(weights) and len(weights) != len(plan.shapes):
        raise ShapeError(f"with_base needs the {len(plan.shapes)} base weights; got {len(weights)}")
    found = dict[str, np.ndarray]()
    # The last bits of a matrix product depend on the number of threads: one for each array, and arrays in parallel.
    with one_blas_thread(), ThreadPoolExecutor() as pool:
        for index, group in enumerate(plan.groups):
            # Tied arrays are computed with the group that they belong to.
            entries = {
                entry.full: entry
                for entry in group.frozen.entries.values()
                if entry.source.needs_base and entry.stream.group == index and entry.full not in found
            }
            if not entries:
                continue
            base = _folded(plan, index, weights)
            arrays = pool.map(functools.partial(_computed, base), entries.values())
            for full, array in zip(entries, arrays, strict=True):
                found[full] = array
                if progress is not None:
                    progress(len(found), len(plan.base_shapes))
    return found


def base_starts(plan: GroupPlan, weights: Sequence[Any] | Callable[[int], Any]) -> dict[str, np.ndarray]:
    """Compute where the parameters in ``plan.weight_param_shapes`` start."""
    found = dict[str, np.ndarray]()
    for index, names in enumerate(plan.weight_param_names):
        if names:
            weight = _weight(plan, index, weights).reshape(plan.shapes[index])
            found.update(plan.applying.starts(index, weight.astype(np.float64)))
    for name, start in found.items():
        if not np.isfinite(start).all():
            raise ConfigError(f"{name} would start at the norms of a base weight that holds NaN or infinity")
    return found


def base_weight(backend: Backend, weight: Any, index: int, shape: tuple[int, int]) -> Any:
    """Return a base weight after checking its shape and dtype."""
    if tuple(weight.shape) != shape:
        raise ShapeError(f"base weight {index} has shape {tuple(weight.shape)}; expected {shape}")
    backend.require_float(weight, f"base weight {index}")
    return weight


def _computed(base: np.ndarray, entry: FrozenArray) -> np.ndarray:
    return entry.compute(dataclasses.replace(entry.stream, base=base))


def _folded(plan: GroupPlan, index: int, weights: Sequence[Any] | Callable[[int], Any]) -> np.ndarray:
    """Return the base weights of a group as a tensor with the sizes of its network, in float64."""
    group = plan.groups[index]
    sizes = group.network.sizes
    vec = np.zeros(math.prod(sizes))
    start = 0
    for piece in group.pieces:
        whole = _weight(plan, piece.weight, weights)
        vec[start : start + piece.length] = whole[piece.weight_start : piece.weight_start + piece.length]
        start += piece.length
    return vec.reshape(sizes)


def _weight(plan: GroupPlan, index: int, weights: Sequence[Any] | Callable[[int], Any]) -> np.ndarray:
    if not callable(weights) and len(weights) != len(plan.shapes):
        raise ShapeError(f"with_base needs the {len(plan.shapes)} base weights; got {len(weights)}")
    weight = weights(index) if callable(weights) else weights[index]
    backend = get_backend(weight)
    weight = base_weight(backend, weight, index, plan.shapes[index])
    # bfloat16 has no NumPy dtype; every bfloat16 and float16 number is a float32 number.
    wide = weight if backend.dtype_name(weight) == "float64" else backend.astype(weight, "float32")
    return np.asarray(backend.to_numpy(wide)).reshape(-1)

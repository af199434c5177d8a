"""Computes what comes from base weights: frozen arrays and starts, of weights folded as the network; magnitudes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.blas_threads import one_blas_thread
from tnadapt.errors import ConfigError, ShapeError

from ._group_plan import GroupPlan
from .group import Group
from .rng import PURPOSE
from .sources import FrozenArray, Stream
from .starting_points import PREFIX

__all__ = ["base_starts", "base_weight", "from_base"]

_WORKERS = min(8, os.cpu_count() or 1)


def from_base(
    plan: GroupPlan,
    weights: Sequence[Any] | Callable[[int], Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Compute the arrays in ``plan.base_shapes``; see :meth:`tnadapt.SuperLoRA.with_base`."""
    if not callable(weights) and len(weights) != len(plan.shapes):
        raise ShapeError(f"with_base needs the {len(plan.shapes)} base weights; got {len(weights)}")
    found = dict[str, np.ndarray]()

    def put(arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        for full, array in arrays:
            found[full] = array
            if progress is not None:
                progress(len(found), len(plan.base_shapes))

    starts = collections.deque[Future[dict[str, np.ndarray]]]()
    # The last bits of a matrix product depend on the number of threads: one for each array, and arrays in parallel.
    with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        for index, group in enumerate(plan.groups):
            # Tied arrays are computed with the group that they belong to.
            entries = {
                entry.full: entry
                for entry in group.frozen.entries.values()
                if entry.source.needs_base and entry.stream.group == index and entry.full not in found
            }
            if not entries and not plan.point.needs_base:
                continue
            base = _folded(plan, index, weights)
            if plan.point.needs_base:
                # Starts of several groups in parallel, as many as there are weights in memory.
                starts.append(pool.submit(_start, plan, index, base))
                if len(starts) == _WORKERS:
                    put(starts.popleft().result().items())
            # What is computed from the factors comes after them.
            for late in (False, True):
                own = {full: entry for full, entry in entries.items() if entry.source.needs_factors == late}
                factors = [_factors(group, full, found) if late else {} for full in own]
                arrays = pool.map(functools.partial(_computed, base), own.values(), factors)
                put(zip(own, arrays, strict=True))
        for start in starts:
            put(start.result().items())
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


def _factors(group: Group, full: str, found: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the frozen factors of the split of an array, by their modes."""
    split = full.partition(".")[2].rpartition(".")[0] + "."
    modes = {name: group.network.mode_of(name) for name in group.frozen_names if name.startswith(split)}
    return {mode: found[group.frozen_names[name]] for name, mode in modes.items() if mode is not None}


def _computed(base: np.ndarray, entry: FrozenArray, factors: Mapping[int, np.ndarray]) -> np.ndarray:
    return entry.compute(dataclasses.replace(entry.stream, base=base, factors=factors))


def _start(plan: GroupPlan, index: int, base: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the start of a group, by the names in ``plan.start_shapes``, in float32."""
    place = plan.start_place(index)
    stream = Stream(plan.config.seed, index, PURPOSE["source"])
    made = plan.point.arrays(place, base, stream)
    what = f"start={plan.config.start!r} of group {index}"
    if not isinstance(made, Mapping) or made.keys() != place.shapes.keys():
        names = sorted(made) if isinstance(made, Mapping) else type(made).__name__
        raise ConfigError(f"{what} must compute an array for each of {', '.join(place.shapes)}; got {names}")
    found = dict[str, np.ndarray]()
    for name, shape in place.shapes.items():
        array = np.asarray(made[name])
        if array.shape != shape or array.dtype.kind != "f":
            raise ConfigError(
                f"{what} must compute floating-point numbers of shape {shape} for {name!r}; got {array.dtype} of shape "
                f"{array.shape}"
            )
        with np.errstate(over="ignore"):
            single = array.astype(np.float32, order="C")
        if not np.isfinite(single).all() or (array.any() and not single.any()):
            raise ConfigError(f"{what} has numbers that float32 cannot represent in {name!r}")
        found[f"{PREFIX}group{index}.{name}"] = single
    return found


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

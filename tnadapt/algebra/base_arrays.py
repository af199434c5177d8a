"""Arrays of a plan that are not drawn at random: given by the caller, or computed from the base weights."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend, one_blas_thread
from tnadapt.errors import ConfigError, ShapeError, TnadaptError, safe_repr, summarize

from .group import Group, PlanPart
from .rng import PURPOSE
from .sources import FrozenArray, Stream
from .starting_points import PREFIX

# -- Arrays that a caller gives ----------------------------------------------------------------------------------------


def checked_given(
    given: Any, shapes: Mapping[str, tuple[int, ...]], integers: Collection[str] = (), label: str = "given"
) -> dict[str, np.ndarray]:
    """Return the arrays that a caller gives in float32, or raise an error that names the one that does not fit.

    Parameters
    ----------
    given : mapping of str to array
    shapes : mapping of str to tuple of int
        Of those that a caller may give.
    integers : collection of str
        Names of the arrays whose dtype may be an integer one.
    label : str
        The parameter that has them, for messages.

    Raises
    ------
    ConfigError
        If a name is not one of ``shapes``, or an array is not finite.
    ShapeError
        If an array has another shape.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{label} must be a mapping of names to arrays; got {type(given).__name__}")
    if unknown := [name for name in given if name not in shapes]:
        listed = summarize(shapes) if shapes else "none: use tnadapt.sources.Given()"
        raise ConfigError(f"{label} names {safe_repr(unknown[0])}; the arrays that a caller can give are {listed}")
    return {name: _single(f"{label}[{name!r}]", array, shapes[name], name in integers) for name, array in given.items()}


def _single(label: str, array: Any, shape: tuple[int, ...], integers: bool) -> np.ndarray:
    try:
        numbers = np.asarray(get_backend(array).to_numpy(array))
    except TnadaptError as error:
        raise ConfigError(f"{label} must be an array; {error}") from error
    if numbers.shape != shape:
        raise ShapeError(f"{label} has shape {numbers.shape}; expected {shape}")
    with np.errstate(over="ignore"):
        single = np.array(numbers, np.float32, order="C")  # parameters that start there must be contiguous
    if numbers.dtype.kind not in ("fiu" if integers else "f") or not np.isfinite(single).all():
        what = "finite numbers" if integers else "finite floating-point numbers"
        raise ConfigError(f"{label} must hold {what} that float32 can represent; its dtype is {numbers.dtype}")
    return single


# -- What base weights determine: frozen arrays and starts -------------------------------------------------------------


_WORKERS = min(8, os.cpu_count() or 1)


def from_base(
    part: PlanPart, groups: Sequence[Group], weight: Callable[[int], np.ndarray], on_array: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Compute what base weights determine of the groups of a config; see :meth:`tnadapt.UpdatePlan.with_base`.

    ``weight`` returns a base weight as a vector, by its number; ``on_array`` is called after each array.
    """
    arrays = dict[str, np.ndarray]()

    def put(computed: Iterable[tuple[str, np.ndarray]]) -> None:
        for full, array in computed:
            arrays[full] = array
            on_array()

    starts = collections.deque[Future[dict[str, np.ndarray]]]()
    # The last bits of a matrix product depend on the number of threads: one for each array, and arrays in parallel.
    with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        for index, group in enumerate(groups):
            # Tied arrays are computed with the group that they belong to.
            entries = {
                entry.full: entry
                for entry in group.frozen.entries.values()
                if entry.source.needs_base and entry.stream.group == index and entry.full not in arrays
            }
            if not entries and not part.point.needs_base:
                continue
            base = _folded(group, weight)
            if part.point.needs_base:
                # Starts of several groups in parallel, as many as there are weights in memory.
                starts.append(pool.submit(_start_of, part, index, base))
                if len(starts) == _WORKERS:
                    put(starts.popleft().result().items())
            # Arrays that are computed from the factors come last.
            for late in (False, True):
                phase = {full: entry for full, entry in entries.items() if entry.source.needs_factors == late}
                factors = [_factors(group, full, arrays) if late else {} for full in phase]
                put(zip(phase, pool.map(functools.partial(_computed, base), phase.values(), factors), strict=True))
        for computed in starts:
            put(computed.result().items())
    return arrays


def base_weight(backend: Backend, weight: Any, index: int, shape: tuple[int, int]) -> Any:
    """Return a base weight after checking its shape and dtype."""
    if tuple(weight.shape) != shape:
        raise ShapeError(f"base weight {index} has shape {tuple(weight.shape)}; expected {shape}")
    backend.require_float(weight, f"base weight {index}")
    return weight


def _factors(group: Group, full: str, arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the frozen factors of the split of an array, by their modes."""
    split = full.partition(".")[2].rpartition(".")[0] + "."
    modes = {name: group.network.mode_of(name) for name in group.frozen_names if name.startswith(split)}
    return {mode: arrays[group.frozen_names[name]] for name, mode in modes.items() if mode is not None}


def _computed(base: np.ndarray, entry: FrozenArray, factors: Mapping[int, np.ndarray]) -> np.ndarray:
    return entry.compute(dataclasses.replace(entry.stream, base=base, factors=factors))


def _start_of(part: PlanPart, index: int, base: np.ndarray) -> dict[str, np.ndarray]:
    """Compute x_0 of a group, by the names in ``UpdatePlan.start_shapes``, in float32."""
    place = part.place(index)
    computed = part.point.arrays(place, base, Stream(part.config.seed, index, PURPOSE["source"]))
    what = f"start={part.config.start!r} of group {index}"
    if not isinstance(computed, Mapping) or computed.keys() != place.shapes.keys():
        names = sorted(computed) if isinstance(computed, Mapping) else type(computed).__name__
        raise ConfigError(f"{what} must compute an array for each of {', '.join(place.shapes)}; got {names}")
    start = dict[str, np.ndarray]()
    for name, shape in place.shapes.items():
        array = np.asarray(computed[name])
        if array.shape != shape or array.dtype.kind != "f":
            raise ConfigError(
                f"{what} must compute floating-point numbers of shape {shape} for {name!r}; got {array.dtype} of shape "
                f"{array.shape}"
            )
        with np.errstate(over="ignore"):
            single = array.astype(np.float32, order="C")
        if not np.isfinite(single).all() or (array.any() and not single.any()):
            raise ConfigError(f"{what} has numbers that float32 cannot represent in {name!r}")
        start[PREFIX + part.name(index, name)] = single
    return start


def _folded(group: Group, weight: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return the base weights of a group as a tensor with the sizes of its network, in float64."""
    sizes = group.network.sizes
    vec = np.zeros(math.prod(sizes))
    start = 0
    for piece in group.pieces:
        whole = weight(piece.weight)
        vec[start : start + piece.length] = whole[piece.weight_start : piece.weight_start + piece.length]
        start += piece.length
    return vec.reshape(sizes)

"""The draws that an adapter's plan keeps: counted, and given back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends.fixed_arrays import FixedArrays

__all__ = ["drawn", "forget_draws", "held_by_draws"]


def drawn(plan: SuperLoRA) -> Iterator[FixedArrays]:
    """Yield what a plan keeps that can be computed again from its integers: draws, frozen and initial arrays."""
    for group in plan.arrays_plan.groups:
        yield from group.projection.map.components()
        yield from group.start.components()
        yield from group.frozen.components()
    if plan.theta is not None:
        for part in plan.theta.parts:
            yield from part.projection.map.components()


def held_by_draws(several: Iterable[FixedArrays]) -> int:
    """Return the bytes of arrays on the host and, where they are others, on devices; each counted once."""
    arrays: dict[int, int] = {}
    spare: dict[int, int] = {}
    for one in several:
        spare[id(one)] = one.spare_bytes
        for host in one.kept.values():
            arrays[host.__array_interface__["data"][0]] = host.nbytes
        for placed in one.placed.values():
            memory = placed.untyped_storage() if hasattr(placed, "untyped_storage") else None
            if memory is not None:
                arrays[memory.data_ptr()] = memory.nbytes()
    return sum(arrays.values()) + sum(spare.values())


def forget_draws(plan: SuperLoRA, but: Collection[int]) -> None:
    """Give back what a plan keeps, except for objects with these ids, which others use."""
    for one in drawn(plan):
        if id(one) not in but:
            one.free()

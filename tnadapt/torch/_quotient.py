"""The quotient m / ‖W + ΔW‖ of a layer whose output is scaled: with autograd, and cached while nothing changes.

The quotient is one autograd node (:class:`~tnadapt.torch._delta.DeltaFunction`) that keeps the small arrays alone:
backward forms W + ΔW once more instead of saving it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tnadapt.algebra.applying import Applying
from tnadapt.backends import load_backend

from ._array_snapshot import Snapshot
from ._delta import Slice, version
from ._delta_cache import CacheEntry, can_cache, held_bytes

__all__ = ["Quotient", "QuotientCache", "wide_pair"]


def wide_pair(weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight and its update on the weight's device, in the wider dtype of both."""
    kind = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(kind), delta.to(weight.device, kind)


class Quotient:
    """The quotient of one weight as a function of the arrays of its update, and of the weight's own parameters.

    Parameters
    ----------
    applying : Applying
        One that rescales.
    weight : callable
        Returns the base weight, ``(rows, cols)``.
    made : Slice or None
        Computes the update from all arrays but the last; None if the first array is the update itself.
    scale : float
        Factor of an update that is computed here.
    detach : bool
        Whether the norm counts as a constant for the gradient.
    """

    def __init__(
        self, applying: Applying, weight: Callable[[], Tensor], made: Slice | None, scale: float, detach: bool
    ) -> None:
        self.applying, self.weight, self.made = applying, weight, made
        self.scale, self.detach = scale, detach

    def __repr__(self) -> str:
        # Traces contain this text and are compared with each other.
        return f"Quotient({self.made!r})"

    def _total(self, arrays: Sequence[Tensor]) -> Tensor:
        delta = arrays[0] if self.made is None else self.made(*arrays[:-1])
        weight, delta = wide_pair(self.weight(), delta if self.scale == 1.0 else delta * self.scale)
        return cast(Tensor, weight + self.applying.change(load_backend("torch"), weight, delta))

    def __call__(self, *arrays: Tensor) -> Tensor:
        total = self._total(arrays)
        found = self.applying.rescaling(
            load_backend("torch"), total.detach() if self.detach else total, [arrays[-1].to(total.device)]
        )
        assert found is not None  # it rescales
        return cast(Tensor, found.quotient.view(-1))

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of the wanted arrays, given that of the quotient."""
        backend, last = load_backend("torch"), len(arrays) - 1
        total = self._total(arrays)
        found = self.applying.rescaling(backend, total, [arrays[-1].to(total.device)])
        assert found is not None
        through, (own,) = self.applying.rescaling_pulled(backend, total, found, gradient.view(-1, 1))
        gradients: dict[int, Tensor | None] = {last: own.to(arrays[-1].device, arrays[-1].dtype)}
        rest = [index for index in wanted if index != last]
        if rest and not self.detach:
            # C is ΔW where outputs are scaled.
            moved = through.to(arrays[0].device, arrays[0].dtype)
            moved = moved if self.scale == 1.0 else moved * self.scale
            pulled = [moved] if self.made is None else self.made.vjp(arrays[:-1], rest, moved)
            gradients.update(zip(rest, pulled, strict=True))
        return [gradients.get(index) for index in wanted]


class _KeptQuotient(NamedTuple):
    """A quotient without a graph, and what it was computed from."""

    entry: CacheEntry
    settings: tuple[Hashable, ...]
    quotient: Tensor


class QuotientCache:
    """Quotients of the weights of one adapter for passes without gradients, checked at every use.

    Notes
    -----
    As in :class:`~tnadapt.torch._delta_cache.DeltaCache`, arrays are compared by content with the copies that a
    quotient was computed from. The weight is too large for that: it has to be the same memory with the same version
    counter, which every operation in place on it changes. (A write through ``weight.data`` or NumPy does not.)
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], _KeptQuotient] = {}

    def get(self, index: int, names: Sequence[str], arrays: Sequence[Tensor], own: Quotient, weight: Tensor) -> Tensor:
        """Return the quotient of a weight for the current arrays; ``weight`` is the stored parameter."""
        if not can_cache(arrays, True) or weight.is_inference():
            return own(*arrays)
        key = index, torch.is_inference_mode_enabled()
        settings = weight.data_ptr(), weight.dtype, version(weight), own.scale
        found = self._kept.get(key)
        if found is not None and found.settings == settings and found.entry.is_of(names, arrays):
            return found.quotient
        # Copied first: computed from the copies, it is consistent whatever is written to the arrays meanwhile.
        copies = {name: Snapshot.of(array) for name, array in zip(names, arrays, strict=True)}
        made = own(*(copy.array for copy in copies.values()))
        self._kept[key] = _KeptQuotient(CacheEntry(copies, {}), settings, made)
        return made

    def forget(self) -> None:
        """Empty the cache."""
        self._kept = {}

    def held(self) -> int:
        """Return the bytes that it keeps."""
        return held_bytes(kept.quotient for kept in self._kept.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> QuotientCache:
        return QuotientCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return QuotientCache, ()

"""The models that share the base's tensors with an adapter's model: references of preference training."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import nn

from tnadapt.errors import warn

__all__ = ["SharedReferences"]


class SharedReferences:
    """The references of one adapter's model, as long as something else uses them; a copy of the adapter has none."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def add(self, model: nn.Module) -> None:
        """Remember a model without keeping it alive."""
        self._models.add(model)

    def warn_of_merge(self, adapter: str) -> None:
        """Warn that a merge changes the references that are still there."""
        if self._models:
            gc.collect()  # modules are in cycles, so one that was deleted may be there still
        if self._models:
            warn(
                f"adapter {adapter!r} is merged into weights that a reference_model() of this model shares, so the "
                "reference changes, too. If it is still used, unmerge() first, or merge into a copy that was loaded "
                "for it; if not, delete it before the merge",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedReferences:
        return SharedReferences()

    def __reduce__(self) -> tuple[type[SharedReferences], tuple[()]]:
        return SharedReferences, ()

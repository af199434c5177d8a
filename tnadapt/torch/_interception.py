"""Whether something intercepts torch's operations: a transform, a trace or a dispatch mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["in_dispatch_mode", "in_functorch"]


def in_functorch() -> bool:
    """Return whether a torch.func transform is active."""
    active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def in_dispatch_mode() -> bool:
    """Return whether operations are intercepted: by a trace, by forward-mode AD or by a dispatch mode.

    Such a mode may keep results for later, as selective checkpointing does, so no result may be overwritten.
    """
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )

"""What a quantized model needs while an adapter is attached to it, undone when the last one is detached.

- Layers whose library would change them in evaluation are told not to (:meth:`QuantizedLayer.while_attached`).
- Layers that pass no gradient to their input and are not adapted are named in a warning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from tnadapt.errors import warn

from ._quantized import quantized_type
from ._registry import overlapping
from ._state import AdapterState

__all__ = ["prepare", "put_back"]


class _Setting(NamedTuple):
    """An attribute of a module, and its value before it was set."""

    module: nn.Module
    name: str
    before: Any


def prepare(state: AdapterState) -> None:
    """Set what a quantized model needs for an adapter; what was there is recorded in ``state.settings``."""
    adapted = {id(patch.host) for patch in state.patches}
    blocking = []
    for path, module in state.model.named_modules():
        kind = quantized_type(module)
        if kind is None:
            continue
        for name, value in kind.while_attached(module).items():
            before = getattr(module, name)
            if before is not value:
                state.settings.append(_Setting(module, name, before))
                setattr(module, name, value)
        if id(module) not in adapted and not kind.passes_gradient(module):
            blocking.append(path)
    if blocking:
        warn(
            f"{len(blocking)} layers pass no gradient to their input, because they round it ({blocking[0]}, …), so "
            "that adapters before them learn from a part of their gradient: adapt these layers, too "
            "(targets='all-linear'), or use a quantization that leaves the input alone",
        )


def put_back(state: AdapterState) -> None:
    """Undo :func:`prepare`, or leave that to another adapter of these layers; can be called again."""
    others = [other for other in overlapping(state.model) if other is not state]
    if others:
        known = {(id(module), name) for module, name, _ in others[0].settings}
        others[0].settings += [one for one in state.settings if (id(one.module), one.name) not in known]
    else:
        for module, name, before in state.settings:
            setattr(module, name, before)
    state.settings = []

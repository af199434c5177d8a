"""PEFT's methods, and what an adapter's handle has instead: for the error of somebody who calls them."""

from __future__ import annotations

from typing import NoReturn

from tnadapt.errors import safe_repr

__all__ = ["refuse_attribute"]

_INSTEAD = {
    "add_weighted_adapter": "tnadapt.torch.mix(model, {'first': 0.5, 'second': 0.5}), which needs no new adapter",
    "delete_adapter": "detach()",
    "disable_adapter": "disabled()",
    "merge_adapter": "merge()",
    "merge_and_unload": "bake()",
    "set_adapter": "activate()",
    "unload": "detach()",
    "unmerge_adapter": "unmerge()",
}


def refuse_attribute(kind: str, name: str) -> NoReturn:
    """Raise the AttributeError of an attribute that is missing.

    Examples
    --------
    >>> refuse_attribute("Adapter", "merge_and_unload")
    Traceback (most recent call last):
        ...
    AttributeError: 'Adapter' object has no attribute 'merge_and_unload'; PEFT's merge_and_unload is bake() here
    """
    hint = f"; PEFT's {name} is {_INSTEAD[name]} here" if name in _INSTEAD else ""
    raise AttributeError(f"{kind!r} object has no attribute {safe_repr(name)}{hint}")

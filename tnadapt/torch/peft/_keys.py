"""The names of an adapter's arrays on a PEFT model and in PEFT's files.

On the model ``base_model.tnadapt.tnadapt_arrays.default.group0_split0_factor0``, in a file
``base_model.model.tnadapt.group0.split0.factor0``.
"""

from __future__ import annotations

import re

from tnadapt.errors import TargetError

from .._state import encoded
from ._registered_arrays import AdapterArrays

__all__ = ["check_adapter_name", "in_file"]

_ARRAY = r"(?:group\d+_(?:term\d+_)?split\d+_[a-z]+\d*(?:_[a-z]+)?|(?:group\d+_)?theta|weight\d+_[a-z]+)"
_RESERVED = re.compile(rf"tnadapt|tnadapt_arrays|{_ARRAY}")


def in_file(key: str, adapter_name: str) -> str | None:
    """Return an array's name in a file, given its name in a state dict; None if it does not belong to this adapter.

    Examples
    --------
    >>> in_file("base_model.tnadapt.tnadapt_arrays.v1%2E0.group0_split0_factor0", "v1.0")
    'base_model.model.tnadapt.group0.split0.factor0'
    >>> in_file("base_model.model.lm_head.weight", "v1.0")
    """
    # Whatever is in an adapter's container is one of its arrays: formats and sources of other packages name theirs.
    found = re.fullmatch(rf"(.*\.)?tnadapt\.tnadapt_arrays\.{re.escape(encoded(adapter_name))}\.([^.]+)", key)
    return None if found is None else f"{found[1] or ''}model.tnadapt.{found[2].replace('_', '.')}"


def check_adapter_name(name: str) -> None:
    """Raise a TargetError if PEFT would confuse the name with a part of every array's name, or torch forbids it."""
    if _RESERVED.fullmatch(name):
        raise TargetError(
            f"an adapter cannot be called {name!r}: the arrays of all adapters have this word in their names, and PEFT "
            "could not tell them apart; give another name"
        )
    if hasattr(AdapterArrays(), encoded(name)):
        raise TargetError(
            f"an adapter cannot be called {name!r}: its arrays are kept in an nn.ModuleDict, which has an attribute of "
            "that name; give another name"
        )

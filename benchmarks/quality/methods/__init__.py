"""The methods, by name: tnadapt's presets, methods of PEFT, and controls.

Presets come from their records; a new method of PEFT is one line in the table of ``_peft_methods.py``.
Anything else is a subclass of :class:`Method` that is given to :func:`register`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tnadapt.errors import TnadaptError, safe_repr

from ._controls import BASE, BIASES, CONTROLS, DENSE, FEW_SHOT, FITTED_HEAD, LORA_1, LORA_8, REFERENCES
from ._method import Method, Setting, UnfitError, key_of
from ._peft_methods import LEFT_OUT, PEFT_METHODS, trained
from ._presets import PRESETS

__all__ = [
    "BASE",
    "BIASES",
    "CONTROLS",
    "DENSE",
    "FEW_SHOT",
    "FITTED_HEAD",
    "LEFT_OUT",
    "LORA_1",
    "LORA_8",
    "REFERENCES",
    "Method",
    "Setting",
    "UnfitError",
    "find",
    "key_of",
    "names",
    "register",
    "trained",
]  # fmt: skip

_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name."""
    if method.name in _METHODS:
        raise TnadaptError(f"there is a method {safe_repr(method.name)} already; give this one another name")
    _METHODS[method.name] = method


def find(name: str) -> Method:
    """Return the method of a name."""
    try:
        return _METHODS[name]
    except KeyError:
        raise TnadaptError(f"no method {safe_repr(name)}; expected one of {', '.join(_METHODS)}") from None


def names(libraries: Iterable[str] = ("tnadapt", "PEFT")) -> list[str]:
    """Return the names of the methods of some libraries, in order."""
    return [name for name, method in _METHODS.items() if method.library in tuple(libraries)]


for _method in (*CONTROLS, *REFERENCES, *PRESETS, *PEFT_METHODS):
    register(_method)

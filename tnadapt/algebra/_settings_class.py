"""The check of classes whose fields are what a config and a file say of a map or a source."""

from __future__ import annotations

import dataclasses
from typing import Any

from tnadapt.errors import ConfigError

__all__ = ["require_frozen"]


def require_frozen(cls: Any, what: str, reserved: str) -> None:
    """Raise a ConfigError unless a class is a frozen dataclass whose fields are all arguments.

    Other settings would be lost: two objects that differ in them would be equal, and a file would not hold them.

    Parameters
    ----------
    cls : type
    what : str
        The class in messages.
    reserved : str
        The name that a file uses for the kind.
    """
    # Of the class itself: what it inherits says nothing of its own attributes.
    if "__dataclass_fields__" not in cls.__dict__ or not cls.__dict__["__dataclass_params__"].frozen:
        raise ConfigError(
            f"{what} must be a frozen dataclass: decorate the class with @dataclasses.dataclass(frozen=True)"
        )
    for field in dataclasses.fields(cls):
        if field.name == reserved or not field.init:
            raise ConfigError(
                f"{what} has the field {field.name!r}: the name {reserved!r} is reserved, and every field must be an "
                "argument of the class"
            )

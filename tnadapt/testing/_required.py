"""What a contract needs from the class that inherits it."""

from __future__ import annotations

from typing import Any

from tnadapt.errors import ConfigError

__all__ = ["Required"]


class Required:
    """A class attribute that a subclass must set: reading it before that says so.

    Parameters
    ----------
    example : str
        A value, as it would be written.

    Examples
    --------
    >>> class Contract:
    ...     kind = Required("MyFormat")
    >>> class TestMine(Contract):
    ...     pass
    >>> TestMine().kind
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: TestMine does not say what it tests: set kind = MyFormat in the class
    """

    def __init__(self, example: str) -> None:
        self.example, self.name = example, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        raise ConfigError(f"{owner.__name__} does not say what it tests: set {self.name} = {self.example} in the class")

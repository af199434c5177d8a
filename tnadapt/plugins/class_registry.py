"""Classes by name: those built in, and those that other packages register."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, Generic, TypeVar

from tnadapt.errors import ConfigError, safe_repr

from .entry_points import load_plugins

__all__ = ["Registry", "checked_name", "forget_registered"]

T = TypeVar("T")

_registries: list[Registry[Any]] = []
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes of one kind by the names that settings and files give them.

    Parameters
    ----------
    kind : str
        What the classes are, for messages: ``"format"``.
    contract : type
        What each class must inherit from.
    built_in : mapping of str to type
        In the order in which messages list them.

    Notes
    -----
    Plug-ins are loaded when a name is asked for that is not known; iteration goes over what is registered so far, the
    built-in classes first. A built-in class cannot be replaced: files that name it mean that class. A class registered
    before can, so that a notebook's cell can be run again.

    Examples
    --------
    >>> registry = Registry("shape", int, {"true": bool})
    >>> registry.find("true")
    <class 'bool'>
    >>> registry.find("round")
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: shape must be one of 'true'; got 'round'. If a plug-in provides it, install the plug-in
    """

    def __init__(self, kind: str, contract: type[T], built_in: Mapping[str, type[T]]) -> None:
        _registries.append(self)
        self.kind, self.contract = kind, contract
        self._built_in = dict(built_in)
        self._added: dict[str, type[T]] = {}

    def __getitem__(self, name: str) -> type[T]:
        return self._built_in[name] if name in self._built_in else self._added[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._added

    def __len__(self) -> int:
        return len(self._built_in) + len(self._added)

    @property
    def built_in(self) -> tuple[str, ...]:
        """The names of the classes that are part of this library."""
        return tuple(self._built_in)

    def check(self, name: str, cls: type[T]) -> None:
        """Raise what :meth:`register` raises, and register nothing."""
        checked_name(self.kind, name, self._built_in)
        if not (isinstance(cls, type) and issubclass(cls, self.contract)):
            raise ConfigError(
                f"a {self.kind} is a class that inherits from {_public(self.contract)}; got {safe_repr(cls)}"
            )

    def register(self, name: str, cls: type[T]) -> None:
        """Add a class.

        Raises
        ------
        ConfigError
            If the name is not lower-case letters, digits, ``.``, ``_`` and ``-`` (at most 64), or is built in, or the
            class does not inherit from the contract.
        """
        self.check(name, cls)
        self._added.pop(name, None)
        self._added[name] = cls

    def forget(self) -> None:
        """Remove what was registered: for tests."""
        self._added.clear()

    def find(self, name: object, other: str = "") -> type[T]:
        """The class of a name; plug-ins are loaded where it is not known.

        Parameters
        ----------
        name : object
            As a user gave it.
        other : str
            What else than a name would have been right, for the message.

        Raises
        ------
        ConfigError
            If there is none. It lists the names that there are, and the plug-ins that failed to load.
        """
        if isinstance(name, str):
            if name not in self:
                failures = load_plugins()
            if name in self:
                return self[name]
        else:
            failures = load_plugins()
        listed = ", ".join(repr(known) for known in self)
        other = f" {other}" if other else ""
        failed = "".join(f"; {failure}" for failure in failures)
        raise ConfigError(
            f"{self.kind} must be one of {listed}{other}; got {safe_repr(name)}. If a plug-in provides it, install the "
            f"plug-in{failed}"
        )


def checked_name(kind: str, name: object, built_in: Container[str]) -> str:
    """A name that something may be registered by.

    Raises
    ------
    ConfigError
        If it is not lower-case letters, digits, ``.``, ``_`` and ``-`` (at most 64), or is built in.

    Examples
    --------
    >>> checked_name("format", "tensor-ring", ("tt",))
    'tensor-ring'
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name of a {kind} is of lower-case letters, digits, '.', '_' and '-', at most 64; got "
            f"{safe_repr(name)}"
        )
    if name in built_in:
        raise ConfigError(f"{kind} {name!r} is built in and cannot be replaced: choose another name")
    return name


def _public(cls: type) -> str:
    """The name of a class as users import it: from the package of a private module."""
    package = cls.__module__.partition("._")[0]
    return f"{package}.{cls.__name__}"


def forget_registered() -> None:
    """Remove what was registered in every registry, and let plug-ins be loaded again: for tests."""
    for registry in _registries:
        registry.forget()
    load_plugins.cache_clear()

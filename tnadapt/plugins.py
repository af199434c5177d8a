"""Registries by name (formats, maps, sources, presets, file formats …), and the plug-ins that add to them.

Every choice that a setting names is in a registry. Another package adds its own through the ``register_…`` functions of
:mod:`tnadapt`, or, without having to be imported, through an entry point in the group ``tnadapt.plugins``.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Container, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, cast

from .errors import ConfigError, safe_repr

# -- Entry points in the group tnadapt.plugins, loaded when an unknown name is first looked up -------------------------

# An entry point names a function without arguments that calls ``tnadapt.register_format`` or a similar function::
#
#     [project.entry-points."tnadapt.plugins"]
#     tensor-ring = "my_package:register"


GROUP = "tnadapt.plugins"


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load every installed plug-in, once per process.

    Returns
    -------
    tuple of str
        One sentence per plug-in that failed to load: its name, its package, and the error. A failing plug-in never
        prevents the others, or anything built in, from working.
    """
    import importlib.metadata  # slow to import, and most programs need no plug-in

    failures = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:  # a plug-in may raise anything
            package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
            failures.append(f"plug-in {entry.name!r} of {package} failed to load: {type(error).__name__}: {error}")
    return tuple(failures)


def failed_plugins() -> str:
    """Return the end of a message about an unknown name: which plug-ins failed to load; empty if none did."""
    return "".join(f"; {failure}" for failure in load_plugins())


# -- Registries by name: built-in entries, and those of other packages -------------------------------------------------


V = TypeVar("V")
T = TypeVar("T")

_registries: list[NameRegistry[Any]] = []
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class NameRegistry(Mapping[str, V], Generic[V]):
    """Things of one kind, by the names that settings, files and commands use for them.

    Parameters
    ----------
    kind : str
        Kind of thing, for messages: ``"format"``.
    built_in : mapping of str to V
        In the order in which messages list them.
    aliases : mapping of str to str, optional
        Other names of what is built in, which settings and files never have.

    Notes
    -----
    Plug-ins are loaded when an unknown name is looked up. Iteration yields the names registered so far, the built-in
    ones first. What is built in cannot be replaced, because files refer to it by name. What was registered earlier can
    be replaced by the same module, so that a notebook cell can be rerun; two packages that choose the same name get an
    error.
    """

    def __init__(self, kind: str, built_in: Mapping[str, V], aliases: Mapping[str, str] | None = None) -> None:
        _registries.append(self)
        self.kind = kind
        self.aliases = dict(aliases or {})
        self._built_in = dict(built_in)
        self._added: dict[str, V] = {}
        self._definitions: dict[str, Any] = {}

    def __getitem__(self, name: str) -> V:
        return self._built_in[name] if name in self._built_in else self._added[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._added

    def __len__(self) -> int:
        return len(self._built_in) + len(self._added)

    @property
    def built_in(self) -> tuple[str, ...]:
        """Names of what is part of this library."""
        return tuple(self._built_in)

    def installed(self) -> tuple[str, ...]:
        """Return all names, those of every installed plug-in included."""
        load_plugins()
        return tuple(self)

    def knows(self, name: object) -> bool:
        """Return whether there is one of that name; load the plug-ins if there is none yet."""
        return isinstance(name, str) and (name in self or name in self.installed())

    def add(self, name: str, value: V, definition: Any) -> None:
        """Add a value that a class or function defines.

        Raises
        ------
        ConfigError
            If the name is not that of :func:`checked_name`, or another module has registered something under it.
        """
        checked_name(self.kind, name, {*self._built_in, *self.aliases})
        earlier = self._definitions.get(name, definition)
        if earlier.__module__ != definition.__module__:
            raise ConfigError(
                f"{self.kind} {name!r} is already registered, by {earlier.__module__}.{earlier.__qualname__}: choose "
                f"another name for {definition.__module__}.{definition.__qualname__}"
            )
        self._added.pop(name, None)
        self._added[name], self._definitions[name] = value, definition

    def forget(self) -> None:
        """Remove all that was registered; for tests."""
        self._added.clear()
        self._definitions.clear()

    def find(self, name: object, other: str = "") -> V:
        """Return the value of a name; load the plug-ins if the name is unknown.

        Parameters
        ----------
        name : object
            As given by the user.
        other : str
            What the setting accepts other than a name, for the message.

        Raises
        ------
        ConfigError
            If there is none. The message lists the known names and the plug-ins that failed to load.
        """
        if isinstance(name, str) and self.knows(name):
            return self[name]
        listed = ", ".join(repr(known) for known in self)
        other = f" {other}" if other else ""
        raise ConfigError(
            f"{self.kind} must be one of {listed}{other}; got {safe_repr(name)}{self.suggestion(name) or '.'} If a "
            f"plug-in provides it, install the plug-in{failed_plugins()}"
        )

    def suggestion(self, name: object) -> str:
        """Return words about the name that was probably meant; empty if there is none."""
        close = get_close_matches(name.lower(), list(self), n=1) if isinstance(name, str) else []
        return f"; did you mean {close[0]!r}?" if close else ""


class Registry(NameRegistry[type[T]], Generic[T]):
    """Classes of one kind, by name.

    Parameters
    ----------
    kind : str
        Kind of class, for messages: ``"format"``.
    contract : type
        Base class that each class must inherit from.
    built_in : mapping of str to type or str
        In the order in which messages list them; ``"package.module:Class"`` is imported when it is first looked up.
    aliases : mapping of str to str, optional

    Examples
    --------
    >>> registry = Registry("shape", int, {"true": "builtins:bool"})
    >>> registry.find("true")
    <class 'bool'>
    >>> registry.find("round")
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: shape must be one of 'true'; got 'round'. If a plug-in provides it, install the plug-in
    """

    def __init__(
        self,
        kind: str,
        contract: type[T],
        built_in: Mapping[str, type[T] | str],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(kind, cast("Mapping[str, type[T]]", built_in), aliases)
        self.contract = contract

    def __getitem__(self, name: str) -> type[T]:
        cls: type[T] | str = super().__getitem__(name)
        if isinstance(cls, str):
            module, _, qualname = cls.partition(":")
            cls = self._built_in[name] = cast("type[T]", getattr(importlib.import_module(module), qualname))
        return cls

    def check(self, name: str, cls: type[T]) -> None:
        """Raise the errors of :meth:`register` without registering anything."""
        if not (isinstance(cls, type) and issubclass(cls, self.contract)):
            raise ConfigError(
                f"{_one(self.kind)} must be a class that inherits from {_public(self.contract)}; got {safe_repr(cls)}"
            )
        checked_name(self.kind, name, {*self._built_in, *self.aliases})

    def register(self, name: str, cls: type[T]) -> None:
        """Add a class.

        Raises
        ------
        ConfigError
            If the name has other characters than lower-case letters, digits, ``.``, ``_`` and ``-``, or more than 64,
            or is built in, or another module has registered a class under it, or the class does not inherit from the
            contract.
        """
        self.check(name, cls)
        self.add(name, cls, cls)


def checked_name(kind: str, name: object, built_in: Container[str]) -> str:
    """Return a name if something may be registered under it, or raise an error.

    Raises
    ------
    ConfigError
        If it has other characters than lower-case letters, digits, ``.``, ``_`` and ``-``, or more than 64, or is
        built in.

    Examples
    --------
    >>> checked_name("format", "tensor-ring", ("tt",))
    'tensor-ring'
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name of {_one(kind)} must consist of at most 64 lower-case letters, digits, '.', '_' and '-'; got "
            f"{safe_repr(name)}"
        )
    if name in built_in:
        raise ConfigError(f"{kind} {name!r} is built in and cannot be replaced: choose another name")
    return name


def _one(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _public(cls: type) -> str:
    """Return the name of a class as users import it: from the public package, not from its private module."""
    package = cls.__module__.partition("._")[0]
    return f"{package}.{cls.__name__}"


def forget_registered() -> None:
    """Remove what was registered in every registry, and let plug-ins be loaded again; for tests."""
    for registry in _registries:
        registry.forget()
    load_plugins.cache_clear()

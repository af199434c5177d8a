"""Lazy imports (PEP 562): names and submodules of a package that are imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any


def lazy_names(
    package: str,
    modules: Mapping[str, str],
    submodules: Collection[str] = (),
    with_extras: Collection[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package, which keeps a name once it has been imported.

    Parameters
    ----------
    package : str
        ``__name__`` of the package.
    modules : mapping of str to str
        The module of each name, relative to the package: ``"_study"``, ``"decomposition.extraction"``.
    submodules : collection of str
        Modules of the package that are used as its attributes.
    with_extras : collection of str
        Likewise, where importing needs an extra: ``dir()`` leaves them out.
    elsewhere : mapping of str to str, optional
        Names that users look for in the package, and what to use instead.

    Examples
    --------
    >>> getattr_of, dir_of = lazy_names("tnadapt.serving", {"ServedFolder": "_served_folder"})
    >>> getattr_of("ServedFolder").__name__
    'ServedFolder'
    """

    def get_attribute(name: str) -> Any:
        if name in submodules or name in with_extras:
            return importlib.import_module(f".{name}", package)
        if elsewhere and name in elsewhere:
            raise AttributeError(f"module {package!r} has no attribute {name!r}: use {elsewhere[name]}", name=name)
        value = lazy_name(package, modules, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        namespace = vars(sys.modules[package])
        return sorted({*namespace, *namespace["__all__"], *submodules})

    return get_attribute, names


def lazy_name(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Import the module of a name, and return what it names; for the ``__getattr__`` of a package.

    Parameters
    ----------
    package : str
        ``__name__`` of the package.
    modules : mapping of str to str
        The module of each name, relative to the package: ``"_study"``, ``"decomposition.extraction"``.
    name : str

    Raises
    ------
    AttributeError
        If there is no such name.

    Examples
    --------
    >>> lazy_name("tnadapt", {"cp": "tensors"}, "cp").__name__
    'cp'
    >>> lazy_name("tnadapt", {"cp": "tensors"}, "pc")
    Traceback (most recent call last):
    AttributeError: module 'tnadapt' has no attribute 'pc'
    """
    if name not in modules:
        # Given the module, Python adds "Did you mean" from its __dir__.
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
    path = modules[name].split(".")
    # Outermost package first: otherwise two threads, importing a package and a module in it, could deadlock.
    for length in range(1, len(path) + 1):
        module = importlib.import_module(f".{'.'.join(path[:length])}", package)
    return getattr(module, name)


def lazy_module(package: str, name: str) -> ModuleType:
    """Import a public submodule; for the ``__getattr__`` of a package whose submodules are used as attributes.

    Parameters
    ----------
    package : str
        ``__name__`` of the package.
    name : str

    Raises
    ------
    AttributeError
        If there is no such submodule, or its name begins with an underscore.

    Examples
    --------
    >>> lazy_module("tnadapt.algebra", "geometry").__name__
    'tnadapt.algebra.geometry'
    >>> lazy_module("tnadapt.algebra", "geometri")
    Traceback (most recent call last):
    AttributeError: module 'tnadapt.algebra' has no attribute 'geometri'
    """
    if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
    return importlib.import_module(f".{name}", package)

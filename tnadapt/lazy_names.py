"""Names of a package whose modules are imported when the name is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["lazy_name"]


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
        # With the module, Python adds "Did you mean", from its __dir__.
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
    return getattr(importlib.import_module(f".{modules[name]}", package), name)

"""Adapters of PEFT, LyCORIS and other libraries, in and out: exactly where algebra permits, else with the error.

The call is :func:`convert`, and ``_pipeline`` has its steps: read, choose, write, measure. A file of another library
is read by its :class:`FileFormat` (``_peft_format``, ``_lycoris_format``) as one ``ModuleUpdate`` a module
(``_updates``), and all of these are joined into an adapter file (``_unpack``). On the way out, ``_unpack`` finds what
each module's update is made of, ``_nearest`` what it becomes, and the format encodes and writes that; it is read back
to measure the error. Another package adds a format by one class and :func:`register_file_format`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._api import convert

if TYPE_CHECKING:
    from ._base_model import Base, target_of
    from ._conversion import Conversion
    from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter
    from ._files import StoredFiles
    from ._pipeline import register_file_format
    from ._unpack import Module, TargetUpdate
    from ._updates import ModuleUpdate, Pair

    FORMS: tuple[str, ...]

__all__ = [
    "FORMS",
    "Base",
    "Conversion",
    "EncodedAdapter",
    "ExportChoice",
    "FileFormat",
    "ForeignAdapter",
    "Module",
    "ModuleUpdate",
    "Pair",
    "StoredFiles",
    "TargetUpdate",
    "convert",
    "register_file_format",
    "target_of",
]

# Imported when first used: the function convert is a part of the package's root, which most programs use without it.
_LAZY = {
    "Base": "_base_model",
    "Conversion": "_conversion",
    "EncodedAdapter": "_file_format",
    "ExportChoice": "_file_format",
    "FileFormat": "_file_format",
    "ForeignAdapter": "_file_format",
    "Module": "_unpack",
    "ModuleUpdate": "_updates",
    "Pair": "_updates",
    "StoredFiles": "_files",
    "TargetUpdate": "_unpack",
    "register_file_format": "_pipeline",
    "target_of": "_base_model",
}


def __getattr__(name: str) -> Any:
    if name == "FORMS":  # never stored, as it grows with every format that is registered
        return importlib.import_module("._pipeline", __name__).forms()
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)

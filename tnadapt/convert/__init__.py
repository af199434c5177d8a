"""Convert adapters from and to PEFT, LyCORIS and other libraries: exactly if possible, otherwise with a known error.

:func:`convert` is the entry point, and ``_pipeline`` runs its steps: read, choose, write, measure. The
:class:`FileFormat` of a library (such as ``_peft_format``) reads its files as one ``ModuleUpdate`` per
module (``_updates``), and ``_unpack`` joins these into an adapter file. For export, ``_unpack`` determines the form of
each module's update, ``_nearest`` chooses the form to write, and the format encodes and writes it. The result is read
back to measure the error. Other packages add a format with a class and :func:`register_file_format`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tnadapt.lazy_names import lazy_name

from ._api import convert

if TYPE_CHECKING:
    from ._base_model import Base, target_of
    from ._conversion import Conversion
    from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter
    from ._files import StoredFiles
    from ._format_registry import register_file_format
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

# Imported on first use: tnadapt itself exports convert, and most programs never call it.
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
    "register_file_format": "_format_registry",
    "target_of": "_base_model",
}


def __getattr__(name: str) -> Any:
    if name == "FORMS":  # never stored, as it grows with every format that is registered
        return importlib.import_module("._format_registry", __name__).forms()
    return lazy_name(__name__, _LAZY, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The registry of file formats, and the names of the forms that they write."""

from __future__ import annotations

from tnadapt.errors import ConfigError, safe_repr
from tnadapt.plugins import Registry

from ._diffusers_format import DiffusersFormat
from ._file_format import KINDS, FileFormat
from ._gguf_format import GgufFormat
from ._kohya_format import KohyaFormat
from ._lycoris_format import LycorisFormat
from ._peft_format import PeftFormat
from ._vllm_format import VllmFormat

__all__ = ["OWN", "format_names", "format_of", "forms", "is_built_in", "register_file_format"]

#: The name of this library's own form.
OWN = "tnadapt"

# Files are detected in reverse order.
_formats: Registry[FileFormat] = Registry(
    "file format",
    FileFormat,
    {
        "peft": PeftFormat, "lycoris": LycorisFormat, "kohya": KohyaFormat, "diffusers": DiffusersFormat,
        "gguf": GgufFormat, "vllm": VllmFormat,
    },
)  # fmt: skip


def register_file_format(name: str, cls: type[FileFormat]) -> None:
    """Register a file format of adapters for :func:`tnadapt.convert` and ``tnadapt convert``.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.`` and ``_``. The format's forms are named ``NAME-lora`` and so on.
    cls : type
        A subclass of :class:`FileFormat`, called without arguments.

    Raises
    ------
    ConfigError
        If the name has another form, is built in, or registered by another module, or the class lacks a method; the
        message names it.

    Notes
    -----
    Formats are asked to detect a path in reverse order of registration. The module that registered a name can replace
    the class, so that a notebook cell can be rerun.
    """
    if isinstance(name, str) and "-" in name:
        raise ConfigError(f"the name of a file format has no '-', which begins the form: {name}-lora; got {name!r}")
    if isinstance(name, str) and name == OWN:
        raise ConfigError(f"file format {name!r} is built in and cannot be replaced: choose another name")
    _formats.check(name, cls)
    if unknown := [kind for kind in cls.kinds if kind not in KINDS]:
        raise ConfigError(f"kinds of {cls.__name__} may have {', '.join(KINDS)}; got {safe_repr(unknown[0])}")
    asked = ["detect", "read"]
    asked += ["encode", "write"] if cls.kinds else []
    asked += ["fit_kronecker"] if "lokr" in cls.kinds else []
    asked += ["encode_file", "write"] if cls.structures else []
    if missing := [method for method in dict.fromkeys(asked) if getattr(cls, method) is getattr(FileFormat, method)]:
        raise ConfigError(f"the file format {name!r} lacks {', '.join(missing)}: define that on {cls.__name__}")
    _formats.register(name, cls)


def forms() -> tuple[str, ...]:
    """Return all valid values of ``to``: a format alone, for the adapter's own method, and with each of its methods."""
    found = [OWN]
    for name, cls in _formats.items():
        found += [name] if cls.kinds else []
        found += [f"{name}-{kind}" for kind in (*cls.kinds, *cls.structures)]
    return tuple(found)


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, in the order in which they are asked to detect a path."""
    return tuple(reversed(tuple(_formats)))


def format_of(name: str) -> FileFormat:
    """Return a format by its name."""
    found = _formats.find(name)()
    found.name = name
    return found


def is_built_in(name: str) -> bool:
    """Return whether a format is part of this library."""
    return name in _formats.built_in

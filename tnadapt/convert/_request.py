"""The requested form of a conversion: checked arguments, and the method where only a format is named."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from tnadapt.errors import ConfigError, integer, safe_repr
from tnadapt.plugins import load_plugins

from ._file_format import KINDS, FileFormat
from ._format_registry import OWN, format_of, forms
from ._nearest import ExportSpec
from ._unpack import Module, Unpacked

__all__ = ["check_part", "checked_request", "has_rank", "with_method"]

_DTYPES = ("float32", "float16", "bfloat16", "float64")


def checked_request(to: Any, rank: Any, max_error: Any, dtype: Any) -> ExportSpec | None:
    """Check the arguments; return the requested form, or None for a file of this library."""
    if to not in forms():
        load_plugins()
    if to not in (known := forms()):
        raise _no_choice("to", to, known)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype (--dtype) must be one of {', '.join(_DTYPES)}; got {safe_repr(dtype)}")
    if max_error is not None and (
        isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not 0 <= max_error <= 1
    ):
        raise ConfigError(f"max_error (--max-error) must be a number from 0 to 1; got {safe_repr(max_error)}")
    if rank is not None:
        rank = integer("rank", rank, 1, 1 << 40, ConfigError)
        if not has_rank(to):
            raise ConfigError(f"rank={rank} (--rank) applies to LoRA, LoKr and LoHa only; {to!r} has no rank to choose")
    if to == OWN:
        return None
    name, _, kind = to.partition("-")
    return ExportSpec(to, format_of(name), kind, rank, max_error)


def _no_choice(what: str, given: Any, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(given, known, n=2) if isinstance(given, str) else []
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ConfigError(f"{what} (--{what}) must be one of {', '.join(known)}; got {safe_repr(given)}{meant}")


def check_part(part: Any, source: FileFormat | None, target: FileFormat | None) -> None:
    """Raise ConfigError unless ``part`` is None, or a part that the source may have or the result may be.

    Parameters
    ----------
    part : str or None
        The argument of the caller.
    source, target : FileFormat or None
        The formats of both; None for a file of this library.
    """
    if part is None:
        return
    known = [*(source.parts_read if source else ()), *(target.parts_written if target else ())]
    if not known:
        one, other = (form.name if form else OWN for form in (source, target))
        raise ConfigError(
            f"part={safe_repr(part)} (--part) has no effect on a conversion from {one} to {other}: only files of "
            "kohya and diffusers have parts. Leave it out"
        )
    if part not in known:
        raise _no_choice("part", part, list(dict.fromkeys(known)))


def has_rank(form: str) -> bool:
    """Return whether a form is of a rank: not the full differences, nor a structure of its own."""
    _, _, kind = form.partition("-")
    return form != OWN and kind in ("", *KINDS) and kind != "full"


def with_method(spec: ExportSpec, modules: Sequence[Module], unpacked: Unpacked) -> ExportSpec:
    """Return a form with its method; for a format alone, that of all updates, or else the format's first: LoRA."""
    if spec.kind:
        return spec
    kinds = spec.format.kinds
    found = {form.kind if (form := module.form(unpacked)) is not None else "" for module in modules}
    own = found.pop() if len(found) == 1 else ""
    kind = own if own in kinds else kinds[0]
    return spec._replace(form=f"{spec.format.name}-{kind}", kind=kind)

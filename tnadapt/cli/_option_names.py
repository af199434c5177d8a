"""Messages of the library in the words of the command line: its arguments become options."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["as_options"]


def as_options(text: str, names: Sequence[str]) -> str:
    """Return a message with the library's arguments rewritten as command-line options.

    Parameters
    ----------
    text : str
    names : sequence of str
        The arguments that are options of the command, such as "max_error".

    Examples
    --------
    >>> names = ("to", "part", "max_error")
    >>> as_options("Choose one, for example part='lora_te'; or give max_error= to accept it", names)
    'Choose one, for example --part lora_te; or give --max-error to accept it'
    >>> as_options("exists; give another path, or overwrite=True (--overwrite)", names)
    'exists; give another path, or --overwrite'
    >>> as_options("to must be one of tnadapt, peft; got 'pfet'", names)
    "--to must be one of tnadapt, peft; got 'pfet'"
    >>> as_options("merge it into the base with tnadapt.merge, or convert it to 'peft-lora'", names)
    'merge it into the base with tnadapt merge, or convert it with --to peft-lora'
    >>> as_options("tnadapt convert FOLDER -o FILE, or in Python tnadapt.convert(FOLDER, FILE)", names)
    'tnadapt convert FOLDER -o FILE, or in Python tnadapt.convert(FOLDER, FILE)'
    """
    known = "|".join(map(re.escape, names))
    text = re.sub(r"\b\w+='?\w+'? \((--[^)]*)\)", r"\1", text)
    text = re.sub(rf"\ba ({known}) of\b", lambda found: _option(found[1]), text)
    text = re.sub(rf"(?<![\w.\"'-])({known})=(?:'([^']*)'|([\w.-]*\w))?(?![{{\[])", _given, text)
    text = re.sub(rf"^({known})(?= must be )", lambda found: _option(found[1]), text)
    text = re.sub(r"\bconvert (it )?to '([\w-]+)'", r"convert \1with --to \2", text)
    # A whole call stays one of Python.
    return re.sub(r"\btnadapt\.(merge|convert|extract)\b(?!\()", r"tnadapt \1", text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(found: re.Match[str]) -> str:
    return " ".join(filter(None, (_option(found[1]), found[2], found[3])))

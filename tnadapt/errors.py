"""The errors this library raises for a caller's mistake.

All derive from :class:`TnadaptError`, which is a ``ValueError``: code that does not know this library
still catches them. A message says what was given, what was expected, and the way out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

# Letters that nobody sees, and that Python calls printable: joiners, fillers and variation selectors.
_INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)  # fmt: skip


def escaped(text: str) -> str:
    r"""Somebody else's text such that a terminal shows it as it is, in one line.

    Whatever moves a cursor, changes colours, begins a line, turns the direction of writing or is not seen becomes an
    escape such as ``\x1b``. What is printed and may come from a file, a model or a folder goes through here: names,
    metadata, paths, messages.

    Parameters
    ----------
    text : str

    Returns
    -------
    str

    Examples
    --------
    >>> escaped("layer\x1b[31m\n\u202efc"), escaped("größe.weight")
    ('layer\\x1b[31m\\n\\u202efc', 'größe.weight')
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() and letter not in _INVISIBLE else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


class TnadaptError(ValueError):
    """Anything a caller of tnadapt did that cannot be carried out.

    A message is one line that is safe to print: names of files and tensors in it are escaped.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(escaped(one) if isinstance(one, str) else one for one in arguments))


class ConfigError(TnadaptError):
    """A setting that is unknown, of the wrong type, impossible, or at odds with another one."""


class ShapeError(TnadaptError):
    """An array, or a list of weight shapes, whose sizes do not fit what was asked."""


class BackendError(TnadaptError):
    """An array library, dtype or device that is not known, not available, or mixed with another."""


class FileError(TnadaptError):
    """A file that is damaged, hostile, of another format, or does not belong to what it is used with."""


class TargetError(TnadaptError):
    """A weight of a model that cannot be found, is there twice, or cannot be updated in the way that was asked."""


class UnexpectedKeywordError(ConfigError, TypeError):
    """A keyword argument that is not taken; also the TypeError that Python raises for one."""


# What PEFT's users write, what it is called here, and where it is given.
_PEFT_KEYWORDS = {
    "r": ("rank", "a setting of tnadapt.Config and its presets"),
    "lora_alpha": ("alpha", "a setting of tnadapt.Config and its presets"),
    "target_modules": ("targets", "an argument of tnadapt.torch.attach"),
    "modules_to_save": ("keep_trainable", "an argument of tnadapt.torch.attach"),
}


def peft_hint(name: str) -> str | None:
    """What a keyword of PEFT's configs is called here; None for any other name.

    Examples
    --------
    >>> peft_hint("lora_alpha"), peft_hint("alpha")
    ("PEFT's 'lora_alpha' is 'alpha' here, a setting of tnadapt.Config and its presets", None)
    """
    if name not in _PEFT_KEYWORDS:
        return None
    ours, where = _PEFT_KEYWORDS[name]
    return f"PEFT's {name!r} is {ours!r} here, {where}"


def explains_peft_keywords(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let a function answer a keyword of PEFT's with an error that has its name here.

    Examples
    --------
    >>> @explains_peft_keywords
    ... def attach(model, targets="qv"):
    ...     return targets
    >>> attach(None, target_modules="qkv")
    Traceback (most recent call last):
        ...
    tnadapt.errors.UnexpectedKeywordError: attach() got an unexpected keyword argument 'target_modules': PEFT's
    'target_modules' is 'targets' here, an argument of tnadapt.torch.attach
    """

    @functools.wraps(function)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        for name in kwargs:
            hint = peft_hint(name)
            if hint is not None:
                raise UnexpectedKeywordError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}: {hint}"
                )
        return function(*args, **kwargs)

    return checked


def safe_repr(value: Any) -> str:
    """A value as a message shows it: short, and never an error of its own.

    Examples
    --------
    >>> safe_repr("cp"), safe_repr(10**5000)
    ("'cp'", 'an integer of 16610 bits')
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python refuses to print integers of more than 4300 digits, and lists nested too deep.
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return escaped(text if len(text) <= 200 else text[:200] + " …")


def integer(name: str, value: Any, low: int, high: int, error: type[TnadaptError], other: str = "") -> int:
    """``value`` as an integer from low to high, or an error that names it.

    Examples
    --------
    >>> integer("rank", 4, 1, 8, ConfigError)
    4
    >>> integer("rank", 4.0, 1, 8, ConfigError)
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: rank must be an integer; got 4.0
    """
    other = f" {other}" if other else ""
    if isinstance(value, bool):
        raise error(f"{name} must be an integer{other}; got {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be an integer{other}; got {safe_repr(value)}") from None
    if not low <= number <= high:
        raise error(f"{name} must be from {low} to {high}; got {safe_repr(number)}")
    return number


def summarize(names: Iterable[str]) -> str:
    """Return a few of the names, sorted, for a message.

    Examples
    --------
    >>> summarize(["q", "k", "v", "o", "mlp"])
    "'k', 'mlp', 'o', 'q' and 1 more"
    """
    listed = sorted(names)
    return (", ".join(map(safe_repr, listed[:4])) or "none") + (
        f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    )


def pluralize(number: int, what: str) -> str:
    """Return a number with a noun, in the plural unless the number is 1.

    Examples
    --------
    >>> pluralize(1, "array"), pluralize(2, "array")
    ('1 array', '2 arrays')
    """
    return f"{number} {what}" + ("" if number == 1 else "s")

"""The exceptions that this library raises for invalid input.

All derive from :class:`TnadaptError`, which is a ``ValueError``, so generic code still catches them. Each message says
what was given, what was expected, and how to fix it.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable
from typing import Any

_PACKAGE = os.path.dirname(__file__) + os.sep
# torch's decorators, such as no_grad.
_DECORATORS = os.path.join("torch", "utils", "_contextlib.py")

# Invisible characters that ``str.isprintable`` accepts: joiners, fillers and variation selectors.
_INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)  # fmt: skip


def escaped(text: str) -> str:
    r"""Escape untrusted text so that it is safe to print and stays on one line.

    Characters that move the cursor, change colors, start a new line, change the writing direction or are invisible
    become escapes such as ``\x1b``. Use it for all printed text that may come from a file, a model or a folder: names,
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


# Maximum length of a message: longer than the longest path that Linux opens.
_LONGEST = 5000
# Characters that make a spreadsheet take a cell for a formula, also in full width; and a number, which is no formula.
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def spreadsheet_text(text: str) -> str:
    """Return text that a spreadsheet does not take for a formula: with ``'`` before it if it would.

    Use it for every cell of a CSV file that may come from a file, a model or a user, as OWASP recommends. Numbers stay
    as they are.

    Parameters
    ----------
    text : str

    Returns
    -------
    str

    Examples
    --------
    >>> [spreadsheet_text(text) for text in ("=1+2", "@sum", "-1.5e3", "a=b")]
    ["'=1+2", "'@sum", '-1.5e3', 'a=b']
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


class TnadaptError(ValueError):
    """Base class of the errors that tnadapt raises for invalid input.

    The message is a single line that is safe to print: file and tensor names in it are escaped. Of one that is longer
    than 5,000 letters, which only a mistaken or hostile name makes it, the middle is left out.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_shortened(escaped(value)) if isinstance(value, str) else value for value in arguments))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


class ConfigError(TnadaptError):
    """A setting that is unknown, of the wrong type, out of range, or in conflict with another setting."""


class ShapeError(TnadaptError):
    """An array, or a list of weight shapes, whose sizes do not fit the request."""


class BackendError(TnadaptError):
    """An array library, dtype or device that is unknown, unavailable, or mixed with another."""


class FileError(TnadaptError):
    """A file that is damaged, malicious, in another format, or does not match what it is used with."""


class TargetError(TnadaptError):
    """A model weight that cannot be found, occurs twice, or cannot be updated as requested."""


class UnexpectedKeywordError(ConfigError, TypeError):
    """An unexpected keyword argument; also a TypeError, which is what Python itself raises for one."""


_SETTING = "a setting of tnadapt.Config and its presets"
_ARGUMENT = "an argument of tnadapt.torch.attach"
_FROM_DATA = f"{_SETTING}: attach with start='given', then call adapter.start_from"

# Library -> its keyword -> (its name in tnadapt, where it is passed).
_OTHER_KEYWORDS = {
    "PEFT": {
        "r": ("rank", _SETTING),
        "lora_alpha": ("alpha", _SETTING),
        "target_modules": ("targets", _ARGUMENT),
        "modules_to_save": ("keep_trainable", _ARGUMENT),
        "layers_to_transform": ("layers", _ARGUMENT),
        "lora_dropout": ("dropout", _ARGUMENT),
        "exclude_modules": ("exclude", _ARGUMENT),
        "rank_pattern": ("cfg", f"{_ARGUMENT}: a mapping of patterns to configs"),
        "alpha_pattern": ("cfg", f"{_ARGUMENT}: a mapping of patterns to configs"),
        "use_dora": ("dora", "a preset"),
        "use_rslora": ("alpha", f"{_SETTING}, which rsLoRA multiplies by √rank"),
        "init_lora_weights": ("start", _SETTING),
        "target_parameters": ("targets", f"{_ARGUMENT}: 'all-linear' finds experts, too"),
        "ensure_weight_tying": ("keep_tied", _ARGUMENT),
        "init_weights": ("start", _SETTING),
        "eva_config": ("start", f"{_FROM_DATA}(tnadapt.torch.starts.eva(adapter, batches))"),
        "lora_ga_config": ("start", f"{_FROM_DATA}(tnadapt.torch.starts.lora_ga(adapter, …))"),
        "trainable_token_indices": ("targets", "with tnadapt.torch.token_targets(model, indices)"),
        "bias": ("biases", f"{_ARGUMENT}: 'none', 'adapted' or 'all'"),
    },
    "LyCORIS": {
        "linear_dim": ("rank", _SETTING),
        "linear_alpha": ("alpha", _SETTING),
        "conv_dim": ("rank", f"{_SETTING}; attach takes a mapping of patterns to configs"),
        "conv_alpha": ("alpha", f"{_SETTING}; attach takes a mapping of patterns to configs"),
        "algo": ("cfg", f"{_ARGUMENT}: the name of a preset"),
        "rank_dropout": ("dropout", _ARGUMENT),
        "module_dropout": ("dropout", _ARGUMENT),
    },
    "kohya-ss": {
        "network_dim": ("rank", _SETTING),
        "network_alpha": ("alpha", _SETTING),
        "network_module": ("cfg", f"{_ARGUMENT}: the name of a preset"),
        "network_dropout": ("dropout", _ARGUMENT),
    },
}  # fmt: skip

# Keywords of an optimizer.
_OF_TRAINING = ("lr", "learning_rate", "weight_decay")

# Keywords of PEFT without a counterpart, and what to do instead.
_NOT_NEEDED = {
    "task_type": "attach takes any model, so leave it out; train a new head by keep_trainable=",
    "inference_mode": "leave it out, and run the model under torch.inference_mode()",
    "fan_in_fan_out": "attach sees how a layer stores its weight, so leave it out",
    "layers_pattern": "layers= counts by the first number in a path; for another one, give targets= as a regular "
    "expression",
    "lora_bias": "no factor has a bias; biases= trains those of the adapted layers",
    "loftq_config": "attach to the quantized model",
    "corda_config": "CorDA is not supported; tnadapt.torch.starts has eva and lora_ga",
    "layer_replication": "it is not supported; repeat layers as copies with weights of their own, then attach",
    "runtime_config": "leave it out",
    "megatron_config": "Megatron's parallel layers are not supported",
    "megatron_core": "Megatron's parallel layers are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "arrow_config": "routing between adapters is not supported; tnadapt.torch.mix weights them",
    "use_qalora": "QA-LoRA is not supported; attach to the quantized model",
    "qalora_group_size": "QA-LoRA is not supported; attach to the quantized model",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "kasa_config": "KaSA is not supported",
}


# TensorLy's keywords of decompositions that are unlike tnadapt's.
_OF_TENSORLY = {"fixed_factors": "fixed", "l2_reg": "ridge", "n_iter_max": "max_iterations", "nn_modes": "nonnegative"}


def unexpected_keyword(
    function: str, name: str, keywords: Collection[str], way: str | None = None
) -> UnexpectedKeywordError:
    """Return the error for a keyword that a function does not have, with the way out or the one that was meant.

    Examples
    --------
    >>> print(unexpected_keyword("cp", "rnak", ["rank", "max_iterations"]))
    cp() got an unexpected keyword argument 'rnak': did you mean 'rank'?
    >>> print(unexpected_keyword("cp", "verbose", ["rank", "max_iterations"]))
    cp() got an unexpected keyword argument 'verbose': it has rank, max_iterations
    """
    import difflib

    renamed = _OF_TENSORLY.get(name)
    close = [renamed] if renamed in keywords else difflib.get_close_matches(name, keywords, n=1)
    way = way or (f"did you mean {close[0]!r}?" if close else f"it has {', '.join(keywords) or 'none'}")
    return UnexpectedKeywordError(f"{function}() got an unexpected keyword argument {name!r}: {way}")


def keyword_hint(name: str) -> str | None:
    """Return a hint with tnadapt's name for a keyword of PEFT, LyCORIS or kohya-ss; None for any other name.

    Examples
    --------
    >>> keyword_hint("lora_alpha"), keyword_hint("alpha")
    ("PEFT's 'lora_alpha' is 'alpha' here, a setting of tnadapt.Config and its presets", None)
    """
    if name in _OF_TRAINING:
        return f"{name!r} is the optimizer's, as in torch.optim.AdamW(adapter.parameters(), lr=0.01)"
    if name in _NOT_NEEDED:
        return f"PEFT's {name!r} has no equivalent: {_NOT_NEEDED[name]}"
    for library, keywords in _OTHER_KEYWORDS.items():
        if name in keywords:
            ours, where = keywords[name]
            return f"{library}'s {name!r} is {ours!r} here, {where}"
    return None


def safe_repr(value: Any) -> str:
    """Return a short repr of a value for an error message; never raise.

    Examples
    --------
    >>> safe_repr("cp"), safe_repr(10**5000)
    ("'cp'", 'an integer of 16610 bits')
    """
    try:
        text = repr(value)
    except Exception:
        # Python refuses to print integers of more than 4300 digits, and lists that are nested too deeply; the repr of
        # another library's object may raise anything.
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return escaped(text if len(text) <= 200 else text[:200] + " …")


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


def warn(message: str) -> None:
    """Warn at the line of the caller outside of this library, however many of its functions lie between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename.endswith(_DECORATORS)
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)

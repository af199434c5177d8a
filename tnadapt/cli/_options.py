"""Options shared by several commands: their help, and their values parsed and checked before torch is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import typer

import tnadapt
from tnadapt.errors import FileError, TnadaptError

from .terminal import pair_of

# -- Values ------------------------------------------------------------------------------------------------------------


# Characters that distinguish a regular expression from a name, which may have dots.
_PATTERN = frozenset(r"\^$*+?{}[]|()")


def settings_of(
    texts: Sequence[str], options: Collection[str] = (), way: str = "leave one of them out"
) -> dict[str, Any]:
    """Parse every ``FIELD=VALUE``, with the value as JSON or a word.

    Parameters
    ----------
    texts : sequence of str
    options : collection of str
        The fields that other options have given.
    way : str
        What to do if a field is given twice.

    Raises
    ------
    TnadaptError
        If a field is given twice.

    Examples
    --------
    >>> settings_of(["rank=2", "fold=hypercube"]), settings_of(["fold=[8,8]"])
    ({'rank': 2, 'fold': 'hypercube'}, {'fold': [8, 8]})
    >>> settings_of(["rank=2", "rank=4"])
    Traceback (most recent call last):
        ...
    tnadapt.errors.TnadaptError: --set gives rank twice; leave one of them out
    """
    settings: dict[str, Any] = {}
    for name, value in (pair_of(text, "--set takes FIELD=VALUE") for text in texts):
        if name in settings:
            raise TnadaptError(f"--set gives {name} twice; {way}")
        if name in options:
            raise TnadaptError(f"--{name} and --set {name}=… both give {name}; leave one of them out")
        settings[name] = word_or_number(value)
    return settings


def word_or_number(text: str) -> Any:
    """Parse a value as JSON, or return it as a word."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _presets_that_begin_with(incomplete: str) -> list[str]:
    """Return the presets that complete an incomplete name in a shell."""
    return [name for name in tnadapt.presets.PRESETS.installed() if name.startswith(incomplete)]


def chosen_config(preset: str | None, settings: list[str], path: Path | None) -> tnadapt.Config | None:
    """Return the config of ``--preset``, ``--config`` and ``--set``; None if none of them is given.

    Examples
    --------
    >>> chosen_config("lora", ["rank=2"], None).rank
    2
    """
    changes = settings_of(settings)
    if preset is not None and path is not None:
        raise TnadaptError("--preset and --config both name a config; give one of them")
    if preset is not None:
        from tnadapt.algebra.named_config import require_preset

        require_preset(preset)
        try:
            return tnadapt.presets.PRESETS[preset].config(**changes)
        except TypeError as error:
            raise TnadaptError(f"preset {preset!r}: {error}; give it by --set NAME=VALUE") from None
    if path is not None:
        return tnadapt.Config.from_dict({**_read(path), **changes})
    return tnadapt.Config.from_dict(changes) if changes else None


def _read(path: Path) -> dict[str, Any]:
    from tnadapt.checkpoints.container import MAX_CONFIG, strict_json  # imports NumPy

    try:
        # This also reads a pipe, <(…), whose length is unknown.
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG + 1)
        if len(content) > MAX_CONFIG:
            raise FileError(f"is longer than {MAX_CONFIG} bytes")
        return strict_json(content.decode(), "the file")
    except (OSError, ValueError) as error:  # a FileError is a ValueError
        raise TnadaptError(f"cannot read a config from {path}: {error}") from None


def targets_of(given: Sequence[str] | None) -> str | list[str]:
    """Return ``--targets`` as the library takes it: one value without the marks of a regular expression is a name.

    Raises
    ------
    TnadaptError
        If one is empty.

    Examples
    --------
    >>> targets_of(None), targets_of(["q", "v"]), targets_of(["conv"]), targets_of([".*_proj"])
    ('qv', 'qv', 'conv', '.*_proj')
    >>> targets_of(["q_proj"]), targets_of(["h.0.fc", "h.1.fc"])
    (['q_proj'], ['h.0.fc', 'h.1.fc'])
    """
    if not given:
        return "qv"
    if not all(text.strip() for text in given):
        raise TnadaptError("--targets is empty; give roles such as qv, names of modules, or a regular expression")
    from tnadapt.targets.roles import KEYWORDS, are_roles  # imports NumPy

    if all(map(are_roles, given)):
        return "".join(dict.fromkeys("".join(given)))
    first = given[0]
    if len(given) == 1 and (first in KEYWORDS or not _PATTERN.isdisjoint(first)):
        return first
    return list(given)


# With a leading zero, as in "0017", it is a name that was meant, not another member's number.
_NUMBER = re.compile("0|[1-9][0-9]{0,9}")


def member_of(path: Path, text: str | None) -> int | str | None:
    """Return ``--member`` as the library takes it: digits are a number unless a member has this name."""
    if text is None or not _NUMBER.fullmatch(text):
        return text
    try:
        population = tnadapt.load(path / "adapter.safetensors" if path.is_dir() else path, check_draws=False)
    except FileError:  # raised again where the adapter is read
        return text
    is_number = isinstance(population, tnadapt.PopulationFile) and text not in population.names
    return int(text) if is_number else text


# -- Options, as types of arguments ------------------------------------------------------------------------------------


def option(
    help: str, show_default: str | bool = True, *, names: Sequence[str] = (), panel: str | None = None, **more: Any
) -> Any:
    """Return an option with what help says that it is without it, and the panel of the help page that it is in."""
    return typer.Option(*names, help=help, show_default=show_default, rich_help_panel=panel, **more)


def preset_option(help: str, show_default: str, panel: str | None = None) -> Any:
    """Return an option ``--preset``, which shells complete.

    Parameters
    ----------
    help : str
    show_default : str
        What it is without the option.
    panel : str, optional
        Of the help page.
    """
    completion = _presets_that_begin_with
    return option(f"{help}; tnadapt presets lists them.", show_default, panel=panel, autocompletion=completion)


#: End of the help of ``--targets``, after the words that a command accepts.
TARGETS_HELP = "a module's name, the end of its path, or a regex such as '.*proj'; repeat for more names."

Targets: TypeAlias = Annotated[
    list[str] | None, option(f"qv, qkvo, embeddings, {TARGETS_HELP}", "qv", names=["--targets"])
]
OwnSettings: TypeAlias = Annotated[
    list[str] | None,
    option("A Config field, or a preset's argument.", "the preset's", names=["--set"], metavar="FIELD=VALUE"),
]
ConfigFile: TypeAlias = Annotated[
    Path | None, typer.Option("--config", help="A JSON file of Config fields.", show_default="none")
]
Member: TypeAlias = Annotated[
    str | None,
    option(
        "The member of a population's file: its name, or its number if none has this name.", "none", names=["--member"]
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


# -- Import of tnadapt.finetune, which needs extras --------------------------------------------------------------------


def job_package() -> ModuleType:
    """Return tnadapt.finetune.

    Raises
    ------
    TnadaptError
        If a library that it needs is not installed.
    """
    try:
        from tnadapt import finetune
    except ImportError as error:
        raise TnadaptError(f"tnadapt finetune needs its extra: pip install 'tnadapt[demo]' ({error})") from None
    return finetune

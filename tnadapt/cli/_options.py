"""Options of several commands: their help, and their values parsed and checked before torch is imported."""

from __future__ import annotations

import enum
import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import typer

import tnadapt
from tnadapt.errors import FileError, TnadaptError, safe_repr

__all__ = [
    "ENGINE_HELP",
    "ENGINE_OPTION_HELP",
    "TARGETS_HELP",
    "TASK_NAMES",
    "AsJson",
    "ConfigFile",
    "ModelOfHeaders",
    "OwnSettings",
    "ReportTo",
    "TargetsOfHeaders",
    "check_options",
    "chosen_config",
    "engine_options",
    "job_package",
    "preset_option",
    "settings_of",
    "shapes_of",
    "targets_of",
    "word_or_number",
]


# -- Values ------------------------------------------------------------------------------------------------------------


# Maximum number of weights: a plan of this size takes half a minute, and no model's attention has as many.
MOST = 10_000

# What tells a regular expression from a name. Names have dots, too.
_PATTERN = frozenset(r"\^$*+?{}[]|()")


def _setting(text: str) -> tuple[str, Any]:
    """Parse ``FIELD=VALUE``, with the value as JSON or a word.

    Examples
    --------
    >>> _setting("rank=4"), _setting("fold=hypercube"), _setting("fold=[8,8]")
    (('rank', 4), ('fold', 'hypercube'), ('fold', [8, 8]))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise TnadaptError(f"--set takes FIELD=VALUE; got {safe_repr(text)}")
    return name, word_or_number(value)


def settings_of(
    texts: Sequence[str], options: Collection[str] = (), way: str = "leave one of them out"
) -> dict[str, Any]:
    """Parse every ``FIELD=VALUE``.

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
    >>> settings_of(["rank=2", "alpha=4"])
    {'rank': 2, 'alpha': 4}
    >>> settings_of(["rank=2", "rank=4"])
    Traceback (most recent call last):
        ...
    tnadapt.errors.TnadaptError: --set gives rank twice; leave one of them out
    """
    settings: dict[str, Any] = {}
    for name, value in map(_setting, texts):
        if name in settings:
            raise TnadaptError(f"--set gives {name} twice; {way}")
        if name in options:
            raise TnadaptError(f"--{name} and --set {name}=… both give {name}; leave one of them out")
        settings[name] = value
    return settings


def word_or_number(text: str) -> Any:
    """Parse a value as JSON, or return it as a word."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _presets_that_begin_with(incomplete: str) -> list[str]:
    """Return the presets for the completion of a shell.

    Examples
    --------
    >>> _presets_that_begin_with("lora_")
    ['lora_fa', 'lora_xs']
    """
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


def shapes_of(given: Sequence[str]) -> list[tuple[int, int]]:
    """Parse shapes ``ROWSxCOLS``, each with an optional ``*TIMES``.

    Examples
    --------
    >>> shapes_of(["12x8*2", "4x6"])
    [(12, 8), (12, 8), (4, 6)]
    """
    shapes: list[tuple[int, int]] = []
    for text in given:
        size, _, times = text.partition("*")
        rows, _, cols = size.partition("x")
        try:
            repeat, shape = int(times or 1), (int(rows), int(cols))
        except ValueError:
            repeat = 0
        if repeat < 1:
            raise TnadaptError(f"--shape takes ROWSxCOLS, e.g. 768x768 or 768x768*24; got {safe_repr(text)}")
        if len(shapes) + repeat > MOST:
            raise TnadaptError(
                f"--shape takes {MOST:,} weights at the most, of all that are given; see {safe_repr(text)}"
            )
        shapes += [shape] * repeat
    return shapes


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


# -- Options, as types of arguments ------------------------------------------------------------------------------------


def preset_option(help: str, show_default: str, panel: str | None = None) -> typer.models.OptionInfo:
    """Return an option ``--preset``, which shells complete.

    Parameters
    ----------
    help : str
    show_default : str
        What it is without the option.
    panel : str, optional
        Of the help page.
    """
    option: typer.models.OptionInfo = typer.Option(
        help=f"{help}; tnadapt presets lists them.", show_default=show_default, rich_help_panel=panel,
        autocompletion=_presets_that_begin_with,
    )  # fmt: skip
    return option


#: Of ``--targets``, after the words that a command takes.
TARGETS_HELP = "a module's name, the end of its path, or a regex such as '.*proj'; repeat for more names."

ModelOfHeaders: TypeAlias = Annotated[
    str | None, typer.Argument(help="A folder, a safetensors file or index, or a hub name. Only headers are read.")
]
TargetsOfHeaders: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--targets", help=f"qv, qkvo, embeddings, {TARGETS_HELP}", show_default="qv"),
]
OwnSettings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="A Config field, or a preset's argument.", show_default="the preset's"
    ),
]
ConfigFile: TypeAlias = Annotated[
    Path | None, typer.Option("--config", help="A JSON file of Config fields.", show_default="none")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


# -- Where parallel trainings run --------------------------------------------------------------------------------------


ENGINE_HELP = "Where parallel trainings run: local, ray (a Ray cluster) or slurm."
ENGINE_OPTION_HELP = "A setting of the engine, such as partition=gpu or gpus=1; repeat for more."


def engine_options(given: Sequence[str]) -> dict[str, str]:
    """Parse the options ``--engine-option``.

    Raises
    ------
    TnadaptError
        If one is not KEY=VALUE, or a key is given twice.

    Examples
    --------
    >>> engine_options(["partition=gpu", "setup=export A=1"])
    {'partition': 'gpu', 'setup': 'export A=1'}
    """
    options: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise TnadaptError(f"--engine-option takes KEY=VALUE; got {safe_repr(text)}")
        if name in options:
            raise TnadaptError(f"--engine-option {name} is given twice")
        options[name] = value
    return options


# -- Tasks and reports of tnadapt finetune -----------------------------------------------------------------------------


#: The built-in tasks; a test compares them with ``tnadapt.finetune.tasks``.
TASK_NAMES = (
    "classification", "multi-label", "regression", "token-classification", "causal-lm", "image-classification",
)  # fmt: skip


class ReportTo(enum.StrEnum):
    """Where trainings are reported, through transformers."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"

    @property
    def given(self) -> str | None:
        """The name, or None without reports."""
        return None if self is ReportTo.NONE else self.value


def check_options(own: Mapping[str, str | None], model: bool, report_to: ReportTo) -> None:
    """Raise an error for an option that cannot be used.

    Parameters
    ----------
    own : mapping of str to str, optional
        Options that need a model and data of the user's own.
    model : bool
        Whether these are given.
    report_to : ReportTo

    Raises
    ------
    TnadaptError
        If an option needs a model, is empty, or its library is not installed.
    """
    for name, value in own.items():
        if value is not None and not model:
            raise TnadaptError(f"--{name} needs --model and --data; without them the data are scikit-learn's digits")
        if value is not None and not value.strip():
            raise TnadaptError(f"--{name} is empty")
    library = report_to.given
    if library is not None and importlib.util.find_spec(library) is None:
        raise TnadaptError(f"--report-to {library} needs {library}, which is not installed: pip install {library}")


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

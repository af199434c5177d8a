"""How to write a config: a preset, and what to set."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError

from ._setting_names import known_as
from .preset_families import PRESET_FAMILIES

__all__ = ["PresetCall", "preset_call"]

# Arguments of presets that are settings of their map, under another name there.
_OF_MAPS = {"n": "size", "r": "cols", "mini": "rows"}
# Arguments that are the sizes of the fold, in order.
_OF_FOLDS = ("weights", "rows", "cols")


class PresetCall(NamedTuple):
    """A preset and the arguments with which it returns a config.

    Attributes
    ----------
    preset : str
    settings : dict of str to object
        The rank, and arguments that differ from their defaults.
    """

    preset: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        """Return the call as Python writes it, without the module."""
        return f"{self.preset}({self._arguments()})"

    @checks_arguments
    def attach(self, targets: str | Sequence[str] = ()) -> str:
        """Return the call of ``attach`` with this config.

        Parameters
        ----------
        targets : str or sequence of str
            The weights, as ``attach`` takes them: a string is a word or a regular expression, a sequence has names. By
            default queries and values.

        Returns
        -------
        str

        Examples
        --------
        >>> PresetCall("lora", {"rank": 8}).attach("all-linear")
        "tna.torch.attach(model, 'lora', rank=8, targets='all-linear')"
        """
        chosen = targets if isinstance(targets, str) else list(targets)
        words = [f"model, {self.preset!r}", self._arguments(), f"targets={chosen!r}" if chosen else ""]
        return f"tna.torch.attach({', '.join(filter(None, words))})"

    @checks_arguments
    def options(self, targets: str | Sequence[str] = ()) -> str | None:
        """Return the options of ``tnadapt finetune`` for this config; None if a command line cannot hold a setting.

        Parameters
        ----------
        targets : str or sequence of str
            As in :meth:`attach`.

        Returns
        -------
        str or None

        Examples
        --------
        >>> PresetCall("lora", {"rank": 8}).options(["q_proj", "v_proj"])
        '--preset lora --set rank=8 --targets q_proj --targets v_proj'
        >>> PresetCall("lonkr", {"split_size": (2, 3)}).options() is None
        True
        """
        if not all(isinstance(value, (int, float, str)) for value in self.settings.values()):
            return None
        words = ["--preset", self.preset]
        for option, values in (
            ("--set", [f"{name}={one}" for name, one in self.settings.items()]),
            ("--targets", ([targets] if targets else []) if isinstance(targets, str) else targets),
        ):
            words += [word for value in values for word in (option, value)]
        return shlex.join(words)

    def _arguments(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


@checks_arguments
def preset_call(config: Config) -> PresetCall | None:
    """Return the call of a preset that returns a config: the one that it is named after, or else the shortest.

    Parameters
    ----------
    config : Config

    Returns
    -------
    PresetCall or None
        None if no preset returns it.

    Examples
    --------
    >>> from tnadapt import Config, presets
    >>> print(preset_call(presets.unilora(1000)))
    unilora(parameters=1000, rank=4)
    >>> preset_call(presets.superlora(4, projection="linear", ratio=0.01)).options()
    '--preset superlora --set rank=4 --set projection=linear --set ratio=0.01'
    """
    calls = [call for name in presets.__all__ if (call := _call(name, config)) is not None]
    family = known_as(config).family.removesuffix(" + F")
    return min(calls, key=lambda call: (_title(call.preset) != family, len(call.settings)), default=None)


def _title(preset: str) -> str:
    return PRESET_FAMILIES[preset].title if preset in PRESET_FAMILIES else preset


def _call(name: str, config: Config) -> PresetCall | None:
    preset = getattr(presets, name)
    own, usual = {}, {}
    for argument in inspect.signature(preset).parameters.values():
        if argument.kind is argument.VAR_KEYWORD:
            continue
        value = _value(argument.name, config)
        if value is not argument.empty:
            own[argument.name], usual[argument.name] = value, argument.default
    try:
        closest = preset(**own)
        changes = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(Config)
            if getattr(config, field.name) != getattr(closest, field.name)
        }
        told = {argument: value for argument, value in own.items() if argument == "rank" or value != usual[argument]}
        settings = {**told, **changes}
        return PresetCall(name, settings) if preset(**settings) == config else None
    except (TnadaptError, TypeError):
        return None


def _value(argument: str, config: Config) -> Any:
    """Return what a preset's argument is in a config, or ``inspect.Parameter.empty`` if it does not have it."""
    if argument == "rank" and isinstance(config.rank, tuple) and None in config.rank:
        return config.rank[-1]  # a partial decomposition, whose presets take the rank of the other modes
    if hasattr(config, argument):
        return getattr(config, argument)
    if argument in _OF_FOLDS and isinstance(config.fold, tuple) and len(config.fold) == len(_OF_FOLDS):
        size = config.fold[_OF_FOLDS.index(argument)]
        return size if isinstance(size, int) else inspect.Parameter.empty
    first = config.projection[0] if isinstance(config.projection, tuple) else config.projection
    return getattr(first, _OF_MAPS.get(argument, argument), inspect.Parameter.empty)

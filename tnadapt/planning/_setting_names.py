"""Names of configs: the method and its setting in words, and the preset call that creates a config."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from tnadapt.algebra.config import Config
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.maps import projection_name, takes_ratio
from tnadapt.algebra.presets import PRESETS, Preset, groups_label, rank_label
from tnadapt.algebra.sources import Source, Trained
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError

# -- The method, and its setting ---------------------------------------------------------------------------------------


#: The meaning of the symbols in labels, which are those of the papers.
SYMBOLS = {
    "r": "rank", "M": "order", "K": "Kronecker factors", "f": "their size", "G": "groups", "T": "terms",
    "ρ": "trained share", "p": "parameters", "k": "parameters", "n": "coefficients per weight", "b": "block size",
}  # fmt: skip


class Name(NamedTuple):
    """A method and its setting.

    Attributes
    ----------
    family : str
        Name of the method, as in its paper.
    label : str
        Setting of the method, in the paper's symbols.
    """

    family: str
    label: str

    def __str__(self) -> str:
        return f"{self.family} {self.label}".strip()


@checks_arguments
def known_as(config: Config) -> Name:
    """Return the name of a config.

    Parameters
    ----------
    config : Config

    Returns
    -------
    Name
        The name of a preset if the config matches one in :mod:`tnadapt.presets`; otherwise ``SuperLoRA``, with
        everything that differs from its preset.

    Examples
    --------
    >>> import tnadapt as tna
    >>> print(known_as(tna.presets.lonkr(2, splits=2)))
    LoNKr K = 2, f = 8, r = 2
    >>> print(known_as(tna.presets.lorta(1, order=5, groups="weight")))
    LoRTA M = 5, G = weight, r = 1
    >>> print(known_as(tna.Config(rank=3, order=4, groups=2, fold="balanced", format="tt")))
    SuperLoRA TT, M = 4, G = 2, balanced, r = 3
    >>> print(known_as(tna.presets.lora(8, start="pissa")))
    LoRA r = 8, pissa
    """
    plain = config.replace(rate="adam", alpha=None, seed=0, shared=True)  # as in presets
    for preset in PRESETS.values():
        if preset.recognize is not None and (label := preset.recognize(plain)) is not None:
            return Name(preset.title, label)
    if config.start != "zero":
        usual = known_as(config.replace(start="zero"))
        return usual._replace(label=f"{usual.label}, {config.start}".removeprefix(", "))
    return _with_changes(plain)


def _with_changes(config: Config) -> Name:
    """Return the name of a preset with another F or way of applying, or else list all settings."""
    bare = config.replace(projection="identity", ratio=1.0, on="vector", apply="add", magnitude_axis="rows")
    family, parts = "SuperLoRA", _all_settings(config)
    for preset in PRESETS.values():
        if preset.recognize is None or "groups" not in inspect.signature(preset.make).parameters:
            continue
        if (label := preset.recognize(bare)) is not None:
            family, parts = preset.title, [label]
            break
    if config.apply != "add":
        parts.append(config.apply + (f" by {config.magnitude_axis}" if config.magnitude_axis != "rows" else ""))
    if config.projection != "identity":
        family += " + F"
        if config.projection != "linear":
            parts.append(projection_name(config.projection))
        if config.on != "vector":
            parts.append(f"on each {config.on}")
        if takes_ratio(config.projection):
            parts.append(f"ρ = {config.ratio:.4g}")
    return Name(family, ", ".join(parts))


def _all_settings(config: Config) -> list[str]:
    """Return the settings in which a config differs from 2-D CP on a hypercube, except F and apply."""
    parts = [*_network_settings(config), *groups_label(config)]
    if config.fold != "hypercube":
        parts.append(config.fold if isinstance(config.fold, str) else " × ".join(map(str, config.fold)))
    if config.axes is not None:
        axes = [axis if isinstance(axis, tuple) else (axis,) for axis in config.axes]
        parts.append("axes " + ", ".join("·".join(map(str, axis)) for axis in axes))
    if config.format != "dense":
        parts.append(f"r = {rank_label(config.rank)}")
    parts += [f"{name}: {_short(source)}" for name, source in config.sources.items() if source != Trained()]
    if config.before is not None:
        each = "" if config.scope == "plan" else f" per {config.scope}"
        parts.append(f"{projection_name(config.before)} of {config.parameters} parameters{each}")
    return parts


def _short(source: Source) -> str:
    """Return a source as users write it, without settings that have their default."""
    shown = []
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        if value != field.default:
            named = field.default is not dataclasses.MISSING
            shown.append(
                f"{field.name}={value!r}" if named else _short(value) if isinstance(value, Source) else repr(value)
            )
    return f"{type(source).__name__}({', '.join(shown)})"


def _network_settings(config: Config) -> list[str]:
    """Return the settings in which a config differs from 2-D CP with one split and term."""
    parts = [FORMATS.find(config.format).title or config.format] if config.format != "cp" else []
    if config.order != 2:
        parts.append(f"M = {config.order}")
    if config.splits > 1:
        parts += ["Hadamard"] * (config.combine == "hadamard") + [f"K = {config.splits}"]
        parts += [f"f = {config.split_size}"] * (config.split_size != "balanced")
        parts += ["same"] * (config.leading == "same")
    if config.terms > 1:
        parts.append(f"T = {config.terms}")
    return parts


# -- How to write a config: a preset, and what to set ------------------------------------------------------------------


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
            ("--set", [f"{name}={value}" for name, value in self.settings.items()]),
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
    calls = [call for preset in PRESETS.values() if (call := _call(preset, config)) is not None]
    family = known_as(config).family.removesuffix(" + F")
    return min(calls, key=lambda call: (PRESETS[call.preset].title != family, len(call.settings)), default=None)


def _call(preset: Preset, config: Config) -> PresetCall | None:
    arguments, usual = {}, {}
    for argument in inspect.signature(preset.make).parameters.values():
        if argument.kind is argument.VAR_KEYWORD:
            continue
        value = _value(argument.name, config)
        if value is not argument.empty:
            arguments[argument.name], usual[argument.name] = value, argument.default
    try:
        closest = preset.make(**arguments)
        changes = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(Config)
            if getattr(config, field.name) != getattr(closest, field.name)
        }
        told = {name: value for name, value in arguments.items() if name == "rank" or value != usual[name]}
        settings = {**told, **changes}
        return PresetCall(preset.name, settings) if preset.make(**settings) == config else None
    except (TnadaptError, TypeError):
        return None


def _value(argument: str, config: Config) -> Any:
    """Return the value of a preset's argument in a config, or ``inspect.Parameter.empty`` if there is none."""
    if argument == "rank" and isinstance(config.rank, tuple) and None in config.rank:
        return config.rank[-1]  # a partial decomposition: its presets take the rank of the other modes
    if argument == "ratio" and config.projection == "identity":
        return inspect.Parameter.empty  # it has no effect
    if hasattr(config, argument):
        return getattr(config, argument)
    if argument in _OF_FOLDS and isinstance(config.fold, tuple) and len(config.fold) == len(_OF_FOLDS):
        size = config.fold[_OF_FOLDS.index(argument)]
        return size if isinstance(size, int) else inspect.Parameter.empty
    first = config.projection[0] if isinstance(config.projection, tuple) else config.projection
    return getattr(first, _OF_MAPS.get(argument, argument), inspect.Parameter.empty)

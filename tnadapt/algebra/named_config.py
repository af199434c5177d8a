"""Look up configs by preset name and settings (``"lora", rank=8``), with suggestions for unknown names."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tnadapt.errors import ConfigError, UnexpectedKeywordError, keyword_hint, safe_repr, unexpected_keyword
from tnadapt.plugins import failed_plugins

from . import presets
from .config import Config
from .presets import PRESETS

# What a caller means who passes one of these as the config, the argument before the targets.
_TARGETS = ("all-linear", "conv", "embeddings")
_ROLES = frozenset("qkvo")


_MISSING = "{name} is not available here; the page 'PEFT' in the documentation lists what is missing"
_STARTS = "{name} is 'lora' with another start: give start={name!r} with a preset of low rank"
# Methods of other libraries that are not presets, and what to use instead.
_NO_PRESETS = {
    **dict.fromkeys(("adalora", "boft", "hra", "ia3", "oft", "prefix", "prompt", "road"), _MISSING),
    **dict.fromkeys(("milora", "olora", "pissa"), _STARTS),
    "loraplus": "LoRA+ is 'lora' with two learning rates; with rate='adam', which presets have, one rate does",
    "qlora": "QLoRA is 'lora' on a quantized model: load the model quantized and attach to it as usual",
    "rslora": "rsLoRA is 'lora' with alpha multiplied by √rank",
}


def config_of(
    cfg: Any, settings: Mapping[str, Any], function: str = "attach", keywords: Collection[str] = ()
) -> Config:
    """Return the config that a caller of a function means by ``cfg`` and further keywords.

    Parameters
    ----------
    cfg : Config, str or None
        A config; the name of a preset, whose settings are the keywords; or None for ``superlora(rank=8)``.
    settings : mapping of str to object
        The function's keywords that are not its own.
    function : str
        Its name, for messages.
    keywords : collection of str
        Its own keywords, for suggestions.

    Returns
    -------
    Config

    Raises
    ------
    UnexpectedKeywordError
        If there are keywords and ``cfg`` is no name, or the preset has no such setting.
    ConfigError
        If no preset has the name, or it lacks a setting or refuses one.

    Examples
    --------
    >>> config_of("lora", {"rank": 8}) == presets.lora(rank=8), config_of(None, {}) == presets.superlora(rank=8)
    (True, True)
    >>> config_of("lroa", {})
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: no preset 'lroa'; did you mean 'lora'? The presets are c3a, cara, ...
    """
    if isinstance(cfg, str):
        return named_config(cfg, settings, function, keywords)
    if cfg is not None and not isinstance(cfg, Config):
        preset = next((name for name, known in PRESETS.items() if known.make is cfg), None)
        if preset is not None:
            raise ConfigError(
                f"got the preset {preset} itself: give its name, {preset!r}, or what it returns, "
                f"tnadapt.presets.{preset}(…)"
            )
        type_name = type(cfg).__name__
        instead = ""
        if type_name == "LoraConfig":
            instead = f". PEFT's LoraConfig(r=8) is {function}(…, 'lora', rank=8) here"
        elif type_name in ("list", "tuple"):
            instead = f"; to adapt weights of these names write {function}(…, targets={safe_repr(cfg)})"
        raise ConfigError(
            f"expected a tnadapt.Config, the name of a preset such as 'lora', or None; got {type_name}{instead}"
        )
    for name in settings:
        way = keyword_hint(name)
        if way is not None or not is_setting(name):
            pass
        elif cfg is None:
            way = f"settings belong to a preset, so name one: {function}(…, 'superlora', {name}=…)"
        else:
            way = f"a config has its settings already: use config.replace({name}=…), or the name of a preset instead"
        raise unexpected_keyword(function, name, keywords, way)
    return presets.superlora(rank=8) if cfg is None else cfg


def named_config(
    name: str, settings: Mapping[str, Any], function: str = "attach", keywords: Collection[str] = ()
) -> Config:
    """Return the config of the preset of this name, as :func:`config_of` does.

    Examples
    --------
    >>> named_config("lokr", {"rank": 2, "alpha": 4}).scale
    2.0
    >>> named_config("lora", {"rnak": 2})
    Traceback (most recent call last):
        ...
    tnadapt.errors.UnexpectedKeywordError: preset 'lora' has no setting 'rnak'; did you mean 'rank'? It takes rank,
    and any field of tnadapt.Config
    """
    require_preset(name, function)
    parameters = _own(name)
    for setting in settings:
        if setting not in parameters and setting not in _fields():
            raise UnexpectedKeywordError(
                f"preset {name!r} has no setting {setting!r}; {_meant(name, setting, keywords)}"
            )
    missing = [each for each, entry in parameters.items() if entry.default is entry.empty and each not in settings]
    if missing:
        raise ConfigError(
            f"preset {name!r} needs {' and '.join(missing)}, which depend on the weights of the model: give "
            f"{', '.join(f'{each}=…' for each in missing)}"
        )
    return PRESETS[name].config(**settings)


def require_preset(name: str, function: str | None = None) -> None:
    """Raise a ConfigError, with the preset that was probably meant, unless there is one of this name.

    Parameters
    ----------
    name : str
    function : str, optional
        The one that was called, for which the name may be that of targets.

    Examples
    --------
    >>> require_preset("lorra")
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: no preset 'lorra'; did you mean 'lora'? The presets are c3a, cara, ...
    """
    if not PRESETS.knows(name):
        raise ConfigError(
            f"no preset {safe_repr(name)}; {_instead(name, function)}. If a plug-in provides it, install the plug-in"
            f"{failed_plugins()}"
        )


def require_setting(name: str, of: Sequence[str] = ()) -> None:
    """Raise a ConfigError, with the setting that was probably meant, unless a preset or Config has one of this name.

    Parameters
    ----------
    name : str
    of : sequence of str
        Presets; the settings of others are not suggested.

    Examples
    --------
    >>> require_setting("split_sise")
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: no setting 'split_sise'; did you mean 'split_size'?
    """
    if is_setting(name):
        return
    known = dict.fromkeys([*_fields(), *(setting for preset in of or PRESETS for setting in _own(preset))])
    hint, close = keyword_hint(name), difflib.get_close_matches(name, known, n=1)
    way = hint or (f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}")
    raise ConfigError(f"no setting {safe_repr(name)}; {way}")


def _instead(name: str, function: str | None) -> str:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(PRESETS), n=1)
    plain = name.lower().replace("-", "").replace("_", "").replace("+", "plus")
    titled = next((key for key, preset in PRESETS.items() if name == f"{preset.title} + F"), None)
    if titled is not None:
        meant = f"this is {titled!r} with projection='linear' and a ratio, such as ratio=0.1. The presets are "
    elif plain in _NO_PRESETS:
        meant = f"{_NO_PRESETS[plain].format(name=plain)}. The presets are "
    elif close:
        meant = f"did you mean {close[0]!r}? The presets are "
    elif function is not None and (name in _TARGETS or (name and _ROLES.issuperset(name))):
        meant = f"to adapt these weights write {function}(…, targets={name!r}). The presets are "
    else:
        meant = "the presets are "
    return f"{meant}{', '.join(PRESETS)}"


def _meant(name: str, setting: str, keywords: Collection[str]) -> str:
    parameters = _own(name)
    hint = keyword_hint(setting)
    close = difflib.get_close_matches(setting, [*parameters, *_fields(), *keywords], n=1)
    meant = f"{hint}. It takes " if hint else f"did you mean {close[0]!r}? It takes " if close else "it takes "
    return f"{meant}{''.join(f'{each}, ' for each in parameters)}{'and ' * bool(parameters)}any field of tnadapt.Config"


def is_setting(name: Any) -> bool:
    """Return whether something is the name of a setting of Config or of a preset.

    Examples
    --------
    >>> is_setting("rank"), is_setting("split_size"), is_setting("qv"), is_setting(8)
    (True, True, False, False)
    """
    return name in _fields() or any(name in _own(preset) for preset in PRESETS)


def _own(name: str) -> dict[str, inspect.Parameter]:
    """Return a preset's own parameters, without the fields of Config that all presets take."""
    parameters = inspect.signature(PRESETS[name].make).parameters
    return {each: entry for each, entry in parameters.items() if entry.kind is not entry.VAR_KEYWORD}


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]

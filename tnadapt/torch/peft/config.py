"""The settings of an adapter in PEFT's form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ... import presets
from ...config import Config
from ...errors import ConfigError, shown
from ..apply import ACTIVATIONS, STRATEGIES
from .api import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

__all__ = ["NAME", "TnadaptConfig"]


class _Name(str):
    """A name that PEFT's reports and errors can show as they show a member of their own enumeration."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


#: The key of this method in PEFT's tables, and its peft_type.
NAME = _Name("TNADAPT")


@dataclasses.dataclass
class TnadaptConfig(PeftConfig):  # type: ignore[misc]  # PEFT's types are not looked at
    """Settings of an adapter, as PEFT keeps them.

    Parameters
    ----------
    preset : str, optional
        A name of :mod:`tnadapt.presets` (``"superlora"``, ``"lora"``, ``"lokr"`` …). It is resolved here: what is kept,
        and written to ``adapter_config.json``, is the complete ``settings``.
    settings : mapping or Config, optional
        Arguments of the preset, or fields of :class:`tnadapt.Config`. With neither, what
        :func:`tnadapt.torch.attach` takes by default.
    target_modules : str or list of str
        As ``targets`` of :func:`tnadapt.torch.attach`: ``"qv"``, ``"all-linear"``, a regular expression, a list of
        paths. Modules in ``modules_to_save`` are left out.
    modules_to_save : list of str, optional
        Modules of the base that are trained whole and saved, by PEFT's own means; for the ``task_type`` SEQ_CLS and
        TOKEN_CLS PEFT adds the classifier.
    strategy, activation : str
        As in :func:`tnadapt.torch.attach`.
    base : dict, optional
        Written by ``save_pretrained``: how many weights of which shapes the adapter was trained on, their fingerprint,
        and the digest of the draws. What does not fit is refused. With None nothing is compared.

    Raises
    ------
    ConfigError
        If the preset is unknown, a setting does not do, or :func:`register` was not called. (PEFT itself says
        ``ValueError`` of a ``task_type``, and ``TypeError`` of a keyword, that it does not know.)

    Examples
    --------
    >>> import tnadapt.torch.peft
    >>> tnadapt.torch.peft.register()
    >>> TnadaptConfig(task_type="SEQ_CLS", preset="lora", settings={"rank": 8}).settings["rank"]
    8
    """

    settings: Any = None
    target_modules: Any = "qv"
    modules_to_save: Any = None
    strategy: str = "auto"
    activation: str | None = None
    base: dict[str, Any] | None = None
    preset: dataclasses.InitVar[str | None] = None

    def __post_init__(self, preset: str | None) -> None:
        known: Mapping[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
        if known.get(NAME) is not TnadaptConfig:
            raise ConfigError("PEFT does not know tnadapt yet: call tnadapt.torch.peft.register() first")
        super().__post_init__()
        self.peft_type = NAME
        self.settings = _settings(preset, self.settings)
        self.target_modules = _words("target_modules", self.target_modules, alone=True)
        if self.modules_to_save is not None:
            self.modules_to_save = _words("modules_to_save", self.modules_to_save)
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}; got {shown(self.strategy)}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {shown(self.activation)}"
            )
        if self.base is not None and not isinstance(self.base, dict):
            raise ConfigError(f"base is what save_pretrained wrote, or None; got {shown(self.base)}")


def _settings(preset: Any, settings: Any) -> dict[str, Any] | None:
    """The complete settings, as JSON keeps them; None where nothing was said."""
    if preset is None:
        if settings is None:
            return None
        return (settings if isinstance(settings, Config) else Config.from_dict(settings)).to_dict()
    if preset not in presets.__all__:
        raise ConfigError(f"preset must be one of {', '.join(presets.__all__)}; got {shown(preset)}")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"with a preset, settings must be a mapping of its arguments; got {shown(settings)}")
    try:
        found: Config = getattr(presets, preset)(**(settings or {}))
    except TypeError as error:
        raise ConfigError(f"preset {preset!r} does not take settings={shown(settings)}: {error}") from None
    return found.to_dict()


def _words(name: str, value: Any, alone: bool = False) -> Any:
    if isinstance(value, str) and value:
        return value if alone else [value]
    words = sorted(value) if isinstance(value, (set, frozenset)) else value
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) and word for word in words):
        raise ConfigError(f"{name} must be a name or a list of names; got {shown(value)}")
    return list(words)

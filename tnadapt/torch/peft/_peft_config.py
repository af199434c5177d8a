"""TnadaptConfig, the settings of an adapter as a PEFT config; the weights that it selects; the check for PEFT."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, cast

from torch import nn

from tnadapt.algebra import presets
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import require_preset
from tnadapt.algebra.starting_points import STARTS
from tnadapt.argument_checks import flag
from tnadapt.errors import BackendError, ConfigError, TargetError, UnexpectedKeywordError, safe_repr, warn
from tnadapt.targets.roles import are_roles, ends_in, path_matcher
from tnadapt.targets.target import Target
from tnadapt.torch._attach import check_form
from tnadapt.torch._forward_pass import check_dropout
from tnadapt.torch._target_selection import find_targets
from tnadapt.torch._weights import plain

# -- PEFT, and the error if it is missing or too old -------------------------------------------------------------------


class PeftMissingError(BackendError, ImportError):
    """PEFT is not installed, or too old."""


try:
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError("the installed PEFT lacks the hooks that an external method needs")
except ImportError as error:
    raise PeftMissingError(
        f'tnadapt.torch.peft needs PEFT 0.21 or newer: pip install "tnadapt[peft]" ({error})'
    ) from error


# -- The config --------------------------------------------------------------------------------------------------------


class _PeftTypeName(str):
    """A name that PEFT's reports and errors can print like a member of their own enumeration."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


#: Keywords of PEFT's other configs that are named differently here than in :func:`tnadapt.torch.attach`.
_ELSEWHERE = {
    "r": "use settings={'rank': …}",
    "rank": "use settings={'rank': …}",
    "lora_alpha": "use settings={'alpha': …}",
    "init_lora_weights": "use init_weights",
    "targets": "use target_modules",
    "keep_trainable": "use modules_to_save",
    "cfg": "use settings",
    "config": "use settings",
    "target_parameters": "use target_modules, which also accepts names of parameters",
    "dtype": "the arrays are float32, or of the base's dtype after get_peft_model(…, autocast_adapter_dtype=False)",
    "bias": "biases are not trained; use modules_to_save for modules that are trained whole",
    "lora_dropout": "use dropout",
    "use_rslora": "α/√r is not supported; use settings={'alpha': …}, which is divided by the rank",
    "use_dora": "use preset='dora' or settings={'apply': 'magnitude'}; PEFT's gradient needs detach_norm=True",
    "fan_in_fan_out": "leave it out: how a weight is stored is read from its module",
}


class DefaultTargets(str):
    """The default of ``target_modules``: roles, which PEFT's table may override because the user chose nothing."""

    __slots__ = ()


#: The key of this method in PEFT's tables, and its peft_type.
NAME = _PeftTypeName("TNADAPT")


@dataclasses.dataclass
class TnadaptConfig(PeftConfig):  # type: ignore[misc]  # PEFT's types are not looked at
    """Settings of an adapter, as a PEFT config.

    Parameters
    ----------
    preset : str, optional
        A name of :mod:`tnadapt.presets` (``"superlora"``, ``"lora"``, ``"lokr"`` …). It is resolved immediately: the
        config and ``adapter_config.json`` contain the complete ``settings``.
    settings : mapping or Config, optional
        Arguments of the preset, or fields of :class:`tnadapt.Config`. With neither preset nor settings, the default of
        :func:`tnadapt.torch.attach`, ``superlora(rank=8)``.
    target_modules : str or list of str, optional
        As ``targets`` of :func:`tnadapt.torch.attach`: ``"qv"``, ``"all-linear"``, a regular expression, or a list of
        paths, which becomes a set, as in PEFT. Modules in ``modules_to_save`` are left out. ``"qv"`` by default; if a
        model does not have these roles, PEFT's default LoRA targets for its ``model_type``, which are then stored here.
    exclude_modules : str or list of str, optional
        Modules to leave out of the targets: a regular expression for whole paths, or a list of paths, full or their
        last parts.
    layers_to_transform : int or list of int, optional
        Numbers of the layers whose weights are adapted; an empty list means all. Only with roles or a list as
        ``target_modules``; an entry that is the full path of a module applies in any layer.
    layers_pattern : str or list of str, optional
        Regular expressions for the name before the layer's number in a path, such as ``"layers"`` or ``"h"``. Without
        it, the first number that comes after at least two names is the layer's.
    modules_to_save : list of str, optional
        Modules of the base that PEFT trains whole and saves; for the ``task_type`` SEQ_CLS, TOKEN_CLS and QUESTION_ANS
        PEFT adds the classifier.
    strategy, activation : str
        As in :func:`tnadapt.torch.attach`.
    init_weights : bool
        If True, the fresh adapter changes nothing. If False, its update is random, drawn from torch's generator: for
        tests, as in PEFT's other methods.
    detach_norm : bool
        As in :func:`tnadapt.torch.attach`: True is the gradient of PEFT's DoRA. ``adapter_config.json`` has it only if
        it is True.
    dropout : float
        As in :func:`tnadapt.torch.attach`: PEFT's ``lora_dropout``. ``adapter_config.json`` has it if it is not 0.
    base : dict, optional
        Written by ``save_pretrained``: the number of weights of each shape that the adapter was trained on, their
        fingerprint, and the digest of the draws. A base that differs is rejected. With None nothing of it is compared.
    computed_from : dict, optional
        Written by ``save_pretrained`` if arrays are computed from the base weights (``FromBase``; starts such as
        "pissa"): their fingerprint. They are computed again when the adapter is loaded, so that a base that differs is
        rejected whatever ``base`` is.
    trained : list of str, optional
        Written by ``save_pretrained`` if :meth:`tnadapt.torch.Adapter.set_trainable` chose some arrays: their names in
        the plan. None trains all.

    Raises
    ------
    ConfigError
        If the preset, a keyword or a setting is unknown, a setting is invalid, or :func:`register` was not called.
        (An unknown ``task_type`` is a ``ValueError`` of PEFT's.)

    Examples
    --------
    >>> import tnadapt.torch.peft
    >>> tnadapt.torch.peft.register()
    >>> TnadaptConfig(task_type="SEQ_CLS", preset="lora", settings={"rank": 8}).settings["rank"]
    8
    """

    settings: Any = None
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: Any = None
    strategy: str = "auto"
    activation: str | None = None
    init_weights: bool = True
    detach_norm: bool = False
    dropout: float = 0.0
    base: dict[str, Any] | None = None
    computed_from: dict[str, Any] | None = None
    trained: Any = None
    preset: dataclasses.InitVar[str | None] = None

    # Values for the next file only: they belong to one model, and this object may serve several.
    _next = cast(Mapping[str, Any], MappingProxyType({}))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        known = [field.name for field in dataclasses.fields(cls)] + ["preset"]
        for name in kwargs:
            if name not in known:
                raise UnexpectedKeywordError(
                    f"TnadaptConfig got an unexpected keyword argument {name!r}: {_instead(name, known)}"
                )
        config: Self = super().__new__(cls)
        return config

    def __post_init__(self, preset: str | None) -> None:
        known: Mapping[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
        if known.get(NAME) is not TnadaptConfig:
            raise ConfigError("tnadapt is not registered with PEFT yet: call tnadapt.torch.peft.register() first")
        super().__post_init__()
        self.peft_type = NAME
        self.settings = _settings(preset, self.settings)
        if STARTS.find(self.settings.get("start", "zero")).brought:
            raise ConfigError(
                "start='given' stores its start, and PEFT's files hold the trained arrays alone: use start='pissa', "
                "'milora' or 'olora', or attach with tnadapt.torch.attach"
            )
        self.init_weights = flag("init_weights", self.init_weights)
        if self.target_modules is None:
            self.target_modules = DefaultTargets("qv")
        self.target_modules = as_words("target_modules", self.target_modules)
        self._check_layers()
        if self.exclude_modules is not None:
            empty = isinstance(self.exclude_modules, (list, set)) and not self.exclude_modules
            self.exclude_modules = set() if empty else as_words("exclude_modules", self.exclude_modules)
            if isinstance(self.exclude_modules, str):
                _check_expressions("exclude_modules", [self.exclude_modules])
        if self.modules_to_save is not None:
            saved = self.modules_to_save
            self.modules_to_save = _list("modules_to_save", [saved] if isinstance(saved, str) else saved)
        check_form(self.strategy, self.activation)
        self.detach_norm = flag("detach_norm", self.detach_norm)
        self.dropout = check_dropout(self.dropout)
        for name in ("base", "computed_from"):
            written = getattr(self, name)
            if written is not None and not isinstance(written, dict):
                raise ConfigError(
                    f"{name} must be a dict that save_pretrained wrote, or None; got {safe_repr(written)}"
                )
        if self.trained is not None:
            self.trained = _list("trained", self.trained)

    def _check_layers(self) -> None:
        layers, patterns = self.layers_to_transform, self.layers_pattern
        if layers is not None:
            if isinstance(layers, (list, tuple, range)):
                self.layers_to_transform = layers = list(layers)
            several = layers if isinstance(layers, list) else [layers]
            if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in several):
                raise ConfigError(
                    "layers_to_transform must be the number of a layer, from 0, or a list of them; got "
                    f"{safe_repr(layers)}"
                )
        if patterns is not None and not (isinstance(patterns, (str, list)) and not patterns):
            words = _list("layers_pattern", [patterns] if isinstance(patterns, str) else patterns)
            _check_expressions("layers_pattern", words)
            self.layers_pattern = patterns if isinstance(patterns, str) else words
        for name, value in (("layers_to_transform", layers), ("layers_pattern", patterns)):
            if value is not None and isinstance(self.target_modules, str) and not are_roles(self.target_modules):
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is a str. It is {safe_repr(self.target_modules)}: "
                    "give a list of names or roles such as 'qv', or write the layers into the regular expression"
                )
        if patterns and layers is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                f"layers_pattern={safe_repr(patterns)} alone selects nothing: add the numbers, or leave it out"
            )

    def keep_for_file(self, **values: Any) -> None:
        """Set values for the next file only, without changing this config."""
        self._next = values

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are written to ``adapter_config.json``."""
        settings: dict[str, Any] = super().to_dict()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(settings[name], set):
                # Sorted, so that equal settings give equal files.
                settings[name] = sorted(settings[name])
        settings |= self._next
        # Files that do not need these keep their bytes.
        for name, default in (("trained", None), ("computed_from", None), ("detach_norm", False), ("dropout", 0.0)):
            if settings[name] == default:
                del settings[name]
        return settings

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; see PEFT."""
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self._next = {}


def _instead(name: str, known: list[str]) -> str:
    """Return advice on what to write instead of an unknown keyword."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in Config.__dataclass_fields__:
        return f"use settings={{{name!r}: …}}"
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"There are: {', '.join(known)}"


def _settings(preset: Any, settings: Any) -> dict[str, Any]:
    """Return the complete settings as JSON values."""
    if preset is None:
        if settings is None:
            return presets.superlora(rank=8).to_dict()
        if isinstance(settings, CompositeConfig):
            raise ConfigError(
                "settings of a PEFT config are those of one config, for all of its weights: add a PEFT adapter for "
                "each, or use tnadapt.torch.attach, which takes a mapping of patterns to configs"
            )
        return (settings if isinstance(settings, Config) else Config.from_dict(settings)).to_dict()
    if not isinstance(preset, str):
        raise ConfigError(f"preset must be a name of tnadapt.presets, such as 'lora'; got {safe_repr(preset)}")
    require_preset(preset)
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"with a preset, settings must be a mapping of its arguments; got {safe_repr(settings)}")
    try:
        return presets.PRESETS[preset].config(**(settings or {})).to_dict()
    except TypeError as error:
        raise ConfigError(f"preset {preset!r} does not take settings={safe_repr(settings)}: {error}") from None


def as_words(name: str, value: Any) -> Any:
    """Return a string unchanged, and a list of names as a set, as PEFT does."""
    return value if isinstance(value, str) and value else set(_list(name, value))


def _list(name: str, value: Any) -> list[str]:
    words = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) and word for word in words):
        raise ConfigError(f"{name} must be a name or a list of names; got {safe_repr(value)}")
    return list(words)


def _check_expressions(name: str, expressions: list[str]) -> None:
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(f"{name}={safe_repr(expression)} is not a valid regular expression: {error}") from None


# -- The weights that a config selects, minus those that PEFT's rules leave out ----------------------------------------


def select_targets(model: nn.Module, config: TnadaptConfig, model_type: Any = None) -> list[Target]:
    """Select the weights of the base model that an adapter with this config updates.

    Parameters
    ----------
    model : Module
        The base model.
    config : TnadaptConfig
        Its ``target_modules`` is replaced if it has the default and PEFT's table decides.
    model_type : str, optional
        The key of that table.

    Returns
    -------
    list of Target

    Raises
    ------
    TargetError
        If nothing is found, or nothing is left after ``exclude_modules``, ``modules_to_save`` and
        ``layers_to_transform``.
    """
    targets = _found(model, config, model_type)
    kept = [target for target in targets if not _excluded(plain(target.module), config.exclude_modules)]
    if config.exclude_modules and len(kept) == len(targets):
        _warn_if_unused(model, config.exclude_modules)
    saved = [f".{module}." for module in config.modules_to_save or ()]
    saved += [f".{path}." for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    kept = [target for target in kept if not any(module in f".{target.module}." for module in saved)]
    if not kept:
        outside = f"modules_to_save={safe_repr(config.modules_to_save)}, which are trained whole"
        if config.exclude_modules:
            outside = f"exclude_modules={safe_repr(_written(config.exclude_modules))} and {outside}"
        raise TargetError(
            f"target_modules={safe_repr(_written(config.target_modules))} names nothing outside of {outside}"
        )
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return kept
    return _of_layers(kept, config)


def _found(model: nn.Module, config: TnadaptConfig, model_type: Any) -> list[Target]:
    try:
        return _search(model, config.target_modules)
    except TargetError as error:
        missing = str(error).startswith("Please specify")
        if not missing or not isinstance(config.target_modules, DefaultTargets) or not isinstance(model_type, str):
            raise
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if default is None or (isinstance(default, str) and config.layers_to_transform is not None):
            raise
        words = default if isinstance(default, str) else [name for name in default if _is_there(model, name)]
        if not words:
            raise
    targets = _search(model, words)
    # Stored, so that the file records the choice: the table may change.
    config.target_modules = as_words("target_modules", words)
    return targets


def _is_there(model: nn.Module, name: str) -> bool:
    """Return whether a default name exists in a model; one entry of PEFT's table covers several variants."""
    try:
        return bool(_search(model, [name]))
    except TargetError:
        return False


def _search(model: nn.Module, names: Any) -> list[Target]:
    try:
        # Tied weights are only rejected by attach(), because those that are excluded here do no harm.
        return find_targets(model, names, untie=True)
    except TargetError as error:
        # Phrased as PEFT does: code that uses PEFT looks for "Please specify `target_modules`".
        text = str(error).replace("targets=", "target_modules=")
        missing = text.startswith(("no target", "no module"))
        raise TargetError(f"Please specify `target_modules`: {text}" if missing else text) from None


# -- Modules that are left out -----------------------------------------------------------------------


def _excluded(path: str, exclude: Any) -> bool:
    if not exclude:
        return False
    if isinstance(exclude, str):
        return path_matcher(exclude)(path)
    return any(ends_in(path, name) for name in exclude)


def _warn_if_unused(model: nn.Module, exclude: Any) -> None:
    if not any(_excluded(plain(path), exclude) for path, _ in model.named_modules()):
        warn(
            f"You have passed exclude_modules={safe_repr(_written(exclude))} but no modules were excluded: none of "
            f"{type(model).__name__} matches. A list takes whole paths or their last whole parts, a string is a "
            "regular expression for a whole path",
        )


# -- Layers ------------------------------------------------------------------------------------------


def _of_layers(targets: list[Target], config: TnadaptConfig) -> list[Target]:
    wanted = config.layers_to_transform
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    layers = {target.module: _layer(plain(target.module), config.layers_pattern) for target in targets}
    kept = [t for t in targets if _named_whole(t, config.target_modules) or layers[t.module] in numbers]
    if not kept:
        pattern = f" (layers_pattern={safe_repr(config.layers_pattern)})" if config.layers_pattern else ""
        present = ", ".join(map(str, sorted({layer for layer in layers.values() if layer is not None})))
        way = (
            f"their layers are {present}"
            if present
            else f"no layer number is in their paths, such as {targets[0].module}"
        )
        raise TargetError(
            f"layers_to_transform={safe_repr(wanted)}{pattern} selects none of the {len(targets)} weights of "
            f"target_modules={safe_repr(_written(config.target_modules))}; {way}"
        )
    return kept


def _layer(path: str, patterns: Any) -> int | None:
    """Return the layer number that PEFT reads from a path: the first number (with experts not the last)."""
    for pattern in [patterns] if isinstance(patterns, str) and patterns else patterns or ():
        match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<number>\d+)\.", path)
        if match:
            return int(match["number"])
    match = None if patterns else re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", path)
    return int(match["number"]) if match else None


def _named_whole(target: Target, names: Any) -> bool:
    """Return whether a list has the full path of a weight, or of its attention with its role, for any layer."""
    if isinstance(names, str):
        return False
    for name in names:
        path, colon, roles = name.rpartition(":")
        if name in (target.module, target.name):
            return True
        if colon and target.role in roles and (target.module == path or target.module.startswith(f"{path}.")):
            return True
    return False


def _written(names: Any) -> Any:
    return sorted(names) if isinstance(names, (set, frozenset)) else names

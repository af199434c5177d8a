"""The weights that a config selects: tnadapt's targets minus those excluded by PEFT's rules for modules and layers."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from tnadapt.errors import TargetError, safe_repr
from tnadapt.targets.target import Target

from .._target_selection import find_targets
from .._weights import plain
from ._peft_config import DefaultTargets, TnadaptConfig, as_words
from ._peft_library import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper

__all__ = ["select_targets"]


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
    found = _found(model, config, model_type)
    kept = [target for target in found if not _excluded(plain(target.module), config.exclude_modules)]
    if config.exclude_modules and len(kept) == len(found):
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
    found = _search(model, words)
    # Stored, so that the file records the choice: the table may change.
    config.target_modules = as_words("target_modules", words)
    return found


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
        return re.fullmatch(exclude, path) is not None
    return path in exclude or any(path.endswith(f".{name}") for name in exclude)


def _warn_if_unused(model: nn.Module, exclude: Any) -> None:
    if not any(_excluded(plain(path), exclude) for path, _ in model.named_modules()):
        warnings.warn(
            f"You have passed exclude_modules={safe_repr(_written(exclude))} but no modules were excluded: none of "
            f"{type(model).__name__} matches. A list takes whole paths or their last whole parts, a string is a "
            "regular expression for a whole path",
            stacklevel=2,
        )


# -- Layers ------------------------------------------------------------------------------------------


def _of_layers(targets: list[Target], config: TnadaptConfig) -> list[Target]:
    wanted = config.layers_to_transform
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    layers = {target.module: _layer(plain(target.module), config.layers_pattern) for target in targets}
    kept = [t for t in targets if _named_whole(t, config.target_modules) or layers[t.module] in numbers]
    if not kept:
        pattern = f" (layers_pattern={safe_repr(config.layers_pattern)})" if config.layers_pattern else ""
        there = ", ".join(map(str, sorted({layer for layer in layers.values() if layer is not None})))
        way = (
            f"their layers are {there}" if there else f"no layer number is in their paths, such as {targets[0].module}"
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
    """Return whether a list has the full path of a weight, or of its attention with this role, which fits any layer."""
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

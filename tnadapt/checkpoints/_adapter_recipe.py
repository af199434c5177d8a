"""Writing and parsing of the metadata entry ``tnadapt`` of an adapter file.

:mod:`tnadapt.checkpoints.adapter_format` specifies its keys.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.errors import FileError, TnadaptError, safe_repr, summarize
from tnadapt.targets.overlaps import check_distinct
from tnadapt.targets.target import Target

from ._expected_arrays import MAX_LEFT_OUT
from ._json_scan import MAX_VALUE, Elements, Later, lazy_object
from .adapter_file import AdapterFile
from .fingerprint import Fingerprint
from .pretrained_model import Pretrained

#: Of a file with one config, and of one with several.
VERSION, COMPOSITE = 1, 2
ENTRY = "tnadapt"

# The defaults of format 1. A later release may change Config's defaults, and files must not change with them.
_DEFAULTS: dict[str, Any] = {
    "rank": 4, "order": 2, "splits": 1, "groups": "weight", "fold": "stack", "format": "cp", "combine": "kronecker",
    "split_size": "balanced", "leading": "dense", "terms": 1, "projection": "identity", "ratio": 1.0, "shared": True,
    "alpha": None, "seed": 0,
}  # fmt: skip

_REQUIRED = {"version": int, "targets": Elements, "sha256": str}
# The key with the config, or the configs, in each version.
_CONFIGS: dict[int, tuple[str, type]] = {VERSION: ("config", dict), COMPOSITE: ("parts", Elements)}
_OPTIONAL = {
    "activation": str, "base": dict, "draws": str, "labels": Elements, "model": str, "pretrained": dict,
    "ties": dict, "trained": Elements,
}  # fmt: skip
_JSON = {dict: "an object", Elements: "a list", str: "a string", int: "an integer"}
# Bytes that a config may have for each target on top of MAX_VALUE: explicit groups list the targets' numbers.
_CONFIG_OF_TARGET = 16
# Maximum number of targets: a plan of this size takes minutes, and no model has as many weights to adapt.
_MAX_TARGETS = 1 << 17


def recipe_of(file: AdapterFile, draws: str | None) -> dict[str, Any]:
    """Return the entry's object for an adapter, without its checksum."""
    parts = [[_settings(config), len(targets)] for config, targets in file.config.split(file.targets)]
    recipe: dict[str, Any] = {
        "version": VERSION if len(parts) == 1 else COMPOSITE,
        "targets": [target.to_list() for target in file.targets],
        **({"config": parts[0][0]} if len(parts) == 1 else {"parts": parts}),
    }
    base = None if file.base is None else {**dataclasses.asdict(file.base), "sketch": list(file.base.sketch)}
    trained = None if file.trained is None else list(file.trained)
    ties = {name: list(others) for name, others in file.ties.items()}
    optional = {"model": file.model, "activation": file.activation, "base": base, "draws": draws, "ties": ties}
    recipe.update({key: value for key, value in {**optional, "trained": trained}.items() if value})
    if file.pretrained is not None:
        about = file.pretrained.to_dict()
        # Labels are many, and are scanned one by one.
        recipe.update({"labels": labels} if (labels := about.pop("labels", None)) else {}, pretrained=about)
    return recipe


def _settings(config: Config) -> dict[str, Any]:
    found = config.replace(weight_shape=None).to_dict()
    return {key: value for key, value in found.items() if key not in _DEFAULTS or value != _DEFAULTS[key]}


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return the entry's text."""
    return json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_recipe(
    text: bytes, stored: int
) -> tuple[dict[str, Any], Config, list[Target], Fingerprint | None, list[str] | None]:
    """Parse the entry of a file with ``stored`` tensors; return its object, config, targets, base and trained names."""
    recipe = _checked_recipe(lazy_object(text, f"the {ENTRY} entry", ["labels", "targets", "trained", "parts"]))
    recipe["pretrained"] = _pretrained(recipe)
    base = _base(recipe["base"]) if "base" in recipe else None
    trained = _trained(recipe["trained"], stored + MAX_LEFT_OUT) if "trained" in recipe else None
    targets = _targets(recipe["targets"])
    if "parts" in recipe:
        return recipe, _composite(recipe["parts"], len(targets)), targets, base, trained
    # The targets bound the length of the config, whose objects take many times its bytes.
    config = _config(recipe["config"].value(MAX_VALUE + _CONFIG_OF_TARGET * len(targets)))
    return recipe, config, targets, base, trained


def _checked_recipe(lazy: dict[str, Elements | Later]) -> dict[str, Any]:
    """Return the entry's values after checking their types; the config is parsed later."""
    recipe: dict[str, Any] = dict(lazy)
    version = _value(recipe.get("version"))
    if type(version) is int and version > COMPOSITE:
        raise FileError(f"has format version {version}, and this tnadapt reads up to {COMPOSITE}: update tnadapt")
    if type(version) is not int or version not in _CONFIGS:
        raise FileError(
            f"the {ENTRY} entry has the format version {safe_repr(version)}; expected {VERSION} or {COMPOSITE}"
        )
    required = {*_REQUIRED, _CONFIGS[version][0]}
    unknown = recipe.keys() - required - _OPTIONAL.keys()
    missing = required - recipe.keys()
    if unknown or missing:
        raise FileError(f"the {ENTRY} entry has unknown keys: {summarize(unknown)}; lacks: {summarize(missing)}")
    for key in [key for key in recipe if key != "config"]:
        recipe[key] = _of_kind(key, _value(recipe[key]))
    for key in ("sha256", "draws"):
        if key in recipe and not re.fullmatch("[0-9a-f]{64}", recipe[key]):
            raise FileError(f"the {ENTRY} entry's {key} must be 64 lower-case hex digits; got {safe_repr(recipe[key])}")
    return recipe


def _value(value: Any) -> Any:
    return value.value() if isinstance(value, Later) else value


def _of_kind(key: str, value: Any) -> Any:
    """Return a value after checking that it has the type of its key."""
    kind = (_REQUIRED | _OPTIONAL | dict(_CONFIGS.values()))[key]
    if not isinstance(value, kind):  # also catches Elements where no list is expected
        raise FileError(f"the {ENTRY} entry's {key} must be {_JSON[kind]}; got {safe_repr(value)}")
    return value


def _config(value: Any) -> Config:
    settings = _of_kind("config", value)
    unknown = settings.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise FileError(f"config has unknown fields: {summarize(unknown)}")
    try:
        return Config.from_dict({**_DEFAULTS, **settings})
    except TnadaptError as error:
        raise FileError(f"config: {error}") from error


def _composite(listed: Iterable[Any], targets: int) -> CompositeConfig:
    parts: list[tuple[Config, int]] = []
    for number, value in enumerate(listed):
        if number == targets:
            raise FileError(f"has more than {targets} parts, and each has a target")
        if not isinstance(value, list) or len(value) != 2:
            raise FileError(f"part {number} must be a list of a config and a number of targets; got {safe_repr(value)}")
        try:
            parts.append((_config(value[0]), value[1]))
        except FileError as error:
            raise FileError(f"part {number}: {error}") from error
    try:
        found = CompositeConfig(parts)
        found.split(range(targets))
    except TnadaptError as error:
        raise FileError(f"parts: {error}") from error
    return found


def _targets(listed: Iterable[Any]) -> list[Target]:
    found: list[Target] = []
    for number, value in enumerate(listed):
        if number == _MAX_TARGETS:
            raise FileError(f"has more than {_MAX_TARGETS} targets, and no model has as many weights to adapt")
        try:
            found.append(Target.from_list(value))
        except TnadaptError as error:
            raise FileError(f"target {number}: {error}") from error
    check_distinct(found)
    return found


def _trained(listed: Iterable[Any], most: int) -> list[str]:
    """Return the names; raise FileError if there are more than ``most``, the arrays stored or possibly omitted."""
    found: list[str] = []
    for name in listed:
        if not isinstance(name, str):
            raise FileError(f"trained must be a list of names of arrays; got {safe_repr(name)} among them")
        if len(found) == most:
            raise FileError(f"trained names more than {most} arrays, more than the file can have")
        found.append(name)
    return found


def _pretrained(recipe: dict[str, Any]) -> Pretrained | None:
    if "pretrained" in recipe:
        if "labels" in recipe["pretrained"]:
            raise FileError("pretrained has unknown keys: 'labels'")
        return Pretrained.from_dict(recipe["pretrained"], recipe.get("labels", ()))
    if "labels" in recipe:
        raise FileError(f"the {ENTRY} entry has labels without pretrained, whose outputs they name")
    return None


def _base(value: dict[str, Any]) -> Fingerprint:
    if value.keys() != {"sha256", "dtype", "sketch"}:
        raise FileError(f"base must have dtype, sha256 and sketch; got {safe_repr(value)}")
    return Fingerprint(**value)

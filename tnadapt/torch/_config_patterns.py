"""The targets of several configs in one adapter: each config with the pattern of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import named_config
from tnadapt.errors import ConfigError, TargetError, safe_repr
from tnadapt.targets.overlaps import check_distinct
from tnadapt.targets.target import Target

from ._target_search import TargetSearch
from ._target_selection import check_usable, filtered, in_order
from ._tied_weights import with_tied

__all__ = ["check_ordered", "of_patterns"]


def of_patterns(
    model: nn.Module,
    patterns: Mapping[Any, Config | str],
    *,
    layers: Any = None,
    exclude: Any = None,
    untie: bool = False,
    keep_tied: bool = False,
) -> tuple[Config, list[Target]]:
    """Return the config of a mapping from patterns to configs, and its targets: those of the first pattern, and so on.

    Parameters
    ----------
    model : Module
    patterns : mapping
        From what ``targets`` of :func:`tnadapt.torch.find_targets` may be, with a tuple for a list, to a config or the
        name of a preset. Another string than a role or keyword is a regular expression for the path of a module, or
        for its last whole parts; of a module that holds no weight itself, all linear weights in it are meant.
    layers, exclude, untie, keep_tied
        As for :func:`tnadapt.torch.find_targets`.

    Returns
    -------
    Config
        A :class:`tnadapt.CompositeConfig` if there are several.
    list of Target

    Raises
    ------
    TargetError
        If a pattern finds nothing, or two find the same weight; or as in :func:`tnadapt.torch.find_targets`.
    ConfigError
        If a value is not a config, or the configs cannot be in one adapter.

    Examples
    --------
    >>> from tnadapt import presets
    >>> model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    >>> config, targets = of_patterns(model, {"linear[12]": "lora", "qv": presets.lokr(2)})
    >>> [part.weights for part in config.parts], [target.module for target in targets]
    ([2, 2], ['linear1', 'linear2', 'self_attn', 'self_attn'])
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"attach needs a torch module; got {type(model).__name__}")
    if not patterns:
        raise ConfigError("a mapping of patterns to configs must have at least one; got {}")
    configs = {pattern: _config(pattern, value) for pattern, value in patterns.items()}
    search = TargetSearch(model)
    found = {pattern: _found(search, pattern) for pattern in configs}
    _check_apart(found)
    left = set(filtered(search, [target for own in found.values() for target in own], layers, exclude))
    chosen = {pattern: [target for target in own if target in left] for pattern, own in found.items()}
    for pattern, own in chosen.items():
        if not own:
            raise TargetError(f"layers and exclude leave no target of {safe_repr(pattern)}: leave this pattern out")
    targets = [target for own in chosen.values() for target in own]
    targets = with_tied(model, targets, keep_tied)
    check_usable(model, targets, untie)
    parts = [(configs[pattern], len(own)) for pattern, own in chosen.items()]
    return (parts[0][0] if len(parts) == 1 else CompositeConfig(parts)), targets


def check_ordered(targets: Any) -> None:
    """Raise a ConfigError unless the targets of a composite config are a list in the order of its parts."""
    if not isinstance(targets, (list, tuple)) or not all(isinstance(target, Target) for target in targets):
        raise ConfigError(
            "a CompositeConfig has its weights in an order: give a mapping of patterns to configs instead, or targets "
            f"as a list of tnadapt.Target in that order; got targets={safe_repr(targets)}"
        )


def _config(pattern: Any, value: Any) -> Config:
    if isinstance(value, str):
        return named_config(value, {})
    if not isinstance(value, Config) or isinstance(value, CompositeConfig):
        raise ConfigError(
            f"the config of {safe_repr(pattern)} must be a tnadapt.Config or the name of a preset; got "
            f"{type(value).__name__}"
        )
    return value


def _found(search: TargetSearch, pattern: Any) -> list[Target]:
    if isinstance(pattern, str):
        found = search.by_pattern(pattern)
    else:
        found = search.find([pattern] if isinstance(pattern, Target) else pattern)
    if not found:
        raise search.nothing(pattern)
    return in_order(search, found)


def _check_apart(found: Mapping[Any, list[Target]]) -> None:
    """Raise a TargetError if two patterns find the same rows of a weight."""
    before: dict[tuple[str, str, int | None], list[tuple[Any, Target]]] = {}
    for pattern, own in found.items():
        for target in own:
            others = before.setdefault((target.module, target.parameter, target.index), [])
            for other, one in others:
                if other is not pattern and _overlap(one, target):
                    raise TargetError(
                        f"{target.name} is found by {safe_repr(other)} and by {safe_repr(pattern)}, and each weight "
                        "has one config: make one pattern narrower, such as '(?!.*mlp).*proj' for all but an mlp's"
                    )
            others.append((pattern, target))


def _overlap(one: Target, other: Target) -> bool:
    try:
        check_distinct([one, other])
    except TargetError:
        return True
    return False

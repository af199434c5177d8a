"""Arguments of attach() in another's place, such as a rank where the targets come: what the caller meant."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from tnadapt.algebra import presets
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import is_setting
from tnadapt.algebra.rank_bounds import useful_rank
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, TargetError, safe_repr, warn
from tnadapt.targets.target import Target

__all__ = ["refuse_misplaced", "warn_undropped", "warn_useless_rank"]


def refuse_misplaced(cfg: Any, targets: Any) -> None:
    """Raise an error for settings in the place of the config or of the targets, with the call that was meant.

    Raises
    ------
    ConfigError
        For a mapping of settings as the config.
    TargetError
        For a number or a mapping as the targets.
    """
    name = cfg if isinstance(cfg, str) else "lora"
    if _are_settings(cfg) and not any(isinstance(value, (str, Config)) for value in cfg.values()):
        raise ConfigError(
            f"a mapping has a config for each pattern of weights; got settings, {safe_repr(dict(cfg))}: give them as "
            f"keywords, with the name of a preset: {_call(name, cfg)}"
        )
    if isinstance(targets, (int, float)) and not isinstance(targets, bool):
        raise TargetError(
            f"the third argument is the targets, such as 'qv'; got the number {safe_repr(targets)}: settings are "
            f"keywords, as in {_call(name, {'rank': targets})}"
        )
    if isinstance(targets, Mapping):
        meant = _call(name, targets) if _are_settings(targets) else "attach(model, {'qv': 'lora'})"
        raise TargetError(
            f"the third argument is the targets, such as 'qv'; got {safe_repr(dict(targets))}: settings are keywords, "
            f"and a mapping of patterns to configs is the second argument: {meant}"
        )


def warn_undropped(targets: Sequence[Target], dropout: float) -> None:
    """Warn of dropout that drops nothing, as all targets are embeddings: their inputs are indices."""
    if dropout > 0.0 and all(target.role == "embedding" for target in targets):
        warn(
            f"dropout={dropout:g} drops nothing here: all targets are embeddings, whose inputs are indices. Leave it "
            "out, or adapt other weights as well",
        )


def warn_useless_rank(plan: SuperLoRA, targets: Sequence[Target]) -> None:
    """Warn of a rank beyond which the updates gain nothing, as they can be any already.

    Of frozen arrays, and of arrays that θ makes, more can be useful whatever the sizes: nothing is said about those,
    nor about the default of a preset.
    """
    config = plan.config
    if isinstance(config, CompositeConfig) or config.sources or config.before is not None:
        return
    rank, most = config.rank, useful_rank(group for group, _ in plan.alike)
    if not isinstance(rank, int) or most is None or rank <= most or _is_default(config):
        return
    useful = SuperLoRA(
        config.replace(rank=most),
        [target.shape for target in targets],
        layers=[target.layer for target in targets],
        roles=[target.role for target in targets],
    )
    # Some formats cut the rank to what is possible.
    if plan.num_parameters > useful.num_parameters:
        warn(
            f"rank={rank} is beyond {most}, the largest useful rank for these weights: more parameters add nothing to "
            f"what their updates can be. Give rank={most} or less",
        )


def _is_default(config: Config) -> bool:
    """Return whether a config has the rank of its preset without arguments."""
    from tnadapt.planning import preset_call  # rarely needed, and takes a while to import

    call = preset_call(config)
    if call is None:
        return False
    return bool(inspect.signature(getattr(presets, call.preset)).parameters["rank"].default == config.rank)


def _are_settings(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(is_setting, value))


def _call(name: str, settings: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key}={safe_repr(value)}" for key, value in settings.items())
    return f"attach(model, {name!r}, {listed})"

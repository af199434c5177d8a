"""Several configs in one adapter, each for some of its weights.

The long vector of such an adapter is the concatenation of its parts' vectors. Groups and weights are numbered across
parts: if the first part has two groups, ``group2`` is the first group of the second part. The draws of a part use its
own seed and its own group numbers, so they do not depend on the other parts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tnadapt.argument_checks import integer, is_sequence, wrong_argument
from tnadapt.errors import ConfigError, ShapeError, safe_repr
from tnadapt.report import TextTable

from .config import Config
from .folding import MAX_SIZE

_Item = TypeVar("_Item")

# Fields that must be the same for all weights of a plan.
_SAME = ("apply", "magnitude_axis", "start")


class ConfigPart(NamedTuple):
    """One config of several, and the number of weights that it is for.

    Attributes
    ----------
    config : Config
    weights : int
    """

    config: Config
    weights: int


class CompositeConfig(Config):
    """Several configs, each for some of the weights of one adapter: the first for the first weights, and so on.

    :func:`tnadapt.torch.attach` makes one of a mapping of patterns to configs.

    Parameters
    ----------
    parts : sequence of (Config, int)
        Each config, and the number of weights that it is for.

    Attributes
    ----------
    parts : tuple of ConfigPart

    Raises
    ------
    ConfigError
        If there are fewer than two parts, one is not a config with a number of weights, or they cannot be in one
        adapter: with another ``apply``, ``magnitude_axis`` or ``start``, or with a map ``before`` the network.

    Notes
    -----
    It has the fields of :class:`Config`. One that all parts share has their value; to read another one is an error that
    names the field, so that nothing takes the config of one part for that of all.

    Examples
    --------
    >>> import tnadapt as tna
    >>> config = CompositeConfig([(tna.presets.lora(8), 2), (tna.presets.lokr(4), 1)])
    >>> tna.UpdatePlan(config, [(64, 64), (64, 64), (256, 64)]).num_parameters
    2272
    >>> config.seed, config.replace(seed=3).parts[1].config.seed
    (0, 3)
    >>> config.rank
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: rank differs between the 2 configs of one adapter: 8, 4; read it in config.parts
    """

    parts: tuple[ConfigPart, ...]

    def __new__(cls, *args: Any, **settings: Any) -> CompositeConfig:
        return object.__new__(cls)

    def __init__(self, parts: Sequence[tuple[Config, int]]) -> None:
        object.__setattr__(self, "parts", _checked_parts(parts))

    def __repr__(self) -> str:
        return f"CompositeConfig([{', '.join(f'({part.config!r}, {part.weights})' for part in self.parts)}])"

    def _repr_html_(self) -> str:
        rows = [(f"{part.weights:,}", repr(part.config)) for part in self.parts]
        return TextTable(rows, ("weights", "config"), caption=type(self).__name__).html()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompositeConfig) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def split(self, items: Sequence[_Item]) -> list[tuple[Config, Sequence[_Item]]]:
        """Return each config with its own of the items, of which there is one for each weight."""
        expected = sum(part.weights for part in self.parts)
        if not is_sequence(items) and not isinstance(items, str):
            raise wrong_argument("items", "a sequence of one for each weight", items)
        items = list(items)
        if len(items) != expected:
            raise ShapeError(f"items must be one for each of the {expected} weights of the configs; got {len(items)}")
        left = iter(items)
        return [(part.config, list(itertools.islice(left, part.weights))) for part in self.parts]

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"parts": [[fields of a config, number of weights], …]}``."""
        return {"parts": [[part.config.to_dict(), part.weights] for part in self.parts]}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompositeConfig:
        """Return the config of a dictionary that :meth:`to_dict` wrote."""
        if not isinstance(settings, Mapping) or settings.keys() != {"parts"}:
            raise ConfigError(f"expected a mapping with the key 'parts'; got {safe_repr(settings)}")
        parts = settings["parts"]
        if not isinstance(parts, (list, tuple)) or not all(_is_pair(part) for part in parts):
            raise ConfigError(
                f"parts must be a list of pairs of a config and a number of weights; got {safe_repr(parts)}"
            )
        return cls([(Config.from_dict(config), weights) for config, weights in parts])

    def replace(self, **changes: Any) -> CompositeConfig:
        """Return a copy with some fields of every part changed."""
        return CompositeConfig([(part.config.replace(**changes), part.weights) for part in self.parts])


def _shared(name: str) -> property:
    """Return a property that reads a field common to all parts."""

    def read(config: CompositeConfig) -> Any:
        values = [getattr(part.config, name) for part in config.parts]
        if any(value != values[0] for value in values):
            some = ", ".join(safe_repr(value) for value in values[:4]) + (", …" if len(values) > 4 else "")
            raise ConfigError(
                f"{name} differs between the {len(values)} configs of one adapter: {some}; read it in config.parts"
            )
        return values[0]

    return property(read)


# The class has defaults for the fields, which would be read silently.
for _field in dataclasses.fields(Config):
    setattr(CompositeConfig, _field.name, _shared(_field.name))


def _is_pair(part: Any) -> bool:
    return isinstance(part, (tuple, list)) and len(part) == 2


def _checked_parts(parts: Any) -> tuple[ConfigPart, ...]:
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not all(_is_pair(part) for part in parts):
        raise ConfigError(
            f"parts must be a list of two or more pairs of a config and a number of weights; got {safe_repr(parts)}"
        )
    pairs = list[ConfigPart]()
    for place, (config, weights) in enumerate(parts):
        if not isinstance(config, Config) or isinstance(config, CompositeConfig):
            raise ConfigError(f"part {place} must be a tnadapt.Config; got {type(config).__name__}")
        pairs.append(ConfigPart(config, integer(f"the weights of part {place}", weights, 1, MAX_SIZE, ConfigError)))
        if config.before is not None:
            raise ConfigError(
                f"part {place} makes its arrays from θ by before={safe_repr(config.before)}, which one config of "
                "several cannot: attach it as an adapter of its own, under another name"
            )
        for name in _SAME:
            first, value = getattr(pairs[0].config, name), getattr(config, name)
            if value != first:
                raise ConfigError(
                    f"all configs of one adapter must have the same {name}; part 0 has {first!r}, part {place} "
                    f"{value!r}: attach one of them as an adapter of its own, under another name"
                )
    return tuple(pairs)

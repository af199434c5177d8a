"""Presets: named methods as :class:`~tnadapt.Config`, from table 1 of the paper and from the literature.

The tests check each preset against the formula in the method's paper. Keyword arguments that a preset does not name
are fields of :class:`~tnadapt.Config` (``alpha``, ``seed``, …) and override the preset's choice.

LoDA, which the paper also names, is not included: its nonlinearity acts on activations, so it defines no ΔW.

Methods that stack all weights of a group into one tensor (``lotr``, ``fact_tt``, ``fact_tk``, ``cara``, ``lorta_cp``,
``metatt``) take the number of weights and their shape from the weights of each group. If the sizes are given as
arguments, they are a condition (``Config.weight_shape``): other weights are refused. The weights of a group must have
one shape; ``groups="role"`` makes one group of all queries, one of all values and so on, which have different shapes
in grouped-query attention. The weights must be in the order layer 0 query, layer 0 value, layer 1 query, …
"""

from __future__ import annotations

import inspect
import keyword
import re
from typing import Any

from tnadapt.errors import ConfigError, safe_repr
from tnadapt.plugins import NameRegistry, failed_plugins

from ._methods import *  # noqa: F403
from ._methods import BUILT_IN
from ._methods import LARGEST_DENSE as LARGEST_DENSE
from ._preset import AdaptedWeights as AdaptedWeights
from ._preset import Ladder as Ladder
from ._preset import Preset as Preset
from ._preset import by_factors as by_factors
from ._preset import groups_label as groups_label
from ._preset import rank_label as rank_label

# -- The records by name -----------------------------------------------------------------------------------------------


_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class PresetRegistry(NameRegistry[Preset]):
    """The records of presets: the built-in ones, and those that other packages register."""

    def register(self, preset: Preset) -> None:
        """Add a record, or raise the errors of :func:`register_preset`."""
        if not isinstance(preset, Preset):
            raise ConfigError(f"register_preset takes a tnadapt.presets.Preset; got {safe_repr(preset)}")
        if not _NAME.fullmatch(preset.name) or keyword.iskeyword(preset.name):
            raise ConfigError(
                "the name of a preset must be a Python identifier of at most 64 lower-case letters, digits and '_', as "
                f"it is written tnadapt.presets.NAME; got {safe_repr(preset.name)}"
            )
        if preset.name not in self.built_in and preset.name in globals():
            raise ConfigError(
                f"tnadapt.presets.{preset.name} is something else than a preset: choose another name for yours"
            )
        parameters = inspect.signature(preset.make).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            raise ConfigError(
                f"make of preset {preset.name!r} must take fields of tnadapt.Config as further keywords: define it as "
                f"def {preset.name}(…, **changes), and pass these on"
            )
        self.add(preset.name, preset, preset.make)


PRESETS = PresetRegistry("preset", {preset.name: preset for preset in BUILT_IN})
# Not __all__: type checkers would export only the names that they read in it.
_METHODS = [preset.name for preset in BUILT_IN]


def register_preset(preset: Preset) -> None:
    """Make a method known by its name: as ``tnadapt.presets.NAME``, to ``attach``, the planner and the command line.

    Parameters
    ----------
    preset : tnadapt.presets.Preset
        Registering it again replaces it.

    Raises
    ------
    ConfigError
        If it is not a Preset; if its name is no identifier in lower case, is built in, or registered by another module;
        or if its ``make`` does not take fields of :class:`~tnadapt.Config`.

    Examples
    --------
    LoRA of all weights in one group, with a factor for each mode of a cube:

    >>> import tnadapt as tna
    >>> def cubelora(rank=4, **changes):
    ...     settings = {"rank": rank, "order": 3, "groups": 1, "fold": "hypercube", "format": "cp", "rate": "adam"}
    ...     return tna.Config.from_dict({**settings, **changes})
    >>> tna.register_preset(tna.presets.Preset("cubelora", cubelora, "CubeLoRA", "this page", {"rank": 2}))
    >>> tna.parameter_count(tna.presets.cubelora(2), [(12, 8)] * 4)
    48
    """
    PRESETS.register(preset)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _METHODS
    message = f"module 'tnadapt.presets' has no attribute {name!r}"
    if name.startswith("_"):  # as tools ask any module
        raise AttributeError(message, name=name)
    if PRESETS.knows(name):
        return PRESETS[name].make
    way_out = f"{PRESETS.suggestion(name) or '.'} If a plug-in provides it, install the plug-in{failed_plugins()}"
    raise AttributeError(message + way_out, name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PRESETS.installed()})

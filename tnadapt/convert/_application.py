"""How updates of an adapter meet their weights, as other libraries store it: magnitudes (DoRA), and HiRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, FileError, safe_repr

from ._unpack import Module, Unpacked
from ._updates import Float, narrow

__all__ = ["Application", "application_of", "not_additive", "with_application"]


class Application(NamedTuple):
    """How all updates of an adapter meet their weights.

    Attributes
    ----------
    apply, magnitude_axis : str
        As in :class:`tnadapt.Config`.
    magnitudes : mapping of str to ndarray
        The magnitudes by the paths of modules, as vectors, for "magnitude".
    """

    apply: str = "add"
    magnitude_axis: str = "rows"
    magnitudes: Mapping[str, Float] = {}


def with_application(file: AdapterFile, application: Application, dtype: str) -> AdapterFile:
    """Return a file of added updates with another application; its arrays are stored in a dtype if they can be.

    Raises
    ------
    FileError
        If the magnitude of a weight is missing or has another length.
    """
    if application == Application():
        return file
    config = file.config.replace(apply=application.apply, magnitude_axis=application.magnitude_axis)
    arrays = dict(Unpacked(file).arrays)
    if application.magnitudes:
        for number, target in enumerate(file.targets):
            found = application.magnitudes.get(target.module)
            if found is None:
                raise FileError(f"{safe_repr(target.module)} has no magnitude, and other modules have one")
            if found.shape != (target.shape[0],):
                raise FileError(
                    f"the magnitude of {safe_repr(target.module)} has {found.size} elements; expected "
                    f"{target.shape[0]}, one for each output"
                )
            arrays[f"weight{number}.magnitude"] = found
    stored, kinds = narrow(arrays, dtype)
    kept = {name: kind for name, kind in file.dtypes.items() if name not in file.arrays}
    return dataclasses.replace(file, config=config, arrays=stored, dtypes={**kept, **kinds})


def not_additive(apply: str, form: str) -> ConfigError:
    """Return the error of a form that holds nothing but added updates."""
    other = "" if form == "peft-lora" else ", or convert it to 'peft-lora' (--to peft-lora), which has DoRA and HiRA"
    return ConfigError(
        f"apply={apply!r} of this adapter does more than add ΔW to the weight, and {form} can only add: merge it into "
        f"the base with tnadapt.merge (tnadapt merge){other}"
    )


def application_of(file: AdapterFile, modules: Sequence[Module]) -> Application:
    """Return the application of a file's updates.

    Raises
    ------
    ConfigError
        If a magnitude is that of some rows of a weight.
    """
    magnitudes: dict[str, Float] = {}
    arrays = Unpacked(file).arrays
    for module in modules:
        for number, target in module.targets:
            for name in file.plan.weight_param_names[number]:
                if target.rows is not None:
                    raise ConfigError(
                        f"{safe_repr(module.path)} has magnitudes of some of its rows only, and other libraries have "
                        "one for each row of a weight: merge the adapter into the base with tnadapt.merge (tnadapt "
                        "merge)"
                    )
                magnitudes[module.path] = arrays[name]
    return Application(file.config.apply, file.config.magnitude_axis, magnitudes)

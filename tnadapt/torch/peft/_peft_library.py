"""Everything that is imported from PEFT, public or not, and the error if PEFT is missing or too old."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, KeysView
from typing import Any

import torch
from torch import nn

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.errors import BackendError, FileError, TargetError, TnadaptError, safe_repr
from tnadapt.torch import _merging as merging
from tnadapt.torch._adapter import Adapter
from tnadapt.torch._adapter_saving import base_fingerprint
from tnadapt.torch._state import DOT, encoded

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AdapterArrays",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftMissingError",
    "base_dtype",
    "check_adapter_name",
    "check_adapters_to_merge",
    "check_base",
    "computed_from",
    "delete_adapter",
    "describe_base",
    "in_file",
    "init_empty_weights",
    "set_adapter",
    "set_additional_trainable_modules",
    "set_requires_grad",
]


# -- Everything that is imported from PEFT, public or not, and the error if PEFT is missing or too old -----------------


class PeftMissingError(BackendError, ImportError):
    """PEFT is not installed, or too old."""


try:
    from peft import PeftConfig
    from peft.functional import delete_adapter, set_adapter, set_requires_grad
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from peft.utils.integrations import init_empty_weights
    from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules

    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError("the installed PEFT lacks the hooks that an external method needs")
except ImportError as error:
    raise PeftMissingError(
        f'tnadapt.torch.peft needs PEFT 0.21 or newer: pip install "tnadapt[peft]" ({error})'
    ) from error


# ----------------------------------------------------------------------------------------------------------------------
# The arrays of the adapters on a model, registered where PEFT's and TRL's code looks for an adapter's parameters


class AdapterArrays(nn.ModuleDict):
    """One ``nn.ParameterDict`` per adapter, by the adapter's name.

    PEFT's layers keep their parameters in such containers, and code built on PEFT relies on it: it asks whether a name
    is in one, and TRL finds an adapter's parameters by ``.default.`` in their names. Unlike in ``nn.ModuleDict``, a
    name may contain dots; they are encoded in the names of the parameters.

    Examples
    --------
    >>> arrays = AdapterArrays()
    >>> arrays["v1.0"] = nn.ParameterDict({"factor": nn.Parameter()})
    >>> list(arrays), "v1.0" in arrays, [name for name, _ in arrays.named_parameters()]
    (['v1.0'], True, ['v1%2E0.factor'])
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(encoded(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(encoded(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(encoded(key))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and encoded(key) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> KeysView[str]:
        """Return the adapters' names."""
        return {key.replace(DOT, "."): None for key in self._modules}.keys()

    def items(self) -> Any:
        """Return the adapters' names and arrays."""
        return {key.replace(DOT, "."): module for key, module in self._modules.items()}.items()


# -- The names of an adapter's arrays on a PEFT model and in PEFT's files ----------------------------------------------

# On the model ``base_model.tnadapt.tnadapt_arrays.default.group0_split0_factor0``, in a file
# ``base_model.model.tnadapt.group0.split0.factor0``.


_ARRAY = r"(?:group\d+_(?:term\d+_)?split\d+_[a-z]+\d*(?:_[a-z]+)?|(?:group\d+_)?theta|weight\d+_[a-z]+)"
_RESERVED = re.compile(rf"tnadapt|tnadapt_arrays|{_ARRAY}")


def in_file(key: str, adapter_name: str) -> str | None:
    """Return an array's name in a file, given its name in a state dict; None if it does not belong to this adapter.

    Examples
    --------
    >>> in_file("base_model.tnadapt.tnadapt_arrays.v1%2E0.group0_split0_factor0", "v1.0")
    'base_model.model.tnadapt.group0.split0.factor0'
    >>> in_file("base_model.model.lm_head.weight", "v1.0")
    """
    # Whatever is in an adapter's container is one of its arrays: formats and sources of other packages name theirs.
    found = re.fullmatch(rf"(.*\.)?tnadapt\.tnadapt_arrays\.{re.escape(encoded(adapter_name))}\.([^.]+)", key)
    return None if found is None else f"{found[1] or ''}model.tnadapt.{found[2].replace('_', '.')}"


def check_adapter_name(name: str) -> None:
    """Raise a TargetError if PEFT would confuse the name with a part of every array's name, or torch forbids it."""
    if _RESERVED.fullmatch(name):
        raise TargetError(
            f"an adapter cannot be called {name!r}: the arrays of all adapters have this word in their names, and PEFT "
            "could not tell them apart; give another name"
        )
    if hasattr(AdapterArrays(), encoded(name)):
        raise TargetError(
            f"an adapter cannot be called {name!r}: its arrays are kept in an nn.ModuleDict, which has an attribute of "
            "that name; give another name"
        )


# -- The description of the base model in adapter_config.json, and the check that an adapter fits a base ---------------


def describe_base(handle: Adapter) -> dict[str, Any]:
    """Return the description of the base model and the draws for a file; reads every adapted weight."""
    base = base_fingerprint(handle._state)
    counts: dict[str, int] = {}
    for rows, cols in handle.plan.shapes:
        counts[f"{rows}x{cols}"] = counts.get(f"{rows}x{cols}", 0) + 1
    return {
        "weights": counts,
        "fingerprint": None if base is None else {**dataclasses.asdict(base), "sketch": list(base.sketch)},
        "draws": AdapterFile(handle.config, handle.targets, handle.plan.init(), given=handle.plan.given).draws,
    }


def computed_from(handle: Adapter, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the fingerprint of a described base if arrays of the adapter are computed from its weights."""
    return base["fingerprint"] if base is not None and handle.plan.base_shapes else None


def check_base(handle: Adapter, saved: dict[str, Any] | None, source: dict[str, Any] | None) -> None:
    """Raise a FileError unless the adapter was trained on these weights and with the same draws.

    Parameters
    ----------
    handle : Adapter
    saved : dict or None
        What :func:`describe_base` returned for the base that it was trained on; None if nothing of it is compared.
    source : dict or None
        What :func:`computed_from` returned. On another base, the arrays that the adapter does not store would differ.
    """
    computed = handle.plan.base_shapes
    if saved is None and (source is None or not computed):
        return
    here, kind = describe_base(handle), type(handle.model).__name__
    way = (
        "Give the base model that it was trained on; or, to use it here anyway, load its TnadaptConfig, set "
        "config.base = None, and pass it as config="
    )
    if saved is not None and saved.get("weights") != here["weights"]:
        raise FileError(
            f"the adapter was trained on weights of the shapes {safe_repr(saved.get('weights'))}, and "
            "target_modules find "
            f"{here['weights']} in this {kind}. {way}"
        )
    if saved is not None and saved.get("draws") != here["draws"]:
        raise FileError(
            f"the adapter was trained with fixed draws whose digest is {safe_repr(saved.get('draws'))}; on this "
            f"machine it is {here['draws']}. Its updates would differ: run tnadapt.verify to see why"
        )
    other = f"the adapter was trained on another base model than this {kind}: of its weights"
    if computed and (difference := _difference(source, here["fingerprint"])) is not None:
        raise FileError(
            f"{other}, {difference}. Arrays such as {next(iter(computed))!r} are computed from the base weights and "
            "not stored, and would be other ones here. Give the base model that it was trained on; or, on that model, "
            "save the adapter with tnadapt.torch.adapters(model)[name].save(path, store_bases=True), and load that "
            "file with tnadapt.torch.load(…, check_base=False)"
        )
    if saved is not None and (difference := _difference(saved.get("fingerprint"), here["fingerprint"])) is not None:
        raise FileError(f"{other}, {difference}. {way}")


def _difference(saved: Any, here: dict[str, Any] | None) -> str | None:
    """Describe how two fingerprints differ; None if they match, or one of them could not be taken."""
    if saved is None or here is None:
        return None
    try:
        return Fingerprint(**saved).difference(Fingerprint(**here))
    except (TypeError, TnadaptError) as error:
        raise FileError(f"the fingerprint of the base model in the adapter's config is invalid: {error}") from None


def base_dtype(handle: Adapter) -> torch.dtype:
    """Return the dtype of the adapted weights, promoted if they differ; float32 if all are quantized."""
    stored = [merging.stored(handle._state, index) for index in range(len(handle.targets))]
    dtypes = [weight.dtype for weight in stored if weight is not None]
    # torch counts float8 types as floating point, but cannot compute in them.
    wide = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    return functools.reduce(torch.promote_types, wide) if wide else torch.float32

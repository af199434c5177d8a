"""A folder that PEFT saved: LoRA, LoKr or LoHa, read exactly or refused by name."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.checkpoints.adapter_file import some
from tnadapt.checkpoints.container import DTYPES, Container, opened, raw_dtype
from tnadapt.checkpoints.strict_json import MAX_CONFIG, json_file
from tnadapt.errors import FileError, shown
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._base_model import Base, target_of
from ._joining import Found, joined
from ._numbers import widened, widest
from ._peft_settings import PREFIX, Settings, settings_of
from ._source import Source, sourced
from ._tensors import LOHA, LOKR, kind_of, update_of
from ._updates import Float

__all__ = ["CONFIG", "RECORD", "TURNED", "WEIGHTS", "adapter_of", "read_peft"]

# The entry of metadata in which a conversion says what it did, and what in it says which weights are (in, out).
RECORD, TURNED = "tnadapt.convert", "transposed"

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Its name in the file -> the one under which both libraries' tensors are read.
_SUFFIXES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"} | {name: name for name in (*LOKR, *LOHA)}
_REFUSED = {
    "lora_magnitude_vector": "DoRA scales the sum of weight and update",
    "lora_embedding_A": "the update of an embedding",
    "lora_embedding_B": "the update of an embedding",
    "lora_A.bias": "a bias",
    "lora_B.bias": "it adds to the layer's bias, which is not in the file",
    "trainable_tokens_delta": "rows of an embedding",
}


def read_peft(folder: str, base: Base | None) -> Source:
    """The adapter of a folder.

    Raises
    ------
    FileError, TargetError
        If a file is missing or damaged, or there is anything in it that an adapter file cannot hold.
    """
    settings = settings_of(json_file(os.path.join(folder, CONFIG), MAX_CONFIG, CONFIG))
    with opened(os.path.join(folder, WEIGHTS)) as container:
        return adapter_of(container, settings, base)


def adapter_of(container: Container, settings: Settings, base: Base | None) -> Source:
    """The adapter of an open file of weights."""
    modules: dict[str, dict[str, Float]] = {}
    kept, bits = dict[str, np.ndarray](), dict[str, str]()
    dtypes, unknown = set[str](), list[str]()
    for name, entry in container.entries.items():
        path, suffix = _taken_apart(name)
        if suffix in _SUFFIXES:
            modules.setdefault(path, {})[_SUFFIXES[suffix]] = widened(name, entry.dtype, container.array(name))
            dtypes.add(DTYPES[entry.dtype])
        elif suffix in _REFUSED:
            raise FileError(f"{shown(name)} cannot be converted: {_REFUSED[suffix]}")
        elif (own := _kept_name(path, settings)) is not None:
            kept[own], kind = _kept(name, entry.dtype, container.array(name))
            bits |= {f"kept.{own}": kind} if kind else {}
        else:
            unknown.append(name)
    if unknown:
        raise FileError(f"has tensors that are no part of a {settings.kind} adapter: {some(unknown)}")
    if not modules:
        raise FileError("has no adapted weight")
    wrapped = next((path for path in modules if ".base_layer." in f".{path}."), None)
    if wrapped is not None:
        raise FileError(
            f"{shown(wrapped)} cannot be converted: it is PEFT's LoRA on nn.MultiheadAttention, which adds its update "
            "of the output projection twice, and of q, k and v to a parameter that is no module's weight"
        )
    turned, found = _recorded(container.metadata), []
    for path in sorted(modules, key=natural):
        kind = kind_of(path, modules[path])
        if kind != settings.kind:
            raise FileError(f"{shown(path)} has tensors of {kind}, and {CONFIG} says {settings.kind}")
        update, shape = update_of(path, modules[path], functools.partial(settings.scale, path), peft=True)
        says = turned.get(path, settings.transposed)
        target = target_of(path, shape, base, says and len(shape) == 2, settings.kind == "lora")
        found.append(Found(target, update))
    if base is not None and settings.kind == "lora":
        _check_turned([one.target for one in found if one.target.module not in turned], settings.transposed)
    file, notes = joined(found, widest(dtypes), kept, bits, settings.model)
    return sourced(f"peft-{settings.kind}", file, found, notes)


def _recorded(metadata: Mapping[str, str]) -> dict[str, bool]:
    """Of a folder that this library wrote: whether each module's weight is stored as ``(in, out)``."""
    try:
        listed = json.loads(metadata.get(RECORD, "{}")).get(TURNED, {})
        return {path: turned for path, turned in listed.items() if isinstance(turned, bool)}
    except (ValueError, RecursionError, AttributeError):
        return {}


def _check_turned(targets: Sequence[Target], says: bool) -> None:
    """A FileError where the one word that PEFT has for all weights is wrong for some, and all there is for others."""
    flat = [target for target in targets if len(target.stored) == 2]
    wrong = [target for target in flat if target.stored[0] != target.stored[1] and target.transposed != says]
    square = [target for target in flat if target.stored[0] == target.stored[1]]
    if wrong and square:
        raise FileError(
            f"fan_in_fan_out is {says} for all weights, which is not so of {shown(wrong[0].module)} in base: of the "
            f"square {shown(square[0].module)} nothing says how it is stored. Save one adapter for each kind of layer"
        )


def _taken_apart(name: str) -> tuple[str, str]:
    """The module's path and what follows it, of which the adapter's tensors are known by."""
    path = name.removeprefix(PREFIX)
    for suffix in (*_SUFFIXES, *_REFUSED):
        if path != name and path.endswith(f".{suffix}"):
            return path.removesuffix(f".{suffix}"), suffix
    return path, ""


def _kept_name(path: str, settings: Settings) -> str | None:
    """Under which name a tensor that is no adapter's is kept, or None where nothing says that it was trained."""
    # PEFT's own rule for which modules these are.
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in settings.saved):
        return path.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    if settings.bias != "none" and path.rpartition(".")[2] == "bias":
        return path.replace(".base_layer.", ".")
    return None


def _kept(name: str, tag: str, array: np.ndarray) -> tuple[np.ndarray, str]:
    if tag == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileError(f"{shown(name)} holds NaN or infinity")
    if tag == "BF16":
        return array, "bfloat16"
    return array.astype(raw_dtype(tag).newbyteorder("="), copy=False), ""

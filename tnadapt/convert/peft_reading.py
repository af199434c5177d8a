"""A folder that PEFT saved: LoRA, LoKr or LoHa, read exactly or refused by name."""

from __future__ import annotations

import functools
import os
import re

import numpy as np

from ..adapter_file import some
from ..container import DTYPES, Container, opened, raw_dtype, strict_json
from ..errors import FileError, shown
from ..roles import natural
from .base import Base, target_of
from .joining import Found, joined
from .numbers import widened, widest
from .peft_settings import PREFIX, Settings, settings_of
from .source import Source, sourced
from .tensors import LOHA, LOKR, kind_of, update_of
from .updates import Float

__all__ = ["CONFIG", "WEIGHTS", "adapter_of", "read_peft"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_MAX_CONFIG = 1 << 24
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
    settings = settings_of(_config(os.path.join(folder, CONFIG)))
    with opened(os.path.join(folder, WEIGHTS)) as container:
        return adapter_of(container, settings, base)


def _config(path: str) -> dict[str, object]:
    with open(path, "rb") as file:
        content = file.read(_MAX_CONFIG + 1)
    if len(content) > _MAX_CONFIG:
        raise FileError(f"{CONFIG} has more than {_MAX_CONFIG} bytes")
    try:
        return strict_json(content.decode(), CONFIG)
    except UnicodeDecodeError as error:
        raise FileError(f"{CONFIG} is not UTF-8: {error}") from error


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
    found = []
    for path in sorted(modules, key=natural):
        kind = kind_of(path, modules[path])
        if kind != settings.kind:
            raise FileError(f"{shown(path)} has tensors of {kind}, and {CONFIG} says {settings.kind}")
        update, shape = update_of(path, modules[path], functools.partial(settings.scale, path), peft=True)
        target = target_of(path, shape, base, settings.transposed and len(shape) == 2, settings.kind == "lora")
        found.append(Found(target, update))
    file, notes = joined(found, widest(dtypes), kept, bits, settings.model)
    return sourced(f"peft-{settings.kind}", file, found, notes)


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
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32), "bfloat16"
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileError(f"{shown(name)} holds NaN or infinity")
    return array.astype(raw_dtype(tag).newbyteorder("="), copy=False), ""

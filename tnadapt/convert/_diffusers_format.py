"""The format of diffusers: PEFT's tensors of LoRA in one safetensors file, under the name of the component."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.checkpoints.container import DTYPES, Container
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.roles import natural

from ._base_model import Base, target_of
from ._diffusion_component import COMPONENTS, PREFIXES, chosen_part, other_path, stored_path, written_component
from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter
from ._files import RECORD, StoredFiles, foreign_tensor_names, json_text, safetensors_content
from ._peft_content import recorded
from ._peft_settings import PeftSettings, settings_of
from ._stored_tensors import decode, encode
from ._uniform import uniform
from ._unpack import Module, TargetUpdate
from ._updates import Float, common_dtype, widen

__all__ = ["DiffusersFormat"]

_NAME = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+)\.(lora_A\.weight|lora_B\.weight|alpha)")
_SUFFIXES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}

# Entry of a conversion's record: the paths of modules by those in the file, where they differ.
_RENAMED = "renamed"

# Entry of the metadata with the settings of PEFT by component.
_SETTINGS = "lora_adapter_metadata"


class DiffusersFormat(FileFormat):
    """Files saved by diffusers' ``save_lora_weights``."""

    library = "diffusers"
    kinds = ("lora",)
    parts_read = parts_written = (*COMPONENTS, *PREFIXES)
    _component = "unet"

    def detect(self, path: str) -> str | None:
        """Return the path if the names of the file's tensors begin with a component of a pipeline."""
        names = None if os.path.isdir(path) else foreign_tensor_names(path)
        return path if any(map(_NAME.fullmatch, names or ())) else None

    def choose_part(self, modules: Sequence[Module], part: str | None, source: str) -> None:
        """Choose the component, such as "text_encoder_2"."""
        self._component = written_component(self.name, part, source, [module.path for module in modules])

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read the adapter of a file; ``part`` is one of its components, such as "unet"."""
        with files.container() as container:
            return _read(container, base, part)

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for weights stored as (in, out), and for kernels with more than three axes."""
        axes = len(module.stored) - 2
        if module.transposed or axes > 3:
            what = f"has a kernel of {axes} dimensions" if axes > 3 else "is stored as (in, out)"
            raise ConfigError(f"{safe_repr(module.path)} {what}, and diffusers supports no such layer")

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors.

        Without the metadata of an adapter, diffusers takes α = r. The scale is therefore multiplied into a factor.
        Older releases take the first rank for all modules: all factors have one.
        """
        tensors, renamed = dict[str, Float](), dict[str, str]()
        for module, update in zip(modules, uniform(choice.updates), strict=True):
            own = encode(update, module.stored, "lora_A.weight", "lora_B.weight")
            path = stored_path(self._component, module.path)
            tensors |= {f"{self._component}.{path}.{name}": array for name, array in own.items()}
            renamed |= {path: module.path} if path != module.path else {}
        return EncodedAdapter(tensors, record={_RENAMED: renamed} if renamed else {})

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        """Serialize the file."""
        return {"": safetensors_content(tensors, dtypes, {RECORD: json_text(record), "format": "pt"})}


def _read(container: Container, base: Base | None, part: str | None) -> ForeignAdapter:
    """Read the adapter of an open file."""
    found = {name: _NAME.fullmatch(name) for name in container.entries}
    if unknown := [name for name, match in found.items() if match is None]:
        raise FileError(f"has tensors that do not belong to a LoRA of diffusers: {summarize(unknown)}")
    chosen = chosen_part(list(dict.fromkeys(match[1] for match in found.values() if match)), part)
    modules: dict[str, dict[str, Float]] = {}
    dtypes = set[str]()
    for name, match in found.items():
        if match and match[1] == chosen:
            path, suffix, dtype = match[2], match[3], container.entries[name].dtype
            modules.setdefault(path, {})[_SUFFIXES.get(suffix, suffix)] = widen(name, dtype, container.array(name))
            dtypes |= {DTYPES[dtype]} if suffix != "alpha" else set()
    settings, renamed = _settings(container.metadata, chosen), recorded(container.metadata, _RENAMED, str)
    updates = []
    for path in sorted(modules, key=natural):
        tensors = modules[path]
        alpha = tensors.pop("alpha", None)
        update, shape = decode(path, tensors, functools.partial(_scale, path, alpha, settings))
        own = _path(path, base, renamed)
        updates.append(TargetUpdate(target_of(own, shape, base), update))
    return ForeignAdapter("lora", updates, common_dtype(dtypes), part=chosen)


def _path(path: str, base: Base | None, renamed: Mapping[str, str]) -> str:
    """Return the path of a module in the base, or else in the adapter that was converted."""
    own = other_path(path)
    if base is None:
        return own if renamed.get(path) == own else path
    return own if own in base.shapes and path not in base.shapes else path


def _settings(metadata: Mapping[str, str], component: str) -> PeftSettings | None:
    """Return the settings that diffusers saved for a component, or None if it saved none."""
    if _SETTINGS not in metadata:
        return None
    try:
        stored = json.loads(metadata[_SETTINGS])
        own = {name.removeprefix(f"{component}."): value for name, value in stored.items()
               if name.startswith(f"{component}.")}  # fmt: skip
    except (ValueError, AttributeError, RecursionError):
        raise FileError(f"the entry {_SETTINGS} of its metadata is not a JSON object") from None
    return settings_of({**own, "peft_type": "LORA"}) if own else None


def _scale(path: str, alpha: Float | None, settings: PeftSettings | None, rank: int | None) -> float:
    if alpha is not None and rank:
        if alpha.size != 1:
            raise FileError(f"alpha of {safe_repr(path)} must be one number; it has the shape {alpha.shape}")
        return float(alpha.reshape(())) / rank
    return 1.0 if settings is None else settings.scale(path, rank)

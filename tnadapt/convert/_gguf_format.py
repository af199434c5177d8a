"""The format of llama.cpp: LoRA in a GGUF file, for ``--lora``.

Names are those of llama.cpp's tensors, with ``.lora_a`` and ``.lora_b``. Where llama.cpp permutes the rows of a weight,
the rows of its ``lora_b`` are permuted as well.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.roles import natural

from ._base_model import Base, target_of
from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter
from ._files import RECORD, StoredFiles, json_text
from ._gguf_base import GgufBase, base_of_gguf, gguf_package, is_gguf
from ._stored_tensors import decode
from ._uniform import uniform
from ._unpack import Module, TargetUpdate
from ._updates import Float, alpha_of, common_dtype

__all__ = ["GgufFormat"]

# Entry of a conversion's record: path, shape, transposed and permuted heads by llama.cpp's names.
_MODULES = "modules"

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufFormat(FileFormat):
    """Adapters of llama.cpp; those that this library wrote can be read."""

    library = "llama.cpp"
    kinds = ("lora",)
    _given: Any = None

    def detect(self, path: str) -> str | None:
        """Return the path of a GGUF file."""
        return path if is_gguf(path) else None

    def configure(self, base: Any) -> Any:
        """Take the base model; a GGUF file says nothing of the source."""
        self._given = base
        return None if is_gguf(base) else base

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read the adapter of a file that this library wrote; ``part`` does not apply."""
        with files.open() as stream, tempfile.TemporaryDirectory() as folder:
            place = os.path.join(folder, "adapter.gguf")
            with open(place, "wb") as copy:
                copy.write(stream.read())
            return _read(place, base)

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for convolutions; llama.cpp stores all matrices as (out, in)."""
        if len(module.stored) != 2:
            raise ConfigError(f"{safe_repr(module.path)} is a convolution, and llama.cpp has no LoRA of convolutions")

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors; the file has one α, and each tensor is scaled by α / rank."""
        base, updates = base_of_gguf(self._given), choice.updates
        alpha = alpha_of([update.scale for update in updates], updates[0].rank)
        if alpha is None or len(set(choice.ranks)) > 1 or float(np.float32(alpha)) != alpha:
            updates = uniform(updates)
            alpha = float(updates[0].rank)
        tensors, listed = dict[str, Float](), dict[str, Any]()
        for module, update in zip(modules, updates, strict=True):
            name = base.tensor_of(module.path, module.shape)
            if name in listed:
                raise ConfigError(f"{safe_repr(module.path)} and {safe_repr(listed[name][0])} are both {name}")
            heads = _checked_heads(base, name, module)
            listed[name] = [module.path, list(module.stored), module.transposed, heads]
            tensors[f"{name}.lora_a"] = update.pair.a.T
            tensors[f"{name}.lora_b"] = _interleaved(update.pair.b, heads)
        config = {"general.architecture": base.architecture, "adapter.lora.alpha": alpha}
        return EncodedAdapter(tensors, config=config, record={_MODULES: listed})

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        """Serialize the file."""
        assert config is not None  # of encode
        gguf = gguf_package()
        with tempfile.TemporaryDirectory() as folder:
            place = os.path.join(folder, "adapter.gguf")
            writer = gguf.GGUFWriter(place, config["general.architecture"])
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["adapter.lora.alpha"])
            writer.add_string(RECORD, json_text(record))
            for name, array in tensors.items():
                if array.dtype == np.float64:
                    raise ConfigError("llama.cpp does not compute in float64: give dtype='float32' (--dtype float32)")
                if dtypes.get(name) == "bfloat16":
                    kind = gguf.GGMLQuantizationType.BF16
                    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
                else:
                    writer.add_tensor(name, np.ascontiguousarray(array))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with open(place, "rb") as file:
                return {"": file.read()}


def _checked_heads(base: GgufBase, name: str, module: Module) -> int | None:
    heads = base.heads_of(name)
    if heads is not None and module.shape[0] % (2 * heads):
        raise ConfigError(
            f"{safe_repr(module.path)} has {module.shape[0]} rows, which are not {heads} heads of two halves: is base "
            "the model that the adapter was made for?"
        )
    return heads


def _interleaved(b: Float, heads: int | None) -> Float:
    """Return rows in the order of llama.cpp, which interleaves the two halves of each head."""
    return b if heads is None else b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _in_halves(b: Float, heads: int | None) -> Float:
    """Undo :func:`_interleaved`."""
    return b if heads is None else b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _read(path: str, base: Base | None) -> ForeignAdapter:
    """Read the adapter of a file."""
    fields, tensors, dtypes = _stored(path)
    if (fields.get("general.type"), fields.get("adapter.type")) != ("adapter", "lora"):
        raise FileError(f"is a GGUF file of the type {safe_repr(fields.get('general.type'))}, and no LoRA adapter")
    alpha = fields.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise FileError(f"its adapter.lora.alpha must be a finite number; it is {safe_repr(alpha)}")
    listed = _recorded(fields.get(RECORD))
    expected = {f"{name}.lora_{which}" for name in listed for which in "ab"}
    if wrong := expected ^ tensors.keys():
        raise FileError(f"its tensors are not those of its record: {summarize(wrong)}")
    updates = []
    for name, (module, stored, transposed, heads) in sorted(listed.items(), key=lambda item: natural(item[1][0])):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if a.ndim != 2 or b.ndim != 2 or not a.size or not b.size:
            raise FileError(f"the factors of {safe_repr(name)} must be matrices; they are {a.shape} and {b.shape}")
        if heads is not None and (heads < 1 or b.shape[0] % (2 * heads)):
            raise FileError(f"{safe_repr(name)} has {b.shape[0]} rows, which are not those of {heads} heads in halves")
        own = {"lora_down": a, "lora_up": _in_halves(b, heads)}

        def scale(rank: int | None) -> float:
            assert rank is not None  # of LoRA
            return alpha / rank or 1.0

        update, shape = decode(module, own, scale)
        if shape != (tuple(stored)[::-1] if transposed else tuple(stored)):
            raise FileError(f"{safe_repr(name)} has the shape {shape}, and its record says {tuple(stored)}")
        updates.append(TargetUpdate(target_of(module, shape, base, transposed), update))
    return ForeignAdapter("lora", updates, common_dtype(set(dtypes.values())))


def _stored(path: str) -> tuple[dict[str, Any], dict[str, Float], dict[str, str]]:
    """Return the fields, the tensors and their dtypes of a GGUF file."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        with np.errstate(invalid="ignore"):  # a signaling NaN, which the cast makes quiet
            wide = {
                tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
                for tensor in reader.tensors
                if kinds[tensor.name] in _DTYPES
            }
    except Exception as error:  # whatever a damaged file makes the package raise
        raise FileError(f"is not a valid GGUF file: {type(error).__name__}: {str(error)[:200]}") from None
    if other := [name for name, kind in kinds.items() if kind not in _DTYPES]:
        raise FileError(f"{safe_repr(other[0])} is {kinds[other[0]]}; only {', '.join(_DTYPES)} can be converted")
    return fields, wide, {name: _DTYPES[kind] for name, kind in kinds.items()}


def _recorded(text: Any) -> dict[str, tuple[str, list[int], bool, int | None]]:
    """Return the modules by llama.cpp's names, from the record of a conversion."""
    try:
        found = {name: tuple(entry) for name, entry in json.loads(text)[_MODULES].items()}
        well = all(
            len(one) == 4 and isinstance(one[0], str) and len(one[1]) == 2 and isinstance(one[2], bool)
            and (one[3] is None or (isinstance(one[3], int) and one[3] > 0))
            for one in found.values()
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        well = False
    if not well or not found:
        raise FileError(
            "is an adapter of llama.cpp that does not say the model's own names and heads, as those do that this "
            "library wrote; convert the adapter of PEFT from which it was made"
        )
    return found

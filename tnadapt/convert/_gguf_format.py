"""The format of llama.cpp: LoRA in a GGUF file, for ``--lora``.

Names are those of llama.cpp's tensors, with ``.lora_a`` and ``.lora_b``. Where llama.cpp permutes the rows of a weight,
the rows of its ``lora_b`` are permuted as well.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.argument_checks import integer
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.roles import natural

from ._base_model import Base, target_of
from ._file_format import MERGE, EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter, Json
from ._files import RECORD, Arrays, StoredFiles, decode, json_text, recorded
from ._updates import Float, Module, TargetUpdate, alpha_of, common_dtype, uniform

# -- The base model: its architecture in llama.cpp, names of tensors, and permuted rows --------------------------------


# The architecture by the model_type of a config.json. Only architectures are listed whose matrices llama.cpp stores as
# the model does, but for the permutation below.
_ARCHITECTURES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "gpt2": "gpt2", "granite": "granite",
    "llama": "llama", "mistral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip

# Where llama.cpp interleaves the two halves of each head of queries and keys, for its rotary embedding.
_PERMUTED = {"granite", "llama"}

_FIELDS = ("general.architecture", ".block_count", ".attention.head_count", ".attention.head_count_kv")
# The largest number of blocks or heads that a file may state.
_MOST = (1 << 31) - 1
_BLOCKS, _HEADS, _KV_HEADS = ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), "num_key_value_heads"


class GgufBase(NamedTuple):
    """What a GGUF adapter depends on.

    Attributes
    ----------
    architecture : str
        llama.cpp's name of it.
    blocks, heads, kv_heads : int
    shapes : mapping of str to tuple of int, or None
        Shapes ``(out, in)`` of the base's tensors by llama.cpp's names; None if they are not known.
    """

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] | None = None

    def tensor_of(self, path: str, stored: tuple[int, int]) -> str:
        """Return llama.cpp's name of a module's weight.

        Raises
        ------
        ConfigError
            If the architecture has no such weight, or llama.cpp has no LoRA for it; if the base's weight has another
            shape.
        """
        paths = (path, f"model.{path}", f"transformer.{path}")
        module = next((name for full in paths if (name := _tensor_name(self.architecture, full, self.blocks))), None)
        if module is None:
            raise ConfigError(
                f"llama.cpp's architecture {self.architecture!r} of {self.blocks} blocks has no weight for "
                f"{safe_repr(path)}: {MERGE}, and convert the model"
            )
        if not module.startswith("blk."):
            raise ConfigError(
                f"{safe_repr(path)} is {module} in llama.cpp, and only weights of its blocks are converted: {MERGE}, "
                "and convert the model"
            )
        tensor = f"{module}.weight"
        if self.shapes is not None and self.shapes.get(tensor) != stored:
            has = f"the shape {self.shapes[tensor]}" if tensor in self.shapes else "no such tensor"
            raise ConfigError(
                f"the adapter's update of {safe_repr(path)} has the shape {stored}, and {tensor} of base has {has}: "
                "this is another model"
            )
        return tensor

    def heads_of(self, tensor: str) -> int | None:
        """Return the number of heads whose halves are interleaved in the rows of a tensor, or None."""
        which = tensor.split(".")[-2]
        if self.architecture not in _PERMUTED or which not in ("attn_q", "attn_k"):
            return None
        return self.heads if which == "attn_q" else self.kv_heads


def _tensor_name(architecture: str, path: str, blocks: int) -> str | None:
    """Return llama.cpp's name of a module, or None if there is none among this number of blocks."""
    # gguf's table has an entry for each weight of each block. Here it is built for two blocks only, whatever number a
    # file claims: a number in a path is that of a block if replacing it by 0 and 1 gives the same weight of these two.
    names, parts = _tensor_names(architecture), path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and len(part) < 10 and str(int(part)) == part and int(part) < blocks:
            first, second = (
                names.get_name(".".join([*parts[:place], number, *parts[place + 1 :]])) or "" for number in "01"
            )
            if (first[:6], second[:6]) == ("blk.0.", "blk.1.") and first[6:] == second[6:]:
                return f"blk.{part}.{first[6:]}"
    name = names.get_name(path)
    return None if name is None or name.startswith("blk.") else str(name)


@functools.cache
def _tensor_names(architecture: str) -> Any:
    gguf = gguf_package()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, 2)


def gguf_package() -> Any:
    """Import gguf; raise ConfigError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"GGUF files need the package gguf: pip install 'tnadapt[gguf]' ({error})") from None
    return gguf


def is_gguf(path: Any) -> bool:
    """Return whether a path is that of a GGUF file."""
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def base_of_gguf(base: Any) -> GgufBase:
    """Return the base of a GGUF adapter from a GGUF model, or from the config.json of a model.

    Raises
    ------
    ConfigError
        If the base is neither, or llama.cpp stores this architecture in a way that is not known here.
    """
    if is_gguf(base):
        return _of_gguf(os.fspath(base))
    if not isinstance(base, (str, os.PathLike)):
        got = "" if base is None else f"; got {safe_repr(base)}"
        raise ConfigError(
            "gguf-lora needs the model's architecture and heads: give base= (--base), a folder of the base model "
            f"with its config.json, or the GGUF file that llama.cpp serves{got}"
        )
    config = open_checkpoint(base).config
    if not config:
        raise ConfigError(f"{os.fspath(base)} has no config.json next to it, which says the model's architecture")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise _unknown("model_type", model_type, sorted(_ARCHITECTURES))
    blocks, heads = (_number(config, names) for names in (_BLOCKS, _HEADS))
    kv_heads = heads if config.get(_KV_HEADS) is None else _number(config, (_KV_HEADS,))
    return GgufBase(_ARCHITECTURES[model_type], blocks, heads, kv_heads)


def _of_gguf(path: str) -> GgufBase:
    with _valid(f"{path} "):
        reader = gguf_package().GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name.endswith(_FIELDS)}
        shapes = {tensor.name: tuple(map(int, tensor.shape))[::-1] for tensor in reader.tensors}
    architecture = str(fields.get("general.architecture"))
    if architecture not in _ARCHITECTURES.values():
        raise _unknown("general.architecture", architecture, sorted(set(_ARCHITECTURES.values())))

    def number(name: str, default: int | None = None) -> int:
        full = f"{architecture}.{name}"
        return integer(f"{full} of {path}", fields.get(full, default), 1, _MOST, FileError)

    heads = number("attention.head_count")
    return GgufBase(architecture, number("block_count"), heads, number("attention.head_count_kv", heads), shapes)


@contextlib.contextmanager
def _valid(what: str = "") -> Iterator[None]:
    """Turn any error that a damaged file causes in the gguf package into a FileError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise FileError(f"{what}is not a valid GGUF file: {type(error).__name__}: {str(error)[:200]}") from None


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        raise ConfigError(f"config.json of the base has no number {' or '.join(names)}")
    return integer(f"{name} in the base's config.json", config[name], 1, _MOST, ConfigError)


def _unknown(what: str, kind: Any, known: list[str]) -> ConfigError:
    return ConfigError(
        f"{what} of the base is {safe_repr(kind)}, and how llama.cpp stores its weights is known for "
        f"{', '.join(known)} only: {MERGE}, and convert the model with llama.cpp's own script"
    )


# -- The format --------------------------------------------------------------------------------------------------------


# Entry of a conversion's record: path, shape, transposed and permuted heads by llama.cpp's names.
_MODULES = "modules"

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufFormat(FileFormat):
    """Adapters of llama.cpp; those that this library wrote can be read."""

    library = "llama.cpp"
    kinds = transposed = ("lora",)
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
            heads = base.heads_of(name)
            if heads is not None and module.shape[0] % (2 * heads):
                raise ConfigError(
                    f"{safe_repr(module.path)} has {module.shape[0]} rows, which are not {heads} heads of two halves: "
                    "is base the model that the adapter was made for?"
                )
            listed[name] = [module.path, list(module.stored), module.transposed, heads]
            tensors[f"{name}.lora_a"] = update.pair.a.T
            tensors[f"{name}.lora_b"] = _interleaved(update.pair.b, heads)
        config = {"general.architecture": base.architecture, "adapter.lora.alpha": alpha}
        return EncodedAdapter(tensors, config=config, record={_MODULES: listed})

    def write(self, tensors: Arrays, dtypes: Mapping[str, str], record: Json, config: Json | None) -> dict[str, bytes]:
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
                    ggml_type = gguf.GGMLQuantizationType.BF16
                    writer.add_tensor(name, gguf.quants.quantize(array, ggml_type), raw_dtype=ggml_type)
                else:
                    writer.add_tensor(name, np.ascontiguousarray(array))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with open(place, "rb") as file:
                return {"": file.read()}


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
        update, shape, rank = decode(module, {"lora_down": a, "lora_up": _in_halves(b, heads)})
        assert rank is not None  # of LoRA
        update = update._replace(scale=alpha / rank or 1.0)
        if shape != (tuple(stored)[::-1] if transposed else tuple(stored)):
            raise FileError(f"{safe_repr(name)} has the shape {shape}, and its record says {tuple(stored)}")
        updates.append(TargetUpdate(target_of(module, shape, base, transposed), update))
    return ForeignAdapter("lora", updates, common_dtype(set(dtypes.values())))


def _stored(path: str) -> tuple[dict[str, Any], dict[str, Float], dict[str, str]]:
    """Return the fields of a GGUF file, its tensors and their dtypes."""
    gguf = gguf_package()
    with _valid(), np.errstate(invalid="ignore"):  # a signaling NaN, which the cast makes quiet
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        wide = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
            if kinds[tensor.name] in _DTYPES
        }
    if other := [name for name, ggml_type in kinds.items() if ggml_type not in _DTYPES]:
        raise FileError(f"{safe_repr(other[0])} is {kinds[other[0]]}; only {', '.join(_DTYPES)} can be converted")
    return fields, wide, {name: _DTYPES[ggml_type] for name, ggml_type in kinds.items()}


def _recorded(text: Any) -> dict[str, tuple[str, list[int], bool, int | None]]:
    """Return the modules by llama.cpp's names, from the record of a conversion."""
    listed = recorded({RECORD: text if isinstance(text, str) else ""}, _MODULES, list)
    modules = {name: tuple(entry) for name, entry in listed.items()}
    try:
        well = all(
            isinstance(module, str) and len(stored) == 2 and isinstance(transposed, bool)
            and (heads is None or (isinstance(heads, int) and heads > 0))
            for module, stored, transposed, heads in modules.values()
        )  # fmt: skip
    except (ValueError, TypeError):
        well = False
    if not well or not modules:
        raise FileError(
            "is an adapter of llama.cpp that does not say the model's own names and heads, as those do that this "
            "library wrote; convert the adapter of PEFT from which it was made"
        )
    return modules

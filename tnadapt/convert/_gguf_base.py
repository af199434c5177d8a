"""The base model of a GGUF adapter: its architecture in llama.cpp, names of tensors, and rows that are permuted."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.errors import ConfigError, FileError, integer, safe_repr

__all__ = ["GgufBase", "base_of_gguf", "gguf_package", "is_gguf"]

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
        found = next((name for one in paths if (name := _tensor_name(self.architecture, one, self.blocks))), None)
        if found is None:
            raise ConfigError(
                f"llama.cpp's architecture {self.architecture!r} of {self.blocks} blocks has no weight for "
                f"{safe_repr(path)}: merge the adapter into the base with tnadapt.merge (tnadapt merge), and convert "
                "the model"
            )
        if not found.startswith("blk."):
            raise ConfigError(
                f"{safe_repr(path)} is {found} in llama.cpp, and only weights of its blocks are converted: merge the "
                "adapter into the base with tnadapt.merge (tnadapt merge), and convert the model"
            )
        own = f"{found}.weight"
        if self.shapes is not None and self.shapes.get(own) != stored:
            has = f"the shape {self.shapes[own]}" if own in self.shapes else "no such tensor"
            raise ConfigError(
                f"the adapter's update of {safe_repr(path)} has the shape {stored}, and {own} of base has {has}: this "
                "is another model"
            )
        return own

    def heads_of(self, tensor: str) -> int | None:
        """Return the number of heads whose halves are interleaved in the rows of a tensor, or None."""
        which = tensor.split(".")[-2]
        if self.architecture not in _PERMUTED or which not in ("attn_q", "attn_k"):
            return None
        return self.heads if which == "attn_q" else self.kv_heads


def _tensor_name(architecture: str, path: str, blocks: int) -> str | None:
    """Return llama.cpp's name of a module; None if there is none among this number of blocks.

    gguf's table has an entry for each weight of each block. Here it is made for two blocks only, whatever number a file
    claims: a number in a path is that of a block if 0 and 1 in its place give the same weight of blocks 0 and 1.
    """
    names, parts = _tensor_names(architecture), path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and len(part) < 10 and str(int(part)) == part and int(part) < blocks:
            first, second = (
                names.get_name(".".join([*parts[:place], number, *parts[place + 1 :]])) or "" for number in "01"
            )
            if (first[:6], second[:6]) == ("blk.0.", "blk.1.") and first[6:] == second[6:]:
                return f"blk.{part}.{first[6:]}"
    found = names.get_name(path)
    return None if found is None or found.startswith("blk.") else str(found)


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
        given = "" if base is None else f"; got {safe_repr(base)}"
        raise ConfigError(
            "gguf-lora needs the model's architecture and heads: give base= (--base), a folder of the base model "
            f"with its config.json, or the GGUF file that llama.cpp serves{given}"
        )
    config = open_checkpoint(base).config
    if not config:
        raise ConfigError(f"{os.fspath(base)} has no config.json next to it, which says the model's architecture")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise _unknown("model_type", kind, sorted(_ARCHITECTURES))
    blocks, heads = (_number(config, names) for names in (_BLOCKS, _HEADS))
    kv_heads = heads if config.get(_KV_HEADS) is None else _number(config, (_KV_HEADS,))
    return GgufBase(_ARCHITECTURES[kind], blocks, heads, kv_heads)


def _of_gguf(path: str) -> GgufBase:
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name.endswith(_FIELDS)}
        shapes = {tensor.name: tuple(map(int, tensor.shape))[::-1] for tensor in reader.tensors}
    except Exception as error:  # whatever a damaged file makes the package raise
        raise FileError(f"{path} is not a valid GGUF file: {type(error).__name__}: {str(error)[:200]}") from None

    def field(name: str) -> Any:
        if name not in fields:
            raise FileError(f"{path} has no field {name}: is it a GGUF file of a model?")
        return fields[name]

    def number(name: str) -> int:
        return integer(f"{name} of {path}", field(name), 1, _MOST, FileError)

    architecture = field("general.architecture")
    if architecture not in _ARCHITECTURES.values():
        raise _unknown("general.architecture", architecture, sorted(set(_ARCHITECTURES.values())))
    heads, many = number(f"{architecture}.attention.head_count"), f"{architecture}.attention.head_count_kv"
    kv_heads = number(many) if many in fields else heads
    return GgufBase(architecture, number(f"{architecture}.block_count"), heads, kv_heads, shapes)


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        raise ConfigError(f"config.json of the base has no number {' or '.join(names)}")
    return integer(f"{name} in the base's config.json", config[name], 1, _MOST, ConfigError)


def _unknown(what: str, kind: Any, known: list[str]) -> ConfigError:
    return ConfigError(
        f"{what} of the base is {safe_repr(kind)}, and how llama.cpp stores its weights is known for "
        f"{', '.join(known)} only: merge the adapter into the base with tnadapt.merge (tnadapt merge), and convert the "
        "model with llama.cpp's own script"
    )

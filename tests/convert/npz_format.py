"""A file format of another package: ``.npz`` with two LoRA factors per module."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.convert import (
    Base,
    EncodedAdapter,
    ExportChoice,
    FileFormat,
    ForeignAdapter,
    Module,
    ModuleUpdate,
    Pair,
    StoredFiles,
    register_file_format,
)


class NpzFormat(FileFormat):
    """``PATH:up``, shape (rows, rank), and ``PATH:down``, shape (rank, cols)."""

    library = "the npz library"
    kinds = ("lora",)

    def detect(self, path: str) -> str | None:
        return path if path.endswith(".npz") else None

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        with files.open() as stream, np.load(stream, allow_pickle=False) as arrays:
            factors = {name: arrays[name] for name in arrays if name != "record"}
        updates = {}
        for path in sorted({name.rpartition(":")[0] for name in factors}):
            up, down = (factors[f"{path}:{half}"].astype(np.float64) for half in ("up", "down"))
            updates[path] = ModuleUpdate("lora", (up.shape[0], down.shape[1]), (Pair(up, down.T),))
        return ForeignAdapter.of("lora", updates, base, str(next(iter(factors.values())).dtype))

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        tensors = {}
        for module, update in zip(modules, choice.updates, strict=True):
            pair = update.absorb_scale().pair
            tensors |= {f"{module.path}:up": pair.b, f"{module.path}:down": pair.a.T}
        return EncodedAdapter(tensors)

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        stream = io.BytesIO()
        np.savez(stream, **tensors, record=np.array(json.dumps(record)))  # type: ignore[arg-type]
        return {"": stream.getvalue()}


def register() -> None:
    """Register it, as a plug-in does."""
    register_file_format("npz", NpzFormat)

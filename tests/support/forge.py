"""Write and read adapter files without the library, by the specification in ``tnadapt.checkpoints.adapter_format``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "<u1", "BOOL": "?"}

Tensors = Mapping[str, tuple[str, np.ndarray]]  # dtype as in the file, and the array that has its bytes


def write(path: Path, content: bytes) -> None:
    """A file written in its place: emptying it first costs some file systems milliseconds."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()


def compact(value: Any, escaped: bool = False) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=escaped)


def container(header: Any, data: bytes = b"", pad: bool = True) -> bytes:
    """A safetensors file of a header (JSON, or its text) and data."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else compact(header)).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return len(text).to_bytes(8, "little") + text + data


def listed(tensors: Tensors, order: Sequence[str] | None = None) -> tuple[dict[str, Any], bytes]:
    """The header's entries, and the data."""
    header, data = {}, b""
    for name in order or sorted(tensors):
        dtype, array = tensors[name]
        raw = np.asarray(array, NUMPY[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def seal(recipe: Mapping[str, Any], tensors: Tensors, escaped: bool = False) -> str:
    """The text of the entry ``tnadapt``, with the SHA-256 that the specification says."""
    blank = compact({**recipe, "sha256": "0" * 64}, escaped)
    total = hashlib.sha256(blank.encode() + b"\0")
    for name in sorted(tensors, key=str.encode):
        dtype, array = tensors[name]
        total.update(name.encode() + b"\0" + dtype.encode() + b"\0" + ",".join(map(str, array.shape)).encode() + b"\0")
        total.update(np.asarray(array, NUMPY[dtype]).tobytes())
    return compact({**recipe, "sha256": total.hexdigest()}, escaped)


def adapter(
    recipe: Mapping[str, Any], tensors: Tensors, order: Sequence[str] | None = None, escaped: bool = False
) -> bytes:
    """A whole adapter file whose SHA-256 is right."""
    header, data = listed(tensors, order)
    return container({"__metadata__": {"tnadapt": seal(recipe, tensors, escaped)}, **header}, data)


def row(numbers: bytes, name: bytes = b"") -> bytes:
    """A member's row in a population."""
    content = numbers + bytes(-len(numbers) % 8) + name
    return content + hashlib.sha256(content).digest()[:8]


def population(recipe: Mapping[str, Any], tensors: Tensors, rows: bytes, count: int, escaped: bool = False) -> bytes:
    """A file of these rows, behind the tensors that the members share, whose SHA-256 is right."""
    dtypes = ["F64", "F32", "BF16", "U8"]
    header, data = listed(tensors, sorted(tensors, key=lambda name: (dtypes.index(tensors[name][0]), name)))
    text = (
        f'{{"members":{{"dtype":"U8","shape":[{count:<20},{len(rows) // max(count, 1)}],'
        f'"data_offsets":[{len(data)},{len(data) + len(rows):<20}]}},'
    )
    others = {"__metadata__": {"tnadapt": seal(recipe, tensors, escaped)}, **header}
    # In the order of the tensors, which compact() would sort by name.
    return container(text + json.dumps(others, separators=(",", ":"), ensure_ascii=False)[1:], data + rows)


def parsed(content: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """What is in a file: the recipe without its SHA-256, which is checked, and the tensors."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["tnadapt"]
    recipe = json.loads(metadata["tnadapt"])
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[start:stop], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = (entry["dtype"], array)
    sha256 = recipe.pop("sha256")
    assert json.loads(seal(recipe, tensors))["sha256"] == sha256
    return recipe, tensors

"""Small synthetic checkpoints, written without the library, and adapters for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import tnadapt as tna
from tnadapt.checkpoints.fingerprint import fingerprint

from . import forge

TAGS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NUMPY = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

Tensors = dict[str, tuple[str, np.ndarray]]


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The bits nearest to float32 numbers, by their definition: half of the numbers' distance is what is added."""
    bits = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """float64 numbers in the form a file has them: rounded to float32, and then to the dtype."""
    if dtype == "float64":
        return array.astype("<f8")
    single = array.astype("<f4")
    return to_bfloat16(single) if dtype == "bfloat16" else single.astype(NUMPY[dtype])


def numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    return (from_bfloat16(array) if dtype == "bfloat16" else array).astype(np.float64)


def write(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    """A folder with a model: one file, or shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "made up"}')
    names = list(tensors)
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        write_file(folder / file, {name: tensors[name] for name in own})
        places |= dict.fromkeys(own, file)
    size = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def write_file(path: Path, tensors: Tensors) -> Path:
    header, data = forge.listed(tensors, list(tensors))
    path.write_bytes(forge.container({"__metadata__": {"format": "pt"}, **header}, data))
    return path


def read(path: Path) -> Tensors:
    """The tensors of a file, or of all files of a folder."""
    found: Tensors = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            array = np.frombuffer(content[start:stop], forge.NUMPY[entry["dtype"]]).reshape(entry["shape"])
            assert name not in found
            found[name] = entry["dtype"], array
    return found


def base(targets: Sequence[tna.Target], dtype: str = "float32", seed: int = 0) -> Tensors:
    """The targets' stored weights, and a few other tensors before, between and after them."""
    rng = np.random.default_rng(seed)
    found: Tensors = {"a.first": ("F32", rng.normal(size=(3, 2)).astype("<f4"))}
    for number, target in enumerate(targets):
        if target.name not in found:
            found[target.name] = TAGS[dtype], stored(rng.normal(size=target.stored), dtype)
            found[f"between.{number}"] = "I64", rng.integers(0, 99, number % 3).astype("<i8")
    found["z.last"] = "U8", rng.integers(0, 255, 7).astype("<u1")
    return found


def adapter(
    config: tna.Config,
    targets: Sequence[tna.Target],
    tensors: Tensors | None = None,
    dtype: str = "float32",
    seed: int = 1,
    kept: Mapping[str, np.ndarray] | None = None,
) -> tna.AdapterFile:
    """One that has been trained, on the weights of ``tensors`` if they are given."""
    plan = tna.UpdatePlan(config, [target.shape for target in targets], [target.layer for target in targets])
    base_print = None
    if tensors is not None:
        names = {tag: name for name, tag in TAGS.items()}
        stored_weights = [(target, *tensors[target.name]) for target in targets]
        plan = plan.with_base([target.select(numbers(array, names[tag])) for target, tag, array in stored_weights])
        base_print = fingerprint(
            [target.select(array) for target, _, array in stored_weights], names[stored_weights[0][1]]
        )
    rng = np.random.default_rng(seed)
    arrays, dtypes = {}, {}
    for name, start in plan.init().items():
        moved = start + 0.3 * rng.normal(size=start.shape).astype(np.float32)
        if dtype == "bfloat16":
            arrays[name], dtypes[name] = from_bfloat16(to_bfloat16(moved)), "bfloat16"
        else:
            arrays[name] = moved.astype(dtype)
    return tna.AdapterFile(config, targets, arrays, dtypes=dtypes, base=base_print, kept=kept or {}, given=plan.given)


def changed(file: tna.AdapterFile, index: int, weight: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """W' by its definition, in float64; a norm is rounded to float32 and to the dtype of the magnitude."""
    config = file.config
    if config.apply == "hadamard":
        return weight + weight * delta
    found = weight + delta
    if config.apply == "magnitude":
        magnitude = file.arrays[f"weight{index}.magnitude"]
        for row, length in zip(found if config.magnitude_axis == "rows" else found.T, magnitude, strict=True):
            norm = np.float64(math.hypot(*row.tolist()))
            row *= np.float64(length) / np.float64(norm.astype(magnitude.dtype))
    return found


def merged(
    tensors: Tensors,
    targets: Sequence[tna.Target],
    deltas: Sequence[np.ndarray],
    dtype: str,
    file: tna.AdapterFile | None = None,
) -> Tensors:
    """What should come out, by the definition: the numbers, changed by the update in float64, rounded."""
    found = dict(tensors)
    for index, (target, delta) in enumerate(zip(targets, deltas, strict=True)):
        tag, array = found[target.name]
        wide = numbers(array, dtype)
        rows_of = target.select(wide)
        new = rows_of + delta if file is None else changed(file, index, rows_of, delta)
        target.block(wide)[...] = target.like_block(new)
        rows = np.zeros(target.stored, bool)
        target.block(rows)[...] = True
        found[target.name] = tag, np.where(rows, stored(wide, dtype), array)
    return found

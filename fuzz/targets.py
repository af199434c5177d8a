"""The functions that a fuzzer calls with bytes. Each returns, or raises an error that no user should see: a fault.

This module does not need a fuzzer: the tests call the targets with every entry of the corpus.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tests.support import forge
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.planning import model_targets

__all__ = ["TARGETS", "FaultError", "measured", "of_llama", "traced"]

SHAPES = [(6, 4), (5, 4), (6, 4)]
NAMES = ("a.q", "a.v", "b.q")
#: Memory allowed in addition to ten times the size of the input.
ALLOWED = 8 << 20


class FaultError(AssertionError):
    """Something happened that must not."""


def measured(target: Callable[[bytes], None], data: bytes) -> int:
    """Call a target and measure its memory, after a first call that imports modules.

    Returns
    -------
    int
        Peak memory in bytes.

    Raises
    ------
    FaultError
        If that is out of proportion to the input.
    """
    target(data)
    return traced(target, data)


def traced(target: Callable[[bytes], None], data: bytes) -> int:
    """Call a target that has been called before, and measure its memory as :func:`measured` does."""
    tracemalloc.start()
    try:
        target(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > ALLOWED + 10 * len(data):
        raise FaultError(f"{len(data)} bytes took {peak:,} bytes of memory")
    return peak


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Yield a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        yield Path(made)


def _read(path: Path) -> tna.AdapterFile | None:
    """Return the adapter in a file, or None if it is properly refused."""
    before = sorted(os.listdir(path.parent))
    try:
        found = tna.load(path)
    except tna.FileError as error:
        if not str(error).startswith(f"{path}: "):
            raise FaultError(f"the error does not begin with the path: {error}") from error
        return None
    finally:
        if sorted(os.listdir(path.parent)) != before:
            raise FaultError("reading wrote a file")
    if isinstance(found, tna.PopulationFile):
        try:
            found = found[len(found) - 1]
        except tna.FileError:
            return None
    # An adapter that was read must be usable.
    if found.num_parameters < 1 << 20 and sum(rows * cols for rows, cols in (t.shape for t in found.targets)) < 1 << 20:
        found.deltas()
    return found


def adapter(data: bytes) -> None:
    """Read bytes as an adapter file."""
    with _folder() as folder:
        path = folder / "adapter.safetensors"
        path.write_bytes(data)
        _read(path)


def tensor(data: bytes) -> None:
    """Read bytes as the file of a tensor."""
    with _folder() as folder:
        path = folder / "tensor.safetensors"
        path.write_bytes(data)
        try:
            result = tna.tensors.load(path)
        except tna.FileError as error:
            if not str(error).startswith(f"{path}: "):
                raise FaultError(f"the error does not begin with the path: {error}") from error
            return
        # A tensor that was read must be usable.
        if result.size < 1 << 16 and result.num_parameters < 1 << 12:
            with np.errstate(all="ignore"):
                result.to_tensor()


def recipe(data: bytes) -> None:
    """Read JSON as the recipe of an adapter file with valid tensors and SHA-256, to get past these checks."""
    value = _json(data)
    if not isinstance(value, dict):
        return
    plan = tna.UpdatePlan(tna.presets.lora(2), SHAPES)
    tensors = {name: ("F32", np.ones(shape, np.float32)) for name, shape in plan.param_shapes.items()}
    with _folder() as folder:
        path = folder / "adapter.safetensors"
        try:
            if "population" in value:
                ones = np.ones(plan.num_parameters, np.float32).tobytes()
                path.write_bytes(forge.population(value, {}, 2 * forge.row(ones), 2, escaped=True))
            else:
                path.write_bytes(forge.adapter(value, tensors, escaped=True))
        except (ValueError, RecursionError):  # a number or depth that JSON cannot represent
            return
        _read(path)


def config(data: bytes) -> None:
    """Read JSON as the fields of a Config, then plan and compute with it."""
    value = _json(data)
    if not isinstance(value, dict):
        return
    try:
        found = tna.Config.from_dict(value)
    except tna.ConfigError:
        return
    if tna.Config.from_dict(json.loads(json.dumps(found.to_dict()))) != found:
        raise FaultError("a config is not what its JSON gives")
    try:
        plan = tna.UpdatePlan(found, SHAPES, layers=["a", "a", "b"])
    except tna.TnadaptError:
        return
    if plan.num_parameters < 1 << 16:
        with contextlib.suppress(tna.TnadaptError):  # an initial value outside the range of floats
            if any(delta.any() for delta in plan.deltas(plan.init())):
                raise FaultError("a fresh adapter is not zero")


def peers(data: bytes) -> None:
    """Read bytes as the settings and, after two zero bytes, the tensors of an adapter of PEFT, or of LyCORIS."""
    settings, _, tensors = data.partition(b"\0\0")
    with _folder() as folder:
        (folder / "adapter_config.json").write_bytes(settings)
        (folder / "adapter_model.safetensors").write_bytes(tensors)
        lone = folder / "lone.safetensors"
        lone.write_bytes(tensors)
        for source in (folder, lone):
            for base in (list(NAMES), dict.fromkeys(NAMES, (6, 4))):
                with contextlib.suppress(tna.TnadaptError):
                    tna.convert(source, base=base)


def checkpoint(data: bytes) -> None:
    """Read bytes as the index of a checkpoint with one valid shard."""
    with _folder() as folder:
        shard = forge.container(*forge.listed({"a.q.weight": ("F32", np.ones((6, 4), np.float32))}))
        (folder / "model-00001-of-00001.safetensors").write_bytes(shard)
        (folder / "model.safetensors.index.json").write_bytes(data)
        with contextlib.suppress(tna.FileError):
            open_checkpoint(folder)


def gguf(data: bytes) -> None:
    """Read bytes as an adapter of llama.cpp, and as the model in GGUF that one is made for."""
    with _folder() as folder:
        path = folder / "model.gguf"
        path.write_bytes(data)
        with contextlib.suppress(tna.TnadaptError):
            tna.convert(path)
        with contextlib.suppress(tna.TnadaptError):
            tna.convert(of_llama(), to="gguf-lora", base=path)


def model(data: bytes) -> None:
    """Read bytes as the config.json of a model and, after two zero bytes, the shapes of its tensors by name."""
    settings, _, listed = data.partition(b"\0\0")
    shapes = _json(listed)
    with _folder() as folder:
        (folder / "config.json").write_bytes(settings)
        tensors = {
            name: ("F32", np.ones(shape, np.float32))
            for name, shape in (shapes.items() if isinstance(shapes, dict) else ())
            if isinstance(shape, list) and len(shape) <= 4 and all(type(one) is int and 0 < one < 99 for one in shape)
        }
        header = forge.listed({name: one for name, one in tensors.items() if one[1].size < 1 << 12})
        with contextlib.suppress(UnicodeEncodeError):
            (folder / "model.safetensors").write_bytes(forge.container(*header))
        for targets in ("qkvo", "all-linear", "embeddings", [".*proj"]):
            with contextlib.suppress(tna.TnadaptError):
                model_targets(folder, targets)
        with contextlib.suppress(tna.TnadaptError):
            tna.convert(of_llama(), to="gguf-lora", base=folder)


def table(data: bytes) -> None:
    """Read bytes as a table of samples whose suffix the first byte selects, find its task and write it as CSV."""
    from tnadapt.cli._predict_command import _written
    from tnadapt.finetune._prediction import prediction_rows
    from tnadapt.finetune.data import TABLES, labelled_texts, read_table

    with _folder() as folder:
        path = folder / f"table{TABLES[data[0] % len(TABLES) if data else 0]}"
        path.write_bytes(data[1:])
        try:
            found = read_table(path)
        except tna.TnadaptError:
            return
        with contextlib.suppress(tna.TnadaptError):
            labelled_texts(found)
        rows = prediction_rows(found, [None] * len(found), [{"prediction": "=1"}] * len(found))
        for cell in csv.reader(io.StringIO(_written(rows, ".csv"), newline="")):
            if any(text[:1] in {"=", "@", "\t", "\r"} for text in cell):
                raise FaultError(f"{cell} has a formula")
        _written(rows, ".jsonl")


def tokenizer(data: bytes) -> None:
    """Read bytes as the tokenizer_config.json next to a tokenizer of words, and encode a text."""
    import tokenizers
    import transformers

    from tnadapt.finetune._inputs import tokenizer_of

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "good": 1, "film": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with _folder() as folder:
        words.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_bytes(data)
        (folder / "config.json").write_text('{"model_type": "bert"}')
        with contextlib.suppress(tna.TnadaptError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tokenizer_of(str(folder), transformers)
            found(["good film"], truncation=True, max_length=int(min(16, found.model_max_length)))


@functools.cache
def of_llama() -> tna.AdapterFile:
    """Return an adapter of one weight of a Llama."""
    plan = tna.UpdatePlan(tna.presets.lora(2), [(8, 4)])
    targets = [tna.Target("model.layers.1.self_attn.q_proj", (8, 4), "q", layer="model.layers.1.self_attn")]
    return tna.AdapterFile(tna.presets.lora(2), targets, plan.init())


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "adapter": adapter,
    "tensor": tensor,
    "recipe": recipe,
    "config": config,
    "peers": peers,
    "checkpoint": checkpoint,
    "gguf": gguf,
    "model": model,
    "table": table,
    "tokenizer": tokenizer,
}

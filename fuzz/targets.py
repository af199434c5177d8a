"""The functions that a fuzzer calls with bytes. Each returns, or raises an error that no user should see: a fault.

This module does not need a fuzzer: the tests call the targets with every entry of the corpus.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tests.support import forge
from tnadapt.checkpoints.checkpoint import open_checkpoint

__all__ = ["TARGETS", "FaultError", "measured"]

SHAPES = [(6, 4), (5, 4), (6, 4)]
NAMES = ("a.q", "a.v", "b.q")
#: Memory allowed in addition to forty times the size of the input.
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
    tracemalloc.start()
    try:
        target(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > ALLOWED + 40 * len(data):
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


def recipe(data: bytes) -> None:
    """Read JSON as the recipe of an adapter file with valid tensors and SHA-256, to get past these checks."""
    value = _json(data)
    if not isinstance(value, dict):
        return
    plan = tna.SuperLoRA(tna.presets.lora(2), SHAPES)
    tensors = {name: ("F32", np.ones(shape, np.float32)) for name, shape in plan.param_shapes.items()}
    with _folder() as folder:
        path = folder / "adapter.safetensors"
        try:
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
        plan = tna.SuperLoRA(found, SHAPES, layers=["a", "a", "b"])
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


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "adapter": adapter,
    "recipe": recipe,
    "config": config,
    "peers": peers,
    "checkpoint": checkpoint,
}

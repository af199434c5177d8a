"""What a fuzzer calls with bytes. Each returns, or raises what is a fault: any error that no user should see.

Nothing here needs a fuzzer: the tests call the targets with every entry of the corpus.
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
#: So much memory is allowed beside some forty times what was read.
ALLOWED = 8 << 20


class FaultError(AssertionError):
    """Something happened that must not."""


def measured(target: Callable[[bytes], None], data: bytes) -> int:
    """Call a target and see what it takes, after a first call in which modules are imported.

    Returns
    -------
    int
        Bytes of memory at the most.

    Raises
    ------
    FaultError
        If it is out of proportion to what was read.
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
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        yield Path(made)


def _read(path: Path) -> tna.AdapterFile | None:
    """The adapter in a file, or None where it is refused as it should be."""
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
    # What is read can be used.
    if found.num_parameters < 1 << 20 and sum(rows * cols for rows, cols in (t.shape for t in found.targets)) < 1 << 20:
        found.deltas()
    return found


def adapter(data: bytes) -> None:
    """Bytes as an adapter file."""
    with _folder() as folder:
        path = folder / "adapter.safetensors"
        path.write_bytes(data)
        _read(path)


def recipe(data: bytes) -> None:
    """JSON as the recipe of an adapter file whose tensors are good and whose SHA-256 is right: what is behind it."""
    value = _json(data)
    if not isinstance(value, dict):
        return
    plan = tna.SuperLoRA(tna.presets.lora(2), SHAPES)
    tensors = {name: ("F32", np.ones(shape, np.float32)) for name, shape in plan.param_shapes.items()}
    with _folder() as folder:
        path = folder / "adapter.safetensors"
        try:
            path.write_bytes(forge.adapter(value, tensors, escaped=True))
        except (ValueError, RecursionError):  # a number or depth that JSON cannot be written with
            return
        _read(path)


def config(data: bytes) -> None:
    """JSON as the fields of a Config, which is then planned and computed with."""
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
        with contextlib.suppress(tna.TnadaptError):  # a start beyond what floats hold
            if any(delta.any() for delta in plan.deltas(plan.init())):
                raise FaultError("a fresh adapter is not zero")


def peers(data: bytes) -> None:
    """Bytes as the tensors, and after a zero byte as the settings, of an adapter of PEFT; or of LyCORIS."""
    settings, _, tensors = data.partition(b"\0\0")
    with _folder() as folder:
        (folder / "adapter_config.json").write_bytes(settings)
        (folder / "adapter_model.safetensors").write_bytes(tensors)
        lone = folder / "lone.safetensors"
        lone.write_bytes(tensors)
        for source in (folder, lone):
            with contextlib.suppress(tna.TnadaptError):
                tna.convert(source, base=list(NAMES))


def checkpoint(data: bytes) -> None:
    """Bytes as the index of a checkpoint beside one good shard."""
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

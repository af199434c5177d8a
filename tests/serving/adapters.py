"""A small model on disk, and adapters for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import AdapterFile, Config, Target, UpdatePlan
from tnadapt.checkpoints.fingerprint import fingerprint

SHAPES = {
    f"model.layers.{layer}.self_attn.{name}_proj": (rows, 40)
    for layer in range(2)
    for name, rows in (("q", 48), ("v", 24))
}
TARGETS = [Target(path, shape, path[-6]) for path, shape in SHAPES.items()]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{path}.weight": rng.normal(size=shape).astype("f4") for path, shape in SHAPES.items()}


def saved_model(folder: Path, seed: int = 0) -> Path:
    """A folder with the weights of a model."""
    folder.mkdir(exist_ok=True)
    save_file(weights(seed), folder / "model.safetensors")
    return folder


def adapter(config: Config, seed: int = 0, base: int | None = None) -> AdapterFile:
    """An adapter with random numbers, with the fingerprint of a model of some seed."""
    plan = UpdatePlan(config, [target.shape for target in TARGETS], roles=[target.role for target in TARGETS])
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    known = None if base is None else fingerprint(list(weights(base).values()), "float32")
    return AdapterFile(config, TARGETS, arrays, base=known)


def tiny() -> AdapterFile:
    """TinyLoRA with 13 parameters, whose other arrays are the singular vectors of the base's weights."""
    return adapter(tna.presets.tinylora(13), base=0)


def complete(file: AdapterFile, seed: int = 0) -> AdapterFile:
    return file if file.complete else file.with_base(list(weights(seed).values()))

"""Where fuzzing begins: ``python -m fuzz.seeds`` writes good inputs of every kind into the corpus."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import tnadapt as tna
from tests import forge

from .__main__ import CORPUS
from .targets import NAMES, SHAPES

P = tna.presets
CONFIGS = {
    "lora": P.lora(2, alpha=8.0),
    "lokr": P.lokr(2),
    "loha": P.loha(2),
    "lonkr": P.lonkr(splits=3, groups=2),
    "lorta": P.lorta(2, order=3),
    "tt": tna.Config(rank=2, order=4, groups=1, fold="balanced", format="tt", splits=2, split_size=2, leading="same"),
    "partial": tna.Config(rank=(None, 2, 2), order=3, groups=1, fold=(5, 4, 4), format="tucker"),
    "explicit": tna.Config(rank=1, groups=[[0, 2], [1]], splits=2, terms=3),
    "linear": P.superlora(2, projection="linear", ratio=0.5, seed=7),
    "nonlinear": P.superlora(2, groups=2, projection="nonlinear_v2", ratio=0.7),
    "hadamard": tna.Config(rank=2, groups=1, fold="hypercube", splits=2, combine="hadamard"),
}
PEERS = {"lora": ("peft-lora", "lycoris-lora"), "lokr": ("peft-lokr", "lycoris-lokr"), "loha": ("peft-loha",)}
TARGETS = tuple(tna.Target(name, shape, name[-1]) for name, shape in zip(NAMES, SHAPES, strict=True))


def files() -> dict[str, tna.AdapterFile]:
    """An adapter of every config."""
    rng = np.random.default_rng(0)
    found = {}
    for name, config in CONFIGS.items():
        shapes = tna.SuperLoRA(config, SHAPES).param_shapes
        arrays = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        found[name] = tna.AdapterFile(config=config, targets=TARGETS, arrays=arrays)
    return found


def main() -> None:
    """Write them."""
    for name, file in files().items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            tna.save(path, file)
            content = path.read_bytes()
            _write("adapter", name, content)
            recipe, _ = forge.parsed(content)
            _write("recipe", name, forge.compact(recipe).encode())
            for to in PEERS.get(name, ()):
                tna.convert(path, to=to).save(Path(folder) / to)
                made = Path(folder) / to
                settings = (made / "adapter_config.json").read_bytes() if made.is_dir() else b""
                tensors = made / "adapter_model.safetensors" if made.is_dir() else made
                _write("peers", to, settings + b"\0\0" + tensors.read_bytes())
        _write("config", name, json.dumps(file.config.to_dict()).encode())
    index = {"metadata": {"total_size": 96}, "weight_map": {"a.q.weight": "model-00001-of-00001.safetensors"}}
    _write("checkpoint", "one", json.dumps(index).encode())


def _write(target: str, name: str, content: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()

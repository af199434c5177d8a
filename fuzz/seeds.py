"""Seeds of the corpus: ``python -m fuzz.seeds`` writes valid inputs of every kind into it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import tnadapt as tna
from tests.checkpoints.test_adapter_file import CONFIGS, made
from tests.support import forge

from .__main__ import CORPUS

SEEDS = {**CONFIGS, "hadamard": tna.Config(rank=2, groups=1, fold="hypercube", splits=2, combine="hadamard")}
PEERS = {"lora": ("peft-lora", "lycoris-lora"), "lokr": ("peft-lokr", "lycoris-lokr"), "loha": ("peft-loha",)}
# PEFT's methods with a structure of their own.
METHODS = {
    "peft-vera": tna.presets.vera(2),
    "peft-miss": tna.presets.miss(2),
    "peft-shira": tna.presets.shira(8),
    "peft-fourierft": tna.presets.fourierft(8).replace(projection=(tna.maps.TorchScatter(8), "dft2")),
}


# What a file records of its base model.
ABOUT = tna.Pretrained(
    "user/base", "0a1b", "q.gguf", task="text-classification", labels=["no", "yes"], dtype="float16",
    settings={"pad_token_id": 0}, inputs={"max_length": 16, "mean": [0.5]},
)  # fmt: skip


def main() -> None:
    """Write the seeds."""
    files = {name: made(config) for name, config in SEEDS.items()}
    files["described"] = dataclasses.replace(files["lora"], pretrained=ABOUT)
    for name, file in files.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            tna.save(path, file)
            content = path.read_bytes()
            _write("adapter", name, content)
            recipe, _ = forge.parsed(content)
            _write("recipe", name, forge.compact(recipe).encode())
            for to in PEERS.get(name, ()):
                tna.convert(path, to=to).save(Path(folder) / to)
                written = Path(folder) / to
                settings = (written / "adapter_config.json").read_bytes() if written.is_dir() else b""
                tensors = written / "adapter_model.safetensors" if written.is_dir() else written
                _write("peers", to, settings + b"\0\0" + tensors.read_bytes())
        _write("config", name, json.dumps(file.config.to_dict()).encode())
    for to, config in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / to
            tna.convert(made(config), written, to=to)
            settings = (written / "adapter_config.json").read_bytes()
            _write("peers", to, settings + b"\0\0" + (written / "adapter_model.safetensors").read_bytes())
    index = {"metadata": {"total_size": 96}, "weight_map": {"a.q.weight": "model-00001-of-00001.safetensors"}}
    _write("checkpoint", "one", json.dumps(index).encode())


def _write(target: str, name: str, content: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()

"""Text with terminal control sequences, in every place of a file that can hold text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tnadapt.targets.target import Rows, Target

from . import checkpoint_files as cp
from . import forge

#: Colours, a title, a new line that forges a row, DEL, C1, directions, what is not seen, separators, Rich's markup.
EVIL = (
    "\x1b[31mred\x1b]0;title\x07\r\nFORGED row\n\tFORGED\x08\x0b\x0c\x7f\x85\x9b31m\u202eesrever\u2066\u200b\u200d"
    "\ufeff"
    "\u2028FORGED\u2029FORGED[red]markup[/red][link=http://evil]x[/link]\ufe0f\u3164\U000e0041"
)


def speaks(text: str) -> list[str]:
    """The letters of an output that a terminal would act on, or that nobody would see; and lines that were forged."""
    found = [
        f"{ord(letter):04x}"
        for letter in text
        if letter != "\n"
        and (unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\ufe0f\u3164")
    ]
    return found + [line for line in text.split("\n") if line.startswith("FORGED")]


def named(folder: Path, name: str) -> Path:
    """A path whose last part is hostile as far as a file system lets it."""
    return folder / (name + EVIL.replace("/", "").replace("\0", "")[:60])


def adapter(path: Path, module: str, **recipe: Any) -> None:
    """An adapter file whose module, kept parameter, model and layer are hostile."""
    targets = [
        Target(f"{module}.q{EVIL}", (4, 6), "q", layer=EVIL),
        Target(f"{module}.{EVIL}", (6, 4), "v", parameter=f"in{EVIL}weight", rows=Rows(0, 2, 3, 2), layer=EVIL),
    ]
    arrays = tna.UpdatePlan(tna.Config(rank=1), [target.shape for target in targets]).init()
    whole = {
        "version": 1,
        "config": {"rank": 1, "groups": "weight"},
        "targets": [[*target.to_list()[:3], *_rest(target)] for target in targets],
        "model": EVIL,
        **recipe,
    }
    tensors = {name: ("F32", array.astype("f4")) for name, array in arrays.items()}
    tensors[f"kept.{EVIL}"] = ("F32", np.ones(2, np.float32))
    path.write_bytes(forge.adapter(whole, tensors))


def _rest(target: Target) -> list[Any]:
    rest = {key: value for key, value in (target.to_list()[3:] or [{}])[0].items() if key != "layer"}
    return [rest] if rest else []


def checkpoint(folder: Path, module: str) -> Path:
    """A model whose tensors, files, metadata and config are hostile; in shards."""
    tensors: cp.Tensors = {
        f"{module}.q{EVIL}.weight": ("F32", np.zeros((4, 6), np.float32)),
        f"{module}.{EVIL}.in{EVIL}weight": ("F32", np.zeros((6, 4), np.float32)),
        f"h.{EVIL}.attn.q_proj.weight": ("F32", np.zeros((4, 4), np.float32)),
        f"h.{EVIL}.attn.v_proj.weight": ("F32", np.zeros((4, 4), np.float32)),
    }
    cp.write(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": EVIL, "architectures": [EVIL]}))
    named(folder, "notes").write_text("x")
    named(folder, "old").with_suffix(".bin").write_text("x")
    return folder


def peft(folder: Path, **settings: Any) -> Path:
    """An adapter of PEFT whose modules and settings are hostile."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{EVIL}.q.lora_A.weight": ("F32", np.arange(12, dtype=np.float32).reshape(2, 6) % 5),
        f"base_model.model.{EVIL}.q.lora_B.weight": ("F32", np.arange(8, dtype=np.float32).reshape(4, 2)),
    }
    header, data = forge.listed(tensors)
    (folder / "adapter_model.safetensors").write_bytes(forge.container(header, data))
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [EVIL], "base_model_name_or_path": EVIL}
    (folder / "adapter_config.json").write_text(json.dumps(usual | settings))
    return folder

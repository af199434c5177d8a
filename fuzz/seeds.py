"""Seeds of the corpus: ``python -m fuzz.seeds`` writes valid inputs of every kind into it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import tnadapt as tna
from tests.checkpoints.test_adapter_file import CONFIGS, made
from tests.support import forge

from .__main__ import CORPUS
from .targets import of_llama

SEEDS = {**CONFIGS, "hadamard": tna.Config(rank=2, groups=1, fold="hypercube", splits=2, combine="hadamard")}
PEERS = {
    "lora": ("peft-lora", "lycoris-lora", "kohya-lora", "diffusers-lora"),
    "lokr": ("peft-lokr", "lycoris-lokr"),
    "loha": ("peft-loha",),
}
PARTS = {"kohya-lora": "lora_unet", "diffusers-lora": "unet"}
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
                tna.convert(path, to=to, part=PARTS.get(to)).save(Path(folder) / to)
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
    _write_ggufs()
    for name, (settings, shapes) in MODELS.items():
        _write("model", name, json.dumps(settings).encode() + b"\0\0" + json.dumps(shapes).encode())
    for name, content in TABLES.items():
        _write("table", name, content)
    for name, settings in TOKENIZERS.items():
        _write("tokenizer", name, json.dumps(settings).encode())
    cp = tna.tensors.random_cp((2, 3), 2)
    terms = [[np.ones((2, 1)), np.ones((1, 2))]] * 2
    for tensor in (
        cp,
        tna.tensors.TTTensor([np.ones((1, 2, 2)) + 1j, np.ones((2, 2, 1)) + 1j]),
        tna.tensors.TuckerTensor(np.ones((1, 2)), [np.ones((2, 1)), np.ones((2, 2))]).to(dtype="float32"),
        tna.tensors.KroneckerTensor(None, terms),
        tna.tensors.HadamardTensor([cp, tna.tensors.CPTensor(None, cp.factors)]),
        tna.tensors.Parafac2Tensor(None, [np.ones((2, 1)), np.ones((1, 1)), np.ones((3, 1))], [np.eye(2, 1)] * 2),
    ):
        with tempfile.TemporaryDirectory() as folder:
            tensor.save(Path(folder) / "tensor")
            _write("tensor", type(tensor).__name__, (Path(folder) / "tensor").read_bytes())


def _write_ggufs() -> None:
    """Write an adapter of llama.cpp, and a model for one."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(2)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_tensor("blk.1.attn_q.weight", np.ones((8, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _write("gguf", "model", path.read_bytes())
        tna.convert(of_llama(), Path(folder) / "adapter.gguf", to="gguf-lora", base=path)
        _write("gguf", "adapter", (Path(folder) / "adapter.gguf").read_bytes())


# Shapes of the tensors of models by their config.json.
_LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 4}
_FUSED = {"transformer.h.0.attn.c_attn.weight": [4, 12], "transformer.h.0.attn.c_proj.weight": [4, 4]}
MODELS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "llama": (
        {"model_type": "llama", **_LLAMA},
        {f"model.layers.{i}.self_attn.{x}_proj.weight": [8 if x in "qo" else 4, 4] for i in (0, 1) for x in "qkvo"},
    ),
    "gpt2": ({"model_type": "gpt2", "n_head": 2, "n_layer": 1, "n_embd": 4}, _FUSED),
    "phi3": (
        {"model_type": "phi3", **_LLAMA},
        {"layers.0.attn.qkv_proj.weight": [16, 4], "layers.0.attn.o_proj.weight": [4, 8]},
    ),
    "parts": (
        {"model_type": "clip", "text_config": {"num_attention_heads": 2}, "vision_config": {"num_attention_heads": 4}},
        {"vision.a.in_proj_weight": [24, 8], "text.attn.in_proj_weight": [12, 4], "text.attn.out_proj.weight": [4, 4]},
    ),
    "experts": (
        {"model_type": "mixtral", "hidden_size": 4},
        {"mlp.experts.gate_up_proj": [2, 4, 12], "mlp.experts.down_proj": [2, 6, 4], "moe.experts.0.w1.weight": [4, 8]},
    ),
}  # fmt: skip
# The first byte selects the suffix.
TABLES = {
    "csv": b'\0text,label,id\ngood,1,=a\n"bad, bad",0,-3\n',
    "tsv": b"\1sentence\tlabel\ngood\tpos\nbad\tneg\n",
    "jsonl": b'\2{"text": "good", "label": 1}\n{"text": "@bad", "label": 0}\n',
    "json": b'\3[{"tokens": ["a", "b"], "tags": [0, 1]}, {"tokens": ["c"], "tags": [1]}]',
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "plain": {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "eos_token": "film", "model_max_length": 32,
    },
    "bert": {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": "[PAD]", "cls_token": "[CLS]",
        "sep_token": "[SEP]", "added_tokens_decoder": {"0": {"content": "[UNK]", "special": True}},
        "padding_side": "left",
    },
    "rag": {"tokenizer_class": "RagTokenizer"},
}  # fmt: skip


def _write(target: str, name: str, content: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()

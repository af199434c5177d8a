"""A tiny Llama with adapters through PEFT, and a tokenizer of words for it."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import tokenizers
import torch
import transformers

import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tnadapt import Config, presets

WORDS = ["<pad>", "<end>", "<unknown>", *(f"w{number}" for number in range(40))]


def tokenizer() -> Any:
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unknown>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", padding_side="left"
    )


def llama() -> Any:
    # Ten times the usual deviation: what an adapter does then shows.
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a fast and silent trainer of TRL's on the CPU."""
    return {
        "output_dir": str(folder), "learning_rate": 0.02, "max_steps": 1, "per_device_train_batch_size": 2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "bf16": False, "dataloader_pin_memory": False, **changes,
    }  # fmt: skip


#: The settings that presets take, for this model's weights.
SIZES = {
    "weights": 4, "rows": 16, "cols": 16, "heads": 4, "layers": 2, "n": 40, "block": 4, "r": 2, "parameters": 13,
    "digits": (4, 2),
}  # fmt: skip


def sizes_of(preset: str) -> dict[str, Any]:
    takes = inspect.signature(getattr(presets, preset)).parameters
    return {name: size for name, size in SIZES.items() if name in takes}


def config_of(preset: str) -> Config:
    config: Config = getattr(presets, preset)(**sizes_of(preset))
    return config


def peft_config(preset: str, **more: Any) -> plugin.TnadaptConfig:
    return plugin.TnadaptConfig(task_type="CAUSAL_LM", preset=preset, settings=sizes_of(preset), **more)


def shifted(adapter: Any, size: float = 0.3) -> None:
    """Move an adapter, as training would have done."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, array in adapter.named_parameters():
            array.add_((size * torch.randn(array.shape, generator=generator)).to(array.dtype))


def through_peft(preset: str, dtype: torch.dtype = torch.float32, size: float = 0.3, **more: Any) -> Any:
    """Return a PEFT model with a trained adapter, in training mode."""
    model = peft.get_peft_model(llama().to(dtype), peft_config(preset, **more))
    shifted(tt.adapters(model)["default"], size)
    return model.train()

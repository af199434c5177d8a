"""Tiny stand-ins for the language models of PEFT's tests, of the same architectures, in a cache like the hub's.

The hub's models have other random numbers, which PEFT's tests do not depend on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": 1024, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
# PEFT's tests of LoRA's weighted sums assume that q and v have the same shape.
_ALIKE = {**_LLAMA, "num_key_value_heads": 4}
# Their limit on the change by a conversion to LoRA was set for small weights.
_SMALL = {**_LLAMA, "initializer_range": 0.02}
_BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 1024,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 1024, "initializer_range": 0.2}

_OPT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32, "vocab_size": 1024,
    "max_position_embeddings": 128, "word_embed_proj_dim": 16, "init_std": 0.2,
}  # fmt: skip
_T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1024,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 1024, "max_position_embeddings": 128, "init_std": 0.2,
}  # fmt: skip
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": "p2c|c2p"}

_PEFT, _TRL, _HF = (f"{owner}-internal-testing/tiny" for owner in ("peft", "trl", "hf"))
#: Name on the hub -> class of transformers, and its config's class and settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{_PEFT}-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    f"{_PEFT}-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    f"{_PEFT}-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    f"{_TRL}-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _ALIKE),
    f"{_PEFT}-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SMALL),
    f"{_HF}-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "head_dim": 4}),
    f"{_PEFT}-random-BertModel": ("BertModel", "BertConfig", _BERT),
    f"{_PEFT}-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    f"{_PEFT}-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DEBERTA),
    f"{_PEFT}-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _BERT),
    f"{_PEFT}-random-BertForSequenceClassification": ("BertForSequenceClassification", "BertConfig", _BERT),
    f"{_PEFT}-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    f"{_TRL}-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "pad_token_id": 0}
    ),
    f"{_PEFT}-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", "T5Config", _T5),
    f"{_PEFT}-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "BartConfig", _BART),
}  # fmt: skip


def make_models(home: Path) -> None:
    """Write all models to a folder to be used as ``HF_HOME``, unless they exist."""
    for name, (model, config, settings) in MODELS.items():
        place = home / "hub" / f"models--{name.replace('/', '--')}"
        if (place / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        revision = "0" * 40
        made.save_pretrained(place / "snapshots" / revision)
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(revision)
    _make_adapter(home)


def _make_adapter(home: Path) -> None:
    """The settings of a LoRA adapter, which the tests of configs read."""
    from peft import LoraConfig

    place = home / "hub" / "models--peft-internal-testing--tiny-opt-lora-revision"
    revision = "1" * 40
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]).save_pretrained(
        str(place / "snapshots" / revision)
    )
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "test").write_text(revision)

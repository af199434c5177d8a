"""Tiny transformers models from class names and configs, for comparing a model with its checkpoint.

It has every class in the table of fused layouts that transformers can build, and models whose weights transformers
saves under other names or in other pieces than in memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGE = {"image_size": 32, "patch_size": 8}
_GROUPED = {**WIDTH, **TEXT, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 40}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TEXT}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
_LEVIT = {
    "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2],
}  # fmt: skip

# The model's class, its config's, and the settings.
CONFIGURED: dict[str, tuple[str, str, dict[str, Any]]] = {
    # -- fused
    "deberta": ("DebertaModel", "DebertaConfig", {**WIDTH, "vocab_size": 40}),
    "bloom": ("BloomModel", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TEXT}),
    "gpt_neox": ("GPTNeoXModel", "GPTNeoXConfig", {**WIDTH, **TEXT}),
    "gpt_neox_japanese": ("GPTNeoXJapaneseModel", "GPTNeoXJapaneseConfig", {**WIDTH, **TEXT}),
    "persimmon": ("PersimmonModel", "PersimmonConfig", {**WIDTH, **TEXT}),
    "falcon_old": ("FalconModel", "FalconConfig", {**_FALCON, "multi_query": False}),
    "falcon_multi_query": ("FalconModel", "FalconConfig", {**_FALCON, "multi_query": True}),
    "falcon_new": ("FalconModel", "FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("GPTBigCodeModel", "GPTBigCodeConfig", {**_GPT2, "multi_query": True}),
    "gpt_bigcode_heads": ("GPTBigCodeModel", "GPTBigCodeConfig", {**_GPT2, "multi_query": False}),
    "codegen": ("CodeGenModel", "CodeGenConfig", {**_GPT2, **TEXT, "n_head": 8, "rotary_dim": 4}),
    "mpt": ("MptModel", "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40}),
    "dbrx": (
        "DbrxModel", "DbrxConfig",
        {
            "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 16, "vocab_size": 40,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 9.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        },
    ),
    "phi3": ("Phi3Model", "Phi3Config", {**WIDTH, **TEXT, "num_key_value_heads": 1}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**WIDTH, **TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2_cross": ("GPT2Model", "GPT2Config", {**_GPT2, "add_cross_attention": True}),
    "gpt2_labels": ("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "num_labels": 3}),
    "openai_gpt": ("OpenAIGPTModel", "OpenAIGPTConfig", _GPT2),
    "imagegpt": ("ImageGPTModel", "ImageGPTConfig", _GPT2),
    "decision_transformer": (
        "DecisionTransformerModel", "DecisionTransformerConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "state_dim": 4, "act_dim": 2},
    ),
    "bark": (
        "BarkCausalModel", "BarkSemanticConfig",
        {
            "hidden_size": 32, "num_heads": 4, "num_layers": 2, "block_size": 16, "input_vocab_size": 40,
            "output_vocab_size": 40,
        },
    ),
    "minimax": (
        "MiniMaxModel", "MiniMaxConfig",
        {**_GROUPED, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen3_next": (
        "Qwen3NextModel", "Qwen3NextConfig",
        {
            **_GROUPED, **_LINEAR, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "qwen3_5": ("Qwen3_5TextModel", "Qwen3_5TextConfig", {**_GROUPED, **_LINEAR}),
    "deepseek_v2": ("DeepseekV2Model", "DeepseekV2Config", {**_GROUPED, **_LATENT, "first_k_dense_replace": 2}),
    "deepseek_v3": ("DeepseekV3Model", "DeepseekV3Config", {**_GROUPED, **_LATENT, "first_k_dense_replace": 2}),
    "minicpm3": ("MiniCPM3Model", "MiniCPM3Config", {**WIDTH, **TEXT, **_LATENT}),
    "deepseek_v4": (
        "DeepseekV4Model", "DeepseekV4Config",
        {
            **_GROUPED, "head_dim": 8, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 4, "qk_rope_head_dim": 4,
            "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "index_n_heads": 2,
            "index_head_dim": 8,
        },
    ),
    "mobilevitv2": (
        "MobileViTV2Model", "MobileViTV2Config",
        {"width_multiplier": 0.25, "image_size": 64, "n_attn_blocks": [1, 1, 1]},
    ),
    "levit": ("LevitModel", "LevitConfig", _LEVIT),
    "reformer": (
        "ReformerModel", "ReformerConfig",
        {
            "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2, "attn_layers": ["lsh", "local"],
            "feed_forward_size": 16, "vocab_size": 40, "axial_pos_embds": False,
        },
    ),
    "sam": (
        "SamVisionModel", "SamVisionConfig",
        {
            **_IMAGE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 32,
            "output_channels": 8, "window_size": 2, "global_attn_indexes": [1],
        },
    ),
    "hiera": (
        "HieraModel", "HieraConfig",
        {
            "embed_dim": 16, "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [4, 4],
            "patch_padding": [1, 1], "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1,
            "masked_unit_size": [4, 4], "query_stride": [2, 2], "embed_dim_multiplier": 2.0,
        },
    ),
    "timesformer": ("TimesformerModel", "TimesformerConfig", {**_IMAGE, **WIDTH, "num_frames": 2}),
    "vitdet": (
        "VitDetModel", "VitDetConfig",
        {**_IMAGE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    # -- of several parts
    "blip": (
        "BlipModel", "BlipConfig",
        {
            "text_config": {**WIDTH, **TEXT}, "vision_config": {**WIDTH, **_IMAGE, "hidden_size": 48},
            "projection_dim": 16,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {
            # With the language model's heads, 12 and 2, the vision model's rows could be split, too.
            "text_config": {**_GROUPED, **_ROPE, "hidden_size": 96, "num_attention_heads": 12},
            "vision_config": {
                "depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 96, "patch_size": 8, "mlp_ratio": 2,
            },
            "image_token_id": 5, "video_token_id": 6,
        },
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {**WIDTH, **_IMAGE}),
    "bart": ("BartModel", "BartConfig", {**_BART, **TEXT}),
    # -- saved under other names, or in other pieces
    "vit": ("ViTModel", "ViTConfig", {**WIDTH, **_IMAGE}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**WIDTH, **_IMAGE, "mlp_ratio": 2}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**WIDTH, **_IMAGE}),
    "swin": (
        "SwinModel", "SwinConfig",
        {
            "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "radio": ("RadioModel", "RadioConfig", {**WIDTH, **_IMAGE}),
    # -- in another order than their names
    "gptj": ("GPTJModel", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "opt": (
        "OPTModel", "OPTConfig",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32,
            "word_embed_proj_dim": 32, "max_position_embeddings": 16, **TEXT,
        },
    ),
}  # fmt: skip


def configured(name: str) -> nn.Module:
    """A model of ``CONFIGURED`` in eval mode, no two rows of its weights alike; skips where its class is not there."""
    transformers = pytest.importorskip("transformers")
    model, config, settings = CONFIGURED[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    # Its library's random state is the tests' own afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_()
    return made

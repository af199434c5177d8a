"""Tiny models of many kinds, built by their own libraries with random weights, for the tests of tnadapt.torch.

``MODELS`` maps a name to a function without arguments that returns the model, in eval mode and always with the same
weights, and the keyword arguments of one call; :func:`build` calls one, or skips the test if its library is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper.diffusion import unet

from .configured import CONFIGURED, TEXT, WIDTH

Inputs = dict[str, Any]
MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}


def build(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model of ``MODELS`` in eval mode, and the keyword arguments of a call."""
    # The library's own random state is the tests' own afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
    return model.eval(), inputs


def output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the main output of a call: logits, or the last hidden state."""
    found = model(**inputs)
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    while not isinstance(found, Tensor):
        found = found[0]
    return found


def _model(build: Callable[[], tuple[nn.Module, Inputs]]) -> Callable[[], tuple[nn.Module, Inputs]]:
    MODELS[build.__name__] = build
    return build


def _image(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def _text(length: int = 7) -> Inputs:
    return {"input_ids": torch.randint(3, 40, (2, length))}


# -- torch, torchvision, timm ------------------------------------------------------------------


@_model
def torch_encoder() -> tuple[nn.Module, Inputs]:
    """Its layers take the fast path, which calls no submodule, in eval mode without gradients."""
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": torch.randn(2, 5, 16)}


@_model
def torch_decoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerDecoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    return nn.TransformerDecoder(layer, 1), {"tgt": torch.randn(2, 5, 16), "memory": torch.randn(2, 4, 16)}


@_model
def torch_attention_kdim() -> tuple[nn.Module, Inputs]:
    """It has separate weights of q, k and v, because their inputs differ in width."""
    model = nn.MultiheadAttention(16, 2, kdim=12, vdim=20, batch_first=True)
    return model, {
        "query": torch.randn(2, 5, 16),
        "key": torch.randn(2, 6, 12),
        "value": torch.randn(2, 6, 20),
        "need_weights": False,
    }


@_model
def torchvision_resnet() -> tuple[nn.Module, Inputs]:
    models = pytest.importorskip("torchvision.models")
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5), {"x": _image()}


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
_SWIN = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "num_classes": 5}
_TIMM_SWIN = {**_SWIN, "img_size": 32, "patch_size": 4, "window_size": 4}

#: Vision transformers: the module, the class and the settings.
VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torchvision_vit": (
        "torchvision.models", "VisionTransformer",
        {
            "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64,
            "num_classes": 5,
        },
    ),
    # Attention that passes ``self.qkv.weight`` and ``self.proj.weight`` to a function and calls neither module.
    "torchvision_swin": (
        "torchvision.models", "SwinTransformer", {**_SWIN, "patch_size": [4, 4], "window_size": [4, 4]}
    ),
    "timm_vit": ("timm.models.vision_transformer", "VisionTransformer", _VIT),
    "timm_swin": ("timm.models.swin_transformer", "SwinTransformer", _TIMM_SWIN),
    # Attention that reads ``self.qkv.weight`` and does not call ``self.qkv``; the last with rotary embeddings.
    "timm_swinv2": ("timm.models.swin_transformer_v2", "SwinTransformerV2", _TIMM_SWIN),
    "timm_beit": ("timm.models.beit", "Beit", _VIT),
    "timm_eva": ("timm.models.eva", "Eva", {**_VIT, "use_rot_pos_emb": True}),
}  # fmt: skip


def _of_vision(name: str) -> tuple[nn.Module, Inputs]:
    path, class_name, settings = VISION[name]
    model = getattr(pytest.importorskip(path), class_name)(**settings)
    # Heads and the norms of residual branches start at zero, which would hide every change.
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    if name == "torchvision_vit":
        nn.init.normal_(model.heads.head.weight)
    return model, {"x": _image()}


MODELS |= {name: functools.partial(_of_vision, name) for name in VISION}


# -- transformers ------------------------------------------------------------------------------

_WORDS = {**WIDTH, "vocab_size": 40, "max_position_embeddings": 16}

# The class, its config's, and the settings, as in ``CONFIGURED``.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**_WORDS, "num_labels": 3}),
    # One layer, used three times.
    "albert": ("AlbertModel", "AlbertConfig", {**_WORDS, "num_hidden_layers": 3, "embedding_size": 16}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**CONFIGURED["vit"][2], "num_labels": 5}),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {
            "text_config": {**_WORDS, **TEXT}, "projection_dim": 16,
            "vision_config": {**WIDTH, "hidden_size": 48, "image_size": 32, "patch_size": 8},
        },
    ),
    # With cross-attention, where c_attn has k and v alone.
    "gpt2_cross": ("GPT2Model", "GPT2Config", {**CONFIGURED["gpt2_cross"][2], "n_layer": 1}),
    # Four query heads for two of keys and values.
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_WORDS, **TEXT, "num_key_value_heads": 2}),
    # The same in one weight whose rows would also divide by three.
    "phi3": ("Phi3ForCausalLM", "Phi3Config", CONFIGURED["phi3"][2]),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", CONFIGURED["gpt_neox"][2]),
    "deepseek_v3": ("DeepseekV3Model", "DeepseekV3Config", {**CONFIGURED["deepseek_v3"][2], "num_key_value_heads": 4}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3, "vocab_size": 40,
            "decoder_start_token_id": 0,
        },
    ),
    "whisper": (
        "WhisperModel", "WhisperConfig",
        {
            **TEXT, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
            "max_source_positions": 12, "max_target_positions": 12, "decoder_start_token_id": 1,
        },
    ),
    **{
        name: CONFIGURED[name]
        for name in (
            "modernbert", "dinov2", "gpt2", "bloom", "falcon_old", "falcon_multi_query", "falcon_new", "gpt_bigcode",
            "gpt_bigcode_heads", "codegen", "mpt",
        )
    },
}  # fmt: skip

# What a call gets besides the words, or instead of them.
OTHER_INPUTS: dict[str, Callable[[], Inputs]] = {
    "vit": lambda: {"pixel_values": _image()},
    "dinov2": lambda: {"pixel_values": _image()},
    "clip": lambda: {**_text(), "pixel_values": _image()},
    "gpt2_cross": lambda: {**_text(), "encoder_hidden_states": torch.randn(2, 5, 32)},
    "t5": lambda: {**_text(), "decoder_input_ids": torch.randint(3, 40, (2, 4))},
    "whisper": lambda: {
        "input_features": torch.randn(2, 8, 24),
        "decoder_input_ids": torch.randint(3, 40, (2, 4)),
    },
}


def _of_transformers(name: str) -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    model, config, settings = TRANSFORMERS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return made, OTHER_INPUTS.get(name, _text)()


MODELS |= {name: functools.partial(_of_transformers, name) for name in TRANSFORMERS}


# -- Diffusion ---------------------------------------------------------------------------------


@_model
def diffusers_unet() -> tuple[nn.Module, Inputs]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {
        "sample": _image(8, 4),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }
    return model, inputs


@_model
def paper_unet() -> tuple[nn.Module, Inputs]:
    """The paper's U-Net at its original width, on images of 16 x 16, of which the lowest level has four points."""
    return unet.UNet(), {"x": _image(16), "t": torch.tensor([3, 700]), "cemb": torch.randn(2, 10)}

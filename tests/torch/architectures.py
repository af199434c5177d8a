"""Tiny models of many kinds, built by their own libraries with random weights, for the tests of tnadapt.torch.

``MODELS`` maps a name to a function without arguments that returns the model, in eval mode and always with the same
weights, and the keyword arguments of one call; :func:`build` calls one, or skips the test if its library is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper.diffusion import unet

Inputs = dict[str, Any]
MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}

TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


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


def _hugging_face(model: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


# -- torch, torchvision ------------------------------------------------------------------------


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
def torchvision_vit() -> tuple[nn.Module, Inputs]:
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )
    # Its head starts at zero, which would hide every change.
    nn.init.normal_(model.heads.head.weight)
    return model, {"x": _image()}


@_model
def torchvision_swin() -> tuple[nn.Module, Inputs]:
    """Attention that passes ``self.qkv.weight`` and ``self.proj.weight`` to a function and calls neither module."""
    models = pytest.importorskip("torchvision.models")
    model = models.SwinTransformer(
        [4, 4], embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )
    return model, {"x": _image()}


@_model
def torchvision_resnet() -> tuple[nn.Module, Inputs]:
    models = pytest.importorskip("torchvision.models")
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5), {"x": _image()}


# -- timm --------------------------------------------------------------------------------------


@_model
def timm_vit() -> tuple[nn.Module, Inputs]:
    timm = pytest.importorskip("timm")
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **settings), {"x": _image()}


@_model
def timm_swin() -> tuple[nn.Module, Inputs]:
    swin = pytest.importorskip("timm.models.swin_transformer")
    model = swin.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4), num_classes=5
    )
    return model, {"x": _image()}


@_model
def timm_swinv2() -> tuple[nn.Module, Inputs]:
    """Attention that reads ``self.qkv.weight`` and does not call ``self.qkv``."""
    swin = pytest.importorskip("timm.models.swin_transformer_v2")
    model = swin.SwinTransformerV2(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4), num_classes=5
    )
    # The residual norms start at zero.
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    return model, {"x": _image()}


@_model
def timm_beit() -> tuple[nn.Module, Inputs]:
    """A model like :func:`timm_swinv2`."""
    beit = pytest.importorskip("timm.models.beit")
    return beit.Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5), {"x": _image()}


@_model
def timm_eva() -> tuple[nn.Module, Inputs]:
    """A model like :func:`timm_swinv2`, with rotary embeddings."""
    eva = pytest.importorskip("timm.models.eva")
    model = eva.Eva(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, use_rot_pos_emb=True)
    return model, {"x": _image()}


# -- transformers: encoders --------------------------------------------------------------------

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@_model
def bert() -> tuple[nn.Module, Inputs]:
    settings = {**_WIDTH, "vocab_size": 40, "max_position_embeddings": 16, "num_labels": 3}
    return _hugging_face("BertForSequenceClassification", "BertConfig", **settings), _text()


@_model
def albert() -> tuple[nn.Module, Inputs]:
    """One layer, used three times."""
    settings = {**_WIDTH, "num_hidden_layers": 3, "vocab_size": 40, "embedding_size": 16, "max_position_embeddings": 16}
    return _hugging_face("AlbertModel", "AlbertConfig", **settings), _text()


@_model
def modernbert() -> tuple[nn.Module, Inputs]:
    settings = {
        **_WIDTH,
        **TEXT,
        "max_position_embeddings": 16,
        "local_attention": 4,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    return _hugging_face("ModernBertModel", "ModernBertConfig", **settings), _text()


@_model
def vit() -> tuple[nn.Module, Inputs]:
    settings = {**_WIDTH, "image_size": 32, "patch_size": 8, "num_labels": 5}
    return _hugging_face("ViTForImageClassification", "ViTConfig", **settings), {"pixel_values": _image()}


@_model
def dinov2() -> tuple[nn.Module, Inputs]:
    settings = {**_WIDTH, "image_size": 32, "patch_size": 8, "mlp_ratio": 2}
    return _hugging_face("Dinov2Model", "Dinov2Config", **settings), {"pixel_values": _image()}


@_model
def clip() -> tuple[nn.Module, Inputs]:
    text = {**_WIDTH, **TEXT, "max_position_embeddings": 16}
    vision = {**_WIDTH, "hidden_size": 48, "image_size": 32, "patch_size": 8}
    model = _hugging_face("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=16)
    return model, {**_text(), "pixel_values": _image()}


# -- transformers: decoders --------------------------------------------------------------------


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
_GPT2 |= {name: number for name, number in TEXT.items() if name != "pad_token_id"}


@_model
def gpt2() -> tuple[nn.Module, Inputs]:
    """Weights stored as (in, out), and the embedding tied to the head."""
    return _hugging_face("GPT2LMHeadModel", "GPT2Config", **_GPT2), _text()


@_model
def gpt2_cross() -> tuple[nn.Module, Inputs]:
    """With cross-attention, where c_attn has k and v alone."""
    settings = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 16,
        "vocab_size": 40,
        "add_cross_attention": True,
    }
    model = _hugging_face("GPT2Model", "GPT2Config", **settings)
    return model, {**_text(), "encoder_hidden_states": torch.randn(2, 5, 32)}


@_model
def llama() -> tuple[nn.Module, Inputs]:
    """Four query heads for two of keys and values."""
    settings = {**_WIDTH, **TEXT, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return _hugging_face("LlamaForCausalLM", "LlamaConfig", **settings), _text()


@_model
def phi3() -> tuple[nn.Module, Inputs]:
    """As :func:`llama`, in one weight whose rows would also divide by three."""
    settings = {**_WIDTH, **TEXT, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return _hugging_face("Phi3ForCausalLM", "Phi3Config", **settings), _text()


@_model
def gpt_neox() -> tuple[nn.Module, Inputs]:
    settings = {**_WIDTH, **TEXT, "max_position_embeddings": 16}
    return _hugging_face("GPTNeoXForCausalLM", "GPTNeoXConfig", **settings), _text()


@_model
def bloom() -> tuple[nn.Module, Inputs]:
    settings = {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TEXT}
    return _hugging_face("BloomModel", "BloomConfig", **settings), _text()


def _falcon(**settings: Any) -> tuple[nn.Module, Inputs]:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TEXT, **settings}
    return _hugging_face("FalconModel", "FalconConfig", **settings), _text()


@_model
def falcon_old() -> tuple[nn.Module, Inputs]:
    """q, k and v head by head."""
    return _falcon(multi_query=False, new_decoder_architecture=False)


@_model
def falcon_multi_query() -> tuple[nn.Module, Inputs]:
    """All queries, then one head of keys and one of values."""
    return _falcon(multi_query=True, new_decoder_architecture=False)


@_model
def falcon_new() -> tuple[nn.Module, Inputs]:
    """Head of keys by head of keys, each after its queries."""
    return _falcon(new_decoder_architecture=True, num_kv_heads=2)


@_model
def gpt_bigcode() -> tuple[nn.Module, Inputs]:
    return _hugging_face("GPTBigCodeModel", "GPTBigCodeConfig", **_GPT2, multi_query=True), _text()


@_model
def gpt_bigcode_heads() -> tuple[nn.Module, Inputs]:
    return _hugging_face("GPTBigCodeModel", "GPTBigCodeConfig", **_GPT2, multi_query=False), _text()


@_model
def codegen() -> tuple[nn.Module, Inputs]:
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 16, "rotary_dim": 4, **TEXT}
    return _hugging_face("CodeGenModel", "CodeGenConfig", **settings), _text()


@_model
def mpt() -> tuple[nn.Module, Inputs]:
    settings = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16, "vocab_size": 40}
    return _hugging_face("MptModel", "MptConfig", **settings), _text()


@_model
def deepseek_v3() -> tuple[nn.Module, Inputs]:
    """Latent attention: queries and keys in two steps."""
    settings = {
        **_WIDTH, **TEXT, "q_lora_rank": 8, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "first_k_dense_replace": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    return _hugging_face("DeepseekV3Model", "DeepseekV3Config", **settings), _text()


# -- transformers: encoder and decoder ---------------------------------------------------------


@_model
def t5() -> tuple[nn.Module, Inputs]:
    settings = {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3, "vocab_size": 40,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    model = _hugging_face("T5ForConditionalGeneration", "T5Config", **settings)
    return model, {**_text(), "decoder_input_ids": torch.randint(3, 40, (2, 4))}


@_model
def whisper() -> tuple[nn.Module, Inputs]:
    settings = {
        **TEXT, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 12, "max_target_positions": 12, "decoder_start_token_id": 1,
    }  # fmt: skip
    model = _hugging_face("WhisperModel", "WhisperConfig", **settings)
    return model, {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.randint(3, 40, (2, 4))}


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

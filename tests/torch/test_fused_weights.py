"""The rows of fused weights, in models and in checkpoints.

In a model they are verified by changing them and observing the attention's products.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.errors import TargetError
from tnadapt.targets.attention_layouts import TABLE
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.fused_rows import LayoutError
from tnadapt.targets.prefixes import paired
from tnadapt.targets.target import Rows, Target
from tnadapt.torch import find_targets
from tnadapt.torch._target_selection import AttentionModule, attentions

from .architectures import MODELS, TEXT, build
from .configured import CONFIGURED, configured

# ----------------------------------------------------------------------------------------------------------------------
# The rows of a fused weight that produce q, k and v, verified by changing them and observing the attention's
# products

# An attention computes two products: q with k, then the result with v. A mode of torch's dispatcher observes these
# products in any code. The rows of v are right if changing them changes only v, and the same for q and k.


# -- Looking into an attention ------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Records q, k and v of the first call of an attention: the operands of its products."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first: list[tuple[Tensor, ...]] = []
        self.calls = 0
        self.inside = False
        attention.register_forward_pre_hook(self.enter)
        attention.register_forward_hook(self.leave)

    def enter(self, *_: Any) -> None:
        self.inside = self.calls == 0
        self.calls += 1

    def leave(self, *_: Any) -> None:
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and func is torch.ops.aten.bmm.default:
            self.first.append(tuple(args))
        elif self.inside and func is torch.ops.aten.baddbmm.default:
            self.first.append(tuple(args[1:]))
        elif self.inside and "scaled_dot_product" in str(func):
            self.first.append(tuple(args[:3]))
        return func(*args, **(kwargs or {}))

    def operands(self, right: bool) -> dict[str, Tensor]:
        """Return the operands by letter."""
        scores, mixed = self.first[0], self.first[-1]
        found = scores if len(scores) == 3 else (*scores, mixed[0 if right else 1])
        return {letter: tensor.detach().clone() for letter, tensor in zip("qkv", found, strict=True)}


def by_products(run: Callable[[], Any], attention: nn.Module, right: bool = False) -> dict[str, Tensor]:
    """Return q, k and v as the attention multiplies them; ``right`` if v is the left operand of its product."""
    with Products(attention) as products:
        run()
    for hooks in (attention._forward_hooks, attention._forward_pre_hooks):
        hooks.clear()
    return products.operands(right)


@contextmanager
def moved(model: nn.Module, target: Target, row: int | None = None) -> Iterator[None]:
    """Change the numbers in a target's rows, or in one of them, inside ``with``."""
    parameter = model.get_submodule(target.module).get_parameter(target.parameter)
    before = parameter.detach().clone()
    noise = torch.zeros(target.shape)
    noise[slice(None) if row is None else row] = torch.randn(target.shape[1]) + 1.0
    with torch.no_grad():
        target.block(parameter).add_(target.like_block(noise))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def check_letters(
    model: nn.Module, attention: AttentionModule, look: Callable[[], dict[str, Tensor]], letters: str = "qkv"
) -> None:
    """Check that changing the rows of each letter changes only that operand."""
    before = look()
    targets = list(attention.targets(letters))
    assert targets
    for target in targets:
        with moved(model, target):
            after = look()
        changed = {letter for letter in before if not torch.equal(before[letter], after[letter])}
        assert changed == {target.role}, target
    again = look()
    assert all(torch.equal(before[letter], again[letter]) for letter in before)


# -- Whole models -------------------------------------------------------------------------------

WITHOUT = {"torchvision_resnet"}
# The diffusion models' attentions are many and alike.
FIRST_ONLY = {"paper_unet", "diffusers_unet"}


@pytest.mark.slow
@pytest.mark.law("fused-keys")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - WITHOUT))
def test_rows_make_what_they_are_said_to(name: str) -> None:
    model, inputs = build(name)
    found = list(attentions(model))
    assert found
    for attention in found[:2] if name in FIRST_ONLY else found:
        check_letters(model, attention, lambda here=attention: by_products(lambda: model(**inputs), here.module))


@pytest.mark.law("fused-rows")
def test_rows_of_the_weights_that_diffusers_fuses() -> None:
    model, inputs = build("diffusers_unet")
    model.fuse_qkv_projections()
    for attention in list(attentions(model))[:2]:
        check_letters(model, attention, lambda here=attention: by_products(lambda: model(**inputs), here.module))


HEADS = {
    "timm_vit": 2, "timm_beit": 2, "bert": 4, "modernbert": 4, "gpt2": 4, "llama": 2, "phi3": 1,
    "gpt_neox": 4, "bloom": 4, "falcon_old": 4, "falcon_multi_query": 1, "falcon_new": 2, "gpt_bigcode": 1,
    "gpt_bigcode_heads": 4, "codegen": 8, "mpt": 4, "deepseek_v3": 4, "torch_encoder": 2, "t5": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_rows_of_v_come_in_the_order_of_heads(name: str) -> None:
    """Row i is number i % size of head i // size, as in a weight of v alone."""
    model, inputs = build(name)
    attention = next(iter(attentions(model)))
    (target,) = attention.targets("v")
    heads = HEADS[name]
    size = target.shape[0] // heads

    def look() -> Tensor:
        v = by_products(lambda: model(**inputs), attention.module)["v"]
        # Heads of keys and values may have been repeated for the queries that share them.
        return v if v.ndim == 4 else v.reshape(2, -1, *v.shape[1:])

    before = look()
    for row in (0, 1, size, target.shape[0] - 1):
        if row >= target.shape[0]:
            continue
        with moved(model, target, row):
            changed = (look() != before).any(2).any(0)
        repeats = changed.shape[0] // heads
        expected = torch.zeros_like(changed)
        expected[row // size * repeats : (row // size + 1) * repeats, row % size] = True
        assert torch.equal(changed, expected), row


# -- Single attentions, whose products are q with k and the result with v -----------------------

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
ATTENTIONS: dict[str, Callable[[], Case]] = {}


def _case(make: Callable[[], Case]) -> Callable[[], Case]:
    ATTENTIONS[make.__name__] = make
    return make


def _image(channels: int = 16, size: int = 4) -> Tensor:
    return torch.randn(2, channels, size, size)


def _tokens(length: int = 16, width: int = 16) -> Tensor:
    return torch.randn(2, length, width)


def _timm(module: str, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    return getattr(pytest.importorskip(f"timm.{module}"), name)(*args, **kwargs)


@_case
def levit() -> Case:
    return _timm("models.levit", "Attention", 16, 4, num_heads=2, attn_ratio=3, resolution=(4, 4)), (_tokens(),), {}


@_case
def levit_conv() -> Case:
    model = _timm("models.levit", "Attention", 16, 4, num_heads=2, attn_ratio=3, resolution=(4, 4), use_conv=True)
    return model, (_image(),), {}


@_case
def levit_downsample() -> Case:
    model = _timm(
        "models.levit", "AttentionDownsample", 16, 24, 4, num_heads=2, attn_ratio=3.0, stride=2, resolution=(4, 4)
    )
    return model, (_tokens(),), {}


@_case
def efficientformer() -> Case:
    return (
        _timm("models.efficientformer", "Attention", 16, 4, num_heads=2, attn_ratio=3, resolution=4),
        (_tokens(),),
        {},
    )


@_case
def tiny_vit() -> Case:
    return _timm("models.tiny_vit", "Attention", 16, 4, num_heads=2, attn_ratio=3, resolution=(4, 4)), (_tokens(),), {}


@_case
def maxxvit_heads_first() -> Case:
    return _timm("models.maxxvit", "Attention2d", 16, dim_head=8, head_first=True), (_image(),), {}


@_case
def maxxvit() -> Case:
    return _timm("models.maxxvit", "AttentionCl", 16, dim_head=8, head_first=False), (torch.randn(2, 4, 4, 16),), {}


@_case
def maxxvit_last_heads_first() -> Case:
    return _timm("models.maxxvit", "AttentionCl", 16, dim_head=8, head_first=True), (torch.randn(2, 4, 4, 16),), {}


@_case
def timm_2d_heads_first() -> Case:
    return _timm("layers.attention2d", "Attention2d", 16, num_heads=2, head_first=True), (_image(),), {}


@_case
def gcvit() -> Case:
    return _timm("models.gcvit", "WindowAttentionGlobal", 16, 2, 4, use_global=False), (_tokens(),), {}


@_case
def gcvit_global() -> Case:
    """Keys and values alone, under the name qkv."""
    model = _timm("models.gcvit", "WindowAttentionGlobal", 16, 2, 4, use_global=True)
    return model, (_tokens(), _tokens()), {}


@_case
def shvit() -> Case:
    return _timm("models.shvit", "SHSA", 24, 4, 10), (_image(24),), {}


@_case
def parallel_scaling() -> Case:
    """The MLP's input in the same weight, before q, k and v."""
    return _timm("models.vision_transformer", "ParallelScalingBlock", 16, 2), (_tokens(),), {}


@_case
def bottleneck() -> Case:
    model = _timm("layers.bottleneck_attn", "BottleneckAttn", 16, feat_size=(4, 4), num_heads=2, dim_head=4)
    return model, (_image(),), {}


@_case
def halo() -> Case:
    model = _timm("layers.halo_attn", "HaloAttn", 16, num_heads=2, dim_head=4, block_size=2, halo_size=1)
    return model, (_image(),), {}


@_case
def tnt() -> Case:
    """q and k in one weight, v apart."""
    return _timm("models.tnt", "Attention", 16, 16, num_heads=2), (_tokens(),), {}


@_case
def mobilenet_multi_query() -> Case:
    """Projections inside a Sequential, with pooling."""
    model = _timm("layers.attention2d", "MultiQueryAttention2d", 16, num_heads=2, kv_stride=2)
    return model, (_image(),), {}


def _transformers(module: str, name: str, config: str, *args: Any, **settings: Any) -> nn.Module:
    """Build an attention of a library's module from a config and, except in old versions, the layer's number."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    made = getattr(transformers, config)(**settings)
    made._attn_implementation = "eager"
    return getattr(package, name)(made, *args)


_SMALL = {**TEXT, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def _angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).float(), torch.rand(size))[None]
    return angles.cos(), angles.sin()


@_case
def gpt_neox_japanese() -> Case:
    model = _transformers("gpt_neox_japanese", "GPTNeoXJapaneseAttention", "GPTNeoXJapaneseConfig", False, 0, **_SMALL)
    inputs = {"attention_mask": torch.zeros(2, 1, 16, 16), "position_ids": torch.arange(16)[None]}
    return model, (_tokens(width=32),), {**inputs, "position_embeddings": _angles(16, model.rotary_ndims)}


@_case
def persimmon() -> Case:
    model = _transformers("persimmon", "PersimmonAttention", "PersimmonConfig", 0, **_SMALL)
    return model, (_tokens(width=32),), {"position_embeddings": _angles(16, model.rotary_ndims)}


@_case
def deberta() -> Case:
    model = _transformers("deberta", "DisentangledSelfAttention", "DebertaConfig", **_SMALL)
    return model, (_tokens(width=32), torch.ones(2, 1, 16, 16)), {}


@_case
def levit_transformers() -> Case:
    package = pytest.importorskip("transformers.models.levit.modeling_levit")
    return package.LevitAttention(16, 4, 2, 3, 4), (_tokens(),), {}


@_case
def levit_transformers_subsample() -> Case:
    package = pytest.importorskip("transformers.models.levit.modeling_levit")
    return package.LevitAttentionSubsample(16, 24, 4, 2, 3, 2, 4, 2), (_tokens(),), {}


@_case
def exaone_vision() -> Case:
    settings = {"hidden_size": 32, "num_heads": 4, "num_key_value_heads": 2, "depth": 1}
    package = pytest.importorskip("transformers.models.exaone4_5.modeling_exaone4_5")
    config = pytest.importorskip("transformers.models.exaone4_5.configuration_exaone4_5")
    made = config.Exaone4_5_VisionConfig(**settings)
    made._attn_implementation = "eager"
    model = package.Exaone4_5_VisionAttention(made)
    cos, sin = _angles(8, model.head_dim)
    inputs = {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32), "position_embeddings": (cos[0], sin[0])}
    return model, (torch.randn(8, 32),), inputs


@_case
def dbrx() -> Case:
    """Fewer heads of keys and values, one after another."""
    settings = {
        "d_model": 32,
        "n_heads": 4,
        "max_seq_len": 16,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 99.0},
    }
    model = _transformers("dbrx", "DbrxAttention", "DbrxConfig", 0, **settings)
    return model, (_tokens(width=32),), {"position_embeddings": _angles(16, 8)}


@_case
def bark() -> Case:
    package = pytest.importorskip("transformers.models.bark.modeling_bark")
    config = pytest.importorskip("transformers.models.bark.configuration_bark")
    settings = {"hidden_size": 32, "num_heads": 4, "num_layers": 1, "block_size": 16}
    return package.BarkSelfAttention(config.BarkSemanticConfig(**settings), layer_idx=0), (_tokens(width=32),), {}


@_case
def openai_gpt() -> Case:
    package = pytest.importorskip("transformers.models.openai.modeling_openai")
    config = pytest.importorskip("transformers").OpenAIGPTConfig(n_embd=32, n_head=4, n_positions=16)
    return package.Attention(32, 16, config), (_tokens(width=32),), {}


@_case
def kolors_text() -> Case:
    """ChatGLM: all queries, then groups of keys and of values."""
    return _kolors(multi_query_attention=True, multi_query_group_num=2)


@_case
def kolors_text_heads() -> Case:
    return _kolors(multi_query_attention=False)


def _kolors(**settings: Any) -> Case:
    package = pytest.importorskip("diffusers.pipelines.kolors.text_encoder")
    config = package.ChatGLMConfig(hidden_size=32, num_attention_heads=4, kv_channels=8, num_layers=1, **settings)
    return package.SelfAttention(config, 1), (torch.randn(6, 2, 32), None, None), {}


@_case
def flux2_parallel() -> Case:
    """The MLP's input in the same weight, after q, k and v."""
    package = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
    model = package.Flux2ParallelSelfAttention(query_dim=32, heads=4, dim_head=8)
    return model, (_tokens(width=32),), {}


@_case
def joy_image() -> Case:
    """Two streams, each with a fused weight."""
    package = pytest.importorskip("diffusers.models.transformers.transformer_joyimage")
    model = package.JoyImageAttention(dim=32, num_attention_heads=4, attention_head_dim=8)
    return model, (_tokens(8, 32), _tokens(5, 32)), {}


class AttentionBlock(nn.Module):
    """As in OpenAI's diffusion models: a 1x1 convolution, and a module of this name that splits its result."""

    def __init__(self, legacy: bool) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(16, 48, 1)
        self.attention = (QKVAttentionLegacy if legacy else QKVAttention)(2)
        self.proj_out = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.attention(self.qkv(x)))


class QKVAttention(nn.Module):
    """q, k and v, then heads."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv: Tensor) -> Tensor:
        return qkv.unflatten(1, (3, self.n_heads, -1)).transpose(0, 1)

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = (part.mT for part in self.split(qkv))
        return nn.functional.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)


class QKVAttentionLegacy(QKVAttention):
    """Heads, then q, k and v."""

    def split(self, qkv: Tensor) -> Tensor:
        return qkv.unflatten(1, (self.n_heads, 3, -1)).permute(2, 0, 1, 3, 4)


@_case
def guided_diffusion() -> Case:
    return AttentionBlock(legacy=False), (torch.randn(2, 16, 9),), {}


@_case
def guided_diffusion_legacy() -> Case:
    return AttentionBlock(legacy=True), (torch.randn(2, 16, 9),), {}


class InternLM2Attention(nn.Module):
    """Each head of keys, and of values, after the two heads of queries that use it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 8
        self.wqkv = nn.Linear(32, 64, bias=False)
        self.wo = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (2, 4, 8))
        q = qkv[..., :2, :].flatten(2, 3).transpose(1, 2)
        k, v = (qkv[..., place, :].transpose(1, 2).repeat_interleave(2, 1) for place in (2, 3))
        return self.wo(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@_case
def internlm2() -> Case:
    return InternLM2Attention(), (_tokens(width=32),), {}


class MossAttention(nn.Module):
    """Four parts, each with the queries, values and keys of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(32, 96, bias=False)
        self.out_proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv_proj(x).unflatten(-1, (4, 24)).split(8, -1)
        q, v, k = (part.unflatten(-1, (2, 4)).flatten(2, 3).transpose(1, 2) for part in parts)
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@_case
def moss() -> Case:
    return MossAttention(), (_tokens(width=32),), {}


class QWenAttention(nn.Module):
    """The first Qwen: q, k and v one after another in a linear layer with the name of GPT-2's Conv1D."""

    fused = "c_attn"

    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.kv_n_heads, self.head_dim = 4, kv_heads, 8
        self.add_module(self.fused, nn.Linear(32, 32 + 16 * kv_heads))
        self.add_module("out_proj" if self.fused == "Wqkv" else "c_proj", nn.Linear(32, 32, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        sizes = [8 * self.num_heads, 8 * self.kv_n_heads, 8 * self.kv_n_heads]
        parts = self.get_submodule(self.fused)(x).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(self.num_heads // self.kv_n_heads, 1) for part in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@_case
def qwen() -> Case:
    return QWenAttention(), (_tokens(width=32),), {}


class GroupedQueryAttention(QWenAttention):
    """MPT's attention as in its own code: fewer heads of keys and values, one after another."""

    fused = "Wqkv"


@_case
def mpt_grouped() -> Case:
    return GroupedQueryAttention(2), (_tokens(width=32),), {}


class BaichuanAttention(QWenAttention):
    fused = "W_pack"


@_case
def baichuan() -> Case:
    return BaichuanAttention(), (_tokens(width=32),), {}


class SelfAttention(nn.Module):
    """The first ChatGLM: head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = self.num_attention_heads_per_partition = 4
        self.hidden_size_per_attention_head, self.position_encoding_2d = 8, True
        self.query_key_value, self.dense = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.query_key_value(x).unflatten(-1, (4, 24)).chunk(3, -1))
        return self.dense(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@_case
def chatglm() -> Case:
    return SelfAttention(), (_tokens(width=32),), {}


# They multiply v with the average's weights, not these with v.
RIGHT = {"levit_conv", "shvit"}


@pytest.mark.law("fused-layouts")
@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_of_one_attention(name: str) -> None:
    torch.manual_seed(0)
    module, args, kwargs = ATTENTIONS[name]()
    module.eval()
    (attention,) = attentions(module)
    check_letters(module, attention, lambda: by_products(lambda: module(*args, **kwargs), module, name in RIGHT))


# -- Attentions of other kinds: what their own split gives ---------------------------------------


def by_split(run: Callable[[], Any], letters: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return q, k and v from the first split into as many parts as there are letters."""
    found: list[tuple[Tensor, ...]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def split(*args: Any, **kwargs: Any) -> Any:
            parts = function(*args, **kwargs)
            if len(parts) == len(letters) and not found:
                found.append(tuple(part.detach().clone() for part in parts))
            return parts

        return split

    with monkeypatch.context() as patch:
        for holder in (torch, torch.Tensor):
            for name in ("split", "chunk"):
                patch.setattr(holder, name, watched(getattr(holder, name)))
        run()
    return {letter: part for letter, part in zip(letters, found[0], strict=True) if letter != "-"}


SPLITS: dict[str, tuple[str, Callable[[], Case]]] = {}


def _split_case(letters: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register an attention with the order in which its code splits the weight's product; "-" is something else."""

    def keep(make: Callable[[], Case]) -> Callable[[], Case]:
        SPLITS[make.__name__] = letters, make
        return make

    return keep


@_split_case("qkv")
def mobilevit() -> Case:
    return _timm("models.mobilevit", "LinearSelfAttention", 16), (_image(),), {}


@_split_case("qkv")
def mobilevit_transformers() -> Case:
    model = _transformers("mobilevitv2", "MobileViTV2LinearSelfAttention", "MobileViTV2Config", 16)
    return model, (_image(),), {}


@_split_case("qkv")
def efficientvit() -> Case:
    return _timm("models.efficientvit_mit", "LiteMLA", 16, 16, dim=8, scales=()), (_image(),), {}


@_split_case("qkv")
def lambda_network() -> Case:
    return _timm("layers.lambda_layer", "LambdaLayer", 16, num_heads=2, dim_head=4, r=3), (_image(),), {}


@_split_case("qkv")
def minimax_lightning() -> Case:
    settings = {**_SMALL, "num_key_value_heads": 4, "layer_types": ["linear_attention"]}
    model = _transformers("minimax", "MiniMaxLightningAttention", "MiniMaxConfig", 0, **settings)
    return model, (_tokens(width=32),), {"position_embeddings": None, "attention_mask": None}


@_split_case("qkv-")
def qwen3_next() -> Case:
    return _delta("qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig")


@_split_case("qkv")
def qwen3_5() -> Case:
    return _delta("qwen3_5", "Qwen3_5GatedDeltaNet", "Qwen3_5TextConfig")


def _delta(module: str, name: str, config: str) -> Case:
    """Two heads of keys, four of values."""
    settings = {
        **_SMALL, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention"],
    }  # fmt: skip
    return _transformers(module, name, config, 0, **settings), (_tokens(width=32),), {}


@_split_case("kv")
def esmfold() -> Case:
    """Invariant point attention: keys and values head by head, queries separate."""
    package = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    sizes = {"sequence_dim": 16, "pairwise_dim": 6, "ipa_dim": 8, "num_heads_ipa": 2, "num_qk_points": 2}
    model = package.EsmFoldInvariantPointAttention(SimpleNamespace(**sizes, num_v_points=3, inf=1e5, epsilon=1e-8))
    # Some of its weights are left uninitialized, the last one starts at zero.
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    rigid = package.Rigid.identity((2, 5), requires_grad=False)
    return model, (torch.randn(2, 5, 16), torch.randn(2, 5, 5, 6), rigid, torch.ones(2, 5)), {}


@pytest.mark.law("fused-layouts")
@pytest.mark.parametrize("name", SPLITS)
def test_rows_of_a_split(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    letters, make = SPLITS[name]
    module, args, kwargs = make()
    module.eval()
    (attention,) = attentions(module)
    look = functools.partial(by_split, lambda: module(*args, **kwargs), letters, monkeypatch)
    check_letters(module, attention, look, letters)


# -- One weight for two ------------------------------------------------------------------------


def test_a_weight_that_is_q_and_k_is_taken_once() -> None:
    package = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=16, attention_head_size=4, num_attention_heads=2
    )
    attention = package.ReformerAttention(config, layer_id=1)
    (found,) = attentions(attention)
    assert [(target.role, target.module, target.rows) for target in found.targets("qk")] == [
        ("q", "self_attention.query_key", None)
    ]
    assert [target.role for target in found.targets("kv")] == ["k", "v"]


def test_a_weight_that_is_k_and_v_is_taken_once() -> None:
    settings = {**_SMALL, "head_dim": 8, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 4, "qk_rope_head_dim": 4}
    (found,) = attentions(_transformers("deepseek_v4", "DeepseekV4Attention", "DeepseekV4Config", 0, **settings))
    assert [(t.role, t.module, t.rows) for t in found.targets("qv")] == [
        ("q", "q_b_proj", None),
        ("v", "kv_proj", None),
    ]
    assert [(t.role, t.module) for t in found.targets("kvo")] == [("k", "kv_proj"), ("o", "o_b_proj")]


# -- What is not known -------------------------------------------------------------------------


class Unknown(nn.Module):
    """An attention of a class that is not in the table."""

    def __init__(self, name: str, out: int, width: int = 12, **attributes: Any) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(16, out))
        self.out_proj = nn.Linear(width, 16)
        for attribute, value in attributes.items():
            setattr(self, attribute, value)


def rows(module: nn.Module, letters: str = "qkv") -> dict[str, Rows | None]:
    (attention,) = attentions(module)
    return {target.role: target.rows for target in attention.targets(letters)}


@pytest.mark.law("fused-rows")
@pytest.mark.parametrize("name", ["qkv", "Wqkv", "to_qkv", "qkv_proj", "c_attn", "W_pack"])
def test_three_equal_parts(name: str) -> None:
    assert rows(Unknown(name, 36)) == {"q": Rows(0, 12, 36), "k": Rows(12, 12, 36), "v": Rows(24, 12, 36)}


@pytest.mark.law("fused-rows")
@pytest.mark.parametrize(
    "attributes",
    [
        {"num_heads": 6, "num_kv_heads": 3},
        {"n_heads": 6, "num_key_value_heads": 3, "head_dim": 2},
        {"num_heads": 6, "num_key_value_groups": 2},
        {"config": SimpleNamespace(num_attention_heads=6, num_key_value_heads=3)},
    ],
)
def test_sizes_by_the_numbers_of_heads(attributes: dict[str, Any]) -> None:
    """24 rows are divisible by three as well."""
    assert rows(Unknown("qkv", 24, **attributes)) == {"q": Rows(0, 12, 24), "k": Rows(12, 6, 24), "v": Rows(18, 6, 24)}


@pytest.mark.law("fused-rows")
@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Unknown("query_key_value", 36), "different ways"),
        (Unknown("linear_qkv", 36, num_heads=4), "different ways"),
        (Unknown("qkv", 24), "do not follow"),
        (Unknown("qkv", 37), "do not follow"),
        (Unknown("qkv", 24, num_heads=6, num_kv_heads=2, head_dim=2), "do not follow"),
        (Unknown("to_qkv_mlp_proj", 36), "different ways"),
        (type("BloomAttention", (Unknown,), {})("query_key_value", 36), "how many heads"),
        (type("FalconAttention", (Unknown,), {})("query_key_value", 36), "attributes are not those"),
        (type("BloomAttention", (Unknown,), {})("query_key_value", 36, num_heads=5), "blocks of 6 rows"),
    ],
)
def test_no_guess_at_rows(module: nn.Module, why: str) -> None:
    with pytest.raises(TargetError, match=rf"layout of the rows in a \w+ is unknown: .*{why}.*tnadapt.Rows"):
        rows(module)
    # The output projection is not in doubt.
    assert rows(module, "o") == {"o": None}


@pytest.mark.law("fused-rows")
def test_no_guess_at_keys_and_values() -> None:
    module = Unknown("kv", 20)
    module.q = nn.Linear(16, 12)
    with pytest.raises(TargetError, match="kv computes k, v with one weight of 20 rows"):
        rows(module)
    assert rows(module, "q") == {"q": None}


def test_a_name_that_is_half_understood() -> None:
    """A query with a gate in it, as in A.X K2, is not silently skipped."""
    module = type("LatentAttention", (nn.Module,), {})()
    module.q_gate_proj, module.k_proj, module.v_proj = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
    with pytest.raises(TargetError, match="q_gate_proj of LatentAttention seems to compute q, but with which"):
        rows(module, "qv")
    assert rows(module, "v") == {"v": None}


# -- The rows found in a checkpoint are those found in its model: the same numbers, role by role -----------------------

# transformers may save weights under other names than in memory, so the numbers are compared: no two rows of these
# models are equal.


# A checkpoint has lists of sizes, one for each stage, and nothing says which stage a weight belongs to.
REFUSED = {"levit": "queries_keys_values"}

# What a role's targets are, told by their numbers.
Numbers = dict[tuple[str, bytes], Target]


def numbers(targets: list[Target], tensors: Mapping[str, Tensor]) -> Numbers:
    found = {}
    for target in targets:
        array = target.select(tensors[target.name].detach()).contiguous().numpy()
        found[target.role, array.tobytes()] = target
    assert len(found) == len(targets)
    return found


def compare(model: nn.Module, stored: Mapping[str, Tensor], config: Any) -> None:
    """The checkpoint's targets have the model's numbers, in layers of the same weights, q before k before v."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    in_memory = {**dict(model.named_parameters()), **model.state_dict()}
    for roles in ("qkvo", "qv", "q", "k", "v", "o"):
        there = find_targets(model, roles, untie=True)
        here = find_stored(shapes, roles, config)
        theirs, ours = numbers(there, in_memory), numbers(here, stored)
        assert theirs.keys() == ours.keys(), roles
        assert [theirs[key].shape for key in ours] == [target.shape for target in here]
        layers = {(theirs[key].layer, target.layer) for key, target in ours.items()}
        assert len(layers) == len({one for one, _ in layers}) == len({one for _, one in layers})
        # Where the names say at all which is which, they say it rightly.
        pairs = paired(there, here)
        if pairs is not None:
            assert pairs == [ours[key] for key in theirs]
        if all(target.name in stored for target in there):
            assert set(there) == set(here)
            assert pairs == there


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", CONFIGURED)
def test_a_saved_model_has_the_targets_of_the_one_in_memory(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = configured(name)
    model.save_pretrained(tmp_path)
    stored, config = load_file(tmp_path / "model.safetensors"), open_checkpoint(tmp_path).config
    if name in REFUSED:
        with pytest.raises(LayoutError, match=f"'{REFUSED[name]}' in different ways"):
            compare(model, stored, config)
    else:
        compare(model, stored, config)


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - CONFIGURED.keys() - {"torchvision_resnet"}))
def test_a_state_dict_has_the_targets_of_its_model(name: str) -> None:
    model, _ = build(name)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    config: Any = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config) if config is not None else None
    compare(model, model.state_dict(), config)


# -- Every class of the table ------------------------------------------------------------------

# The config.json of a model of the attention in each case of test_fused; None for what a checkpoint says too little of.
CONFIGS: dict[str, dict[str, Any] | None] = {
    "gpt_neox_japanese": {"model_type": "gpt_neox_japanese", "num_attention_heads": 4},
    "persimmon": {"model_type": "persimmon", "num_attention_heads": 4},
    "deberta": {"model_type": "deberta", "num_attention_heads": 4},
    "exaone_vision": {"model_type": "exaone4_5_vision", "num_heads": 4, "num_key_value_heads": 2},
    "dbrx": {"model_type": "dbrx", "n_heads": 4, "attn_config": {"kv_n_heads": 2}},
    "bark": {"model_type": "semantic", "num_heads": 4},
    "openai_gpt": {"model_type": "openai-gpt", "n_head": 4},
    "kolors_text": {
        "model_type": "chatglm", "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
    },
    "kolors_text_heads": {"model_type": "chatglm", "num_attention_heads": 4, "multi_query_attention": False},
    "chatglm": {"model_type": "chatglm", "num_attention_heads": 4, "position_encoding_2d": True},
    "internlm2": {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "moss": {"model_type": "moss", "n_head": 8},
    "qwen": {"model_type": "qwen", "num_attention_heads": 4},
    "mpt_grouped": {"model_type": "mpt", "n_heads": 4, "attn_config": {"kv_n_heads": 2}},
    "baichuan": {"model_type": "baichuan", "num_attention_heads": 4},
    "mobilevit_transformers": {"model_type": "mobilevitv2"},
    "minimax_lightning": {"model_type": "minimax", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_next": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    },
    "qwen3_5": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    },
    # Plain names, which need no config.
    "tnt": {}, "maxxvit": None, "gcvit": None, "mobilenet_multi_query": {}, "joy_image": {}, "guided_diffusion": None,
}  # fmt: skip

# Whole models of these are above, or the library that ships the class is the model's own repository.
ELSEWHERE = {
    "BloomAttention", "GPTNeoXAttention", "FalconAttention", "GPTBigCodeAttention", "CodeGenAttention", "GPT2Attention",
    "ImageGPTAttention", "DecisionTransformerGPT2Attention", "Phi3Attention", "MptAttention", "ModernBertAttention",
    "LSHSelfAttention", "DeepseekV4Attention",
}  # fmt: skip
# Of the same code as one that is compared: Phi3Attention's, and ParallelScalingBlock's.
ALIKE = {"Phi4MultimodalAttention", "timm.models.vision_transformer.DiffParallelScalingBlock"}


def _cases() -> dict[str, Callable[[], Any]]:
    return {**ATTENTIONS, **{name: make for name, (_, make) in SPLITS.items()}}


def _in_checkpoint(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {f"layers.0.attn.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _rows(targets: list[Target]) -> set[Any]:
    return {(t.name.removeprefix("layers.0.attn."), t.stored, t.role, t.rows, t.transposed) for t in targets}


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", _cases())
def test_an_attention_in_a_checkpoint_is_read_as_in_memory_or_refused(name: str) -> None:
    torch.manual_seed(0)
    module, _, _ = _cases()[name]()
    in_memory = _rows([target for found in attentions(module) for target in found.targets("qkv")])
    shapes, own = _in_checkpoint(module), CONFIGS.get(name)
    if name.startswith("maxxvit"):
        # timm's models all have it; bare, this attention cannot be told from a vision transformer's.
        shapes["layers.0.attn.rel_pos.relative_position_bias_table"] = (2, 7, 7)
    if own is not None:
        assert _rows(find_stored(shapes, "qkv", own)) == in_memory
    # With a config that says less, or with none, never other rows.
    others: list[Any] = [None, {}, {"model_type": "unheard of"}, {"num_attention_heads": 4, "num_key_value_heads": 2}]
    for config in others:
        with contextlib.suppress(TargetError):
            assert _rows(find_stored(shapes, "qkv", config)) == in_memory, config


@pytest.mark.law("fused-on-disk")
def test_every_class_of_the_table_is_built_somewhere() -> None:
    seen = set(ELSEWHERE | ALIKE)
    for make in _cases().values():
        try:
            module, _, _ = make()
        except pytest.skip.Exception:
            pytest.skip("a library whose classes the table has is not installed")
        for part in module.modules():
            seen |= {name for cls in type(part).__mro__ for name in (cls.__name__, f"{cls.__module__}.{cls.__name__}")}
    missing = {name for entry in TABLE for name in entry.classes} - seen
    assert not missing
    models = {type(part).__name__ for name in CONFIGURED for part in configured(name).modules()}
    assert models >= ELSEWHERE


# -- Models of timm ---------------------------------------------------------------------------

_TIMM = {
    # As a state dict has them, with or without timm's config.json.
    True: [
        "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "cait_xxs24_224",
        "mvitv2_tiny", "volo_d1_224", "tnt_s_patch16_224", "hiera_tiny_224", "mobilenetv4_hybrid_medium",
    ],
    # Of layouts that only the classes tell.
    False: [
        "coatnet_0_rw_224", "maxvit_tiny_rw_224", "levit_128s", "tiny_vit_5m_224", "efficientformer_l1",
        "gcvit_xxtiny", "shvit_s1", "efficientvit_b0", "halonet26t", "botnet26t_256", "lambda_resnet26t",
    ],
}  # fmt: skip


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize(("name", "found"), [(name, found) for found, names in _TIMM.items() for name in names])
def test_a_model_of_timm_is_read_as_in_memory_or_refused(name: str, found: bool) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for config in ({"architecture": name}, None):
        if found:
            assert set(find_stored(shapes, "qkvo", config)) == set(find_targets(model, "qkvo"))
        else:
            assert find_targets(model, "qkv")
            with pytest.raises(LayoutError, match="in an unknown layout"):
                find_stored(shapes, "qkv", config)


def test_a_mobilevit_of_timm_needs_its_config() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("mobilevitv2_050", pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert set(find_stored(shapes, "qkvo", {"architecture": "mobilevitv2_050"})) == set(find_targets(model, "qkvo"))
    with pytest.raises(LayoutError, match=r"there is no config\.json"):
        find_stored(shapes, "qkvo")


# -- From two checkpoints and back --------------------------------------------------------------

FUSED = [
    "deberta", "bloom", "gpt_neox", "persimmon", "falcon_old", "falcon_multi_query", "falcon_new", "gpt_bigcode",
    "gpt_bigcode_heads", "codegen", "mpt", "phi3", "modernbert", "gpt2", "minimax", "qwen3_next", "deepseek_v2",
    "qwen2_vl", "radio", "reformer",
]  # fmt: skip


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", FUSED)
def test_an_adapter_from_two_checkpoints_is_all_that_was_tuned_in_memory(name: str, tmp_path: Path) -> None:
    base = configured(name)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for target in find_targets(tuned, "qv", untie=True):
            block = target.block(tuned.get_parameter(target.name))
            block += torch.randn(block.shape, generator=torch.Generator().manual_seed(1))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", tna.presets.dense())
    # Nothing was tuned but the rows that were found, and these wholly.
    assert found.others == ()
    tna.save(tmp_path / "a.safetensors", found.file)
    adapter = tt.load(base, tmp_path / "a.safetensors")
    adapter.merge()
    merged = base.state_dict()
    for key, expected in tuned.state_dict().items():
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-5)


# -- Order ------------------------------------------------------------------------------------------------------

# Models whose linear layers have the order of common models.
ORDERED = [
    "bart", "bert", "bloom", "clip", "deberta", "dinov2", "falcon_new", "gpt2", "gpt_neox", "gptj", "hiera", "llama",
    "minicpm3", "modernbert", "mpt", "openai_gpt", "opt", "qwen2_vl", "reformer", "sam", "siglip", "swin", "t5",
    "torch_encoder", "vit", "whisper",
]  # fmt: skip


def _spelled(names: list[str], seed: int) -> list[Any]:
    """Return the same targets in several spellings."""
    shuffled = random.Random(seed).sample(names, len(names))
    return [names, shuffled, [*shuffled, *names[:3]], "|".join(map(re.escape, shuffled)), tuple(reversed(names))]


@pytest.mark.parametrize("name", ORDERED)
def test_targets_of_a_checkpoint_are_in_the_order_of_the_model(name: str) -> None:
    model = configured(name) if name in CONFIGURED else build(name)[0]
    config = model.config.to_dict() if hasattr(model, "config") else None
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shuffled = dict(random.Random(0).sample(list(shapes.items()), len(shapes)))
    for roles in ("qv", "kqvo"):
        assert find_stored(shuffled, roles, config) == find_targets(model, roles, untie=True)
    names = [target.module for target in find_targets(model, "all-linear", untie=True)]
    expected = find_targets(model, names, untie=True)
    for spelling in _spelled(names, 1):
        assert find_targets(model, spelling, untie=True) == expected
        assert find_stored(shuffled, spelling, config) == expected


def test_given_targets_keep_their_order_on_disk() -> None:
    model, _ = build("bert")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    targets = find_targets(model)[::-1]
    assert find_stored(shapes, targets) == find_targets(model, targets) == targets


# -- Named cases --------------------------------------------------------------------------------


def test_all_roles_of_a_bert_and_a_llama() -> None:
    for name in ("bert", "llama"):
        model, _ = build(name)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert find_stored(shapes, "qkvo") == find_targets(model, "qkvo")


def test_paths_and_patterns() -> None:
    model, _ = build("bert")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    by_path = find_stored(shapes, ["attention.self.query", "intermediate.dense"])
    assert {target.role for target in by_path} == {"linear"}
    assert find_stored(shapes, r".*\.query") == [target for target in by_path if "query" in target.module]
    for wrong, match in (
        (["qery"], "such as .*query"),
        ("(", "nor a regular expression"),
        (3, "must be roles"),
        ("nothing.*", "no tensor of the checkpoint"),
    ):
        with pytest.raises(TargetError, match=match):
            find_stored(shapes, wrong)


def test_an_empty_checkpoint_says_so() -> None:
    with pytest.raises(TargetError, match="no weights of layers at all"):
        find_stored({"norm.weight": (4,)})

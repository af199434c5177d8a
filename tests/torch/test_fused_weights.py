"""The rows of fused weights, in models and in checkpoints.

In a model they are verified by changing them and observing the attention's products.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.errors import TargetError
from tnadapt.targets.prefixes import paired
from tnadapt.targets.target import Rows, Target
from tnadapt.torch import find_targets

from .architectures import MODELS, TEXT, build
from .configured import CONFIGURED, configured
from .internals import TABLE, LayoutError, TargetSearch, find_stored

# An attention computes two products: q with k, then the result with v. A mode of torch's dispatcher observes these
# products in any code. The rows of v are right if changing them changes only v, and the same for q and k.


class Products(TorchDispatchMode):
    """Records the operands of products of queries, keys and values."""

    def __init__(self, operands: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.operands = operands

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.operands.append(tuple(args))
        elif func is torch.ops.aten.baddbmm.default:
            self.operands.append(tuple(args[1:]))
        elif "scaled_dot_product" in str(func):
            self.operands.append(tuple(args[:3]))
        return func(*args, **(kwargs or {}))


def by_products(run: Callable[[], Any], attention: nn.Module, right: bool = False) -> dict[str, Tensor]:
    """Return q, k and v as the attention multiplies them in its first call.

    ``right`` if v is the left operand of its product.
    """
    operands: list[tuple[Tensor, ...]] = []
    forward = attention.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if operands else Products(operands):
            return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward", watched)
        run()
    scores, mixed = operands[0], operands[-1]
    of_letters = scores if len(scores) == 3 else (*scores, mixed[0 if right else 1])
    return {letter: tensor.detach().clone() for letter, tensor in zip("qkv", of_letters, strict=True)}


def check_letters(model: nn.Module, targets: Sequence[Target], look: Callable[[], dict[str, Tensor]]) -> None:
    """Check that changing the rows of each letter changes only that operand."""
    before = look()
    assert targets
    for target in targets:
        parameter = model.get_submodule(target.module).get_parameter(target.parameter)
        weight = parameter.detach().clone()
        with torch.no_grad():
            target.block(parameter).add_(target.like_block(torch.randn(target.shape) + 1.0))
        after = look()  # with gradients, without which torch's layers have another way
        with torch.no_grad():
            parameter.copy_(weight)
        changed = {letter for letter in before if not torch.equal(before[letter], after[letter])}
        assert changed == {target.role}, target
    again = look()
    assert all(torch.equal(before[letter], again[letter]) for letter in before)


def targets_of(module: nn.Module, letters: str) -> list[Target]:
    """The targets of a module with one attention."""
    search = TargetSearch(module)
    (attention,) = search.attentions
    return search.targets_of(attention, letters)


def check_attentions(model: nn.Module, inputs: Mapping[str, Any], most: int | None = None) -> None:
    search = TargetSearch(model)
    several = search.attentions[:most]
    assert several
    for attention in several:
        module, targets = search.modules[attention.path], search.targets_of(attention, "qkv")
        check_letters(model, targets, lambda here=module: by_products(lambda: model(**inputs), here))


@pytest.mark.slow
@pytest.mark.law("fused-keys")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"torchvision_resnet"}))
def test_rows_make_what_they_are_said_to(name: str) -> None:
    # The diffusion models' attentions are many and alike.
    check_attentions(*build(name), most=2 if name in {"paper_unet", "diffusers_unet"} else None)


@pytest.mark.law("fused-rows")
def test_rows_of_the_weights_that_diffusers_fuses() -> None:
    model, inputs = build("diffusers_unet")
    model.fuse_qkv_projections()
    check_attentions(model, inputs, most=2)


# -- Single attentions: their products are q with k and the result with v, or their own code splits q, k and v ---------

#: An attention, and the arguments of a call.
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Call = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


def tokens(length: int = 16, width: int = 16, number: int = 1) -> Call:
    return lambda module: (tuple(torch.randn(2, length, width) for _ in range(number)), {})


def image(*shape: int) -> Call:
    return lambda module: ((torch.randn(2, *shape),), {})


def attention(call: Call, path: str, *args: Any, config: str = "", **settings: Any) -> Callable[[], Case]:
    """Build an attention of a library from its arguments, or from a config of its module and further arguments."""

    def make() -> Case:
        place, _, name = path.rpartition(".")
        package = pytest.importorskip(place)
        if not config:
            module = getattr(package, name)(*args, **settings)
            return module, *call(module)
        made = getattr(package, config)(**settings)
        made._attn_implementation = "eager"
        module = getattr(package, name)(made, *args)
        return module, *call(module)

    return make


def hugging_face(call: Call, module: str, name: str, config: str, *args: Any, **settings: Any) -> Callable[[], Case]:
    return attention(call, f"transformers.models.{module}.modeling_{module}.{name}", *args, config=config, **settings)


class Bare(nn.Module):
    """An attention with one weight, and an output projection of 12 columns if they are not given."""

    def __init__(self, name: str, rows: int, out: str = "out_proj", cols: int = 12, **attributes: Any) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(16, rows))
        self.add_module(out, nn.Linear(cols, 16))
        for attribute, value in attributes.items():
            setattr(self, attribute, value)


def of_a_repository(name: str, weight: str, rows: int, out: str, **attributes: Any) -> Callable[[], Case]:
    """Build what a layout is told by of an attention of a model's own repository, whose classes are not installed."""
    return lambda: (type(name, (Bare,), {})(weight, rows, out, cols=32, **attributes), (), {})


class QKVAttention(nn.Module):
    """q, k and v, then heads; the first release: heads, then q, k and v."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        if type(self).__name__ == "QKVAttention":
            parts = qkv.unflatten(1, (3, self.n_heads, -1)).transpose(0, 1)
        else:
            parts = qkv.unflatten(1, (self.n_heads, 3, -1)).permute(2, 0, 1, 3, 4)
        q, k, v = (part.mT for part in parts)
        return nn.functional.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)


class AttentionBlock(nn.Module):
    """As in OpenAI's diffusion models: a 1x1 convolution, and a module of a known name that splits its result."""

    def __init__(self, splitting: str) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(16, 48, 1)
        self.attention = type(splitting, (QKVAttention,), {})(2)
        self.proj_out = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.attention(self.qkv(x)))


def _angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).float(), torch.rand(size))[None]
    return angles.cos(), angles.sin()


def _rotated(module: Any, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    size = module.rotary_ndims if hasattr(module, "rotary_ndims") else module.head_dim
    return (torch.randn(2, 16, 32),), {"position_embeddings": _angles(16, size), **more}


def _masked(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _rotated(module, attention_mask=torch.zeros(2, 1, 16, 16), position_ids=torch.arange(16)[None])


def _image_of_exaone(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cos, sin = _angles(8, module.head_dim)
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    return (torch.randn(8, 32),), {"cu_seqlens": bounds, "position_embeddings": (cos[0], sin[0])}


def _openai_gpt() -> Case:
    package = pytest.importorskip("transformers.models.openai.modeling_openai")
    config = pytest.importorskip("transformers").OpenAIGPTConfig(n_embd=32, n_head=4, n_positions=16)
    return package.Attention(32, 16, config), (torch.randn(2, 16, 32),), {}


def _esmfold() -> Case:
    """Invariant point attention: keys and values head by head, queries separate."""
    package = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    sizes = {"sequence_dim": 16, "pairwise_dim": 6, "ipa_dim": 8, "num_heads_ipa": 2, "num_qk_points": 2}
    model = package.EsmFoldInvariantPointAttention(SimpleNamespace(**sizes, num_v_points=3, inf=1e5, epsilon=1e-8))
    # Some of its weights are left uninitialized, the last one starts at zero.
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    rigid = package.Rigid.identity((2, 5), requires_grad=False)
    return model, (torch.randn(2, 5, 16), torch.randn(2, 5, 5, 6), rigid, torch.ones(2, 5)), {}


_IMAGE, _TOKENS, _WIDE = image(16, 4, 4), tokens(), tokens(width=32)
_LEVIT = {"num_heads": 2, "attn_ratio": 3, "resolution": (4, 4)}
_SMALL = {**TEXT, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
#: Two heads of keys, four of values.
_DELTA = {
    **_SMALL, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention"],
}  # fmt: skip

_KOLORS = "diffusers.pipelines.kolors.text_encoder.SelfAttention"
_CHATGLM = {
    "config": "ChatGLMConfig", "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "num_layers": 1,
}  # fmt: skip
_CHANNELS_LAST, _SEQUENCE = image(4, 4, 16), lambda module: ((torch.randn(6, 2, 32), None, None), {})

ATTENTIONS: dict[str, Callable[[], Case]] = {
    "levit": attention(_TOKENS, "timm.models.levit.Attention", 16, 4, **_LEVIT),
    "levit_conv": attention(_IMAGE, "timm.models.levit.Attention", 16, 4, use_conv=True, **_LEVIT),
    "levit_downsample": attention(_TOKENS, "timm.models.levit.AttentionDownsample", 16, 24, 4, stride=2, **_LEVIT),
    "efficientformer": attention(_TOKENS, "timm.models.efficientformer.Attention", 16, 4, 2, 3, resolution=4),
    "tiny_vit": attention(_TOKENS, "timm.models.tiny_vit.Attention", 16, 4, **_LEVIT),
    "maxxvit_heads_first": attention(_IMAGE, "timm.models.maxxvit.Attention2d", 16, dim_head=8, head_first=True),
    "maxxvit": attention(_CHANNELS_LAST, "timm.models.maxxvit.AttentionCl", 16, dim_head=8, head_first=False),
    "maxxvit_last": attention(_CHANNELS_LAST, "timm.models.maxxvit.AttentionCl", 16, dim_head=8, head_first=True),
    "timm_2d": attention(_IMAGE, "timm.layers.attention2d.Attention2d", 16, num_heads=2, head_first=True),
    "gcvit": attention(_TOKENS, "timm.models.gcvit.WindowAttentionGlobal", 16, 2, 4, use_global=False),
    # Keys and values alone, under the name qkv.
    "gcvit_global": attention(tokens(number=2), "timm.models.gcvit.WindowAttentionGlobal", 16, 2, 4, use_global=True),
    "shvit": attention(image(24, 4, 4), "timm.models.shvit.SHSA", 24, 4, 10),
    # The MLP's input in the same weight, before q, k and v.
    "parallel_scaling": attention(_TOKENS, "timm.models.vision_transformer.ParallelScalingBlock", 16, 2),
    "bottleneck": attention(
        _IMAGE, "timm.layers.bottleneck_attn.BottleneckAttn", 16, feat_size=(4, 4), num_heads=2, dim_head=4
    ),
    "halo": attention(
        _IMAGE, "timm.layers.halo_attn.HaloAttn", 16, num_heads=2, dim_head=4, block_size=2, halo_size=1
    ),
    # q and k in one weight, v apart.
    "tnt": attention(_TOKENS, "timm.models.tnt.Attention", 16, 16, num_heads=2),
    # Projections inside a Sequential, with pooling.
    "mobilenet": attention(_IMAGE, "timm.layers.attention2d.MultiQueryAttention2d", 16, num_heads=2, kv_stride=2),
    "gpt_neox_japanese": hugging_face(
        _masked, "gpt_neox_japanese", "GPTNeoXJapaneseAttention", "GPTNeoXJapaneseConfig", False, 0, **_SMALL
    ),
    "persimmon": hugging_face(_rotated, "persimmon", "PersimmonAttention", "PersimmonConfig", 0, **_SMALL),
    "deberta": hugging_face(
        lambda module: ((torch.randn(2, 16, 32), torch.ones(2, 1, 16, 16)), {}),
        "deberta", "DisentangledSelfAttention", "DebertaConfig", **_SMALL,
    ),
    "levit_transformers": hugging_face(_TOKENS, "levit", "LevitAttention", "", 16, 4, 2, 3, 4),
    "levit_subsample": hugging_face(_TOKENS, "levit", "LevitAttentionSubsample", "", 16, 24, 4, 2, 3, 2, 4, 2),
    "exaone_vision": hugging_face(
        _image_of_exaone, "exaone4_5", "Exaone4_5_VisionAttention", "Exaone4_5_VisionConfig",
        hidden_size=32, num_heads=4, num_key_value_heads=2, depth=1,
    ),
    # Fewer heads of keys and values, one after another.
    "dbrx": hugging_face(
        _rotated, "dbrx", "DbrxAttention", "DbrxConfig", 0, d_model=32, n_heads=4, max_seq_len=16,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 99.0},
    ),
    "bark": hugging_face(
        _WIDE, "bark", "BarkSelfAttention", "BarkSemanticConfig", False, 0, hidden_size=32, num_heads=4, num_layers=1,
        block_size=16,
    ),
    "openai_gpt": _openai_gpt,
    # ChatGLM: all queries, then groups of keys and of values.
    "kolors_text": attention(_SEQUENCE, _KOLORS, 1, multi_query_attention=True, multi_query_group_num=2, **_CHATGLM),
    "kolors_text_heads": attention(_SEQUENCE, _KOLORS, 1, multi_query_attention=False, **_CHATGLM),
    # The MLP's input in the same weight, after q, k and v.
    "flux2_parallel": attention(
        _WIDE, "diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttention",
        query_dim=32, heads=4, dim_head=8,
    ),
    # Two streams, each with a fused weight.
    "joy_image": attention(
        lambda module: ((torch.randn(2, 8, 32), torch.randn(2, 5, 32)), {}),
        "diffusers.models.transformers.transformer_joyimage.JoyImageAttention",
        dim=32, num_attention_heads=4, attention_head_dim=8,
    ),
    "guided_diffusion": lambda: (AttentionBlock("QKVAttention"), (torch.randn(2, 16, 9),), {}),
    "guided_diffusion_legacy": lambda: (AttentionBlock("QKVAttentionLegacy"), (torch.randn(2, 16, 9),), {}),
    "internlm2": of_a_repository(
        "InternLM2Attention", "wqkv", 64, "wo", num_heads=4, num_key_value_heads=2, head_dim=8
    ),
    "moss": of_a_repository("MossAttention", "qkv_proj", 96, "out_proj"),
    "qwen": of_a_repository("QWenAttention", "c_attn", 96, "c_proj", num_heads=4, head_dim=8),
    "mpt_grouped": of_a_repository(
        "GroupedQueryAttention", "Wqkv", 64, "out_proj", num_heads=4, kv_n_heads=2, head_dim=8
    ),
    "baichuan": of_a_repository("BaichuanAttention", "W_pack", 96, "o_proj", num_heads=4, head_dim=8),
    "chatglm": of_a_repository(
        "SelfAttention", "query_key_value", 96, "dense", num_attention_heads=4, num_attention_heads_per_partition=4,
        hidden_size_per_attention_head=8, position_encoding_2d=True,
    ),
    "mobilevit": attention(_IMAGE, "timm.models.mobilevit.LinearSelfAttention", 16),
    "mobilevit_transformers": hugging_face(
        _IMAGE, "mobilevitv2", "MobileViTV2LinearSelfAttention", "MobileViTV2Config", 16
    ),
    "efficientvit": attention(_IMAGE, "timm.models.efficientvit_mit.LiteMLA", 16, 16, dim=8, scales=()),
    "lambda_network": attention(_IMAGE, "timm.layers.lambda_layer.LambdaLayer", 16, num_heads=2, dim_head=4, r=3),
    "minimax_lightning": hugging_face(
        lambda module: ((torch.randn(2, 16, 32),), {"position_embeddings": None, "attention_mask": None}),
        "minimax", "MiniMaxLightningAttention", "MiniMaxConfig", 0, num_key_value_heads=4,
        layer_types=["linear_attention"], **_SMALL,
    ),
    "qwen3_next": hugging_face(_WIDE, "qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig", 0, **_DELTA),
    "qwen3_5": hugging_face(_WIDE, "qwen3_5", "Qwen3_5GatedDeltaNet", "Qwen3_5TextConfig", 0, **_DELTA),
    "esmfold": _esmfold,
}  # fmt: skip
#: Of other kinds than two products: the order in which their code splits the weight's product; "-" is something else.
SPLITS = {
    **dict.fromkeys(("mobilevit", "mobilevit_transformers", "efficientvit", "lambda_network"), "qkv"),
    "minimax_lightning": "qkv", "qwen3_next": "qkv-", "qwen3_5": "qkv", "esmfold": "kv",
}  # fmt: skip
# They multiply v with the average's weights, not these with v.
RIGHT = {"levit_conv", "shvit"}


def by_split(run: Callable[[], Any], letters: str) -> dict[str, Tensor]:
    """Return q, k and v from the first split into as many parts as there are letters."""
    found: list[tuple[Tensor, ...]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def split(*args: Any, **kwargs: Any) -> Any:
            parts = function(*args, **kwargs)
            if len(parts) == len(letters) and not found:
                found.append(tuple(part.detach().clone() for part in parts))
            return parts

        return split

    with pytest.MonkeyPatch.context() as patch:
        for holder in (torch, torch.Tensor):
            for name in ("split", "chunk"):
                patch.setattr(holder, name, watched(getattr(holder, name)))
        run()
    return {letter: part for letter, part in zip(letters, found[0], strict=True) if letter != "-"}


def thirds(total: int, kv: int | None = None) -> dict[str, Rows]:
    """Return the rows of q, k and v one after another, with as many of k as of v."""
    kv = total // 3 if kv is None else kv
    return {"q": Rows(0, total - 2 * kv, total), "k": Rows(total - 2 * kv, kv, total), "v": Rows(total - kv, kv, total)}


#: The rows of attentions whose own code cannot run here.
ROWS = {
    # Each head of keys, and of values, after the two heads of queries that use it.
    "internlm2": {"q": Rows(0, 16, 32, 2), "k": Rows(16, 8, 32, 2), "v": Rows(24, 8, 32, 2)},
    # Each of four parts has the queries, values and keys of its heads.
    "moss": {"q": Rows(0, 8, 24, 4), "v": Rows(8, 8, 24, 4), "k": Rows(16, 8, 24, 4)},
    "qwen": thirds(96), "mpt_grouped": thirds(64, 16), "baichuan": thirds(96),
    # The first ChatGLM: head by head.
    "chatglm": {"q": Rows(0, 8, 24, 4), "k": Rows(8, 8, 24, 4), "v": Rows(16, 8, 24, 4)},
}  # fmt: skip


def rows(module: nn.Module, letters: str = "qkv") -> dict[str, Rows | None]:
    return {target.role: target.rows for target in find_targets(module, letters)}


@pytest.mark.law("fused-layouts")
@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_of_one_attention(name: str) -> None:
    torch.manual_seed(0)
    module, args, kwargs = ATTENTIONS[name]()
    module.eval()
    if name in ROWS:
        assert rows(module) == ROWS[name]
        return
    run, letters = functools.partial(module, *args, **kwargs), SPLITS.get(name)
    targets = targets_of(module, letters or "qkv")
    if letters is None:
        check_letters(module, targets, lambda: by_products(run, module, name in RIGHT))
    else:
        check_letters(module, targets, lambda: by_split(run, letters))


_REFORMER = hugging_face(
    _TOKENS, "reformer", "ReformerAttention", "ReformerConfig", 1, hidden_size=16, attention_head_size=4,
    num_attention_heads=2,
)  # fmt: skip
_DEEPSEEK = hugging_face(
    _TOKENS, "deepseek_v4", "DeepseekV4Attention", "DeepseekV4Config", 0, head_dim=8, q_lora_rank=8, o_groups=2,
    o_lora_rank=4, qk_rope_head_dim=4, **_SMALL,
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "letters", "expected"),
    [
        (_REFORMER, "qk", [("q", "self_attention.query_key")]),
        (_REFORMER, "kv", [("k", "self_attention.query_key"), ("v", "self_attention.value")]),
        (_DEEPSEEK, "qv", [("q", "q_b_proj"), ("v", "kv_proj")]),
        (_DEEPSEEK, "kvo", [("k", "kv_proj"), ("o", "o_b_proj")]),
    ],
)
def test_a_weight_of_two_roles_is_taken_once(make: Any, letters: str, expected: list[tuple[str, str]]) -> None:
    targets = targets_of(make()[0], letters)
    assert [(target.role, target.module) for target in targets] == expected
    assert all(target.rows is None for target in targets)


BY_HEADS = thirds(24, 6)  # 24 rows are divisible by three as well


@pytest.mark.law("fused-rows")
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        *((Bare(name, 36), thirds(36)) for name in ("qkv", "Wqkv", "to_qkv", "qkv_proj", "c_attn", "W_pack")),
        (Bare("qkv", 24, num_heads=6, num_kv_heads=3), BY_HEADS),
        (Bare("qkv", 24, n_heads=6, num_key_value_heads=3, head_dim=2), BY_HEADS),
        (Bare("qkv", 24, num_heads=6, num_key_value_groups=2), BY_HEADS),
        (Bare("qkv", 24, config=SimpleNamespace(num_attention_heads=6, num_key_value_heads=3)), BY_HEADS),
    ],
)
def test_parts_by_the_numbers_of_heads_or_equal_ones(module: nn.Module, expected: dict[str, Rows]) -> None:
    assert rows(module) == expected


def _with(module: nn.Module, **layers: nn.Module) -> nn.Module:
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


UNKNOWN = r"layout of the rows in a \w+ is unknown: .*{}.*tnadapt.Rows"


@pytest.mark.law("fused-rows")
@pytest.mark.parametrize(
    ("module", "message", "sure"),
    [
        # The output projection is not in doubt.
        (Bare("query_key_value", 36), UNKNOWN.format("different ways"), "o"),
        (Bare("linear_qkv", 36, num_heads=4), UNKNOWN.format("different ways"), "o"),
        (Bare("qkv", 24), UNKNOWN.format("do not follow"), "o"),
        (Bare("qkv", 37), UNKNOWN.format("do not follow"), "o"),
        (Bare("to_qkv_mlp_proj", 36), UNKNOWN.format("different ways"), "o"),
        (type("BloomAttention", (Bare,), {})("query_key_value", 36), UNKNOWN.format("how many heads"), "o"),
        (
            type("FalconAttention", (Bare,), {})("query_key_value", 36),
            UNKNOWN.format("attributes are not those"),
            "o",
        ),
        (_with(Bare("kv", 20), q=nn.Linear(16, 12)), "kv computes k, v with one weight of 20 rows", "q"),
        # A query with a gate in it, as in A.X K2, is not silently skipped.
        (
            _with(
                type("LatentAttention", (nn.Module,), {})(),
                q_gate_proj=nn.Linear(8, 16), k_proj=nn.Linear(8, 8), v_proj=nn.Linear(8, 8),
            ),
            "q_gate_proj seems to produce q, but with which",
            "v",
        ),
    ],
)  # fmt: skip
def test_no_guess_at_rows(module: nn.Module, message: str, sure: str) -> None:
    with pytest.raises(TargetError, match=message):
        rows(module)
    assert rows(module, sure) == {sure: None}


# -- The rows found in a checkpoint are those found in its model: the same numbers, role by role -----------------------

# transformers may save weights under other names than in memory, so the numbers are compared: no two rows of these
# models are equal.


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def by_numbers(targets: list[Target], tensors: Mapping[str, Tensor]) -> dict[tuple[str, bytes], Target]:
    """Return targets by their roles and numbers."""
    found = {}
    for target in targets:
        array = target.select(tensors[target.name].detach()).contiguous().numpy()
        found[target.role, array.tobytes()] = target
    assert len(found) == len(targets)
    return found


def compare(model: nn.Module, stored: Mapping[str, Tensor], config: Any) -> None:
    """The checkpoint's targets have the model's numbers, in layers of the same weights, q before k before v."""
    in_memory = {**dict(model.named_parameters()), **model.state_dict()}
    for roles in ("qkvo", "qv", "q", "k", "v", "o"):
        there = find_targets(model, roles, untie=True)
        here = find_stored(shapes_of(stored), roles, config)
        theirs, ours = by_numbers(there, in_memory), by_numbers(here, stored)
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
@pytest.mark.parametrize("name", [*CONFIGURED, *sorted(MODELS.keys() - CONFIGURED.keys() - {"torchvision_resnet"})])
def test_a_checkpoint_has_the_targets_of_its_model(name: str, tmp_path: Path) -> None:
    stored: Mapping[str, Tensor]
    if name in CONFIGURED:
        model = configured(name)
        model.save_pretrained(tmp_path)
        stored, config = load_file(tmp_path / "model.safetensors"), open_checkpoint(tmp_path).config
    else:
        model, _ = build(name)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(number))
        stored, config = model.state_dict(), getattr(model, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else None if config is None else dict(config)
    if name == "levit":  # lists of sizes, one for each stage, and nothing says which stage a weight belongs to
        with pytest.raises(LayoutError, match="'queries_keys_values' in different ways"):
            compare(model, stored, config)
    else:
        compare(model, stored, config)


# The config.json of a model of the attention of ATTENTIONS; None for what a checkpoint says too little of.
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
    "tnt": {}, "maxxvit": None, "gcvit": None, "mobilenet": {}, "joy_image": {}, "guided_diffusion": None,
}  # fmt: skip

# Whole models of these are above, or the library that ships the class is the model's own repository.
ELSEWHERE = {
    "BloomAttention", "GPTNeoXAttention", "FalconAttention", "GPTBigCodeAttention", "CodeGenAttention", "GPT2Attention",
    "ImageGPTAttention", "DecisionTransformerGPT2Attention", "Phi3Attention", "MptAttention", "ModernBertAttention",
    "LSHSelfAttention", "DeepseekV4Attention",
}  # fmt: skip
# Of the same code as one that is compared: Phi3Attention's, and ParallelScalingBlock's.
ALIKE = {"Phi4MultimodalAttention", "timm.models.vision_transformer.DiffParallelScalingBlock"}


@pytest.mark.law("fused-on-disk")
def test_every_class_of_the_table_is_built_somewhere() -> None:
    seen = set(ELSEWHERE | ALIKE)
    for make in ATTENTIONS.values():
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


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_in_a_checkpoint_is_read_as_in_memory_or_refused(name: str) -> None:
    def described(targets: Iterable[Target]) -> set[Any]:
        return {(t.name.removeprefix("layers.0.attn."), t.stored, t.role, t.rows, t.transposed) for t in targets}

    torch.manual_seed(0)
    module, _, _ = ATTENTIONS[name]()
    in_memory = described(targets_of(module, "qkv"))
    shapes = {f"layers.0.attn.{key}": shape for key, shape in shapes_of(module.state_dict()).items()}
    if name.startswith("maxxvit"):
        # timm's models all have it; bare, this attention cannot be told from a vision transformer's.
        shapes["layers.0.attn.rel_pos.relative_position_bias_table"] = (2, 7, 7)
    if CONFIGS.get(name) is not None:
        assert described(find_stored(shapes, "qkv", CONFIGS[name])) == in_memory
    # With a config that says less, or with none, never other rows.
    others: list[Any] = [None, {}, {"model_type": "unheard of"}, {"num_attention_heads": 4, "num_key_value_heads": 2}]
    for config in others:
        with contextlib.suppress(TargetError):
            assert described(find_stored(shapes, "qkv", config)) == in_memory, config


_TIMM = {
    # As a state dict has them, with or without timm's config.json.
    None: [
        "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "cait_xxs24_224",
        "mvitv2_tiny", "volo_d1_224", "tnt_s_patch16_224", "hiera_tiny_224", "mobilenetv4_hybrid_medium",
    ],
    r"there is no config\.json": ["mobilevitv2_050"],
    # Of layouts that only the classes tell.
    "in an unknown layout": [
        "coatnet_0_rw_224", "maxvit_tiny_rw_224", "levit_128s", "tiny_vit_5m_224", "efficientformer_l1",
        "gcvit_xxtiny", "shvit_s1", "efficientvit_b0", "halonet26t", "botnet26t_256", "lambda_resnet26t",
    ],
}  # fmt: skip


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize(("name", "message"), [(name, message) for message, names in _TIMM.items() for name in names])
def test_a_model_of_timm_is_read_as_in_memory_or_refused(name: str, message: str | None) -> None:
    create_model = pytest.importorskip("timm").create_model
    with torch.device("meta"):
        model = create_model(name, pretrained=False)
    shapes = shapes_of(model.state_dict())
    for config in ({"architecture": name}, None):
        if message is None or (name == "mobilevitv2_050" and config is not None):
            assert set(find_stored(shapes, "qkvo", config)) == set(find_targets(model, "qkvo"))
        else:
            assert find_targets(model, "qkv")
            with pytest.raises(LayoutError, match=message):
                find_stored(shapes, "qkv", config)


# Models whose linear layers have the order of common models.
ORDERED = [
    "bart", "bert", "bloom", "clip", "deberta", "dinov2", "falcon_new", "gpt2", "gpt_neox", "gptj", "hiera", "llama",
    "minicpm3", "modernbert", "mpt", "openai_gpt", "opt", "qwen2_vl", "reformer", "sam", "siglip", "swin", "t5",
    "torch_encoder", "vit", "whisper",
]  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_targets_of_a_checkpoint_are_in_the_order_of_the_model(name: str) -> None:
    model = configured(name) if name in CONFIGURED else build(name)[0]
    # Plain names need no config.
    config = model.config.to_dict() if hasattr(model, "config") and name not in ("bert", "llama") else None
    shapes = shapes_of(model.state_dict())
    shuffled = dict(random.Random(0).sample(list(shapes.items()), len(shapes)))
    for roles in ("qv", "kqvo", "qkvo"):
        assert find_stored(shuffled, roles, config) == find_targets(model, roles, untie=True)
    names = [target.module for target in find_targets(model, "all-linear", untie=True)]
    expected = find_targets(model, names, untie=True)
    mixed = random.Random(1).sample(names, len(names))
    spellings: list[Any] = [names, mixed, [*mixed, *names[:3]], "|".join(map(re.escape, mixed)), tuple(names[::-1])]
    for spelling in spellings:
        assert find_targets(model, spelling, untie=True) == expected
        assert find_stored(shuffled, spelling, config) == expected


def test_given_targets_keep_their_order_and_paths_have_the_role_of_any_layer() -> None:
    model, _ = build("bert")
    shapes, targets = shapes_of(model.state_dict()), find_targets(model)[::-1]
    assert find_stored(shapes, targets) == find_targets(model, targets) == targets
    by_path = find_stored(shapes, ["attention.self.query", "intermediate.dense"])
    assert {target.role for target in by_path} == {"linear"}
    assert find_stored(shapes, r".*\.query") == [target for target in by_path if "query" in target.module]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qery"], "such as .*query"),
        ("(", "or regular expression"),
        (3, "must be roles"),
        ("nothing.*", "no tensor of the checkpoint"),
        ("qv", "no weights of layers at all"),
    ],
)
def test_targets_that_a_checkpoint_does_not_have(targets: Any, message: str) -> None:
    shapes = {"norm.weight": (4,)} if targets == "qv" else shapes_of(build("bert")[0].state_dict())
    with pytest.raises(TargetError, match=message):
        find_stored(shapes, targets)

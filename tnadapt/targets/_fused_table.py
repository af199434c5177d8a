"""The built-in table of fused attention weights: how each is recognized, and which rule places q, k and v in its rows.

Each entry was taken from its library's source. For each, the tests check that permuting the rows of one of q, k and v
affects only that one in the attention's computation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from . import _fused_rules as rules
from ._fused_rules import Rule

__all__ = ["TABLE", "TRANSPOSED", "AttentionLayout", "StoredWeight"]

# Model types of transformers whose linear layers are stored as (in, out).
TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A fused weight as it appears in a checkpoint.

    Parameters
    ----------
    name : str
        Its name in the attention, without ``weight``: ``"qkv_proj"``.
    below : str
        The path from there to the tensor if the projection is wrapped: ``"convolution"``.
    beside : collection of str
        The other children and parameters of the attention.
    ndim : int
        The number of axes of the stored tensor.
    """

    name: str
    below: str = ""
    beside: Collection[str] = ()
    ndim: int = 2


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """One entry of the table.

    Parameters
    ----------
    rule : callable
        Maps sizes and a weight to blocks of rows, as those in :mod:`tnadapt.targets._fused_rules` do.
    weights : tuple of str
        Names of the fused weight in the attention.
    classes : tuple of str
        Names of the attention's class, qualified by its module if the name alone is common.
    model_types : tuple of str
        Values of ``model_type`` in ``config.json``. Empty if a checkpoint lacks the sizes that the rule needs.
    architectures : tuple of str
        Prefixes of ``architecture`` in timm's ``config.json``.
    attributes : tuple of str
        Attributes that the module must also have. They disambiguate class names that several libraries use, or replace
        them.
    settings : tuple of str
        Keys that ``config.json`` has, instead of a model type, for a weight that whole families of models share.
    beside : tuple of str
        Names of which at least one must lie next to the weight in a checkpoint; no condition if empty.
    ndim : tuple of int
        Accepted numbers of axes of the stored tensor: 2 for linear layers, more for convolutions.
    """

    rule: Rule
    weights: tuple[str, ...]
    classes: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    ndim: tuple[int, ...] = (2,)

    def may_be(self, stored: StoredWeight) -> bool:
        """Return whether a weight of a checkpoint looks like this one."""
        return (
            stored.name in self.weights
            and stored.ndim in self.ndim
            and (not self.beside or any(name in stored.beside for name in self.beside))
        )


_GPT2 = (
    "GPT2Attention", "ImageGPTAttention", "DecisionTransformerGPT2Attention", "BarkSelfAttention", "QWenAttention",
)  # fmt: skip
_QKV = ("query_key_value",)

TABLE: tuple[AttentionLayout, ...] = (
    # -- transformers, and models that ship their own code: one after another, whatever their names suggest
    AttentionLayout(rules.concatenated, ("c_attn",), _GPT2, (*sorted(TRANSPOSED), "qwen")),
    AttentionLayout(
        rules.concatenated,
        ("qkv_proj",),
        ("Phi3Attention", "Phi4MultimodalAttention"),
        ("phi3", "phi3_v", "phi3small", "phi4_multimodal", "phi4mm"),
    ),
    AttentionLayout(rules.concatenated, ("Wqkv",), ("DbrxAttention", "MptAttention"), ("dbrx", "mpt")),
    AttentionLayout(rules.thirds, ("Wqkv",), ("ModernBertAttention",), ("modernbert", "modernbert-decoder")),
    AttentionLayout(rules.concatenated, ("W_pack",), ("BaichuanAttention",), ("baichuan",)),
    AttentionLayout(rules.concatenated, ("qkv",), ("Exaone4_5_VisionAttention",), ("exaone4_5_vision",)),
    # -- head by head
    AttentionLayout(
        rules.by_head,
        _QKV,
        ("BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention"),
        ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon"),
    ),
    AttentionLayout(rules.by_head, ("in_proj",), ("DisentangledSelfAttention",), ("deberta",)),
    AttentionLayout(
        rules.by_head,
        ("qkv_proj",),
        ("MiniMaxLightningAttention",),
        ("minimax", "minimax_text_01", "MiniMaxText01"),
        beside=("output_gate",),
    ),
    AttentionLayout(rules.by_head, ("linear_kv",), ("EsmFoldInvariantPointAttention",)),
    # -- depending on numbers of heads and flags
    AttentionLayout(rules.falcon, _QKV, ("FalconAttention",), ("falcon",)),
    AttentionLayout(rules.by_group, _QKV, model_types=("RefinedWeb",)),
    AttentionLayout(rules.multi_query, _QKV, model_types=("RefinedWebModel",)),
    AttentionLayout(rules.multi_query, ("c_attn",), ("GPTBigCodeAttention",), ("gpt_bigcode",)),
    AttentionLayout(rules.by_group, ("wqkv",), ("InternLM2Attention",), ("internlm2",)),
    AttentionLayout(
        rules.glm,
        _QKV,
        ("SelfAttention",),
        ("chatglm",),
        attributes=("hidden_size_per_attention_head", "num_attention_heads_per_partition"),
    ),
    AttentionLayout(
        rules.code_gen, ("qkv_proj",), ("CodeGenAttention", "MossAttention"), ("codegen", "moss"), beside=("out_proj",)
    ),
    AttentionLayout(
        rules.latent,
        ("kv_b_proj",),
        attributes=("qk_nope_head_dim", "v_head_dim"),
        settings=("qk_nope_head_dim", "v_head_dim"),
    ),
    AttentionLayout(
        rules.delta_rule,
        ("in_proj_qkv", "in_proj_qkvz"),
        attributes=("num_k_heads", "head_k_dim"),
        settings=("linear_num_key_heads", "linear_key_head_dim"),
    ),
    AttentionLayout(
        rules.levit,
        ("queries_keys_values", "keys_values"),
        ("LevitAttention", "LevitAttentionSubsample"),
    ),
    AttentionLayout(
        rules.linear_attention, ("qkv_proj",), ("MobileViTV2LinearSelfAttention",), ("mobilevitv2",), ndim=(4,)
    ),
    # -- one weight for two letters: the same rows
    AttentionLayout(rules.shared, ("query_key",), ("LSHSelfAttention",), ("reformer",)),
    AttentionLayout(rules.shared, ("kv_proj", "wkv"), ("DeepseekV4Attention",), ("deepseek_v4",)),
    # -- reordered when the model is loaded
    AttentionLayout(rules.reordered, ("wqkv",), model_types=("kimi_k25",)),
    AttentionLayout(rules.reordered, ("in_proj_weight",), model_types=("step3p5_vision", "step3p7", "step3p7_vision")),
    # -- timm
    AttentionLayout(
        rules.levit,
        ("qkv", "kv"),
        (
            "timm.models.levit.Attention",
            "timm.models.levit.AttentionDownsample",
            "timm.models.efficientformer.Attention",
            "timm.models.tiny_vit.Attention",
        ),
        architectures=("levit", "efficientformer_l", "tiny_vit"),
        beside=("attention_biases",),
        ndim=(2, 4),
    ),
    AttentionLayout(
        rules.head_first,
        ("qkv",),
        (
            "timm.models.maxxvit.Attention2d",
            "timm.models.maxxvit.AttentionCl",
            "timm.layers.attention2d.Attention2d",
        ),
        architectures=("coat", "max"),
        beside=("rel_pos",),
        ndim=(2, 4),
    ),
    AttentionLayout(rules.head_first, ("qkv",), architectures=("coat", "max"), ndim=(4,)),
    AttentionLayout(
        rules.global_window,
        ("qkv",),
        ("timm.models.gcvit.WindowAttentionGlobal",),
        architectures=("gcvit",),
        beside=("rel_pos",),
    ),
    AttentionLayout(
        rules.linear_attention,
        ("qkv_proj",),
        ("timm.models.mobilevit.LinearSelfAttention",),
        architectures=("mobilevitv2",),
        ndim=(4,),
    ),
    AttentionLayout(
        rules.sized("q=qk_dim k=qk_dim v=pdim"),
        ("qkv",),
        ("timm.models.shvit.SHSA",),
        architectures=("shvit",),
        ndim=(4,),
    ),
    AttentionLayout(
        rules.sized("q=dim k=dim v=dim", count=None),
        ("qkv",),
        ("timm.models.efficientvit_mit.LiteMLA",),
        architectures=("efficientvit_b", "efficientvit_l"),
        ndim=(4,),
    ),
    AttentionLayout(
        rules.sized("q=dim_out_qk k=dim_out_qk v=dim_out_v"),
        ("qkv",),
        ("timm.layers.bottleneck_attn.BottleneckAttn",),
        ndim=(4,),
    ),
    AttentionLayout(
        rules.sized("k=dim_head_qk v=dim_head_v", count=None), ("kv",), ("timm.layers.halo_attn.HaloAttn",), ndim=(4,)
    ),
    AttentionLayout(rules.lambda_layer, ("qkv",), ("timm.layers.lambda_layer.LambdaLayer",), ndim=(4,)),
    AttentionLayout(
        rules.in_split,
        ("in_proj",),
        (
            "timm.models.vision_transformer.ParallelScalingBlock",
            "timm.models.vision_transformer.DiffParallelScalingBlock",
        ),
    ),
    # -- diffusers, and other diffusion models
    AttentionLayout(rules.guided, ("qkv",), ("AttentionBlock",), ndim=(3,)),
    AttentionLayout(
        rules.sized("q=inner_dim k=inner_dim v=inner_dim -=*"),
        ("to_qkv_mlp_proj",),
        ("Flux2ParallelSelfAttention",),
    ),
)

"""Layouts of fused weights that are not simply q, k and v one after another, by the class of the attention.

Each was read in its library's source; the tests show of each that moving the rows of one of q, k and v moves that
one and no other in what the attention computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Layout", "heads_of", "is_known", "known_layout", "kv_heads_of", "number_of", "shares"]

# The number of equal blocks, and the rows of one: a letter and its size; "-" is none of q, k and v.
Layout = tuple[int, list[tuple[str, int]]]

# Of an attention, the letters that the name promises, and the rows.
_Lay = Callable[[Any, str, int], Layout | None]

_NOT_KNOWN: Layout = (0, [])


def known_layout(parent: Any, name: str) -> _Lay | None:
    """The layout of a weight of this name in an attention of this class; None if the class is not in the table."""
    found: _Lay | None = _find(_BY_CLASS, parent) or _by_attributes(parent, name)
    return found


def shares(parent: Any) -> bool:
    """Whether an attention of this class uses one product twice, as q and k or as k and v."""
    return _find(_SHARED, parent) is not None


def is_known(parent: Any) -> bool:
    """Whether the class is in the tables, so that it is an attention whatever its name."""
    return shares(parent) or _find(_BY_CLASS, parent) is not None


def number_of(parent: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive integer, of the module or else of its config."""
    for holder in (parent, getattr(parent, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def heads_of(parent: Any) -> int | None:
    """How many heads of queries an attention says that it has."""
    return number_of(parent, "num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "heads")


def kv_heads_of(parent: Any) -> int | None:
    """How many heads of keys and values."""
    names = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "num_heads_kv", "kv_heads", "n_kv_head")
    groups = getattr(parent, "num_key_value_groups", None)
    heads = heads_of(parent)
    if isinstance(groups, int) and groups > 0 and heads is not None:
        return heads // groups
    return number_of(parent, *names)


# -- The layouts ------------------------------------------------------------------------------


def _by_head(parent: Any, letters: str, out: int) -> Layout:
    """Head by head, each with its q, k and v of one size."""
    heads = heads_of(parent)
    return (heads, [(letter, out // (len(letters) * heads)) for letter in letters]) if heads else _NOT_KNOWN


def _by_group(parent: Any, letters: str, out: int) -> Layout:
    """Key-value head by key-value head, each after the queries that use it."""
    heads, kv_heads = heads_of(parent), kv_heads_of(parent)
    if not heads or not kv_heads:
        return _NOT_KNOWN
    size = out // (heads + 2 * kv_heads)
    return kv_heads, [("q", heads // kv_heads * size), ("k", size), ("v", size)]


def _falcon(parent: Any, letters: str, out: int) -> Layout:
    if parent.new_decoder_architecture:
        return _by_group(parent, letters, out)
    if not parent.multi_query:
        return _by_head(parent, letters, out)
    return 1, [("q", parent.num_heads * parent.head_dim), ("k", parent.head_dim), ("v", parent.head_dim)]


def _bigcode(parent: Any, letters: str, out: int) -> Layout | None:
    if letters != "qkv":
        return None
    if parent.multi_query:
        return 1, [("q", parent.embed_dim), ("k", parent.kv_dim), ("v", parent.kv_dim)]
    return _by_head(parent, letters, out)


def _glm(parent: Any, letters: str, out: int) -> Layout | None:
    """ChatGLM, whose attention has no name of its own."""
    size = number_of(parent, "hidden_size_per_attention_head")
    heads = number_of(parent, "num_attention_heads_per_partition")
    if size is None or heads is None:
        return None
    if not getattr(parent, "multi_query_attention", False):
        return heads, [(letter, size) for letter in letters]
    kv = size * parent.num_multi_query_groups_per_partition
    return 1, [("q", heads * size), ("k", kv), ("v", kv)]


def _codegen(parent: Any, letters: str, out: int) -> Layout:
    """In the shards that it was trained on, and with v before k."""
    shards = getattr(parent, "mp_num", 4)
    return shards, [(letter, out // (3 * shards)) for letter in "qvk"]


def _levit(parent: Any, letters: str, out: int) -> Layout:
    """Head by head, v wider than q and k."""
    heads, key = heads_of(parent), parent.key_dim
    if not heads:
        return _NOT_KNOWN
    value = out // heads - key * (len(letters) - 1)
    return heads, [(letter, value if letter == "v" else key) for letter in letters]


def _head_first(parent: Any, letters: str, out: int) -> Layout | None:
    return _by_head(parent, letters, out) if parent.head_first else None


def _guided(parent: Any, letters: str, out: int) -> Layout | None:
    """OpenAI's diffusion models: a module without weights says whether heads come first."""
    inner = getattr(parent, "attention", None)
    if type(inner).__name__ != "QKVAttentionLegacy":
        return None
    return _by_head(inner, letters, out)


def _global_window(parent: Any, letters: str, out: int) -> Layout | None:
    """GC ViT, whose queries come from elsewhere in every second block, under the same name."""
    return (1, [("k", out // 2), ("v", out // 2)]) if parent.use_global else None


def _lambda(parent: Any, letters: str, out: int) -> Layout:
    return 1, [("q", parent.num_heads * parent.dim_qk), ("k", parent.dim_qk), ("v", parent.dim_v)]


def _in_split(parent: Any, letters: str, out: int) -> Layout:
    """Blocks that make the MLP's input in the same product."""
    return 1, list(zip("-qkv", parent.in_split, strict=True))


def _sizes(sizes: str, count: int | None = 1) -> _Lay:
    """A layout from the attributes that hold its sizes; "*" is the rest, and a count of None follows from the rows."""

    def lay(parent: Any, letters: str, out: int) -> Layout:
        parts: list[tuple[str, int]] = []
        for letter, size in (part.split("=") for part in sizes.split()):
            rest = out - sum(known for _, known in parts)
            parts.append((letter, rest if size == "*" else int(size) if size.isdigit() else getattr(parent, size)))
        return out // sum(size for _, size in parts) if count is None else count, parts

    return lay


_BY_CLASS: dict[str, _Lay] = {
    # transformers, and models that bring their own code
    "BloomAttention": _by_head,
    "GPTNeoXAttention": _by_head,
    "GPTNeoXJapaneseAttention": _by_head,
    "PersimmonAttention": _by_head,
    "DisentangledSelfAttention": _by_head,
    "MiniMaxLightningAttention": _by_head,
    "EsmFoldInvariantPointAttention": _by_head,
    "FalconAttention": _falcon,
    "GPTBigCodeAttention": _bigcode,
    "InternLM2Attention": _by_group,
    "CodeGenAttention": _codegen,
    "MossAttention": _codegen,
    "SelfAttention": _glm,
    "LevitAttention": _levit,
    "LevitAttentionSubsample": _levit,
    "MobileViTV2LinearSelfAttention": _sizes("q=1 k=embed_dim v=embed_dim"),
    "Exaone4_5_VisionAttention": _sizes("q=q_dim k=kv_dim v=kv_dim"),
    # timm
    "timm.models.levit.Attention": _levit,
    "timm.models.levit.AttentionDownsample": _levit,
    "timm.models.efficientformer.Attention": _levit,
    "timm.models.tiny_vit.Attention": _levit,
    "timm.models.maxxvit.Attention2d": _head_first,
    "timm.models.maxxvit.AttentionCl": _head_first,
    "timm.layers.attention2d.Attention2d": _head_first,
    "timm.models.gcvit.WindowAttentionGlobal": _global_window,
    "timm.models.mobilevit.LinearSelfAttention": _sizes("q=1 k=embed_dim v=embed_dim"),
    "timm.models.shvit.SHSA": _sizes("q=qk_dim k=qk_dim v=pdim"),
    "timm.models.efficientvit_mit.LiteMLA": _sizes("q=dim k=dim v=dim", count=None),
    "timm.models.vision_transformer.ParallelScalingBlock": _in_split,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _in_split,
    "timm.layers.bottleneck_attn.BottleneckAttn": _sizes("q=dim_out_qk k=dim_out_qk v=dim_out_v"),
    "timm.layers.halo_attn.HaloAttn": _sizes("k=dim_head_qk v=dim_head_v", count=None),
    "timm.layers.lambda_layer.LambdaLayer": _lambda,
    # diffusers, and other diffusion models
    "Flux2ParallelSelfAttention": _sizes("q=inner_dim k=inner_dim v=inner_dim -=*"),
    "AttentionBlock": _guided,
}

# One weight makes several of q, k and v, the same numbers.
_SHARED = {"LSHSelfAttention": True, "DeepseekV4Attention": True}


def _by_attributes(parent: Any, name: str) -> _Lay | None:
    """Layouts of whole families of classes, which share the names of their sizes."""
    if name == "kv_b_proj" and hasattr(parent, "qk_nope_head_dim") and hasattr(parent, "v_head_dim"):
        # Latent attention: head by head, the part of the keys without position, then the values.
        return _sizes("k=qk_nope_head_dim v=v_head_dim", count=None)
    if name in ("in_proj_qkv", "in_proj_qkvz") and hasattr(parent, "num_k_heads") and hasattr(parent, "head_k_dim"):
        return _delta_rule
    return None


def _delta_rule(parent: Any, letters: str, out: int) -> Layout:
    """Gated delta rule: keys and values in numbers of their own; with a gate, key head by key head."""
    heads, key, value = parent.num_k_heads, parent.head_k_dim, parent.num_v_heads * parent.head_v_dim
    if out == 2 * heads * key + value:
        return 1, [("q", heads * key), ("k", heads * key), ("v", value)]
    return heads, [("q", key), ("k", key), ("v", value // heads), ("-", value // heads)]


def _find(table: dict[str, Any], parent: Any) -> Any:
    """What a table says of the module's class or of one that it derives from."""
    for cls in type(parent).__mro__:
        found = table.get(f"{cls.__module__}.{cls.__name__}") or table.get(cls.__name__)
        if found:
            return found
    return None

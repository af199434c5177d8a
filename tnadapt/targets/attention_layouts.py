"""Layouts of fused attention weights: the table, lookup for models and checkpoints, and registration.

An entry says how to recognize a layout in torch (by the class of the attention) and in a checkpoint (by ``model_type``
or timm's ``architecture``, and the weight's name), and which rule places q, k and v in the rows. A lookup returns None
if nothing matches, never a layout that merely might fit. The built-in entries come first; other packages add theirs
with :func:`register_layout`. For a weight without an entry, :func:`by_name` decides by the name alone what can be
assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tnadapt.errors import ConfigError, safe_repr
from tnadapt.plugins import checked_name, load_plugins

from . import fused_rows as rules
from .fused_rows import Rule
from .roles import parse_projection_name

# -- The built-in table: how each layout is recognized, and the rule for its rows of q, k and v ------------------------

# Each entry was taken from its library's source. For each, tests check that permuting the rows of one of q, k and v
# affects only that one in the attention's computation.


# Model types of transformers whose linear layers are stored as (in, out).
TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A fused weight as it appears in a checkpoint.

    Parameters
    ----------
    name : str
        Its name in the attention, without ``weight``: ``"qkv_proj"``.
    beside : collection of str
        The other children and parameters of the attention.
    ndim : int
        The number of axes of the stored tensor.
    """

    name: str
    beside: Collection[str] = ()
    ndim: int = 2


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """One entry of the table.

    Parameters
    ----------
    rule : callable
        Maps sizes and a weight to blocks of rows, as those in :mod:`tnadapt.targets.fused_rows` do.
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


def _entry(
    rule: Rule, weights: str, classes: str = "", model_types: str = "", ndim: tuple[int, ...] = (2,), **words: str
) -> AttentionLayout:
    """Return an entry of the table from its names, separated by spaces."""
    names, owners, types = (tuple(text.split()) for text in (weights, classes, model_types))
    return AttentionLayout(
        rule, names, owners, types, ndim=ndim, **{field: tuple(text.split()) for field, text in words.items()}
    )


TABLE: tuple[AttentionLayout, ...] = (
    # -- transformers, and models that ship their own code: one after another, whatever their names suggest
    _entry(
        rules.concatenated, "c_attn",
        "GPT2Attention ImageGPTAttention DecisionTransformerGPT2Attention BarkSelfAttention QWenAttention",
        " ".join([*sorted(TRANSPOSED), "qwen"]),
    ),
    _entry(
        rules.concatenated, "qkv_proj", "Phi3Attention Phi4MultimodalAttention",
        "phi3 phi3_v phi3small phi4_multimodal phi4mm",
    ),
    _entry(rules.concatenated, "Wqkv", "DbrxAttention MptAttention", "dbrx mpt"),
    _entry(rules.thirds, "Wqkv", "ModernBertAttention", "modernbert modernbert-decoder"),
    _entry(rules.concatenated, "W_pack", "BaichuanAttention", "baichuan"),
    _entry(rules.concatenated, "qkv", "Exaone4_5_VisionAttention", "exaone4_5_vision"),
    # -- head by head
    _entry(
        rules.by_head, "query_key_value",
        "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention",
        "bloom gpt_neox gpt_neox_japanese persimmon",
    ),
    _entry(rules.by_head, "in_proj", "DisentangledSelfAttention", "deberta"),
    _entry(
        rules.by_head, "qkv_proj", "MiniMaxLightningAttention", "minimax minimax_text_01 MiniMaxText01",
        beside="output_gate",
    ),
    _entry(rules.by_head, "linear_kv", "EsmFoldInvariantPointAttention"),
    # -- depending on numbers of heads and flags
    _entry(rules.falcon, "query_key_value", "FalconAttention", "falcon"),
    _entry(rules.by_group, "query_key_value", model_types="RefinedWeb"),
    _entry(rules.multi_query, "query_key_value", model_types="RefinedWebModel"),
    _entry(rules.multi_query, "c_attn", "GPTBigCodeAttention", "gpt_bigcode"),
    _entry(rules.by_group, "wqkv", "InternLM2Attention", "internlm2"),
    _entry(
        rules.glm, "query_key_value", "SelfAttention", "chatglm",
        attributes="hidden_size_per_attention_head num_attention_heads_per_partition",
    ),
    _entry(rules.code_gen, "qkv_proj", "CodeGenAttention MossAttention", "codegen moss", beside="out_proj"),
    _entry(
        rules.latent, "kv_b_proj", attributes="qk_nope_head_dim v_head_dim", settings="qk_nope_head_dim v_head_dim"
    ),
    _entry(
        rules.delta_rule, "in_proj_qkv in_proj_qkvz", attributes="num_k_heads head_k_dim",
        settings="linear_num_key_heads linear_key_head_dim",
    ),
    _entry(rules.levit, "queries_keys_values keys_values", "LevitAttention LevitAttentionSubsample"),
    _entry(rules.linear_attention, "qkv_proj", "MobileViTV2LinearSelfAttention", "mobilevitv2", (4,)),
    # -- one weight for two letters: the same rows
    _entry(rules.shared, "query_key", "LSHSelfAttention", "reformer"),
    _entry(rules.shared, "kv_proj wkv", "DeepseekV4Attention", "deepseek_v4"),
    # -- reordered when the model is loaded
    _entry(rules.reordered, "wqkv", model_types="kimi_k25"),
    _entry(rules.reordered, "in_proj_weight", model_types="step3p5_vision step3p7 step3p7_vision"),
    # -- timm
    _entry(
        rules.levit, "qkv kv",
        "timm.models.levit.Attention timm.models.levit.AttentionDownsample timm.models.efficientformer.Attention "
        "timm.models.tiny_vit.Attention",
        ndim=(2, 4), architectures="levit efficientformer_l tiny_vit", beside="attention_biases",
    ),
    _entry(
        rules.head_first, "qkv",
        "timm.models.maxxvit.Attention2d timm.models.maxxvit.AttentionCl timm.layers.attention2d.Attention2d",
        ndim=(2, 4), architectures="coat max", beside="rel_pos",
    ),
    _entry(rules.head_first, "qkv", ndim=(4,), architectures="coat max"),
    _entry(
        rules.global_window, "qkv", "timm.models.gcvit.WindowAttentionGlobal", architectures="gcvit", beside="rel_pos"
    ),
    _entry(
        rules.linear_attention, "qkv_proj", "timm.models.mobilevit.LinearSelfAttention", ndim=(4,),
        architectures="mobilevitv2",
    ),
    _entry(
        rules.sized("q=qk_dim k=qk_dim v=pdim"), "qkv", "timm.models.shvit.SHSA", ndim=(4,), architectures="shvit"
    ),
    _entry(
        rules.sized("q=dim k=dim v=dim", count=None), "qkv", "timm.models.efficientvit_mit.LiteMLA", ndim=(4,),
        architectures="efficientvit_b efficientvit_l",
    ),
    _entry(
        rules.sized("q=dim_out_qk k=dim_out_qk v=dim_out_v"), "qkv", "timm.layers.bottleneck_attn.BottleneckAttn",
        ndim=(4,),
    ),
    _entry(
        rules.sized("k=dim_head_qk v=dim_head_v", count=None), "kv", "timm.layers.halo_attn.HaloAttn", ndim=(4,)
    ),
    _entry(rules.lambda_layer, "qkv", "timm.layers.lambda_layer.LambdaLayer", ndim=(4,)),
    _entry(
        rules.in_split, "in_proj",
        "timm.models.vision_transformer.ParallelScalingBlock timm.models.vision_transformer.DiffParallelScalingBlock",
    ),
    # -- diffusers, and other diffusion models
    _entry(rules.guided, "qkv", "AttentionBlock", ndim=(3,)),
    _entry(rules.sized("q=inner_dim k=inner_dim v=inner_dim -=*"), "to_qkv_mlp_proj", "Flux2ParallelSelfAttention"),
)  # fmt: skip


# -- Lookup and registration -------------------------------------------------------------------------------------------


_added: dict[str, AttentionLayout] = {}


def register_layout(name: str, layout: AttentionLayout) -> None:
    """Register the layout of a fused attention weight, for models in memory and checkpoints on disk.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. Registering it again replaces the layout.
    layout : AttentionLayout
        How the attention is recognized, and the rule that places q, k and v in the rows of its weight. The rules of
        the built-in table are in ``tnadapt.targets.attention_layouts.rules``. A custom rule is a function that maps
        the sizes of an attention (``Facts``) and a weight (``Fused``) to blocks of rows.

    Raises
    ------
    ConfigError
        If the name has another form; if the layout is not an :class:`AttentionLayout`, or has neither a class, a model
        type nor an architecture to recognize it by; if the name of its weight does not imply q, k or v; or if another
        layout, built-in or registered under another name, already has its class or model type.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.targets.attention_layouts import AttentionLayout, rules
    >>> layout = AttentionLayout(rules.by_head, ("qkv_proj",), ("ParrotAttention",), ("parrot",))
    >>> tna.register_layout("parrot", layout)
    >>> of_class(["ParrotAttention"], lambda name: False) is layout
    True

    With a rule of its own, and the rows that are then found in a checkpoint:

    >>> from tnadapt.targets.checkpoint_targets import find_stored
    >>> def values_first(facts, fused):
    ...     return 1, [("v", fused.out // 3), ("k", fused.out // 3), ("q", fused.out // 3)]
    >>> tna.register_layout("wren", AttentionLayout(values_first, ("to_qkv",), ("WrenAttention",), ("wren",)))
    >>> shapes = {"attention.to_qkv.weight": (24, 8), "attention.to_out.weight": (8, 8)}
    >>> for target in find_stored(shapes, "qv", {"model_type": "wren"}):
    ...     print(target.role, target.rows)
    q Rows(start=16, length=8, stride=24, count=1)
    v Rows(start=0, length=8, stride=24, count=1)
    """
    checked_name("attention layout", name, ())
    if not isinstance(layout, AttentionLayout):
        raise ConfigError(f"register_layout takes an AttentionLayout; got {safe_repr(layout)}")
    if not (layout.weights and (layout.classes or layout.model_types or layout.architectures)):
        raise ConfigError(
            f"attention layout {name!r} names no weight, or nothing to recognize its attention by: give weights, and "
            "classes, model_types or architectures"
        )
    if silent := [weight for weight in layout.weights if parse_projection_name(weight, attention=True) is None]:
        raise ConfigError(
            f"attention layout {name!r}: the name {silent[0]!r} does not say which of q, k and v the weight produces, "
            "as 'qkv_proj' does; name whole weights or rows by targets= instead"
        )
    others = [*TABLE, *(entry for key, entry in _added.items() if key != name)]
    for what in ("classes", "model_types"):
        known = {word for entry in others for word in getattr(entry, what) if set(entry.weights) & set(layout.weights)}
        if taken := sorted(known & set(getattr(layout, what))):
            raise ConfigError(
                f"attention layout {name!r}: {taken[0]} already has a layout, which cannot be replaced; register "
                "another class or model type"
            )
    _added[name] = layout


def forget_layouts() -> None:
    """Remove all registered layouts, for tests."""
    _added.clear()


def _entries() -> list[AttentionLayout]:
    load_plugins()
    return [*TABLE, *_added.values()]


def of_class(names: Sequence[str], has: Callable[[str], bool], weight: str = "") -> AttentionLayout | None:
    """Return the entry of an attention in memory; None if its class is not in the table.

    Parameters
    ----------
    names : sequence of str
        Names of its class and base classes, nearest first, each with and without its module.
    has : callable
        Returns whether the module has an attribute of a given name.
    weight : str
        The fused weight's name, for entries that are recognized by attributes alone.

    Examples
    --------
    >>> of_class(["MyBloomAttention", "BloomAttention"], lambda name: False).model_types[0]
    'bloom'
    >>> of_class(["MyAttention"], lambda name: False) is None
    True
    """
    entries, places = _entries(), {name: place for place, name in enumerate(names)}
    named = [(places[name], entry) for entry in entries for name in entry.classes if name in places]
    nearest = [entry for _, entry in sorted(named, key=lambda pair: pair[0])]
    unnamed = [entry for entry in entries if not entry.classes and entry.attributes and weight in entry.weights]
    return next((entry for entry in [*nearest, *unnamed] if all(map(has, entry.attributes))), None)


def of_config(config: Mapping[str, Any], stored: StoredWeight) -> AttentionLayout | None:
    """Return the entry of a weight in a checkpoint, by its config; None if there is none.

    Parameters
    ----------
    config : mapping
        ``config.json``, or the part of it that the weight belongs to.
    stored : StoredWeight

    Examples
    --------
    >>> of_config({"model_type": "deberta"}, StoredWeight("in_proj")).classes
    ('DisentangledSelfAttention',)
    >>> of_config({}, StoredWeight("in_proj")) is None
    True
    """
    model_type, architecture = config.get("model_type"), config.get("architecture")
    for entry in _entries():
        known = model_type in entry.model_types
        known = known or (isinstance(architecture, str) and architecture.startswith(entry.architectures or ("\0",)))
        known = known or (bool(entry.settings) and all(config.get(name) is not None for name in entry.settings))
        if known and entry.may_be(stored):
            return entry
    return None


def contested(config: Mapping[str, Any], stored: StoredWeight) -> bool:
    """Return whether a weight for which :func:`of_config` finds nothing looks like the weight of some entry.

    If so, its layout cannot be inferred from its name.

    Examples
    --------
    >>> contested({}, StoredWeight("qkv")), contested({}, StoredWeight("qkv", beside=["attention_biases"]))
    (False, True)
    >>> contested({"architecture": "vit_tiny_patch16_224"}, StoredWeight("qkv", beside=["attention_biases"]))
    False
    """
    for entry in _entries():
        other = entry.architectures and isinstance(config.get("architecture"), str)
        # Reordered rows of q are still rows of q; only the model in memory has them in another order.
        same = entry.rule in (rules.concatenated, rules.thirds, rules.reordered)
        if entry.may_be(stored) and not same and not other:
            return True
    return False


def by_name(name: str) -> Rule | None:
    """Return the rule that the name of a fused weight implies without an entry; None if libraries differ.

    Examples
    --------
    >>> by_name("qkv").__name__, by_name("query_key_value") is None
    ('concatenated', True)
    """
    if name in _DOUBTFUL or any(word in name for word in ("qkvz", "mlp")):
        return None
    # torch.nn.MultiheadAttention, which has as many key heads as query heads.
    return rules.thirds if name == "in_proj_weight" else rules.concatenated


# Under these names some libraries interleave heads and others do not.
_DOUBTFUL = ("query_key_value", "linear_qkv", "kv_b_proj")

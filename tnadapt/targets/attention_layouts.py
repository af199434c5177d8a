"""Lookup and registration of the layouts of fused attention weights, for models in memory and checkpoints on disk.

An entry says how to recognize a layout in torch (by the class of the attention) and in a checkpoint (by ``model_type``
or timm's ``architecture``, and the weight's name), and which rule places q, k and v in the rows. A lookup returns None
if nothing matches, never a layout that merely might fit. ``tnadapt.targets._fused_table`` has the built-in entries;
other packages add theirs with :func:`register_layout`. For a weight without an entry, :func:`by_name` decides by the
name alone what can be assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tnadapt.errors import ConfigError, safe_repr
from tnadapt.plugins import checked_name, load_plugins

from . import _fused_rules as rules
from ._fused_rules import Rule
from ._fused_table import TABLE, AttentionLayout, StoredWeight
from .roles import parse_projection_name

__all__ = [
    "TABLE",
    "AttentionLayout",
    "StoredWeight",
    "by_name",
    "contested",
    "forget_layouts",
    "of_class",
    "of_config",
    "register_layout",
    "rules",
]

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


def _entries() -> Iterator[AttentionLayout]:
    """Yield the built-in entries, the registered ones, and those of plug-ins, which are loaded only once reached."""
    yield from TABLE
    before = dict(_added)
    yield from before.values()
    load_plugins()
    yield from (entry for name, entry in _added.items() if before.get(name) is not entry)


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
    for name in names:
        for entry in _entries():
            if name in entry.classes and all(map(has, entry.attributes)):
                return entry
    for entry in _entries():
        if not entry.classes and entry.attributes and weight in entry.weights and all(map(has, entry.attributes)):
            return entry
    return None


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
    kind, architecture = config.get("model_type"), config.get("architecture")
    for entry in _entries():
        known = kind in entry.model_types
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

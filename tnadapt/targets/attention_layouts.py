"""One table of the fused attention weights that are known, for models in memory and checkpoints on disk alike.

An entry says how a layout is recognised in torch (by the class of the attention), how it is recognised in a checkpoint
(by ``model_type`` or timm's ``architecture``, and the weight's name), and which rule places q, k and v in the rows. A
lookup that finds nothing gives None, and never a layout that might fit. Another package adds entries by
:func:`register_layout`. What may be assumed of a weight that no entry
knows is decided by its name alone, in :func:`by_name`.

Each entry was read in its library's source; the tests show of each that moving the rows of one of q, k and v moves
that one and no other in what the attention computes.
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
    """Make the layout of a fused attention weight known, to models in memory and to checkpoints on disk.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. Registering it again replaces the layout.
    layout : AttentionLayout
        How the attention is recognized, and the rule that places q, k and v in the rows of its weight. The rules of
        the built-in table are in ``tnadapt.targets.attention_layouts.rules``; another one is a function of the sizes
        of an attention (``Facts``) and a weight (``Fused``) to blocks of rows.

    Raises
    ------
    ConfigError
        If the name has another form, the layout is none, it says neither a class nor a model type by which to
        recognize it, or one of these is in the table already: rows of that attention are known, and do not change.

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
            f"attention layout {name!r}: the name {silent[0]!r} does not say which of q, k and v the weight makes, as "
            "'qkv_proj' does; name whole weights or rows by targets= instead"
        )
    others = [*TABLE, *(entry for key, entry in _added.items() if key != name)]
    for what in ("classes", "model_types"):
        known = {word for entry in others for word in getattr(entry, what) if set(entry.weights) & set(layout.weights)}
        if taken := sorted(known & set(getattr(layout, what))):
            raise ConfigError(
                f"attention layout {name!r}: the layout of {taken[0]} is known, and is not replaced; register a class "
                "or a model type of your own"
            )
    _added[name] = layout


def forget_layouts() -> None:
    """Remove the layouts that were registered: for tests."""
    _added.clear()


def _entries() -> Iterator[AttentionLayout]:
    """The table, then what is registered, then what plug-ins register: these are loaded when nothing else is found."""
    yield from TABLE
    before = dict(_added)
    yield from before.values()
    load_plugins()
    yield from (entry for name, entry in _added.items() if before.get(name) is not entry)


def of_class(names: Sequence[str], has: Callable[[str], bool], weight: str = "") -> AttentionLayout | None:
    """The entry of an attention in memory; None if its class is not in the table.

    Parameters
    ----------
    names : sequence of str
        Names of its class and of those that it derives from, nearest first, each with its module and without.
    has : callable
        Whether the module has an attribute of a name.
    weight : str
        The fused weight's name in it, for entries that go by attributes alone.

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
    """The entry of a weight in a checkpoint, by its config; None if no entry has it.

    Parameters
    ----------
    config : mapping
        ``config.json``, or the part of it that the weight belongs to.
    stored : Stored

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
    """Whether a weight of a checkpoint, of which :func:`of_config` says nothing, looks like an entry's.

    If so, its layout cannot be taken from its name.

    Examples
    --------
    >>> contested({}, StoredWeight("qkv")), contested({}, StoredWeight("qkv", beside=["attention_biases"]))
    (False, True)
    >>> contested({"architecture": "vit_tiny_patch16_224"}, StoredWeight("qkv", beside=["attention_biases"]))
    False
    """
    for entry in _entries():
        other = entry.architectures and isinstance(config.get("architecture"), str)
        # Reordered rows of q are still the rows of q, unless the model in memory is meant.
        same = entry.rule in (rules.concatenated, rules.thirds, rules.reordered)
        if entry.may_be(stored) and not same and not other:
            return True
    return False


def by_name(name: str) -> Rule | None:
    """What the name of a fused weight says where no entry knows it; None if libraries differ in its layout.

    Examples
    --------
    >>> by_name("qkv").__name__, by_name("query_key_value") is None
    ('concatenated', True)
    """
    if name in _DOUBTFUL or any(word in name for word in ("qkvz", "mlp")):
        return None
    # torch.nn.MultiheadAttention, which has as many heads of keys as of queries.
    return rules.thirds if name == "in_proj_weight" else rules.concatenated


# Under these names some libraries interleave heads and others do not.
_DOUBTFUL = ("query_key_value", "linear_qkv", "kv_b_proj")

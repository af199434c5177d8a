"""Rows of q, k and v in a fused weight: the rules by which libraries lay them out, and the sizes they need.

Nothing here depends on whether the sizes come from a torch module's attributes or a checkpoint's ``config.json``, so a
model in memory and its checkpoint get the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tnadapt.errors import TargetError

from .target import Rows

# -- Fused weights, the known sizes of their attention, and rows from blocks -------------------------------------------


# The number of equal blocks, and the parts of one block: a letter and its row count; "-" is none of q, k and v.
Blocks = tuple[int, list[tuple[str, int]]]

# All letters share the same rows, as q and k or as k and v. Compared by identity: no rule computes such a value.
SHARED: Blocks = (0, [])

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "heads")
_KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "num_heads_kv", "kv_heads", "n_kv_head",
    "n_head_kv",
)  # fmt: skip
_HEAD_SIZE = ("head_dim", "head_size", "dim_head", "d_head")


class LayoutError(TargetError):
    """A fused weight whose layout cannot be determined; the message says what is missing."""


class Fused(NamedTuple):
    """A fused weight.

    Attributes
    ----------
    letters : {"qkv", "qk", "kv"}
        The projections that it produces, in the order of its name.
    out : int
        Its output rows.
    q_out, o_in : int or None
        Rows of a separate query projection, and columns of the output projection, where there is exactly one.
    """

    letters: str
    out: int
    q_out: int | None = None
    o_in: int | None = None


class Facts:
    """Named sizes and flags of one attention.

    Parameters
    ----------
    lookups : sequence of callable
        Functions from a name to a value or None; the first value found wins.
    lacks : str
        How messages introduce a missing name, such as ``"config.json lacks"``.
    """

    def __init__(self, lookups: Sequence[Callable[[str], Any]], lacks: str) -> None:
        self._lookups = lookups
        self._lacks = lacks

    def value(self, name: str) -> Any:
        """Return the first value that the lookups find for a name; None if there is none."""
        return next((value for lookup in self._lookups if (value := lookup(name)) is not None), None)

    def number(self, *names: str) -> int | None:
        """Return the first positive integer under these names below 2**62, which no size of a tensor exceeds."""
        # The order of lookups comes before that of names: an attention's own number is preferred to the config's under
        # a better name, as the config may describe a model of several parts.
        for lookup in self._lookups:
            for name in names:
                value = lookup(name)
                if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62:
                    return value
        return None

    def need(self, *names: str) -> int:
        """Return :meth:`number`, or raise :class:`LayoutError` if there is none."""
        number = self.number(*names)
        if number is None:
            raise LayoutError(f"{self._lacks} {names[0]}")
        return number

    def flag(self, name: str) -> bool:
        """Return a boolean that must be present, as its default differs between releases."""
        flag = self.value(name)
        if not isinstance(flag, bool):
            raise LayoutError(f"{self._lacks} {name}")
        return flag

    @property
    def heads(self) -> int | None:
        """Number of query heads."""
        return self.number(*_HEADS)

    @property
    def kv_heads(self) -> int | None:
        """Number of key-value heads."""
        # num_key_value_groups is the number of query heads per key-value head. It comes first because attentions of
        # transformers have it as an attribute, while the number of key-value heads is only in the config.
        groups, heads = self.number("num_key_value_groups"), self.heads
        return heads // groups if groups and heads else self.number(*_KV_HEADS)

    @property
    def head_size(self) -> int | None:
        return self.number(*_HEAD_SIZE)

    def need_heads(self) -> int:
        if self.heads is None:
            raise LayoutError(f"{self._lacks} num_attention_heads: it does not say how many heads it has")
        return self.heads

    def need_kv_heads(self) -> int:
        if self.kv_heads is None:
            raise LayoutError(f"{self._lacks} num_key_value_heads: it does not say how many heads of keys it has")
        return self.kv_heads


def place_rows(blocks: Blocks, fused: Fused) -> dict[str, Rows | None]:
    """Return the rows of each letter.

    Returns
    -------
    dict of str to Rows or None
        None where the whole weight produces the letter.

    Raises
    ------
    LayoutError
        If the blocks do not fill the weight exactly.

    Examples
    --------
    >>> place_rows((2, [("q", 4), ("k", 4), ("v", 4)]), Fused("qkv", 24))["k"].indices()
    [4, 5, 6, 7, 16, 17, 18, 19]
    """
    if blocks is SHARED:
        return dict.fromkeys(fused.letters)
    # Leftover rows, or a size below one, mean that the rule does not fit this weight; sizes are never rounded to fit.
    count, parts = blocks
    stride = sum(size for _, size in parts)
    if count < 1 or stride * count != fused.out or any(size < 1 for letter, size in parts if letter != "-"):
        raise LayoutError(f"{count} blocks of {stride} rows were expected")
    rows: dict[str, Rows | None] = {}
    start = 0
    for letter, size in parts:
        if letter != "-":
            rows[letter] = Rows(start, size, stride, count)
        start += size
    return rows


# -- Rules for how libraries lay out q, k and v ------------------------------------------------------------------------

# A rule maps the sizes of an attention and a fused weight to blocks of rows. ``tnadapt.targets.attention_layouts``
# finds the rule of an attention.
#
# One shape fits several layouts: 3d rows may hold q, k and v one after another, or head by head. An adapter on the
# wrong rows trains and merges without an error, only with worse results. A rule therefore takes sizes from the model
# itself, checks them against every other known size, and raises a ``LayoutError`` instead of guessing.


Rule = Callable[[Facts, Fused], Blocks]


def concatenated(facts: Facts, fused: Fused) -> Blocks:
    """Place q, then k, then v: sized by the head counts if there are fewer key-value heads, otherwise equal parts.

    The output projection consumes the output of the query heads, so it has as many columns as q has rows.
    """
    letters, out = fused.letters, fused.out
    if letters != "qkv":
        # Both letters have the same width, and separate queries (or the output's columns) a multiple of it: grouped
        # keys and values are narrower than the queries, never wider.
        half = out // 2
        if half == 0 or any(size is not None and size % half for size in (fused.q_out, fused.o_in)):
            raise LayoutError("the sizes do not follow from the numbers that are known")
        return 1, [(letter, half) for letter in letters]
    heads, kv_heads = facts.heads, facts.kv_heads
    if heads is not None and kv_heads is not None and kv_heads != heads:
        # Some models have heads wider than hidden size / heads. The check of the sum below rejects a head size that
        # does not belong to this weight.
        size = facts.head_size or out // (heads + 2 * kv_heads)
        sizes = [heads * size, kv_heads * size, kv_heads * size]
    else:
        sizes = [out // 3] * 3
    if sum(sizes) != out or (fused.o_in is not None and fused.o_in != sizes[0]):
        raise LayoutError("the sizes do not follow from the numbers that are known")
    return 1, list(zip(letters, sizes, strict=True))


def by_head(facts: Facts, fused: Fused) -> Blocks:
    """Place q, k and v head by head, all of one size.

    The layout of Megatron and of models trained with it: each shard of the rows holds whole heads, so that tensor
    parallelism can split a single matrix.
    """
    heads = facts.need_heads()
    return heads, [(letter, fused.out // (len(fused.letters) * heads)) for letter in fused.letters]


def by_group(facts: Facts, fused: Fused) -> Blocks:
    """Place each key-value head after the queries that share it.

    :func:`by_head` for grouped queries: a shard holds a key-value head together with its queries.
    """
    heads, kv_heads = facts.need_heads(), facts.need_kv_heads()
    if heads % kv_heads:
        raise LayoutError(f"{heads} heads of queries do not share {kv_heads} of keys evenly")
    size = fused.out // (heads + 2 * kv_heads)
    return kv_heads, [("q", heads // kv_heads * size), ("k", size), ("v", size)]


def thirds(facts: Facts, fused: Fused) -> Blocks:
    """Place three equal parts, one per letter, regardless of the numbers of heads."""
    size = fused.out // 3
    if len(fused.letters) != 3 or fused.out % 3 or fused.o_in not in (None, size):
        raise LayoutError("3 equal parts were expected")
    return 1, [(letter, size) for letter in fused.letters]


def falcon(facts: Facts, fused: Fused) -> Blocks:
    """Apply :func:`by_group` in the new decoder architecture, otherwise :func:`multi_query`."""
    return by_group(facts, fused) if facts.flag("new_decoder_architecture") else multi_query(facts, fused)


def multi_query(facts: Facts, fused: Fused) -> Blocks:
    """Place all queries, then one head of keys and one of values; or head by head if a flag says so."""
    if fused.letters != "qkv":
        return concatenated(facts, fused)  # GPT-BigCode's cross-attention
    if not facts.flag("multi_query"):
        return by_head(facts, fused)
    heads = facts.need_heads()
    size = fused.out // (heads + 2)
    return 1, [("q", heads * size), ("k", size), ("v", size)]


def glm(facts: Facts, fused: Fused) -> Blocks:
    """ChatGLM: head by head in the first release and without multi-query attention, otherwise q, then k, then v."""
    heads = facts.need("num_attention_heads_per_partition", "num_attention_heads")
    # The first release predates that setting; it is recognized by one that later releases dropped.
    first = facts.value("multi_query_attention") is None and facts.value("position_encoding_2d") is not None
    if first or not facts.flag("multi_query_attention"):
        return heads, [(letter, fused.out // (3 * heads)) for letter in fused.letters]
    groups = facts.need("num_multi_query_groups_per_partition", "multi_query_group_num")
    size = fused.out // (heads + 2 * groups)
    return 1, [("q", heads * size), ("k", groups * size), ("v", groups * size)]


def code_gen(facts: Facts, fused: Fused) -> Blocks:
    """CodeGen and MOSS: divided into the shards used in training (always four), with v before k."""
    # The shards are those of the TPU that the model was trained on. transformers hard-codes their number; the config
    # lacks it.
    shards = facts.number("mp_num") or 4
    return shards, [(letter, fused.out // (3 * shards)) for letter in "qvk"]


def levit(facts: Facts, fused: Fused) -> Blocks:
    """Place q, k and v head by head, where v is wider than q and k and takes the remaining rows."""
    heads, key = facts.need_heads(), facts.need("key_dim")
    value = fused.out // heads - key * (len(fused.letters) - 1)
    return heads, [(letter, value if letter == "v" else key) for letter in fused.letters]


def delta_rule(facts: Facts, fused: Fused) -> Blocks:
    """Gated delta rule: keys and values have different head counts; with a gate, laid out by key head."""
    heads, key = facts.need("num_k_heads", "linear_num_key_heads"), facts.need("head_k_dim", "linear_key_head_dim")
    value = facts.need("num_v_heads", "linear_num_value_heads") * facts.need("head_v_dim", "linear_value_head_dim")
    if fused.out == 2 * heads * key + value:
        return 1, [("q", heads * key), ("k", heads * key), ("v", value)]
    return heads, [("q", key), ("k", key), ("v", value // heads), ("-", value // heads)]


def sized(sizes: str, count: int | None = 1) -> Rule:
    """Return a rule defined by the names of its sizes, such as ``"q=dim_q k=dim_q v=*"``.

    ``*`` stands for the remaining rows, a number for itself, and the letter ``-`` for rows that are none of q, k and v.
    With a count of None, the number of blocks follows from the number of rows.
    """

    def rule(facts: Facts, fused: Fused) -> Blocks:
        parts: list[tuple[str, int]] = []
        for letter, size in (part.split("=") for part in sizes.split()):
            rest = fused.out - sum(known for _, known in parts)
            parts.append((letter, rest if size == "*" else int(size) if size.isdigit() else facts.need(size)))
        return fused.out // sum(size for _, size in parts) if count is None else count, parts

    return rule


def shared(facts: Facts, fused: Fused) -> Blocks:
    return SHARED


def reordered(facts: Facts, fused: Fused) -> Blocks:
    raise LayoutError("its library reorders the rows of q and k when it loads them")


def head_first(facts: Facts, fused: Fused) -> Blocks:
    return (by_head if facts.flag("head_first") else concatenated)(facts, fused)


def global_window(facts: Facts, fused: Fused) -> Blocks:
    """GC ViT: every second block takes its queries from elsewhere, and ``qkv`` holds only k and v."""
    half = fused.out // 2
    return (1, [("k", half), ("v", half)]) if facts.flag("use_global") else concatenated(facts, fused)


def lambda_layer(facts: Facts, fused: Fused) -> Blocks:
    key = facts.need("dim_qk")
    return 1, [("q", facts.need_heads() * key), ("k", key), ("v", facts.need("dim_v"))]


def linear_attention(facts: Facts, fused: Fused) -> Blocks:
    """MobileViT v2: a single row of q."""
    size = (fused.out - 1) // 2
    return 1, [("q", 1), ("k", size), ("v", size)]


def in_split(facts: Facts, fused: Fused) -> Blocks:
    """Blocks that compute the MLP's input in the same product, in front of q, k and v."""
    sizes = facts.value("in_split")
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 4:
        raise LayoutError("there is no list of four sizes, in_split")
    return 1, list(zip("-qkv", sizes, strict=True))


def guided(facts: Facts, fused: Fused) -> Blocks:
    """OpenAI's diffusion models: a sibling module without weights determines whether heads come first."""
    inner = facts.value("attention")
    if type(inner).__name__ != "QKVAttentionLegacy":
        return concatenated(facts, fused)
    return by_head(Facts([lambda name: getattr(inner, name, None)], "its attention has no"), fused)


def latent(facts: Facts, fused: Fused) -> Blocks:
    """Latent attention: head by head, first the part of the keys without positions, then the values."""
    return sized("k=qk_nope_head_dim v=v_head_dim", count=None)(facts, fused)

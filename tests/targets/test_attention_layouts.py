"""Fused attention weights: rules partition the rows like a plain reshape, a miss is an error; names of projections."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.errors import TargetError
from tnadapt.targets.roles import (
    ProjectionName,
    attention_group,
    distinct_rows,
    is_attention,
    layer_of,
    main_projection,
    natural,
    number,
    parse_projection_name,
    projection_letters,
)
from tnadapt.targets.target import Rows

from .internals import (
    TABLE,
    AttentionLayout,
    Facts,
    Fused,
    LayoutError,
    StoredWeight,
    contested,
    find_stored,
    forget_layouts,
    of_class,
    of_config,
    place_rows,
    register_layout,
    rules,
)


class Sizes(NamedTuple):
    """Heads, heads of keys and values, heads of queries for each of these, and sizes of heads."""

    n: int
    kv: int
    each: int
    d: int
    v: int


# What is known of an attention (names of the same are separated by bars), in how many blocks the library's own reshape
# takes its rows apart, and the parts of each block, "_" one that is none of q, k and v.
Case = tuple[dict[str, Any], int, dict[str, int]]
HEADS, KV_HEADS = "num_heads|n_head|num_attention_heads", "num_key_value_heads|num_kv_heads|n_head_kv"


def by_head(s: Sizes, heads: str = HEADS, **flags: bool) -> Case:
    return {heads: s.n, **flags}, s.n, {"q": s.d, "k": s.d, "v": s.d}


def by_group(s: Sizes, **flags: bool) -> Case:
    return {"num_heads": s.kv * s.each, KV_HEADS: s.kv, **flags}, s.kv, {"q": s.each * s.d, "k": s.d, "v": s.d}


def concatenated(s: Sizes, **known: Any) -> Case:
    return known, 1, {"q": s.kv * s.each * s.d, "k": s.kv * s.d, "v": s.kv * s.d}


def multi_query(s: Sizes, **flags: bool) -> Case:
    return {"multi_query": True, "n_head": s.n, **flags}, 1, {"q": s.n * s.d, "k": s.d, "v": s.d}


def thirds(s: Sizes, **flags: bool) -> Case:
    return dict(flags), 1, {"q": s.d, "k": s.d, "v": s.d}


def delta_rule(s: Sizes) -> dict[str, Any]:
    return {
        "linear_num_key_heads": s.n, "linear_key_head_dim": s.d, "linear_num_value_heads": s.n * s.each,
        "linear_value_head_dim": s.v,
    }  # fmt: skip


CASES: dict[str, tuple[rules.Rule, Callable[[Sizes], Case]]] = {
    "head by head": (rules.by_head, by_head),
    "head by head, keys and values": (rules.by_head, lambda s: ({HEADS: s.n}, s.n, {"k": s.d, "v": s.d})),
    "key-value head by key-value head": (rules.by_group, by_group),
    "one after another": (rules.concatenated, lambda s: concatenated(s, n_heads=s.kv * s.each, kv_n_heads=s.kv)),
    "of a known size": (
        rules.concatenated, lambda s: concatenated(s, n_heads=s.kv * s.each, kv_n_heads=s.kv, head_dim=s.d),
    ),
    "equal parts": (rules.concatenated, thirds),
    "thirds": (rules.thirds, thirds),
    "halves": (rules.concatenated, lambda s: ({}, 1, {"k": s.d, "v": s.d})),
    "halves of queries and keys": (rules.concatenated, lambda s: ({}, 1, {"q": s.d, "k": s.d})),
    "falcon, new": (rules.falcon, lambda s: by_group(s, new_decoder_architecture=True, multi_query=True)),
    "falcon, multi-query": (rules.falcon, lambda s: multi_query(s, new_decoder_architecture=False)),
    "falcon, old": (rules.falcon, lambda s: by_head(s, new_decoder_architecture=False, multi_query=False)),
    "bigcode": (rules.multi_query, multi_query),
    "bigcode, heads": (rules.multi_query, lambda s: by_head(s, multi_query=False)),
    "bigcode, cross-attention": (rules.multi_query, lambda s: ({}, 1, {"k": s.d, "v": s.d})),
    "glm, groups": (
        rules.glm,
        lambda s: concatenated(
            s, multi_query_attention=True, num_attention_heads=s.kv * s.each, multi_query_group_num=s.kv
        ),
    ),
    "glm, heads": (rules.glm, lambda s: by_head(s, "num_attention_heads", multi_query_attention=False)),
    "glm, first release": (rules.glm, lambda s: by_head(s, "num_attention_heads", position_encoding_2d=True)),
    "codegen": (rules.code_gen, lambda s: ({}, 4, {"q": s.d, "v": s.d, "k": s.d})),
    "levit": (rules.levit, lambda s: ({"num_heads": s.n, "key_dim": s.d}, s.n, {"q": s.d, "k": s.d, "v": s.v})),
    "delta rule": (
        rules.delta_rule,
        lambda s: (delta_rule(s), 1, {"q": s.n * s.d, "k": s.n * s.d, "v": s.n * s.each * s.v}),
    ),
    "delta rule, gated": (
        rules.delta_rule,
        lambda s: (delta_rule(s), s.n, {"q": s.d, "k": s.d, "v": s.each * s.v, "_": s.each * s.v}),
    ),
    "latent": (rules.latent, lambda s: ({"qk_nope_head_dim": s.d, "v_head_dim": s.v}, s.n, {"k": s.d, "v": s.v})),
    "linear attention": (rules.linear_attention, lambda s: ({}, 1, {"q": 1, "k": s.d, "v": s.d})),
    "heads first": (rules.head_first, lambda s: by_head(s, head_first=True)),
    "heads last": (rules.head_first, lambda s: thirds(s, head_first=False)),
}  # fmt: skip
# No reshape but the one that the rule is: sizes that the module holds itself, and what is no layout. Those with sizes
# are compared with their libraries' own code in torch/test_fused.py.
OTHERS = {"sized", "shared", "reordered", "global_window", "lambda_layer", "in_split", "guided"}


@pytest.mark.law("fused-layouts")
@pytest.mark.parametrize("name", CASES)
@given(st.data())
def test_rows_are_a_partition_and_those_of_a_plain_reshape(name: str, data: st.DataObject) -> None:
    rule, case = CASES[name]
    heads, size = st.integers(1, 6), st.integers(1, 5)
    known, blocks, parts = case(data.draw(st.builds(Sizes, heads, heads, heads, size, size)))
    known = {data.draw(st.sampled_from(key.split("|"))): value for key, value in known.items()}
    fused = Fused("".join(letter for letter in "qkv" if letter in parts), blocks * sum(parts.values()))
    ends = np.cumsum([*parts.values()])[:-1]
    pieces = np.split(np.arange(fused.out).reshape(blocks, -1), ends, axis=1)
    expected = dict(zip(parts, pieces, strict=True))
    found = place_rows(rule(Facts([known.get], "there is no"), fused), fused)
    rows = {letter: list(range(fused.out) if one is None else one.indices()) for letter, one in found.items()}
    assert rows == {letter: part.reshape(-1).tolist() for letter, part in expected.items() if letter != "_"}
    other = expected.get("_", np.zeros(0, int)).reshape(-1)
    assert sorted([*other, *(row for one in rows.values() for row in one)]) == list(range(fused.out))


@pytest.mark.law("fused-layouts")
def test_every_rule_is_tried() -> None:
    tried = {rule.__qualname__.partition(".")[0] for rule, _ in CASES.values()}
    functions = [rule for _, rule in inspect.getmembers(rules, inspect.isfunction) if rule.__module__ == rules.__name__]
    assert tried | OTHERS == {rule.__name__ for rule in functions} - {"place_rows"}
    assert {entry.rule.__qualname__.partition(".")[0] for entry in TABLE} <= tried | OTHERS


@pytest.mark.parametrize(
    ("rule", "known", "out", "why"),
    [
        (rules.by_head, {}, 12, "there is no num_attention_heads: it does not say how many heads"),
        (rules.by_head, {"num_heads": 5}, 36, "5 blocks of 6 rows were expected"),
        (rules.by_group, {"num_heads": 4}, 24, "there is no num_key_value_heads"),
        (rules.by_group, {"num_heads": 4, "num_kv_heads": 3}, 24, "4 heads of queries do not share 3 of keys evenly"),
        (rules.falcon, {"num_heads": 4, "multi_query": True}, 24, "there is no new_decoder_architecture"),
        (rules.falcon, {"new_decoder_architecture": False}, 24, "there is no multi_query"),
        (rules.falcon, {"new_decoder_architecture": 1, "multi_query": True}, 24, "no new_decoder_architecture"),
        (rules.glm, {"num_attention_heads": 4}, 24, "there is no multi_query_attention"),
        (rules.concatenated, {"n_heads": 6, "n_kv_heads": 2, "head_dim": 2}, 24, "do not follow"),
        (rules.concatenated, {}, 25, "do not follow"),
        (rules.thirds, {}, 25, "3 equal parts were expected"),
        (rules.levit, {"num_heads": 2, "key_dim": 40}, 24, "2 blocks of 12 rows were expected"),
        (rules.code_gen, {}, 30, "4 blocks of 6 rows were expected"),
        (rules.in_split, {}, 30, "no list of four sizes"),
        (rules.reordered, {}, 30, "reorders the rows of q and k"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(rule: rules.Rule, known: Mapping[str, Any], out: int, why: str) -> None:
    fused = Fused("qkv", out)
    with pytest.raises(LayoutError, match=why):
        place_rows(rule(Facts([known.get], "there is no"), fused), fused)


def test_the_output_projection_has_a_say() -> None:
    """Thirds would fill 24 rows, but the heads give 12 numbers."""
    for rule in (rules.concatenated, rules.thirds):
        with pytest.raises(LayoutError):
            rule(Facts([], ""), Fused("qkv", 24, o_in=12))
    for q_out, o_in in ((12, None), (None, 12)):
        with pytest.raises(LayoutError, match="do not follow"):
            rules.concatenated(Facts([], ""), Fused("kv", 20, q_out, o_in))


# -- The table --------------------------------------------------------------------------------


def test_a_class_or_a_model_type_that_is_not_there_has_no_entry() -> None:
    assert of_class(["BloomAttentio", "torch.nn.Module"], lambda name: True) is None
    # A name that several libraries use, without the attributes of the one that is meant.
    assert of_class(["SelfAttention"], lambda name: False) is None
    assert of_config({"model_type": "blom"}, StoredWeight("query_key_value")) is None
    assert of_config({"model_type": "bloom"}, StoredWeight("qkv")) is None
    assert of_config({}, StoredWeight("query_key_value")) is None
    assert of_config({"model_type": None, "architecture": 3}, StoredWeight("qkv")) is None


def test_of_convolutions_other_names_decide_nothing() -> None:
    for ndim, doubtful in ((3, ["qkv"]), (4, ["qkv", "kv", "qkv_proj"]), (5, [])):
        for name in {name for entry in TABLE for name in entry.weights}:
            assert contested({}, StoredWeight(name, ndim=ndim)) == (name in doubtful), (name, ndim)


# -- Checkpoints ------------------------------------------------------------------------------


def stored(name: str, out: int, cols: int = 8, output: str = "", where: str = "layers.0.attention") -> Any:
    found: dict[str, tuple[int, ...]] = {f"{where}.{name}.weight": (out, cols)}
    return found | ({f"{where}.{output}.weight": (cols, cols)} if output else {})


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize(
    ("shapes", "config", "why"),
    [
        (stored("query_key_value", 24), None, "'query_key_value' in different ways, and there is no config.json"),
        (stored("query_key_value", 24), {}, "config.json has no model_type"),
        (stored("query_key_value", 24), {"model_type": "new"}, "'new' has no known layout"),
        (stored("query_key_value", 24), {"model_type": "bloom"}, "config.json lacks num_attention_heads"),
        (stored("query_key_value", 24), {"model_type": "bloom", "n_head": 5}, "5 blocks of 3 rows were expected"),
        (stored("in_proj", 24), {"num_attention_heads": 2}, "libraries lay out 'in_proj' in different ways"),
        *(
            (stored(name, 24), None, f"libraries lay out '{name}' in different ways")
            for name in ("c_attn", "wqkv", "queries_keys_values", "in_proj_qkvz")
        ),
        (stored("wqkv", 24), {"model_type": "kimi_k25"}, "reorders the rows of q and k"),
        (stored("qkv_proj", 24, output="out_proj"), None, "libraries lay out 'qkv_proj' in different ways"),
        (stored("qkv", 32), {"model_type": "vit"}, "the sizes do not follow"),
        (stored("qkv", 30), {"model_type": "vit"}, "no output projection and no numbers of heads"),
        (stored("qkv", 30), None, "no output projection and no numbers of heads"),
    ],
)
def test_a_checkpoint_that_says_too_little_is_refused(shapes: Any, config: Any, why: str) -> None:
    message = rf"produces q, k, v with one weight of \d+ rows, in an unknown layout: .*{re.escape(why)}"
    with pytest.raises(TargetError, match=rf"{message}.*config\.json next to the weights.*tnadapt.torch"):
        find_stored(shapes, "v", config)


def beside(words: str, *sizes: int, prefix: str = "attn.") -> dict[str, tuple[int, ...]]:
    """Weights of these sizes beside each other."""
    return {f"{prefix}{name}.weight": sizes for name in words.split()}


GPT2, VALUES = {"model_type": "gpt2", "n_head": 2}, (16, 8, 24, 1)
AGREED = ("qkv", "Wqkv", "W_pack", "att_proj", "to_qkv")
HEAD = {"c_attn.weight": (8, 24), "score.weight": (3, 8)}
EMPTY = {f"layers.{n}.attention.qkv.weight": sizes for n, sizes in enumerate(((0, 8), (24, 0), (24,)), 1)}


@pytest.mark.parametrize(
    ("shapes", "wanted", "config", "expected"),
    [
        # Without elements, or of one axis, it is no weight.
        (stored("qkv", 24) | EMPTY, "v", None, {"layers.0.attention.qkv": VALUES}),
        # A depthwise convolution projects nothing, but with one output it does.
        (
            beside("to_q.0 to_k.0 to_v.0", 8, 1, 3, 3) | beside("to_q.1 to_k.1 to_v.1", 8, 8, 1, 1), "qv", None,
            {"attn.to_q.1": None, "attn.to_v.1": None},
        ),
        (beside("to_q to_k to_v", 1, 1, 1, 1), "qv", None, {"attn.to_q": None, "attn.to_v": None}),
        # The name of a wrapped weight says the same in the attention and in the wrapper.
        (beside("qkv.qkv", 24, 8) | beside("proj", 8, 8), "v", None, {"attn.qkv.qkv": VALUES}),
        # Names are settled by those beside them, and a projection by the main one of its weights.
        (beside("to_q", 8, 8) | beside("to_kv", 16, 8), "qv", None, {"attn.to_q": None, "attn.to_kv": (8, 8, 16, 1)}),
        *(
            (
                beside("q_proj v_proj", 8, 8) | {f"attn.{name}": (24, 8)}, "qv", None,
                {"attn.q_proj": None, "attn.v_proj": None},
            )
            for name in ("in_proj.weight", "in_proj_weight")
        ),
        (
            beside("q.down v.down", 4, 8) | beside("q.linear v.linear", 8, 8), "qv", None,
            {"attn.q.linear": None, "attn.v.linear": None},
        ),
        # Names that all libraries agree on need no config.
        *((stored(name, 24), "v", None, {f"layers.0.attention.{name}": VALUES}) for name in AGREED),
        (stored("qkv_proj", 24, output="o_proj"), "v", None, {"layers.0.attention.qkv_proj": VALUES}),
        (beside("qkv", 24, 5) | beside("proj", 8, 8), "v", None, {"attn.qkv": VALUES}),
    ],
)  # fmt: skip
def test_what_projects_is_found(shapes: Any, wanted: str, config: Any, expected: dict[str, Any]) -> None:
    assert {target.module: target.rows for target in find_stored(shapes, wanted, config)} == expected


@pytest.mark.parametrize(
    ("values", "child"),
    [
        # A name with a hint, of which nothing says that it is the value; two weights in one projection.
        (beside("gate_v_proj q_gate_proj", 8, 8), "gate_v_proj"),
        (beside("v_proj.a v_proj.b", 8, 8), "v_proj"),
        # Two are called the main one, or none is: it is too deep.
        (beside("v.proj v.linear", 8, 8), "v"),
        (beside("v.deeper.proj v.other", 8, 8), "v"),
    ],
)
def test_what_makes_a_letter_must_be_clear(values: dict[str, tuple[int, ...]], child: str) -> None:
    shapes = beside("q_proj k_proj o_proj", 8, 8) | values
    why = f"attn.{child} seems to produce v, but with which weight or rows is unknown"
    with pytest.raises(TargetError, match=re.escape(why)):
        find_stored(shapes, "v")
    assert [target.module for target in find_stored(shapes, "q")] == ["attn.q_proj"]
    with pytest.raises(TargetError, match=r"attn\.c_attn\.weight produces k, v with one weight of 16 rows"):
        find_stored(beside("q_attn o_proj", 8, 8) | beside("c_attn", 16, 8), "qv")


def test_heads_of_a_gpt2_are_stored_as_others_store_them() -> None:
    assert [target.transposed for target in find_stored(HEAD, ["c_attn", "score"], GPT2)] == [True, False]
    both = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}
    (target,) = find_stored({f"decoder.transformer.{name}": shape for name, shape in HEAD.items()}, "v", both)
    assert (target.transposed, target.rows) == (True, VALUES)


@pytest.mark.law("fused-on-disk")
def test_each_part_of_a_config_speaks_for_its_own_weights() -> None:
    """With the heads of the text model, 12 and 2, the rows of this vision model would be 36, 6 and 6: they fit, too."""
    text = {"model_type": "qwen2", "num_attention_heads": 12, "num_key_value_heads": 2}
    vision = {"model_type": "qwen2_vl", "embed_dim": 16, "num_heads": 4}
    shapes = stored("qkv", 48, 16, where="visual.blocks.0.attn")
    for config in (
        {"model_type": "qwen2_vl", **text, "vision_config": vision},  # as older releases write it
        {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision},
    ):
        (target,) = find_stored(shapes, "q", config)
        assert target.rows is not None
        assert target.rows.indices() == list(range(16))
    # Named after neither: its shape decides, or what the output projection takes, or nothing.
    config = {"text_config": text, "vision_config": vision}
    for other in (
        stored("qkv", 48, 16, where="tower.0.attn"),
        stored("qkv", 48, 20, where="tower.0.attn") | {"tower.0.attn.proj.weight": (20, 16)},
    ):
        (target,) = find_stored(other, "q", config)
        assert target.shape[0] == 16
    with pytest.raises(TargetError, match="no output projection and no numbers of heads determine its sizes"):
        find_stored(stored("qkv", 48, 20, where="tower.0.attn"), "q", config)
    two = {"encoder": {"model_type": "bloom", "n_head": 2}, "decoder": {"model_type": "bloom", "n_head": 4}}
    with pytest.raises(TargetError, match="several parts, and the name does not say to which"):
        find_stored(stored("query_key_value", 24, where="tower.0.attn"), "q", two)
    (target,) = find_stored(stored("query_key_value", 24, where="decoder.0.attn"), "q", two)
    assert target.rows == (0, 2, 6, 4)
    text["model_type"] = "internlm2"
    shapes = stored("wqkv", 64, 48, where="language_model.layers.0.attention")
    (target,) = find_stored(shapes, "k", {"model_type": "internvl_chat", "llm_config": text, "vision_config": vision})
    assert target.rows == (24, 4, 32, 2)


# -- Layouts that other packages register ----------------------------------------------------------------


# Values first, then keys, then queries: an order that nothing built in has.
PARROT = AttentionLayout(
    lambda facts, fused: (1, [(letter, fused.out // 3) for letter in "vkq"]),
    ("to_qkv",),
    ("ParrotAttention",),
    ("parrot",),
)


@pytest.fixture
def nothing_registered() -> Iterator[None]:
    forget_layouts()
    yield
    forget_layouts()


@pytest.mark.usefixtures("nothing_registered")
def test_a_model_and_its_checkpoint_have_the_same_rows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    import tnadapt.torch as tt

    class ParrotAttention(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.to_qkv = torch.nn.Linear(8, 24)
            self.out_proj = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            v, k, q = self.to_qkv(x).split(8, -1)
            return self.out_proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    class MyAttention(ParrotAttention):
        pass

    assert of_class(["ParrotAttention"], lambda name: False) is None
    register_layout("parrot", PARROT)
    for names in (["ParrotAttention", "BloomAttention"], ["BloomAttention", "ParrotAttention"]):  # the nearest class
        layout = of_class(names, lambda name: True)
        assert layout is not None
        assert names[0] in layout.classes
    model = torch.nn.ModuleDict({"attention": MyAttention()})
    found = {target.role: target.rows for target in tt.find_targets(model, "qkv")}
    assert found == {"q": tna.Rows(16, 8, 24), "k": tna.Rows(8, 8, 24), "v": tna.Rows(0, 8, 24)}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "parrot", "num_attention_heads": 2}))
    stored = {target["role"]: target for target in tna.info(tmp_path)["targets"]}
    assert {role: stored[role]["rows"] for role in "qv"} == {"q": [16, 8, 24, 1], "v": [0, 8, 24, 1]}
    assert np.all([stored[role]["name"].startswith("attention.to_qkv") for role in "qv"])
    assert of_config({"model_type": "parrot"}, StoredWeight("in_proj")) is None


@pytest.mark.usefixtures("nothing_registered")
@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("Parrot", PARROT, "lower-case letters"),
        ("parrot", {}, "takes an AttentionLayout; got {}"),
        ("parrot", AttentionLayout(rules.by_head, ("qkv",)), "nothing to recognize its attention by"),
        ("parrot", AttentionLayout(rules.by_head, ("weight3",), ("A",)), "does not say which of q, k and v"),
        ("parrot", AttentionLayout(rules.by_head, ("Wqkv",), ("MptAttention",)), "MptAttention already has a layout"),
        ("parrot", AttentionLayout(rules.by_head, ("in_proj",), (), ("deberta",)), "deberta already has a layout"),
        ("budgie", PARROT, "ParrotAttention already has a layout"),
    ],
)
def test_what_cannot_be_registered_is_refused(name: str, layout: Any, message: str) -> None:
    if name == "budgie":
        for _ in range(2):  # as a cell that is run again
            register_layout("parrot", PARROT)
    with pytest.raises(tna.ConfigError, match=message):
        tna.register_layout(name, layout)


@pytest.mark.parametrize(
    ("name", "letters", "family", "plain"),
    [
        ("q", "q", "*", False), ("qs", "q", "*", False), ("query", "q", "*", True), ("queries", "q", "*", True),
        ("ks", "k", "*", False), ("key", "k", "*", True), ("v", "v", "*", False), ("value", "v", "*", True),
        ("kv", "kv", "*", False), ("q_k", "qk", "*", False), ("qkv", "qkv", "*", False), ("qkvz", "qkv", "*", False),
        ("query_key_value", "qkv", "*", True), ("queries_keys_values", "qkv", "*", True),
        ("q_proj", "q", "*_proj", True), ("v_proj", "v", "*_proj", True), ("add_q_proj", "q", "add_*_proj", True),
        ("proj_q", "q", "proj_*", True), ("to_q", "q", "to_*", True), ("toQ", "q", "to_*", True),
        ("Wq", "q", "w_*", True), ("Wqkv", "qkv", "w_*", True), ("wkv", "kv", "w_*", True),
        ("in_proj_qkvz", "qkv", "in_proj_*", True), ("kv_b_proj", "kv", "*_b_proj", True),
        ("v_head", "v", "*_head", False), ("query_head", "q", "*_head", False), ("query_net", "q", "*_net", False),
        ("fc_q", "q", "fc_*", False), ("query_fc", "q", "*_fc", False), ("img_attn_q", "q", "img_attn_*", False),
        ("cross_attn_value", "v", "cross_attn_*", True), ("q_dense", "q", "*_dense", False),
        ("c_attn", "qkv", "c_attn", True), ("att_proj", "qkv", "att_proj", True), ("W_pack", "qkv", "W_pack", True),
    ],
)  # fmt: skip
def test_a_name_says_what_it_makes(name: str, letters: str, family: str, plain: bool) -> None:
    assert (
        parse_projection_name(name)
        == parse_projection_name(name, attention=True)
        == ProjectionName(letters, family, plain)
    )


@pytest.mark.parametrize("name", [
    "q_a_proj", "pool_q", "q_norm", "q_gate_proj", "value_states", "q1", "q_2", "proj", "out_proj", "in_proj_bias",
    # Words that are not together, not in order, or the same twice.
    "q_proj_v", "k_q_v", "vq", "v_k", "qq", "q_query_proj", "q_v_proj",
])  # fmt: skip
def test_a_name_says_nothing(name: str) -> None:
    assert parse_projection_name(name) is None
    assert parse_projection_name(name, attention=True) is None


def test_one_says_it_in_an_attention_alone() -> None:
    assert parse_projection_name("in_proj") is None
    assert parse_projection_name("in_proj", attention=True) == ProjectionName("qkv", "in_proj", True)


@pytest.mark.parametrize(
    ("name", "letters"),
    [("q_gate_proj", "q"), ("pos_key_value", "kv"), ("value_states", "v"), ("kq", ""), ("Wv2", ""), ("w_v_norm", "v")],
)
def test_the_letters_among_the_words_of_other_names(name: str, letters: str) -> None:
    assert projection_letters(name) == letters


@pytest.mark.parametrize(
    ("names", "named", "has_output", "expected"),
    [
        # In an attention q and v will do, or k and v (where q is made elsewhere), or q and an output.
        ("q v", True, False, [0, 1]),
        ("k v", True, False, [0, 1]),
        ("q", True, True, [0]),
        ("q", True, False, []),
        ("q k", True, False, []),
        ("v", True, True, []),
        ("qkv", True, False, [0]),
        # Elsewhere all three of one family, or q and v of plain names.
        ("q k v", False, False, [0, 1, 2]),
        ("qkv", False, False, [0]),
        ("q v", False, True, []),
        ("query value", False, False, [0, 1]),
        ("q_proj v_proj", False, False, [0, 1]),
        ("q_proj v_head", False, False, []),
        ("key_proj v_proj", False, True, []),
        ("q_head k_head v_head to_q", False, False, [0, 1, 2]),
        ("to_q q_proj to_v k_proj v_proj", False, False, [0, 2, 1, 3, 4]),
        ("q_proj value", False, False, []),
        ("", True, True, []),
    ],
)
def test_names_beside_each_other_make_an_attention(
    names: str, named: bool, has_output: bool, expected: list[int]
) -> None:
    found = [parse_projection_name(name) for name in names.split()]
    assert None not in found
    assert attention_group(found, named, has_output) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("encoder.layer.3.attention.self", "encoder.layer.3"), ("middle.attention", "middle.attention"),
        ("blocks.0.attn.1.q", "blocks.0.attn.1"), ("3", "3"), ("3.q", "3"), ("", ""), ("layer3.q", "layer3.q"),
    ],
)  # fmt: skip
def test_a_layer_ends_with_the_last_number(path: str, layer: str) -> None:
    assert layer_of(path) == layer


def test_numbers_are_ordered_as_numbers_and_words_after_none() -> None:
    expected = ["", "a", "a.b", "b.x", "b.2", "b.2.c", "b.10", "b.999999999999999999", "0.z", "1", "12"]
    found = expected.copy()
    random.Random(0).shuffle(found)
    assert sorted(found, key=natural) == expected
    assert number("9" * 18) == 10**18 - 1
    assert [number(part) for part in ("9" * 19, "-1", "1.0", "", "²", "x1")] == [None] * 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertSelfAttention", True), ("WindowAttn", True), ("mha", True), ("MHSA", True), ("mla", True), ("MLA", True),
        ("mhax", False), ("mlax", False), ("xmla", False), ("LatentPooling", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_attentions(name: str, expected: bool) -> None:
    assert is_attention(name) == is_attention("layer", name) == is_attention(name, "layer") == expected
    assert not is_attention()


def test_the_main_projection_is_the_only_one_that_is_called_so() -> None:
    for path, prefix in (("q", "q."), ("", "")):  # the top of a model has no name
        down, linear, proj = (f"{prefix}{name}" for name in ("down", "linear", "proj"))
        assert main_projection([down, linear], path, str) == [linear]
        assert main_projection([down, linear, proj], path, str) == [down, linear, proj]


def test_letters_that_share_their_rows_are_given_once() -> None:
    q, k = Rows(0, 4, 12), Rows(4, 4, 12)
    assert list(distinct_rows("qkv", {"q": q, "k": k, "v": k})) == [("q", q), ("k", k)]
    assert list(distinct_rows("qv", {"q": q})) == [("q", q)]
    assert list(distinct_rows("kv", {"k": None, "v": None})) == [("k", None)]

"""Names of projections: the letters q, k and v that they produce, and the attentions that these make together."""

from __future__ import annotations

import random

import pytest

from tnadapt.targets.roles import (
    ProjectionName,
    attention_group,
    distinct_rows,
    is_attention,
    layer_of,
    natural,
    number,
    parse_projection_name,
    projection_letters,
)
from tnadapt.targets.target import Rows


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


@pytest.mark.parametrize("name", ["in_proj", "in_proj_weight"])
def test_some_say_it_in_an_attention_alone(name: str) -> None:
    assert parse_projection_name(name) is None
    assert parse_projection_name(name, attention=True) == ProjectionName("qkv", name, True)


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


def test_letters_that_share_their_rows_are_given_once() -> None:
    q, k = Rows(0, 4, 12), Rows(4, 4, 12)
    assert list(distinct_rows("qkv", {"q": q, "k": k, "v": k})) == [("q", q), ("k", k)]
    assert list(distinct_rows("qv", {"q": q})) == [("q", q)]
    assert list(distinct_rows("kv", {"k": None, "v": None})) == [("k", None)]

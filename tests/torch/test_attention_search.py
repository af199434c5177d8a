"""The recognition of attention modules, and of their query, key, value and output weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.roles import is_attention, parse_projection_name
from tnadapt.targets.target import Rows
from tnadapt.torch._target_selection import find_targets

from .architectures import build
from .modules import Module, linear, names
from .test_target_selection import SHAPES


@pytest.mark.parametrize(
    "name",
    [
        *("q", "query", "q_proj", "query_proj", "to_q", "to_query", "wq", "Wq", "q_lin", "linear_q", "proj_q"),
        *("project_q", "projection_query", "q_head", "query_global", "add_q_proj", "q_linear", "w_qs", "query_layer"),
        *("self_attn_query_content_proj", "q_attn", "layout_query", "fc_q", "lin_q", "to_q_t", "linear_Q"),
    ],
)
def test_names_of_queries(name: str) -> None:
    found = parse_projection_name(name)
    assert found is not None
    assert found.letters == "q"


@pytest.mark.law("no-target")
@pytest.mark.parametrize(
    "name",
    [
        *("q_norm", "norm_q", "pool_q", "pos_query_proj", "lambda_q1", "query_tokens", "q_a_proj", "q_bias", "queue"),
        *("qa_outputs", "quantize", "v1", "conv_q", "attn", "value_embedding", "kv_a_proj_with_mqa", "", "k_cache"),
        *("q_or_v", "q_proj_q", "vq"),
    ],
)
def test_names_of_nothing(name: str) -> None:
    assert parse_projection_name(name) is None


def test_a_lone_value_or_query_is_no_attention() -> None:
    """A value head, a query elsewhere, and q next to v without k belong to reinforcement learning or retrieval."""
    model = Module(
        attn=linear("query", "key", "value"),
        value=nn.Linear(8, 1),
        critic=linear("q", "v"),
        heads=linear("q_head", "v_head", "value_head"),
        retrieval=linear("query"),
        pair=linear("query_proj", "key_proj"),
        feed_forward=linear("key", "value", "receptance"),
    )
    assert names(model) == ["attn.query.weight", "attn.value.weight"]


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        (("q", "k", "v"), "qv"),
        (("to_q", "to_kv"), "qv"),
        (("qk", "v"), "qv"),
        (("q_proj", "v_proj"), "qv"),
        (("query", "value"), "qv"),
        (("q_proj", "value"), ""),
        (("q", "k", "value"), "qv"),
        (("q", "value"), ""),
        (("q_proj", "k_proj"), ""),
        (("qkv",), "qv"),
    ],
)
def test_which_children_make_an_attention(children: tuple[str, ...], expected: str) -> None:
    fused = {"qkv": 24, "to_kv": 16, "qk": 16}
    model = Module(block=Module(**{name: nn.Linear(8, fused.get(name, 8)) for name in children}))
    try:
        found = "".join(target.role for target in find_targets(model))
    except TargetError:
        found = ""
    assert found == expected


def test_in_a_module_called_attention_less_is_enough() -> None:
    """Keys that other layers made, a query that is learned, names of two styles."""
    shared = Module(self_attention=linear("q_proj", "o_proj"))
    learned = Module(attn_pool=linear("k_proj", "v_proj"))
    mixed = Module(attention=linear("q_content_proj", "k_content_proj", "v_proj"))
    assert names(shared) == ["self_attention.q_proj.weight"]
    assert names(learned) == ["attn_pool.v_proj.weight"]
    assert names(mixed) == ["attention.q_content_proj.weight", "attention.v_proj.weight"]
    assert is_attention("MHSA")
    assert not is_attention("Latent", "pattern")


def test_beside_queries_of_their_own_c_attn_is_keys_and_values() -> None:
    """GPT-2's cross-attention."""
    found = find_targets(Module(attn=Module(c_attn=nn.Linear(8, 16), q_attn=nn.Linear(8, 8))), "qkv")
    assert [(target.role, target.module, target.rows) for target in found] == [
        *(("k", "attn.c_attn", Rows(0, 8, 16)), ("v", "attn.c_attn", Rows(8, 8, 16)), ("q", "attn.q_attn", None))
    ]


def test_a_projection_with_a_norm_or_a_pooling() -> None:
    """A depthwise convolution projects nothing; of several weights one may be called the projection."""
    query = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    key = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    value = Module(linear=nn.Linear(8, 8), gate=nn.Linear(8, 8))
    assert names(Module(attn=Module(query=query, key=key, value=value)), "qkv") == [
        *("attn.query.0.weight", "attn.key.2.weight", "attn.value.linear.weight")
    ]


def test_several_weights_for_one_role_are_not_passed_over() -> None:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = Module(attn=Module(query=mlp, key=nn.Linear(8, 8), value=nn.Linear(8, 8)), other=linear("q", "k", "v"))
    with pytest.raises(TargetError, match=r"attn\.query of Module seems to compute q, but with which weight or rows"):
        find_targets(model)
    assert names(model, "v") == ["attn.value.weight", "other.v.weight"]
    assert names(model, ["attn:k", "attn.query.2"]) == ["attn.query.2.weight", "attn.key.weight"]


def test_diffusers_fused_projections_replace_the_separate_ones() -> None:
    model, _ = build("diffusers_unet")
    model.fuse_qkv_projections()
    found = find_targets(model)
    assert [(target.role, target.shape) for target in found] == SHAPES["diffusers_unet"]
    kinds = [target.module.rpartition(".")[2] for target in found]
    assert kinds[:4] == ["to_qkv", "to_qkv", "to_q", "to_kv"]


@pytest.mark.parametrize("fused", [True, False, None])
def test_separate_projections_beside_a_fused_one_count_unless_it_is_said_to_replace_them(fused: bool | None) -> None:
    attention = Module(to_qkv=nn.Linear(8, 24), to_q=nn.Linear(8, 8), to_v=nn.Linear(8, 8), add_q_proj=nn.Linear(8, 8))
    if fused is not None:
        attention.fused_projections = fused
    found = [(target.role, target.module) for target in find_targets(Module(attn=attention))]
    separate = [] if fused else [("q", "attn.to_q"), ("v", "attn.to_v")]
    # That of the other stream is not in the fused one.
    assert found == [("q", "attn.to_qkv"), ("v", "attn.to_qkv"), *separate, ("q", "attn.add_q_proj")]


# PEFT asks transformers for a property that it is about to rename.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_wrapped_layers() -> None:
    peft = pytest.importorskip("peft")
    model, _ = build("bert")
    plain = find_targets(model, "qkv")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"]))
    found = find_targets(wrapped, "qkv")
    assert found[0].module == "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer"
    assert found[1].module == "base_model.model.bert.encoder.layer.0.attention.self.key"
    assert [(target.role, target.shape) for target in found] == [(target.role, target.shape) for target in plain]
    assert found[0].layer == "base_model.model.bert.encoder.layer.0"
    assert names(wrapped, ["query"]) == names(wrapped, "q") == names(wrapped, r".*\.self\.query")
    assert not [name for name in names(wrapped, "all-linear") if "lora" in name]
    assert len(names(wrapped, "all-linear")) == 13  # 2 layers of 6, and the pooler


def test_a_module_under_two_paths_counts_once() -> None:
    attention = linear("query", "key", "value")
    model = Module(first=attention, second=attention, third=Module(query=attention.query, key=None, value=None))
    assert names(model) == ["first.query.weight", "first.value.weight"]
    assert names(model, "all-linear") == ["first.query.weight", "first.key.weight", "first.value.weight"]
    # One output for two attentions, and an alias that comes before the attention.
    pair = Module(alias=nn.Linear(8, 8), first=linear("q", "k", "v"), second=linear("q", "k", "v"))
    pair.first.o = pair.second.o = nn.Linear(8, 8)
    pair.second.q = pair.alias
    assert names(pair, "qo") == ["alias.weight", "first.q.weight", "first.o.weight"]

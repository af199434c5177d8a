"""Finding the weights to adapt, in models of many libraries and with every kind of request."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
from paper.diffusion.unet import ClassEmbedding, PixelAttention, UNet
from tnadapt.errors import TargetError
from tnadapt.targets.target import Rows, Target
from tnadapt.torch._attach import attach
from tnadapt.torch._target_selection import find_targets
from tnadapt.torch._weights import tied

from .architectures import MODELS, build
from .modules import Module, linear, names, qv, roles, vq

UNET = json.loads(Path(__file__).parent.with_name("oracles.json").read_text())["unet_qv"]


# -- By role, in every library -----------------------------------------------------------------

SQUARE = qv((32, 32))

SHAPES = {
    "torch_encoder": qv((16, 16)) * 2,
    "torch_decoder": qv((16, 16)) * 2,
    "torch_attention_kdim": qv((16, 16), (16, 20)),
    "torchvision_vit": SQUARE * 2,
    "torchvision_swin": qv((16, 16)) * 2 + qv((32, 32)),
    "timm_vit": SQUARE * 2,
    "timm_swin": qv((16, 16)) * 2 + qv((32, 32)),
    "timm_swinv2": qv((16, 16)) * 2 + qv((32, 32)),
    "timm_beit": SQUARE * 2,
    "timm_eva": SQUARE * 2,
    "bert": SQUARE * 2,
    "albert": SQUARE,  # three layers of one weight
    "modernbert": SQUARE * 2,
    "vit": SQUARE * 2,
    "dinov2": SQUARE * 2,
    "clip": vq((32, 32)) * 2 + vq((48, 48)) * 2,
    "gpt2": SQUARE * 2,
    "gpt2_cross": [*SQUARE, ("v", (32, 32)), ("q", (32, 32))],  # c_attn with k and v, then q_attn
    "llama": qv((32, 32), (16, 32)) * 2,  # 4 heads of 8, and 2
    "phi3": qv((32, 32), (8, 32)) * 2,
    "gpt_neox": SQUARE * 2,
    "bloom": SQUARE * 2,
    "falcon_old": SQUARE * 2,
    "falcon_multi_query": qv((32, 32), (8, 32)) * 2,
    "falcon_new": qv((32, 32), (16, 32)) * 2,
    "gpt_bigcode": qv((32, 32), (8, 32)) * 2,
    "gpt_bigcode_heads": SQUARE * 2,
    "codegen": SQUARE * 2,
    "mpt": SQUARE * 2,
    "deepseek_v3": qv((4 * 10, 8), (4 * 8, 12)) * 2,  # from latents of 8 and 12
    "t5": qv((24, 32)) * 6,  # 3 heads of 8, in 2 layers that attend to themselves, 2 that do both
    "whisper": vq((32, 32)) * 3,
    "diffusers_unet": (qv((32, 32)) + qv((32, 32), (32, 12))) * 4,
    "paper_unet": qv((64, 64)) * 2 + qv((128, 128)) * 16 + qv((64, 64)) * 3,
}

LAYERS = {
    "torch_encoder": ["layers.0", "layers.1"],
    "torch_attention_kdim": [""],
    "timm_swin": ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "gpt2_cross": ["h.0"],
    "t5": [
        *("encoder.block.0.layer.0", "encoder.block.1.layer.0"),
        *("decoder.block.0.layer.0", "decoder.block.0.layer.1", "decoder.block.1.layer.0", "decoder.block.1.layer.1"),
    ],
    "paper_unet": [*(f"down.{place}" for place in (0, 1, 3, 4, 6, 7, 9, 10)), *(f"up.{place}" for place in range(12))],
}


@pytest.mark.law("fused-rows")
@pytest.mark.parametrize("name", SHAPES)
def test_queries_and_values_of_a_model(name: str) -> None:
    model, _ = build(name)
    found = find_targets(model)
    assert [(target.role, target.shape) for target in found] == SHAPES[name]
    parameters = dict(model.named_parameters())
    for target in found:
        assert tuple(parameters[target.name].shape) == target.stored
        assert tuple(target.select(parameters[target.name]).shape) == target.shape
    # What is asked for alone is what was found together.
    assert find_targets(model, "q") == [target for target in found if target.role == "q"]
    assert find_targets(model, "vq") == found


def test_every_model_is_tested() -> None:
    assert SHAPES.keys() == MODELS.keys() - {"torchvision_resnet"}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    model, _ = build(name)
    layers = list(dict.fromkeys(target.layer for target in find_targets(model)))
    assert [layer for layer in layers if layer != "middle.attention"] == LAYERS[name]


@pytest.mark.parametrize(
    ("name", "count", "outputs"),
    [
        ("torch_encoder", 2, "layers.0.self_attn.out_proj"),
        ("timm_vit", 2, "blocks.0.attn.proj"),
        ("bert", 2, "bert.encoder.layer.0.attention.output.dense"),
        ("albert", 1, "encoder.albert_layer_groups.0.albert_layers.0.attention.dense"),
        ("gpt2", 2, "transformer.h.0.attn.c_proj"),
        ("llama", 2, "model.layers.0.self_attn.o_proj"),
        ("t5", 6, "encoder.block.0.layer.0.SelfAttention.o"),
        ("bloom", 2, "h.0.self_attention.dense"),
        ("modernbert", 2, "layers.0.attn.Wo"),
        ("diffusers_unet", 8, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("paper_unet", 21, "down.0.attention.proj"),
    ],
)
def test_output_projections(name: str, count: int, outputs: str) -> None:
    found = find_targets(build(name)[0], "o")
    assert len(found) == count
    assert {target.role for target in found} == {"o"}
    assert found[0].module == outputs
    assert [target.role for target in find_targets(build(name)[0], "qkvo")].count("o") == count


@pytest.mark.law("meta-device")
def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = nn.TransformerEncoderLayer(4096, 8)
    assert roles(model) == qv((4096, 4096))


# -- The paper's U-Net -------------------------------------------------------------------------


def test_the_papers_unet_is_as_large_as_it_says() -> None:
    net = sum(weight.numel() for weight in UNet().parameters())
    label = sum(weight.numel() for weight in ClassEmbedding().parameters())
    assert (net, label) == (10_409_027, 300)
    # 10.42 million in the paper.
    assert abs(net + label - 10.42e6) < 0.0011 * 10.42e6


def test_the_papers_unet_has_21_attentions_in_their_order() -> None:
    model = UNet()
    order = [*model.down, model.middle, *model.up]
    widths = [stage.attention.proj_q.in_channels for stage in order if hasattr(stage, "attention")]
    assert widths == [64, 64] + [128] * 6 + [128] + [128] * 9 + [64] * 3
    assert sum(isinstance(module, PixelAttention) for module in model.modules()) == 21


def test_the_papers_counts_come_out() -> None:
    shapes = [target.shape for target in find_targets(UNet())]
    assert len(shapes) == 42
    assert sum(map(math.prod, shapes)) == 565_248
    presets = tna.presets
    configs = [
        presets.lora(rank=1),
        presets.lorta(rank=1, order=5),
        presets.lorta(rank=1, order=3),
        presets.superlora(rank=1),
        presets.lorta(rank=1, order=5).replace(projection="linear", ratio=0.01),
    ]
    assert [tna.parameter_count(config, shapes) for config in configs] == [
        entry["parameters"] for entry in UNET["counts"]
    ]


# -- Kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "last"),
    [
        ("timm_vit", 8, "blocks.1.mlp.fc2.weight"),
        ("torchvision_vit", 8, "encoder.layers.encoder_layer_1.mlp.3.weight"),
        ("bert", 13, "bert.pooler.dense.weight"),
        ("gpt2", 8, "transformer.h.1.mlp.c_proj.weight"),
        ("llama", 14, "model.layers.1.mlp.down_proj.weight"),
        ("gpt_neox", 8, "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"),
        ("clip", 26, "text_projection.weight"),
        ("t5", 2 * 6 + 2 * 10, "decoder.block.1.layer.2.DenseReluDense.wo.weight"),
    ],
)
def test_all_linear_but_the_head(name: str, count: int, last: str) -> None:
    found = find_targets(build(name)[0], "all-linear")
    assert len(found) == count
    assert found[-1].name == last
    assert {target.role for target in found} == {"linear"}
    assert all(target.rows is None for target in found)


def test_all_linear_takes_the_weights_of_torchs_attention() -> None:
    assert names(nn.TransformerEncoderLayer(8, 2, 8), "all-linear") == [
        *("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    ]


def test_the_head_is_what_the_model_calls_so() -> None:
    plain = Module(body=nn.Linear(8, 8), classifier=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert names(plain, "all-linear") == ["body.weight", "classifier.0.weight"]
    assert names(Module(module=plain), "all-linear") == ["module.body.weight", "module.classifier.0.weight"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "all-linear") == ["0.weight", "1.weight"]


# -- By name -----------------------------------------------------------------------------------


def test_a_regular_expression_is_for_the_whole_path() -> None:
    model, _ = build("bert")
    assert names(model, r".*layer\.1\.attention\.self\.(query|key)") == [
        *(f"bert.encoder.layer.1.attention.self.{name}.weight" for name in ("query", "key"))
    ]
    assert roles(model, ".*self.value") == [("linear", (32, 32))] * 2
    with pytest.raises(TargetError, match=r"no module .* matches 'query' \(14 could\); close matches: .*self\.query"):
        find_targets(model, "query")
    with pytest.raises(TargetError, match=r"is a regular expression for a whole path: \['query'\] matches 2 of them$"):
        find_targets(model, "query")
    for word, meant in (("all_linear", "all-linear"), ("linear", "all-linear"), ("embedding", "embeddings")):
        with pytest.raises(TargetError, match=rf"'{word}' \(14 could\); did you mean '{meant}'\? it has: bert\."):
            find_targets(model, word)
    with pytest.raises(TargetError, match=r"did you mean 'all-linear'\? close matches: 0\.linear"):
        find_targets(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), "all_linear")
    with pytest.raises(
        TargetError, match=r"'bert.encoder.layer.0' is a BertLayer, .* such as bert.encoder.layer.0.att"
    ):
        find_targets(model, r"bert\.encoder\.layer\.\d")
    with pytest.raises(TargetError, match="not a role, keyword or regular expression: "):
        find_targets(model, "(query")


def test_lists_take_whole_segments() -> None:
    model, _ = build("bert")
    assert len(names(model, ["query"])) == 2
    assert names(model, ["0.attention.self.query", "pooler.dense"]) == [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.pooler.dense.weight",
    ]
    assert names(model, ("bert.encoder.layer.1.attention.self.key",)) == [
        "bert.encoder.layer.1.attention.self.key.weight"
    ]
    for part in ("uery", "tion.self.query", "self.que", "weight"):
        with pytest.raises(TargetError, match="whole paths or their last whole parts"):
            find_targets(model, [part])


def test_the_order_is_the_models_and_nothing_comes_twice() -> None:
    model, _ = build("bert")
    expected = names(model, {"query", "value"})
    assert names(model, ["value", "query", "self.query", "value"]) == expected
    assert [name.rpartition(".self.")[2] for name in expected] == ["query.weight", "value.weight"] * 2


def test_parts_of_a_fused_weight_by_name() -> None:
    model, _ = build("timm_vit")
    assert roles(model, ["blocks.0.attn.qkv"]) == [("linear", (96, 32))]
    assert roles(model, ["blocks.0.attn.qkv:vq"]) == qv((32, 32))
    assert roles(model, ["blocks.1.attn:ok"]) == [("k", (32, 32)), ("o", (32, 32))]
    assert find_targets(model, ["attn:qv"]) == find_targets(model, ["qkv:qv"]) == find_targets(model)
    assert roles(model, ["attn.proj:o"]) == [("o", (32, 32))] * 2
    with pytest.raises(TargetError, match=r"no module .* matches 'attm' with the roles 'qv' .*matches: blocks.0.attn"):
        find_targets(model, ["attm:qv"])
    with pytest.raises(TargetError, match=r"with the roles 'q'"):
        find_targets(model, ["attn.proj:q"])


def test_weights_of_torchs_attention_by_name() -> None:
    model, _ = build("torch_encoder")
    whole = [("linear", (48, 16))]
    assert roles(model, ["layers.0.self_attn"]) == whole
    assert roles(model, ["layers.0.self_attn.in_proj_weight"]) == whole
    assert roles(model, ["layers.1.self_attn:q", "layers.1.linear1"]) == [("q", (16, 16)), ("linear", (32, 16))]
    apart, _ = build("torch_attention_kdim")
    assert names(apart, ["q_proj_weight", "out_proj"]) == ["q_proj_weight", "out_proj.weight"]


@pytest.mark.law("no-target")
def test_a_name_that_is_nowhere() -> None:
    model, _ = build("bert")
    with pytest.raises(
        TargetError, match=r"matches 'quary' \(14 could\); close matches: bert.encoder.layer.0.attention.self.query"
    ):
        find_targets(model, ["query", "quary"])
    with pytest.raises(TargetError, match=r"matches 'xyz' \(14 could\); it has: bert.encoder.layer.0"):
        find_targets(model, ["xyz"])
    with pytest.raises(TargetError, match="'dropout' is a Dropout, which holds no weight"):
        find_targets(model, lambda path, _: path == "dropout")


# -- By function and by Target ------------------------------------------------------------------


def test_a_function_chooses() -> None:
    model, _ = build("timm_vit")
    assert find_targets(model, lambda path, module: "qv" if path.endswith("attn") else None) == find_targets(model)
    assert names(model, lambda path, module: isinstance(module, nn.Linear) and module.out_features == 32) == [
        *(f"blocks.{block}.{name}.weight" for block in (0, 1) for name in ("attn.proj", "mlp.fc2"))
    ]
    mine = Target("blocks.0.mlp.fc1", (128, 32), "linear", rows=Rows(0, 4, 128))
    assert find_targets(model, lambda path, module: mine if path == mine.module else False) == [mine]
    assert find_targets(model, lambda path, module: [mine] if path == "" else None) == [mine]
    with pytest.raises(TargetError, match=r"for '' it returned 3"):
        find_targets(model, lambda path, module: 3)
    with pytest.raises(TargetError, match=r"matches 'blocks' with the roles 'q'"):
        find_targets(model, lambda path, module: "q" if path == "blocks" else None)


def test_targets_of_the_callers_own() -> None:
    model, _ = build("gpt2")
    found = find_targets(model, "qv")
    # The order of a file's targets is that of its arrays: it stays.
    assert find_targets(model, found[::-1]) == found[::-1]
    assert find_targets(model, [found[1], found[1]]) == [found[1], found[1]]
    with pytest.raises(TargetError, match="targets 0 and 1 overlap"):
        attach(model, targets=[found[1], found[1]])
    apart = Target("transformer.h.0.mlp.c_fc", (32, 128), transposed=True)
    assert find_targets(model, [apart, "attn:q"]) == [found[0], apart, found[2]]
    wrong = [
        (Target("transformer.h.9.attn.c_attn", (32, 96), "q", transposed=True), "no module"),
        (
            Target("transformer.h.0.attn.c_attn", (96, 32), "q"),
            r"stored as \(32, 96\), which is \(in, out\); .*\(96, 32\)",
        ),
        (Target("transformer.h.0.attn.c_attn", (32, 96), "q"), r"target given for it says \(32, 96\)$"),
        (Target("transformer.h.0.attn.c_attn", (32, 96), "q", "kernel"), "Conv1D has no parameter 'kernel'"),
        (Target("transformer.h.0.attn", (32, 96), "q"), "GPT2Attention has no parameter 'weight'"),
    ]
    for target, message in wrong:
        with pytest.raises(TargetError, match=message):
            find_targets(model, [target])


def test_a_parameter_that_no_search_finds_may_be_named() -> None:
    model = Module()
    model.table = nn.Parameter(torch.zeros(4, 6))
    assert find_targets(model, [Target("", (4, 6), parameter="table")])[0].shape == (4, 6)


# -- What is not to be had ---------------------------------------------------------------------


@pytest.mark.law("no-target")
def test_no_target_says_what_there_is() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    with pytest.raises(
        TargetError, match=r"no target in Sequential for 'qv'; it has 12 .*: 0\.weight, .*9\.weight and 2 more"
    ):
        find_targets(model)
    for count, some in ((10, "9.weight. Name"), (11, "9.weight and 1 more. Name")):
        with pytest.raises(TargetError, match=f"it has {count} .*{some}"):
            find_targets(model[:count])
    with pytest.raises(TargetError, match="it has no such weight"):
        find_targets(nn.Sequential(nn.LayerNorm(2)), "all-linear")
    for nothing in ([], lambda path, module: None):
        with pytest.raises(TargetError, match="no target in Sequential"):
            find_targets(model, nothing)


@pytest.mark.parametrize("targets", [None, 3, b"qv", {"q": 1}, [3], [""], [None], [2.0, "q"]])
def test_targets_of_a_wrong_type(targets: Any) -> None:
    with pytest.raises(TargetError, match=r"targets must be roles|list of targets must hold paths"):
        find_targets(nn.Linear(2, 2), targets)


def test_an_empty_string_is_the_model_itself() -> None:
    assert names(nn.Linear(2, 3), "") == ["weight"]
    with pytest.raises(TargetError, match="found in a torch module; got list"):
        find_targets([], "qv")  # type: ignore[arg-type]


# -- Tied weights ------------------------------------------------------------------------------


def test_a_weight_that_another_module_has_as_well() -> None:
    model = Module(first=linear("q", "k", "v"), second=linear("q", "k", "v"))
    model.second.v.weight = model.first.v.weight
    with pytest.raises(TargetError, match=r"first\.v\.weight and second\.v\.weight are one tensor"):
        find_targets(model)
    assert names(model, "q") == ["first.q.weight", "second.q.weight"]
    found = find_targets(model, untie=True)
    assert len(found) == 4
    assert tied(model, found) == [("first.v.weight", "second.v.weight")]
    assert tied(model, find_targets(model, "q")) == []


def test_tied_to_what_is_no_target() -> None:
    model, _ = build("gpt2")
    with pytest.raises(TargetError, match=r"transformer\.wte\.weight and lm_head\.weight are one tensor"):
        find_targets(model, ["lm_head"])
    assert tied(model, find_targets(model, ["lm_head"], untie=True)) == [("transformer.wte.weight", "lm_head.weight")]
    # The head is not among them.
    assert len(find_targets(model, "all-linear")) == 8


@pytest.mark.law("tied-weights")
def test_two_parameters_of_one_memory_are_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert tied(model, [Target("1", (2, 2))]) == [("0.weight", "1.weight")]
    # Those that have no memory, as FSDP takes theirs away between passes, are apart.
    empty = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in empty:
        layer.weight.untyped_storage().resize_(0)
    assert tied(empty, [Target("1", (2, 2))]) == []
    with torch.device("meta"):
        assert tied(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [Target("1", (2, 2))]) == []

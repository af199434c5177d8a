"""Finding the weights to adapt, in models of many libraries and with every kind of request."""

from __future__ import annotations

import contextlib
import functools
import textwrap
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from paper.diffusion.unet import ClassEmbedding, UNet
from tnadapt.errors import TargetError
from tnadapt.targets.target import Rows, Target
from tnadapt.torch import attach, find_targets

from .architectures import MODELS, build, output
from .internals import host_of, reads_outside
from .modules import Module, linear, names, qv, roles, vq

# -- By role, in every library -----------------------------------------------------------------

SQUARE = qv((32, 32))
#: Of models with other weights than two layers of 32 × 32.
SHAPES = {
    "torch_encoder": qv((16, 16)) * 2,
    "torch_decoder": qv((16, 16)) * 2,
    "torch_attention_kdim": qv((16, 16), (16, 20)),
    "torchvision_swin": qv((16, 16)) * 2 + qv((32, 32)),
    "timm_swin": qv((16, 16)) * 2 + qv((32, 32)),
    "timm_swinv2": qv((16, 16)) * 2 + qv((32, 32)),
    "albert": SQUARE,  # three layers of one weight
    "clip": vq((32, 32)) * 2 + vq((48, 48)) * 2,
    "gpt2_cross": [*SQUARE, ("v", (32, 32)), ("q", (32, 32))],  # c_attn with k and v, then q_attn
    "llama": qv((32, 32), (16, 32)) * 2,  # 4 heads of 8, and 2
    "phi3": qv((32, 32), (8, 32)) * 2,
    "falcon_multi_query": qv((32, 32), (8, 32)) * 2,
    "falcon_new": qv((32, 32), (16, 32)) * 2,
    "gpt_bigcode": qv((32, 32), (8, 32)) * 2,
    "deepseek_v3": qv((4 * 10, 8), (4 * 8, 12)) * 2,  # from latents of 8 and 12
    "t5": qv((24, 32)) * 6,  # 3 heads of 8, in 2 layers that attend to themselves, 2 that do both
    "whisper": vq((32, 32)) * 3,
    "diffusers_unet": (qv((32, 32)) + qv((32, 32), (32, 12))) * 4,
    "paper_unet": qv((64, 64)) * 2 + qv((128, 128)) * 16 + qv((64, 64)) * 3,
}


#: How many output projections there are, and the first.
OUTPUTS = {
    "torch_encoder": (2, "layers.0.self_attn.out_proj"),
    "timm_vit": (2, "blocks.0.attn.proj"),
    "bert": (2, "bert.encoder.layer.0.attention.output.dense"),
    "albert": (1, "encoder.albert_layer_groups.0.albert_layers.0.attention.dense"),
    "gpt2": (2, "transformer.h.0.attn.c_proj"),
    "llama": (2, "model.layers.0.self_attn.o_proj"),
    "t5": (6, "encoder.block.0.layer.0.SelfAttention.o"),
    "bloom": (2, "h.0.self_attention.dense"),
    "modernbert": (2, "layers.0.attn.Wo"),
    "diffusers_unet": (8, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    "paper_unet": (21, "down.0.attention.proj"),
}
LAYERS = {
    "torch_attention_kdim": [""],
    "timm_swin": ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
}


# A model without attentions aside, every model is here.
#: Models with weights that a parent reads.
READ_BY_PARENT = ("timm_swinv2", "timm_beit", "timm_eva", "torch_encoder", "torchvision_swin")


# A model without attentions aside, every model is here.
@pytest.mark.law("fused-rows")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"torchvision_resnet"}))
def test_queries_and_values_of_a_model(name: str) -> None:
    """Also who reads them: with the owner's forward forbidden, the model runs if and only if a parent is the host."""
    model, inputs = build(name)
    found = find_targets(model)
    assert [(target.role, target.shape) for target in found] == SHAPES.get(name, SQUARE * 2)
    parameters = dict(model.named_parameters())
    for target in found:
        assert tuple(parameters[target.name].shape) == target.stored
        assert tuple(target.select(parameters[target.name]).shape) == target.shape
        parent = target.module.rpartition(".")[0]
        assert host_of(model, target) == (parent if name in READ_BY_PARENT else target.module)
        assert reads_outside(model, target) == ([parent] if name in READ_BY_PARENT else [])
    # What is asked for alone is what was found together.
    assert find_targets(model, "q") == [target for target in found if target.role == "q"]
    assert find_targets(model, "vq") == found
    if name in LAYERS:
        assert list(dict.fromkeys(target.layer for target in found)) == LAYERS[name]
    if name in OUTPUTS:
        outputs = find_targets(model, "o")
        assert (len(outputs), outputs[0].module) == OUTPUTS[name]
        assert {target.role for target in outputs} == {"o"}
        assert [target.role for target in find_targets(model, "qkvo")].count("o") == len(outputs)

    def forbidden(*_: Any, **__: Any) -> None:
        raise RuntimeError("called")

    model.get_submodule(found[0].module).forward = forbidden
    with (
        torch.no_grad(),
        contextlib.nullcontext() if name in READ_BY_PARENT else pytest.raises(RuntimeError, match="called"),
    ):
        output(model, inputs)


# -- The paper's U-Net -------------------------------------------------------------------------


def test_the_papers_unet_is_as_large_as_it_says() -> None:
    net = sum(weight.numel() for weight in UNet().parameters())
    label = sum(weight.numel() for weight in ClassEmbedding().parameters())
    assert (net, label) == (10_409_027, 300)
    # 10.42 million in the paper.
    assert abs(net + label - 10.42e6) < 0.0011 * 10.42e6


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
        ("torch_encoder", 8, "layers.1.linear2.weight"),
    ],
)
def test_all_linear_but_the_head(name: str, count: int, last: str) -> None:
    found = find_targets(build(name)[0], "all-linear")
    assert (len(found), found[-1].name) == (count, last)
    assert {(target.role, target.rows) for target in found} == {("linear", None)}


# -- By name -----------------------------------------------------------------------------------


def test_a_regular_expression_is_for_the_whole_path_and_lists_take_whole_segments() -> None:
    model, _ = build("bert")
    first, second = (f"bert.encoder.layer.{number}.attention.self" for number in (0, 1))
    assert names(model, r".*layer\.1\.attention\.self\.(query|key)") == [
        f"{second}.query.weight",
        f"{second}.key.weight",
    ]
    assert roles(model, ".*self.value") == [("linear", (32, 32))] * 2
    assert len(names(model, ["query"])) == 2
    assert names(model, ["0.attention.self.query", "pooler.dense"]) == [
        f"{first}.query.weight", "bert.pooler.dense.weight"
    ]  # fmt: skip
    assert names(model, (f"{second}.key",)) == [f"{second}.key.weight"]
    # The model itself.
    assert names(nn.Linear(2, 3), "") == ["weight"]
    # The order is the model's, and nothing comes twice.
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
    # Weights of torch's attention.
    model, _ = build("torch_encoder")
    whole = [("linear", (48, 16))]
    assert roles(model, ["layers.0.self_attn"]) == whole
    assert roles(model, ["layers.0.self_attn.in_proj_weight"]) == whole
    assert roles(model, ["layers.1.self_attn:q", "layers.1.linear1"]) == [("q", (16, 16)), ("linear", (32, 16))]
    apart, _ = build("torch_attention_kdim")
    assert names(apart, ["q_proj_weight", "out_proj"]) == ["q_proj_weight", "out_proj.weight"]


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
    # A parameter that no search finds may be named.
    table = Module()
    table.table = nn.Parameter(torch.zeros(4, 6))
    assert find_targets(table, [Target("", (4, 6), parameter="table")])[0].shape == (4, 6)


# -- What is not to be had ---------------------------------------------------------------------


def linears(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(1, 2, 2), nn.ConvTranspose2d(4, 6, 3)
    )


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.LazyConv2d(3, 1))


def others() -> nn.Module:
    return Module(bag=nn.EmbeddingBag(4, 2), norm=nn.LayerNorm(2), both=nn.Bilinear(2, 2, 2), fine=nn.Linear(2, 2))


def tables(**how: Any) -> nn.Module:
    return Module(embed=nn.Embedding(4, 2, **how))


C_ATTN = "transformer.h.0.attn.c_attn"
NO_WEIGHT, NONE_TYPE = "which holds no weight to adapt", r"targets must be roles|list of targets must hold paths"
REFUSED: list[tuple[Any, Any, str]] = [
    ("bert", "query", r"no module .* matches 'query' \(14 could\); close matches: .*self\.query"),
    *(("bert", word, rf"'{word}' \(14 could\); did you mean '{meant}'\? it has: bert\.")
      for word, meant in (("all_linear", "all-linear"), ("linear", "all-linear"), ("embedding", "embeddings"))),
    (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), "all_linear",
     r"did you mean 'all-linear'\? close matches: 0\.linear"),
    ("bert", r"bert\.encoder\.layer\.\d",
     r"'bert.encoder.layer.0' is a BertLayer, .* such as bert.encoder.layer.0.att"),
    ("bert", "(query", "not a role, keyword or regular expression: "),
    *(("bert", [part], "whole paths or their last whole parts")
      for part in ("uery", "tion.self.query", "self.que", "weight")),
    ("bert", ["query", "quary"],
     r"matches 'quary' \(14 could\); close matches: bert.encoder.layer.0.attention.self.query"),
    ("bert", ["xyz"], r"matches 'xyz' \(14 could\); it has: bert.encoder.layer.0"),
    ("bert", lambda path, _: path == "dropout", "'dropout' is a Dropout, which holds no weight"),
    ("timm_vit", ["attm:qv"], r"no module .* matches 'attm' with the roles 'qv' .*matches: blocks.0.attn"),
    ("timm_vit", ["attn.proj:q"], r"with the roles 'q'"),
    ("timm_vit", lambda path, module: 3, r"for '' it returned 3"),
    ("timm_vit", lambda path, module: "q" if path == "blocks" else None, r"matches 'blocks' with the roles 'q'"),
    ("gpt2", [Target("transformer.h.9.attn.c_attn", (32, 96), "q", transposed=True)], "no module"),
    ("gpt2", [Target(C_ATTN, (96, 32), "q")], r"stored as \(32, 96\), which is \(in, out\); .*\(96, 32\)"),
    ("gpt2", [Target(C_ATTN, (32, 96), "q")], r"target given for it says \(32, 96\)$"),
    ("gpt2", [Target(C_ATTN, (32, 96), "q", "kernel")], "Conv1D has no parameter 'kernel'"),
    ("gpt2", [Target("transformer.h.0.attn", (32, 96), "q")], "GPT2Attention has no parameter 'weight'"),
    (lambda: linears(12), "qv",
     r"no target in Sequential for 'qv'; it has 12 .*: 0\.weight, .*9\.weight and 2 more"),
    (lambda: linears(10), "qv", "it has 10 .*9.weight. Name"),
    (lambda: linears(11), "qv", "it has 11 .*9.weight and 1 more. Name"),
    (lambda: nn.Sequential(nn.LayerNorm(2)), "all-linear", "it has no such weight"),
    *((lambda: linears(12), nothing, "no target in Sequential") for nothing in ([], lambda path, module: None)),
    *((lambda: linears(1), wrong, NONE_TYPE) for wrong in (None, 3, b"qv", {"q": 1}, [3], [""], [None], [2.0, "q"])),
    (list, "qv", "found in a torch module; got list"),
    (convolutions, ["3"], f"ConvTranspose2d, {NO_WEIGHT}"),
    *((functools.partial(tables, **how), targets, rf"embed\.weight {text}")
      for how, text in (({"sparse": True}, r"belongs to an embedding with sparse=True.*set sparse=False"),
                        ({"max_norm": 0.5}, r".* max_norm=0\.5, which rescales .* set max_norm=None"))
      for targets in (["embed"], "embed", [Target("embed", (4, 2))], lambda path, _: path == "embed")),
    *((others, [name], NO_WEIGHT) for name in ("bag", "norm", "both")),
    *((lazy, kind, r"[02]\.weight of Lazy\w+ has no shape yet; run the model once") for kind in ("all-linear", "conv")),
    (lambda: nn.Sequential(Unpacked(), nn.Linear(2, 2)), ["0"], r"0\.weight of Unpacked is quantized"),
    (lambda: Module(attn=Module(q=Unpacked(), k=nn.Linear(2, 2), v=nn.Linear(2, 2))), "qv",
     r"q\.weight of Unpacked is quantized"),
]  # fmt: skip


@pytest.mark.law("no-target")
@pytest.mark.parametrize(("model", "targets", "message"), REFUSED)
def test_no_target_says_what_there_is(model: Any, targets: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        find_targets(build(model)[0] if isinstance(model, str) else model(), targets)


# -- Tied weights ------------------------------------------------------------------------------


@pytest.mark.law("tied-weights")
def test_a_weight_that_another_module_has_as_well() -> None:
    model = Module(first=linear("q", "k", "v"), second=linear("q", "k", "v"))
    model.second.v.weight = model.first.v.weight
    with pytest.raises(TargetError, match=r"first\.v\.weight and second\.v\.weight are one tensor"):
        find_targets(model)
    assert names(model, "q") == ["first.q.weight", "second.q.weight"]
    assert len(find_targets(model, untie=True)) == 4
    # Tied to what is no target; of all layers, the head is not among them.
    gpt2, _ = build("gpt2")
    with pytest.raises(TargetError, match=r"transformer\.wte\.weight and lm_head\.weight are one tensor"):
        find_targets(gpt2, ["lm_head"])
    assert len(find_targets(gpt2, "all-linear")) == 8
    # Two parameters of one memory.
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pair[1].weight = nn.Parameter(pair[0].weight.detach())
    with pytest.raises(TargetError, match=r"0\.weight and 1\.weight are one tensor"):
        find_targets(pair, ["1"])
    # Those that have no memory, as FSDP takes theirs away between passes, are apart.
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    empty = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in empty:
        layer.weight.untyped_storage().resize_(0)
    for model in (meta, empty):
        assert names(model, ["1"]) == ["1.weight"]


# -- The module whose forward reads a weight: the owner, or a parent that reads it without calling the owner -----------


def test_the_fast_path_reads_all_weights_of_a_layer() -> None:
    model, _ = build("torch_encoder")
    hosts = [host_of(model, target) for target in find_targets(model, "all-linear")]
    assert hosts == ["layers.0"] * 4 + ["layers.1"] * 4
    assert host_of(model, find_targets(model, ["layers.0.self_attn:o"])[0]) == "layers.0"
    assert reads_outside(model, find_targets(model, "o")[0]) == ["layers.0", "layers.0.self_attn"]
    decoder, _ = build("torch_decoder")
    assert {host_of(decoder, target) for target in find_targets(decoder, "qkv")} == {
        *("layers.0.self_attn", "layers.0.multihead_attn")
    }


class Reader(nn.Module):
    """Base class of modules that read a weight instead of calling its module; ``reset`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def merged(self) -> Tensor:
        return self.inner.weight + 0

    @property
    def own(self) -> Tensor:
        return self.inner.weight

    def reset(self) -> Tensor:
        return self.inner.weight


INNER, BOTH = {"inner": [""]}, {"layers.0": [""], "layers.1": [""]}
#: Bodies of forward, and who reads which child.
READS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "directly": ("return x @ self.inner.weight.T", INNER),
    "by a method": ("return x @ self.merged()", INNER),
    "by a property": ("return x @ self.own", INNER),
    "by a name": ("inner = self.inner\nreturn x @ inner.weight", INNER),
    "by an annotated name": ("inner: nn.Linear = self.inner\nreturn x @ inner.weight", INNER),
    "by a pair": ("inner, first = self.inner, self.layers[0]\nreturn first(x) @ inner.weight", INNER),
    "only dtype and shape": (
        "return self.inner(x.to(self.inner.weight.dtype)) * self.inner.weight.shape[0] * self.inner.weight.size(0)", {},
    ),
    "in a loop": ("for layer in self.layers:\n    x = x @ layer.weight\nreturn x", BOTH),
    # Children of the same depth are not distinguished.
    "in a loop over children": (
        "for layer in (self.layers[0], self.layers[1]):\n    x = x @ layer.weight\nreturn x", BOTH,
    ),
    "by an index": ("return x @ self.layers[0].weight", {"layers.0": [""]}),
    "by getattr": ("return x @ getattr(self, 'inner').weight", INNER),
    "by getattr with a default": (
        "weight = getattr(self.inner, 'weight', None)\nreturn self.inner(x) if weight is None else x @ weight", INNER,
    ),
    # Whose name it is, is not known.
    "by a computed name": ("return x @ getattr(self, 'in' + 'ner').weight", {**INNER, "other": [""]}),
    "by a computed index": ("return x @ self.layers[len(self.layers) - 1].weight", BOTH),
    "by a walrus": (
        "if (inner := self.inner) is not None:\n    x = x @ inner.weight\n"
        "return x @ (first := self.layers[0]).weight + first.bias", {**INNER, "layers.0": [""]},
    ),
    "in a comprehension": ("return x @ torch.stack([layer.weight for layer in self.layers]).sum(0)", BOTH),
    # The results of functions are not tracked.
    "by a function": ("return x @ child(self, 'inner').weight", {}),
    "of another object": ("return x if other is None else x @ other.inner.weight @ other.layers[0].weight", {}),
}  # fmt: skip


def class_of(body: str, file: Path | None = None) -> Any:
    """Return a class of readers with this body of forward, its source in a file or nowhere."""
    text = "class Made(Reader):\n    def forward(self, x, other=None):\n" + textwrap.indent(body, " " * 8) + "\n"
    if file is not None:
        file.write_text(text)
    space = {"nn": nn, "torch": torch, "Reader": Reader, "child": nn.Module.get_submodule}
    exec(compile(text, file or "<nowhere>", "exec"), space)
    return space["Made"]


class Outer(nn.Module):
    def __init__(self, below: nn.Module) -> None:
        super().__init__()
        self.below = below

    def forward(self, x: Tensor) -> Tensor:
        return self.below(x)


class Reaches(Outer):
    """Two levels down."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.below.inner.weight


def assert_read_by(model: nn.Module, readers: dict[str, list[str]]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            target = Target(path, (2, 2))
            assert reads_outside(model, target) == readers.get(path, [])
            # The outermost encloses the others.
            assert host_of(model, target) == readers.get(path, [path])[0]


@pytest.mark.parametrize("how", READS)
def test_ways_to_read_a_childs_weight(how: str, tmp_path: Path) -> None:
    body, readers = READS[how]
    cls = class_of(body, tmp_path / "made.py")
    inherits = type("Inherits", (cls,), {})
    nothing, directly = (Reader(), class_of(READS["directly"][0], tmp_path / "directly.py")())
    for model, expected in (
        (cls(), readers),
        (inherits(), readers),
        (Outer(cls()), {f"below.{path}": ["below"] for path in readers}),
        (Reaches(nothing), {"below.inner": [""]}),
        (Reaches(directly), {"below.inner": ["", "below"]}),
    ):
        assert_read_by(model, expected)
    # A module under two paths has the readers of both.
    alias = nn.ModuleDict({"alias": nn.Linear(2, 2), "below": directly})
    directly.inner = alias["alias"]
    assert host_of(alias, Target("alias", (2, 2))) == "below"
    # Of a class without source, nothing is known.
    if how == "directly":
        assert host_of(class_of(body)(), Target("inner", (2, 2))) == "inner"


# -- The recognition of attention modules, and of their query, key, value and output weights ---------------------------


def pooled() -> Module:
    """A depthwise convolution projects nothing; of several weights one may be called the projection."""
    query = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    key = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    return Module(attn=Module(query=query, key=key, value=Module(linear=nn.Linear(8, 8), gate=nn.Linear(8, 8))))


def paired() -> Module:
    """One output for two attentions, and an alias that comes before the attention."""
    pair = Module(alias=nn.Linear(8, 8), first=linear("q", "k", "v"), second=linear("q", "k", "v"))
    pair.first.o = pair.second.o = nn.Linear(8, 8)
    pair.second.q = pair.alias
    return pair


def attentions(**places: str) -> Module:
    """Return a module of modules with linear layers of these names."""
    return Module(**{place: linear(*words.split()) for place, words in places.items()})


def shared() -> Module:
    """A module under two paths, and its parts in a third."""
    attention = linear("query", "key", "value")
    return Module(first=attention, second=attention, third=Module(query=attention.query, key=None, value=None))


def unknown() -> nn.Module:
    """A module that nobody knows, with a matrix, and one that is known."""
    model = nn.Sequential(nn.Module(), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    return model


@pytest.mark.parametrize(
    ("make", "targets", "expected"),
    [
        # Value heads, a query elsewhere, and q next to v without k belong to reinforcement learning or retrieval.
        (lambda: attentions(attn="query key value", critic="q v", retrieval="query"), "qv", "attn.query attn.value"),
        (lambda: attentions(heads="q_head v_head value_head", attn="q k v", pair="query_proj key_proj"), "qv",
         "attn.q attn.v"),
        (lambda: Module(attn=linear("q", "k", "v"), value=nn.Linear(8, 1)), "qv", "attn.q attn.v"),
        (lambda: attentions(attn="q k v", feed_forward="key value receptance"), "qv", "attn.q attn.v"),
        # In a module called attention less is enough: keys of other layers, a learned query, names of two styles.
        (lambda: attentions(self_attention="q_proj o_proj"), "qv", "self_attention.q_proj"),
        (lambda: attentions(attn_pool="k_proj v_proj"), "qv", "attn_pool.v_proj"),
        (lambda: attentions(attention="q_content_proj k_content_proj v_proj"), "qv",
         "attention.q_content_proj attention.v_proj"),
        (pooled, "qkv", "attn.query.0 attn.key.2 attn.value.linear"),
        (shared, "qv", "first.query first.value"),
        (shared, "all-linear", "first.query first.key first.value"),
        (paired, "qo", "alias first.q first.o"),
        # Embeddings and matrices of unknown modules must be named.
        *((lambda: Module(embed=nn.Embedding(4, 2), attn=Module(q=nn.Embedding(4, 2), v=nn.Linear(2, 2))), *row)
          for row in (("all-linear", "attn.v"), ("embed", "embed"), (["embed"], "embed"))),
        *((tables, targets, "embed") for targets in ([Target("embed", (4, 2))], lambda path, _: path == "embed")),
        *((unknown, *row) for row in (("all-linear", "1"), (["0"], "0"))),
        # The head is what the model calls so.
        (lambda: Module(body=nn.Linear(8, 8), classifier=linears(2)), "all-linear", "body classifier.0"),
        (lambda: Module(module=Module(body=nn.Linear(8, 8), classifier=linears(2))), "all-linear",
         "module.body module.classifier.0"),
        (lambda: linears(2), "all-linear", "0 1"),
    ],
)  # fmt: skip
def test_what_is_found(make: Any, targets: Any, expected: str) -> None:
    assert names(make(), targets) == [f"{path}.weight" for path in expected.split()]


def test_several_weights_for_one_role_are_not_passed_over() -> None:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = Module(attn=Module(query=mlp, key=nn.Linear(8, 8), value=nn.Linear(8, 8)), other=linear("q", "k", "v"))
    with pytest.raises(TargetError, match=r"attn\.query seems to produce q, but with which weight or rows"):
        find_targets(model)
    assert names(model, "v") == ["attn.value.weight", "other.v.weight"]
    assert names(model, ["attn:k", "attn.query.2"]) == ["attn.query.2.weight", "attn.key.weight"]


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
    # A wrapper hands the weight out.
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), build("timm_beit")[0])
    (target, *_) = find_targets(wrapped)
    assert target.module == "blocks.0.attn.qkv.base_layer"
    assert host_of(wrapped, target) == "blocks.0.attn"


# -- The weights of modules of many kinds: embeddings, convolutions, quantized layers, and modules without weights -----


def test_convolutions() -> None:
    model, _ = build("torchvision_resnet")
    found = find_targets(model, "conv")
    assert len(found) == 1 + 4 * 2 + 3
    assert (found[0].role, found[0].stored, found[0].shape) == ("conv", (64, 3, 7, 7), (64, 147))
    assert found[0].layer == ""
    assert found[1].layer == "layer1.0"
    # Groups as they are stored; no transposed convolutions.
    assert roles(convolutions(), "conv") == [("conv", (6, 12)), ("conv", (6, 18)), ("conv", (2, 8))]


class Packed(nn.Linear):
    """A layer like bitsandbytes' 4-bit one: bytes in a column, and the sizes as attributes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Unpacked(nn.Module):
    """A layer of integers that does not reveal its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.int8), requires_grad=False)


class Conv1D(Unpacked):
    """A quantized layer of transformers' ``Conv1D``, whose sizes are attributes."""

    nx, nf = 8, 6


def test_quantized_weights_of_known_shape() -> None:
    assert [(target.stored, target.transposed) for target in find_targets(Conv1D(), "all-linear")] == [((8, 6), True)]
    attention = Module(q_proj=Packed(8, 6), k_proj=Packed(8, 6), v_proj=Packed(8, 4))
    assert roles(attention) == qv((6, 8), (4, 8))
    gptq = nn.Linear(8, 6)
    del gptq.weight
    gptq.register_buffer("qweight", torch.zeros(1, 6, dtype=torch.int32))
    assert names(nn.Sequential(gptq), "all-linear") == ["0.weight"]


# They are about to leave torch for torchao, whose weights have a shape.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torchs_quantized_linear() -> None:
    """A layer whose weight is a method."""
    engine = torch.backends.quantized.engine
    if engine == "none":
        pytest.skip("this torch has no quantized kernels")
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic").Linear(8, 6)
    assert roles(nn.Sequential(quantized), "all-linear") == [("linear", (6, 8))]

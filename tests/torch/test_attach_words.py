"""What attach() takes by name and place: presets, layers, what to exclude, biases; and what it warns of."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tnadapt.errors import ConfigError, TargetError
from tnadapt.targets.target import Target

from .life import bits, run
from .small import WIDTH, batch, small
from .test_requantizing import Packed
from .test_requantizing import model as packed

# -- What attach() takes by name: presets, layers, what to exclude, and biases -----------------------------------------


def stacks() -> nn.ModuleDict:
    """Two stacks of layers of different heights, with two experts in each layer, and a head."""

    def layers(number: int) -> nn.ModuleDict:
        parts = [
            {
                "q_proj": nn.Linear(WIDTH, WIDTH),
                "v_proj": nn.Linear(WIDTH, WIDTH, bias=False),
                "experts": nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)) for _ in range(2)),
            }
            for _ in range(number)
        ]
        return nn.ModuleDict({"layers": nn.ModuleList(map(nn.ModuleDict, parts))})

    ends = {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 3)}
    return nn.ModuleDict({"encoder": layers(3), "decoder": layers(2), **ends})


def modules(**words: Any) -> list[str]:
    return [target.module for target in tt.find_targets(stacks(), **words)]


def test_a_preset_by_its_name() -> None:
    model = small()
    named = tt.attach(model, "lora", "qkvo", rank=3, alpha=6, name="named", biases="adapted")
    plain = tt.attach(small(), tna.presets.lora(3, alpha=6), "qkvo", name="plain")
    assert named.config == plain.config
    assert [target.name for target in named.targets] == [target.name for target in plain.targets]
    assert tt.attach(small(), "superlora").config == tna.presets.superlora()
    assert tt.attach(small(), "miss", ["head"], r=1).config == tna.presets.miss(r=1)


def test_the_first_number_of_a_path_is_that_of_a_layer() -> None:
    ups = r".*\.experts\.\d+\.0"
    assert modules(targets=ups, layers=2) == [f"encoder.layers.2.experts.{expert}.0" for expert in (0, 1)]
    # Both stacks have layers 0 and 1, and the last one is another in each.
    assert modules(targets=["q_proj"], layers=range(2)) == [
        f"{stack}.layers.{layer}.q_proj" for stack in ("encoder", "decoder") for layer in (0, 1)
    ]
    assert modules(targets=["q_proj"], layers=-1) == ["encoder.layers.2.q_proj", "decoder.layers.1.q_proj"]
    assert modules(targets=["q_proj"], layers=[0, -1]) == [
        "encoder.layers.0.q_proj", "encoder.layers.2.q_proj", "decoder.layers.0.q_proj", "decoder.layers.1.q_proj",
    ]  # fmt: skip
    # A module's own number is not that of a layer, and what is in no layer is left out.
    assert modules(targets=["head", "q_proj"], layers=2) == ["encoder.layers.2.q_proj"]
    assert modules(targets=[Target("decoder.layers.1.q_proj", (WIDTH, WIDTH))], layers=1) == ["decoder.layers.1.q_proj"]
    model = small()
    every, some = tt.find_targets(model), tt.find_targets(model, layers=[1, 3])
    assert some == [target for target in every if target.module.startswith(("blocks.1", "blocks.3"))]
    assert {target.role for target in some} == {"q", "v"}


# -- Exclusion ---------------------------------------------------------------------------------------


def test_what_is_excluded() -> None:
    linear = modules(targets="all-linear")
    assert "head" not in linear
    assert modules(targets="all-linear", exclude=["experts"]) == [path for path in linear if "experts" not in path]
    assert modules(targets="all-linear", exclude=["encoder", "experts"]) == [
        path for path in linear if "encoder" not in path and "experts" not in path
    ]
    # A path with its last parts, a regular expression, the name of a parameter, roles, and a Target.
    assert modules(targets=["q_proj", "v_proj"], exclude=["layers.1.q_proj"], layers=1) == [
        f"{stack}.layers.1.v_proj" for stack in ("encoder", "decoder")
    ]
    assert modules(targets=["q_proj"], exclude=r"encoder\.layers\.\d") == [
        "decoder.layers.0.q_proj", "decoder.layers.1.q_proj",
    ]  # fmt: skip
    assert modules(targets=["q_proj"], exclude=["encoder.layers.0.q_proj.weight"])[0] == "encoder.layers.1.q_proj"
    assert modules(exclude="q") == modules(targets="v")
    assert modules(exclude=["encoder.layers.0:q"])[:2] == ["encoder.layers.0.v_proj", "encoder.layers.1.q_proj"]
    one = Target("encoder.layers.0.q_proj", (WIDTH, WIDTH))
    assert modules(targets=["q_proj"], exclude=[one]) == modules(targets=["q_proj"])[1:]


def test_rows_and_tied_weights_are_excluded() -> None:
    model = small()
    assert {target.role for target in tt.find_targets(model, "qkv", exclude="k")} == {"q", "v"}
    left = tt.find_targets(model, "qv", exclude=["qkv"])
    assert [target.module for target in left if target.module.startswith("blocks.0")] == []
    text = "exclude names the role 'q' of blocks.0.qkv.weight, of which other rows are a target as well"
    with pytest.raises(tna.TargetError, match=re.escape(text)):
        tt.find_targets(model, ["qkv"], exclude="q")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[1].weight
    with pytest.raises(tna.TargetError, match="one tensor"):
        tt.find_targets(tied, "all-linear")
    assert [target.module for target in tt.find_targets(tied, "all-linear", exclude=["1", "2"])] == ["0"]


# -- Biases ------------------------------------------------------------------------------------------


def test_which_biases_are_trained() -> None:
    model = small()
    adapter = tt.attach(model, "lora", biases="adapted")
    # Separate projections have none; nn.MultiheadAttention has one for all three.
    assert adapter.kept == (
        "blocks.0.qkv.bias", "blocks.2.proj_q.bias", "blocks.2.proj_v.bias", "blocks.3.attn.in_proj_bias",
        "blocks.4.self_attn.in_proj_bias",
    )  # fmt: skip
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in free if "tnadapt" not in name} == set(adapter.kept)
    apart = nn.MultiheadAttention(WIDTH, 2, kdim=4, vdim=4)
    assert tt.attach(apart, "lora", biases="adapted").kept == ("in_proj_bias",)
    assert tt.attach(one_bias(), "lora", ["a"], biases="all").kept == ("b.bias",)
    # All, with what is kept besides.
    adapter = tt.attach(stacks(), "lora", ["v_proj"], biases="all", keep_trainable="head")
    biases = [name for name, _ in stacks().named_parameters() if name.endswith(".bias")]
    assert adapter.kept == ("head.weight", "head.bias", *(name for name in biases if name != "head.bias"))
    assert "norm.bias" in adapter.kept


@pytest.mark.parametrize("biases", ["adapted", "all"])
def test_trained_biases_are_saved_and_loaded(biases: str, tmp_path: Path) -> None:
    model, x = small(), batch()
    adapter = tt.attach(model, "lora", rank=2, biases=biases)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "tnadapt" not in name}
    model(x).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in before.items() if not torch.equal(model.get_parameter(name), value)}
    # The outputs of a softmax do not depend on the bias of its keys.
    assert set(adapter.kept) - {"blocks.2.proj_k.bias"} <= moved <= set(adapter.kept)
    adapter.save(tmp_path / "adapter.safetensors")
    other = small()
    loaded = tt.load(other, tmp_path / "adapter.safetensors")
    assert sorted(loaded.kept) == sorted(adapter.kept)
    assert torch.equal(run(other, x), run(model, x))
    # They belong to the model: its trained numbers stay, and all is trainable again.
    trained = {name: model.get_parameter(name).detach().clone() for name in adapter.kept}
    adapter.detach()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in trained.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def one_bias() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4)})


# -- What is refused ---------------------------------------------------------------------------------


LIKE = "such as encoder.layers.0.q_proj.weight"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"layers": 3}, "layers=3: there is no layer 3; 'encoder.layers' has 0 to 2, 'decoder.layers' has 0 to 1"),
        ({"layers": [0, -4]}, "there is no layer -4; 'encoder.layers' has 0 to 2"),
        ({"layers": "1"}, "layers must be the number of a layer, a range or a list of such numbers"),
        ({"layers": []}, "layers must be the number of a layer"),
        ({"layers": True}, "layers must be the number of a layer"),
        ({"layers": [0.0]}, "got [0.0]"),
        ({"layers": None.__class__}, "layers must be the number of a layer"),
        (
            {"targets": r"encoder\.layers\.[12]\.q_proj", "layers": [0]},
            "layers=[0] leaves no target: they are in layers 1 to 2",
        ),
        (
            {"targets": ["head"], "layers": 0},
            "no number of a layer is in the paths of the targets, such as 'head'",
        ),
        ({"exclude": "lm_head"}, f"exclude='lm_head' excludes none of the 5 targets, {LIKE}"),
        ({"exclude": ["head"]}, "exclude=['head'] excludes none of the 5 targets"),
        ({"exclude": "layers"}, f"exclude='layers' excludes none of the 5 targets, {LIKE}"),
        ({"exclude": ["haed"]}, "matches 'haed'"),
        ({"exclude": ["q_proj"]}, "exclude=['q_proj'] excludes all of the 5 targets"),
        ({"exclude": ".*"}, "excludes all of the 5 targets"),
        ({"exclude": "("}, "exclude='(' is not a role, keyword or regular expression"),
        (
            {"exclude": 3},
            "exclude must be roles such as 'qv', 'all-linear', 'conv', a regular expression or a list, as targets; got",
        ),
        ({"exclude": [3]}, "a list of targets must hold paths or tnadapt.Target; got 3"),
        ({"exclude": lambda path, module: True}, "exclude must be roles such as 'qv'"),
    ],
)
def test_layers_and_exclusions_that_are_refused(words: dict[str, Any], text: str) -> None:
    with pytest.raises(tna.TargetError, match=re.escape(text)):
        tt.find_targets(stacks(), **{"targets": ["q_proj"], **words})


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3))


class Codes(nn.Module):
    """A quantized layer of a type that nobody registered."""

    in_features, out_features = 8, 12

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(12, 8, dtype=torch.int8))

    def forward(self, x: Any) -> Any:
        return x @ self.weight.float().T


def codes() -> nn.Module:
    return nn.Sequential(Codes())


ALL = {"targets": "all-linear"}
COLUMNS = P.dora(2, magnitude_axis="cols")
EIGHT = "^targets must be roles such as .* or a function; got 8. Settings are keywords, such as rank=8$"
TANH = {"activation": "tanh", **ALL}
BEHIND = "activation='tanh' depends on the input, .* instead of "
NO_CONFIG = "the config of 'q' must be a tnadapt.Config or the name of a preset; got "

#: For each error a model, the words of attach() and a regular expression for the message.
REFUSED: dict[type[Exception], list[tuple[Any, dict[str, Any], str]]] = {
    TargetError: [
        (small, {"keep_trainable": "haed"}, r"below 'haed'; did you mean 'head'\? The model's parts are: blocks, head"),
        (small, {"keep_trainable": "nothing"}, "at or below 'nothing'; the model's parts are: blocks, head"),
        (small, {"name": 3}, "non-empty string of printable characters; got 3"),
        (small, {"name": ""}, "non-empty string of printable characters; got ''"),
        (small, {"name": "a\nb"}, "printable characters"),
        (small, {"keep_trainable": "q_proj"}, "is both a target and in keep_trainable"),
        (small, {"targets": "nothing like that at all"}, "nothing like that at all"),
        (
            small, {"cfg": {"q": "lora", "q_proj": "dense"}},
            "blocks.1.q_proj.weight is found by 'q' and by 'q_proj', and each weight",
        ),
        (
            small, {"cfg": {"qkv": "lora", ("qkv",): "dense"}},
            r"blocks.0.qkv.weight is found by 'qkv' and by \('qkv',\), and each weight",
        ),
        (small, {"cfg": {"q": "lora", "nothing": "lora"}}, "no module of Small matches 'nothing'"),
        (small, {"cfg": {"(": "lora"}}, r"'\(' is not a role, keyword or regular expression: "),
        (
            small, {"cfg": {"q": "lora", "head": "lora"}, "layers": 1},
            "and exclude leave no target of 'head': leave this pattern",
        ),
        (small, {"cfg": {"q": "lora", "v": "lora"}, "exclude": "o"}, "exclude='o' excludes none of the 10 targets"),
        (small, {"cfg": {3: "lora"}}, "targets must be roles such as 'qv', 'all-linear', 'conv', "),
        (dict, {}, "needs a torch module; got dict"),
        (lambda: "bert", {}, r"got str: open the model first, for example AutoModel\.from_pretrained\('bert'\)"),
        (linear, {}, r"1 linear or convolution weights: 0\.weight"),
        (encoder, {"cfg": "lora", "targets": 8}, EIGHT),
        (encoder, {"cfg": None, "targets": 8}, EIGHT),
        (encoder, {"cfg": "lora", "targets": {"qv": "lora"}}, "^targets must be roles .*; got {'qv': 'lora'}"),
        (
            one_bias, {"cfg": "lora", "targets": ["a"], "biases": "adapted"},
            "biases='adapted': no adapted layer of this ModuleDict has a bias; leave",
        ),
        (
            lambda: nn.Linear(4, 4, bias=False), {"cfg": "lora", "targets": "", "biases": "all"},
            "biases='all': no layer of this Linear has a bias",
        ),
        (
            codes, {"cfg": P.dora(2), **ALL},
            r"apply='magnitude'\), and the values of 0.weight cannot be read: register",
        ),
    ],
    ConfigError: [
        (small, {"strategy": "fast"}, "strategy must be one of"),
        (small, {"tokens": 0}, "tokens must be at least 1"),
        (small, {"activation": "step"}, "activation must be one of"),
        (small, {"strategy": "factored"}, "rows and columns are separate"),
        (small, {"activation": "relu"}, "use tnadapt.presets.lora"),
        (small, {"cfg": P.superlora(2, groups=10**9)}, "more than the"),
        (
            small, {"modules_to_save": 8},
            r"^attach\(\) got an unexpected keyword argument 'modules_to_save': PEFT's 'modules_to_save' is "
            "'keep_trainable' here, an argument of tnadapt.torch.attach$",
        ),
        (small, {"cfg": {}}, "a mapping of patterns to configs must have at least one; got {}"),
        (small, {"cfg": {"q": 3}}, f"{NO_CONFIG}int"),
        (small, {"cfg": {"lora": "qv"}}, "is from patterns to configs, {'qv': 'lora'}; got {'lora': 'qv'}"),
        (small, {"cfg": {"q": None}}, f"{NO_CONFIG}NoneType"),
        (small, {"cfg": {"q": "lroa"}}, r"no preset 'lroa'; did you mean 'lora'\?"),
        (
            small, {"cfg": {"q": "lora", "v": "dora"}},
            "all configs of one adapter must have the same apply; part 0 has 'add', part 1",
        ),
        (small, {"biases": "lora_only"}, "biases must be one of none, adapted, all; got 'lora_only'"),
        (
            encoder, {"strategy": "additive"},
            r"needs a linear layer; self_attn\.in_proj_weight is read by TransformerEncoderLayer itself: use",
        ),
        (encoder, {"cfg": {"rank": 8}}, "^the config of 'rank' must be a tnadapt.Config or the name of a preset; got"),
        (packed, {"cfg": COLUMNS, **ALL}, "magnitude_axis='cols' changes the weight itself, and 0.weight is"),
        (
            codes, {"cfg": P.hira(2), **ALL},
            "apply='hadamard' needs the values of 0.weight, which is quantized, and they cannot be read: register",
        ),
        (linear, {"cfg": P.lora(2, start="given"), **TANH}, f"{BEHIND}'given'"),
        (linear, {"cfg": P.lora(2, start="pissa"), **TANH}, f"{BEHIND}'pissa'"),
        (linear, {"cfg": P.dora(2), "activation": "gelu", **ALL}, "activation='gelu' acts on the input of one"),
        (linear, {"cfg": P.hira(2), "strategy": "factored", **ALL}, "strategy='factored' needs a linear layer"),
        (linear, {"cfg": COLUMNS, "strategy": "additive", **ALL}, "magnitude_axis='cols' scales the input of 0.weight"),
        (linear, {"cfg": P.dora(2), "detach_norm": 2, **ALL}, "detach_norm must be True or False; got 2"),
        (
            small, {"cfg": {"q": "lora"}, "targets": "v"},
            "the keys of a mapping of configs are the targets; got targets='v', too",
        ),
    ],
    tna.BackendError: [
        (small, {"dtype": torch.int32}, "dtype must be one of"),
    ],
    TypeError: [
        (
            small, {"lora_alpha": 8},
            r"^attach\(\) got an unexpected keyword argument 'lora_alpha': PEFT's 'lora_alpha' is 'alpha' here, a "
            "setting of tnadapt.Config and its presets$",
        ),
        (small, {"ranks": 8}, "unexpected keyword argument 'ranks'"),
        (small, {"rank": 8}, r"settings belong to a preset, so name one: attach\(…, 'superlora', rank=…\)"),
        (small, {"cfg": "lora", "rnak": 3}, "preset 'lora' has no setting"),
        (small, {"cfg": "lora", "stratgy": "weight"}, "preset 'lora' has no setting"),
        (small, {"cfg": "lora", "target_modules": "qv"}, "preset 'lora' has no setting"),
        (small, {"cfg": "lora", "lr": 0.1}, r"'lr' is the optimizer's, as in torch.optim.AdamW\(adapter.parameters"),
        (
            small, {"cfg": {"q": "lora"}, "rank": 3},
            r"argument 'rank': a config has its settings already: use config.replace\(rank=…\)",
        ),
    ],
}  # fmt: skip


@pytest.mark.law("no-target", "name-clash")
@pytest.mark.parametrize(
    ("error", "make", "words", "message"), [(error, *row) for error, rows in REFUSED.items() for row in rows]
)
def test_what_attach_refuses_changes_nothing(
    error: type[Exception], make: Any, words: dict[str, Any], message: str
) -> None:
    def state() -> tuple[object, ...]:
        if not isinstance(model, nn.Module):
            return ()
        assert all("forward" not in module.__dict__ for module in model.modules())
        free = [p.requires_grad for p in model.parameters()]
        return repr(model), bits(model), sorted(model.state_dict()), free, dict(model.__dict__)

    tt.register_quantized("packed", Packed)
    model = make()
    before = state()
    with pytest.raises(error, match=message):
        tt.attach(model, **words)
    assert state() == before


@pytest.mark.law("name-clash")
def test_a_second_adapter_of_one_name_is_refused() -> None:
    model = small()
    tt.attach(model)
    with pytest.raises(TargetError, match="this model already has an adapter 'default'"):
        tt.attach(model)
    assert list(tt.adapters(model)) == ["default"]


# -- What is warned of: dropout that drops nothing, and ranks that add nothing -------------------------


def test_dropout_of_embeddings_alone_is_warned_of_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="drops nothing") as caught:
        tt.attach(model, "lora", "embeddings", dropout=0.5)
    assert [str(one.message) for one in caught] == [
        "dropout=0.5 drops nothing here: all targets are embeddings, whose inputs are indices. Leave it out, or adapt "
        "other weights as well"
    ]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.attach(model, "lora", "embeddings", "second")
        tt.attach(model, "lora", ["0", "1"], "third", dropout=0.5)
        model(torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (tna.presets.lora(9), 8),
        (tna.presets.dora(10_000), 8),
        (tna.presets.lokr(5), 4),  # both factors are 4 × 2 or smaller
        (tna.presets.superlora(13), 12),  # 8 * 16 elements, in a square
        (tna.presets.vera(1024), None),  # frozen factors: each further component is another direction
        (tna.presets.unilora(5, rank=64), None),
        (tna.Config(rank=(None, 64), format="tucker"), None),
        (tna.presets.dense(), None),
        # The ranks between two modes are cut to what is possible.
        *((tna.Config(rank=rank, format="tt", groups="weight", fold="stack", order=2), None) for rank in (9, 16, 100)),
    ],
)
def test_a_rank_beyond_the_largest_useful_one_warns(config: tna.Config, most: int | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tt.attach(nn.Sequential(nn.Linear(16, 8)), config, "all-linear")
        if most is not None:
            tt.attach(nn.Sequential(nn.Linear(16, 8)), config.replace(rank=most), "all-linear")
    expected = (
        f"rank={config.rank} is beyond {most}, the largest useful rank for these weights: more parameters add nothing "
        f"to what their updates can be. Give rank={most} or less"
    )
    assert [(str(warning.message), warning.filename) for warning in caught] == (
        [] if most is None else [(expected, __file__)]
    )


@pytest.mark.parametrize("preset", ["lora", "dora", "hira", "loha", "superlora"])
def test_of_a_rank_that_nobody_gave_nothing_is_said(preset: str) -> None:
    call = getattr(tna.presets, preset)
    changed = {"alpha": 3.0, "seed": 1}
    for cfg, settings in ((preset, {}), (preset, changed), (call(), {}), (call(**changed), {}), (None, {})):
        tt.attach(nn.Sequential(nn.Linear(3, 3)), cfg, "all-linear", **settings)
    for cfg, settings in ((preset, {"rank": 33}), (call(33), {})):
        with pytest.warns(UserWarning, match="rank=33 is beyond 3, the largest useful rank"):
            tt.attach(nn.Sequential(nn.Linear(3, 3)), cfg, "all-linear", **settings)

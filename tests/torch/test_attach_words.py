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
from tnadapt.errors import ConfigError, TargetError
from tnadapt.targets.target import Target

from .life import run
from .small import WIDTH, batch, small

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


# -- Presets -----------------------------------------------------------------------------------------


def test_a_preset_by_its_name() -> None:
    model = small()
    named = tt.attach(model, "lora", "qkvo", rank=3, alpha=6, name="named", biases="adapted")
    plain = tt.attach(small(), tna.presets.lora(3, alpha=6), "qkvo", name="plain")
    assert named.config == plain.config
    assert [target.name for target in named.targets] == [target.name for target in plain.targets]
    assert tt.attach(small(), "superlora").config == tna.presets.superlora()
    assert tt.attach(small(), "miss", ["head"], r=1).config == tna.presets.miss(r=1)
    other = small()
    for settings in ({"rnak": 3}, {"stratgy": "weight"}, {"target_modules": "qv"}):
        with pytest.raises(TypeError, match="preset 'lora' has no setting"):
            tt.attach(other, "lora", **settings)
    assert not tt.adapters(other)
    assert all(parameter.requires_grad for parameter in other.parameters())


# -- Layers ------------------------------------------------------------------------------------------


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


def test_layers_of_roles() -> None:
    model = small()
    every, some = tt.find_targets(model), tt.find_targets(model, layers=[1, 3])
    assert some == [target for target in every if target.module.startswith(("blocks.1", "blocks.3"))]
    assert {target.role for target in some} == {"q", "v"}


@pytest.mark.parametrize(
    ("targets", "layers", "text"),
    [
        (["q_proj"], 3, "layers=3: there is no layer 3; 'encoder.layers' has 0 to 2, 'decoder.layers' has 0 to 1"),
        (["q_proj"], [0, -4], "there is no layer -4; 'encoder.layers' has 0 to 2"),
        (["q_proj"], "1", "layers must be the number of a layer, a range or a list of such numbers"),
        (["q_proj"], [], "layers must be the number of a layer"),
        (["q_proj"], True, "layers must be the number of a layer"),
        (["q_proj"], [0.0], "got [0.0]"),
        (["q_proj"], None.__class__, "layers must be the number of a layer"),
        (r"encoder\.layers\.[12]\.q_proj", [0], "layers=[0] leaves no target: they are in the layers 1 to 2"),
        (["head"], 0, "no number of a layer is in the paths of the targets, such as 'head'"),
    ],
)
def test_layers_that_are_none(targets: Any, layers: Any, text: str) -> None:
    with pytest.raises(tna.TargetError, match=re.escape(text)):
        tt.find_targets(stacks(), targets, layers=layers)


# -- Exclusion ---------------------------------------------------------------------------------------


def test_what_is_excluded() -> None:
    linear = modules(targets="all-linear")
    assert "head" not in linear
    assert modules(targets="all-linear", exclude=["experts"]) == [path for path in linear if "experts" not in path]
    assert modules(targets="all-linear", exclude=["encoder", "experts"]) == [
        path for path in linear if "encoder" not in path and "experts" not in path
    ]
    # A path with its last parts, a regular expression, a function, the name of a parameter, roles, and a Target.
    assert modules(targets=["q_proj", "v_proj"], exclude=["layers.1.q_proj"], layers=1) == [
        f"{stack}.layers.1.v_proj" for stack in ("encoder", "decoder")
    ]
    assert modules(targets=["q_proj"], exclude=r"encoder\.layers\.\d") == [
        "decoder.layers.0.q_proj", "decoder.layers.1.q_proj",
    ]  # fmt: skip
    assert modules(targets=["q_proj"], exclude=lambda path, module: path == "encoder") == modules(
        targets=r"decoder.*q_proj"
    )
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


LIKE = "such as encoder.layers.0.q_proj.weight"


@pytest.mark.parametrize(
    ("exclude", "text"),
    [
        ("lm_head", f"exclude='lm_head' excludes none of the 5 targets, {LIKE}"),
        (["head"], "exclude=['head'] excludes none of the 5 targets"),
        (
            "layers",
            "exclude='layers' is a regular expression for the whole path of a module, and excludes none of the 5 "
            f"targets, {LIKE}",
        ),
        ("layers", "; a list takes the last whole parts of paths: exclude=['layers']"),
        (["haed"], "matches 'haed'"),
        (["q_proj"], "exclude=['q_proj'] excludes all of the 5 targets"),
        (".*", "excludes all of the 5 targets"),
        ("(", "exclude='(' is not a role, keyword or regular expression"),
        (3, "exclude must be roles such as 'qv', 'all-linear', 'conv', a regular expression, a list or a function"),
        ([3], "a list of targets must hold paths or tnadapt.Target; got 3"),
        (lambda path, module: 3, "must return True, roles such as 'qv', tnadapt.Target or None"),
    ],
)
def test_exclusions_that_are_refused(exclude: Any, text: str) -> None:
    with pytest.raises(tna.TargetError, match=re.escape(text)):
        tt.find_targets(stacks(), ["q_proj"], exclude=exclude)


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


def test_no_bias_to_train() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4)})
    with pytest.raises(
        tna.TargetError, match="biases='adapted': no adapted layer of this ModuleDict has a bias; leave"
    ):
        tt.attach(model, "lora", ["a"], biases="adapted")
    assert tt.attach(model, "lora", ["a"], biases="all").kept == ("b.bias",)
    with pytest.raises(tna.TargetError, match="biases='all': no layer of this Linear has a bias"):
        tt.attach(nn.Linear(4, 4, bias=False), "lora", "", biases="all")
    with pytest.raises(tna.ConfigError, match="biases must be one of none, adapted, all; got 'lora_only'"):
        tt.attach(small(), "lora", biases="lora_only")


# -- Settings in the place of other arguments of attach(), dropout that drops nothing, and ranks that add nothing ------


THIRD = "the third argument is the targets, such as 'qv'; got "


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("lora", 8), TargetError, f"{THIRD}the number 8: settings are keywords, as in attach(model, 'lora', rank=8)"),
        ((None, 8), TargetError, f"{THIRD}the number 8: settings are keywords, as in attach(model, 'lora', rank=8)"),
        (
            ("lokr", {"rank": 8, "alpha": 2.0}),
            TargetError,
            f"{THIRD}{{'rank': 8, 'alpha': 2.0}}: settings are keywords, and a mapping of patterns to configs is the "
            "second argument: attach(model, 'lokr', rank=8, alpha=2.0)",
        ),
        (
            ("lora", {"qv": "lora"}),
            TargetError,
            f"{THIRD}{{'qv': 'lora'}}: settings are keywords, and a mapping of patterns to configs is the second "
            "argument: attach(model, {'qv': 'lora'})",
        ),
        (
            ({"rank": 8},),
            ConfigError,
            "a mapping has a config for each pattern of weights; got settings, {'rank': 8}: give them as keywords, "
            "with the name of a preset: attach(model, 'lora', rank=8)",
        ),
    ],
)
def test_settings_in_another_place(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    before = list(model.state_dict())
    with pytest.raises(error) as caught:
        tt.attach(model, *given)
    assert str(caught.value) == message
    assert list(model.state_dict()) == before


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

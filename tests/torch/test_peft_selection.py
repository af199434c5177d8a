"""The weights that a TnadaptConfig selects: excluded modules, layers and default targets, as in PEFT's LoraConfig."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import tnadapt as tna
import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tnadapt.torch.peft import TnadaptConfig

# PEFT 0.21 asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

plugin.register()


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def llama(tied: bool = False) -> LlamaForCausalLM:
    sizes = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(sizes))


def bert() -> BertModel:
    sizes = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    return seeded(lambda: BertModel(sizes))


def gpt2() -> GPT2LMHeadModel:
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=16)))


class Experts(nn.Module):
    """A model with numbers after the layer's number, and weights outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))})
            for _ in range(2)
        )


def ours(**more: Any) -> TnadaptConfig:
    return TnadaptConfig(preset="lora", settings={"rank": 2}, **more)


def selected(model: Any, config: Any) -> list[str]:
    """Return the paths of the modules that a PEFT config selects."""
    return sorted(get_peft_model(model, config).base_model.targeted_module_names)


def run(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 17).view(2, 7)).logits


# -- Against LoRA ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 0]}),
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1, 9], "layers_pattern": "model.layers"}),
        (llama, {"target_modules": ["model.layers.2.mlp.up_proj", "lm_head", "q_proj"], "layers_to_transform": 1}),
        (bert, {"target_modules": ["query"], "layers_to_transform": [1]}),
        (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
        (Experts, {"target_modules": ["first", "up"], "layers_to_transform": 0}),
        (Experts, {"target_modules": ["up"], "layers_to_transform": 2, "layers_pattern": "experts"}),
        (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*v_proj"}),
        (llama, {"target_modules": r".*\.[qv]_proj", "exclude_modules": r".*layers\.[02].*"}),
        (llama, {"target_modules": "all-linear", "exclude_modules": ["up_proj", "down_proj", "gate_proj"]}),
        (llama, {"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]}),
    ],
)
def test_the_modules_are_those_of_lora(make: Any, options: dict[str, Any]) -> None:
    found = selected(make(), ours(**options))
    assert found == selected(make(), LoraConfig(r=2, fan_in_fan_out=make is gpt2, **options))
    assert found


def nested(paths: list[str]) -> nn.Module:
    """Return a model with a linear layer at each of these paths."""
    top = nn.Module()
    for path in paths:
        inner = top
        *outer, last = path.split(".")
        for name in outer:
            if name not in inner._modules:
                inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        inner.add_module(last, nn.Linear(2, 2))
    return top


PATHS = [
    "q", "head.q", "layers.0.q", "layers.1.q", "model.layers.0.q", "model.layers.1.mlp.up", "model.layers.10.mlp.up",
    "model.layers.1.experts.0.up", "model.layers.2.experts.1.up", "encoder.block.0.layer.1.q", "model.h.1",
    "model.layers.0.layers.1.up",
]  # fmt: skip


# Two layers' numbers in one path: the first counts.
@example(targets=["up"], layers=0, pattern="layers", exclude=None)
@example(targets=["up"], layers=1, pattern=None, exclude=None)
@given(
    targets=st.lists(st.sampled_from([*PATHS, "up", "mlp.up", "0.q", "1.q", "1"]), min_size=1, max_size=3),
    layers=st.none() | st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 2, 10]), max_size=2),
    pattern=st.sampled_from([None, "", [], "layers", "model.layers", ["experts", "layers"], ["h", "block"], "layer"]),
    exclude=st.none()
    | st.lists(st.sampled_from([*PATHS, "q", "up", "mlp", "1.q"]), max_size=2)
    | st.sampled_from([r".*q", r"model\..*", r".*\.1\..*"]),
)
def test_a_module_is_selected_if_and_only_if_lora_selects_it(
    targets: list[str], layers: Any, pattern: Any, exclude: Any
) -> None:
    options = {"target_modules": targets, "layers_to_transform": layers, "exclude_modules": exclude}
    if layers is not None:
        options["layers_pattern"] = pattern
    lora = LoraConfig(**options)
    expected = {path for path in PATHS if check_target_module_exists(lora, path)}
    config = ours(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You have passed exclude_modules")
        try:
            found = set(selected(nested(PATHS), config))
        except tna.TargetError:
            found = set()
    assert found == expected


# -- Layers ----------------------------------------------------------------------------------------


def test_roles_of_chosen_layers(tmp_path: Path) -> None:
    """Layers select from LoRA's table of default targets, and also from roles, which replace that table here."""
    assert selected(llama(), ours(layers_to_transform=2)) == [
        "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"
    ]  # fmt: skip
    assert selected(gpt2(), ours(target_modules="v", layers_to_transform=[1])) == ["transformer.h.1.attn.c_attn"]
    assert selected(llama(), ours(target_modules="qkvo", layers_to_transform=[1])) == [
        f"model.layers.1.self_attn.{letter}_proj" for letter in "koqv"
    ]
    model = get_peft_model(llama(), ours(target_modules="qv", layers_to_transform=[1], layers_pattern="layers"))
    with torch.no_grad():
        for array in tt.adapters(model)["default"].parameters():
            array.add_(0.3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert (again.peft_config["default"].layers_to_transform, again.peft_config["default"].layers_pattern) == (
        [1],
        "layers",
    )
    assert torch.equal(run(again), run(model))
    assert len(tt.adapters(again)["default"].targets) == 2


def test_the_whole_path_of_an_attention_counts_in_any_layer() -> None:
    names = ["model.layers.0.self_attn:q", "v_proj"]
    assert selected(llama(), ours(target_modules=names, layers_to_transform=1)) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    ]  # fmt: skip


def test_layers_that_are_not_there() -> None:
    with pytest.raises(
        tna.TargetError,
        match=r"layers_to_transform=7 \(layers_pattern='layers'\) selects none of the 3 weights of "
        r"target_modules=\['q_proj'\]; their layers are 0, 1, 2",
    ):
        get_peft_model(llama(), ours(target_modules=["q_proj"], layers_to_transform=7, layers_pattern="layers"))
    with pytest.raises(tna.TargetError, match=r"no layer number is in their paths, such as model\.layers\.0\.self"):
        get_peft_model(llama(), ours(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="h"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"target_modules": ".*foo", "layers_to_transform": [0]},
            r"`layers_to_transform` cannot be used when `target_modules` is a str\. It is '\.\*foo': give a list",
        ),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "cannot be used when `target_modules` is a str"),
        (
            {"target_modules": ".*foo", "layers_pattern": ["bar"]},
            r"`layers_pattern` cannot be used when `target_modules` is a str\.",
        ),
        (
            {"target_modules": ["foo"], "layers_pattern": ["bar"]},
            r"When `layers_pattern` is specified, `layers_to_transform` must also be specified\. .*add the numbers",
        ),
        ({"layers_to_transform": "0"}, "layers_to_transform must be the number of a layer, from 0, or a list of them"),
        ({"layers_to_transform": [0, -1]}, r"layers_to_transform must be .*; got \[0, -1\]"),
        ({"layers_to_transform": True}, "layers_to_transform must be .*; got True"),
        ({"layers_to_transform": 0, "layers_pattern": [3]}, "layers_pattern must be a name or a list of names"),
        (
            {"layers_to_transform": 0, "layers_pattern": "("},
            r"layers_pattern='\(' is not a valid regular expression",
        ),
        ({"exclude_modules": "*"}, r"exclude_modules='\*' is not a valid regular expression: nothing to repeat"),
        ({"exclude_modules": [3]}, "exclude_modules must be a name or a list of names"),
    ],
)
def test_a_wrong_choice_is_refused_when_the_config_is_made(options: dict[str, Any], match: str) -> None:
    with pytest.raises(tna.ConfigError, match=match):
        TnadaptConfig(**options)


# -- Modules that are left out -----------------------------------------------------------------------


def test_roles_but_for_excluded_modules() -> None:
    assert selected(llama(), ours(target_modules="qv", exclude_modules=["v_proj"], layers_to_transform=[0])) == [
        "model.layers.0.self_attn.q_proj"
    ]


def test_excluded_modules_may_be_tied() -> None:
    options = {"target_modules": ["lm_head", "q_proj"]}
    with pytest.raises(tna.TargetError, match=r"one tensor \(tied weights\)"):
        get_peft_model(llama(tied=True), ours(**options))
    assert len(selected(llama(tied=True), ours(**options, exclude_modules=["lm_head"]))) == 3


def test_all_excluded_and_none_excluded() -> None:
    with pytest.raises(
        tna.TargetError,
        match=r"target_modules=\['q_proj'\] names nothing outside of exclude_modules=\['q_proj'\] and modules_to_save",
    ):
        get_peft_model(llama(), ours(target_modules=["q_proj"], exclude_modules=["q_proj"]))
    with pytest.warns(
        UserWarning, match=r"exclude_modules=\['proj'\] but no modules were excluded: none of LlamaForCausalLM matches"
    ):
        get_peft_model(llama(), ours(target_modules=["q_proj"], exclude_modules=["proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(), ours(target_modules=["q_proj"], exclude_modules=["lm_head"]))


# -- Sets ------------------------------------------------------------------------------------------


def test_names_are_a_set_and_are_written_in_order(tmp_path: Path) -> None:
    names = ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj"]
    made = ours(target_modules=names, exclude_modules=names[:1], layers_to_transform=0)
    assert made.target_modules == set(names)
    assert made.exclude_modules == {"v_proj"}
    made.save_pretrained(str(tmp_path))
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (text["target_modules"], text["exclude_modules"]) == (sorted(names), ["v_proj"])
    assert PeftConfig.from_pretrained(str(tmp_path)) == made
    assert made.target_modules == set(names)


# -- Default targets ---------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A model without a known attention, of a type with default targets in PEFT, some of which exist here."""

    def __init__(self, model_type: str = "rwkv") -> None:
        super().__init__()
        self.config = {"model_type": model_type}
        self.stack = nn.Module()
        self.stack.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(4, 4) for name in ("key", "receptance", "gate")}) for _ in range(2)
        )


def test_a_model_without_roles_has_the_default_targets_of_lora(tmp_path: Path) -> None:
    made = ours()
    assert made.target_modules == "qv"
    model = get_peft_model(Mixer(), made)
    assert sorted(model.base_model.targeted_module_names) == selected(Mixer(), LoraConfig(r=2)) != []
    # What was chosen is in the config, and in the file.
    assert made.target_modules == {"key", "receptance"}
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).target_modules == made.target_modules
    layer = {"layers_to_transform": 1}
    assert selected(Mixer(), ours(target_modules=None, **layer)) == selected(Mixer(), LoraConfig(r=2, **layer)) != []


def test_default_targets_are_for_configs_that_name_none() -> None:
    with pytest.raises(tna.TargetError, match="Please specify `target_modules`: no target in Mixer for 'qv'"):
        get_peft_model(Mixer(), ours(target_modules="qv"))
    for other in ("unheard of", "llama"):
        made = ours()
        with pytest.raises(tna.TargetError, match="Please specify `target_modules`: no target in Mixer for 'qv'"):
            get_peft_model(Mixer(other), made)
        assert made == ours()
    # Where the roles are found they are taken, and the config is as it was.
    made = ours()
    before = copy.deepcopy(made)
    assert len(selected(llama(), made)) == 6
    assert made == before
    assert type(before.target_modules) is type(made.target_modules)

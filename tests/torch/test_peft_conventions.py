"""Conventions that users of PEFT and code built on it expect: names, configs, dtypes, tasks, deletion, errors."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("tokenizers")

import warnings

from hypothesis import example, given
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import tnadapt as tna
import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tests.support.depth import in_depth
from tnadapt import presets
from tnadapt.torch.peft import TnadaptConfig

from .small import stir as stir_arrays
from .test_peft import seeded
from .tiny_language_model import peft_config

# PEFT 0.21 asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

plugin.register()


def llama(layers: int = 2, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=24,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return seeded(0, lambda: LlamaForCausalLM(config))


def config(preset: str = "lora", **more: Any) -> TnadaptConfig:
    return peft_config(preset, **more)


def ours(**more: Any) -> TnadaptConfig:
    return TnadaptConfig(preset="lora", settings={"rank": 2}, **more)


def stir(model: PeftModel, name: str = "default") -> None:
    stir_arrays(tt.adapters(model)[name], 0.3, len(name))


@torch.no_grad()
def run(model: Any) -> Any:
    return model(input_ids=torch.arange(3, 17).view(2, 7)).logits


# -- Names -----------------------------------------------------------------------------------------


@pytest.mark.law("trl-reference")
@pytest.mark.parametrize("preset", presets.__all__)
def test_an_adapter_is_copied_by_the_names_of_its_parameters(preset: str, tmp_path: Path) -> None:
    """Copy an adapter as TRL does for its reference; and in a file, each array has the name that it has in the plan."""
    model = get_peft_model(llama(), config(preset))
    stir(model)
    model.save_pretrained(tmp_path)
    arrays = tt.adapters(model)["default"].plan.param_shapes
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {f"base_model.model.tnadapt.{n}" for n in arrays}
    model.add_adapter("ref", model.peft_config["default"])
    copied = 0
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            copied += 1
    assert copied == len(arrays)
    trained = run(model)
    with model.disable_adapter():
        assert not torch.equal(run(model), trained)
    model.set_adapter("ref")
    assert torch.equal(run(model), trained)


@pytest.mark.parametrize("name", ["my-adapter", "50%", "two words", "ünï", "default2"])
def test_any_printable_name_will_do(name: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    first = run(model)
    model.add_adapter(name, config())
    stir(model, name)
    model.set_adapter(name)
    expected = run(model)
    assert not torch.equal(expected, first)
    layer = model.base_model.tnadapt
    assert name in layer.tnadapt_arrays
    assert list(layer.tnadapt_arrays) == list(layer.tnadapt_arrays.keys()) == ["default", name]
    assert dict(layer.tnadapt_arrays.items())[name] is layer.tnadapt_arrays[name]
    assert model.get_layer_status()[-1].available_adapters == sorted(["default", name])
    for path, parameter in model.named_parameters():
        assert model.get_parameter(path) is parameter
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / name / "adapter_model.safetensors").keys() == get_peft_model_state_dict(model).keys()
    again = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(run(again), expected)
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(run(other), expected)
        stir(other, name)
        other.merge_adapter()
        assert not torch.equal(run(other), expected)
        assert torch.equal(run(again), expected)
    model.set_adapter("default")
    model.delete_adapter(name)
    assert torch.equal(run(model), first)
    assert name not in layer.tnadapt_arrays


def test_a_name_does_not_hide_another_one(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(), adapter_name="v1")
    stir(model, "v1")
    for other in ("v", "1", "v11", "default", "ref"):
        model.add_adapter(other, config())
    model.save_pretrained(tmp_path)
    expected = tt.adapters(model)["v1"].arrays()
    stored = load_file(tmp_path / "v1" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.tnadapt.{array}" for array in expected}
    assert all(torch.equal(stored[f"base_model.model.tnadapt.{name}"], array) for name, array in expected.items())
    # attach() takes names with dots, too.
    base = llama()
    handle = tt.attach(base, name="v1.0")
    assert list(tt.adapters(base)) == ["v1.0"]
    assert "tnadapt_v1%2E0_group0_split0_factor0" in base.state_dict()
    handle.detach()
    with pytest.raises(tna.TargetError, match=r"called 'v1%2E0': 'v1\.0' is encoded like this in the names"):
        tt.attach(base, name="v1%2E0")


# -- The config ------------------------------------------------------------------------------------


def test_the_config_is_kept_and_not_changed(tmp_path: Path) -> None:
    given = config()
    before = copy.deepcopy(given)
    model = get_peft_model(llama(), given)
    assert model.peft_config["default"] is given
    model.add_adapter("second", given)
    model.save_pretrained(tmp_path)
    assert given == before == copy.copy(given) == pickle.loads(pickle.dumps(given))
    again = PeftModel.from_pretrained(llama(), tmp_path, config=given)
    assert again.peft_config["default"] is given
    # What was learnt of the base is in the file, and in no other that the same object writes.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base"]["weights"] == {"16x16": 4}
    given.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base"] is None


# -- Dtypes and starts -------------------------------------------------------------------------------


@pytest.mark.law("half-precision-base")
@pytest.mark.parametrize("preset", in_depth(presets.__all__, presets.__all__[::4]))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arrays_take_the_dtype_of_the_base_only_when_asked(dtype: Any, preset: str, tmp_path: Path) -> None:
    plain = run(llama().to(dtype))
    for cast, expected in ((True, torch.float32), (False, dtype)):
        options = {"autocast_adapter_dtype": cast}
        model = get_peft_model(llama().to(dtype), config(preset), **options)
        assert torch.equal(run(model), plain)
        model.add_adapter("second", config(preset), **options)
        stir(model)
        model.save_pretrained(tmp_path)
        for low in (False, True):
            model.load_adapter(tmp_path, f"third{low}", low_cpu_mem_usage=low, **options)
        if not cast:  # a file in half precision is float32 once it is loaded, too
            widened = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
            assert {p.dtype for p in tt.adapters(widened)["default"].arrays().values()} == {torch.float32}
        found = {p.dtype for name, p in model.named_parameters() if model.prefix in name}
        assert found == {expected}
        attached = run(model)
        assert attached.dtype is dtype
        assert not torch.equal(attached, plain)
        model.merge_adapter()
        torch.testing.assert_close(run(model), attached, rtol=0, atol=0.25)
        model.unmerge_adapter()
        assert torch.equal(run(model), attached)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float64, torch.float16), torch.float64),
        ((torch.float16, torch.bfloat16), torch.float32),  # neither has all numbers of the other
        ((torch.float8_e4m3fn, torch.float16), torch.float16),
        ((torch.bfloat16, torch.int8), torch.bfloat16),
        ((torch.float8_e4m3fn, torch.int8), torch.float32),
    ],
)
def test_of_several_dtypes_of_the_base_arrays_take_one_that_has_all_numbers(stored: Any, expected: Any) -> None:
    base = llama()
    for layer in base.model.layers:
        for name, dtype in zip(("q_proj", "v_proj"), stored, strict=True):
            linear = getattr(layer.self_attn, name)
            linear.weight = torch.nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    model = get_peft_model(base, config("lora"), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if model.prefix in name} == {expected}


@pytest.mark.parametrize("preset", presets.__all__)
def test_init_weights_false_changes_the_model(preset: str) -> None:
    plain = run(llama())
    outputs = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(llama(), config(preset, init_weights=False))
        outputs.append(run(model))
        handle = tt.adapters(model)["default"]
        # Neither too little to see nor so much that it would drown the weights.
        size = torch.cat([delta.detach().flatten() for delta in handle.deltas()]).square().mean().sqrt()
        assert 3e-4 < float(size) < 0.5
        torch.testing.assert_close(run(model.merge_and_unload()), outputs[-1], rtol=0, atol=1e-4)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    assert not torch.allclose(outputs[0], plain, atol=1e-3)


# -- Tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "task", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_token_classification_and_question_answering(make: Any, task: str, head: str, tmp_path: Path) -> None:
    sizes = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=2, max_position_embeddings=16,
    )  # fmt: skip

    def outputs(model: Any) -> Any:
        return model(input_ids=torch.arange(3, 17).view(2, 7))[0]

    model = get_peft_model(seeded(0, lambda: make(sizes)), ours(task_type=task))
    assert torch.equal(outputs(model), outputs(seeded(0, lambda: make(sizes))))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "tnadapt_arrays.default." not in name} == {
        f"base_model.model.{head}.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    model.add_adapter("second", ours(task_type=task))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(0, lambda: make(sizes)), tmp_path)
    assert torch.equal(outputs(again), outputs(model.eval()))


# -- Deletion, and the base's state ------------------------------------------------------------------


def test_nothing_is_left_of_a_deleted_adapter() -> None:
    model = get_peft_model(llama(), config(), adapter_name="foobar")
    stir(model, "foobar")
    get_peft_model_state_dict(model, adapter_name="foobar")
    (layer,) = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    model.disable_adapter_layers()  # what is kept of its mixing weight
    assert len(layer.in_features) == len(layer.out_features) == 4
    model.delete_adapter("foobar")
    held = [name for name, value in vars(layer).items() if isinstance(value, (dict, list)) and "foobar" in value]
    assert held == []
    assert not [name for name, _ in model.named_parameters() if "foobar" in name]
    assert layer.in_features == layer.out_features == ()
    assert torch.equal(run(model.base_model.model), run(llama()))
    assert not model.peft_config
    with pytest.raises(tna.TargetError, match=r"Adapter foobar does not exist; there are: none"):
        model.base_model.delete_adapter("foobar")


def test_the_base_s_state_is_the_base_s_alone() -> None:
    expected = llama().state_dict()
    model = get_peft_model(llama(), config())
    stir(model)
    found = get_base_model_state_dict(model)
    assert found.keys() == expected.keys() == model.get_base_model().state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(1.0)
    assert set_base_model_state_dict(model, expected).missing_keys == []
    assert all(torch.equal(tensor, expected[name]) for name, tensor in get_base_model_state_dict(model).items())


def test_arrays_that_set_trainable_froze_stay_frozen_when_adapters_are_switched() -> None:
    model = get_peft_model(llama(), ours())
    model.add_adapter("other", ours())
    handle = tt.adapters(model)["default"]
    handle.set_trainable(arrays="factor0")
    for name in ("other", "default"):
        model.set_adapter(name)
    # PEFT's ``set_requires_grad`` works on a model and on a layer.
    for holder, names in ((model.base_model, "default"), (model.base_model.tnadapt, ["default"])):
        holder.set_requires_grad(names, False)
        assert not any(p.requires_grad for _, p in handle.named_parameters())
        holder.set_requires_grad(names)
        assert {name for name, p in handle.named_parameters() if p.requires_grad} == set(handle.trained)
    assert all(name.endswith("factor0") for name in handle.trained)
    assert handle.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- Selected weights: excluded modules, layers and default targets, as in PEFT's LoraConfig --------


three_layers = functools.partial(llama, 3)


def gpt2() -> GPT2LMHeadModel:
    return seeded(0, lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=16)))


def selected(model: Any, config: Any) -> list[str]:
    """Return the paths of the modules that a PEFT config selects."""
    return sorted(get_peft_model(model, config).base_model.targeted_module_names)


# -- Against LoRA ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
        (three_layers, {"target_modules": r".*\.[qv]_proj", "exclude_modules": r".*layers\.[02].*"}),
        (three_layers, {"target_modules": ["embed_tokens", "q_proj"]}),
        (three_layers, {"target_modules": "all-linear", "exclude_modules": ["up_proj", "down_proj", "gate_proj"]}),
    ],
)
def test_the_modules_are_those_of_lora(make: Any, options: dict[str, Any]) -> None:
    """Those that lists of names select are below."""
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


# -- Layers, and modules that are left out -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        # Layers select from LoRA's table of default targets, and also from roles, which replace that table here.
        (three_layers, {"layers_to_transform": 2}, ["2.self_attn.q_proj", "2.self_attn.v_proj"]),
        (gpt2, {"target_modules": "v", "layers_to_transform": [1]}, ["1.attn.c_attn"]),
        (
            three_layers,
            {"target_modules": "qkvo", "layers_to_transform": [1]},
            [f"1.self_attn.{letter}_proj" for letter in "koqv"],
        ),
        # The whole path of an attention counts in any layer.
        (
            three_layers,
            {"target_modules": ["model.layers.0.self_attn:q", "v_proj"], "layers_to_transform": 1},
            ["0.self_attn.q_proj", "1.self_attn.v_proj"],
        ),
        (
            three_layers,
            {"target_modules": "qv", "exclude_modules": ["v_proj"], "layers_to_transform": [0]},
            ["0.self_attn.q_proj"],
        ),
    ],
)
def test_roles_of_chosen_layers(make: Any, options: dict[str, Any], expected: list[str]) -> None:
    layers = "transformer.h" if make is gpt2 else "model.layers"
    assert selected(make(), ours(**options)) == [f"{layers}.{path}" for path in expected]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 7, "layers_pattern": "layers"},
            r"layers_to_transform=7 \(layers_pattern='layers'\) selects none of the 3 weights of "
            r"target_modules=\['q_proj'\]; their layers are 0, 1, 2",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
            r"no layer number is in their paths, such as model\.layers\.0\.self",
        ),
        ({"target_modules": ["lm_head", "q_proj"]}, r"one tensor \(tied weights\)"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            r"target_modules=\['q_proj'\] names nothing outside of exclude_modules=\['q_proj'\] and modules_to_save",
        ),
    ],
)
def test_selections_that_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(tna.TargetError, match=text):
        get_peft_model(three_layers(tied=True), ours(**options))


def test_what_is_excluded_may_be_tied_and_is_to_be_there() -> None:
    names = ["lm_head", "q_proj"]
    assert len(selected(three_layers(tied=True), ours(target_modules=names, exclude_modules=["lm_head"]))) == 3
    with pytest.warns(
        UserWarning, match=r"exclude_modules=\['proj'\] but no modules were excluded: none of LlamaForCausalLM matches"
    ):
        get_peft_model(three_layers(), ours(target_modules=["q_proj"], exclude_modules=["proj"]))
    get_peft_model(three_layers(), ours(target_modules=["q_proj"], exclude_modules=["lm_head"]))  # without a warning


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
    for model in (Mixer("unheard of"), Mixer("llama"), nn.Sequential(nn.Linear(2, 2))):
        made = ours()
        text = rf"Please specify `target_modules`: no target in {type(model).__name__} for 'qv'.*target_modules=\["
        with pytest.raises(tna.TargetError, match=text):
            get_peft_model(model, made)
        assert made == ours()
    # Where the roles are found they are taken, and the config is as it was.
    made = ours()
    before = copy.deepcopy(made)
    assert len(selected(three_layers(), made)) == 6
    assert made == before
    assert type(before.target_modules) is type(made.target_modules)

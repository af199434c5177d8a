"""Round trips with PEFT's own code: each loads the other's files to the same updates, of the same base."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt import Config, Pretrained

from .conversions import (
    CONVS,
    EXPORTED,
    SHAPES,
    TOLERANCE,
    adapter_on,
    assert_same_updates,
    converted,
    error,
    fill,
    made,
    model,
    peft_updates,
    trained_by_peft,
    updates,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import tnadapt.torch as tt

# What PEFT reads of transformers 5 is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BOTH = SHAPES | CONVS


def theirs(folder: Path, config: Any, shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, Any]:
    """An adapter that PEFT makes, fills and saves; its updates."""
    return peft_updates(trained_by_peft(folder, model(shapes), config, seed))


ALL = ["q_proj", "v_proj", "fc_1", "conv", "point", "line"]


def test_lokr_of_several_sizes_has_several_configs(tmp_path: Path) -> None:
    expected = theirs(tmp_path / "theirs", peft.LoKrConfig(r=9, alpha=3, target_modules=ALL), BOTH)
    found = tna.convert(tmp_path / "theirs", base=BOTH)
    assert found.file is not None
    assert isinstance(found.file.config, tna.CompositeConfig)
    assert {part.config.splits for part in found.file.config.parts} == {1, 2}
    assert found.notes == ()
    assert found.parameters[0] < found.parameters[1]
    # That of the one-dimensional convolution is PEFT's own, which multiplies other axes than LyCORIS.
    assert_same_updates(found.file, expected)


def test_rank_and_alpha_patterns_are_configs_of_their_own(tmp_path: Path) -> None:
    patterns = {"q_proj": 5, "^stem.conv": 3}
    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=ALL, rank_pattern=patterns, alpha_pattern={"q_proj": 5}
    )
    expected = theirs(tmp_path / "theirs", settings, BOTH)
    file = converted(tmp_path / "theirs", base=BOTH)
    special = {"blocks.0.attn.q_proj": (5, 1.0), "stem.conv": (3, 4 / 3)}
    parts = file.config.split(file.targets)
    found = {target.module: (config.rank, config.scale) for config, targets in parts for target in targets}
    assert found == dict.fromkeys(BOTH, (2, 2.0)) | special
    # As many numbers as PEFT has, none of them a padding of zeros.
    assert file.num_parameters == sum(found[target.module][0] * sum(target.shape) for target in file.targets)
    back = tna.convert(file, tmp_path / "back", to="peft-lora")
    assert back.config is not None
    assert (back.exact, back.config["r"]) == (True, 2)
    # Plain paths are left plain.
    assert back.config["rank_pattern"] == {"blocks.0.attn.q_proj": 5, "stem.conv": 3}
    assert back.config["target_modules"] == sorted(BOTH)
    check_loaded(tmp_path / "back", expected)


@pytest.mark.parametrize("rank", [2, 9])
def test_lokr_of_several_sizes_goes_straight_to_the_other_library(rank: int, tmp_path: Path) -> None:
    """The factors are those of the file; dense updates are not factored."""
    shapes = {path: shape for path, shape in BOTH.items() if path != "stem.line"}
    expected = theirs(tmp_path / "theirs", peft.LoKrConfig(r=rank, alpha=3, target_modules=ALL[:-1]), shapes)
    for to in ("peft-lokr", "lycoris-lokr", "lycoris-full"):
        found = tna.convert(tmp_path / "theirs", tmp_path / to, to=to, base=shapes)
        assert found.exact
        assert found.error <= TOLERANCE
        assert found.parameters[1] == found.parameters[0] or to == "lycoris-full"
        assert not found.notes
    check_loaded(tmp_path / "peft-lokr", expected, shapes)
    pytest.importorskip("lycoris")
    from .test_lycoris_format import check_loaded as by_lycoris

    os.rename(tmp_path / "lycoris-lokr", tmp_path / "lycoris.safetensors")  # its loader goes by the ending
    by_lycoris(tmp_path / "lycoris.safetensors", expected, shapes)
    dense = converted(tmp_path / "lycoris-full", base=shapes)
    with pytest.raises(tna.ConfigError, match=r"larger than the update itself, .*: give max_error="):
        tna.convert(dense, to="peft-lokr")


def check_loaded(folder: Path, expected: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> None:
    """PEFT's loader: its update of every weight, and its outputs."""
    base = model(shapes or BOTH)
    wrapped = peft.PeftModel.from_pretrained(model(shapes or BOTH), folder)
    assert_same_updates(peft_updates(wrapped), expected)
    generator = torch.Generator().manual_seed(3)
    for path, delta in expected.items():
        layer, plain = wrapped.get_submodule(f"base_model.model.{path}"), base.get_submodule(path).double()
        size = plain.weight.shape
        x = torch.randn((5, size[1], *(5 for _ in size[2:])), generator=generator)
        with torch.no_grad():
            plain.weight += torch.as_tensor(np.asarray(delta, np.float64))
            assert error(layer(x), plain(x.double())) <= TOLERANCE, path


OURS: dict[str, tuple[Config, str]] = {
    **EXPORTED,
    "cp-weighted": (Config(rank=3, format="cp-weighted"), "lora"),
    "tucker, one factor": (Config(rank=(None, 3), format="tucker"), "lora"),
    "tt": (Config(rank=3, format="tt", alpha=2), "lora"),
    "terms": (Config(rank=2, terms=3), "lora"),
    "a CP across weights": (P.superlora(2, groups=2), "lora"),
}


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_gives_our_updates(name: str, tmp_path: Path) -> None:
    config, method = OURS[name]
    file = made(config, SHAPES)
    found = tna.convert(
        file, tmp_path / "theirs", to=f"peft-{method}", rank=8 if name == "a CP across weights" else None
    )
    assert found.exact
    assert found.error <= TOLERANCE
    check_loaded(tmp_path / "theirs", updates(file), SHAPES)
    assert_same_updates(converted(tmp_path / "theirs"), file)


# Paths that are expressions for other paths, or none at all.
TRICKY: dict[str, tuple[int, ...]] = {"q": (6, 8), "a.q": (6, 8), "aXq": (6, 8), "b.a.q": (6, 8), "a+(c": (6, 8)}


def test_no_weight_takes_another_s_rank_or_scale(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for number, path in enumerate(TRICKY, start=1):
        up, down = rng.standard_normal((6, number)).astype("f4"), rng.standard_normal((number, 8)).astype("f4")
        name = f"lycoris_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = np.asarray(number * number, "f4")
        expected[path] = number * up.astype("f8") @ down
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = tna.convert(tmp_path / "theirs.safetensors", tmp_path / "out", to="peft-lora", base=TRICKY)
    assert found.exact
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == len(TRICKY) - 1
    check_loaded(tmp_path / "out", expected, TRICKY)


SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda pair: pair[0] * pair[1])


RANKS: dict[str, Any] = {"r": st.integers(1, 6), "target_modules": st.just(["w"])}
CONFIGS = st.one_of(
    st.builds(peft.LoraConfig, lora_alpha=st.integers(1, 9), **RANKS),
    st.builds(peft.LoHaConfig, alpha=st.integers(1, 9), use_effective_conv2d=st.booleans(), **RANKS),
    st.builds(
        peft.LoKrConfig, alpha=st.integers(1, 9), decompose_both=st.booleans(), use_effective_conv2d=st.booleans(),
        decompose_factor=st.sampled_from([-1, 1, 2, 3, 4]), **RANKS,
    ),
)  # fmt: skip
KERNELS = st.sampled_from([(), (), (1, 1), (3, 2), (2,)])


@pytest.mark.law("foreign-files")
@given(shape=st.tuples(SIDES, SIDES), kernel=KERNELS, config=CONFIGS, seed=st.integers(0, 9))
@example(  # a Conv1d with a W1 of one number, which multiplies any axes
    shape=(5, 7), kernel=(2,), config=peft.LoKrConfig(r=6, alpha=1, decompose_factor=1, target_modules=["w"]), seed=0
)
@example(  # a factor that divides neither side
    shape=(2, 16), kernel=(), config=peft.LoKrConfig(r=2, alpha=1, decompose_factor=3, target_modules=["w"]), seed=0
)
def test_any_adapter_of_peft_goes_there_and_back(
    shape: tuple[int, int], kernel: tuple[int, ...], config: Any, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path, shapes, kind = tmp_path_factory.mktemp("peft"), {"block.0.w": (*shape, *kernel)}, config.peft_type.lower()
    if kind == "lokr" and len(kernel) == 1:
        # The tensor of a one-dimensional convolution in this form is more than PEFT can multiply.
        config.use_effective_conv2d = False
    expected = theirs(tmp_path / "theirs", config, shapes, seed)
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=shapes)
    assert found.exact
    assert error(updates(tna.load(tmp_path / "ours.safetensors"))["block.0.w"], expected["block.0.w"]) <= TOLERANCE
    # Straight back, every LoRA, LoKr and LoHa is one, the faulty product of one-dimensional convolutions excepted.
    try:
        again = tna.convert(tmp_path / "theirs", tmp_path / "again", to=f"peft-{kind}", base=shapes)
    except tna.ConfigError:
        assert (kind, len(kernel)) == ("lokr", 1)
        from peft.tuners.lokr.layer import factorization

        assert [factorization(side, config.decompose_factor)[0] for side in shape] != [1, 1]
        return
    assert again.exact
    check_loaded(tmp_path / "again", expected, shapes)


QUERIES = tna.Target("attn.q", (6, 4), "q")


@pytest.mark.parametrize(
    ("target", "config", "to", "message"),
    [
        (QUERIES, P.dora(2), "peft-miss", "apply='magnitude' of this adapter does more than add ΔW to the weight, and"),
        (QUERIES, P.hira(2), "gguf-lora", "apply='hadamard' of this adapter does more than add ΔW to the weight, and"),
        (QUERIES, P.dora(2), "peft-lokr", "(tnadapt merge), or convert it to 'peft-lora' (--to peft-lora)"),
        (QUERIES, P.dora(2, magnitude_axis="cols"), "peft-lora", "and peft-lora can only add: merge it into the base"),
        (
            tna.Target("attn.qkv", (18, 4), "q", rows=tna.Rows(0, 6, 18)), P.dora(2), "peft-lora",
            "'attn.qkv' has magnitudes of some of its rows only",
        ),
    ],
)  # fmt: skip
def test_what_a_form_does_not_hold_is_refused(target: tna.Target, config: Config, to: str, message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        tna.convert(adapter_on([target], config), to=to)


def test_a_magnitude_of_another_length_is_refused(tmp_path: Path) -> None:
    tna.convert(adapter_on([QUERIES], P.dora(2)), tmp_path / "theirs", to="peft-lora")
    place = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(place)
    name = "base_model.model.attn.q.lora_magnitude_vector"
    save_file({**tensors, name: np.ones(5, np.float32)}, place)
    message = r"the magnitude of 'attn.q' has 5 elements; expected 6, one for each output"
    with pytest.raises(tna.FileError, match=message):
        tna.convert(tmp_path / "theirs")
    save_file({**{key: array for key, array in tensors.items() if key != name}, f"{name}.weight": tensors[name]}, place)
    assert tna.convert(tmp_path / "theirs").exact


# What PEFT reads of transformers 5 is deprecated there.

NAME = "someone/tiny"
# Nothing that PEFT has a word for, but the library.
TRANSFORMERS: dict[str, Any] = {"auto_mapping": {"parent_library": "transformers"}}


@pytest.mark.parametrize(
    ("about", "saved", "expected"),
    [
        (None, [], {}),
        (Pretrained(NAME), [], {"base_model_name_or_path": NAME}),
        (Pretrained(NAME, "a" * 40), [], {"base_model_name_or_path": NAME, "revision": "a" * 40}),
        (Pretrained("bert-base-uncased"), [], {"base_model_name_or_path": "bert-base-uncased"}),
        # No paths and addresses, and no models of other libraries.
        (Pretrained("/home/someone/model", "a" * 40), [], {}),
        (Pretrained("C:\\model"), [], {}),
        (Pretrained("~/model"), [], {}),
        (Pretrained("https://example.org/model"), [], {}),
        (Pretrained("vit_tiny_patch16_224", library="timm", task="image-classification"), [], {}),
        (Pretrained(task="text-generation"), [], {"task_type": "CAUSAL_LM"}),
        (Pretrained(task="text2text-generation"), [], {"task_type": "SEQ_2_SEQ_LM"}),
        (Pretrained(task="feature-extraction"), [], {"task_type": "FEATURE_EXTRACTION"}),
        # A task only with its head.
        (Pretrained(task="text-classification"), ["score"], {"task_type": "SEQ_CLS"}),
        (Pretrained(task="token-classification"), ["classifier"], {"task_type": "TOKEN_CLS"}),
        (Pretrained(task="question-answering"), ["qa_outputs"], {"task_type": "QUESTION_ANS"}),
        (Pretrained(task="text-classification"), [], TRANSFORMERS),
        (Pretrained(task="text-classification"), ["classifier.dense", "classifier.out_proj"], TRANSFORMERS),
        (Pretrained(task="token-classification"), ["qa_outputs"], TRANSFORMERS),
        (Pretrained(task="question-answering"), [], TRANSFORMERS),
        (Pretrained(task="image-classification"), ["classifier"], TRANSFORMERS),
    ],
)
def test_what_is_known_of_the_base_is_written(
    about: Pretrained | None, saved: Sequence[str], expected: dict[str, Any]
) -> None:
    kept = {f"{name}.weight": np.ones((3, 4), "f4") for name in saved}
    file = dataclasses.replace(made(tna.presets.lora(2), SHAPES), pretrained=about, kept=kept)
    config = tna.convert(file, to="peft-lora").config
    assert config is not None
    assert {name: config[name] for name in ("base_model_name_or_path", "revision") if config.get(name)} == {
        name: text for name, text in expected.items() if name in ("base_model_name_or_path", "revision")
    }
    assert config["task_type"] == expected.get("task_type")
    if about is None or "task_type" in expected:
        assert "auto_mapping" not in config
    if expected is TRANSFORMERS:
        assert config["auto_mapping"]["parent_library"] == "transformers"


def test_methods_of_peft_and_vllm_say_it_too(tmp_path: Path) -> None:
    for form, config in (("peft-c3a", tna.presets.c3a(2)), ("vllm-lora", tna.presets.lora(2))):
        about = Pretrained(NAME, task="text-generation")
        file = dataclasses.replace(made(config, {"a.q": (8, 8)}), pretrained=about)
        tna.convert(file, tmp_path / form, to=form)
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == (NAME, "CAUSAL_LM")
        assert tna.convert(tmp_path / form, base={"a.q": (8, 8)}).exact


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")
@pytest.mark.parametrize(
    ("model", "auto", "loaded_as", "keep", "task"),
    [
        ("GPT2LMHeadModel", "AutoPeftModelForCausalLM", "PeftModelForCausalLM", [], "text-generation"),
        (
            "BertForSequenceClassification", "AutoPeftModelForSequenceClassification",
            "PeftModelForSequenceClassification", ["classifier"], "text-classification",
        ),
        # The head is the base's.
        ("BertForSequenceClassification", "AutoPeftModel", "PeftModel", [], "text-classification"),
    ],
)  # fmt: skip
def test_peft_loads_the_model_of_its_task(
    model: str, auto: str, loaded_as: str, keep: list[str], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's name on the hub, where PEFT looks it up if there is a network, is that of a folder here."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{model[:4]}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    getattr(transformers, model)(config).save_pretrained(NAME)
    ours = getattr(transformers, model).from_pretrained(NAME).eval()
    adapter = tt.attach(ours, tna.presets.lora(2), "qv", keep_trainable=keep)
    fill(adapter.parameters(), scale=0.5)
    assert adapter.pretrained is not None
    assert (adapter.pretrained.task, adapter.pretrained.local) == (task, True)
    adapter.pretrained = Pretrained(NAME, task=task)
    adapter.save("ours.safetensors")
    tna.convert("ours.safetensors", "theirs", to="peft-lora", base=NAME)
    theirs = getattr(peft, auto).from_pretrained("theirs").eval()
    assert type(theirs).__name__ == loaded_as
    saved = [name for name, module in theirs.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    assert saved == [f"base_model.model.{name}" for name in keep]
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=tokens)[0], theirs(input_ids=tokens)[0], rtol=0, atol=1e-5)

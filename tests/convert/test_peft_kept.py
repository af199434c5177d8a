"""What PEFT trains besides linear layers: experts, embeddings, rows of them, heads, biases, saved modules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support.depth import in_depth, long_only

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import tnadapt.torch as tt
from tests.torch.test_experts import EXPERTS, MODELS
from tests.torch.test_experts import made as of_experts

from .conversions import adapter_on, converted, fill, trained_by_peft
from .internals import OTHER_HEADS, TIED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:ensure_weight_tying=True but the model does not:UserWarning"),
    # It does not count parameters, though it applies the pattern to them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

IDS = torch.tensor([[3, 0, 5, 3], [7, 2, 3, 5]])
# What PEFT has of the embedding, the head or both; and on a tied model: whether they are one, or each has its own.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "embedding saved": ({"modules_to_save": ["embed_tokens"]}, "apart"),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "apart"),
    "head saved": ({"modules_to_save": ["lm_head"]}, "apart"),
    "embedding saved, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "one"),
    "head saved, tied": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "one"),
    "both saved, tied": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, "one"),
    "embedding adapted": ({"target_modules": ["q_proj", "embed_tokens"]}, "apart"),
    "head adapted": ({"target_modules": ["q_proj", "lm_head"]}, "apart"),
    "both adapted": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, "apart"),
    "embedding adapted, tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "one"),
    "head adapted, tied": ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, "one"),
    "embedding adapted, head saved": (
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, "apart",
    ),
    "tokens": ({"trainable_token_indices": [7, 2]}, "one"),
    "tokens, tied": ({"trainable_token_indices": [7, 2], "ensure_weight_tying": True}, "one"),
    "tokens of both": ({"trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [7, 2]}}, "one"),
    "other tokens": ({"trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [3]}}, "apart"),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [5, 3]}}, "apart"),
    "norms saved": ({"modules_to_save": ["norm"]}, "none"),
}  # fmt: skip


def made(tie: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def saved_by_peft(folder: Path, model: Any, **settings: Any) -> Any:
    """A trained adapter of PEFT, saved with its defaults."""
    return trained_by_peft(folder, model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


FEW = [*((case, True) for case in CASES), ("both saved", False), ("other tokens", False), ("head adapted, tied", False)]


@pytest.mark.parametrize(("case", "tie"), in_depth(((case, tie) for case in CASES for tie in (False, True)), FEW))
def test_peft_s_outputs_here_and_back(case: str, tie: bool, tmp_path: Path) -> None:
    settings, relation = CASES[case]
    base, ours = tmp_path / "base", tmp_path / "ours.safetensors"
    made(tie).save_pretrained(base)
    theirs = saved_by_peft(tmp_path / "theirs", made(tie), **settings)
    assert tna.convert(tmp_path / "theirs", ours, base=base).exact
    apart = tie and relation == "apart"
    if apart:
        for wrong in ({}, {"keep_tied": True}):
            with pytest.raises(tna.FileError, match=r"are one tensor \(tied weights\) in .* untie=True, which gives"):
                tt.load(made(tie), ours, **wrong)
    model = made(tie)
    adapter = tt.load(model, ours, untie=apart)
    assert not torch.allclose(model(IDS).logits, made(tie)(IDS).logits, atol=1e-2)
    same(model, theirs)
    if case == "tokens":  # in ascending order
        assert [target.rows for target in adapter.targets] == [None, tna.RowIndices((2, 7))]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (tie and not apart)
    check_merge(base, ours, tmp_path / "merged", theirs, apart)
    # Saved again, and back to PEFT, from both files.
    adapter.save(tmp_path / "again.safetensors")
    assert tna.load(tmp_path / "again.safetensors").ties == tna.load(ours).ties
    for name in ("ours", "again"):
        back = tna.convert(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-back", to="peft-lora", base=base)
        assert back.exact
        same(peft.PeftModel.from_pretrained(made(tie), tmp_path / f"{name}-back").eval(), theirs)
    # And what was written is read as it was.
    assert groups(tna.convert(tmp_path / "ours-back", base=base).file) == groups(tna.load(ours))


def check_merge(base: Path, ours: Path, out: Path, theirs: Any, apart: bool) -> None:
    """Merging on disk gives PEFT's outputs; or refuses, and says what does."""
    if not apart:
        tna.merge(base, ours, out)
    else:
        with pytest.raises(tna.FileError, match=r"ties it to another \(tie_word_embeddings .* bake\(\) it, set"):
            tna.merge(base, ours, out)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        tt.load(model, ours, untie=True).bake()
        model.config.tie_word_embeddings = False
        model.save_pretrained(out)
    same(transformers.AutoModelForCausalLM.from_pretrained(out).eval(), theirs)


def groups(file: tna.AdapterFile) -> set[frozenset[str]]:
    """The kept matrices, each as the set of its names."""
    return {frozenset([name, *others]) for name, others in file.ties.items() if name in file.kept}


OWN: dict[str, dict[str, Any]] = {
    "kept, tied": {"targets": ["q_proj"], "keep_trainable": ["embed_tokens"]},
    "head kept, tied": {"targets": ["q_proj"], "keep_trainable": ["lm_head", "model.norm"]},
    "embedding, tied": {"targets": ["embed_tokens", "q_proj"], "keep_tied": True},
    "rows, tied": {"cfg": "dense", "keep_tied": True},
    "embedding": {"targets": ["embed_tokens", "q_proj"], "untie": True},
    "head": {"targets": ["lm_head", "q_proj"], "untie": True},
    "both": {"targets": ["lm_head", "embed_tokens"], "untie": True},
}


@pytest.mark.parametrize("case", OWN)
def test_our_outputs_in_peft(case: str, tmp_path: Path) -> None:
    ours, base, model = tmp_path / "ours.safetensors", tmp_path / "base", made(True)
    model.save_pretrained(base)
    settings = {"cfg": tna.presets.lora(2), **OWN[case]}
    adapter = tt.attach(model, **{"targets": tt.token_targets(model, [2, 5]), **settings})
    fill(model.parameters(), scale=0.2)
    adapter.save(ours)
    tna.convert(ours, tmp_path / "theirs", to="peft-lora", base=base)
    same(peft.PeftModel.from_pretrained(made(True), tmp_path / "theirs").eval(), model)
    apart = settings.get("untie", False)
    again = made(True)
    file = converted(tmp_path / "theirs", tmp_path / "again.safetensors")
    tt.load(again, tmp_path / "again.safetensors", untie=apart)
    same(again, model)
    check_merge(base, ours, tmp_path / "merged", model, apart)
    if not apart:
        with pytest.raises(tna.FileError, match=r"and in this LlamaForCausalLM it is not( tied)?: tie the weights"):
            tt.load(made(False), ours)
    if "keep_tied" in settings:
        assert str(adapter.summary().export).endswith("and only PEFT has one LoRA of both, so merge it for others)")
        tied = {target.name: target.tied for target in file.targets if target.tied}
        assert tied == {"model.embed_tokens.weight": ("lm_head.weight",)}
        with pytest.raises(tna.ConfigError, match=r"updated together with lm_head.weight, to which it is tied, and vL"):
            tna.convert(ours, to="vllm")


def test_a_kept_embedding_and_its_head_next_to_lokr(tmp_path: Path) -> None:
    """PEFT ties what it saves for LoRA alone: for others it has two equal copies."""
    model = made(True)
    adapter = tt.attach(model, "lokr", ["q_proj"], keep_trainable=["embed_tokens"])
    fill(model.parameters(), scale=0.2)
    adapter.save(tmp_path / "ours.safetensors")
    config = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lokr").config
    assert config is not None
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert "ensure_weight_tying" not in config
    same(peft.PeftModel.from_pretrained(made(True), tmp_path / "theirs").eval(), model)


# -- Biases and saved modules --------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Layers with and without biases, a normalization, and a head of several layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.plain = torch.nn.Linear(8, 8, bias=False)
        self.other = torch.nn.Linear(8, 8)
        self.head = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

    def forward(self, x: Any) -> Any:
        return self.head(self.other(self.plain(self.norm(self.first(x)))))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
SHAPES = {name: tuple(module.weight.shape) for name, module in Model().named_modules() if hasattr(module, "weight")}
#: The least settings of each method of PEFT.
SIZES: dict[str, dict[str, Any]] = {
    "Lora": {"r": 2}, "LoKr": {"r": 2, "alpha": 2}, "LoHa": {"r": 2, "alpha": 2}, "Vera": {"r": 4}, "Miss": {"r": 4},
    "C3A": {"block_size": 4}, "FourierFT": {"n_frequency": 9},
}  # fmt: skip


def their_config(method: str, targets: Sequence[str] = ("first", "plain"), **settings: Any) -> Any:
    return getattr(peft, f"{method}Config")(**SIZES[method], target_modules=list(targets), **settings)


@pytest.mark.parametrize(
    ("method", "adapter_name"),
    [("Lora", "default"), ("Lora", "mine"), ("Vera", "mine"), ("Miss", "mine"), ("C3A", "mine"), ("FourierFT", "mine")],
)
def test_the_trained_copy_of_a_bias_is_read(method: str, adapter_name: str, tmp_path: Path) -> None:
    """With ``bias="all"`` PEFT stores three copies of a saved module's biases; the untrained one came last."""
    config = their_config(method, bias="all", modules_to_save=["head"])
    theirs = peft.get_peft_model(Model(), config, adapter_name=adapter_name)
    fill((p for name, p in theirs.named_parameters() if "original_module" not in name), scale=0.3)
    theirs.save_pretrained(tmp_path)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    file = converted(folder, tmp_path / "ours.safetensors", base=SHAPES)
    model = Model()
    tt.load(model, tmp_path / "ours.safetensors")
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=1e-5)
    assert set(file.kept) == {
        "first.bias", "norm.bias", "other.bias", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias",
    }  # fmt: skip
    back = tmp_path / "back"
    tna.convert(tmp_path / "ours.safetensors", back, to="peft-lora" if method == "Lora" else f"peft-{method.lower()}")
    again = peft.PeftModel.from_pretrained(Model(), back)
    torch.testing.assert_close(again(X), theirs(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["Lora", "Miss"])
def test_trained_copies_that_differ_are_named(method: str, tmp_path: Path) -> None:
    trained_by_peft(tmp_path, Model(), their_config(method, bias="all", modules_to_save=["head.2"]), scale=0.0)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    one, other = "base_model.model.head.2.bias", "base_model.model.head.2.modules_to_save.bias"
    save_file({**tensors, one: tensors[other] + 1}, path)
    with pytest.raises(tna.FileError, match=f"'{one}' and '{other}' are copies of one trained parameter, and differ"):
        tna.convert(tmp_path, base=SHAPES)


@pytest.mark.parametrize("to", ["peft-lora", "peft-vera", "peft-miss"])
@pytest.mark.parametrize(
    ("settings", "bias", "saved"),
    [
        ({"biases": "all"}, "all", []),
        ({"biases": "adapted"}, "lora_only", []),
        ({"biases": "adapted", "keep_trainable": ["head"]}, "lora_only", ["head.0", "head.2"]),
        ({"biases": "all", "keep_trainable": ["head", "norm"]}, "all", ["head.0", "head.2", "norm"]),
        ({"keep_trainable": ["norm.bias"]}, "all", []),
    ],
)
def test_biases_are_written_as_peft_loads_them(
    to: str, settings: dict[str, Any], bias: str, saved: list[str], tmp_path: Path
) -> None:
    model, presets = Model(), tna.presets
    preset = {"peft-lora": presets.lora(2), "peft-vera": presets.vera(4), "peft-miss": presets.miss(4)}[to]
    adapter = tt.attach(model, preset, ["first", "plain"], **settings)
    fill(model.parameters(), scale=0.3)
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to=to, base=_checkpoint(tmp_path))
    assert found.config is not None
    assert found.config["bias"] == (bias if to == "peft-lora" else "all")
    assert found.config["modules_to_save"] == (saved or None)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "theirs")
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-5, atol=1e-5)
    kept, expected = converted(tmp_path / "theirs").kept, tna.load(tmp_path / "ours.safetensors").kept
    assert kept.keys() == expected.keys()
    assert all(np.array_equal(kept[name], expected[name]) for name in kept)


def _checkpoint(folder: Path) -> Path:
    """A safetensors file of the model."""
    save_file(Model().state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def test_what_peft_cannot_load_is_refused(tmp_path: Path) -> None:
    base = _checkpoint(tmp_path)
    for to, preset in (("peft-lokr", "lokr"), ("peft-loha", "loha"), ("peft-lora", "hira")):
        file = _saved(tmp_path, preset, biases="adapted", rank=2)
        with pytest.raises(tna.ConfigError, match=r"trains no biases, and the adapter keeps 'first\.bias': convert to"):
            tna.convert(file, to=to)
        assert tna.convert(file, to=to, without_kept=True).exact
    file = _saved(tmp_path, "lora", keep_trainable=["other.weight"])
    message = r"with 'other\.weight' it needs 'other\.bias', which the adapter does not"
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(file, to="peft-lora", base=base)
    # PEFT would take "norm" for the end of "prenorm", too.
    save_file({**Model().state_dict(), "prenorm.weight": torch.ones(2)}, base)
    with pytest.raises(tna.ConfigError, match=r"by the ends of their names: .* it needs 'prenorm\.weight', which"):
        tna.convert(_saved(tmp_path, "lora", keep_trainable=["norm"]), to="peft-lora", base=base)


def _saved(folder: Path, preset: str, **settings: Any) -> Path:
    model = Model()
    adapter = tt.attach(model, preset, ["first", "plain"], **settings)
    adapter.save(folder / "ours.safetensors")
    adapter.detach()
    return folder / "ours.safetensors"


@pytest.mark.parametrize("method", in_depth(SIZES, ["Lora", "LoKr", "Vera"]))
def test_a_head_next_to_the_base_s_weight(method: str, tmp_path: Path) -> None:
    """By default PEFT stores the weight of an adapted head as well."""
    base = tmp_path / "base"
    made(False).save_pretrained(base)
    config = their_config(method, ["q_proj", "lm_head"])
    theirs = trained_by_peft(tmp_path / "theirs", made(False), config, scale=0.1)
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    name = "base_model.model.lm_head.base_layer.weight"
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=base)
    note = f"left out {name!r}: PEFT saves the base's own weight next to the update of an embedding or head"
    assert note in found.notes
    model = made(False)
    tt.load(model, tmp_path / "ours.safetensors")
    same(model, theirs)
    # A weight that was cast is the same; another one is an error.
    tensors = load_file(weights)
    save_file({**tensors, name: tensors[name].bfloat16()}, weights)
    assert tna.convert(tmp_path / "theirs", base=base).exact
    save_file({**tensors, name: tensors[name] * 1.01}, weights)
    with pytest.raises(tna.FileError, match=r"next to a 'lm_head\.weight' that differs from that of base"):
        tna.convert(tmp_path / "theirs", base=base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_kept_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    saved_by_peft(tmp_path, made(), modules_to_save=["lm_head"])
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: array.to(dtype) for name, array in load_file(weights).items()}, weights)
    file = converted(tmp_path)
    assert file.dtypes.get("kept.lm_head.weight", file.kept["lm_head.weight"].dtype.name) == str(dtype)[6:]


# -- Other architectures -------------------------------------------------------------------------------------------


#: The task of each architecture, and the names of its embedding and of a linear layer.
ARCHITECTURES = {
    "GPT2": ("LMHeadModel", "wte", "c_attn"),
    "T5": ("ForConditionalGeneration", "shared", "q"),
    "Gemma": ("ForCausalLM", "embed_tokens", "q_proj"),
    **dict.fromkeys(("Bert", "Roberta", "Albert", "Electra"), ("ForMaskedLM", "word_embeddings", "query")),
    "DistilBert": ("ForMaskedLM", "word_embeddings", "q_lin"),
}


def architecture(name: str) -> Any:
    sizes: dict[str, Any] = {
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1},
        "T5": {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        "DistilBert": {"n_layers": 1, "n_heads": 2, "dim": 16, "hidden_dim": 24},
    }  # fmt: skip
    others = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1 if name == "Gemma" else 2, "max_position_embeddings": 24, "embedding_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=40, **sizes.get(name, others))
    return getattr(transformers, name + ARCHITECTURES[name][0])(config).eval()


CHANGED = ("adapted", "saved", "tokens")
FEW_OF_THE_HUB = [
    ("GPT2", "adapted"), ("GPT2", "tokens"), ("Bert", "saved"), ("T5", "tokens"), ("Gemma", "adapted"),
]  # fmt: skip


@pytest.mark.parametrize("left_out", [["tie_word_embeddings"], ["tie_word_embeddings", "architectures"]])
@pytest.mark.parametrize(
    ("name", "change"), in_depth(((name, change) for name in ARCHITECTURES for change in CHANGED), FEW_OF_THE_HUB)
)
def test_a_tie_that_config_json_leaves_out(name: str, change: str, left_out: list[str], tmp_path: Path) -> None:
    """As transformers 4 wrote it, if it is the default of the class."""
    _, embedding, linear = ARCHITECTURES[name]
    ours, base, decoder = tmp_path / "ours.safetensors", tmp_path / "base", {"decoder_input_ids": IDS}
    settings: dict[str, Any] = {
        "adapted": {"target_modules": [embedding]},
        "saved": {"target_modules": [linear], "modules_to_save": [embedding]},
        "tokens": {"target_modules": [linear], "trainable_token_indices": {embedding: [7, 2]}},
    }[change]
    architecture(name).save_pretrained(base)
    theirs = saved_by_peft(tmp_path / "theirs", architecture(name), **settings)
    rewritten(base, left_out)
    assert tna.convert(tmp_path / "theirs", ours, base=base).exact
    if change != "tokens":
        with pytest.raises(tna.FileError, match=r"to another \(tie_word_embeddings in config\.json is not false\)"):
            tna.merge(base, ours, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    tna.merge(base, ours, tmp_path / "merged")
    merged = type(architecture(name)).from_pretrained(tmp_path / "merged").eval()
    tna.convert(ours, tmp_path / "back", to="peft-lora", base=base)
    back = peft.PeftModel.from_pretrained(architecture(name), tmp_path / "back").eval()
    expected, *others = (
        model(input_ids=IDS, **(decoder if name == "T5" else {})).logits for model in (theirs, merged, back)
    )
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["equal", "other", "absent"])
def test_a_stored_head_shows_whether_it_is_tied(stored: str, tmp_path: Path) -> None:
    base, ours = tmp_path / "base", tmp_path / "ours.safetensors"
    made(stored != "other").save_pretrained(base)
    rewritten(base, ["tie_word_embeddings"])
    tensors = load_file(base / "model.safetensors")
    if stored == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert ("lm_head.weight" in tensors) == (stored != "absent")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    theirs = saved_by_peft(tmp_path / "theirs", made(stored != "other"), target_modules=["embed_tokens"])
    tna.convert(tmp_path / "theirs", ours, base=base)
    if stored == "other":
        tna.merge(base, ours, tmp_path / "merged")
        same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), theirs)
    else:
        with pytest.raises(tna.FileError, match="ties it to another"):
            tna.merge(base, ours, tmp_path / "merged")


def rewritten(base: Path, left_out: list[str]) -> None:
    """Remove keys of ``config.json``."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in left_out}))


def test_a_tie_to_a_head_of_unknown_name(tmp_path: Path) -> None:
    """Nothing is lost: the file can be made to say what PEFT's folder does not."""
    base, ours = tmp_path / "base", tmp_path / "ours.safetensors"
    made(True).save_pretrained(base)
    config = base / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "WhisperForCausalLM"))
    theirs = saved_by_peft(tmp_path / "theirs", made(True), trainable_token_indices=[7, 2])
    found = tna.convert(tmp_path / "theirs", ours, base=base)
    assert any("load the result with keep_tied=True, and save it again for PEFT" in note for note in found.notes)
    message = r"does not say whether an update of 'model\.embed_tokens' is one of both"
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(ours, to="peft-lora", base=base)
    model = made(True)
    tt.load(model, ours, keep_tied=True).save(ours)
    same(model, theirs)
    tna.convert(ours, tmp_path / "back", to="peft-lora", base=base)
    same(peft.PeftModel.from_pretrained(made(True), tmp_path / "back").eval(), theirs)


@long_only
def test_the_names_of_tied_heads_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto

    heads = {end: heads for end, heads, witness in TIED if witness == f"{end}.weight"}
    mappings = [value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    listed = {one for names in mappings for own in names.values() for one in ([own] if isinstance(own, str) else own)}
    ends, checked = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration"), 0
    wrong = dict[str, set[str]]()
    for name in sorted(listed):
        ties = getattr(getattr(transformers, name, None), "_tied_weights_keys", None)
        if not isinstance(ties, dict) or not name.endswith(ends) or OTHER_HEADS.match(name):
            continue
        for embedding, own in heads.items():
            tied = {key for key, source in ties.items() if source == f"{embedding}.weight"}
            checked += bool(tied)
            if tied - {f"{head}.weight" for head in own} or (tied and len(tied) < len(own)):
                wrong[name] = tied
    assert (wrong, checked > 100) == ({}, True)


# -- Single rows of an embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_tokens_alone_in_half_precision_are_the_stored_rows(tie: bool, tmp_path: Path) -> None:
    made(tie, torch.bfloat16).save_pretrained(tmp_path / "base")
    config = peft.TrainableTokensConfig(token_indices=[7, 3, 39], target_modules=["embed_tokens"])
    trained_by_peft(tmp_path / "theirs", made(tie, torch.bfloat16), config)
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = {name: rows.bfloat16() for name, rows in load_file(path).items()}
    save_file(tensors, path)
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=tmp_path / "base")
    assert (found.origin, found.exact, found.parameters) == ("peft-trainable_tokens", True, (96 if tie else 48, 48))
    ours = made(tie, torch.bfloat16)
    tt.load(ours, tmp_path / "ours.safetensors", keep_tied=tie).merge()
    for rows in tensors.values():
        assert torch.equal(ours.model.embed_tokens.weight[[7, 3, 39]], rows)
    with pytest.raises(tna.FileError, match="replace those of the base"):
        tna.convert(tmp_path / "theirs")


def test_tokens_that_do_not_fit_are_named(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "base")
    theirs = tmp_path / "theirs"
    saved_by_peft(theirs, made(), trainable_token_indices=[5, 2])
    message = r"the rows of tokens of .* replace those of the base, .* give base= \(--base\), a"
    with pytest.raises(tna.FileError, match=message):
        tna.convert(theirs)
    shapes = {name: tuple(module.weight.shape) for name, module in made().named_modules() if hasattr(module, "weight")}
    with pytest.raises(tna.FileError, match=r"the values of 'model.embed_tokens' are needed, and base has shapes"):
        tna.convert(theirs, base=shapes)
    settings = theirs / "adapter_config.json"
    text = settings.read_text()
    for wrong, match in (
        ('{"other": [5, 2]}', "have no list of different tokens for 'model.embed_tokens'"),
        ("[5, 5]", "have no list of different tokens"),
        ("[1, 2, 3]", r"has rows of shape \(2, 16\) for 3 tokens"),
        ("[1, 400]", r"row 400 of a floating-point matrix is wanted: this is another model"),
    ):
        before, _, after = text.partition('"trainable_token_indices": ')
        settings.write_text(f'{before}"trainable_token_indices": {wrong}{after[after.index("]") + 1 :]}')
        with pytest.raises(tna.FileError, match=match):
            tna.convert(theirs, base=tmp_path / "base")


def test_equal_factors_of_other_layers_stay_apart() -> None:
    targets = [tna.Target("embed", (12, 6), "embedding"), tna.Target("fc", (12, 6))]
    file = adapter_on(targets, tna.presets.lora(2))
    equal = {name: np.ones_like(array) for name, array in file.arrays.items()}
    found = tna.convert(dataclasses.replace(file, arrays=equal), to="peft-lora")
    assert found.config is not None
    assert "ensure_weight_tying" not in found.config
    assert found.parameters[0] == found.parameters[1]


P = tna.presets
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def experts_of_peft(name: str, folder: Path, **settings: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=5, **{"target_modules": [], "target_parameters": BOTH, **settings})
    return trained_by_peft(folder, of_experts(name), config)


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_saved_gives_its_outputs(name: str, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"experts.down_proj": 2}, "target_modules": ["q_proj"]}
    theirs = experts_of_peft(name, tmp_path / "theirs", **settings)
    of_experts(name).save_pretrained(tmp_path / "base")
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=tmp_path / "base")
    assert found.exact
    model = of_experts(name)
    base = model(IDS).logits
    adapter = tt.load(model, tmp_path / "ours.safetensors")
    assert sum(target.index is not None for target in adapter.targets) == 16
    assert not torch.allclose(model(IDS).logits, base, atol=1e-2)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    assert tna.convert(tmp_path / "theirs", base=shapes_of(of_experts(name))).file.targets == found.file.targets


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_gives_our_outputs(name: str, tmp_path: Path) -> None:
    model = of_experts(name)
    adapter = tt.attach(model, {EXPERTS: P.lora(3, alpha=5), "qv": P.lora(2)})
    fill(adapter.parameters())
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    assert found.errors.keys() == {target.name if target.index is None else target.label for target in adapter.targets}
    theirs = peft.PeftModel.from_pretrained(of_experts(name), tmp_path / "theirs")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    again = tna.convert(tmp_path / "theirs").file  # by the shapes in the record
    assert {target.label for target in again.targets} == {target.label for target in adapter.targets}


def test_some_experts_of_one_parameter_with_ranks_of_their_own(tmp_path: Path) -> None:
    model = of_experts("mixtral")
    every = tt.find_targets(model, ["layers.1.mlp.experts.down_proj"])
    adapter = tt.attach(model, tna.CompositeConfig([(P.lora(1), 1), (P.lora(3, alpha=2), 1)]), [every[3], every[0]])
    fill(adapter.parameters())
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    assert found.config is not None
    assert found.config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    assert found.config["r"] == 3
    theirs = peft.PeftModel.from_pretrained(of_experts("mixtral"), tmp_path / "theirs")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_module_that_peft_takes_for_the_other_order(tmp_path: Path) -> None:
    """Llama 4 stores (in, out) and does not say so: PEFT's factors of it are those of the transposes."""
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 6))
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))
    base = shapes_of(model)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    merged = trained_by_peft(tmp_path, model, config).merge_and_unload().experts.gate_up_proj
    file = converted(tmp_path, base=base)
    assert [(target.index, target.transposed) for target in file.targets] == [(0, True), (1, True)]
    for delta, stored in zip(file.deltas(), merged, strict=True):
        torch.testing.assert_close(torch.tensor(delta), stored.detach().T, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    experts_of_peft("mixtral", tmp_path)
    model = of_experts("mixtral")
    message = r"target_parameters=.* does not store which .* give base= \(--base\), a folder"
    with pytest.raises(tna.FileError, match=message):
        tna.convert(tmp_path)
    with pytest.raises(tna.FileError, match=r"names 'experts\.\w+', .* base has no experts of that name"):
        tna.convert(tmp_path, base={"fc.weight": (3, 4)})
    wrong = {**shapes_of(model), "model.layers.0.mlp.experts.down_proj": (4, 16, 40)}
    wrong["model.layers.0.mlp.experts.gate_up_proj"] = (4, 80, 16)
    with pytest.raises(tna.FileError, match=r"up_proj' has the shape .* in base have \(80, 16\): this is another"):
        tna.convert(tmp_path, base=wrong)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    less = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.experts.base_layer" not in name}
    save_file(less, path)
    with pytest.raises(tna.FileError, match=r"experts' has factors for 1 parameters, and target_parameters names"):
        tna.convert(tmp_path, base=shapes_of(model))
    for name in tensors:
        if "layers.0.mlp.experts.lora_" in name:
            tensors[name] = (tensors[name][:, :6] if "_B" in name else tensors[name][:6]).contiguous()
    save_file(tensors, path)
    with pytest.raises(tna.FileError, match=r"down_proj' have 6 rows and 6 columns, and there are 4 experts"):
        tna.convert(tmp_path, base=shapes_of(model))


def expert(parameter: str = "down_proj", index: int = 1) -> tna.Target:
    return tna.Target("experts", (2, 6, 4), parameter=parameter, index=index)


def test_a_format_alone_takes_lora() -> None:
    found = tna.convert(adapter_on([expert(index=0), expert()], P.lora(1)), to="peft")
    assert (found.kind, found.exact) == ("peft-lora", True)


EMBEDDING, TIED_EMBEDDING = (tna.Target("embed", (12, 6), "embedding", tied=tied) for tied in ((), ("head.table",)))
NOT_OF_EMBEDDINGS = r"'embed' is an embedding, and apply=.* of it is not written for PEFT"


@pytest.mark.parametrize(
    ("targets", "config", "to", "message"),
    [
        *(
            ([expert()], P.lora(1), to, r"experts\.down_proj\[1\] cannot be converted.*one of the 2 matrices")
            for to in ("peft-lokr", "vllm-lora", "lycoris-lora")
        ),
        ([expert()], P.dora(1), "peft-lora", r"proj\[1\]' is one of the matrices .* apply='magnitude' of it is not"),
        ([expert("weight")], P.lora(1), "peft-lora", "'experts' has parameters weight, and it is unknown in which ord"),
        (
            [expert("up_proj", 0), tna.Target("fc", (4, 6), transposed=True)], P.lora(1), "peft-lora",
            r"'fc' is stored as \(in, out\), which PEFT .* refuses for experts",
        ),
        *(
            ([EMBEDDING], P.lora(2), to, "'embed' is an embedding, and .* has no .* of such a layer: convert to")
            for to in ("peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full")
        ),
        ([EMBEDDING], P.dora(2), "peft-lora", NOT_OF_EMBEDDINGS),
        ([EMBEDDING], P.hira(2), "peft-lora", NOT_OF_EMBEDDINGS),
        ([TIED_EMBEDDING], P.lora(2), "peft-lora", r"embed\.weight .* together with head\.table, to which it is tied"),
    ],
)  # fmt: skip
def test_experts_and_embeddings_that_cannot_be_written_are_named(
    targets: list[tna.Target], config: tna.Config, to: str, message: str
) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(adapter_on(targets, config), to=to)


TOKENS = torch.tensor([[3, 0, 11, 3], [7, 2, 3, 9]])


def test_fan_in_fan_out_is_not_said_of_embeddings_and_convolutions(tmp_path: Path) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(12, 6), transformers.pytorch_utils.Conv1D(8, 6)
            self.conv = torch.nn.Conv1d(8, 8, 2)

        def forward(self, ids: Any) -> Any:
            return self.conv(self.fc(self.embed(ids)).mT)

    config = peft.LoraConfig(r=3, target_modules=["embed", "fc", "conv"], fan_in_fan_out=True)
    theirs = trained_by_peft(tmp_path / "theirs", Mixed(), config)
    base = {"embed": (12, 6), "fc": (6, 8), "conv": (8, 8, 2)}
    for known in (None, base):
        file = converted(tmp_path / "theirs", tmp_path / "ours.safetensors", base=known, overwrite=True)
        transposed = {target.module: target.transposed for target in file.targets}
        assert transposed == {"embed": False, "fc": True, "conv": False}
        model = Mixed()
        tt.load(model, tmp_path / "ours.safetensors")
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS), rtol=1e-5, atol=1e-5)
    # And back, where PEFT's one setting is that of the Conv1D.
    back = tna.convert(tmp_path / "ours.safetensors", tmp_path / "back", to="peft-lora")
    assert back.config is not None
    assert back.config["fan_in_fan_out"] is True
    assert {target.module: target.transposed for target in converted(tmp_path / "back").targets} == transposed

"""A bundle serves itself: the file names its base, and load_pretrained builds the model, head and labels."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tnadapt as tna
import tnadapt.torch as tt
from paper.registries import fetch_part
from tests.support.depth import long_only
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.errors import FileError, TnadaptError

from .small import small, stir

LABELS = ("neg", "neutral", "pos")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "a"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=24, initializer_range=0.3)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    return transformers.BertTokenizerFast({word: number for number, word in enumerate(WORDS)})


def named(labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}


def adapted(
    bert: Path, name: str = "", keep: tuple[str, ...] = ("classifier",), **settings: Any
) -> tuple[Any, tt.Adapter]:
    """A classifier with an adapter, as if it had been trained, whose base has a name on the hub."""
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(bert, **{**named(), **settings}).eval()
    adapter = tt.attach(model, tna.presets.superlora(1, projection="linear"), keep_trainable=list(keep))
    stir(adapter)
    if name:
        model.config._name_or_path, model.config._commit_hash = name, "a" * 40
    return model, adapter


def outputs(model: Any, **inputs: Any) -> Any:
    inputs = inputs or tokenizer()(["good film", "the bad film"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs).logits


def refusal(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(TnadaptError) as caught:
        tt.load_pretrained(*arguments, **settings)
    return str(caught.value)


# -- A classifier ------------------------------------------------------------------------------


@pytest.mark.law("file-round-trip")
def test_a_folder_serves_itself(bert: Path, tmp_path: Path) -> None:
    model, adapter = adapted(bert)
    own = tokenizer()
    own.add_tokens(["great"])
    adapter.save_pretrained(tmp_path / "mine", tokenizer=own, metrics={"accuracy": 0.9375})
    before = torch.random.get_rng_state()
    loaded = tt.load_pretrained(tmp_path / "mine")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(outputs(loaded), outputs(model))
    assert type(loaded) is transformers.BertForSequenceClassification
    assert not loaded.training
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {"neg": 0, "neutral": 1, "pos": 2}
    again = tt.adapters(loaded)["default"]
    assert again.pretrained == adapter.pretrained
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "mine" / "adapter.safetensors").read_bytes()
    # The folder has a tokenizer of its own.
    assert tt.load_processor(tmp_path / "mine")("great")["input_ids"] == own("great")["input_ids"]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")) == len(WORDS) + 1
    # A file has the base's.
    path = tmp_path / "again.safetensors"
    merged = tt.load_pretrained(str(path), merge=True, name="mine")
    assert tt.adapters(merged)["mine"].merged
    torch.testing.assert_close(outputs(merged), outputs(model))
    assert tt.load_processor(path)("good film")["input_ids"] == tokenizer()("good film")["input_ids"]


def test_what_is_recorded_comes_back_and_can_be_changed(bert: Path, tmp_path: Path) -> None:
    model, adapter = adapted(bert, problem_type="multi_label_classification", pad_token_id=4, dtype=torch.bfloat16)
    assert adapter.pretrained == tna.Pretrained(
        str(bert), "", "", "transformers", "text-classification", LABELS, "bfloat16",
        {"problem_type": "multi_label_classification", "pad_token_id": 4},
    )  # fmt: skip
    adapter.save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        loaded = tt.load_pretrained(tmp_path, dtype=dtype)
        assert loaded.bert.embeddings.word_embeddings.weight.dtype is expected
        assert (loaded.config.problem_type, loaded.config.pad_token_id) == ("multi_label_classification", 4)
    model.config._name_or_path, model.config._commit_hash = "user/base", "a" * 40
    assert (adapter.pretrained.name, adapter.pretrained.revision) == ("user/base", "a" * 40)
    model.config._name_or_path = f"/cache/hub/models--user--base/snapshots/{'b' * 40}"
    assert (adapter.pretrained.name, adapter.pretrained.revision) == ("user/base", "b" * 40)
    model.config._name_or_path = str(bert)
    adapter.pretrained = dataclasses.replace(adapter.pretrained, labels=["a", "b", "c"], inputs={"max_length": 9})
    adapter.save_pretrained(tmp_path)
    loaded = tt.load_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert tt.adapters(loaded)["default"].pretrained.inputs == {"max_length": 9}
    adapter.pretrained = None
    assert adapter.pretrained.labels == LABELS
    model.config.pad_token_id = -1  # some configs have this for none
    assert adapter.pretrained.settings == {"problem_type": "multi_label_classification"}
    with pytest.raises(tna.ConfigError, match=r"pretrained must be a tnadapt.Pretrained or None; got dict"):
        adapter.pretrained = {}
    # An unusual config does not keep an adapter from being saved.
    model.config.problem_type = "ranking"
    adapter.save(tmp_path / "adapter.safetensors")
    about = tna.load(tmp_path / "adapter.safetensors").pretrained
    assert about is not None
    assert (about.name, about.task, about.labels) == (str(bert), "", ())


def test_a_model_of_no_library_records_nothing(tmp_path: Path) -> None:
    adapter = tt.attach(small())
    assert adapter.pretrained is None
    adapter.save_pretrained(tmp_path)
    assert "pretrained" not in tna.info(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path / 'adapter.safetensors'}: it does not say what its base model is, only its class 'Small': give "
        "the model itself, base=model, or load the adapter onto it by tna.torch.load, and save it again"
    )
    model = tt.load_pretrained(tmp_path, base=small())
    assert list(tt.adapters(model)) == ["default"]
    with pytest.raises(FileError, match="load its tokenizer or processor yourself"):
        tt.load_processor(tmp_path)


# -- Another base ------------------------------------------------------------------------------


def test_another_place_of_the_base(bert: Path, tmp_path: Path) -> None:
    model, adapter = adapted(bert)
    adapter.pretrained = dataclasses.replace(adapter.pretrained, name=str(tmp_path / "moved" / "away"))
    adapter.save_pretrained(tmp_path / "mine")
    said = refusal(tmp_path / "mine")
    assert said.startswith(f"{tmp_path / 'mine' / 'adapter.safetensors'}: cannot load its base model '{tmp_path}/moved")
    assert said.endswith(
        "away' through transformers: there is no such folder here; give base= (--base) with a folder, a name or a model"
    )
    for base in (bert, str(bert), transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=3)):
        loaded = tt.load_pretrained(tmp_path / "mine", base=base)
        assert torch.equal(outputs(loaded), outputs(model))
        assert loaded.config.id2label == dict(enumerate(LABELS))
    transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=5).save_pretrained(tmp_path / "five")
    resized, adapter = adapted(tmp_path / "five", ignore_mismatched_sizes=True)
    adapter.save_pretrained(tmp_path / "three")
    assert torch.equal(outputs(tt.load_pretrained(tmp_path / "three")), outputs(resized))
    # A merge that fails leaves the caller's model as it was.
    tt.attach(base, "lora", "q", "relu", activation="relu", rank=2).save(tmp_path / "relu.safetensors")
    tt.adapters(base)["relu"].detach()
    with pytest.raises(tna.ConfigError, match="cannot be merged"):
        tt.load_pretrained(tmp_path / "relu.safetensors", base=base, name="again", merge=True)
    assert list(tt.adapters(base)) == ["default"]
    # A pickle is not read because the file names it.
    pickled = tmp_path / "moved" / "away"
    shutil.copytree(bert, pickled, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(transformers.BertModel.from_pretrained(bert).state_dict(), pickled / "pytorch_model.bin")
    assert "cannot load its base model" in refusal(tmp_path / "mine")
    assert torch.equal(outputs(tt.load_pretrained(tmp_path / "mine", base=str(pickled))), outputs(model))


def test_the_wrong_base_is_refused(bert: Path, tmp_path: Path) -> None:
    model, adapter = adapted(bert)
    adapter.save_pretrained(tmp_path / "mine")
    torch.manual_seed(5)
    other = transformers.BertModel(transformers.BertConfig.from_pretrained(bert))
    near = transformers.BertModel.from_pretrained(bert)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    near.save_pretrained(tmp_path / "near")
    said = refusal(tmp_path / "mine", base=tmp_path / "other")
    assert "it was trained on another base model than this BertForSequenceClassification" in said
    assert said.endswith("Give the model it was trained on, or check_base=False")
    assert "apart" not in said
    close = (
        r"They are about \d+ % apart, as quantized weights are from the originals \(a common factor .*\)\. Give the "
    )
    assert re.search(close, refusal(tmp_path / "mine", base=tmp_path / "near"))
    file = tna.load(tmp_path / "mine" / "adapter.safetensors")
    moved = Fingerprint("0" * 64, "float32", tuple(number + 0.095 for number in file.base.sketch))
    tna.save(tmp_path / "moved.safetensors", dataclasses.replace(file, base=moved))
    with pytest.raises(FileError, match=r"They are about 9\.5 % apart"):
        tt.load(model, tmp_path / "moved.safetensors", "moved")
    config = transformers.LlamaConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=24)
    transformers.LlamaModel(config).save_pretrained(tmp_path / "llama")
    assert refusal(tmp_path / "mine", base=tmp_path / "llama").endswith(
        f"its base model '{tmp_path / 'llama'}' is a LlamaForSequenceClassification, and the adapter was trained on a "
        "'BertForSequenceClassification': give base= (--base) with the model it was trained on"
    )
    loaded = tt.load_pretrained(tmp_path / "mine", base=tmp_path / "other", check_base=False)
    about = tt.adapters(loaded)["default"].pretrained
    assert (about.name, about.labels) == (str(tmp_path / "other"), LABELS)
    another = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "other", **named(("a", "b", "c")))
    about = tt.load(another, tmp_path / "mine" / "adapter.safetensors", check_base=False).pretrained
    assert (about.name, about.labels) == (str(tmp_path / "other"), LABELS)


def test_what_a_file_does_not_say_or_must_not(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = f"{tmp_path}: this folder has no adapter.safetensors, which save_pretrained writes"
    assert refusal(tmp_path) == none
    (tmp_path / "config.json").touch()
    model = "it has a model: tnadapt.torch.attach adapts it, and load puts a saved adapter on it"
    assert refusal(tmp_path) == f"{none}; {model}"
    for path in ("./missing", "missing", "user/missing.safetensors", tmp_path / "missing"):
        assert "there is no such file or folder; a name on the hub is like 'user/my-adapter'" in refusal(path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it has an adapter of PEFT, which tnadapt.convert (tnadapt convert) turns into one" in refusal(tmp_path)
    adapted(bert, keep=())[1].save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path / 'adapter.safetensors'}: its base model '{bert}' has no values for 'classifier.bias', "
        "'classifier.weight', and neither does the file, so that the model's outputs would be random: attach with "
        "keep_trainable for these parameters, train and save again; or give base= (--base) with a model that has them"
    )
    _, adapter = adapted(bert)
    adapter.save_pretrained(tmp_path)
    for module, name in (("transformers", tmp_path), ("huggingface_hub", "user/mine")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            said = refusal(name)
        assert f"{module} is not installed" in said
        assert said.endswith("pip install 'tnadapt[hub]'")
    about = adapter.pretrained
    remote = "an address or network share, which is not opened because a file says so"
    for changes, message in (
        ({"task": ""}, "it does not say for which task its model is: give base= (--base) with a model"),
        ({"name": ""}, "it does not name its base model: give base= (--base) with a folder, a name or a model"),
        ({"name": "\\\\host\\share"}, f"{remote}: give base="),
    ):
        adapter.pretrained = dataclasses.replace(about, **changes)
        adapter.save_pretrained(tmp_path)
        assert message in refusal(tmp_path)
    tt.load_pretrained(tmp_path, base=bert)
    with pytest.raises(FileError, match=remote):
        tt.load_processor(tmp_path)
    assert tna.Pretrained("local-dir://host/share", library="timm").remote
    adapter.pretrained = tna.Pretrained("user/vit", library="timm", task="image-classification")
    adapter.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm is not installed, which builds the base model: pip install 'tnadapt[hub]'" in refusal(tmp_path)


# -- Other models ------------------------------------------------------------------------------


def test_an_image_model_and_its_processor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit", **named()).eval()
    adapter = tt.attach(model, keep_trainable=["classifier"])
    stir(adapter)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({**settings, "size": {"height": 16, "width": 16}})
    )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    adapter.save_pretrained(tmp_path / "mine", processor=processor)
    loaded, own = tt.load_pretrained(tmp_path / "mine"), tt.load_processor(tmp_path / "mine")
    pixels = own(torch.rand(3, 20, 30), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.equal(outputs(loaded, pixel_values=pixels), outputs(model, pixel_values=pixels))
    assert (list(own.image_mean), list(own.image_std)) == ([0.5] * 3, [0.25] * 3)


@pytest.mark.slow
def test_a_quantized_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 64}, vocab_size=32)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", quantization_config=four).eval()
    adapter = tt.attach(model)
    stir(adapter)
    adapter.save_pretrained(tmp_path / "mine")
    words = torch.arange(8)[None]
    loaded = tt.load_pretrained(tmp_path / "mine", quantization_config=four, device="cpu")
    assert torch.equal(outputs(loaded, input_ids=words), outputs(model, input_ids=words))
    assert "it was trained on another base model" in refusal(tmp_path / "mine")
    tt.load_pretrained(tmp_path / "mine", check_base=False)


WORD = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: The base, the class with a head, its settings, what is trained besides, and the task.
OTHERS: dict[str, tuple[Any, str, dict[str, Any], list[str], str]] = {
    "a language model": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **WORD, tie_word_embeddings=True)),
        "CausalLM", {}, [], "text-generation",
    ),
    "a decoder that classifies": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **WORD)),
        "SequenceClassification", named(), ["score"], "text-classification",
    ),
    "a head on another head's base": (
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, **WORD)),
        "TokenClassification", named(("O", "B", "I")), ["classifier"], "token-classification",
    ),
    "a regression": (
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, **WORD)),
        "SequenceClassification", {"num_labels": 1, "problem_type": "regression"}, ["classifier"],
        "text-classification",
    ),
    "an encoder and a decoder": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, vocab_size=32
        )),
        "Seq2SeqLM", {}, [], "text2text-generation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_heads(tmp_path: Path, case: str) -> None:
    make, auto, settings, keep, task = OTHERS[case]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    build = getattr(transformers, f"AutoModelFor{auto}").from_pretrained
    model = build(tmp_path / "base", **settings).eval()
    adapter = tt.attach(model, keep_trainable=keep)
    stir(adapter)
    adapter.save_pretrained(tmp_path / "mine")
    loaded = tt.load_pretrained(tmp_path / "mine")
    words = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])}
    words |= {"decoder_input_ids": words["input_ids"]} if auto == "Seq2SeqLM" else {}
    assert torch.equal(outputs(loaded, **words), outputs(model, **words))
    assert loaded.config.id2label == model.config.id2label
    assert loaded.config.problem_type == model.config.problem_type
    about = tna.load(tmp_path / "mine" / "adapter.safetensors").pretrained
    assert about.task == task
    if not settings:
        assert (about.labels, about.settings) == ((), {})
    message = r"there is no tokenizer in '.*base': save one with the adapter, or load it"
    if case == "a language model":  # whose class needs files
        message = r"cannot load the AutoTokenizer from '.*base': .*; load it yourself"
    with pytest.raises(FileError, match=message):
        tt.load_processor(tmp_path / "mine")


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("Model", "feature-extraction"), ("ForMaskedLM", "fill-mask"), ("ForQuestionAnswering", "question-answering"),
        ("ForTokenClassification", "token-classification"), ("ForMultipleChoice", "multiple-choice"),
        ("ForNextSentencePrediction", ""),
    ],
)  # fmt: skip
def test_the_task_is_that_of_the_class(bert: Path, kind: str, task: str) -> None:
    model = getattr(transformers, f"Bert{kind}")(transformers.BertConfig.from_pretrained(bert))
    assert tt.attach(model).pretrained.task == task


def test_timm_reads_safetensors_alone_of_what_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked = list[dict[str, Any]]()

    def recorded(name: str, **settings: Any) -> Any:
        asked.append({"name": name, **settings})
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", recorded)
    adapter = tt.attach(small())
    for name in ("hf-hub:user/vit", f"local-dir:{tmp_path}"):
        adapter.pretrained = tna.Pretrained(name, library="timm", task="image-classification", labels=["a", "b"])
        adapter.save_pretrained(tmp_path)
        said = refusal(tmp_path)
    assert said.endswith(f"'local-dir:{tmp_path}' is no folder here with model.safetensors: give base= (--base) with "
                         "timm's name of a model, or a model")  # fmt: skip
    assert "offline; give base=" in refusal(tmp_path, base=f"local-dir:{tmp_path}")
    assert asked == [
        {"name": "hf-hub:user/vit", "pretrained": True, "num_classes": 2,
         "pretrained_cfg_overlay": {"hf_hub_filename": "model.safetensors"}},
        {"name": f"local-dir:{tmp_path}", "pretrained": True, "num_classes": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "targets"), [("test_vit", "all-linear"), ("test_resnet", "conv")])
def test_timm_s_usual_size_of_images_is_not_stored(name: str, targets: str) -> None:
    timm = pytest.importorskip("timm")
    about = tt.attach(timm.create_model(name), tna.presets.lora(1), targets).pretrained
    assert about is not None
    assert about.settings == {"num_classes": 1000}


@pytest.mark.slow
def test_a_timm_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def untrained(name: str, pretrained: bool, **settings: Any) -> Any:
        """The weights that a download would bring: those of a seed."""
        torch.manual_seed(0)
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", untrained)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(name, pretrained=True, num_classes=3, img_size=32).eval()
    adapter = tt.attach(model, keep_trainable=["head"])
    stir(adapter)
    assert adapter.pretrained == tna.Pretrained(
        name, library="timm", task="image-classification", dtype="float32",
        settings={"num_classes": 3, "img_size": [32, 32]},
    )  # fmt: skip
    adapter.pretrained = dataclasses.replace(adapter.pretrained, labels=LABELS)
    adapter.save_pretrained(tmp_path)
    loaded = tt.load_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg["label_names"] == list(LABELS)
    assert tt.adapters(loaded)["default"].pretrained.labels == LABELS
    pil = pytest.importorskip("PIL.Image")
    assert tt.load_processor(tmp_path)(pil.new("RGB", (50, 40))).shape == (3, 32, 32)


# -- The card ----------------------------------------------------------------------------------


def test_the_card(bert: Path, tmp_path: Path) -> None:
    _, adapter = adapted(bert, "user/base")
    adapter.save_pretrained(tmp_path / "my-adapter", metrics={"accuracy": 0.9375, "f1": 1 / 3})
    card = (tmp_path / "my-adapter" / "README.md").read_text()
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "base_model": "user/base", "base_model_relation": "adapter", "library_name": "tnadapt",
        "pipeline_tag": "text-classification", "tags": ["tnadapt"],
    }  # fmt: skip
    for line in (
        "# my-adapter",
        f"`user/base, revision {'a' * 40}` (BertForSequenceClassification).\n\n|  |  |\n|---|---|\n",
        f"| Trained parameters | {adapter.num_parameters:,} float32 |",
        "| Updated weights | 4 weights (q, v): `bert.encoder.layer.0.attention.self.query.weight` …",
        '| Config | `rank=1`, `groups=1`, `fold="hypercube"`, `projection="linear"`, `rate="adam"` |',
        "| Also trained | `classifier.weight`, `classifier.bias` |",
        "| Task | text-classification |",
        "Labels: 0 neg, 1 neutral, 2 pos.",
        "| accuracy | 0.9375 |\n| f1 | 0.333333 |",
        'model = tnadapt.torch.load_pretrained("my-adapter")',
    ):
        assert line in card
    for metrics in ({"accuracy": "high"}, {"accuracy": True}, {1: 0.5}, [0.5], "accuracy"):
        with pytest.raises(tna.ConfigError, match="metrics must be a mapping of strings to numbers or None; got"):
            adapter.save_pretrained(tmp_path, metrics=metrics)
    adapter.save_pretrained(tmp_path, metrics={"accuracy": np.float32(0.5), "steps": np.int64(7)})
    assert "| accuracy | 0.5 |\n| steps | 7 |" in (tmp_path / "README.md").read_text()
    with pytest.raises(tna.ConfigError, match="tokenizer and processor must have save_pretrained"):
        adapter.save_pretrained(tmp_path, tokenizer="bert")


def test_a_card_of_several_configs_and_of_a_long_one(tmp_path: Path) -> None:
    configs = {"blocks.0.qkv": tna.presets.lora(2), "blocks.0.proj": tna.presets.superlora(3)}
    tt.attach(small(), configs).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert '| Config | `rank=2`, `rate="adam"` for 1 weight |\n' in card
    assert '| Config | `rank=3`, `groups=1`, `fold="hypercube"`, `rate="adam"` for 1 weight |\n' in card
    long = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(99)])
    config = tna.Config(rank=1, groups=[[number] for number in range(99)], fold="hypercube")
    tt.attach(long, config, "all-linear").save_pretrained(tmp_path / "long")
    card = (tmp_path / "long" / "README.md").read_text()
    assert "`groups=[[0], [1], [2]," in card
    assert max(map(len, card.splitlines())) < 400


def test_a_card_tells_no_path_and_stays_once_it_was_edited(bert: Path, tmp_path: Path) -> None:
    adapter, card = adapted(bert)[1], tmp_path / "mine" / "README.md"
    adapter.save_pretrained(tmp_path / "mine")
    text = card.read_text()
    assert not any(path in text for path in (str(tmp_path), str(bert.parent), "base_model"))
    assert 'load_pretrained("mine", base="…")' in text
    adapter.save_pretrained(tmp_path / "mine", metrics={"accuracy": 0.5})
    assert "| accuracy | 0.5 |" in card.read_text()  # as tnadapt wrote it: replaced
    edited = card.read_text().replace("## Use", "## How I use it")
    card.write_text(edited)
    adapter.save_pretrained(tmp_path / "mine")
    assert card.read_text() == edited
    adapter.save_pretrained(tmp_path / "mine", overwrite_card=True)
    assert "## How I use it" not in card.read_text()
    for own in (b"mine", "d\xe9j\xe0".encode("latin-1")):
        card.write_bytes(own)
        adapter.save_pretrained(tmp_path / "mine")
        assert card.read_bytes() == own


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("user/base", True), ("bert-base-uncased", True), ("1e3", True), ("true", True), ("no", True),
        ('user/"x: y"', False), ("A model of 2 words", False), ("user/na:me", False), ("a/b/c", False),
        ("a--b/c", False),
    ],
)  # fmt: skip
def test_the_hub_reads_the_card(name: str, known: bool, bert: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    adapter = adapted(bert)[1]
    adapter.pretrained = dataclasses.replace(adapter.pretrained, name=name)
    adapter.save_pretrained(tmp_path)
    found = hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert found == hub.metadata_load(tmp_path / "README.md")
    base = {"base_model": name, "base_model_relation": "adapter"} if known else {}
    assert found == base | {"library_name": "tnadapt", "pipeline_tag": "text-classification", "tags": ["tnadapt"]}
    assert ('base="…"' not in (tmp_path / "README.md").read_text()) == known
    if known:
        hub.utils.validate_repo_id(name)


# -- Pretrained models -------------------------------------------------------------------------


@pytest.mark.slow
@long_only
def test_a_language_model_in_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = fetch_part("smollm2.gguf", tmp_path).parent
    file = "smollm2.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    adapter = tt.attach(model)
    stir(adapter)
    assert (adapter.pretrained.name, adapter.pretrained.file) == (str(folder), file)
    adapter.save(tmp_path / "mine.safetensors")
    loaded = tt.load_pretrained(tmp_path / "mine.safetensors")
    inputs = tt.load_processor(tmp_path / "mine.safetensors")("A good film", return_tensors="pt")
    assert torch.equal(outputs(loaded, **inputs), outputs(model, **inputs))


def test_names_and_labels_in_a_card_are_text(tmp_path: Path) -> None:
    evil = "a`<img src=x>|\x1b[31m\u202e\n---\nlicense: evil"
    model, names = type(evil, (torch.nn.Module,), {})(), [f"{evil}{number}" for number in range(2)]
    for name in names:
        model.add_module(name, torch.nn.Linear(2, 2))
    adapter = tt.attach(model, tna.presets.lora(1), names)
    labels = ["<script>", "a|b\n# title", "[link](x)"]
    adapter.pretrained = tna.Pretrained("/x/" + evil.split("|")[0], labels=labels)
    adapter.save_pretrained(tmp_path / evil, metrics={evil: 0.5})
    card = (tmp_path / evil / "README.md").read_text()
    front, body = card.split("\n---\n")[0], card.split("\n---\n", 1)[1]
    assert "license" not in front
    assert "\n---" not in body
    assert not {"\x1b", "\u202e"} & set(card)
    assert r"Labels: 0 \<script\>, 1 a\|b \# title, 2 \[link\](x)." in body
    (updated,) = [line for line in body.splitlines() if line.startswith("| Updated weights |")]
    name = r"a'<img src=x>\|\x1b[31m\u202e --- license: evil"
    assert updated == f"| Updated weights | 2 weights (linear): `{name}0.weight` … `{name}1.weight` |"
    # Outside of code nothing is a tag.
    plain = re.sub(r"```.*?```|`[^`]*`", "", body.replace(r"\<", "").replace(r"\`", ""), flags=re.S)
    assert "<" not in plain.replace("<!-- tnadapt", "")
